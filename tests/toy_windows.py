"""A windows dataset like preprocess_qwentrend.py's: a square goes right (positive), left, or stays."""

import json
import pickle
from pathlib import Path

import numpy as np

from common.files import save_json
from common.prompts import fill
from common.trend import LABELS

TASK = "push the square to the right"
TEMPLATE = "{task}?"


def draw_window(
    rng: np.random.Generator, label: int, size: int, num_frames: int
) -> dict[str, list[np.ndarray]]:
    """Two cameras: what goes right in the first goes down in the second."""
    side, travel = size // 4, size // 2
    start = {0: 0, 1: travel, 2: int(rng.integers(0, travel))}[label] + int(rng.integers(0, size // 8))
    end = {0: start + travel, 1: start - travel, 2: start}[label]
    across = int(rng.integers(0, size - side))
    frames: dict[str, list[np.ndarray]] = {"main_frames": [], "extra_view_frames": []}
    for place in np.linspace(start, end, num_frames).round().astype(int).clip(0, size - side):
        main = np.full((size, size, 3), 40, dtype=np.uint8)
        main[across : across + side, place : place + side] = (220, 60, 40)
        frames["main_frames"].append(main)
        frames["extra_view_frames"].append(main.transpose(1, 0, 2).copy())
    return frames


def write_windows(
    folder: Path,
    num_train: int = 24,
    num_eval: int = 12,
    size: int = 32,
    num_frames: int = 5,
    labels: tuple[str, ...] = LABELS,
    task: str = TASK,
    template: str = TEMPLATE,
    mirrored: bool = False,
) -> Path:
    """Labels take turns; every fourth window is said to be a reversed one where it is negative.

    `mirrored`: the first camera sees right as left, so that the same motion has the other label.
    """
    counts: dict[str, dict] = {}
    for split, num in (("train", num_train), ("eval", num_eval)):
        rng = np.random.default_rng(num)
        (folder / split / "pkl").mkdir(parents=True, exist_ok=True)
        rows = []
        for index in range(num):
            label = labels[index % len(labels)]
            frames = draw_window(rng, LABELS.index(label), size, num_frames)
            if mirrored:
                frames["main_frames"] = [frame[:, ::-1].copy() for frame in frames["main_frames"]]
            path = f"{split}/pkl/{label}_{index:06d}.pkl"
            (folder / path).write_bytes(pickle.dumps({**frames, "label": label, "score": 0.0}))
            reverse = label == "negative" and index % 4 == 0
            metadata = {
                "window_size": num_frames,
                "augmentation": "reverse_positive" if reverse else "none",
                "start_step": 7 * index % 11,
                "success": index // 3 % 2 == 0,
            }
            rows.append(
                {
                    "task": task,
                    "prompt": fill(template, task, num_frames),
                    "answer": label,
                    "pkl_path": path,
                    "source_episode_path": f"{index // 3}.pkl",  # a window of each label in every episode
                    "segment_metadata": metadata,
                }
            )
        lines = [json.dumps(row) for row in rows]
        (folder / split / "segments.jsonl").write_text("\n".join(lines) + "\n")
        counts[split] = {"all": num}
    info = {
        "window_size": num_frames,
        "delta_threshold": 0.05,
        "score_source": "success_distance",
        "template": template,
        "render": {"shader": "toy"},
        "control": {"freq": 10},
        "counts": counts,
    }
    save_json(info, folder / "dataset_info.json")
    return folder
