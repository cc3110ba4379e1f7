"""collect.py at an arm: what keys make of frames, and a start that finds all its work done."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import collect
from common.arms import SerlHttpArmConfig
from common.cameras import RealCameraConfig
from common.devices import ScriptedKeyboard
from common.franka import FrankaEnv
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.franka_wrappers import wrap_franka
from common.labelling import FrameFacts, FrameStore, read_labelled
from common.runtime import UserError
from common.session import Moment, Session, SessionLog, StatusLine
from tests.real_doubles import ToyArm, ToyCamera

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)
MAIN = {"main_images": RealCameraConfig(backend="maniskill", serial="main_images")}
FACTS = FrameFacts("toy", None)


def config(successes: int = 2, fails: int = 2, **env) -> collect.Config:
    env = FrankaConfig(FrankaTaskConfig(target_ee_pose=TARGET), **({"cameras": MAIN} | env))
    runner = collect.RunnerConfig(num_success_frames=successes, num_fail_frames=fails)
    return collect.Config(runner=runner, env=collect.EnvSection(env))


class KeyedSession:
    """Gives a moment per entry of `keys`; its pictures have the number of the step in all places."""

    def __init__(self, *keys: list[str]):
        self.keys, self.num_given = keys, 0

    def moments(self, seed: int) -> Iterator[Moment]:
        for number, keys in enumerate(self.keys, start=1):
            self.num_given += 1
            frames = {"main_images": np.full((4, 4, 3), number, np.uint8)}
            yield Moment(0, number, frames, 0.0, {}, keys, False)


def label(folder: Path, monkeypatch, session: KeyedSession, cfg: collect.Config) -> list[tuple[int, int]]:
    """-> (step, label) of the frames that stand."""

    @contextlib.contextmanager
    def open_session(*_, **__):
        yield session

    monkeypatch.setattr(collect, "open_session", open_session)
    with FrameStore(folder, FACTS) as store, SessionLog(folder / "log", line := StatusLine()) as log:
        collect.label_until_full(cfg, store, line, log)
    kept = read_labelled(folder)
    return [(int(kept.frame(i)[0, 0, 0]), int(kept.label[i])) for i in range(len(kept))]


@pytest.mark.parametrize(
    ("keys", "stand"),
    [
        ([["c"], [], ["a"]], [(1, 1), (3, 0)]),
        ([["c"], ["a", "u"]], [(1, 1)]),  # what was said in this look is taken back
        ([["c"], ["u", "a"]], [(2, 0)]),  # the one before
        ([["c"], ["a", "u", "u"]], []),
        ([["a"], ["c", "u", "a"]], [(1, 0), (2, 0)]),
        ([["c"], ["c", "a"]], [(1, 1), (2, 0)]),  # a frame has one label
        ([["a"], ["a"], ["a"], ["c"]], [(1, 0), (2, 0), (4, 1)]),  # there are enough fails
    ],
)
def test_keys_count_in_the_order_in_which_they_were_pressed(tmp_path, monkeypatch, keys, stand):
    with FrameStore(tmp_path, FACTS) as store:  # so that there is one to read
        store.add(np.zeros((4, 4, 3), np.uint8), 1, 0, 0)
        store.undo()
    assert label(tmp_path, monkeypatch, KeyedSession(*keys), config()) == stand


def test_it_ends_where_an_older_start_wanted_more_too(tmp_path, monkeypatch):
    """Regression: it went on for ever where there were more frames of a kind than wanted."""
    first = label(tmp_path, monkeypatch, KeyedSession(["c"], ["c"], ["c"]), config(successes=3, fails=9))
    assert len(first) == 3
    session = KeyedSession(["a"], ["a"], [], [])
    assert len(label(tmp_path, monkeypatch, session, config(successes=2, fails=2))) == 5
    assert session.num_given == 2


def never(*_, **__):
    raise AssertionError("the arm is not needed")


def test_a_start_that_finds_all_frames_leaves_the_arm_alone(tmp_path, monkeypatch):
    cfg = config(successes=1, fails=1)
    env = cfg.env.eval
    facts = FrameFacts(env.task, collect.render_facts(env), task_description=env.description)
    with FrameStore(tmp_path, facts) as store:
        for number, said in enumerate([1, 0, 1]):
            store.add(np.zeros((4, 4, 3), np.uint8), said, 0, number)
    monkeypatch.setattr(collect, "open_session", never)
    written = {"num_train_samples": 2, "num_val_samples": 1}
    monkeypatch.setattr(collect, "write_payloads", lambda *_: written)
    summary = collect.label_frames(cfg, tmp_path)
    assert summary == {"num_success_frames": 2, "num_fail_frames": 1, "env_steps": 0}


def test_a_start_that_finds_all_episodes_does_not_drive_the_arm(tmp_path, monkeypatch):
    cfg = config()
    cfg.runner = collect.RunnerConfig(num_episodes=0)
    env, arm = cfg.env.eval, ToyArm(cfg.env.eval.override_cfg.reset_pose())
    inner = wrap_franka(FrankaEnv(env, arm, {"main_images": ToyCamera()}), env)

    @contextlib.contextmanager
    def open_session(*_, **__):
        yield Session(inner, env, ScriptedKeyboard([]), StatusLine())

    monkeypatch.setattr(collect, "open_session", open_session)
    summary = collect.record_operator(cfg, tmp_path, tmp_path / "episodes")
    assert (summary["num_episodes"], summary["env_steps"], arm.calls) == (0, 0, [])


def test_labelling_needs_a_camera(tmp_path, monkeypatch):
    """Regression: a KeyError at the first label."""
    monkeypatch.setattr(collect, "open_session", never)
    with pytest.raises(UserError, match="what is labelled are pictures, and there is no camera: name some"):
        collect.label_frames(config(arm=SerlHttpArmConfig(), cameras={}), tmp_path)
