"""common/franka.py and what it stands on: poses, the safety box, the rate, the settings."""

from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from common import config
from common.arms import ArmError, ManiSkillArmConfig, SerlHttpArmConfig
from common.cameras import CameraError, RealCameraConfig
from common.franka import FrankaEnv, state_vector
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.poses import pose_error, to_euler_pose, to_quat_pose
from common.runtime import UserError
from common.timing import Rate
from tests.real_doubles import ToyArm, ToyCamera, ToyClock


@dataclass
class EnvSection:
    eval: FrankaConfig


@dataclass
class Config:
    """The part of a script's settings that these tests need."""

    env: EnvSection


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)
STILL = np.zeros(7)
TASKS = ["realworld_peg_insertion", "realworld_charger", "realworld_bin_relocation", "realworld_button"]


def quat_pose(*euler_pose: float) -> np.ndarray:
    return to_quat_pose(np.array(euler_pose))


def task_config(**task) -> FrankaTaskConfig:
    return FrankaTaskConfig(**{"target_ee_pose": TARGET, **task})


def make_env(arm: ToyArm | None = None, cameras=None, clock: ToyClock | None = None, steps=100, **task):
    """An env whose arm starts at the target, unless given; not reset yet."""
    arm = arm or ToyArm(quat_pose(*TARGET))
    clock = clock or ToyClock()
    cfg = FrankaConfig(task_config(**task), max_episode_steps=steps)
    return FrankaEnv(cfg, arm, cameras or {}, clock=clock, sleep=clock.sleep)


def at(env: FrankaEnv, *euler_pose: float) -> FrankaEnv:
    """The env after a reset and two steps, with its arm put to a pose by hand and told to stay there."""
    env.reset(seed=0)
    env.arm.pushed_to = quat_pose(*euler_pose)
    env.step(STILL)
    env.step(STILL)
    return env


def action(**axes: float) -> np.ndarray:
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    return np.array([axes.get(name, 0.0) for name in names])


def assert_same_pose(pose: np.ndarray, expected: np.ndarray, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(pose_error(pose, expected), 0.0, atol=atol)


# ----------------------------------------------------------------------------------------------------
# The rate


def test_deadlines_are_absolute():
    clock = ToyClock(late_s=0.001)  # every sleep takes a millisecond too long
    rate = Rate(10.0, clock, clock.sleep)
    ends = []
    for _ in range(20):
        rate.begin()
        clock.work(0.03)
        assert rate.wait() == 0.0
        ends.append(clock())
    np.testing.assert_allclose(ends, 0.1 * np.arange(1, 21) + 0.001)  # and not 0.1, 0.202, 0.303, ...
    np.testing.assert_allclose(clock.slept, [0.07] + [0.069] * 19)


def test_a_late_step_starts_a_new_count():
    clock = ToyClock()
    rate = Rate(10.0, clock, clock.sleep)
    clock.work(0.25)  # a slow policy
    assert rate.begin() == pytest.approx(0.15)
    rate.wait()
    assert clock() == pytest.approx(0.35)  # a whole period for the command all the same
    rate.begin()
    clock.work(0.13)  # within the step
    assert rate.wait() == pytest.approx(0.03)
    rate.begin()
    rate.wait()
    assert clock() == pytest.approx(0.35 + 0.13 + 0.1)  # no shorter period to make up for it
    assert clock.slept == pytest.approx([0.1, 0.1])


# ----------------------------------------------------------------------------------------------------
# A step


def test_spaces_hold_what_comes_out():
    env = make_env(cameras={"front": ToyCamera(7), "wrist_1": ToyCamera(50)})
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert info == {"in_zone": False, "hold_steps": 0, "success": False}
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (7,), np.float32)
    obs, reward, terminated, truncated, info = env.step(STILL)
    assert env.observation_space.contains(obs)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert [type(value) for value in (reward, terminated, truncated)] == [float, bool, bool]
    assert set(info) == {"in_zone", "hold_steps", "success", "gripper_penalty", "late_s"}
    # the second picture of each
    assert (obs["frames"]["front"] == 8).all() and (obs["frames"]["wrist_1"] == 51).all()


def test_state_vector_is_in_the_order_of_names():
    obs, _ = make_env().reset(seed=0)
    vector = state_vector(obs["state"])
    assert (vector.shape, vector.dtype) == ((20,), np.float32)
    expected = [[0.08], [1, 2, 3], obs["state"]["tcp_pose"], [4, 5, 6], np.arange(6)]
    np.testing.assert_array_equal(vector, np.concatenate(expected).astype(np.float32))


def test_targets_start_from_the_measured_pose():
    """A lagging arm gets the measured pose plus the step; adding up commands would run away from it."""
    env = at(
        make_env(ToyArm(quat_pose(*TARGET), follow=0.5), action_scale=(0.02, 0.1, 1)),
        0.5,
        0,
        0.15,
        -3.14,
        0,
        0,
    )
    xs = []
    for _ in range(3):
        env.step(action(x=1.0, y=-0.5))
        xs.append(env.arm.moves[-1][:2])
    np.testing.assert_allclose(xs, [[0.52, -0.01], [0.53, -0.015], [0.54, -0.02]], atol=1e-12)
    np.testing.assert_allclose(env.arm.pose[0], 0.53, atol=1e-12)


def test_turns_are_about_the_axes_of_the_base():
    wide = {"ee_pose_limit_min": (0, -1, 0, -6, -1.5, -3), "ee_pose_limit_max": (1, 1, 1, 0, 1.5, 3)}
    env = at(make_env(**wide), 0.5, 0, 0.15, -3.14, 0.2, 0.7)
    before = Rotation.from_quat(env.arm.pose[3:])
    env.step(action(roll=1.0, pitch=-0.5, yaw=0.25))
    turn = Rotation.from_euler("xyz", [0.1, -0.05, 0.025])
    assert_same_pose(env.arm.moves[-1], np.concatenate([[0.5, 0, 0.15], (turn * before).as_quat()]))
    assert (before * turn).inv() * turn * before != pytest.approx(0)
    assert ((before * turn).inv() * (turn * before)).magnitude() > 0.05  # the other order is another pose


def test_actions_are_clipped_and_must_be_numbers():
    env = at(make_env(), 0.5, 0, 0.15, -3.14, 0, 0)
    env.step(action(x=5.0))
    np.testing.assert_allclose(env.arm.moves[-1][0], 0.52, atol=1e-12)
    moves = len(env.arm.moves)
    for bad in (action(x=np.nan), np.zeros(6)):
        with pytest.raises(ValueError, match="seven finite numbers"):
            env.step(bad)
    assert len(env.arm.moves) == moves


def test_steps_stay_in_the_box():
    env = at(make_env(clip_x_range_m=0.03), 0.5, 0, 0.15, -3.14, 0, 0)
    for _ in range(5):
        env.step(action(x=1.0, z=-1.0, roll=1.0, yaw=-1.0))
    x, _, z, roll, pitch, yaw = to_euler_pose(env.arm.pose)
    assert (x, z, roll) == pytest.approx((0.53, 0.1, -3.13))
    assert abs(pitch) <= 0.01 + 1e-9  # a turn about the base's x axis is a pitch too, once there is a yaw
    assert -0.5236 <= yaw < -0.45


def test_the_sign_of_a_quaternion_never_jumps():
    arm = ToyArm(quat_pose(*TARGET))
    env = make_env(arm)
    first = env.reset(seed=0)[0]["state"]["tcp_pose"]
    arm.pose[3:] *= -1
    env.step(STILL)
    arm.pose[3:] *= -1
    np.testing.assert_allclose(env.step(STILL)[0]["state"]["tcp_pose"], first, atol=1e-6)


def test_a_simulated_arm_is_not_waited_for():
    clock = ToyClock()
    env = make_env(clock=clock)
    env.reset(seed=0)
    start_s = env.now()
    env.step(STILL)
    env.step(STILL)
    assert clock.slept == []
    assert env.now() - start_s == pytest.approx(0.2)


def test_a_real_arm_gets_a_period_per_step():
    clock = ToyClock()
    env = make_env(ToyArm(quat_pose(*TARGET), simulated=False), clock=clock, step_hz=5.0)
    env.reset(seed=0)
    start_s = clock()
    clock.work(0.05)
    assert env.step(STILL)[4]["late_s"] == 0.0
    assert clock() - start_s == pytest.approx(0.2)
    clock.work(0.3)
    assert env.step(STILL)[4]["late_s"] == pytest.approx(0.1)
    assert clock() - start_s == pytest.approx(0.2 + 0.3 + 0.2)


def test_a_simulated_arm_keeps_the_rate_where_a_person_drives_it():
    clock = ToyClock()
    env = make_env(clock=clock, realtime=True)
    env.reset(seed=0)
    start_s = clock()
    env.step(STILL)
    assert clock() - start_s == pytest.approx(0.1)


def test_a_real_arm_is_never_rushed():
    with pytest.raises(UserError, match="realtime: false would rush a real arm"):
        make_env(ToyArm(quat_pose(*TARGET), simulated=False), realtime=False)


# ----------------------------------------------------------------------------------------------------
# Reward and the end of episodes


def zone_steps(env: FrankaEnv, heights_m: list[float]) -> list[tuple]:
    """-> reward, terminated, info of a step that ends so far above the target each."""
    env.reset(seed=0)
    steps = []
    for height in heights_m:
        env.arm.pushed_to = quat_pose(0.5, 0, 0.1 + height, -3.14, 0, 0)
        _, reward, terminated, _, info = env.step(STILL)
        steps.append((reward, terminated, info))
    return steps


def test_the_hold_counter_starts_anew_when_the_arm_leaves():
    env = make_env(success_hold_steps=3)
    steps = zone_steps(env, [0.05, 0.009, 0.0, 0.011, 0.01, 0.0, 0.0, 0.0, 0.02])
    assert [info["hold_steps"] for _, _, info in steps] == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert [info["in_zone"] for _, _, info in steps] == [
        False,
        True,
        True,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert [reward for reward, _, _ in steps] == [0, 1, 1, 0, 1, 1, 1, 1, 0]
    ended = [False] * 6 + [True, True, False]
    assert [terminated for _, terminated, _ in steps] == ended
    assert [info["success"] for _, _, info in steps] == ended


def test_a_reset_clears_the_hold():
    env = make_env(success_hold_steps=3)
    zone_steps(env, [0.0, 0.0])
    assert zone_steps(env, [0.0])[0][2]["hold_steps"] == 1


def test_dense_reward_falls_with_the_distance():
    env = make_env(use_dense_reward=True)
    (reward, terminated, _), (inside, _, _) = zone_steps(env, [0.05, 0.01])
    assert (reward, terminated) == (pytest.approx(np.exp(-500 * 0.05**2)), False)
    assert inside == 1.0


@pytest.mark.parametrize(
    ("threshold", "yaw", "in_zone"),
    [(None, 0.3, True), (np.inf, 0.3, True), (0.2, 0.3, False), (0.2, 0.19, True), (0.2, -0.21, False)],
)
def test_orientation_counts_where_it_has_a_threshold(threshold, yaw, in_zone):
    env = make_env(reward_threshold=(0.01, 0.01, 0.01, threshold, threshold, threshold))
    env.reset(seed=0)
    # 3.14 in place of -3.14: 0.003 rad away
    env.arm.pushed_to = quat_pose(0.5, 0, 0.1, 3.14, 0, yaw)
    assert env.step(STILL)[4]["in_zone"] is in_zone


def test_the_time_limit_truncates():
    env = make_env(steps=3)
    env.reset(seed=0)
    assert [env.step(STILL)[3] for _ in range(4)] == [False, False, True, True]
    env.reset()
    assert env.step(STILL)[3] is False


# ----------------------------------------------------------------------------------------------------
# Gripper


def test_the_gripper_acts_on_a_change_of_command_only():
    env = at(make_env(), 0.5, 0, 0.15, -3.14, 0, 0)
    env.arm.calls.clear()
    penalties = [
        env.step(action(gripper=g))[4]["gripper_penalty"] for g in (-0.49, -0.5, -1, 0, 0.49, 0.5, 1, -1)
    ]
    assert penalties == [0, 0.1, 0, 0, 0, 0.1, 0, 0.1]
    assert [call for call in env.arm.calls if call != "move"] == ["close", "open", "close"]
    assert env.gripper_open is False


@pytest.mark.parametrize(
    ("opening_m", "command", "acts"), [(0.08, 1, False), (0.05, 1, True), (0.05, -1, True), (0.0, -1, True)]
)
def test_a_gripper_that_nobody_has_commanded_yet(opening_m, command, acts):
    """Only one that is found wide open needs no opening: closed fingers may not hold what they touch."""
    env = make_env()
    env.arm.opening_m = opening_m
    env.reset(seed=0)
    env.step(action(gripper=command))
    assert ("open" in env.arm.calls or "close" in env.arm.calls) == acts


def test_a_step_that_waits_for_the_fingers_moves_nothing_else():
    """Regression: it sent axes that were 0.6 s old by then; the simulated arm is stepped meanwhile."""
    env = at(make_env(), 0.5, 0, 0.15, -3.14, 0, 0)
    last = env.arm.moves[-1]
    env.arm.calls.clear(), env.arm.moves.clear()
    start_s = env.now()
    env.step(action(z=1.0, yaw=1.0, gripper=-1.0))
    assert env.arm.calls == ["close"] + ["move"] * 7
    for pose in env.arm.moves:
        assert_same_pose(pose, last, atol=1e-9)
    assert env.now() - start_s == pytest.approx(0.7)


def test_a_real_arm_waits_for_the_fingers():
    clock = ToyClock()
    env = make_env(ToyArm(quat_pose(*TARGET), simulated=False), clock=clock)
    env.reset(seed=0)
    env.arm.calls.clear(), clock.slept.clear()
    info = env.step(action(x=1.0, gripper=-1.0))[4]
    assert env.arm.calls == ["close", "move"]
    np.testing.assert_allclose(env.arm.moves[-1], env.arm.moves[-2], atol=1e-9)
    assert clock.slept == pytest.approx([0.6, 0.1])
    assert info["late_s"] == 0.0


def test_a_gripper_step_stays_where_the_arm_has_got_to():
    env = at(make_env(ToyArm(quat_pose(*TARGET), follow=0.5)), 0.5, 0, 0.15, -3.14, 0, 0)
    env.step(action(x=1.0))  # commanded 0.52, measured 0.51
    env.step(action(x=1.0, gripper=-1.0))  # which goes on to 0.52 while the fingers close
    np.testing.assert_allclose(env.arm.moves[-1][0], 0.52, atol=2e-4)


def test_a_gripper_step_that_completes_the_hold_ends_the_episode():
    env = at(make_env(success_hold_steps=3), *TARGET)
    _, reward, terminated, _, info = env.step(action(gripper=-1.0))
    assert (reward, terminated, info["success"]) == (0.9, True, True)


def test_the_penalty_can_be_switched_off():
    env = make_env(enable_gripper_penalty=False)
    env.reset(seed=0)
    assert env.step(action(gripper=-1.0))[4]["gripper_penalty"] == 0.0


# ----------------------------------------------------------------------------------------------------
# Reset


def test_reset_goes_up_above_the_target_and_is_exact():
    env = make_env()
    obs, _ = env.reset(seed=0)
    np.testing.assert_allclose(env.arm.moves[-1], quat_pose(0.5, 0, 0.2, -3.14, 0, 0), atol=1e-9)
    assert len(env.arm.moves) == 15  # 1.5 s at 10 Hz; the way is 0.1 m long
    np.testing.assert_allclose(np.diff([pose[2] for pose in env.arm.moves]), 0.1 / 15, atol=1e-12)
    np.testing.assert_allclose(obs["state"]["tcp_pose"][:3], [0.5, 0, 0.2], atol=1e-6)


def test_reset_in_order_gripper_rise_joints_start():
    env = make_env(
        ToyArm(quat_pose(*TARGET)), reset_gripper="close", reset_rise_m=0.06, clip_z_range_high_m=0.1
    )
    env.reset(seed=0, options={"joint_reset": True})
    assert env.arm.calls == ["close"] + ["move"] * (6 + 10) + ["joint_reset"] + ["move"] * 15
    np.testing.assert_allclose(env.arm.joints, [0, 0, 0, -1.9, 0, 2, 0])
    for pose in env.arm.moves[:6]:
        assert_same_pose(pose, quat_pose(*TARGET))  # the fingers close where the arm stands
    heights = [pose[2] for pose in env.arm.moves[6:16]]
    np.testing.assert_allclose(heights, 0.1 + 0.006 * np.arange(1, 11), atol=1e-12)


def test_the_rise_ends_at_the_top_of_the_box():
    env = make_env(ToyArm(quat_pose(0.52, 0, 0.17, -3.14, 0, 0)), reset_rise_m=0.1)
    env.reset(seed=0)
    assert max(pose[2] for pose in env.arm.moves) == pytest.approx(0.2)
    above = make_env(ToyArm(quat_pose(0.52, 0, 0.3, -3.14, 0, 0)), reset_rise_m=0.1)
    above.reset(seed=0)
    assert len(above.arm.moves) == 15  # no rise at all
    assert max(pose[2] for pose in above.arm.moves) < 0.3


def test_reset_moves_stay_in_the_box():
    """Also with a start drawn beyond its walls, and from outside without turning away from it."""
    env = make_env(random_xy_range_m=0.5, clip_x_range_m=0.05, random_rz_range_rad=3.0)
    low, high = env.box.low, env.box.high
    for seed in range(20):
        env.reset(seed=seed)
    for pose in env.arm.moves:
        assert (pose[:3] >= low[:3] - 1e-12).all() and (pose[:3] <= high[:3] + 1e-12).all()
        assert abs(to_euler_pose(pose)[5]) <= 0.5236 + 1e-9
    outside = make_env(ToyArm(quat_pose(0.6, 0.1, 0.4, -3.14, 0, 1.5)))
    outside.reset(seed=0)
    beyond = [np.clip(pose[:3], low[:3], high[:3]) - pose[:3] for pose in outside.arm.moves]
    assert (np.diff(np.abs(beyond), axis=0) <= 1e-12).all()


def real_env(height_m: float, **task) -> FrankaEnv:
    """An env whose arm is no simulation and stands so far above the safety box."""
    return make_env(ToyArm(quat_pose(0.5, 0, 0.2 + height_m, -3.14, 0, 0), simulated=False), **task)


def test_a_real_arm_is_not_driven_from_far_outside_the_box():
    """Regression: a reset drove it straight to the start, through whatever was in between."""
    env = real_env(0.3)
    with pytest.raises(UserError, match=r"stands 0\.30 m outside the safety box, at xyz \[0\.5, .*by hand"):
        env.reset(seed=0, options={"joint_reset": True})
    assert env.arm.calls == ["stop"]
    real_env(0.049).reset(seed=0)
    real_env(0.3, reset_from_outside=True).reset(seed=0)


def test_long_ways_are_not_faster():
    env = make_env(ToyArm(quat_pose(0.5, 0, 1.2, -3.14, 0, 0)), reset_speed_m_s=0.25)
    env.reset(seed=0)
    assert len(env.arm.moves) == 40  # 1 m
    turned = make_env(ToyArm(quat_pose(0.5, 0, 0.2, -3.14, 0, 2.0)))
    turned.reset(seed=0)
    assert len(turned.arm.moves) == 40  # 2 rad at 0.5 rad/s


def test_arrival_is_measured_in_metres_also_where_a_coordinate_is_zero():
    """1 mm beside a start at y = 0 has arrived; to a relative tolerance nothing there has."""
    env = make_env(ToyArm(quat_pose(*TARGET), bias_m=(0.0, 0.001, 0.0)))
    env.reset(seed=0)
    assert len(env.arm.moves) == 15


def test_arrival_is_not_forgiven_where_a_coordinate_is_large():
    env = make_env(ToyArm(quat_pose(*TARGET), bias_m=(0.009, 0.0, 0.0)), reset_tolerance_m=0.005)
    with pytest.raises(ArmError, match=r"it stands 0\.009 m and 0\.00 rad away"):
        env.reset(seed=0)
    assert env.arm.calls == ["move"] * 30 + ["stop"]  # on the way, and in vain for 1.5 s more


def test_a_lagging_arm_is_waited_for():
    env = make_env(ToyArm(quat_pose(0.5, 0, 0.9, -3.14, 0, 0), follow=0.3))
    env.reset(seed=0)
    assert len(env.arm.moves) == 28 + 4  # 0.7 m, and what the lag has left of it
    assert 0.02 * 0.7 < env.arm.pose[2] - 0.2 <= 0.02


def test_an_arm_that_turns_slowly_is_waited_for():
    """Soft springs turn a real arm at 0.1 rad/s, however far ahead the command is."""
    env = make_env(ToyArm(quat_pose(0.5, 0, 0.2, -3.14, 0, 1.0), max_turn_rad=0.012))
    env.reset(seed=0)
    assert len(env.arm.moves) == 75  # 0.9 rad, within 0.1 of the goal
    held = make_env(ToyArm(quat_pose(0.5, 0, 0.2, -3.14, 0, 1.0), max_turn_rad=0.001))
    with pytest.raises(ArmError, match=r"it stands 0\.000 m and 0\.96 rad away"):
        held.reset(seed=0)


def test_starts_are_drawn_from_the_seed_and_within_their_range():
    env = make_env(random_xy_range_m=0.03, random_rz_range_rad=0.4)
    starts = []
    for seed in (0, 1, 2, 0):
        env.reset(seed=seed)
        starts.append(to_euler_pose(env.arm.pose))
    np.testing.assert_allclose(starts[0], starts[3], atol=1e-9)
    away = np.array(starts) - to_euler_pose(quat_pose(0.5, 0, 0.2, -3.14, 0, 0))
    assert (np.abs(away[:, :2]) <= 0.03).all() and (np.abs(away[:, 5]) <= 0.4).all()
    np.testing.assert_allclose(away[:, 2:5], 0, atol=1e-9)
    assert len(np.unique(away[:3].round(9), axis=0)) == 3
    env.reset()  # goes on from the last seed
    assert not np.allclose(to_euler_pose(env.arm.pose), starts[3])


def test_joints_are_reset_every_so_many_resets():
    env = make_env(joint_reset_cycle=2)
    counts = []
    for _ in range(5):
        env.reset()
        counts.append(env.arm.calls.count("joint_reset"))
    assert counts == [0, 1, 1, 2, 2]


def test_sub_tasks_start_at_their_own_offset():
    env = make_env(reset_y_offsets_m=(0.04, -0.04))
    ys = []
    for options in (None, {"task_id": 1}, {"task_id": 0}):
        env.reset(options=options)
        ys.append(env.arm.pose[1])
    np.testing.assert_allclose(ys, [0.04, -0.04, 0.04], atol=1e-12)
    with pytest.raises(ValueError, match="task_id 2 has no entry"):
        env.reset(options={"task_id": 2})
    with pytest.raises(ValueError, match="got taskid"):
        env.reset(options={"taskid": 1})


def test_reset_goes_over_the_wall_of_the_bins():
    cfg = load_task("realworld_bin_relocation")
    arm = ToyArm(quat_pose(0.5, -0.1, 0.105, -3.14, 0, 0))  # in the one bin
    env = FrankaEnv(cfg, arm, {})
    env.reset(seed=0)
    assert arm.pose[1] > 0.06  # above the other one, where task 0 starts
    low, high = env.box.forbidden
    for pose in arm.moves:
        assert np.minimum(pose[:3] - low, high - pose[:3]).min() <= 0


def test_a_new_scene_comes_before_anything_moves():
    arm, seen = ToyArm(quat_pose(*TARGET)), []

    def new_scene(seed: int) -> None:
        seen.append((seed, len(arm.calls)))
        arm.pose = quat_pose(0.52, 0, 0.15, -3.14, 0, 0)

    env = FrankaEnv(FrankaConfig(task_config(reset_gripper="close")), arm, {}, new_scene)
    for seed in (0, 0, 1):
        arm.calls.clear()
        env.reset(seed=seed)
        assert arm.calls[0] == "close"  # again: the scene's hand is as the scene has made it
    assert [calls for _, calls in seen] == [0, 0, 0]
    assert seen[0][0] == seen[1][0] != seen[2][0]
    assert_same_pose(arm.moves[0], quat_pose(0.52, 0, 0.15, -3.14, 0, 0))


# ----------------------------------------------------------------------------------------------------
# Faults


def test_a_lost_arm_is_stopped_and_recovered_by_the_next_reset():
    env = make_env(ToyArm(quat_pose(*TARGET), lose_control_at=(17,)))
    env.reset(seed=0)
    env.step(STILL), env.step(STILL)
    with pytest.raises(ArmError, match="ran into something"):
        env.step(STILL)
    assert env.arm.calls[-1] == "stop"
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(STILL)
    env.arm.calls.clear()
    _, info = env.reset()
    assert env.arm.calls[0] == "recover"
    assert info["hold_steps"] == 0
    env.step(STILL)
    env.arm.calls.clear()
    env.reset()
    assert "recover" not in env.arm.calls


def test_an_arm_that_is_lost_again_and_again_is_not_recovered_for_ever():
    env = make_env(ToyArm(quat_pose(*TARGET), lose_control_at=tuple(range(1000))), max_recoveries=2)
    for _ in range(3):
        with pytest.raises(ArmError, match="ran into something"):
            env.reset()
    with pytest.raises(ArmError, match="lost in 3 episodes in a row"):
        env.reset()
    assert env.arm.calls.count("recover") == 2


def test_fingers_that_an_error_has_stopped_are_commanded_anew():
    camera = ToyCamera()
    env = make_env(cameras={"front": camera}, reset_gripper="close")
    env.reset(seed=0)
    camera.error = CameraError("stalled")
    with pytest.raises(CameraError):
        env.step(STILL)
    camera.error = None
    env.arm.calls.clear()
    env.reset()
    assert env.arm.calls[0] == "close"


def test_a_pause_stops_the_arm_and_going_on_starts_from_where_it_is():
    env = at(make_env(), 0.5, 0, 0.15, -3.14, 0, 0)
    env.step(action(gripper=-1.0))
    env.arm.calls.clear()
    env.pause()
    env.arm.pose[:3] = [0.52, 0.01, 0.14]
    env.go_on()
    env.step(action(x=1.0))
    assert env.arm.calls == ["stop", "close", "move"]  # the fingers, too, go on with what they were told
    np.testing.assert_allclose(env.arm.moves[-1][:3], [0.54, 0.01, 0.14], atol=1e-9)


@pytest.mark.parametrize("error", [CameraError("camera front has given no picture"), KeyboardInterrupt()])
def test_a_stalled_camera_or_ctrl_c_stops_the_arm(error):
    camera = ToyCamera()
    env = make_env(cameras={"front": camera})
    env.reset(seed=0)
    camera.error = error
    with pytest.raises(type(error)):
        env.step(action(x=1.0))
    assert env.arm.calls[-2:] == ["move", "stop"]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(STILL)
    camera.error = None
    env.reset()
    assert "recover" not in env.arm.calls  # control was never lost
    env.step(STILL)


def test_closing_stops_the_arm_and_leaves_it_to_its_maker():
    env = make_env()
    env.reset(seed=0)
    env.close()
    assert env.arm.calls[-1] == "stop" and "close" not in env.arm.calls
    env.arm.in_control = False
    env.close()  # never an error of its own


# ----------------------------------------------------------------------------------------------------
# Settings


def load_task(name: str) -> FrankaConfig:
    """One of configs/env with the target of this file."""
    target = f"env.eval.override_cfg.target_ee_pose={list(TARGET)}"
    return config.from_yaml(Config, CONFIGS / f"env/{name}.yaml", [target]).env.eval


@pytest.mark.parametrize("name", TASKS)
def test_tasks_load_run_and_are_written_back(name, tmp_path):
    cfg = load_task(name)
    config.save(cfg, tmp_path / "config.yaml")
    assert config.from_yaml(FrankaConfig, tmp_path / "config.yaml") == cfg
    assert name == f"realworld_{cfg.task}"
    env = FrankaEnv(cfg, ToyArm(quat_pose(0.58, 0, 0.4, -3.14, 0, 0)), {})
    env.reset(seed=0)
    for _ in range(200):  # straight to the target
        error = pose_error(env.arm.pose, env.target)
        step = env.step(np.append(np.clip(-error / np.repeat(env.task.action_scale[:2], 3), -1, 1), 0))
    # the bins' target is inside the wall, and the arm stops above it
    assert step[4]["in_zone"] is (name != "realworld_bin_relocation")
    if name == "realworld_bin_relocation":
        np.testing.assert_allclose(env.arm.pose[2], 0.14, atol=1e-6)


def test_a_target_must_be_given():
    with pytest.raises(UserError, match=r"'env\.eval\.override_cfg\.target_ee_pose' is missing"):
        config.from_yaml(Config, CONFIGS / "env/realworld_button.yaml")
    with pytest.raises(UserError, match="must be a list"):
        config.from_yaml(
            Config, CONFIGS / "env/realworld_button.yaml", ["env.eval.override_cfg.target_ee_pose=TARGET"]
        )


def test_the_bins_keep_the_references_numbers():
    cfg = load_task("realworld_bin_relocation")
    box = cfg.override_cfg.safety_box()
    np.testing.assert_allclose(box.low[:3], [0.4, -0.15, 0.099])
    np.testing.assert_allclose(box.high[:3], [0.6, 0.15, 0.2])
    np.testing.assert_allclose(box.forbidden, [[0.43, -0.03, -np.inf], [0.57, 0.03, 0.14]])
    np.testing.assert_allclose(box.high[3:] - box.low[3:], [0.02, 0.02, np.pi / 3], atol=1e-4)


def test_the_charger_is_a_peg_in_a_smaller_box():
    cfg = load_task("realworld_charger")
    assert (cfg.task, cfg.no_gripper, cfg.override_cfg.reset_gripper) == ("charger", True, "close")
    np.testing.assert_allclose(cfg.override_cfg.limits()[0], [0.48, -0.02, 0.095, -3.15, -0.01, -0.35])
    np.testing.assert_allclose(cfg.override_cfg.limits()[1], [0.52, 0.02, 0.15, -3.13, 0.01, 0.35])


def test_cameras_are_the_arms_own_the_serials_or_the_named_ones():
    task = task_config()
    assert list(FrankaConfig(task).all_cameras) == ["main_images", "extra_view_images"]
    assert FrankaConfig(task).main_camera == "main_images"
    for arm in (SerlHttpArmConfig(), ManiSkillArmConfig(cameras=None)):
        assert FrankaConfig(task, arm=arm).all_cameras == {}
        assert FrankaConfig(task, arm=arm).main_camera is None
    named = FrankaConfig(
        task_config(camera_serials=("0123", "0456")),
        cameras={"front": RealCameraConfig(backend="opencv", serial="0")},
        main_image_key="front",
    )
    assert list(named.all_cameras) == ["wrist_1", "wrist_2", "front"]
    assert named.all_cameras["wrist_2"] == RealCameraConfig(backend="realsense", serial="0456")
    assert named.main_camera == "front"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reward_threshold": (0.01, 0.01)}, "reward_threshold has 6 entries, got 2"),
        ({"ee_pose_limit_min": TARGET}, "go together"),
        (
            {
                "ee_pose_limit_min": (0.3, -0.1, 0.2, -3.2, -0.1, -0.1),
                "ee_pose_limit_max": (0.6, 0.1, 0.3, -3.1, 0.1, 0.1),
            },
            r"outside the safety box: z 0.1 is not in \[0.2, 0.3\]",
        ),
        ({"clip_z_range_low_m": -0.01}, "outside the safety box: z"),
        ({"target_ee_pose": (0.5, 0, 0.1, 0, 1.57, 0)}, "Euler angles give out"),
        ({"step_hz": 0.0}, "step_hz must be above 0"),
        ({"success_hold_steps": 0}, "success_hold_steps must be above 0"),
        ({"joint_reset_cycle": 0}, "joint_reset_cycle must be at least 1 or null"),
        ({"reset_y_offsets_m": ()}, "at least one"),
        ({"forbidden_box_m": ((0.03, 0, 0), (0.02, 0.1, 0.1))}, "each low below its high"),
        ({"forbidden_box_m": ((-1, -1, -1), (1, 1, 1))}, "nothing is left to move in"),
    ],
)
def test_settings_check_themselves(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        task_config(**changes)


def test_env_settings_check_themselves():
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1"):
        FrankaConfig(task_config(), max_episode_steps=0)
    with pytest.raises(ValueError, match="main_image_key 'front' names no camera; there is main_images"):
        FrankaConfig(task_config(), main_image_key="front")
    drawn = {"front": RealCameraConfig(backend="maniskill", serial="main_images")}
    for arm in (SerlHttpArmConfig(), ManiSkillArmConfig(cameras=None)):
        with pytest.raises(ValueError, match=r"cameras\.front: backend maniskill shows a simulated arm with"):
            FrankaConfig(task_config(), arm=arm, cameras=drawn)
