"""Loading labelled windows, ours and RLinf's; drawing batches of them; what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_windows import TASK, write_windows

from common.runtime import UserError
from common.trend import NEGATIVE, POSITIVE, UNCLEAR
from common.windows import WindowIndices, WindowSet, check_windows, frozen, shifted, some_reversed


@pytest.fixture
def data(tmp_path) -> Path:
    return write_windows(tmp_path / "data")


def train_set(folder: Path, **options) -> WindowSet:
    return WindowSet(str(folder / "train/segments.jsonl"), **options)


def change_rows(folder: Path, change, split: str = "train") -> None:
    path = folder / split / "segments.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, **change(row)}) + "\n" for row in rows))


def test_what_a_set_says_of_itself(data):
    windows = train_set(data)
    assert (len(windows), windows.window_size) == (24, 5)
    assert windows.class_counts == {"positive": 8, "negative": 8, "unclear": 8}
    assert windows.labels[:4].tolist() == [0, 1, 2, 0]
    assert np.flatnonzero(windows.reversed).tolist() == [4, 16]
    assert windows.frame_size == {"main_images": [32, 32], "extra_view_images": [32, 32]}
    assert (windows.template, set(windows.tasks)) == ("{task}?", {TASK})
    assert (windows.info["delta_threshold"], windows.info["render"]) == (0.05, {"shader": "toy"})
    assert [len(digest) for digest in windows.sha256.values()] == [64]


def test_windows_are_the_pickled_frames(data):
    windows = train_set(data)
    batch = windows.windows(np.array([3, 1]))
    assert set(batch) == {"main_images", "extra_view_images"}
    for view, key in (("main_images", "main_frames"), ("extra_view_images", "extra_view_frames")):
        assert (batch[view].shape, batch[view].dtype) == ((2, 5, 32, 32, 3), torch.uint8)
        for row, name in enumerate(["positive_000003", "negative_000001"]):
            sample = pickle.loads((data / f"train/pkl/{name}.pkl").read_bytes())
            assert np.array_equal(batch[view][row].numpy(), np.stack(sample[key]))


def test_frames_stay_in_memory_once_and_only_as_many_as_allowed(data):
    cached, uncached = train_set(data), train_set(data, cache_bytes=0)
    everything = np.arange(24)
    first = cached.windows(everything)["main_images"]
    kept = len({frame.data_ptr() for frame in cached._frames.values()})
    assert kept < 24 * 10  # an unclear window repeats its frame, and windows share some
    assert 8e9 - cached._cache_left == kept * 32 * 32 * 3
    shutil.rmtree(data / "train/pkl")
    assert torch.equal(cached.windows(everything)["main_images"], first)
    with pytest.raises(UserError, match="no such file"):
        uncached.windows(everything)


def test_a_moved_dataset_and_a_root_of_its_own(data, tmp_path):
    before = train_set(data).windows(np.arange(24))["main_images"]
    shutil.move(data, tmp_path / "elsewhere")
    assert torch.equal(train_set(tmp_path / "elsewhere").windows(np.arange(24))["main_images"], before)
    shutil.move(tmp_path / "elsewhere/train/pkl", tmp_path / "frames/train/pkl")
    with pytest.raises(UserError, match=r"positive_000000.pkl, which does not exist; set data.video_root"):
        train_set(tmp_path / "elsewhere")
    moved = train_set(tmp_path / "elsewhere", video_root=str(tmp_path / "frames"))
    assert torch.equal(moved.windows(np.arange(24))["main_images"], before)


def test_rows_of_rlinf(data):
    """Absolute paths of another machine, tensors instead of arrays, no dataset_info.json, its own prompt."""
    (data / "dataset_info.json").unlink()
    for path in (data / "train/pkl").iterdir():
        sample = pickle.loads(path.read_bytes())
        sample["main_frames"] = [torch.from_numpy(frame) for frame in sample["main_frames"]]
        path.write_bytes(pickle.dumps(sample))
    change_rows(
        data,
        lambda row: {"pkl_path": f"/their/disk/{row['pkl_path']}", "prompt": f"Task '{TASK}', 5 frames."},
    )
    windows = train_set(data)
    assert (windows.info, windows.template) == ({}, "Task '{task}', 5 frames.")
    assert windows.windows(np.arange(3))["main_images"].shape == (3, 5, 32, 32, 3)


def test_several_files_are_one_set(data, tmp_path):
    other = write_windows(tmp_path / "other", num_train=6)
    paths = [str(folder / "train/segments.jsonl") for folder in (data, other)]
    together = WindowSet(paths)
    assert len(together) == 30
    alone = train_set(other).windows(np.array([5]))["main_images"]
    assert torch.equal(together.windows(np.array([29]))["main_images"], alone)


# --- What is refused


def spoil(folder: Path, what: str) -> str:
    """Returns what the message must say."""
    segments, pkl = folder / "train/segments.jsonl", folder / "train/pkl/unclear_000002.pkl"
    if what == "no manifest":
        segments.unlink()
        return "train/segments.jsonl: no such file; make it with preprocess_qwentrend.py"
    if what == "empty":
        segments.write_text("\n")
        return "holds no windows"
    if what == "not json":
        segments.write_text("{\n")
        return "segments.jsonl:1 is no row of a window"
    if what == "no answer":
        change_rows(folder, lambda row: {"answer": "maybe"})
        return "segments.jsonl:1: answer must be one of positive, negative, unclear, got 'maybe'"
    if what == "two prompts":
        change_rows(folder, lambda row: {"prompt": row["prompt"] + row["answer"][0]})
        return "asks in several ways"
    if what == "one view":
        pkl.write_bytes(pickle.dumps({"main_frames": []}))
        return "unclear_000002.pkl lacks extra_view_frames, so it is no window of two views"
    if what == "broken":
        pkl.write_bytes(b"junk")
        return "unclear_000002.pkl is not a readable pickle"
    sample = pickle.loads(pkl.read_bytes())
    if what == "short":
        sample["main_frames"].pop()
        message = "unclear_000002.pkl holds 4 frames of main_images, others 5"
    else:
        sample["main_frames"][1] = sample["main_frames"][1].astype(np.float32)
        message = r"main_images must be uint8 \(32, 32, 3\) like the others, got torch.float32"
    pkl.write_bytes(pickle.dumps(sample))
    return message


@pytest.mark.parametrize(
    "what",
    [
        "no manifest",
        "empty",
        "not json",
        "no answer",
        "two prompts",
        "one view",
        "broken",
        "short",
        "float",
    ],
)
def test_unfit_data(data, what):
    message = spoil(data, what)
    with pytest.raises(UserError, match=message):
        train_set(data).windows(np.arange(24))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("render", {"shader": "other"}),
        ("score_source", "gae"),
        ("delta_threshold", 0.1),
        ("tail_unclear_ratio", 0.15),
    ],
)
def test_data_of_other_cameras_or_label_rules_do_not_mix(data, tmp_path, key, value):
    other = write_windows(tmp_path / "other", num_train=6)
    info = json.loads((other / "dataset_info.json").read_text())
    (other / "dataset_info.json").write_text(json.dumps({**info, key: value}))
    with pytest.raises(UserError, match=f"differ in their {key}; use data of one kind"):
        WindowSet([str(folder / "train/segments.jsonl") for folder in (data, other)])
    with pytest.raises(UserError, match=f"differ in their {key}; use data of one kind"):
        check_windows(train_set(data), train_set(other), 5)


def test_a_mixture_of_window_sizes_is_refused(data):
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps({**info, "window_size": 8}))
    with pytest.raises(UserError, match=r"holds 5 frames, but dataset_info\.json says 8"):
        train_set(data)


def test_what_cannot_be_trained_on(tmp_path):
    sets = {}
    for name, options in {
        "good": {},
        "long": {"num_frames": 6},
        "one": {"labels": ("unclear",)},
        "large": {"size": 64},
        "prompt": {"template": "{task}."},
    }.items():
        sets[name] = train_set(write_windows(tmp_path / name, num_train=6, **options))
    check_windows(sets["good"], sets["good"], 5)
    for train, val, message in (
        ("good", "long", r"video_nframes is 5, but the windows of \S+long\S+ have 6 frames"),
        ("one", "good", "holds unclear windows only"),
        ("good", "one", "holds unclear windows only"),
        ("good", "large", r"training frames are .*32, 32.* but validation frames .*64, 64"),
        ("good", "prompt", "ask with different prompts"),
    ):
        with pytest.raises(UserError, match=message):
            check_windows(sets[train], sets[val], 5)


# --- Batches and changes


def test_balanced_batches_use_every_window_of_a_label_before_any_again():
    labels = np.array([POSITIVE] * 3 + [NEGATIVE] * 12)
    batches = WindowIndices(labels, balanced=True, seed=0)
    drawn = [batches.draw(3) for _ in range(8)]
    counts = [int((labels[indices] == NEGATIVE).sum()) for indices in drawn]
    assert counts == [1, 2] * 4  # odd batches are balanced over time
    everything = np.concatenate(drawn)
    assert sorted(everything[labels[everything] == NEGATIVE]) == list(range(3, 15))
    assert sorted(everything[labels[everything] == POSITIVE][:3]) == [0, 1, 2]


def test_natural_batches_use_every_window_before_any_again():
    batches = WindowIndices(np.array([0] * 3 + [1] * 9), balanced=False, seed=0)
    assert sorted(np.concatenate([batches.draw(5), batches.draw(7)])) == list(range(12))


def test_a_frozen_window_is_its_last_frame():
    frames = {"main_images": torch.arange(2 * 3 * 12, dtype=torch.uint8).view(2, 3, 2, 2, 3)}
    still = frozen(frames)["main_images"]
    assert still.shape == (2, 3, 2, 2, 3)
    assert all(torch.equal(still[:, index], frames["main_images"][:, 2]) for index in range(3))


def test_a_shift_moves_all_frames_of_a_window_alike():
    """On pixels that say where they are and when, only the place changes, and differently per window."""
    torch.manual_seed(0)
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    times = [torch.stack([row, column, torch.full_like(row, time)], -1) for time in range(3)]
    window = torch.stack(times).to(torch.uint8)  # (K, H, W, 3)
    moved = shifted({"main_images": window.expand(32, 3, 8, 8, 3)}, pixels=2)["main_images"]
    assert moved.shape == (32, 3, 8, 8, 3)
    shifts = set()
    for images in moved:
        shift = (images[0, 4, 4, :2].int() - 4).tolist()
        shifts.add(tuple(shift))
        for time, image in enumerate(images):
            assert torch.equal(image[..., 0], (row + shift[0]).clamp(0, 7).to(torch.uint8))
            assert torch.equal(image[..., 1], (column + shift[1]).clamp(0, 7).to(torch.uint8))
            assert (image[..., 2] == time).all()
    assert len(shifts) > 10
    same = {"main_images": window[None]}
    assert shifted(same, 0) is same


def test_windows_played_backwards_have_the_opposite_label():
    torch.manual_seed(0)
    frames = {"main_images": torch.arange(90, dtype=torch.uint8).view(30, 3, 1, 1, 1).expand(30, 3, 1, 1, 3)}
    labels = np.array([POSITIVE, NEGATIVE, UNCLEAR] * 10)
    turned, new = some_reversed(frames, labels, 0.5)
    backwards = (turned["main_images"][:, 0] > turned["main_images"][:, -1]).flatten(1).all(1).numpy()
    assert 5 < backwards.sum() < 25
    expected = np.array([NEGATIVE, POSITIVE, UNCLEAR] * 10)
    assert new.tolist() == np.where(backwards, expected, labels).tolist()
    kept = torch.from_numpy(~backwards)
    assert torch.equal(turned["main_images"][kept], frames["main_images"][kept])
    assert torch.equal(turned["main_images"][~kept], frames["main_images"][~kept].flip(1))
    assert labels.tolist() == [POSITIVE, NEGATIVE, UNCLEAR] * 10  # those of the set stay as they are
    same, unchanged = some_reversed(frames, labels, 0.0)
    assert same is frames and unchanged is labels
