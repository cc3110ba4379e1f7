"""Arms: one protocol, three backends. This is the place that makes one.

    with make_arm(FrankyArmConfig(robot_ip="172.16.0.2"), control_hz=10) as arm:
        pose = arm.state().pose
        arm.move(pose + [0, 0, 0.02, 0, 0, 0, 0])

| `backend` | what it drives |
|---|---|
| `maniskill` | a simulated Panda in this process, with two cameras; the default, needs no hardware |
| `franky` | a Franka Research 3 (or franky-sim) through libfranka, at 1 kHz in a thread of its own |
| `serl_http` | whatever answers to the HTTP protocol of SERL / HIL-SERL: older firmware, ROS labs |
"""

from common.arm_protocol import Arm, ArmError, RobotState
from common.franky_arm import FrankyArm, FrankyArmConfig
from common.maniskill_arm import ManiSkillArm, ManiSkillArmConfig
from common.serl_arm import SerlHttpArm, SerlHttpArmConfig

__all__ = [
    "Arm",
    "ArmConfig",
    "ArmError",
    "FrankyArmConfig",
    "ManiSkillArmConfig",
    "RobotState",
    "SerlHttpArmConfig",
    "make_arm",
]

ArmConfig = ManiSkillArmConfig | FrankyArmConfig | SerlHttpArmConfig


def make_arm(cfg: ArmConfig, control_hz: float) -> Arm:
    """The arm, connected and under control. control_hz: calls of `move` per second, a simulated arm's period.

    UserError where it cannot be reached, or lacks a package.
    """
    if isinstance(cfg, FrankyArmConfig):
        return FrankyArm(cfg)
    if isinstance(cfg, SerlHttpArmConfig):
        return SerlHttpArm(cfg)
    return ManiSkillArm(cfg, control_hz)
