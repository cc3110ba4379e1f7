"""preprocess_resnet.py as a user runs it, and its choice of frames."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import preprocess_resnet as script
from common.episodes import list_episodes, read_episode, write_episode
from common.files import load_pickle
from common.payload import RewardDatasetPayload
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]


def make(
    folder: Path, index: int, success_from: int | None, num_steps: int = 5, size: int = 4, **changes
) -> Path:
    """Frame t of episode `index` is all `10 * index + t`; success from step `success_from` on."""
    success = [success_from is not None and t >= success_from for t in range(1, num_steps + 1)]
    episode = {
        "rank": 0,
        "env_idx": 0,
        "episode_id": index,
        "step": 0,
        "success": any(success),
        "observations": [
            {
                "main_images": np.full((size, size, 3), 10 * index + t, np.uint8),
                "states": np.zeros(2, np.float32),
            }
            for t in range(num_steps + 1)
        ],
        "actions": [np.zeros(1, np.float32)] * num_steps,
        "rewards": [0.0] * (num_steps + 1),
        "terminated": [False] * (num_steps + 1),
        "truncated": [False] * (num_steps + 1),
        "infos": [{}] + [{"success": value, "lifted": np.array(True)} for value in success],
        "task": "PushCube-v1",
        "task_description": "Push the cube.",
        "render": {"fov": np.float32(0.5), "pose": (0.0, 1.0)},
    }
    return write_episode(folder, {**episode, **changes})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten episodes of 6 frames: 4 with success at steps 4 and 5, 6 without."""
    for index in range(10):
        make(tmp_path / "raw", index, 4 if index < 4 else None)
    return tmp_path / "raw"


def run(raw: Path, *options: str) -> tuple[RewardDatasetPayload, RewardDatasetPayload]:
    """Run in this process -> train and val."""
    output = raw.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--raw-data-path", str(raw), "--output-dir", str(output), *options])
        script.main()
    return RewardDatasetPayload.load(output / "train.pt"), RewardDatasetPayload.load(output / "val.pt")


def values(payload: RewardDatasetPayload) -> list[int]:
    """10 * episode + time of each image."""
    assert all((image == image[0, 0, 0]).all() for image in payload.images)
    return [int(image[0, 0, 0]) for image in payload.images]


def test_as_a_user_runs_it(raw):
    command = [sys.executable, str(ROOT / "preprocess_resnet.py"), "--raw-data-path", str(raw)]
    command += ["--output-dir", str(raw.parent / "out"), "--num-workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=raw.parent, check=True)
    assert done.stdout.splitlines()[1].split()[:5] == ["train", "8", "6", "12", "42"]
    assert done.stdout.splitlines()[2].split()[:5] == ["val", "2", "2", "10", "10"]
    data = torch.load(raw.parent / "out" / "train.pt", weights_only=True)
    assert (len(data["images"]), sum(data["labels"])) == (18, 6)

    again = subprocess.run(command, capture_output=True, text=True, cwd=raw.parent, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert "train.pt exists; add --overwrite" in again.stderr


def test_frames_labels_and_metadata(raw):
    train, val = run(raw)
    for payload in (train, val):  # in all our episodes a success is frame 4 or 5 of episode 0..3
        assert [int(v < 40 and v % 10 >= 4) for v in values(payload)] == payload.labels
        assert values(payload) == sorted(values(payload))
    assert {v // 10 for v in values(val)} & {v // 10 for v in values(train)} == set()
    assert (
        len(values(val)) == 12
    )  # every frame of one episode with and one without success: cut is train alone
    assert val.labels.count(1) == 2
    metadata = train.metadata
    assert {key: metadata[key] for key in list(metadata)[1:9]} == {
        "raw_data_path": str(raw),
        "num_samples_per_episode": 0,
        "keep_last_frame": True,
        "val_split": 0.2,
        "fail_success_ratio": 2.0,
        "random_seed": 42,
        "num_train_samples": 18,
        "num_val_samples": 12,
    }
    assert (metadata["split"], val.metadata["split"]) == ("train", "val")
    assert metadata["render"] == {"fov": 0.5, "pose": [0.0, 1.0]}
    assert (metadata["view"], metadata["label"], metadata["image_size"]) == ("main_images", "success", [4, 4])
    assert metadata["tasks"] == ["PushCube-v1"]
    assert metadata["frames_before_cut"] == {
        "train": {"success": 6, "fail": 42},
        "val": {"success": 2, "fail": 10},
    }
    assert metadata["frames"] == {"train": {"success": 6, "fail": 12}, "val": {"success": 2, "fail": 10}}
    files = [*metadata["episodes"]["train"], *metadata["episodes"]["val"]]
    assert sorted(files) == [path.name for path in list_episodes(raw)]
    assert metadata["data_hash"] != val.metadata["data_hash"]
    for payload in (train, val):  # each frame knows its episode and its place in it
        names = payload.metadata["episodes"][payload.metadata["split"]]
        told = zip(payload.metadata["frame_episodes"], payload.metadata["frame_steps"], strict=True)
        episode_of = {
            path.name: int(read_episode(path).images["main_images"][0][0, 0, 0])
            for path in list_episodes(raw)
        }
        assert [episode_of[names[episode]] + step for episode, step in told] == values(payload)


def test_the_seed_and_nothing_else_decides(raw):
    first = run(raw)
    again = run(raw, "--overwrite", "--num-workers", "3")
    other = run(raw, "--overwrite", "--seed", "1")
    assert [p.metadata["data_hash"] for p in first] == [p.metadata["data_hash"] for p in again]
    assert first[0].metadata["data_hash"] != other[0].metadata["data_hash"]


def test_balance_val_cuts_val_as_the_reference_does(raw):
    train, val = run(raw, "--balance-val")
    assert (len(val.labels), sum(val.labels)) == (6, 2)
    assert (len(train.labels), sum(train.labels)) == (18, 6)


def test_label_of_another_name(raw):
    train, val = run(raw, "--label", "lifted", "--fail-success-ratio", "9")
    for payload in (train, val):  # true after every step, so only reset frames are fails
        assert [int(v % 10 > 0) for v in values(payload)] == payload.labels


def test_two_views_in_one_frame(tmp_path):
    for index in range(4):
        path = make(tmp_path / "raw", index, 4 if index < 2 else None)
        data = load_pickle(path)
        for t, observation in enumerate(data["observations"]):
            observation["extra_view_images"] = np.full((1, 4, 4, 3), 100 + 10 * index + t, np.uint8)
        write_episode(tmp_path / "raw", data)
    train, val = run(tmp_path / "raw", "--view", "main_images", "extra_view_images", "--val-split", "0.5")
    assert train.views == val.views == ["main_images", "extra_view_images"]
    for payload in (train, val):
        for image in payload.images:
            assert image.shape == (2, 4, 4, 3) and (image[1] == image[0] + 100).all()
    make(tmp_path / "raw", 9, None, size=5)
    with pytest.raises(UserError, match="has no view extra_view_images"):
        run(tmp_path / "raw", "--view", "main_images", "extra_view_images", "--overwrite")


def test_extra_view(tmp_path):
    for index in range(4):
        path = make(tmp_path / "raw", index, 3 if index < 2 else None)
        episode = read_episode(path, views=None)
        observations = [
            {"main_images": main, "extra_view_images": 255 - main[None], "states": np.zeros(2, np.float32)}
            for main in episode.images["main_images"]
        ]
        make(tmp_path / "raw", index, 3 if index < 2 else None, observations=observations)
    train, _ = run(tmp_path / "raw", "--view", "extra_view_images")
    assert [int(255 - v < 20 and (255 - v) % 10 >= 3) for v in values(train)] == train.labels


# -----------------------------------------------------------------------------------------------------------
# Choice of frames


@pytest.mark.parametrize(
    ("num_samples", "keep_last", "expected"),
    [
        (0, True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (99, False, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (4, True, [0, 3, 6, 9]),
        (3, True, [0, 5, 9]),
        (1, True, [9]),
        (5, False, [0, 2, 4, 6, 8]),
        (1, False, [0]),
    ],
)
def test_sample_times(num_samples, keep_last, expected):
    assert script.sample_times(10, num_samples, keep_last).tolist() == expected


@pytest.mark.parametrize(("num_success", "num_fail"), list(itertools.product((2, 3, 20), (0, 1, 2, 80))))
def test_split_gives_both_sides_a_success_whenever_there_are_two(num_success, num_fail):
    has_success = np.arange(num_success + num_fail) < num_success
    for seed in range(20):
        is_val = script.split_episodes(has_success, 0.2, np.random.default_rng(seed))
        assert is_val[has_success].sum() == (4 if num_success == 20 else 1)
        assert is_val[~has_success].sum() == {0: 0, 1: 0, 2: 1, 80: 16}[num_fail]


def test_cut_fails_keeps_all_successes_and_the_order():
    label = np.array([0, 1, 0, 0, 0, 1, 0, 0], dtype=bool)
    frames = script.Frames(np.zeros(8, int), np.arange(8), label)
    drawn = set()
    for seed in range(50):
        cut = script.cut_fails(frames, 1.5, np.random.default_rng(seed))
        assert cut.count() == {"success": 2, "fail": 3}
        assert cut.time.tolist() == sorted(cut.time.tolist())
        assert {1, 5} <= set(cut.time.tolist())
        drawn |= set(cut.time.tolist())
    assert drawn == set(range(8))


# -----------------------------------------------------------------------------------------------------------
# Bad input: one line that names the thing, nothing half-written


def refuse(raw: Path, message: str, *options: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(raw, *options)
    assert "\n" not in str(caught.value)
    output = raw.parent / "out"
    assert not output.exists() or list(output.iterdir()) == []


def test_bad_episode_is_named_or_skipped(raw, capsys):
    cut = list_episodes(raw)[3]
    cut.write_bytes(cut.read_bytes()[:100])
    (raw / "empty.pkl").touch()
    refuse(raw, "empty.pkl .*--skip-bad")
    train, _ = run(raw, "--skip-bad")
    assert [message.split()[0] for message in train.metadata["skipped"]] == [str(raw / "empty.pkl"), str(cut)]
    printed = capsys.readouterr().out
    assert f"skipped: {cut}" in printed
    assert "skipped 2 of 11 files" in printed
    assert sum(map(len, train.metadata["episodes"].values())) == 9


def test_only_bad_episodes(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "empty.pkl").touch()
    refuse(tmp_path / "raw", r"none of the 1 episodes is of use; the first: .*empty\.pkl", "--skip-bad")


def test_no_episodes(tmp_path):
    refuse(tmp_path / "raw", "does not exist")
    (tmp_path / "raw").mkdir()
    refuse(tmp_path / "raw", "no episodes")


def test_a_missing_view_or_label_names_what_there_is(raw):
    refuse(
        raw, r"rank_0_.*pkl has no view extra_view_images, only main_images", "--view", "extra_view_images"
    )
    refuse(
        raw, r"rank_0_.*pkl has no 'grasped' in its step infos, only lifted, success", "--label", "grasped"
    )


def test_other_cameras_or_sizes_name_two_files(raw):
    odd = make(raw, 20, None, render={"fov": 0.6, "pose": (0.0, 1.0)})
    refuse(raw, rf"cameras \('render'\) differ, .*episode_0_step_0_success.pkl has .*{odd.name} has .*0\.6")
    make(raw, 20, None, size=8)
    refuse(
        raw,
        rf"image sizes differ, .*episode_0_step_0_success.pkl has \(4, 4, 3\), .*{odd.name} has \(8, 8, 3\)",
    )


@pytest.mark.parametrize("success_from", [None, 0])
def test_one_class_only(tmp_path, success_from):
    for index in range(4):
        make(tmp_path / "raw", index, success_from)
    options = () if success_from is None else ("--num-samples-per-episode", "1")  # last frames: all successes
    missing = "success" if success_from is None else "fail"
    refuse(tmp_path / "raw", rf"none of the \d+ frames in .* is a {missing} .*collect more", *options)


def test_one_episode_with_success_cannot_serve_train_and_val(tmp_path):
    for index in range(4):
        make(tmp_path / "raw", index, 3 if index == 0 else None)
    refuse(tmp_path / "raw", "only one episode .* holds a success")


def test_a_ratio_that_leaves_no_fail(raw):
    refuse(raw, "train would hold no fail frame", "--fail-success-ratio", "0.01")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--val-split", "1"), r"--val-split 1\.0: must be between 0 and 1"),
        (("--fail-success-ratio", "-1"), "--fail-success-ratio -1.0: must be above 0"),
        (("--num-workers", "0"), "--num-workers 0: must be 1 or more"),
        (("--train-output-path", "a.pt", "--val-output-path", "a.pt"), "give them two names"),
    ],
)
def test_bad_options(raw, options, message):
    refuse(raw, message, *options)


def test_a_file_that_breaks_between_the_readings_leaves_older_output_alone(raw, monkeypatch):
    before = [payload.metadata["data_hash"] for payload in run(raw)]
    read_frames = script.read_frames

    def vanish(path, view, times):
        if path == list_episodes(raw)[5]:
            raise UserError(f"{path}: no such file")
        return read_frames(path, view, times)

    monkeypatch.setattr(script, "read_frames", vanish)
    with pytest.raises(UserError, match="no such file"):
        run(raw, "--overwrite", "--fail-success-ratio", "99")
    output = raw.parent / "out"
    assert sorted(path.name for path in output.iterdir()) == ["train.pt", "val.pt"]
    after = [
        RewardDatasetPayload.load(output / name).metadata["data_hash"] for name in ("train.pt", "val.pt")
    ]
    assert after == before


def test_an_output_folder_that_cannot_be_made(raw):
    (raw.parent / "file").touch()
    refuse(raw, "cannot write", "--output-dir", str(raw.parent / "file" / "out"))
