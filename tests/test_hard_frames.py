"""The hard-negative loop: what is kept in a rollout, and what a person's word makes of it."""

import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import RENDER, CountingEnvs, reward_config, use_fake_model
from test_experience import FakeRun, Recorder, step_once
from torch import tensor

import rl_train
from common.episodes import EpisodeWriter, frame_labels, list_episodes, read_episode, write_episode
from common.experience import Rollout
from common.hard_frames import HardFrames, list_hard
from common.keyboards import ScriptedKeyboard
from common.ppo import PPOConfig
from common.review import review, terminal_picture
from common.reward_client import RewardClient
from common.run import RunnerConfig
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"task": "Count", "task_description": "Count.", "render": RENDER, "control": {}}

# Scores of (env, episode, t) in hundredths; the threshold of the double is .5. Two envs, episodes of 3 steps.
PIXELS = {(0, 0, 1): 70, (0, 0, 2): 90, (0, 0, 3): 20, (1, 0, 2): 10, (1, 1, 3): 60}
SUCCESSES = frozenset({(0, 0, 3), (1, 0, 1)})


def envs() -> CountingEnvs:
    return CountingEnvs([[3], [3]], SUCCESSES, pixel=lambda *where: PIXELS.get(where, 0))


def kept(folder: Path) -> set[tuple[int, float, bool, bool | None]]:
    """(env, score, called, truth) of each file."""
    return {
        (read_episode(h.path).env_idx, round(h.success_prob, 2), h.called, h.success)
        for h in list_hard(folder)
    }


def run_sac(folder: Path, monkeypatch, limit: int = 100, knows: bool = True) -> None:
    use_fake_model(monkeypatch)
    cfg = reward_config(reward_mode="per_step")
    with EpisodeWriter(folder) as writer:
        hard = HardFrames(writer, limit, 2, FACTS, knows)
        rollout = Rollout(envs(), RewardClient(cfg), cfg, "standard", hard=hard)
        rollout.reset(0)
        for _ in range(6):
            step_once(rollout)
        list(rollout.drain())


def test_a_rollout_keeps_one_mistake_of_each_kind_per_episode(tmp_path, monkeypatch):
    run_sac(tmp_path, monkeypatch)
    # (0, 0, 2) is as wrong as (0, 0, 1) and looks alike; (1, 0, 1) scores 0 and is a success
    assert kept(tmp_path) == {
        (0, 0.7, True, False),
        (0, 0.2, False, True),
        (1, 0.0, False, True),
        (1, 0.6, True, False),
    }
    for path in list_episodes(tmp_path):
        episode = read_episode(path, views=None)
        assert (episode.length, episode.task, episode.render) == (1, "Count", RENDER)
        assert episode.success.tolist() == [False, episode.success_once]
        assert episode.images["main_images"].shape == (2, 8, 8, 3)
        assert not episode.images["main_images"][0].any()
        pixel = episode.images["main_images"][1, 0, 0, 0]
        assert pixel == round(100 * episode.infos[1]["success_prob"])
        assert (episode.images["extra_view_images"][1] == 255 - pixel).all()


def looked_at(tmp_path, prob: list[float], success: list[bool], threshold: float, **options) -> HardFrames:
    """One step of an env for each score, one frame of env 0 among them."""
    frames = torch.zeros((len(prob), 8, 8, 3), dtype=torch.uint8)
    end, info = (
        torch.ones(len(prob), dtype=torch.bool),
        {"success": tensor(success), "placed": ~tensor(success)},
    )
    with EpisodeWriter(tmp_path / "hard") as writer:
        hard = HardFrames(writer, 2, 2, FACTS, **options)
        for _ in range(2):
            hard.keep({"main_images": frames}, torch.arange(len(prob)), tensor(prob), threshold, info, end)
            hard.renew()
    return hard


def test_what_reaches_the_threshold_or_was_never_scored_is_no_miss(tmp_path):
    """A success that scores .95 is none, however many in a row a verdict takes; nor is a late score."""
    hard = looked_at(tmp_path, [0.95, math.nan, 0.8], [True, True, True], 0.9)
    assert hard.num_kept == 2  # .8, in both steps
    assert kept(tmp_path / "hard") == {(2, 0.8, False, True)}


def test_the_limit_holds_until_what_was_kept_has_been_learned_from(tmp_path):
    assert looked_at(tmp_path, [0.1, 0.2, 0.3], [True, True, True], 0.9).num_kept == 4


def test_the_truth_is_that_of_the_label_that_was_learned(tmp_path):
    looked_at(tmp_path, [0.95, 0.1], [True, False], 0.9, label="placed")
    assert kept(tmp_path / "hard") == {(0, 0.95, True, False), (1, 0.1, False, True)}


def test_ppo_keeps_the_same(tmp_path, monkeypatch):
    use_fake_model(monkeypatch)
    reward = reward_config(reward_mode="per_step")
    cfg = rl_train.Config(algorithm=PPOConfig(num_steps=2), reward=reward, runner=RunnerConfig(max_steps=12))
    run = FakeRun(cfg)
    run.client = RewardClient(reward)
    with EpisodeWriter(tmp_path / "ppo") as writer:
        run.hard = HardFrames(writer, 100, 2, FACTS)
        rl_train.train_ppo(cfg, run, Recorder(), envs(), run.client)
    run_sac(tmp_path / "sac", monkeypatch)
    assert kept(tmp_path / "ppo") == kept(tmp_path / "sac")


def test_no_more_than_the_limit(tmp_path, monkeypatch):
    run_sac(tmp_path, monkeypatch, limit=3)
    assert len(list_episodes(tmp_path)) == 3


def test_without_a_truth_what_is_called_or_unsure_waits_for_a_person(tmp_path, monkeypatch):
    run_sac(tmp_path, monkeypatch, knows=False)
    assert kept(tmp_path) == {(0, 0.7, True, None), (1, 0.6, True, None)}
    with pytest.raises(ValueError, match="has no 'success' in its step infos"):
        frame_labels(read_episode(list_episodes(tmp_path)[0]).infos, required=True)


# ----------------------------------------------------------------------------------------------------
# A person looks


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """Three frames without a truth, scores .9, .7, .6 of envs 0, 1, 2."""
    with EpisodeWriter(tmp_path / "hard") as writer:
        hard = HardFrames(writer, 9, 2, FACTS, knows=False)
        prob = tensor([0.9, 0.7, 0.6])
        frames = (100 * prob).byte()[:, None, None, None].expand(-1, 8, 8, 3)
        still = torch.zeros(3, dtype=torch.bool)
        info = {"success": still}
        hard.keep({"main_images": frames}, torch.arange(3), prob, 0.0, info, still)
    return tmp_path / "hard"


def answers(folder: Path) -> list[bool | None]:
    """By env."""
    found = {read_episode(h.path).env_idx: (h.success if h.reviewed else None) for h in list_hard(folder)}
    return [found[env] for env in sorted(found)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["c", "a", "c"], [True, False, True]),
        (["cac"], [True, False, True]),  # typed ahead
        (["a", " ", "q"], [False, None, None]),
        (["a", "u", "c", "x", "q"], [True, None, None]),  # back, the other way; an unknown key means nothing
        (["u", "c", "q"], [True, None, None]),  # nothing lies before the first one
        (["q"], [None, None, None]),
    ],
)
def test_keys_of_a_review(queue, keys, said):
    lines = []
    review(queue, ScriptedKeyboard(keys), lines.append)
    assert answers(queue) == said
    names = [path.name for path in list_episodes(queue)]
    assert len(names) == 3
    assert sum(name.endswith("_success.pkl") for name in names) == said.count(True)
    assert not (queue / "review.png").exists()
    assert lines[-1].endswith(f"{said.count(None)} of 3 frames have no label yet")


def test_the_next_review_asks_about_the_rest(queue):
    review(queue, ScriptedKeyboard(["c", "q"]), lambda _: None)
    lines = []
    review(queue, ScriptedKeyboard(["a", "a"]), lines.append)
    assert lines[0].startswith(f"{queue}: 3 frames, 2 not looked at yet")
    assert answers(queue) == [True, False, False]
    assert review(queue, ScriptedKeyboard([]), lines.append) == 0


def test_a_review_that_dies_in_the_middle_of_an_answer_loses_nothing(queue, monkeypatch):
    def die(*_):
        raise OSError("disk full")

    monkeypatch.setattr("common.hard_frames.write_episode", die)
    with pytest.raises(OSError, match="disk full"):
        review(queue, ScriptedKeyboard(["c"]), lambda _: None)
    monkeypatch.undo()
    assert answers(queue) == [None, None, None]
    assert len(list_episodes(queue)) == 3
    review(queue, ScriptedKeyboard(["cca"]), lambda _: None)
    assert answers(queue) == [True, True, False]


def test_other_episodes_are_refused(tmp_path):
    frame = {"main_images": np.zeros((8, 8, 3), np.uint8)}
    episode = {"rank": 0, "env_idx": 0, "episode_id": 0, "step": 0, "success": False}
    episode |= {"observations": [frame] * 2, "actions": [np.zeros(2)], "rewards": [0.0] * 2}
    episode |= {"terminated": [False] * 2, "truncated": [False] * 2, "infos": [{}, {"success": False}]}
    write_episode(tmp_path, episode)
    with pytest.raises(UserError, match="is no hard frame; name a folder that"):
        review(tmp_path, ScriptedKeyboard([]))


def test_a_picture_in_the_terminal():
    frame = np.zeros((4, 2, 3), np.uint8)
    frame[1, 0] = (255, 0, 7)
    first, second = terminal_picture(frame, 80).split("\n")
    assert first == "\x1b[38;2;0;0;0;48;2;255;0;7m\u2580\x1b[38;2;0;0;0;48;2;0;0;0m\u2580\x1b[0m"
    assert second.count("\u2580") == 2
    assert terminal_picture(np.zeros((64, 128, 3), np.uint8), 80).count("\u2580") == 80 * 20


def test_the_command_as_a_user_types_it(queue):
    main, ours = pty.openpty()
    command = [sys.executable, str(ROOT / "collect.py"), "--review", str(queue)]
    process = subprocess.Popen(command, stdin=ours, stdout=ours, stderr=ours, start_new_session=True)
    os.close(ours)
    shown, deadline = b"", time.monotonic() + 100
    for awaited, key in ((b"1/3", b"c"), (b"2/3", b"a"), (b"3/3", b"q")):
        while awaited not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(main, 65536)
        os.write(main, key)
    assert process.wait(timeout=60) == 0
    os.close(main)
    assert answers(queue) == [True, False, None]
    assert "\u2580".encode() in shown
