"""common/franka_wrappers.py: who acts, who pays, in whose axes, and in which order."""

from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from scipy.spatial.transform import Rotation

from common.arms import ArmError, ManiSkillArmConfig
from common.devices import MouseReading, ScriptedKeyboard, ScriptedMouse
from common.franka import FrankaEnv, state_vector
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.franka_wrappers import (
    GripperClose,
    KeyboardRewardMultiStage,
    KeyboardRewardSingleStage,
    Quat2Euler,
    RelativeFrame,
    RewardModelSuccess,
    SpacemouseIntervention,
    open_franka,
    wrap_franka,
)
from common.poses import moved, pose_error, to_quat_pose
from common.rewards import Decision
from common.runtime import UserError
from tests.real_doubles import ToyArm, ToyCamera, ToyClock

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)


def quat_pose(*euler_pose: float) -> np.ndarray:
    return to_quat_pose(np.array(euler_pose))


def franka(arm: ToyArm | None = None, cameras=None, wide: bool = False, **task) -> FrankaEnv:
    """An env at the toy arm; `wide`: its box lets it turn and go nearly everywhere."""
    if wide:
        task |= {"ee_pose_limit_min": (-1, -1, -1, -6, -1.5, -3), "ee_pose_limit_max": (1, 1, 1, 0, 1.5, 3)}
    cfg = FrankaConfig(FrankaTaskConfig(target_ee_pose=TARGET, **task))
    return FrankaEnv(cfg, arm or ToyArm(quat_pose(*TARGET)), cameras or {})


def axes(*values: float) -> MouseReading:
    return MouseReading(axes=np.array([*values, *np.zeros(6 - len(values))], np.float32))


LEFT, RIGHT = MouseReading(left=True), MouseReading(right=True)
STALE = MouseReading(stale=True)
POLICY = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])


# ----------------------------------------------------------------------------------------------------
# Who acts


def test_without_a_gripper_actions_have_six_entries():
    arm = ToyArm(quat_pose(*TARGET))
    env = GripperClose(franka(arm))
    assert env.action_space == Box(-1, 1, (6,), np.float32)
    env.reset(seed=0)
    env.step(np.array([1.0, 0, 0, 0, 0, 0]))
    np.testing.assert_allclose(arm.moves[-1][0], 0.52, atol=1e-12)
    assert set(arm.calls) == {"move"}


def take_over(script: list[MouseReading], no_gripper: bool = False, clock=None, **task):
    """-> the env after a reset, its arm; each step takes 0.1 s of the arm's own time."""
    arm = ToyArm(quat_pose(*TARGET))
    env = franka(arm, **task)
    inner = GripperClose(env) if no_gripper else env
    env = SpacemouseIntervention(inner, ScriptedMouse(script), clock or env.now)
    env.reset(seed=0)
    return env, arm


def test_the_operator_keeps_the_arm_for_half_a_second_after_the_last_input():
    clock = ToyClock()
    env, arm = take_over(
        [axes(0.5), axes(), axes(), axes(), axes(), axes(), axes(0.0, 0.0, -1.0)], clock=clock
    )
    flags, wanted = [], []
    for pause_s in (0.0, 0.2, 0.2, 0.099, 0.002, 0.0, 10.0):
        clock.work(pause_s)
        before = arm.pose
        info = env.step(POLICY)[4]
        flags.append(info["intervene_flag"])
        wanted.append((arm.moves[-1] - before)[:3])
        assert ("intervene_action" in info) == info["intervene_flag"]
    assert flags == [True, True, True, True, False, False, True]  # 0.499 s yes, 0.501 s no
    expected = [[0.01, 0, 0]] + [[0, 0, 0]] * 3 + [[0, 0.02, 0]] * 2 + [[0, 0, -0.02]]
    np.testing.assert_allclose(wanted, expected, atol=1e-8)


def test_what_was_executed_comes_back_in_place_of_the_policys_action():
    env, _ = take_over([axes(0.5, -0.25, 0, 0, 0.1, 1.0)])
    info = env.step(POLICY)[4]
    assert info["intervene_action"].dtype == np.float32
    np.testing.assert_allclose(info["intervene_action"][:6], [0.5, -0.25, 0, 0, 0.1, 1.0], atol=1e-7)
    assert (info["left"], info["right"], info["mouse_stale"]) == (False, False, False)


def test_tiny_axes_are_no_input():
    env, _ = take_over([axes(0.0009), axes(0.0011)])
    assert [env.step(POLICY)[4]["intervene_flag"] for _ in range(2)] == [False, True]


def test_left_closes_right_opens_and_left_wins():
    both = MouseReading(left=True, right=True)
    env, arm = take_over([LEFT, axes(0.5), RIGHT, axes(), both])
    arm.calls.clear()
    infos = [env.step(POLICY)[4] for _ in range(5)]
    assert [call for call in arm.calls if call != "move"] == ["close", "open", "close"]
    commands = [info["intervene_action"][6] for info in infos]
    assert (
        commands[0] == commands[1] and commands[2] == commands[3]
    )  # repeated while the operator has the arm
    assert -1 <= commands[0] <= -0.9 and 0.9 <= commands[2] <= 1 and -1 <= commands[4] <= -0.9
    assert [info["left"] for info in infos] == [True, False, False, False, True]
    assert [info["right"] for info in infos] == [False, False, True, False, True]
    assert all(np.abs(info["intervene_action"][:6]).max() == 0 for info in infos[2:])


def test_who_takes_over_begins_with_the_gripper_as_it_is():
    """What the policy holds must not fall because the operator pushed the puck."""
    clock = ToyClock()
    env, arm = take_over([axes(), axes(0.5), axes(), axes(), axes(0.5)], clock=clock)
    close, opened = np.append(POLICY[:6], -1.0), np.append(POLICY[:6], 1.0)
    env.step(close)
    assert env.step(POLICY)[4]["intervene_action"][6] <= -0.9
    clock.work(1.0)
    env.step(opened)
    clock.work(1.0)
    env.step(POLICY)
    assert env.step(POLICY)[4]["intervene_action"][6] >= 0.9
    assert [call for call in arm.calls if call != "move"] == ["close", "open"]


def test_who_takes_over_leaves_a_gripper_alone_that_nobody_has_commanded():
    """Regression: with reset_gripper null the first touch of the mouse closed a half-open gripper."""
    arm = ToyArm(quat_pose(*TARGET))
    arm.opening_m = 0.05
    inner = franka(arm)
    env = SpacemouseIntervention(inner, ScriptedMouse([axes(0.5), axes(0.5), RIGHT]), inner.now)
    env.reset(seed=0)
    arm.calls.clear()
    commands = [env.step(POLICY)[4]["intervene_action"][6] for _ in range(3)]
    assert commands[:2] == [0.0, 0.0] and commands[2] >= 0.9
    assert [call for call in arm.calls if call != "move"] == ["open"]


def test_buttons_without_a_gripper_take_over_and_move_nothing():
    env, arm = take_over([LEFT, axes()], no_gripper=True)
    info = env.step(POLICY[:6])[4]
    assert info["intervene_flag"] and info["intervene_action"].tolist() == [0.0] * 6
    assert set(arm.calls) == {"move"}


def test_a_stale_mouse_moves_nothing_at_once_and_until_it_is_back():
    clock = ToyClock()
    env, arm = take_over([axes(1.0), STALE, STALE, axes()], clock=clock)
    env.step(POLICY)
    at = arm.pose.copy()
    for pause_s in (0.1, 5.0):  # within the half second, and long after it: no policy takes over
        clock.work(pause_s)
        info = env.step(POLICY)[4]
        assert info["mouse_stale"] and info["intervene_flag"]
        assert info["intervene_action"][:6].tolist() == [0.0] * 6
        np.testing.assert_allclose(arm.pose, at, atol=1e-9)
    info = env.step(POLICY)[4]
    assert not info["mouse_stale"] and not info["intervene_flag"]
    assert arm.pose[1] == pytest.approx(0.02)


def test_a_reset_ends_the_takeover():
    env, _ = take_over([axes(1.0)])
    env.step(POLICY)
    env.reset()
    assert env.step(POLICY)[4]["intervene_flag"] is False


def test_a_simulated_arms_half_second_is_of_its_own_time():
    env, _ = take_over([axes(1.0)])
    flags = [env.step(POLICY)[4]["intervene_flag"] for _ in range(8)]
    assert flags[:5] == [True] * 5 and flags[6:] == [False] * 2  # 0.5 s of steps of 0.1 s, but for rounding


def test_the_half_second_of_a_button_begins_when_the_fingers_are_done():
    env, arm = take_over([LEFT])
    flags = [env.step(POLICY)[4]["intervene_flag"] for _ in range(8)]
    assert arm.calls.count("close") == 1  # which takes 0.6 s
    assert flags[:5] == [True] * 5 and flags[6:] == [False] * 2


# ----------------------------------------------------------------------------------------------------
# Who pays


def label(wrapper, keys: list, in_zone: bool = False) -> list[tuple]:
    """-> (reward, terminated, label key, success) per entry of `keys`."""
    env = wrapper(franka(), ScriptedKeyboard([[], *keys]))
    env.reset(seed=0)
    if in_zone:
        env.unwrapped.arm.pushed_to = quat_pose(*TARGET)
    steps = [env.step(np.zeros(7)) for _ in keys]
    return [(reward, ended, info["label_key"], info["success"]) for _, reward, ended, _, info in steps]


def test_single_stage_table():
    assert label(KeyboardRewardSingleStage, ["a", "b", "c", "q", "", "x"]) == [
        (-1.0, True, "a", False),
        (0.0, False, "b", False),
        (1.0, True, "c", True),
        (0.0, False, "q", False),
        (0.0, False, None, False),
        (0.0, False, None, False),
    ]


def test_multi_stage_table():
    assert label(KeyboardRewardMultiStage, ["", "b", "", "q", "", "a", "", "b", "c"]) == [
        (0.0, False, None, False),
        (0.1, False, "b", False),
        (0.1, False, None, False),
        (-1.0, False, "q", False),
        (0.1, False, None, False),  # the stage stays
        (0.0, False, "a", False),
        (0.0, False, None, False),
        (0.1, False, "b", False),
        (1.0, True, "c", True),
    ]


def test_a_reset_returns_to_the_first_stage():
    env = KeyboardRewardMultiStage(franka(), ScriptedKeyboard(["", "b", "", ""]))
    env.reset(seed=0)
    assert env.step(np.zeros(7))[1] == 0.1
    env.reset()
    assert env.step(np.zeros(7))[1] == 0.0


def test_one_press_labels_one_step_the_last_one_if_there_are_several():
    assert label(KeyboardRewardSingleStage, ["ac", "", "ca", "cx"]) == [
        (1.0, True, "c", True),
        (0.0, False, None, False),
        (-1.0, True, "a", False),
        (1.0, True, "c", True),
    ]


@pytest.mark.parametrize("wrapper", [KeyboardRewardSingleStage, KeyboardRewardMultiStage])
def test_keys_take_the_place_of_the_target_pose(wrapper):
    assert label(wrapper, ["", ""], in_zone=True) == [(0.0, False, None, False)] * 2


def test_keys_of_a_reset_label_nothing_but_are_passed_on():
    env = KeyboardRewardSingleStage(franka(), ScriptedKeyboard([["c", "q"], [" ", "u"]]))
    _, info = env.reset(seed=0)
    assert info["keys"] == ["c", "q"]
    _, reward, terminated, _, info = env.step(np.zeros(7))
    assert (reward, terminated, info["keys"], info["label_key"]) == (0.0, False, [" ", "u"], None)


def test_ctrl_c_at_the_keyboard_is_raised():
    env = KeyboardRewardSingleStage(franka(), ScriptedKeyboard([[], ["c-c"]]))
    env.reset(seed=0)
    with pytest.raises(KeyboardInterrupt):
        env.step(np.zeros(7))


class ScriptedJudge:
    """Says the numbers of a list, one per call; keeps what it was shown."""

    def __init__(self, probs: list[float | None]):
        self.probs, self.seen = list(probs), []

    def __call__(self, frames: dict[str, np.ndarray]) -> float | None:
        self.seen.append(frames)
        return self.probs.pop(0)


def judged(probs: list[float | None], where: str = "away", **rule) -> list[tuple]:
    """-> (reward, terminated, info["success"], info["success_prob"]) of a step per probability. `where` has a
    letter per step: i in the zone, o outside; `away` is outside all the time."""
    in_zone = rule.pop("require_in_zone", False)
    decision = Decision(**{"threshold": 0.5, **rule})
    env = RewardModelSuccess(franka(), ScriptedJudge(probs), decision, in_zone)
    env.reset(seed=0)
    results = []
    for number in range(len(probs)):
        inside = where != "away" and where[number] == "i"
        env.unwrapped.arm.pushed_to = quat_pose(*TARGET) if inside else quat_pose(0.5, 0, 0.2, -3.14, 0, 0)
        _, reward, ended, _, info = env.step(np.zeros(7))
        assert info["true_success"] is info["in_zone"] is inside
        results.append((reward, ended, info["success"], info["success_prob"]))
    return results


def test_the_verdict_pays_and_ends():
    assert judged([0.1, 0.49, 0.5, 0.93]) == [
        (0.0, False, False, 0.1),
        (0.0, False, False, 0.49),
        (1.0, True, True, 0.5),
        (1.0, True, True, 0.93),
    ]


def test_the_threshold_is_the_configs():
    assert [step[1] for step in judged([0.19, 0.2, 0.7], threshold=0.2)] == [False, True, True]
    assert [step[1] for step in judged([0.89, 0.9], threshold=0.9)] == [False, True]  # 0.9 in 32 bits too


def test_the_target_pose_alone_pays_nothing():
    assert judged([0.1, 0.1], where="ii") == [(0.0, False, False, 0.1)] * 2


def test_a_late_verdict_is_no_success():
    assert judged([0.9, None, 0.9], hold_k=2, hold_n=2) == [
        (0.0, False, False, 0.9),
        (0.0, False, False, None),
        (0.0, False, False, 0.9),
    ]


def test_a_late_verdict_ends_no_episode_on_the_votes_before():
    ended = [step[1:3] for step in judged([0.9, 0.9, None, 0.9], hold_k=2, hold_n=3)]
    assert ended == [(False, False), (True, True), (False, False), (True, True)]


def test_k_of_n_steps_make_a_success():
    probs = [0.9, 0.1, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1, 0.9]
    ended = [step[1] for step in judged(probs, hold_k=3, hold_n=4)]
    assert ended == [False] * 8 + [True]
    ended = [step[1] for step in judged(probs, hold_k=2, hold_n=3)]
    assert ended == [False, False, True, False, False, False, True, True, True]


def test_a_reset_forgets_the_verdicts():
    env = RewardModelSuccess(franka(), ScriptedJudge([0.9, 0.9, 0.9]), Decision(0.5, hold_k=2, hold_n=2))
    env.reset(seed=0)
    env.step(np.zeros(7))
    env.reset()
    assert [env.step(np.zeros(7))[2] for _ in range(2)] == [False, True]


def test_the_pose_may_have_to_agree():
    ended = [step[1] for step in judged([0.9, 0.9, 0.1], where="oii", require_in_zone=True)]
    assert ended == [False, True, False]
    ended = [step[1] for step in judged([0.9] * 4, where="oiii", require_in_zone=True, hold_k=2, hold_n=2)]
    assert ended == [False, False, True, True]


def test_the_gripper_still_costs():
    env = RewardModelSuccess(franka(), ScriptedJudge([0.9, 0.1]), Decision(0.5))
    env.reset(seed=0)
    close, opened = np.array([0, 0, 0, 0, 0, 0, -1.0]), np.array([0, 0, 0, 0, 0, 0, 1.0])
    assert env.step(close)[1:3] == (0.9, True)
    assert env.step(opened)[1:3] == (-0.1, False)


def test_the_judge_sees_the_frames_of_the_step():
    judge = ScriptedJudge([0.1])
    env = RewardModelSuccess(franka(cameras={"front": ToyCamera(3)}), judge, Decision(0.5))
    env.reset(seed=0)
    obs = env.step(np.zeros(7))[0]
    assert judge.seen[0]["front"] is obs["frames"]["front"]
    assert (judge.seen[0]["front"] == 4).all()


# ----------------------------------------------------------------------------------------------------
# In whose axes


def at_an_angle() -> tuple[RelativeFrame, ToyArm]:
    """The env after a reset to a pose with all angles, far from the base."""
    reset = (0.5, -0.2, 0.3, -2.5, 0.4, 0.8)
    arm = ToyArm(quat_pose(*reset))
    env = RelativeFrame(franka(arm, wide=True, reset_ee_pose=reset, action_scale=(0.01, 0.02, 1)))
    env.reset(seed=0)
    return env, arm


def test_actions_are_in_the_grippers_axes():
    """Against finite differences: seen from the gripper before it, the pose after a step is displaced along
    the axis commanded and turned about it, and nothing else: a unit y command yields no yaw."""
    for index in range(6):
        env, arm = at_an_angle()
        before = arm.pose.copy()
        unit = np.zeros(7)
        unit[index] = 0.001
        env.step(unit)
        seen_by_base = pose_error(arm.pose, before)
        back = Rotation.from_quat(before[3:]).inv()
        seen_by_gripper = np.concatenate([back.apply(seen_by_base[:3]), back.apply(seen_by_base[3:])])
        expected = 0.001 * np.eye(6)[index] * [0.01, 0.01, 0.01, 0.02, 0.02, 0.02]
        np.testing.assert_allclose(seen_by_gripper, expected, atol=1e-9)


def test_actions_follow_the_gripper_as_it_turns():
    env, arm = at_an_angle()
    for _ in range(20):
        env.step(np.array([0, 0, 0, 0.5, 0.5, 0.5, 0]))
    before = arm.pose.copy()
    env.step(np.array([1.0, 0, 0, 0, 0, 0, 0]))
    along = Rotation.from_quat(before[3:]).apply([0.01, 0, 0])
    np.testing.assert_allclose(arm.pose[:3] - before[:3], along, atol=1e-8)


def test_poses_are_seen_from_where_the_episode_began():
    env, arm = at_an_angle()
    obs, _ = env.reset()
    np.testing.assert_allclose(obs["state"]["tcp_pose"], [0, 0, 0, 0, 0, 0, 1], atol=1e-6)
    start = arm.pose.copy()
    there = moved(start, np.array([0.05, -0.02, 0.03, 0.1, 0.2, -0.1]))
    arm.pushed_to = there
    obs = env.step(np.zeros(7))[0]
    relative = obs["state"]["tcp_pose"].astype(np.float64)
    # put back on top of the start, it is the pose again
    axes_then = Rotation.from_quat(start[3:])
    again = [
        start[:3] + axes_then.apply(relative[:3]),
        (axes_then * Rotation.from_quat(relative[3:])).as_quat(),
    ]
    np.testing.assert_allclose(pose_error(np.concatenate(again), there), 0, atol=1e-6)
    assert env.observation_space.contains(obs)


def test_velocities_are_in_the_grippers_axes():
    """Against finite differences of a pose that moves with the velocity the arm reports: 0 1 2 m/s, 3 4 5
    rad/s along the base's axes."""
    env, arm = at_an_angle()
    small = 1e-6
    velocity = env.reset()[0]["state"]["tcp_vel"]
    pose = arm.pose
    turn = Rotation.from_rotvec(small * np.array([3.0, 4.0, 5.0]))
    later = np.concatenate(
        [pose[:3] + small * np.arange(3.0), (turn * Rotation.from_quat(pose[3:])).as_quat()]
    )
    mine = Rotation.from_quat(pose[3:])
    shift = mine.inv().apply(later[:3] - pose[:3])
    spin = (mine.inv() * Rotation.from_quat(later[3:])).as_rotvec()
    np.testing.assert_allclose(velocity, np.concatenate([shift, spin]) / small, atol=1e-4)


def test_what_the_operator_did_comes_back_in_the_grippers_axes():
    """Played back as the policy's action, it moves the arm the same way."""
    reset = (0.5, -0.2, 0.3, -2.5, 0.4, 0.8)
    mouse = axes(0.3, -0.2, 0.1, 0.2, 0.4, -0.1)
    arm = ToyArm(quat_pose(*reset))
    env = franka(arm, wide=True, reset_ee_pose=reset)
    env = RelativeFrame(SpacemouseIntervention(env, ScriptedMouse([mouse]), env.now))
    env.reset(seed=0)
    replayed = env.step(np.zeros(7))[4]["intervene_action"]
    assert (replayed.shape, replayed.dtype) == ((7,), np.float32)
    driven = arm.pose.copy()
    np.testing.assert_allclose(
        driven[:3] - quat_pose(*reset)[:3], 0.02 * mouse.axes[:3], atol=1e-8
    )  # the base's

    arm = ToyArm(quat_pose(*reset))
    env = RelativeFrame(franka(arm, wide=True, reset_ee_pose=reset))
    env.reset(seed=0)
    env.step(replayed)
    np.testing.assert_allclose(pose_error(arm.pose, driven), 0, atol=1e-7)


def test_observations_below_are_left_alone():
    env = franka()
    wrapped = Quat2Euler(RelativeFrame(env))
    wrapped.reset(seed=0)
    inner, kept = env._observe, []

    def observe():
        kept.append(inner())
        return kept[-1]

    env._observe = observe
    wrapped.step(np.zeros(7))
    np.testing.assert_allclose(kept[0]["state"]["tcp_pose"], quat_pose(0.5, 0, 0.2, -3.14, 0, 0), atol=1e-6)
    assert kept[0]["state"]["tcp_vel"].tolist() == list(range(6))


def test_euler_observations():
    env = Quat2Euler(franka())
    obs, _ = env.reset(seed=0)
    assert env.observation_space["state"]["tcp_pose"].shape == (6,)
    assert env.observation_space.contains(obs)
    np.testing.assert_allclose(obs["state"]["tcp_pose"], [0.5, 0, 0.2, -3.14, 0, 0], atol=1e-6)
    assert state_vector(obs["state"]).shape == (19,)


# ----------------------------------------------------------------------------------------------------
# Together


def names(env: gymnasium.Env) -> list[str]:
    """Of the wrappers, the innermost first."""
    return (
        [*names(env.env), type(env).__name__] if isinstance(env, gymnasium.Wrapper) else [type(env).__name__]
    )


def wrapped(mouse=None, keyboard=None, verdict=None, **cfg) -> gymnasium.Env:
    cfg = FrankaConfig(FrankaTaskConfig(target_ee_pose=TARGET), **cfg)
    return wrap_franka(FrankaEnv(cfg, ToyArm(quat_pose(*TARGET)), {}), cfg, mouse, keyboard, verdict)


def test_the_order_of_the_wrappers():
    assert names(wrapped()) == ["FrankaEnv", "RelativeFrame", "Quat2Euler"]
    env = wrapped(
        ScriptedMouse([]), ScriptedKeyboard([]), no_gripper=True, use_spacemouse=True,
        keyboard_reward_wrapper="single_stage",
    )  # fmt: skip
    assert names(env) == [
        "FrankaEnv",
        "GripperClose",
        "SpacemouseIntervention",
        "KeyboardRewardSingleStage",
        "RelativeFrame",
        "Quat2Euler",
    ]
    env = wrapped(
        keyboard=ScriptedKeyboard([]), keyboard_reward_wrapper="multi_stage", use_relative_frame=False
    )
    assert names(env) == ["FrankaEnv", "KeyboardRewardMultiStage", "Quat2Euler"]
    env = wrapped(verdict=partial(RewardModelSuccess, judge=ScriptedJudge([]), decision=Decision(0.2)))
    assert names(env) == ["FrankaEnv", "RewardModelSuccess", "RelativeFrame", "Quat2Euler"]
    env = wrapped(mouse=ScriptedMouse([]), keyboard=ScriptedKeyboard([]))  # devices nobody asked for
    assert names(env) == ["FrankaEnv", "RelativeFrame", "Quat2Euler"]


def test_what_does_not_go_together_is_refused():
    verdict = partial(RewardModelSuccess, judge=ScriptedJudge([]), decision=Decision(0.2))
    with pytest.raises(UserError, match="set one of them to false or null"):
        wrapped(keyboard=ScriptedKeyboard([]), verdict=verdict, keyboard_reward_wrapper="single_stage")
    with pytest.raises(UserError, match="use_spacemouse is on, but no mouse"):
        wrapped(use_spacemouse=True)
    with pytest.raises(UserError, match="keyboard_reward_wrapper is set, but no keyboard"):
        wrapped(keyboard_reward_wrapper="single_stage")


def test_an_episode_by_hand_through_all_wrappers():
    """The operator drives down to the target, the gripper's own z pointing down, and calls it a success."""
    down = [axes(0, 0, -1.0)] * 5
    arm = ToyArm(quat_pose(*TARGET))
    cfg = FrankaConfig(
        FrankaTaskConfig(target_ee_pose=TARGET),
        no_gripper=True,
        use_spacemouse=True,
        keyboard_reward_wrapper="single_stage",
    )
    keys = ScriptedKeyboard([[], "", "", "", "", "c"])
    env = wrap_franka(FrankaEnv(cfg, arm, {"front": ToyCamera()}), cfg, ScriptedMouse(down), keys)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    for number in range(5):
        obs, reward, terminated, truncated, info = env.step(np.zeros(6, np.float32))
        assert env.observation_space.contains(obs)
        np.testing.assert_allclose(info["intervene_action"], [0, 0, 1, 0, 0, 0], atol=2e-3)
        np.testing.assert_allclose(obs["state"]["tcp_pose"][:3], [0, 0, 0.02 * (number + 1)], atol=1e-3)
    assert (reward, terminated, truncated, info["success"], info["in_zone"]) == (1.0, True, False, True, True)
    np.testing.assert_allclose(arm.pose[:3], TARGET[:3], atol=1e-9)


# ----------------------------------------------------------------------------------------------------
# On the simulated arm


def test_the_simulated_arm_reaches_a_target_and_holds_it():
    cfg = FrankaConfig(
        FrankaTaskConfig(
            target_ee_pose=(0.5, 0.05, 0.15, -3.14, 0.0, 0.2),
            reward_threshold=(0.01, 0.01, 0.01, 0.05, 0.05, 0.05),
            success_hold_steps=3,
            random_xy_range_m=0.03,
            random_rz_range_rad=0.3,
        ),
        arm=ManiSkillArmConfig(cameras=None),
    )
    with open_franka(cfg) as env:
        for seed in (0, 1):
            obs, _ = env.reset(seed=seed)
            np.testing.assert_allclose(obs["state"]["tcp_pose"], 0, atol=1e-3)  # seen from where it began
            inner = env.unwrapped
            for _ in range(40):
                error = pose_error(inner.arm.state().pose, inner.target)
                back = Rotation.from_quat(inner.arm.state().pose[3:]).inv()
                action = -np.concatenate([back.apply(error[:3]) / 0.02, back.apply(error[3:]) / 0.1, [0]])
                obs, reward, terminated, truncated, info = env.step(np.clip(action, -1, 1))
                if terminated:
                    break
            assert (reward, info["hold_steps"], info["success"], truncated) == (1.0, 3, True, False)


def test_the_arm_is_stopped_however_the_block_ends(monkeypatch):
    arm = ToyArm(quat_pose(*TARGET), lose_control_at=(16,))
    monkeypatch.setattr("common.franka_wrappers.make_arm", lambda cfg, control_hz: arm)
    cfg = FrankaConfig(
        FrankaTaskConfig(target_ee_pose=TARGET), cameras={}, arm=ManiSkillArmConfig(cameras=None)
    )
    arm.reset_scene = lambda seed: None
    with pytest.raises(KeyboardInterrupt), open_franka(cfg) as env:
        env.reset(seed=0)
        raise KeyboardInterrupt
    assert arm.calls[-2:] == ["stop", "close"]
    with pytest.raises(ArmError, match="ran into something"), open_franka(cfg) as env:
        env.reset(seed=0)
    assert arm.calls[-1] == "close"
