"""common/poses.py: poses, twists, and the safety box."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from common.poses import SafetyBox, pose_error, to_euler_pose, to_quat_pose, turn_twist, waypoints

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)


def quat_pose(*euler_pose: float) -> np.ndarray:
    return to_quat_pose(np.array(euler_pose))


def assert_same_pose(pose: np.ndarray, expected: np.ndarray, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(pose_error(pose, expected), 0.0, atol=atol)


# ----------------------------------------------------------------------------------------------------
# Poses


def test_euler_and_quaternion_poses_are_inverse():
    euler_pose = np.array([0.5, 0.1, 0.2, 3.0, -0.4, 2.0])
    np.testing.assert_allclose(to_euler_pose(to_quat_pose(euler_pose)), euler_pose, atol=1e-12)


def test_euler_angles_turn_about_the_axes_of_the_base():
    """Roll by 90 degrees, then yaw by 90 degrees about the base's z: the tool's y axis ends up along z."""
    rotation = Rotation.from_quat(quat_pose(0, 0, 0, np.pi / 2, 0, np.pi / 2)[3:])
    np.testing.assert_allclose(rotation.apply([0, 1, 0]), [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(rotation.apply([1, 0, 0]), [0, 1, 0], atol=1e-12)


def test_pose_error_is_an_angle_not_a_difference_of_euler_angles():
    error = pose_error(quat_pose(0.5, 0, 0.1, 3.14, 0, 0), quat_pose(0.5, 0, 0.1, -3.14, 0, 0))
    np.testing.assert_allclose(error, [0, 0, 0, 6.28 - 2 * np.pi, 0, 0], atol=1e-12)
    one = quat_pose(*TARGET)
    other = np.concatenate([one[:3], -one[3:]])  # the same orientation
    np.testing.assert_allclose(pose_error(other, one), 0.0, atol=1e-12)


def test_waypoints_are_even_and_end_at_the_goal():
    start, goal = quat_pose(0, 0, 0, 0, 0, 3.0), quat_pose(0.3, 0, -0.6, 0, 0, -3.0)
    points = waypoints(start, goal, 3)
    np.testing.assert_allclose(points[:, :3], [[0.1, 0, -0.2], [0.2, 0, -0.4], [0.3, 0, -0.6]], atol=1e-12)
    assert_same_pose(points[2], goal)
    way = 2 * np.pi - 6.0  # on across pi, not all the way back
    for number, point in enumerate(points, start=1):
        np.testing.assert_allclose(pose_error(point, start)[5], way * number / 3, atol=1e-12)


def test_a_twist_turns_as_a_pose_does():
    """Against finite differences: what moves a pose in the tool's axes is, turned by it, what moves it in the
    base's; and no displacement comes out of a turn, wherever the pose is."""
    pose, small = quat_pose(0.5, -0.2, 0.3, 3.0, 0.2, 1.0), 1e-6
    axes = Rotation.from_quat(pose[3:])
    for twist in np.eye(6):
        after = np.concatenate(
            [
                pose[:3] + axes.apply(small * twist[:3]),
                (axes * Rotation.from_rotvec(small * twist[3:])).as_quat(),  # about the tool's own axes
            ]
        )
        np.testing.assert_allclose(pose_error(after, pose) / small, turn_twist(axes, twist), atol=1e-6)
        np.testing.assert_allclose(turn_twist(axes.inv(), turn_twist(axes, twist)), twist, atol=1e-12)


# ----------------------------------------------------------------------------------------------------
# The safety box


def box_around(target: tuple) -> SafetyBox:
    reach = np.array([0.05, 0.05, 0.0, 0.01, 0.01, 0.5])
    above = np.array([0.05, 0.05, 0.1, 0.01, 0.01, 0.5])
    return SafetyBox(np.array(target) - reach, np.array(target) + above, np.array(target[3:]))


def test_box_clips_position_and_euler_window():
    box = box_around(TARGET)
    start = np.array(TARGET[:3])
    clipped = box.clip(quat_pose(0.58, 0.02, 0.05, -3.14, 0.3, 0.7), start)
    np.testing.assert_allclose(to_euler_pose(clipped), [0.55, 0.02, 0.1, -3.14, 0.01, 0.5], atol=1e-12)
    inside = quat_pose(0.52, -0.03, 0.15, -3.145, 0.005, -0.4)
    assert_same_pose(box.clip(inside, start), inside)


@pytest.mark.parametrize(
    ("target", "asked", "given"),
    [
        (3.14, -3.14, -3.14),  # 0.003 rad further on across pi, inside the window
        (3.14, -3.10, 3.15 - 2 * np.pi),  # 0.043 rad further on: the window ends 0.01 from the target
        (3.14, 3.10, 3.13),
        (-3.14, 3.14, 3.14),
        (-3.14, 3.10, 2 * np.pi - 3.15),
        (-3.14, -3.10, -3.13),
    ],
)
def test_the_window_goes_on_across_pi(target, asked, given):
    box = box_around((0.5, 0, 0.1, target, 0, 0))
    clipped = box.clip(quat_pose(0.5, 0, 0.1, asked, 0, 0), np.array(TARGET[:3]))
    np.testing.assert_allclose(to_euler_pose(clipped)[3], given, atol=1e-9)


def wall_box() -> SafetyBox:
    """The bin task's: around (0, 0, 0) for easy numbers; the wall stands on the floor, 0.04 high."""
    high = np.array([0.1, 0.15, 0.1, 0.01, 0.01, 0.5])
    low = np.array([-0.1, -0.15, -0.001, -0.01, -0.01, -0.5])
    wall = np.array([0.07, 0.03, 0.04])
    return SafetyBox(low, high, np.zeros(3), (np.array([-0.07, -0.03, -0.001]), wall))


@pytest.mark.parametrize(
    ("start", "asked", "given"),
    [
        ((0, 0.05, 0.02), (0, 0.02, 0.02), (0, 0.03, 0.02)),  # stops at the wall
        ((0.02, 0.05, 0.02), (0.06, 0.01, 0.02), (0.04, 0.03, 0.02)),  # on its own way, without sliding
        ((0, 0.05, 0.02), (0, -0.1, 0.02), (0, 0.03, 0.02)),  # however long the step
        ((0, 0.05, -0.001), (0, -0.1, -0.001), (0, 0.03, -0.001)),  # nor along the floor
        ((0, 0.05, 0.05), (0, -0.1, 0.05), (0, -0.1, 0.05)),  # above it the way is free
        ((0, 0, 0.06), (0, 0, 0), (0, 0, 0.04)),  # from above
        ((0, 0.03, 0.02), (0.05, 0.03, 0.02), (0.05, 0.03, 0.02)),  # slides along its face
        ((0, 0.03, 0.02), (0.05, 0.02, 0.02), (0, 0.03, 0.02)),
        ((0, 0.03, 0.02), (0, 0.05, 0.02), (0, 0.05, 0.02)),  # away from it
        ((0, 0.028, 0.02), (0, 0.0, 0.02), (0, 0.03, 0.02)),  # pushed into it: back to its face
        ((0, 0.028, 0.02), (0, 0.06, 0.02), (0, 0.06, 0.02)),
        ((0, 0.028, 0.02), (0, -0.06, 0.02), (0, 0.03, 0.02)),  # not through it to the other side
        ((0, 0.05, 0.02), (0, 0.3, -0.3), (0, 0.15, -0.001)),  # the outer box holds as well
    ],
)
def test_the_forbidden_box_stops_at_its_walls(start, asked, given):
    pose = np.array([*asked, 0, 0, 0, 1.0])
    np.testing.assert_allclose(wall_box().clip(pose, np.array(start))[:3], given, atol=1e-12)


def test_no_series_of_commands_leads_into_the_forbidden_box():
    box, rng = wall_box(), np.random.default_rng(0)
    low, high = box.forbidden
    xyz = np.array([0.0, 0.1, 0.0])
    for _ in range(2000):
        pose = np.concatenate([xyz + rng.uniform(-0.06, 0.06, 3), [0, 0, 0, 1]])
        xyz = box.clip(pose, xyz)[:3]
        assert np.minimum(xyz - low, high - xyz).min() <= 1e-6
        assert (xyz >= box.low[:3]).all() and (xyz <= box.high[:3]).all()
