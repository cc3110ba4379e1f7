"""common/session.py: an operator at the arm, with scripts for hands."""

import signal

import numpy as np
import pytest

from common.arms import ManiSkillArmConfig
from common.cameras import RealCameraConfig
from common.devices import DevicesConfig, KeyboardConfig, ScriptedKeyboard
from common.franka import FrankaEnv
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.franka_wrappers import wrap_franka
from common.poses import to_quat_pose
from common.scripted_operator import ScriptedOperator
from common.session import Session, SessionLog, StatusLine, label_of, open_session
from tests.real_doubles import ToyArm, ToyCamera

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)


def config(**changes) -> FrankaConfig:
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1, clip_z_range_low_m=0.05)
    return FrankaConfig(override_cfg=task, **({"arm": ManiSkillArmConfig(cameras=None)} | changes))


MAIN = {"main_images": RealCameraConfig(backend="maniskill", serial="main_images")}


def session(keys, cfg: FrankaConfig | None = None, mouse=None) -> Session:
    cfg = cfg or config(max_episode_steps=4, cameras=MAIN)
    keyboard = ScriptedKeyboard(keys)
    env = FrankaEnv(cfg, ToyArm(cfg.override_cfg.reset_pose()), {"main_images": ToyCamera()})
    return Session(wrap_franka(env, cfg, mouse, keyboard), cfg, keyboard, StatusLine())


def test_the_last_label_key_counts():
    assert [label_of(keys) for keys in ([], ["c"], ["c", "a"], ["a", "x", "c", " "])] == [None, 1, 0, 1]


def test_episodes_follow_each_other_until_q():
    got = list(session([[], ["c"], [], [], ["a"], ["q"], ["c"]]).moments(seed=0))
    assert [(m.episode, m.step, m.done, m.label) for m in got] == [
        (0, 1, False, None), (0, 2, False, 1), (0, 3, False, None), (0, 4, True, None),
        (1, 1, False, 0), (1, 2, False, None),
    ]  # fmt: skip
    assert [int(m.frames["main_images"][0, 0, 0]) for m in got] == [1, 2, 3, 4, 6, 7]  # 0 and 5: resets


def test_max_steps_counts_over_episodes():
    assert len(list(session([]).moments(seed=0, max_steps=6))) == 6


def test_a_pause_lasts_until_the_second_space_and_keeps_its_keys():
    paused = session([[], [" "], [], ["u"], [" "], ["q"]])
    got = list(paused.moments(seed=0))
    assert [m.keys for m in got] == [[], [" ", "u", " "], ["q"]]
    assert paused.finished
    arm = paused.env.unwrapped.arm
    moves = arm.calls.count("move")
    assert len(got) == 3 and moves == 3 + 1  # and one of the reset: none while it was paused


def test_q_ends_a_pause_too():
    assert [m.keys for m in session([[" "], ["q"]]).moments(seed=0)] == [[" ", "q"]]


def test_with_a_keyboard_wrapper_its_keys_label_and_end_episodes():
    cfg = config(keyboard_reward_wrapper="single_stage", max_episode_steps=10, cameras=MAIN)
    got = list(session([[], [], ["c"], [], [], ["q"]], cfg).moments(seed=0))  # the first is read by the reset
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
