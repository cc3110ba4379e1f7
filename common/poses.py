"""Poses of a gripper, and the box it must stay in: pure functions on numpy arrays.

pose (7,)       xyz in m, quaternion xyzw, in the robot's base frame
euler pose (6,) xyz in m, Euler "xyz" in rad: turns about the base's own x, then y, then z axis
twist (6,)      velocity or small displacement: xyz in m (/s), rotation vector in rad (/s)
"""

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

FACE_M = 1e-6  # so deep inside the forbidden box still counts as on its face: along a wall one may slide


def to_quat_pose(euler_pose: np.ndarray) -> np.ndarray:
    """(6,) -> (7,)."""
    rotation = Rotation.from_euler("xyz", euler_pose[3:])
    return np.concatenate([euler_pose[:3], rotation.as_quat()])


def to_euler_pose(pose: np.ndarray) -> np.ndarray:
    """(7,) -> (6,), roll and yaw in [-pi, pi], pitch in [-pi/2, pi/2]."""
    return np.concatenate([pose[:3], Rotation.from_quat(pose[3:]).as_euler("xyz")])


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """The same angles in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def pose_error(pose: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(6,): what leads from the target to the pose, xyz and rotation vector, in the base frame.

    The norm of the last three is the angle between the two orientations, whatever signs their quaternions or
    Euler angles have; comparing Euler angles would find 6.28 rad between -3.14 and 3.14.
    """
    turn = Rotation.from_quat(pose[3:]) * Rotation.from_quat(target[3:]).inv()
    return np.concatenate([pose[:3] - target[:3], turn.as_rotvec()])


def distances(pose: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(2,): m and rad between two poses (7,)."""
    error = pose_error(pose, target)
    return np.array([np.linalg.norm(error[:3]), np.linalg.norm(error[3:])])


def moved(pose: np.ndarray, twist: np.ndarray) -> np.ndarray:
    """(7,): the pose after xyz twist[:3] and the turn Euler "xyz" twist[3:], both along the base's axes."""
    turn = Rotation.from_euler("xyz", twist[3:]) * Rotation.from_quat(pose[3:])
    return np.concatenate([pose[:3] + twist[:3], turn.as_quat()])


def turn_twist(rotation: Rotation, twist: np.ndarray) -> np.ndarray:
    """A twist in the axes that `rotation` leads to.

    Velocity and turn of the gripper's own point: both halves are turned alike. The position x rotation term
    of the textbook adjoint belongs to the velocity of a point at the base's origin, which nobody here
    commands or measures; with it a pure turn of the gripper would also carry it sideways.
    """
    return np.concatenate([rotation.apply(twist[:3]), rotation.apply(twist[3:])])


def waypoints(start: np.ndarray, goal: np.ndarray, num: int) -> np.ndarray:
    """(num, 7): from start (left out) to goal (the last one), straight in xyz, evenly in the turn."""
    share = np.arange(1, num + 1) / num
    xyz = start[:3] + share[:, None] * (goal[:3] - start[:3])
    turns = Slerp([0.0, 1.0], Rotation.from_quat(np.stack([start[3:], goal[3:]])))(share)
    return np.concatenate([xyz, turns.as_quat()], axis=1)


class SafetyBox:
    """Where the gripper may be sent: a box in xyz, a window of Euler angles, and a box inside it kept free.

    low, high (6,): limits of the euler pose. The angles count as turns away from target_euler (3,), so the
    window goes on across +-pi; low[3:] <= target_euler <= high[3:].
    forbidden: corners (3,), (3,) of the inner box, or None. Where it reaches the outer box there is no way
    out, and it goes on without end: nothing passes below a wall that stands on the floor of the box.
    """

    def __init__(
        self,
        low: np.ndarray,
        high: np.ndarray,
        target_euler: np.ndarray,
        forbidden: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.low, self.high, self.target_euler = low, high, target_euler
        self.forbidden = None
        if forbidden is not None:
            inner_low, inner_high = forbidden
            inner_low = np.where(inner_low <= low[:3], -np.inf, inner_low)
            inner_high = np.where(inner_high >= high[:3], np.inf, inner_high)
            self.forbidden = (inner_low, inner_high)

    def clip(self, pose: np.ndarray, start_xyz: np.ndarray) -> np.ndarray:
        """The pose (7,) nearest to the one asked for that may be sent to a gripper at start_xyz (3,)."""
        xyz = np.clip(pose[:3], self.low[:3], self.high[:3])
        if self.forbidden is not None:
            xyz = np.clip(self._stop_at_wall(start_xyz, xyz), self.low[:3], self.high[:3])
        euler = Rotation.from_quat(pose[3:]).as_euler("xyz")
        away = np.clip(
            wrap_angle(euler - self.target_euler),
            self.low[3:] - self.target_euler,
            self.high[3:] - self.target_euler,
        )
        return np.concatenate([xyz, Rotation.from_euler("xyz", self.target_euler + away).as_quat()])

    def _stop_at_wall(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Where the way from start to end first enters the forbidden box; end, if it never does."""
        start, (low, high) = self._pushed_out(start), self.forbidden
        first, last = _crossing(start, end, low + FACE_M, high - FACE_M)
        if first >= last or last <= 0 or first >= 1:
            return end
        first, _ = _crossing(start, end, low, high)
        return start + max(first, 0.0) * (end - start)

    def _pushed_out(self, xyz: np.ndarray) -> np.ndarray:
        """On the nearest face, where the gripper has been pushed inside, so that only ways out remain."""
        low, high = self.forbidden
        gaps = np.stack([xyz - low, high - xyz])
        if gaps.min() > 0:
            side, axis = np.unravel_index(gaps.argmin(), gaps.shape)
            xyz = xyz.copy()
            xyz[axis] = self.forbidden[side][axis]
        return xyz


def _crossing(start: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """The share of the way from start to end after which the line is within all three slabs, and until when.

    It is never, if the first is not smaller than the second.
    """
    step = end - start
    with np.errstate(divide="ignore", invalid="ignore"):
        at_faces = np.stack([(low - start) / step, (high - start) / step])
    always = np.array([[-np.inf], [np.inf]])  # along an axis without motion it is always or never within
    at_rest = np.where((low < start) & (start < high), always, -always)
    enter_leave = np.where(step == 0, at_rest, np.sort(at_faces, axis=0))
    return float(enter_leave[0].max()), float(enter_leave[1].min())
