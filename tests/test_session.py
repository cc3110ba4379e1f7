"""common/session.py: an operator at the arm, with scripts for hands."""

import signal

import numpy as np
import pytest

from common.arms import ArmError, ManiSkillArmConfig, SerlHttpArmConfig
from common.cameras import RealCameraConfig
from common.devices import DevicesConfig, KeyboardConfig, ScriptedKeyboard
from common.franka import FrankaEnv
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.franka_wrappers import wrap_franka
from common.poses import to_quat_pose
from common.robot_envs import RobotEnvs
from common.runtime import UserError
from common.scripted_operator import ScriptedOperator
from common.session import Session, SessionLog, StatusLine, label_of, open_session
from tests.real_doubles import ToyArm, ToyCamera

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)


def config(**changes) -> FrankaConfig:
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1, clip_z_range_low_m=0.05)
    arm = ManiSkillArmConfig() if "cameras" in changes else ManiSkillArmConfig(cameras=None)
    return FrankaConfig(override_cfg=task, **({"arm": arm} | changes))


MAIN = {"main_images": RealCameraConfig(backend="maniskill", serial="main_images")}


def session(keys, cfg: FrankaConfig | None = None, lose_control_at=(), answers=False) -> Session:
    """keys: one entry per look, and there is one after each reset and each step."""
    cfg = cfg or config(max_episode_steps=4, cameras=MAIN)
    keyboard = ScriptedKeyboard(keys)
    arm = ToyArm(cfg.override_cfg.reset_pose(), lose_control_at=lose_control_at)
    env = FrankaEnv(cfg, arm, {"main_images": ToyCamera()})
    return Session(wrap_franka(env, cfg, None, keyboard), cfg, keyboard, StatusLine(), answers)


def steps(opened: Session, **limits) -> list[tuple[int, int]]:
    """(episode, step) of all moments."""
    return [(m.episode, m.step) for m in opened.moments(seed=0, **limits)]


def test_the_last_label_key_counts():
    assert [label_of(keys) for keys in ([], ["c"], ["c", "a"], ["a", "x", "c", " "])] == [None, 1, 0, 1]


def test_episodes_follow_each_other_until_q():
    got = list(session([[], [], ["c"], [], [], [], ["a"], ["q"], ["c"]]).moments(seed=0))
    assert [(m.episode, m.step, m.done, m.label) for m in got] == [
        (0, 1, False, None), (0, 2, False, 1), (0, 3, False, None), (0, 4, True, None),
        (1, 1, False, 0), (1, 2, False, None),
    ]  # fmt: skip
    assert [int(m.frames["main_images"][0, 0, 0]) for m in got] == [1, 2, 3, 4, 6, 7]  # 0 and 5: resets


def test_max_steps_counts_over_episodes():
    assert len(list(session([]).moments(seed=0, max_steps=6))) == 6


def test_what_is_pressed_while_the_arm_resets_labels_nothing():
    got = list(session([["c", "u"], [], ["a"], [], [], ["c"], ["q"]]).moments(seed=0))
    assert [m.keys for m in got] == [[], ["a"], [], [], ["q"]]


def test_what_is_pressed_while_the_arm_resets_pauses_and_ends():
    at_once = session([["q"], ["c"]])
    assert steps(at_once) == [] and at_once.finished
    paused = session([[" "], [], [" "], ["q"]])
    assert steps(paused) == [(0, 1)]
    assert paused.unwrapped.arm.calls[:3] == ["move", "stop", "open"]  # found open, and told so again
    between = session([[], [], [], [], [], ["q"]])
    assert steps(between) == [(0, step) for step in (1, 2, 3, 4)]


def test_a_wrapper_that_has_read_the_keys_of_a_reset_passes_them_on():
    """Regression: they were dropped on the way to RL and to the recording of episodes."""
    cfg = config(keyboard_reward_wrapper="single_stage", cameras=MAIN)
    opened = session([["c", "q"]], cfg)
    RobotEnvs(opened, cfg).reset(seed=0)
    assert opened.finished


def test_a_pause_lasts_until_the_second_space_and_keeps_its_keys():
    paused = session([[], [], [" "], [], ["u"], [" "], ["q"]])
    got = list(paused.moments(seed=0))
    assert [m.keys for m in got] == [[], [" ", "u", " "], ["q"]]
    assert paused.finished
    calls = paused.unwrapped.arm.calls
    assert len(got) == 3 and calls.count("move") == 3 + 1  # and one of the reset: none while it was paused
    assert calls[3:] == ["stop", "open", "move"]


def test_however_many_spaces_one_look_brings_they_pause():
    """Regression: two of them, as a held key gives, did nothing."""
    for spaces in ([" ", " "], [" ", " ", " "]):
        paused = session([[], spaces, [], [" "], ["q"]])
        assert [m.keys for m in paused.moments(seed=0)] == [[*spaces, " "], ["q"]]
        assert paused.unwrapped.arm.calls.count("stop") == 1


def test_an_arm_pushed_in_a_pause_stays_where_it_was_pushed_to():
    """Regression: the step after it drove back, however far that was."""
    pushed = to_quat_pose(np.array([0.53, 0.02, 0.15, -3.14, 0.0, 0.0]))

    def keys(look: int) -> list[str]:
        if look == 2:
            paused.unwrapped.arm.pose = pushed.copy()
        return [[], [" "], [], [" "], ["q"]][look]

    paused = session(keys)
    assert len(steps(paused)) == 2
    np.testing.assert_allclose(paused.unwrapped.arm.moves[-1][:3], pushed[:3], atol=1e-9)


def test_q_ends_a_pause_too():
    assert [m.keys for m in session([[], [" "], ["q"]]).moments(seed=0)] == [[" ", "q"]]


def test_a_lost_arm_waits_for_the_operator_and_is_recovered_by_a_new_episode(capsys):
    """The space that came before the question was meant to stop the arm, and is no answer."""
    opened = session([[], [], ["c", " "], [], [" "], [], [], ["q"]], lose_control_at=(2,), answers=True)
    got = list(opened.moments(seed=0))
    assert [(m.episode, m.step, m.label) for m in got] == [(0, 1, None), (1, 1, None), (1, 2, None)]
    calls = opened.unwrapped.arm.calls
    assert calls[2:6] == ["move", "stop", "recover", "move"]
    assert "the toy arm ran into something" in capsys.readouterr().out


def test_an_arm_that_is_lost_in_a_reset_is_asked_about_too():
    opened = session([[], [" "], [], ["q"]], lose_control_at=(0,), answers=True)
    assert steps(opened) == [(0, 1)]


@pytest.mark.parametrize(
    ("keys", "answers"), [([[], [], [], ["q"]], True), ([[], [], ["q"]], True), ([], False)]
)
def test_q_lets_a_lost_arm_end_the_run_and_so_does_nobody_at_the_keyboard(keys, answers):
    opened = session(keys, lose_control_at=(2,), answers=answers)
    with pytest.raises(ArmError, match="ran into something"):
        list(opened.moments(seed=0))


def test_with_a_keyboard_wrapper_its_keys_label_and_end_episodes():
    cfg = config(keyboard_reward_wrapper="single_stage", max_episode_steps=10, cameras=MAIN)
    got = list(session([[], [], ["c"], [], [], ["q"]], cfg).moments(seed=0))
    assert [(m.episode, m.label, m.done, m.reward) for m in got] == [
        (0, None, False, 0.0),
        (0, 1, True, 1.0),
        (1, None, False, 0.0),
        (1, None, False, 0.0),
    ]


def test_the_log_keeps_what_happened_and_what_ended_it(tmp_path, capsys):
    path = tmp_path / "session.log"
    with pytest.raises(KeyboardInterrupt), SessionLog(path, StatusLine()) as log:
        log.say("hello")
        log.write("to the file alone")
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "hello\n"
    stamps = [line.split(" ", 2)[2] for line in path.read_text().splitlines()]
    assert stamps == ["hello", "to the file alone", "ended by KeyboardInterrupt: "]


def test_without_a_terminal_the_status_is_told_now_and_then(capsys):
    line = StatusLine(every_s=1000)
    for number in range(5):
        line.show(f"step {number}")
    line.close()
    assert capsys.readouterr().out == "step 0\n"


def test_the_scripted_operator_reaches_the_target_leaves_it_and_says_where_it_is():
    """Through raw HID reports and a pseudo-terminal."""
    cfg = config(use_spacemouse=True, max_episode_steps=200)
    cfg.override_cfg.success_hold_steps = 1000  # the visit is not the end
    with ScriptedOperator(seed=0) as operator, operator.mouse as mouse:
        env = FrankaEnv(cfg, ToyArm(to_quat_pose(np.array(TARGET)), follow=0.7), {})
        operator.watch(env)
        wrapped = wrap_franka(env, cfg, mouse, operator)
        inside, labels = [], []
        for moment in Session(wrapped, cfg, operator, StatusLine()).moments(seed=0, max_steps=150):
            inside.append(moment.info["in_zone"])
            labels.append(moment.label)
    inside = np.array(inside)
    assert 0.15 < inside.mean() < 0.85
    assert all(label == 1 for label, now in zip(labels, inside, strict=True) if now)
    assert not any(label == 1 for label, now in zip(labels, inside, strict=True) if not now)
    assert labels.count(0) > 20 and labels.count(None) > 0  # near the border it says nothing


def test_code_drives_no_real_arm():
    cfg = config(arm=SerlHttpArmConfig(), use_spacemouse=True)
    with (
        pytest.raises(UserError, match=r"drives a simulated arm alone, and arm\.backend is serl_http"),
        open_session(cfg, DevicesConfig(operator="scripted"), StatusLine()),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_arm_like_an_exception(number):
    """A process that is ended, or whose SSH connection drops, leaves no arm alone with its last command."""
    before = signal.getsignal(number)
    cfg = config(max_episode_steps=50)
    devices = DevicesConfig(keyboard=KeyboardConfig(backend="scripted", keys=[]))
    calls = []
    with (
        pytest.raises(SystemExit) as ended,
        open_session(cfg, devices, StatusLine()) as opened,
    ):
        opened.env.unwrapped.arm.stop = lambda: calls.append("stop")
        for moment in opened.moments(seed=0):
            if moment.step == 3:
                signal.raise_signal(number)
    assert ended.value.code == 128 + number and calls
    assert signal.getsignal(number) == before
