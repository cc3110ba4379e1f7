"""The fast controller drives the arm as ManiSkill's own does, and takes the place of no other."""

from collections.abc import Iterator

import pytest
import torch

from common.envs import ManiSkillEnvs
from common.fast_control import MoveBy, use_fast_control
from common.scenes import EnvConfig

# Forwards and up, until no joint angles are found for where the hand is to go and the arm must hold still.
OUT_OF_REACH = torch.tensor([[0.3, 0.0, 0.3, -1.0]]).expand(30, 1, 4)


@pytest.fixture(scope="module")
def envs() -> Iterator[ManiSkillEnvs]:
    cfg = EnvConfig(task="PushCube-v1", sim_backend="cpu", render_backend="cpu", control_freq=10)
    envs = ManiSkillEnvs(cfg, num_envs=1, views=())
    yield envs
    envs.close()


@pytest.fixture
def arm(envs: ManiSkillEnvs):
    """The arm's controller, with the fast `set_action` again at the end."""
    yield envs.env.agent.controller.controllers["arm"]
    use_fast_control(envs.env.agent)


def joint_path(envs: ManiSkillEnvs, actions: torch.Tensor) -> torch.Tensor:
    """(T, 9): joint positions in rad (fingers in m) after each action (T, 1, 4), from one start."""
    envs.reset(seed=3)
    path = []
    for action in actions:
        envs.step(action)
        path.append(envs.env.agent.robot.qpos[0].clone())
    return torch.stack(path)


def random_actions() -> torch.Tensor:
    """Some beyond [-1, 1], where they are clipped."""
    return torch.rand(30, 1, 4, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2


@pytest.mark.parametrize("actions", [random_actions(), OUT_OF_REACH], ids=["random", "out of reach"])
def test_joints_move_as_with_maniskills_own_controller(envs: ManiSkillEnvs, arm, actions: torch.Tensor):
    assert type(arm.set_action) is MoveBy
    fast = joint_path(envs, actions)
    del arm.set_action  # what was shadowed
    stock = joint_path(envs, actions)
    assert (stock[-1] - stock[0]).abs().max() > 0.1
    torch.testing.assert_close(fast, stock, atol=1e-4, rtol=0)


def test_out_of_reach_is_out_of_reach(envs: ManiSkillEnvs, arm, monkeypatch):
    found = []
    solve = arm.kinematics.pmodel.compute_inverse_kinematics

    class Spy:
        @staticmethod
        def compute_inverse_kinematics(*args, **kwargs):
            found.append(solve(*args, **kwargs))
            return found[-1]

    monkeypatch.setattr(arm.set_action, "model", Spy)
    joint_path(envs, OUT_OF_REACH)
    assert {bool(success) for _, success, _ in found} == {True, False}


@pytest.mark.parametrize(
    ("control_mode", "is_fast"),
    [
        ("pd_ee_delta_pos", True),
        ("pd_ee_target_delta_pos", False),  # steps on from its last target, not from where the hand is
        ("pd_ee_delta_pose", False),  # a subclass: turns as well
        ("pd_joint_delta_pos", False),
    ],
)
def test_only_controllers_known_to_be_equal_are_replaced(envs: ManiSkillEnvs, control_mode, is_fast):
    agent = envs.env.agent
    agent.set_control_mode(control_mode)
    try:
        use_fast_control(agent)
        controllers = agent.controller.controllers
        assert (type(controllers["arm"].set_action) is MoveBy) == is_fast
        assert type(controllers["gripper"].set_action) is not MoveBy
    finally:
        agent.set_control_mode("pd_ee_delta_pos")


def test_the_frame_of_the_body_is_left_alone(envs: ManiSkillEnvs, arm, monkeypatch):
    del arm.set_action
    monkeypatch.setattr(arm.config, "frame", "body_translation")
    use_fast_control(envs.env.agent)
    assert type(arm.set_action) is not MoveBy
    monkeypatch.undo()


def test_gpu_simulation_is_left_alone(envs: ManiSkillEnvs, arm, monkeypatch):
    del arm.set_action
    monkeypatch.setattr(envs.env.scene, "gpu_sim_enabled", True)
    use_fast_control(envs.env.agent)
    assert type(arm.set_action) is not MoveBy
    monkeypatch.undo()
    use_fast_control(None)  # tasks without a robot
