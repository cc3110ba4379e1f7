"""preprocess_qwentrend.py as a user runs it: what it writes, keeps apart and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import preprocess_qwentrend as script
from common.episodes import list_episodes, write_episode
from common.files import load_json, load_pickle
from common.runtime import UserError
from common.trend import LABELS
from common.windows import WindowSet

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 8


def make(folder: Path, index: int, success: bool, moves: list[float] | None = None, **changes) -> Path:
    """Frame t is all `10 * index + t` (second view: 100 more); the gripper comes `moves[t]` nearer at t+1."""
    moves = moves or [0.1, 0.1, 0.1, 0.1, 0.0, 0.0, -0.1, -0.1]
    distance = 1.0 - np.append(0.0, np.cumsum(moves))
    count = len(moves)
    episode = {
        "rank": 0,
        "env_idx": index % 2,
        "episode_id": index,
        "step": 0,
        "success": success,
        "observations": [
            {
                "main_images": np.full((4, 6, 3), 10 * index + t, np.uint8),
                "extra_view_images": np.full((1, 4, 4, 3), 100 + 10 * index + t, np.uint8),
                "states": np.zeros(2, np.float32),
            }
            for t in range(count + 1)
        ],
        "actions": [np.zeros(1, np.float32)] * count,
        "rewards": [0.0] + [2.0] * count,
        "terminated": [False] * (count + 1),
        "truncated": [False] * count + [True],
        "infos": [{"success_distance": np.float32(value)} for value in distance],
        "task": "PushCube-v1",
        "task_description": "Push the cube.",
        "render": {"fov": np.float32(0.5), "pose": (0.0, 1.0)},
        "control": {"freq": 10},
    }
    return write_episode(folder, {**episode, **changes})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten episodes of 9 frames, 4 of them successes; windows of 5: + + + ? -."""
    for index in range(10):
        make(tmp_path / "raw", index, index < 4)
    return tmp_path / "raw"


def run(raw: Path, *options: str, output: str = "out") -> Path:
    folder = raw.parent / output
    argv = ["x", "--raw-data-path", str(raw), "--output-dir", str(folder), "--delta-threshold", "0.15"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--tail-unclear-ratio", "0", "--val-split", "0.2", *options])
        script.main()
    return folder


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / split / "segments.jsonl").read_text().splitlines()]


def count(folder: Path, split: str) -> list[int]:
    answers = [row["answer"] for row in rows(folder, split)]
    return [answers.count(label) for label in LABELS]


# -- what is written ------------------------------------------------------------------------------------


def test_as_a_user_runs_it(raw):
    command = [sys.executable, str(ROOT / "preprocess_qwentrend.py"), "--raw-data-path", str(raw)]
    command += ["--output-dir", str(raw.parent / "out"), "--delta-threshold", "0.15"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=raw.parent, check=True)
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[1][:3] == ["train", "8", "natural"] and table[2][:2] == ["train", "reversed"]
    assert table[3][:3] == ["eval", "2", "natural"]
    assert "windows laid end to end, each at the threshold, make 0.3" in done.stdout
    assert "careful: a policy that crawls" in done.stdout
    assert sorted(path.name for path in (raw.parent / "out").iterdir()) == [
        "dataset_info.json",
        "eval",
        "train",
    ]

    again = subprocess.run(command, capture_output=True, text=True, cwd=raw.parent, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert "out is not empty; add --overwrite" in again.stderr


def test_rows_and_frames(raw):
    folder = run(raw, "--no-balance-labels")
    written = rows(folder, "train")
    # of each episode's windows (+.4, +.3, +.2, 0, -.2) three are positive, and negative backwards
    assert count(folder, "train") == [24, 32, 8]
    first, backwards = written[0], written[1]
    assert first["task"] == "Push the cube."
    assert "Push the cube." in first["prompt"] and first["question"] == first["prompt"]
    assert first["messages"][1]["content"][0]["text"] == first["answer"] == "positive"
    assert (first["pkl_path"], backwards["pkl_path"]) == (
        "train/pkl/positive_000000.pkl",
        "train/pkl/negative_000001.pkl",
    )
    assert backwards["segment_metadata"]["augmentation"] == "reverse_positive"
    assert [
        row["segment_metadata"][key] for row in (first, backwards) for key in ("start_step", "end_step")
    ] == [
        0,
        4,
        0,
        4,
    ]
    said = first["supervision"]
    assert (said["score_source"], said["delta_threshold"]) == ("success_distance", 0.15)
    np.testing.assert_allclose(
        [said["start_gae"], said["end_gae"], said["score"]], [-1, -0.6, 0.4], atol=1e-6
    )
    np.testing.assert_allclose(backwards["supervision"]["score"], -0.4, atol=1e-6)

    for row in (first, backwards):
        sample = load_pickle(folder / row["pkl_path"])
        episode = row["segment_metadata"]["episode_id"]
        times = [0, 1, 2, 3, 4][:: -1 if row is backwards else 1]
        assert [int(frame[0, 0, 0]) for frame in sample["main_frames"]] == [10 * episode + t for t in times]
        assert [int(frame[0, 0, 0]) for frame in sample["extra_view_frames"]] == [
            100 + 10 * episode + t for t in times
        ]
        assert sample["main_frames"][0].shape == (4, 6, 3) and sample["extra_view_frames"][0].shape == (
            4,
            4,
            3,
        )
        assert sample["label"] == row["answer"] and (raw / sample["source_episode_path"]).is_file()
        assert (sample["start_idx"], sample["end_idx"]) == (0, 4)
    assert len(list((folder / "train" / "pkl").iterdir())) == len(written)


def test_dataset_info(raw):
    info = load_json(run(raw) / "dataset_info.json")
    assert info["windows_before_cut"]["train"] == {
        "natural": {"positive": 24, "negative": 8, "unclear": 8},
        "reversed": {"positive": 0, "negative": 24, "unclear": 0},
    }
    kept = info["counts"]["train"]
    assert [sum(source[label] for source in kept.values()) for label in LABELS] == [8, 8, 8]
    assert 0 < kept["reversed"]["negative"] < 8  # drawn from both
    assert info["frame_size"] == {"main_images": [4, 6], "extra_view_images": [4, 4]}
    assert info["render"] == {"fov": 0.5, "pose": [0.0, 1.0]} and info["control"] == {"freq": 10}
    assert (info["window_size"], info["score_source"], info["tasks"]) == (
        5,
        "success_distance",
        ["PushCube-v1"],
    )
    assert info["score_range"]["median"] == pytest.approx(0.4)
    files = [*info["episodes"]["train"], *info["episodes"]["eval"]]
    assert sorted(files) == [path.name for path in list_episodes(raw)]
    assert {path.endswith("success.pkl") for path in info["episodes"]["eval"]} == {True, False}


def test_what_train_vlm_reads_also_after_a_move(raw, tmp_path):
    folder = run(raw, "--prompt-template", "{task} {num_frames}?")
    moved = folder.rename(tmp_path / "elsewhere")
    windows = WindowSet(str(moved / "train" / "segments.jsonl"))
    assert windows.template == "{task} {num_frames}?" and windows.window_size == 5
    assert windows.class_counts == {"positive": 8, "negative": 8, "unclear": 8}
    assert windows.windows(np.array([0]))["main_images"].shape == (1, 5, 4, 6, 3)


def test_no_episode_in_both_splits(raw):
    folder = run(raw)
    of = {split: {row["source_episode_path"] for row in rows(folder, split)} for split in ("train", "eval")}
    assert of["train"] and of["eval"] and not of["train"] & of["eval"]


# -- choices --------------------------------------------------------------------------------------------


def test_natural_eval_is_left_as_it_is(raw):
    folder = run(raw, "--natural-eval", "--max-samples-per-label", "4")
    assert count(folder, "train") == [4, 4, 4]
    assert count(folder, "eval") == [6, 2, 2]


def test_caps_of_eval_follow_its_share_of_episodes(raw):
    assert count(run(raw, "--max-samples-per-label", "4"), "eval") == [1, 1, 1]
    folder = run(raw, "--max-samples-per-label", "4", "--eval-max-samples-per-label", "2", output="b")
    assert count(folder, "train") == [4, 4, 4] and count(folder, "eval") == [2, 2, 2]


def test_without_reversed_windows(raw):
    folder = run(raw, "--no-reverse-positive-as-negative", "--no-balance-labels")
    assert count(folder, "train") == [24, 8, 8]


def test_the_reset_entry_labels_no_window(raw, tmp_path):
    """Rewards are 2 at all steps: a made-up 0 at the reset would make the first window positive."""
    make(tmp_path / "raw", 10, True, rewards=[0.0] + [2.0] * 7 + [0.0])
    with pytest.raises(UserError, match="are unclear only"):
        run(raw, "--score", "rewards", "--val-split", "0.9")


def test_windows_evenly_spaced(raw):
    folder = run(raw, "--num-samples-per-episode", "2", "--no-balance-labels")
    starts = {row["segment_metadata"]["start_step"] for row in rows(folder, "train")}
    assert starts == {0, 4}


def test_the_seed_and_nothing_else_decides(raw):
    def content(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "dataset_info.json"
        }

    first, other_threads = (
        content(run(raw, "--num-workers", "1")),
        content(run(raw, "--num-workers", "3", output="b")),
    )
    assert first == other_threads
    assert first != content(run(raw, "--seed", "1", output="c"))


def test_overwrite_leaves_nothing_of_the_old_dataset(raw):
    many = run(raw, "--no-balance-labels")
    before = {path.name for path in (many / "train" / "pkl").iterdir()}
    few = run(raw, "--max-samples-per-label", "2", "--overwrite")
    after = {path.name for path in (few / "train" / "pkl").iterdir()}
    assert len(before) == 64 and len(after) == 6
    assert len(rows(few, "train")) == 6


def test_ctrl_c_leaves_the_old_dataset(raw, monkeypatch):
    folder = run(raw)
    before = (folder / "train" / "segments.jsonl").read_bytes()
    monkeypatch.setattr(
        script.pickle, "dump", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(raw, "--overwrite", "--seed", "3")
    assert (folder / "train" / "segments.jsonl").read_bytes() == before
    assert [path.name for path in raw.parent.iterdir() if path.name.startswith(".")] == []


def test_one_success_and_one_fail_are_enough(tmp_path):
    for index in range(2):
        make(tmp_path / "raw", index, index == 0)
    info = load_json(run(tmp_path / "raw") / "dataset_info.json")
    assert [len(info["episodes"][split]) for split in ("train", "eval")] == [1, 1]


def test_a_third_view_comes_before_extra_views(raw, tmp_path):
    """Newer RLinf records the second camera under a name of its own."""
    for path in list_episodes(raw):
        episode = load_pickle(path)
        for observation in episode["observations"]:
            observation["third_view_images"] = np.full((4, 4, 3), 7, np.uint8)
        write_episode(raw, episode)
    folder = run(raw)
    sample = load_pickle(folder / rows(folder, "train")[0]["pkl_path"])
    assert (sample["extra_view_frames"][0] == 7).all()


# -- what is refused ------------------------------------------------------------------------------------


def without_second_view(episode: dict) -> None:
    for observation in episode["observations"]:
        observation["extra_view_images"] = None


def without_task(episode: dict) -> None:
    episode["task_description"] = None


def without_distance(episode: dict) -> None:
    episode["infos"] = [{}] * len(episode["infos"])


def with_nan(episode: dict) -> None:
    episode["infos"][3] = {"success_distance": float("nan")}


def with_other_camera(episode: dict) -> None:
    episode["render"] = {"fov": 0.9}


def with_other_rate(episode: dict) -> None:
    episode["control"] = {"freq": 20}


@pytest.mark.parametrize(
    ("spoil", "skippable", "complaint"),
    [
        (without_second_view, True, r"episode_5_.*has no view extra_view_images, and a window shows two"),
        (without_task, True, r"episode_5_.*does not say its task; give --task-description"),
        (with_nan, True, r"episode_5_.*has a success_distance that is not finite"),
        (
            without_distance,
            False,
            r"score sources .* differ, .* has success_distance, .*episode_5_.* has rewards",
        ),
        (with_other_camera, False, r"cameras \('render'\) differ.*episode_5_"),
        (with_other_rate, False, r"controls \(rate and mode\) differ.*episode_5_"),
    ],
)
def test_an_odd_episode(raw, spoil, skippable, complaint):
    path = next(path for path in list_episodes(raw) if "episode_5_" in path.name)
    episode = load_pickle(path)
    spoil(episode)
    write_episode(raw, episode)
    with pytest.raises(UserError, match=complaint):
        run(raw)
    if skippable:
        info = load_json(run(raw, "--skip-bad") / "dataset_info.json")
        assert len(info["skipped"]) == 1 and "episode_5_" in info["skipped"][0]
        assert len(info["episodes"]["train"]) + len(info["episodes"]["eval"]) == 9


def test_broken_files(raw):
    (raw / "rank_0_env_0_episode_99_step_0_fail.pkl").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"episode_99.*is not a readable pickle.*--skip-bad"):
        run(raw)
    assert len(load_json(run(raw, "--skip-bad") / "dataset_info.json")["skipped"]) == 1


def test_overwrite_takes_nothing_away_but_a_dataset(raw, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other things than a dataset"):
        run(raw, "--overwrite", output="home")
    with pytest.raises(UserError, match="holds other things than a dataset"):
        run(raw, "--overwrite", output="raw")
    assert (tmp_path / "home" / "thesis.txt").exists() and len(list_episodes(raw)) == 10


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--window-size", "1"], "--window-size 1: must be 2 or more"),
        (["--val-split", "1"], "--val-split 1.0: must be between 0 and 1"),
        (["--tail-unclear-ratio", "1"], "--tail-unclear-ratio 1.0: must be at least 0 and below 1"),
        (["--max-samples-per-label", "0"], "--max-samples-per-label 0: must be 1 or more"),
        (["--window-size", "20"], r"the 0 windows of train are none only.*longer episodes"),
        (["--delta-threshold", "9"], r"windows of train are unclear only.*--delta-threshold \(now 9\)"),
    ],
)
def test_settings_of_no_use(raw, options, complaint):
    with pytest.raises(UserError, match=complaint):
        run(raw, *options)
    assert not (raw.parent / "out").exists()


def test_a_single_episode(tmp_path):
    make(tmp_path / "raw", 0, True)
    with pytest.raises(UserError, match="only one usable episode"):
        run(tmp_path / "raw")
