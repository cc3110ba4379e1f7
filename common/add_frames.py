"""More frames for the train split of a data set that exists, and never one of its validation frames.

The validation split stays as it is, bit for bit: models before and after are compared on the same frames. An
episode with a frame that is in there too is refused as a whole, since its other frames look alike; pixels are
compared by their SHA-256. What is in the train split already is not added twice, so adding the same folder
again changes nothing.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.episodes import frame_labels, list_episodes, read_episode
from common.files import atomic_write, to_json
from common.payload import PayloadFile, RewardDatasetPayload
from common.runtime import UserError

COUNTS = ("success", "fail")


@dataclass
class Added:
    """What became of the frames of a folder."""

    success: int = 0
    fail: int = 0
    known: int = 0  # were in the train split already
    # of those, where a person has changed the label: the new one, 1 success, 0 fail
    corrected: list[int] = field(default_factory=list)
    frozen: list[Path] = field(default_factory=list)  # episodes that share a frame with the validation split
    unlabelled: int = 0  # nobody has said what is true

    @property
    def total(self) -> int:
        return self.success + self.fail


def add_frames(source: Path, train_path: Path, val_path: Path, out_path: Path) -> Added:
    """Write the frames of `train_path`, then the new ones of the episodes in `source`, to `out_path`, which
    may be the same file; whole or not at all.

    All frames of an episode but the reset's are taken, with the label that the data set goes by, or a
    person's (`common.hard_frames`). UserError where they show other cameras or sizes than the data set.
    """
    train, val = RewardDatasetPayload.load(train_path), RewardDatasetPayload.load(val_path)
    frozen = {_hash(image.numpy()) for image in val.images}
    known = {_hash(image.numpy()): place for place, image in enumerate(train.images)}
    found, frames, labels = Added(), [], list(train.labels)
    episodes, steps, names = [], [], []
    for path in list_episodes(source):
        episode = read_episode(path, views=tuple(train.views))
        _check_alike(path, episode, train)
        shown = np.stack([episode.images[view] for view in train.views], axis=1)[1:]  # (T, V, H, W, 3)
        shown = shown[:, 0] if len(train.views) == 1 else shown
        hashes = [_hash(frame) for frame in shown]
        if not frozen.isdisjoint(hashes):
            found.frozen.append(path)
            continue
        label = _labels(path, episode.infos, train.metadata.get("label", "success"))
        if label is None:
            found.unlabelled += len(shown)
            continue
        reviewed = episode.infos[-1].get("reviewed")
        for t, frame_hash in enumerate(hashes):
            if frame_hash in known:
                found.known += 1
                if reviewed:
                    labels[known[frame_hash]] = int(label[t])
                continue
            known[frame_hash] = len(labels)
            frames.append(shown[t])
            labels.append(int(label[t]))
            if names[-1:] != [str(path)]:
                names.append(str(path))
            episodes.append(len(names) - 1)
            steps.append(t + 1)
    pairs = zip(train.labels, labels, strict=False)  # those that were there before
    found.corrected = [after for before, after in pairs if after != before]
    found.success = sum(labels[len(train.labels) :])
    found.fail = len(frames) - found.success
    if frames or found.corrected or out_path != train_path:
        metadata = _describe(train.metadata, source, found, names, episodes, steps)
        with atomic_write(out_path) as temporary, PayloadFile(temporary) as file:
            for image in train.images:
                file.add(image.numpy())
            for frame in frames:
                file.add(frame)
            file.finish(labels, metadata)
    return found


def _hash(frame: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(frame)).digest()


def _check_alike(path: Path, episode: Any, train: RewardDatasetPayload) -> None:
    theirs = {"frames": episode.image_shapes[train.views[0]], "render": json.loads(to_json(episode.render))}
    ours = {"frames": tuple(train.images[0].shape[-3:]), "render": train.metadata.get("render")}
    for name, value in theirs.items():
        if ours[name] is not None and value != ours[name]:
            raise UserError(
                f"{path} has {name} {value}, but the data set has {ours[name]}; cameras must agree"
            )


def _labels(path: Path, infos: list[dict], label: str) -> np.ndarray | None:
    """(T,) bool of the frames after the reset's; None where nobody has said what is true."""
    if infos[-1].get("reviewed") or not any(label in info for info in infos[1:]):
        label = "success"
    try:
        return frame_labels(infos, label, required=True)[1:]
    except ValueError:
        return None


def _describe(
    metadata: dict[str, Any],
    source: Path,
    found: Added,
    names: list[str],
    episodes: list[int],
    steps: list[int],
) -> dict[str, Any]:
    """The metadata of the train split with what has joined it; the added frames are its last `num_added`."""
    out = json.loads(to_json(metadata))
    out["num_added"] = out.get("num_added", 0) + found.total
    out["added"] = [*out.get("added", []), {"from": str(source), **{c: vars(found)[c] for c in COUNTS}}]
    out["num_train_samples"] = out.get("num_train_samples", 0) + found.total
    gained = 2 * sum(found.corrected) - len(found.corrected)  # successes by correction; failures lose as many
    for key in ("frames", "frames_before_cut"):
        if (counts := out.get(key, {}).get("train")) is not None:
            counts["success"] += found.success + gained
            counts["fail"] += found.fail - gained
    if "frame_episodes" in out:  # numbers into the list of names
        listed = out["episodes"]["train"] if isinstance(out.get("episodes"), dict) else []
        first = max(len(listed), max(out["frame_episodes"], default=-1) + 1)
        out["frame_episodes"] += [first + number for number in episodes]
        out["frame_steps"] += steps
    if isinstance(out.get("episodes"), dict) and "train" in out["episodes"]:
        out["episodes"]["train"] += names
    return out
