"""The scripted experts: they succeed from the state alone, and say what they cannot do."""

import pytest
import torch

from common.envs import ManiSkillEnvs
from common.geometry import success_distance
from common.runtime import UserError
from common.scenes import CameraConfig, CamerasConfig, EnvConfig
from common.scripted import EXPERTS, ScriptedExpert

TINY = CameraConfig(width=8, height=8)  # nothing is rendered here


@pytest.mark.parametrize(
    ("task", "num_steps", "at_least"),
    [("PullCube-v1", 15, 9), ("PushCube-v1", 15, 8), ("PickCube-v1", 20, 9), ("PlaceSphere-v1", 22, 8)],
)
def test_expert_succeeds(task: str, num_steps: int, at_least: int):
    """Of ten episodes, in 10 Hz steps; the control where nobody acts succeeds in none."""
    cfg = EnvConfig(
        task=task,
        control_freq=10,
        max_episode_steps=num_steps,
        ignore_terminations=False,
        sim_backend="cpu",
        render_backend="cpu",
        cameras=CamerasConfig(TINY, TINY),
    )
    envs = ManiSkillEnvs(cfg, num_envs=1)
    expert = ScriptedExpert(task, cfg.control_mode, envs.spec.obs_layout)
    no_offset, false = torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool)

    def num_successes(num_episodes: int, scale: float) -> int:
        obs, count = envs.reset(seed=11), 0
        while num_episodes:
            step = envs.step(scale * expert.act(obs, no_offset, no_offset, false))
            obs = step.obs
            num_episodes -= int(step.done)
            count += int(step.terminated)
        return count

    assert num_successes(10, scale=1.0) >= at_least
    assert num_successes(1, scale=0.0) == 0
    envs.close()


LAYOUT = {"tcp_pose": (0, 7), "goal_pos": (7, 10), "obj_pose": (10, 17)}


def state(tcp: list[float], cube: list[float], goal: list[float]) -> torch.Tensor:
    upright = [1.0, 0.0, 0.0, 0.0]
    return torch.tensor([[*tcp, *upright, *goal, *cube, *upright]])


@pytest.mark.parametrize(
    ("task", "tcp", "direction"),
    [
        ("PushCube-v1", [0.1, 0.0, 0.08], [-1, 0, 0]),  # over the cube: back off first, not down on it
        ("PushCube-v1", [-0.055, 0.0, 0.08], [0, 0, -1]),  # behind it: down
        ("PushCube-v1", [-0.055, 0.0, 0.03], [1, 0, 0]),  # low: through it
        ("PullCube-v1", [0.055, 0.0, 0.08], [0, 0, -1]),
        ("PullCube-v1", [0.055, 0.0, 0.03], [-1, 0, 0]),
    ],
)
def test_first_motions_around_a_cube_at_the_origin(task: str, tcp: list[float], direction: list[int]):
    goal = [0.2 if task == "PushCube-v1" else -0.2, 0.0, 0.0]
    obs = state(tcp, cube=[0.0, 0.0, 0.02], goal=goal)
    action = ScriptedExpert(task, "pd_ee_delta_pos", LAYOUT).act(
        obs, torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([False])
    )
    assert action.shape == (1, 4)
    assert action[0, :3].sign().tolist() == direction
    assert action.abs().max() <= 1
    assert action[0, 3] == -1  # gripper closed


def test_goal_offset_moves_the_end_of_the_push():
    obs = state([-0.021, 0.0, 0.03], cube=[0.0, 0.0, 0.02], goal=[0.03, 0.0, 0.0])
    expert = ScriptedExpert("PushCube-v1", "pd_ee_delta_pos", LAYOUT)
    none = torch.tensor([False])
    forward = [
        expert.act(obs, torch.tensor([[x, 0.0, 0.0]]), torch.zeros(1, 3), none)[0, 0] for x in (0.0, 0.02)
    ]
    # (0.03 - 0.02 + 0.021) m at 0.1 m per step, and 2 cm more
    assert [round(float(x), 3) for x in forward] == [0.31, 0.51]


def test_an_object_offset_acts_as_if_the_object_stood_there():
    expert = ScriptedExpert("PushCube-v1", "pd_ee_delta_pos", LAYOUT)
    none, zeros = torch.tensor([False]), torch.zeros(1, 3)
    obs = state([-0.1, 0.02, 0.1], cube=[0.0, 0.0, 0.02], goal=[0.2, 0.0, 0.0])
    moved = state([-0.1, 0.02, 0.1], cube=[0.02, -0.05, 0.02], goal=[0.2, 0.0, 0.0])
    aside = torch.tensor([[0.02, -0.05, 0.0]])
    assert torch.equal(expert.act(obs, zeros, aside, none), expert.act(moved, zeros, zeros, none))
    assert not torch.equal(expert.act(obs, zeros, aside, none), expert.act(obs, zeros, zeros, none))


def test_skipping_the_object_goes_over_it_and_down_at_the_goal():
    expert = ScriptedExpert("PushCube-v1", "pd_ee_delta_pos", LAYOUT)
    skip = torch.tensor([True])
    for tcp, action in (
        ([-0.05, 0.0, 0.12], [1.0, 0.0, 0.0]),  # past the cube at the origin, high
        ([0.2, 0.0, 0.12], [0.0, 0.0, -0.9]),  # there: down to 3 cm
    ):
        obs = state(tcp, cube=[0.0, 0.0, 0.02], goal=[0.2, 0.0, 0.0])
        assert expert.act(obs, torch.zeros(1, 3), torch.zeros(1, 3), skip)[0, :3].tolist() == pytest.approx(
            action, abs=1e-6
        )


@pytest.mark.parametrize("task", ["PushCube-v1", "PullCube-v1", "PickCube-v1"])
def test_wrong_way_takes_the_object_from_the_goal(task: str):
    cfg = EnvConfig(
        task=task, control_freq=10, sim_backend="cpu", render_backend="cpu", cameras=CamerasConfig(TINY, TINY)
    )
    envs = ManiSkillEnvs(cfg, num_envs=1)
    expert = ScriptedExpert(task, cfg.control_mode, envs.spec.obs_layout)
    obs = first_obs = envs.reset(seed=4)
    distance = []
    for _ in range(18):
        distance.append(float(success_distance(task, envs.spec.obs_layout, obs)))
        step = envs.step(expert.wrong_way(obs, first_obs))
        assert not step.success
        obs = step.obs
    envs.close()
    assert distance[-1] > min(distance) + 0.15


def test_back_and_touch_go_straight_with_a_closed_hand():
    first_obs = state([-0.1, 0.0, 0.2], cube=[0.0, 0.0, 0.02], goal=[0.2, 0.0, 0.0])
    obs = state([-0.05, 0.02, 0.05], cube=[0.0, 0.0, 0.02], goal=[0.2, 0.0, 0.0])
    expert = ScriptedExpert("PushCube-v1", "pd_ee_delta_pos", LAYOUT)
    assert expert.back(obs, first_obs)[0].tolist() == pytest.approx([-0.5, -0.2, 1.0, -1.0], abs=1e-6)
    assert expert.touch(obs)[0].tolist() == pytest.approx([0.5, -0.2, -0.3, -1.0], abs=1e-6)


def test_what_no_expert_can_do_is_refused():
    with pytest.raises(UserError, match=r"no scripted expert for RollBall-v1; there is one for PushCube-v1"):
        ScriptedExpert("RollBall-v1", "pd_ee_delta_pos", LAYOUT)
    with pytest.raises(UserError, match=r"speak pd_ee_delta_pos, not pd_joint_delta_pos"):
        ScriptedExpert("PickCube-v1", "pd_joint_delta_pos", LAYOUT)
    assert set(EXPERTS) == {"PushCube-v1", "PullCube-v1", "PickCube-v1", "PlaceSphere-v1"}
