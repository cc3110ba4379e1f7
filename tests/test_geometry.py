"""The metres left to success, on states written down here and along a scripted expert's episode."""

import pytest
import torch

from common.envs import ManiSkillEnvs
from common.geometry import success_distance
from common.scenes import CameraConfig, CamerasConfig, EnvConfig
from common.scripted import ScriptedExpert

LAYOUT = {"tcp_pose": (1, 8), "goal_pos": (8, 11), "obj_pose": (11, 18)}  # column 0: something else


def state(tcp: list, cube: list, goal: list) -> torch.Tensor:
    rotation = [1.0, 0.0, 0.0, 0.0]
    return torch.tensor([[9.0, *tcp, *rotation, *goal, *cube, *rotation]])


@pytest.mark.parametrize(
    ("task", "tcp", "cube", "goal", "expected"),
    [
        # 0.3 m above the push point, less the 1 cm that counts as there; the cube 0.2 m from the goal
        ("PushCube-v1", [-0.025, 0.0, 0.32], [0.0, 0.0, 0.02], [0.2, 0.0, 0.001], 0.29 + 0.4),
        # at the push point within 1 cm: only the cube's way is left, and its height is no part of it
        ("PushCube-v1", [-0.033, 0.0, 0.02], [0.0, 0.0, 0.02], [0.03, 0.04, 0.5], 0.1),
        ("PushCube-v1", [0.175, 0.0, 0.02], [0.2, 0.0, 0.02], [0.2, 0.0, 0.001], 0.0),
        # from the other side of the cube, 3 cm from its centre
        ("PullCube-v1", [0.03, 0.0, 0.06], [0.0, 0.0, 0.02], [-0.2, 0.0, 0.001], 0.03 + 0.4),
        # a 3-4-5 triangle to the cube, and its height over the table counts
        ("PickCube-v1", [0.03, 0.04, 0.02], [0.0, 0.0, 0.02], [0.0, 0.0, 0.22], 0.05 + 0.4),
    ],
)
def test_metres_left(task: str, tcp: list, cube: list, goal: list, expected: float):
    distance = success_distance(task, LAYOUT, state(tcp, cube, goal))
    assert distance.dtype == torch.float32
    assert distance.tolist() == pytest.approx([expected], abs=1e-6)


def test_each_row_has_its_own_and_the_states_stay_as_they_were():
    far, near = ([x, 0.0, 0.02] for x in (-0.125, -0.025))
    obs = torch.cat([state(tcp, [0.0, 0.0, 0.02], [0.2, 0.0, 0.0]) for tcp in (far, near)])
    before = obs.clone()
    assert success_distance("PushCube-v1", LAYOUT, obs).tolist() == pytest.approx([0.49, 0.4], abs=1e-6)
    assert torch.equal(obs, before)


def test_a_task_without_a_rule_has_none():
    assert success_distance("RollBall-v1", {}, torch.zeros(2, 3)) is None


@pytest.mark.parametrize("task", ["PushCube-v1", "PullCube-v1", "PickCube-v1"])
def test_it_falls_while_an_expert_advances(task: str):
    """Up to the first success; half a centimetre of standstill or detour is allowed in a step."""
    tiny = CameraConfig(width=8, height=8)  # nothing is rendered here
    cfg = EnvConfig(
        task=task,
        control_freq=10,
        ignore_terminations=False,
        sim_backend="cpu",
        render_backend="cpu",
        cameras=CamerasConfig(tiny, tiny),
    )
    envs = ManiSkillEnvs(cfg, num_envs=1)
    expert = ScriptedExpert(task, cfg.control_mode, envs.spec.obs_layout)
    obs, distances, succeeded = envs.reset(seed=3), [], False
    while not succeeded and len(distances) < 20:
        distances.append(float(success_distance(task, envs.spec.obs_layout, obs)))
        step = envs.step(
            expert.act(obs, torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool))
        )
        obs, succeeded = step.obs, bool(step.success)
    distances.append(float(success_distance(task, envs.spec.obs_layout, step.next_obs)))
    envs.close()
    assert succeeded
    change = torch.tensor(distances).diff()
    assert change.max() < 0.005
    assert distances[-1] < distances[0] - 0.2
