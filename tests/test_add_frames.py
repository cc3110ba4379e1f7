"""preprocess_resnet.py --add: the train split grows, the validation split never."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import RENDER

from common.add_frames import add_frames
from common.episodes import EpisodeWriter, list_episodes
from common.hard_frames import HardFrames, list_hard, relabel
from common.payload import RewardDatasetPayload
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"task": "Count", "task_description": "Count.", "render": RENDER, "control": {}}


def frame(pixel: int, size: int = 8) -> torch.Tensor:
    return torch.full((size, size, 3), pixel, dtype=torch.uint8)


def write_hard(
    folder: Path, pixels: list[int], knows: bool = True, size: int = 8, facts: dict = FACTS
) -> Path:
    """A hard frame per pixel, all called a success by mistake."""
    with EpisodeWriter(folder) as writer:
        hard = HardFrames(writer, 99, 2, facts or FACTS, knows)
        n = len(pixels)
        still, prob = torch.zeros(n, dtype=torch.bool), torch.full((n,), 0.9)
        frames = torch.stack([frame(pixel, size) for pixel in pixels])
        hard.keep({"main_images": frames}, torch.arange(n), prob, 0.5, {"success": still}, still)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Train frames 1 (success), 2, 3; validation frames 11 (success), 12."""
    for split, pixels in (("train", [1, 2, 3]), ("val", [11, 12])):
        labels = [1] + [0] * (len(pixels) - 1)
        metadata = {
            "split": split,
            "label": "success",
            "view": "main_images",
            "render": RENDER,
            "num_train_samples": 3,
            "frames": {"train": {"success": 1, "fail": 2}, "val": {"success": 1, "fail": 1}},
            "episodes": {"train": ["a.pkl"], "val": ["b.pkl"]},
            "frame_episodes": [0] * len(pixels),
            "frame_steps": list(range(len(pixels))),
        }
        payload = RewardDatasetPayload([frame(p) for p in pixels], labels, metadata)
        payload.save(tmp_path / "data" / f"{split}.pt")
    return tmp_path / "data"


def content(path: Path) -> list[tuple[int, int]]:
    payload = RewardDatasetPayload.load(path)
    return [(int(image[0, 0, 0]), label) for image, label in zip(payload.images, payload.labels, strict=True)]


def add(source: Path, data: Path):
    return add_frames(source, data / "train.pt", data / "val.pt", data / "train.pt")


def test_hard_frames_join_the_train_split_at_its_end(data, tmp_path):
    before = (data / "val.pt").read_bytes()
    found = add(write_hard(tmp_path / "hard", [50, 51]), data)
    assert (found.success, found.fail, found.known, found.frozen, found.unlabelled) == (0, 2, 0, [], 0)
    assert content(data / "train.pt") == [(1, 1), (2, 0), (3, 0), (50, 0), (51, 0)]
    assert (data / "val.pt").read_bytes() == before
    metadata = RewardDatasetPayload.load(data / "train.pt").metadata
    assert (metadata["num_added"], metadata["num_train_samples"]) == (2, 5)
    assert metadata["frames"] == {"train": {"success": 1, "fail": 4}, "val": {"success": 1, "fail": 1}}
    assert metadata["frame_episodes"] == [0, 0, 0, 1, 2]
    assert metadata["frame_steps"] == [0, 1, 2, 1, 1]
    assert metadata["episodes"]["train"] == ["a.pkl", *map(str, list_episodes(tmp_path / "hard"))]


def test_adding_again_changes_nothing(data, tmp_path):
    source = write_hard(tmp_path / "hard", [50, 50, 51])  # two of one picture
    assert (add(source, data).total, add(source, data).known) == (2, 3)
    before = (data / "train.pt").read_bytes()
    assert add(source, data).total == 0
    assert (data / "train.pt").read_bytes() == before
    assert add(write_hard(tmp_path / "hard", [52]), data).total == 1
    assert RewardDatasetPayload.load(data / "train.pt").metadata["num_added"] == 3


def test_frozen_frames_are_refused(data, tmp_path):
    found = add(write_hard(tmp_path / "hard", [12, 50]), data)
    assert [path.name.split("_")[3] for path in found.frozen] == ["0"]  # of env 0
    assert content(data / "train.pt") == [(1, 1), (2, 0), (3, 0), (50, 0)]


def test_what_a_person_says_counts_and_what_nobody_said_waits(data, tmp_path):
    source = write_hard(tmp_path / "hard", [50, 51, 52], knows=False)
    assert (add(source, data).unlabelled, add(source, data).total) == (3, 0)
    first, second, _ = list_hard(source)
    relabel(first, True)
    relabel(second, False)
    found = add(source, data)
    assert (found.success, found.fail, found.unlabelled) == (1, 1, 1)
    added = content(data / "train.pt")[3:]
    assert sorted(label for _, label in added) == [0, 1]


def test_a_person_overrules_the_env(data, tmp_path):
    source = write_hard(tmp_path / "hard", [50])
    relabel(list_hard(source)[0], True)
    add(source, data)
    assert content(data / "train.pt")[3:] == [(50, 1)]
    relabel(list_hard(source)[0], False)  # on second thoughts
    assert add(source, data).corrected == [0]
    assert content(data / "train.pt")[3:] == [(50, 0)]
    metadata = RewardDatasetPayload.load(data / "train.pt").metadata
    assert metadata["frames"]["train"] == {"success": 1, "fail": 3}
    assert metadata["num_added"] == 1
    assert add(source, data).corrected == []


def test_an_episode_whose_frames_were_all_cut_keeps_its_number(data, tmp_path):
    payload = RewardDatasetPayload.load(data / "train.pt")
    payload.metadata["episodes"]["train"].append("all_cut.pkl")
    payload.save(data / "train.pt")
    add(write_hard(tmp_path / "hard", [50]), data)
    metadata = RewardDatasetPayload.load(data / "train.pt").metadata
    assert Path(metadata["episodes"]["train"][metadata["frame_episodes"][-1]]).parent == tmp_path / "hard"


def test_other_cameras_are_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"has frames \(4, 4, 3\), but the data set has \(8, 8, 3\)"):
        add(write_hard(tmp_path / "small", [50], size=4), data)
    elsewhere = FACTS | {"render": RENDER | {"task": "Other"}}
    with pytest.raises(UserError, match=r"has render .*Other.*cameras must agree"):
        add(write_hard(tmp_path / "elsewhere", [50], facts=elsewhere), data)
    assert len(content(data / "train.pt")) == 3


def test_the_command_as_a_user_types_it(data, tmp_path):
    write_hard(tmp_path / "hard", [12, 50])
    write_hard(tmp_path / "hard" / "queue", [60], knows=False)
    command = [sys.executable, str(ROOT / "preprocess_resnet.py"), "--add", "hard", "--output-dir", "data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "data/train.pt: 0 success and 1 fail frames added at its end",
        "1 frames have no label: python collect.py --review hard",
    ]
    assert done.stdout.splitlines()[2].startswith("refused: hard/rank_0_env_0_")
    copy = [*command, "--train-output-path", "copy.pt"]
    assert subprocess.run(copy, cwd=tmp_path, capture_output=True, timeout=100).returncode == 0
    assert content(tmp_path / "copy.pt") == content(data / "train.pt")
    assert np.array_equal(content(data / "val.pt"), [(11, 1), (12, 0)])
