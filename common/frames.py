"""Labelled frames for training a classifier: loading them, drawing batches, changing them at random."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.payload import RewardDatasetPayload
from common.runtime import UserError


@dataclass
class FrameSet:
    """The frames of one or several `train.pt` / `val.pt`, all of one size and one camera set-up."""

    images: list[Tensor]  # (H, W, 3) uint8 each, of several views (V, H, W, 3); on the disk until touched
    labels: np.ndarray  # (len,) bool, True: success
    frame_size: list[int]  # [H, W]
    views: list[str]
    render: dict[str, Any] | None  # what the cameras were
    sha256: dict[str, str]  # file -> hash of its content
    added: np.ndarray  # (len,) bool: brought by preprocess_resnet.py --add
    weight: (
        np.ndarray
    )  # (len,) float64, how many frames of the episodes each stands for: 1 unless some were cut
    episode: np.ndarray | None  # (len,) int64, which episode; None where a file does not tell
    step: np.ndarray | None  # (len,) int64, which frame of its episode; None likewise
    whole: bool  # no frame of its episodes is left out, but the reset's
    prevalence: str  # in words, of what the share of successes is the share
    label: str  # what of the env's info says whether a frame is a success; "operator": a person has said it

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Tensor:
        """(len(indices), [V,] H, W, 3) uint8."""
        return torch.stack([self.images[index] for index in indices])

    def by_view(self, indices: np.ndarray) -> dict[str, Tensor]:
        """View -> (len(indices), H, W, 3) uint8."""
        batch = self.batch(indices)
        if len(self.views) == 1:
            return {self.views[0]: batch}
        return dict(zip(self.views, batch.unbind(1), strict=True))

    @property
    def class_counts(self) -> dict[str, int]:
        return {"success": int(self.labels.sum()), "fail": int((~self.labels).sum())}


def load_frames(paths: str | list[str]) -> FrameSet:
    """Raises UserError if a file is missing or broken, holds one class or several sizes or cameras."""
    paths = [paths] if isinstance(paths, str) else paths
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise UserError(f"{missing[0]}: no such file; make it with preprocess_resnet.py")
    if not paths:
        raise UserError("no data files are given; name at least one .pt of preprocess_resnet.py")
    payloads = {path: RewardDatasetPayload.load(path) for path in paths}
    images = [image for payload in payloads.values() for image in payload.images]
    labels = np.array([label for payload in payloads.values() for label in payload.labels], dtype=bool)
    names = " + ".join(paths)

    views = [payload.views for payload in payloads.values()]
    if any(other != views[0] for other in views) or len({image.shape[:-3] for image in images}) > 1:
        raise UserError(f"{names} show different cameras; make them with the same --view")
    sizes = sorted({tuple(image.shape[-3:-1]) for image in images})
    if len(sizes) > 1:
        raise UserError(f"{names} mixes frames of {_by(sizes[0])} and {_by(sizes[1])}; use data of one size")
    renders = [payload.metadata.get("render") for payload in payloads.values()]
    if any(render != renders[0] for render in renders):
        raise UserError(f"{names} come from different camera set-ups; use data of one")
    if labels.all() or not labels.any():
        held, lacking = ("successes", "failures") if labels.all() else ("failures", "successes")
        raise UserError(f"{names} holds {held} only; collect episodes with {lacking} too")
    files = list(payloads.values())
    return FrameSet(
        images,
        labels,
        frame_size=list(sizes[0]),
        views=views[0],
        render=renders[0],
        sha256={path: _sha256(path) for path in paths},
        added=np.concatenate([_added(file) for file in files]),
        weight=np.concatenate([_weights(file) for file in files]),
        episode=_per_frame(files, "frame_episodes", apart=True),
        step=_per_frame(files, "frame_steps"),
        whole=all(_is_whole(file) for file in files),
        prevalence="; ".join(dict.fromkeys(_prevalence(file) for file in files)),
        label=files[0].metadata.get("label", "success"),
    )


def _added(file: RewardDatasetPayload) -> np.ndarray:
    """(n,) bool: the last `num_added` frames of the file."""
    count = len(file.labels)
    return np.arange(count) >= count - file.metadata.get("num_added", 0)


def _weights(file: RewardDatasetPayload) -> np.ndarray:
    """(n,) float64: frames that preprocessing cut away count with those of their label that it kept."""
    before, kept = (_counts(file, key) for key in ("frames_before_cut", "frames"))
    names = np.where(np.array(file.labels) == 1, "success", "fail")
    if before is None or kept is None:
        return np.ones(len(names))
    return np.array([before[name] / kept[name] for name in names])


def _counts(file: RewardDatasetPayload, key: str) -> dict[str, int] | None:
    return file.metadata.get(key, {}).get(file.metadata.get("split"))


def _prevalence(file: RewardDatasetPayload) -> str:
    before = _counts(file, "frames_before_cut")
    if before is None:
        return "as in the file, which does not say what was left out"
    if file.metadata.get("label") == "operator":
        return "that of the frames an operator labelled, not what a policy meets"
    if sampled := file.metadata.get("num_samples_per_episode", 0):
        return f"not natural: {sampled} frames of each episode, evenly spaced, however long it was"
    if before == _counts(file, "frames"):
        return "natural: all frames of the episodes"
    return "natural: frames cut from the file count with those that were kept"


def _is_whole(file: RewardDatasetPayload) -> bool:
    before, sampled = _counts(file, "frames_before_cut"), file.metadata.get("num_samples_per_episode")
    picked = file.metadata.get("label") == "operator" or file.metadata.get("num_added", 0) > 0
    return before is not None and before == _counts(file, "frames") and sampled == 0 and not picked


def _per_frame(files: list[RewardDatasetPayload], key: str, apart: bool = False) -> np.ndarray | None:
    """(len,) int64 of all files, None where one lacks it. `apart`: those of two files are never equal."""
    columns = [file.metadata.get(key) for file in files]
    if any(column is None for column in columns):
        return None
    for file, column in zip(files, columns, strict=True):
        if len(column) != len(file.labels):
            raise UserError(f"a data file holds {len(column)} {key} for {len(file.labels)} frames; remake it")
    columns = [np.array(column, dtype=np.int64) for column in columns]
    if apart:
        first = np.cumsum([0] + [int(column.max()) + 1 for column in columns[:-1]])
        columns = [column + offset for column, offset in zip(columns, first, strict=True)]
    return np.concatenate(columns)


def check_same_cameras(train: FrameSet, val: FrameSet) -> None:
    """Raises UserError unless what is validated on looks like what is trained on."""
    if train.frame_size != val.frame_size:
        raise UserError(
            f"training frames are {_by(train.frame_size)} but validation frames {_by(val.frame_size)}; "
            "make both with one run of preprocess_resnet.py"
        )
    if train.render != val.render or train.views != val.views:
        raise UserError("training and validation frames come from different camera set-ups; use data of one")


def _by(size: tuple[int, ...] | list[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------
# Batches


class BatchIndices:
    """Endless batches of indices.

    Each class (without a fraction: everything) is dealt like a deck of cards, shuffled, used up, shuffled
    again: no frame comes twice before all others of its class have come once. Frames that were added later
    have a deck of their own, so that a few hard ones among thousands are not lost.
    """

    def __init__(
        self,
        labels: np.ndarray,
        positive_fraction: float | None,
        seed: int,
        added: np.ndarray | None = None,
        added_fraction: float = 0.0,
    ):
        """labels, added (len,) bool, both classes among those not added; `added_fraction` of each batch are
        added ones, where there are any, and `positive_fraction` of the rest are successes."""
        self.positive_fraction = positive_fraction
        self.rng = np.random.default_rng(seed)
        apart = np.zeros(len(labels), bool) if added is None or added_fraction == 0 else added
        self.added_fraction = added_fraction if apart.any() else 0.0
        self.added_deck = Deck(np.flatnonzero(apart), self.rng)
        if positive_fraction is None:
            self.decks = [Deck(np.flatnonzero(~apart), self.rng)]
        else:
            classes = (labels & ~apart, ~labels & ~apart)
            self.decks = [Deck(np.flatnonzero(those), self.rng) for those in classes]

    def draw(self, batch_size: int) -> np.ndarray:
        """(batch_size,) int64; at least one of each class where the classes are balanced."""
        num_added = min(round(self.added_fraction * batch_size), batch_size - 2)
        if num_added > 0:
            return np.concatenate([self.added_deck.deal(num_added), self._draw(batch_size - num_added)])
        return self._draw(batch_size)

    def _draw(self, batch_size: int) -> np.ndarray:
        if self.positive_fraction is None:
            return self.decks[0].deal(batch_size)
        num_positive = min(max(round(self.positive_fraction * batch_size), 1), batch_size - 1)
        return np.concatenate(
            [self.decks[0].deal(num_positive), self.decks[1].deal(batch_size - num_positive)]
        )


class Deck:
    """Cards that are dealt in random order; each once before any comes again."""

    def __init__(self, cards: np.ndarray, rng: np.random.Generator):
        self.cards, self.rng = cards, rng
        self.left = np.empty(0, dtype=np.int64)

    def deal(self, count: int) -> np.ndarray:
        while len(self.left) < count:
            self.left = np.concatenate([self.left, self.rng.permutation(self.cards)])
        dealt, self.left = self.left[:count], self.left[count:]
        return dealt


# ----------------------------------------------------------------------------------------------------
# Augmentation


@dataclass
class AugmentConfig:
    """Random changes of each training frame. They say what must not matter: a nudged camera, another lamp."""

    random_shift: int = 4  # pixels of the stored frame, each way
    brightness: float = 0.2  # factor in [1 - b, 1 + b]
    color: float = 0.1  # the same for each colour channel on its own

    def __post_init__(self):
        if self.random_shift < 0 or not 0 <= self.brightness < 1 or not 0 <= self.color < 1:
            raise ValueError("random_shift must be at least 0, brightness and color in [0, 1)")


def augment(images: Tensor, how: AugmentConfig) -> Tensor:
    """(B, [V,] H, W, 3) uint8 -> the same in float32 in [0, 1], on the same device. Each view has its own
    camera and its own luck."""
    if images.dim() == 5:
        return augment(images.flatten(0, 1), how).unflatten(0, images.shape[:2])
    images = random_shift(images, how.random_shift).float() / 255
    batch = len(images)
    brightness = _around_one(how.brightness, (batch, 1, 1, 1), images.device)
    color = _around_one(how.color, (batch, 1, 1, 3), images.device)
    return (images * brightness * color).clamp(0, 1)


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Each image moved by up to `pixels` in x and y; its edge is repeated where nothing moved in.

    Pad and crop at once, as DrQ does (Kostrikov et al. 2020), without the padded copy.
    """
    batch, height, width = images.shape[:3]
    shift = torch.randint(-pixels, pixels + 1, (2, batch, 1), device=images.device)
    rows = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)  # (B, W)
    which = torch.arange(batch, device=images.device)
    return images[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def _around_one(spread: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return 1 + spread * (2 * torch.rand(shape, device=device) - 1)
