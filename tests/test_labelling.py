"""Labelled frames: nothing is lost on the disk, train and val do not touch, and the data set trains."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import preprocess_resnet
from common.block_split import split_by_block
from common.episodes import write_episode
from common.frames import check_same_cameras, load_frames
from common.labelling import (
    LOG_NAME,
    FrameFacts,
    FrameStore,
    progress_line,
    read_labelled,
    record_type,
    write_payloads,
)
from common.payload import PayloadFile, RewardDatasetPayload
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
FACTS = FrameFacts("bin_relocation", {"views": {"main_images": {"serial": "17", "crop": (0, 0.5)}}})
SIZE = 4


def image(value: int, size: int = SIZE) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def fill(
    folder: Path, labels: str, episode: int = 0, first_value: int = 0, facts: FrameFacts = FACTS
) -> Path:
    """A run that labels one frame per step of one episode: `c` success, `a` fail, `u` undo, `-` nothing.

    The frame of step t is all `first_value + t`.
    """
    with FrameStore(folder, facts) as store:
        for step, key in enumerate(labels):
            if key == "u":
                store.undo()
            elif key != "-":
                store.add(image(first_value + step), int(key == "c"), episode, step)
    return folder


def held(folder: Path) -> list[tuple[int, int, int, int]]:
    """(value, label, episode, step) of the frames that stand."""
    frames = read_labelled(folder)
    values = [int(np.unique(frames.frame(index)).item()) for index in range(len(frames))]
    return list(
        zip(values, frames.label.tolist(), frames.episode.tolist(), frames.step.tolist(), strict=True)
    )


# -----------------------------------------------------------------------------------------------------------
# The store


def test_frames_come_back_with_label_episode_and_step(tmp_path):
    with FrameStore(tmp_path, FACTS) as store:
        store.add(image(5), 0, episode=0, step=3)
        store.add(image(6), 1, episode=0, step=9)
        assert held(tmp_path) == [(5, 0, 0, 3), (6, 1, 0, 9)]  # on the disk at once, and open to readers
        store.add(image(7), True, episode=2, step=0)
        assert (store.num_success, store.num_fail) == (2, 1)
    frames = read_labelled(tmp_path)
    assert frames.facts == FACTS
    assert frames.facts.render == {"views": {"main_images": {"serial": "17", "crop": [0, 0.5]}}}
    assert frames.image_shape == (SIZE, SIZE, 3)
    assert abs(frames.log["time"] - time.time()).max() < 60


def test_a_second_run_goes_on_and_its_episodes_are_new_ones(tmp_path):
    fill(tmp_path, "ac", episode=3)
    fill(tmp_path, "-u", episode=0)  # takes back the older run's last
    fill(tmp_path, "a-c", first_value=10)
    assert held(tmp_path) == [(0, 0, 3, 0), (10, 0, 4, 0), (12, 1, 4, 2)]
    with FrameStore(tmp_path, FACTS) as store:
        assert (store.num_success, store.num_fail, store.torn_bytes) == (1, 2, 0)


def test_undo_takes_back_one_frame_after_the_other(tmp_path):
    with FrameStore(tmp_path, FACTS) as store:
        assert store.undo() is None
        for step, label in enumerate([1, 0, 0, 1]):
            store.add(image(step), label, 0, step)
        assert [store.undo(), store.undo()] == [1, 0]
        assert (store.num_success, store.num_fail) == (1, 1)
        store.add(image(9), 1, 0, 2)  # the step whose label was taken back, labelled anew
        assert held(tmp_path) == [(0, 1, 0, 0), (1, 0, 0, 1), (9, 1, 0, 2)]
        assert [store.undo() for _ in range(4)] == [1, 0, 1, None]
    assert held(tmp_path) == []
    assert len(read_labelled(tmp_path).log) == 4 + 2 + 1 + 3  # nothing was overwritten


def test_the_file_is_as_documented(tmp_path):
    fill(tmp_path, "acu")
    data = (tmp_path / LOG_NAME).read_bytes()
    header, records = data.split(b"\n", 1)
    content = json.loads(header)
    assert content["frame_shape"] == [SIZE, SIZE, 3]
    assert content["facts"]["task"] == "bin_relocation"
    assert len(records) == 3 * (4 + 1 + 8 + 8 + 8 + SIZE * SIZE * 3)
    assert np.frombuffer(records, record_type((SIZE, SIZE, 3)))["label"].tolist() == [0, 1, -1]


@pytest.mark.parametrize("last", ["c", "u"], ids=["the last record is a frame", "the last record is an undo"])
def test_cut_off_anywhere_in_the_last_record_the_rest_stands(tmp_path, last):
    folder = fill(tmp_path / "whole", "aca")
    older, size = held(folder), (folder / LOG_NAME).stat().st_size
    fill(folder, "---" + last)
    data = (folder / LOG_NAME).read_bytes()
    assert held(folder) != older
    for end in range(size, len(data)):
        torn = tmp_path / str(end)
        torn.mkdir()
        (torn / LOG_NAME).write_bytes(data[:end])
        assert held(torn) == older  # a reader changes nothing
        with FrameStore(torn, FACTS) as store:
            assert store.torn_bytes == end - size
            assert (store.num_success, store.num_fail) == (1, 2)
            store.add(image(50), 1, 0, 0)
        assert held(torn) == [*older, (50, 1, 1, 0)]


@pytest.mark.parametrize("position", [0, 4, 5, 13, 21, 29, -1])
def test_a_last_record_of_full_length_but_wrong_content_is_torn_too(tmp_path, position):
    """A machine that lost its power may have made the file longer before it wrote the bytes."""
    fill(tmp_path, "aca")
    data = bytearray((tmp_path / LOG_NAME).read_bytes())
    size = record_type((SIZE, SIZE, 3)).itemsize
    data[len(data) - size + position if position >= 0 else -1] ^= 1
    (tmp_path / LOG_NAME).write_bytes(data)
    assert [row[0] for row in held(tmp_path)] == [0, 1]
    (tmp_path / LOG_NAME).write_bytes(data[:-size] + bytes(size))
    fill(tmp_path, "c", first_value=70)
    assert [row[0] for row in held(tmp_path)] == [0, 1, 70]


def test_a_log_without_any_record_is_an_empty_store(tmp_path):
    fill(tmp_path, "a")
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    assert held(tmp_path) == []
    fill(tmp_path, "c")
    assert held(tmp_path) == [(0, 1, 0, 0)]


def test_damage_in_the_middle_is_named_with_a_remedy_that_works(tmp_path):
    fill(tmp_path, "acaca")
    path, size = tmp_path / LOG_NAME, record_type((SIZE, SIZE, 3)).itemsize
    data = bytearray(path.read_bytes())
    data[-2 * size - 1] ^= 1  # record 3
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged in record 3 of 5 .*truncate -s (\d+)") as caught:
        FrameStore(tmp_path, FACTS)
    subprocess.run(str(caught.value).split("before it: ")[1].split(), check=True)
    assert [row[0] for row in held(tmp_path)] == [0, 1]


WRITER = """
import sys
import numpy as np
from common.labelling import FrameFacts, FrameStore

with FrameStore(sys.argv[1], FrameFacts("task", None)) as store:
    for step in range(100_000):
        store.add(np.full((64, 64, 3), step % 256, np.uint8), step % 2, 0, step)
        if step % 3 == 2:
            store.undo()
        print(step, flush=True)
"""


def test_a_killed_process_loses_nothing_and_the_next_goes_on(tmp_path):
    num_confirmed = 0
    for run in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            confirmed = [int(process.stdout.readline()) for _ in range(10 + 7 * run)]
            process.send_signal(signal.SIGKILL)
            confirmed += [int(line) for line in process.stdout]
        frames = read_labelled(tmp_path)
        of_run = frames.episode == run
        kept = [step for step in confirmed if step % 3 != 2]
        # what was in writing may be whole or not; an undone frame stands if the kill came before its undo
        steps = frames.step[of_run].tolist()
        assert steps[: len(kept)] == kept
        assert len(steps) <= len(kept) + 1
        assert all((frames.frame(i) == frames.step[i] % 256).all() for i in range(len(frames)))
        assert (frames.label == frames.step % 2).all()
        num_confirmed += len(kept)
        assert num_confirmed <= len(frames) <= num_confirmed + run + 1
    with FrameStore(tmp_path, FrameFacts("task", None)) as store:
        assert store.num_success + store.num_fail == len(frames)


def test_a_full_disk_is_one_line_and_the_store_goes_on_when_there_is_room(tmp_path, monkeypatch):
    with FrameStore(tmp_path, FACTS) as store:
        store.add(image(1), 1, 0, 0)
        size = (tmp_path / LOG_NAME).stat().st_size

        def no_space(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(UserError, match=r"cannot write a labelled frame to .*No space left"):
                store.add(image(2), 1, 0, 1)
            with pytest.raises(UserError, match="No space left"):
                store.undo()
        assert (store.num_success, store.num_fail) == (1, 0)
        assert (tmp_path / LOG_NAME).stat().st_size == size
        store.add(image(3), 0, 0, 1)
    assert held(tmp_path) == [(1, 1, 0, 0), (3, 0, 0, 1)]


def test_a_half_written_record_that_cannot_be_cut_off_is_written_over(tmp_path):
    class Sick:
        """A disk that takes 20 bytes and then neither more nor less."""

        def __init__(self, file):
            self.file, self.left = file, 20

        def write(self, data: memoryview) -> int:
            if not self.left:
                raise OSError(errno.EIO, "Input/output error")
            count, self.left = self.file.write(data[: self.left]), 0
            return count

        def truncate(self, size: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    with FrameStore(tmp_path, FACTS) as store:
        store.add(image(1), 1, 0, 0)
        well, store._file = store._file, Sick(store._file)
        with pytest.raises(UserError, match="Input/output error"):
            store.add(image(2), 1, 0, 1)
        assert held(tmp_path) == [(1, 1, 0, 0)]
        store._file = well
        store.add(image(3), 0, 0, 2)
        assert held(tmp_path) == [(1, 1, 0, 0), (3, 0, 0, 2)]


def test_ctrl_c_in_writing_leaves_a_whole_store(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with FrameStore(tmp_path, FACTS) as store:
        store.add(image(1), 1, 0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.add(image(2), 1, 0, 1)
        store.add(image(3), 0, 0, 1)
    assert held(tmp_path) == [(1, 1, 0, 0), (3, 0, 0, 1)]


def test_one_writer_per_folder(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with FrameStore(tmp_path, FACTS) as store:
        store.add(image(1), 1, 0, 0)
        with pytest.raises(UserError, match=f"another process is adding frames to {tmp_path}"):
            FrameStore(tmp_path, FACTS)
        other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert "UserError: another process is adding frames" in other.stderr
        store.add(image(2), 1, 0, 1)  # still ours
    with FrameStore(tmp_path, FACTS) as store:
        assert store.num_success == 2
    with pytest.raises(ValueError, match="closed; another process may be writing"):
        store.add(image(3), 1, 0, 0)
    with pytest.raises(ValueError, match="closed file"):
        store.undo()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            FrameFacts("peg", FACTS.render),
            "frames with task bin_relocation, but this run has peg; use another",
        ),
        (
            FrameFacts("bin_relocation", {"views": {}}),
            r"with render \{'views': .*17.*\}, but .* \{'views': {}\}",
        ),
        (FrameFacts("bin_relocation", FACTS.render, view="wrist_1"), "with view main_images, but .* wrist_1"),
    ],
)
def test_other_facts_are_refused_and_the_folder_stays_free(tmp_path, facts, message):
    fill(tmp_path, "ac")
    with pytest.raises(UserError, match=message):
        FrameStore(tmp_path, facts)
    fill(
        tmp_path,
        "c",
        facts=FrameFacts("bin_relocation", {"views": {"main_images": {"serial": "17", "crop": [0, 0.5]}}}),
    )
    assert len(held(tmp_path)) == 3


def test_another_frame_size_is_refused(tmp_path):
    fill(tmp_path, "ac")
    with FrameStore(tmp_path, FACTS) as store:
        with pytest.raises(
            UserError, match=r"gives frames of \(8, 8, 3\), but .* holds frames of \(4, 4, 3\)"
        ):
            store.add(image(1, size=8), 1, 0, 0)
        assert (store.num_success, store.num_fail) == (1, 1)


@pytest.mark.parametrize(
    ("frame", "label"),
    [
        (image(1).astype(np.float32), 1),
        (image(1)[None], 1),
        (image(1)[..., :1], 1),
        (image(1), 2),
        (image(1), -1),
    ],
)
def test_what_no_camera_makes_is_a_mistake_in_code(tmp_path, frame, label):
    with FrameStore(tmp_path, FACTS) as store, pytest.raises(ValueError, match="need uint8"):
        store.add(frame, label, 0, 0)
    assert not (tmp_path / LOG_NAME).exists()


@pytest.mark.parametrize(("episode", "step"), [(1, 5), (1, 4), (0, 9)])
def test_time_does_not_run_backwards(tmp_path, episode, step):
    with FrameStore(tmp_path, FACTS) as store:
        store.add(image(1), 1, 1, 5)
        with pytest.raises(ValueError, match="is no later than"):
            store.add(image(1), 1, episode, step)
        store.add(image(2), 0, 2, 0)


def test_no_store(tmp_path):
    with pytest.raises(UserError, match=r"holds no labelled frames"):
        read_labelled(tmp_path)
    (tmp_path / LOG_NAME).write_bytes(b"\x80\x02}\n")
    with pytest.raises(UserError, match="is no store of labelled frames, version 1"):
        FrameStore(tmp_path, FACTS)
    (tmp_path / LOG_NAME).write_text('{"format": "labelled frames, version 9"}\n')
    with pytest.raises(UserError, match="its format is 'labelled frames, version 9'"):
        read_labelled(tmp_path)
    with pytest.raises(UserError, match="cannot keep labelled frames in"):
        FrameStore(tmp_path / LOG_NAME, FACTS)


# -----------------------------------------------------------------------------------------------------------
# The split


def split(
    episodes: dict[int, str], val_split: float = 0.2, gap_steps: int = 5, seed: int = 42
) -> dict[str, str]:
    """Episodes as in `fill` -> for each frame `t` train, `v` val or `.` neither, as a string per episode."""
    rows = [
        (number, step, key == "c")
        for number, labels in episodes.items()
        for step, key in enumerate(labels)
        if key != "-"
    ]
    episode, step, label = (np.array(column) for column in zip(*rows, strict=True))
    chosen = split_by_block(episode, step, label, val_split, gap_steps, seed)
    side = np.full(len(rows), ".")
    side[chosen["train"]], side[chosen["val"]] = "t", "v"
    assert len(chosen["train"]) + len(chosen["val"]) + (side == ".").sum() == len(rows)
    assert all((np.diff(indices) > 0).all() for indices in chosen.values())
    return {number: "".join(side[episode == number]) for number in episodes}


def test_whole_episodes_where_there_are_enough():
    """Ten attempts that end in a success: two of them are val, and no frame is lost."""
    sides = split({number: "aaaac" for number in range(10)})
    assert sorted(sides.values()) == ["ttttt"] * 8 + ["vvvvv"] * 2
    assert sides != split({number: "aaaac" for number in range(10)}, seed=1)
    assert sides == split({number: "aaaac" for number in range(10)})


def test_a_label_ends_the_episode():
    """Keyboard rewards that end the episode leave one frame in each."""
    episodes = {number: "c" if number < 50 else "a" for number in range(200)}
    sides = split(episodes)
    assert [side for number, side in sides.items() if number < 50].count("v") == 10
    assert [side for number, side in sides.items() if number >= 50].count("v") == 30
    assert "." not in sides.values()


def test_two_episodes_of_each_outcome():
    sides = split({0: "aaa", 1: "ccc", 2: "aaa", 3: "ccc"})
    assert sorted((sides[0], sides[2])) == sorted((sides[1], sides[3])) == ["ttt", "vvv"]


def test_one_episode_is_cut_into_blocks_with_gaps():
    """First all fails, then all successes: 8 + 4 val frames at the border, 2 lost on either side; or, as good
    for the shares, the ends of the episode."""
    found = {split({0: "a" * 40 + "c" * 20}, gap_steps=3, seed=seed)[0] for seed in range(20)}
    assert found == {
        "t" * 30 + ".." + "v" * 12 + ".." + "t" * 14,
        "v" * 8 + ".." + "t" * 44 + ".." + "v" * 4,
    }


def test_a_block_between_attempts_costs_nothing():
    """One episode without resets, attempts apart from each other: val is one attempt of five."""
    attempt = "aaac" + "-" * 10
    for seed in range(10):
        side = split({0: attempt * 5}, seed=seed)[0]
        assert (side.count("v"), side.count("t"), side.count("vvvv")) == (4, 16, 1)


def test_one_long_episode_among_short_ones_is_cut():
    """By whole episodes val would get 2 frames of 104."""
    sides = split({0: "aaac" * 25, 1: "ac", 2: "ac"})
    assert "v" in sides[0] and "t" in sides[0]
    assert 15 <= "".join(sides.values()).count("v") <= 25


def random_frames(rng: np.random.Generator, count: int, num_episodes: int, num_steps: int):
    """episode, step, label; steps within an episode in any order, labels alone or in runs."""
    episode = 7 * np.sort(rng.integers(0, num_episodes, count))
    sizes = np.unique(episode, return_counts=True)[1]
    step = np.concatenate([rng.choice(num_steps, size, replace=False) for size in sizes])
    label = rng.random(count) < rng.choice([0.1, 0.3, 0.5, 0.8])
    if rng.random() < 0.5:
        label = np.repeat(label, 5)[:count]
    return episode, step, label


def is_near(episode: np.ndarray, step: np.ndarray, gap_steps: int) -> np.ndarray:
    """(n, n) bool: of one episode and less than the gap apart."""
    return (episode[:, None] == episode) & (abs(step[:, None] - step) < gap_steps)


def test_train_keeps_its_distance_and_nothing_else_is_lost():
    rng = np.random.default_rng(0)
    num_split, num_lost = 0, 0
    for seed in range(500):
        episode, step, label = random_frames(rng, int(rng.integers(2, 80)), int(rng.integers(1, 6)), 120)
        gap, val_split = int(rng.integers(2, 9)), float(rng.choice([0.1, 0.2, 0.5]))
        try:
            sides = split_by_block(episode, step, label, val_split, gap, seed)
        except UserError:  # see the next test
            continue
        num_split += 1
        for indices in sides.values():
            assert 0 < label[indices].sum() < len(indices)
        near_val = is_near(episode, step, gap)[:, sides["val"]].any(1)
        assert not near_val[sides["train"]].any()
        neither = np.setdiff1d(np.arange(len(label)), np.concatenate([sides["train"], sides["val"]]))
        assert len(sides["train"]) + len(sides["val"]) + len(neither) == len(label)
        assert near_val[neither].all()
        num_lost += len(neither)
    assert num_split > 300 and num_lost > 30


def test_refused_is_only_what_no_choice_of_val_frames_could_split():
    rng = np.random.default_rng(0)
    num_split, num_refused = 0, 0
    for seed in range(1000):
        episode, step, label = random_frames(rng, int(rng.integers(2, 9)), int(rng.integers(1, 4)), 14)
        gap = int(rng.integers(2, 5))
        try:
            split_by_block(episode, step, label, 0.2, gap, seed)
            num_split += 1
            continue
        except UserError:
            num_refused += len(set(label)) == 2
        near = is_near(episode, step, gap)
        for choice in itertools.product([False, True], repeat=len(label)):
            val = np.array(choice)
            train = ~near[:, val].any(1)
            assert len(set(label[val])) < 2 or len(set(label[train])) < 2
    assert num_split > 100 and num_refused > 100


@pytest.mark.parametrize("val_split", [0.1, 0.2, 0.4])
def test_the_shares_are_met_to_a_frame_where_episodes_must_be_cut(val_split):
    rng = np.random.default_rng(0)
    for seed in range(20):
        label = rng.random(200) < 0.3
        step = np.arange(200) * 10  # further apart than the gap
        val = split_by_block(np.zeros(200, int), step, label, val_split, 5, seed)["val"]
        assert abs(label[val].sum() - val_split * label.sum()) <= 1
        assert abs((~label[val]).sum() - val_split * (~label).sum()) <= 1


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        (
            {0: "aaa", 1: "a"},
            "none of 4 labelled frames is a success; a classifier needs both, so label more",
        ),
        ({0: "cc"}, "none of 2 labelled frames is a fail"),
        ({0: "a"}, "none of 1 labelled frames is a success"),
        (
            {0: "ac"},
            "1 success and 1 fail frames are too few to split: train and val need both, 5 steps apart",
        ),
        ({0: "aaaaac", 1: "aaaa"}, "1 success and 9 fail frames are too few"),
        ({0: "aaccaa"}, "2 success and 4 fail frames are too few"),
    ],
)
def test_too_little_to_split(episodes, message):
    with pytest.raises(UserError, match=message):
        split(episodes)


# -----------------------------------------------------------------------------------------------------------
# The data set


@pytest.fixture
def session(tmp_path) -> Path:
    """Five attempts in one episode, one every 20 steps, each of 8 fails and then 2 successes."""
    return fill(tmp_path / "session", ("aaaaaaaacc" + "-" * 10) * 5)


def values(payload: RewardDatasetPayload) -> list[int]:
    return [int(image[0, 0, 0]) for image in payload.images]


def load(folder: Path) -> tuple[RewardDatasetPayload, RewardDatasetPayload]:
    return RewardDatasetPayload.load(folder / "train.pt"), RewardDatasetPayload.load(folder / "val.pt")


def test_files_and_metadata(session, tmp_path):
    metadata = write_payloads([session], tmp_path / "data")
    train, val = load(tmp_path / "data")
    for payload in (train, val):
        assert payload.labels == [int(value % 20 >= 8) for value in values(payload)]
        assert values(payload) == sorted(values(payload))
    assert len({value // 20 for value in values(val)}) == 1  # one attempt
    assert {value // 20 for value in values(train)} == set(range(5)) - {values(val)[0] // 20}
    assert list(train.metadata.items())[:9] == [
        ("split", "train"),
        ("num_success_frames", 10),
        ("num_fail_frames", 40),
        ("total_frames", 50),
        ("val_split", 0.2),
        ("fail_success_ratio", 2.0),
        ("random_seed", 42),
        ("num_train_samples", 24),
        ("num_val_samples", 10),
    ]
    assert val.metadata["split"] == "val"
    for payload in (train, val):
        assert metadata.items() <= payload.metadata.items()
        assert payload.metadata["frame_episodes"] == [0] * len(payload.labels)
        assert payload.metadata["frame_steps"] == values(payload)
        assert len(payload.metadata["data_hash"]) == 64
    assert metadata["frames_before_cut"] == {
        "train": {"success": 8, "fail": 32},
        "val": {"success": 2, "fail": 8},
    }
    assert metadata["frames"] == {"train": {"success": 8, "fail": 16}, "val": {"success": 2, "fail": 8}}
    assert (metadata["gap_steps"], metadata["num_gap_frames"]) == (5, 0)
    assert metadata["render"] == {"views": {"main_images": {"serial": "17", "crop": [0, 0.5]}}}
    assert (metadata["tasks"], metadata["task_descriptions"]) == (["bin_relocation"], [])
    assert (metadata["view"], metadata["image_size"]) == ("main_images", [SIZE, SIZE])
    assert metadata["stores"] == {str(session): 50}
    raw = torch.load(tmp_path / "data/train.pt", weights_only=True)
    assert len(raw["images"]) == 24
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.pt", "val.pt"]


def test_same_seed_same_files(session, tmp_path):
    def hashes(seed: int) -> list[str]:
        write_payloads([session], tmp_path, random_seed=seed)
        return [payload.metadata["data_hash"] for payload in load(tmp_path)]

    first = hashes(1)
    assert hashes(1) == first
    assert hashes(2) != first


def test_ratio_zero_keeps_all_fails_and_val_is_never_cut(session, tmp_path):
    write_payloads([session], tmp_path, fail_success_ratio=0)
    train, val = load(tmp_path)
    assert (train.labels.count(0), train.labels.count(1)) == (32, 8)
    write_payloads([session], tmp_path, fail_success_ratio=0.5)
    train, val = load(tmp_path)
    assert (train.labels.count(0), train.labels.count(1)) == (4, 8)
    assert (val.labels.count(0), val.labels.count(1)) == (8, 2)


def test_undone_frames_are_not_in_the_data_set(tmp_path):
    fill(tmp_path / "store", "acu" * 20)
    with pytest.raises(UserError, match="none of 20 labelled frames is a success"):
        write_payloads([tmp_path / "store"], tmp_path / "data")
    fill(tmp_path / "store", "ccuu" + "cau" * 4, first_value=100)
    write_payloads([tmp_path / "store"], tmp_path / "data", gap_steps=2)
    train, val = load(tmp_path / "data")
    undone = {value for value in range(60) if value % 3 == 1} | {100, 101} | set(range(105, 116, 3))
    assert not undone & set(values(train) + values(val))
    assert train.labels.count(1) + val.labels.count(1) == 4


def test_stores_are_merged_and_their_episodes_kept_apart(tmp_path):
    """Frames of the same episode number and steps in two stores are no neighbours."""
    other = FrameFacts("bin_relocation", FACTS.render, task_description="Move it to the bin.")
    folders = [
        fill(tmp_path / "labelled", "aac"),
        fill(tmp_path / "teleop", "caa", first_value=100, facts=other),
    ]
    with FrameStore(tmp_path / "nothing yet", FACTS) as store:
        store.add(image(1), 1, 0, 0)
        store.undo()
    metadata = write_payloads([*folders, tmp_path / "nothing yet"], tmp_path / "data")
    train, val = load(tmp_path / "data")
    assert sorted(map(sorted, (values(train), values(val)))) == [[0, 1, 2], [100, 101, 102]]
    assert list(metadata["stores"].values()) == [3, 3, 0]
    assert metadata["task_descriptions"] == ["Move it to the bin."]


def test_stores_that_do_not_fit_together(tmp_path):
    first = fill(tmp_path / "first", "ac" * 10)
    other = fill(tmp_path / "other", "ac", facts=FrameFacts("bin_relocation", {"views": {}}))
    with pytest.raises(UserError, match=r"cameras \('render'\) differ, .*first.*other"):
        write_payloads([first, other], tmp_path / "data")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / LOG_NAME).write_bytes((first / LOG_NAME).read_bytes())
    with pytest.raises(UserError, match=r"copy.* holds frames that are also in .*first"):
        write_payloads([first, tmp_path / "copy"], tmp_path / "data")
    with pytest.raises(UserError, match="missing holds no labelled frames"):
        write_payloads([first, tmp_path / "missing"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_nothing_is_written_where_a_file_would_lack_a_label(session, tmp_path):
    with pytest.raises(UserError, match=r"fail_success_ratio 0\.01 would leave no fail frame beside 8 succ"):
        write_payloads([session], tmp_path / "data", fail_success_ratio=0.01)
    with pytest.raises(UserError, match=r"got 1\.5, 2\.0, 5"):
        write_payloads([session], tmp_path / "data", val_split=1.5)
    with pytest.raises(UserError, match="gap_steps 2 or more"):
        write_payloads([session], tmp_path / "data", gap_steps=1)
    assert not (tmp_path / "data").exists()


def test_both_files_or_none(session, tmp_path, monkeypatch):
    write_payloads([session], tmp_path / "data", random_seed=1)
    older = [payload.metadata["data_hash"] for payload in load(tmp_path / "data")]

    def fail(self, labels, metadata):
        if metadata["split"] == "val":
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(self, labels, metadata)

    finish = PayloadFile.finish
    monkeypatch.setattr(PayloadFile, "finish", fail)
    with pytest.raises(UserError, match=r"cannot write train.pt and val.pt to .*data: .*No space left"):
        write_payloads([session], tmp_path / "data", random_seed=2)
    assert [payload.metadata["data_hash"] for payload in load(tmp_path / "data")] == older
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.pt", "val.pt"]


def test_the_data_set_trains(tmp_path):
    """Labelled frames -> train.pt and val.pt -> train_resnet.py as a user runs it, for two steps."""
    rng = np.random.default_rng(0)
    with FrameStore(tmp_path / "store", FACTS) as store:
        for step in range(100):
            frame = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            label = int(step % 20 >= 15)
            frame[20:40, 20:40, 1 - label] = 200
            store.add(frame, label, 0, step)
    write_payloads([tmp_path / "store"], tmp_path)
    train, val = load_frames(str(tmp_path / "train.pt")), load_frames(str(tmp_path / "val.pt"))
    check_same_cameras(train, val)
    assert (train.frame_size, train.render) == ([64, 64], FACTS.render)
    command = [sys.executable, "train_resnet.py", "configs/demo_resnet.yaml", "actor.model.device=cpu"]
    command += [f"data.{name}_data_paths={tmp_path / name}.pt" for name in ("train", "val")]
    command += [f"runner.logger.log_path={tmp_path / 'run'}", "runner.max_steps=2", "runner.num_threads=1"]
    command += ["actor.micro_batch_size=16", "actor.global_batch_size=16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "run/checkpoint/reward.json").read_text())
    assert (meta["frame_size"], meta["render"]) == ([64, 64], FACTS.render)
    assert meta["class_counts"]["val"] == val.class_counts


# -----------------------------------------------------------------------------------------------------------
# The progress line


@pytest.mark.parametrize(
    ("counts", "width", "line"),
    [
        ((12, 50, 28, 150), 54, "success: 12/50 [##--------]  fail: 28/150 [#---------]"),
        ((12, 50, 28, 150), 55, "success: 12/50 [##--------]  fail: 28/150 [#---------] "),
        ((12, 50, 28, 150), 42, "success: 12/50 [----]  fail: 28/150 [----]"),
        ((12, 50, 28, 150), 41, "success: 12/50  fail: 28/150             "),
        ((12, 50, 28, 150), 28, "success: 12/50  fail: 28/150"),
        ((12, 50, 28, 150), 27, "c 12/50  a 28/150          "),
        ((12, 50, 28, 150), 16, "12/50 28/150    "),
        ((12, 50, 28, 150), 11, "12 28      "),
        ((12, 50, 28, 150), 3, "12 "),
        ((0, 50, 0, 150), 48, "success: 0/50 [--------]  fail: 0/150 [--------]"),
        ((49, 50, 150, 150), 53, "success: 49/50 [########-]  fail: 150/150 [#########]"),
    ],
)
def test_progress_line_exactly(counts, width, line):
    assert progress_line(*counts, width) == line


@pytest.mark.parametrize(
    "counts", [(0, 50, 0, 150), (50, 50, 151, 150), (1234, 5000, 10_000, 15_000), (3, 0, 0, 1)]
)
def test_progress_line_fits_every_terminal(counts):
    for width in range(20, 201):
        line = progress_line(*counts, width)
        assert len(line) == width
        assert line.isascii() and line.isprintable()
        num_success, _, num_fail, _ = map(str, counts)
        assert line.index(num_success) < line.rindex(num_fail)  # no number is cut
        assert line.count("[") == line.count("]") == (2 if width >= 60 else line.count("["))


# -----------------------------------------------------------------------------------------------------------
# The other way to labels: a fixed pose


def write_pose_episode(folder: Path, index: int, where: str, hold_steps: int = 3) -> None:
    """An episode as the Franka env records it: `z` the arm is inside the zone at this time. Frame t of it is
    all `20 * index + t`; it succeeds once it has been inside for `hold_steps` in a row."""
    inside = [char == "z" for char in where]
    hold = [len(where[: t + 1]) - len(where[: t + 1].rstrip("z")) for t in range(len(where))]
    write_episode(
        folder,
        {
            "rank": 0,
            "env_idx": 0,
            "episode_id": index,
            "step": 0,
            "success": max(hold) >= hold_steps,
            "observations": [
                {"main_images": image(20 * index + t), "states": np.zeros(2, np.float32)}
                for t in range(len(where))
            ],
            "actions": [np.zeros(7, np.float32)] * (len(where) - 1),
            "rewards": [float(now) for now in inside],
            "terminated": [steps >= hold_steps for steps in hold],
            "truncated": [False] * len(where),
            "infos": [
                {"in_zone": now, "success": steps >= hold_steps, "hold_steps": steps}
                for now, steps in zip(inside, hold, strict=True)
            ],
        },
    )


def test_fixed_pose_frames_are_labelled_by_where_the_arm_is_now(tmp_path):
    """Also where it leaves the zone again, comes back, or never holds long enough for the env's success."""
    episodes = [
        "......zzz",
        "..zz...zzz",  # leaves and comes back
        "..zz......",  # leaves for good: the env calls it a failure, two of its frames are in the zone
        "..........",
        "zzz.zz.zzz",  # begins inside
        "...............",
    ]
    for index, where in enumerate(episodes):
        write_pose_episode(tmp_path / "raw", index, where)
    command = ["x", "--raw-data-path", str(tmp_path / "raw"), "--output-dir", str(tmp_path / "data")]
    command += ["--fail-success-ratio", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        preprocess_resnet.main()
    train, val = load(tmp_path / "data")
    for payload in (train, val):
        places = [divmod(value, 20) for value in values(payload)]
        assert payload.labels == [int(episodes[index][t] == "z") for index, t in places]
    assert train.metadata["label"] == "in_zone"
    before = train.metadata["frames_before_cut"]
    assert sum(counts["success"] for counts in before.values()) == "".join(episodes).count("z")
    assert train.labels.count(0) == min(3 * train.labels.count(1), before["train"]["fail"])
    # an episode that only touched the zone counts as one with successes in the split
    assert len(train.metadata["episodes"]["val"]) == 2
