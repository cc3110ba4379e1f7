"""What every arm is, real or simulated: the words that the backends and their users share.

Poses are xyz in m and a quaternion xyzw: the end effector (the point between the fingertips) in the frame of
the robot's base. `common.arms` makes an arm from its config.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.runtime import UserError


class ArmError(UserError):
    """Control of the arm is lost; the message says what to do. `Arm.recover` takes it back."""


@dataclass
class RobotState:
    """An arm at one moment; arrays are float64."""

    pose: np.ndarray  # (7,) xyz m + quaternion xyzw of the end effector in the base frame
    vel: np.ndarray  # (6,) m/s, rad/s of the end effector along the axes of the base frame
    force: np.ndarray  # (3,) N that the arm presses with on what it touches, in the end effector's frame
    torque: np.ndarray  # (3,) Nm, the same about the end effector
    q: np.ndarray  # (7,) rad, joints
    dq: np.ndarray  # (7,) rad/s
    gripper: float  # m between the fingertips


class Arm(Protocol):
    """Also a context manager that closes it. One thread drives it."""

    simulated: bool  # True: time passes only in `move` (one control period each) and in `joint_reset`

    def state(self) -> RobotState:
        """What is measured now. Raises ArmError."""

    def move(self, pose: np.ndarray) -> None:
        """Go to the absolute pose (7,), from now on; does not wait, but a simulated arm advances one period.

        Raises ArmError; ValueError for what is no pose.
        """

    def gripper(self, open: bool) -> None:
        """Start to open or to close. Raises ArmError."""

    def joint_reset(self, q: np.ndarray) -> None:
        """Drive the joints to q (7,) rad, and wait until they are there. Raises ArmError."""

    def stop(self) -> None:
        """Stay where it is, from now on. Raises ArmError: then the arm has stopped by itself."""

    def recover(self) -> None:
        """Clear errors and take control anew, where the arm stands. Raises ArmError: try again."""

    def close(self) -> None:
        """Stop the arm, if it can still be reached, and end all threads and connections. Never raises."""

    def __enter__(self) -> "Arm": ...

    def __exit__(self, *_) -> None: ...


def check_pose(pose: np.ndarray) -> np.ndarray:
    """(7,) float64 with a quaternion of length 1; ValueError for what must never reach a motor."""
    pose = np.asarray(pose, dtype=np.float64)
    if pose.shape != (7,) or not np.isfinite(pose).all():
        raise ValueError(f"a pose is 7 finite numbers, xyz and quaternion xyzw; got {pose}")
    length = np.linalg.norm(pose[3:])
    if abs(length - 1) > 0.01:
        raise ValueError(f"the quaternion of a pose has length 1; got {pose[3:]}, of length {length:.3f}")
    return np.concatenate([pose[:3], pose[3:] / length])


def check_joints(q: np.ndarray) -> np.ndarray:
    """(7,) float64; ValueError for anything else."""
    q = np.asarray(q, dtype=np.float64)
    if q.shape != (7,) or not np.isfinite(q).all():
        raise ValueError(f"joints are 7 finite angles in rad; got {q}")
    return q
