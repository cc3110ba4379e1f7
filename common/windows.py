"""Labelled windows for training a trend model: loading them, drawing batches of them, changing them.

Reads what preprocess_qwentrend.py writes, and RLinf's: a `segments.jsonl` with a row per window, each naming
the pickle that holds its frames. Frames come off the disk when they are first asked for and stay in memory;
windows of one episode overlap, so that equal frames are kept once.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import load_json, load_pickle
from common.frames import Deck, random_shift
from common.prompts import fill, template_of
from common.runtime import UserError
from common.trend import FRAME_KEYS, LABELS, OPPOSITE, REVERSED

# Of dataset_info.json: cameras, rate and the rule of the labels, the same in all data that are used together.
ALIKE = ("window_size", "render", "control", "score_source", "delta_threshold", "tail_unclear_ratio")


@dataclass
class _Row:
    """What one line of a segments.jsonl says."""

    label: int  # index into LABELS
    task: str
    prompt: str
    reversed: bool
    path: Path  # of the pickle
    source: tuple[str, str] | None  # this segments.jsonl and the episode it names
    start: int | None  # first frame of the window
    success: bool | None  # of the episode


class WindowSet:
    """The windows of one or several segments.jsonl, all of one size, one prompt and one camera set-up.

    `labels` (n,) int64 into LABELS; `reversed` (n,) bool, played backwards; `tasks` n texts; `template` of
    the prompt, with `{task}`; `window_size` K; `frame_size` view -> [H, W]; `info` the dataset_info.json ({}
    where there is none); `sha256` file -> hash of its content. `episode` (n,) int64, `start` (n,) int64, its
    first frame, and `success` (n,) bool, of the episode, are None where a row does not tell.
    """

    views = tuple(FRAME_KEYS)

    def __init__(
        self,
        paths: str | list[str],
        video_root: str | None = None,
        cache_bytes: float = 8e9,
        last_frame_only: bool = False,
    ):
        """`video_root`: where relative `pkl_path`s start; None: the folder above that of the segments.jsonl.

        `cache_bytes` of frames stay in memory, the rest is read again each time. `last_frame_only`:
        windows repeat their last frame, for a model that cannot see motion. Raises UserError if a file is
        missing or broken, if a row is no window, or if rows disagree.
        """
        paths = [paths] if isinstance(paths, str) else paths
        if not paths:
            raise UserError("no data files are given; name at least one segments.jsonl")
        self.names = " + ".join(paths)
        rows = [row for path in paths for row in _read_rows(Path(path), video_root)]
        self.labels = np.array([row.label for row in rows], dtype=np.int64)
        self.reversed = np.array([row.reversed for row in rows], dtype=bool)
        self.tasks = [row.task for row in rows]
        self.episode = None
        if all(row.source is not None for row in rows):
            numbers = {
                source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows))
            }
            self.episode = np.array([numbers[row.source] for row in rows], dtype=np.int64)
        known = all(row.start is not None for row in rows)
        self.start = np.array([row.start for row in rows], dtype=np.int64) if known else None
        known = all(row.success is not None for row in rows)
        self.success = np.array([row.success for row in rows], dtype=bool) if known else None
        self._paths = [row.path for row in rows]
        if missing := next((path for path in self._paths if not path.is_file()), None):
            raise UserError(
                f"{self.names} names {missing}, which does not exist; set data.video_root to the folder that "
                "its pkl_paths start from"
            )

        infos = [_read_info(Path(path)) for path in paths]
        if different := [key for key in ALIKE if any(info.get(key) != infos[0].get(key) for info in infos)]:
            raise UserError(f"{self.names} differ in their {', '.join(different)}; use data of one kind")
        self.info = infos[0]
        self.sha256 = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}

        self._last_frame_only = last_frame_only
        self._cache_left = cache_bytes
        self._cached: dict[int, dict[str, list[Tensor]]] = {}  # window -> view -> its K frames
        self._frames: dict[bytes, Tensor] = {}  # hash of a frame's content -> the frame
        self.window_size, self.frame_size = 0, {}  # those of the first window, which the others must match
        first = self._read(0)
        self.window_size = len(first["main_images"])
        self.frame_size = {view: list(frames[0].shape[:2]) for view, frames in first.items()}
        self._check_window(0, first)
        if self.info and self.info["window_size"] != self.window_size:
            raise UserError(
                f"{self._paths[0]} holds {self.window_size} frames, but dataset_info.json says "
                f"{self.info['window_size']}; the dataset is a mixture, so make it again"
            )
        self.template = self._common_template([row.prompt for row in rows])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_counts(self) -> dict[str, int]:
        return {name: int((self.labels == label).sum()) for label, name in enumerate(LABELS)}

    def windows(self, indices: np.ndarray) -> dict[str, Tensor]:
        """View -> (len(indices), K, H, W, 3) uint8, time rising."""
        read = [self._window(int(index)) for index in indices]
        size = (len(read), self.window_size)
        frames = {
            view: torch.stack([frame for window in read for frame in window[view]]).unflatten(0, size)
            for view in self.views
        }
        return frozen(frames) if self._last_frame_only else frames

    def tasks_of(self, indices: np.ndarray) -> list[str]:
        return [self.tasks[index] for index in indices]

    def _window(self, index: int) -> dict[str, list[Tensor]]:
        if index in self._cached:
            return self._cached[index]
        window = self._read(index)
        self._check_window(index, window)
        if self._cache_left > 0:
            window = {view: [self._kept(frame) for frame in frames] for view, frames in window.items()}
            self._cached[index] = window
        return window

    def _kept(self, frame: Tensor) -> Tensor:
        """The frame of this content that is kept in memory already, or else this one."""
        digest = hashlib.blake2b(frame.numpy(), digest_size=16).digest()
        if digest not in self._frames:
            self._frames[digest] = frame
            self._cache_left -= frame.numel()
        return self._frames[digest]

    def _read(self, index: int) -> dict[str, list[Tensor]]:
        path = self._paths[index]
        sample = load_pickle(path)
        if lacking := [
            key for key in FRAME_KEYS.values() if not isinstance(sample, dict) or key not in sample
        ]:
            raise UserError(
                f"{path} lacks {lacking[0]}, so it is no window of two views; make the data again"
            )
        return {
            view: [torch.as_tensor(frame).contiguous() for frame in sample[key]]
            for view, key in FRAME_KEYS.items()
        }

    def _check_window(self, index: int, window: dict[str, list[Tensor]]) -> None:
        for view, frames in window.items():
            if len(frames) != self.window_size or not frames:
                raise UserError(
                    f"{self._paths[index]} holds {len(frames)} frames of {view}, others {self.window_size}; "
                    "all windows must be of one length"
                )
            expected = (*self.frame_size[view], 3)
            for frame in frames:
                if frame.dtype != torch.uint8 or tuple(frame.shape) != expected:
                    raise UserError(
                        f"{self._paths[index]}: frames of {view} must be uint8 {expected} like the others, "
                        f"got {frame.dtype} {tuple(frame.shape)}"
                    )

    def _common_template(self, prompts: list[str]) -> str:
        """The template behind all prompts; that of dataset_info.json where it is the one."""
        told = self.info.get("template")
        if told is not None and all(
            fill(told, task, self.window_size) == prompt
            for task, prompt in set(zip(self.tasks, prompts, strict=True))
        ):
            return told
        templates = sorted(
            {template_of(prompt, task) for task, prompt in zip(self.tasks, prompts, strict=True)}
        )
        if len(templates) > 1:
            raise UserError(
                f"{self.names} asks in several ways: '{templates[0][:60]}' and '{templates[1][:60]}'; a "
                "model learns one prompt, so use rows of one"
            )
        return templates[0]


def check_windows(train: WindowSet, val: WindowSet, num_frames: int) -> None:
    """Raises UserError unless both have windows of `num_frames`, look alike and hold what can be learned."""
    for windows in (train, val):
        if windows.window_size != num_frames:
            raise UserError(
                f"data.video_nframes is {num_frames}, but the windows of {windows.names} have "
                f"{windows.window_size} frames; make the two equal"
            )
        held = [name for name, count in windows.class_counts.items() if count]
        if len(held) < 2:
            raise UserError(
                f"{windows.names} holds {held[0]} windows only; collect more, or choose another "
                "delta_threshold"
            )
    if train.template != val.template:
        raise UserError(f"{train.names} and {val.names} ask with different prompts; make both in one run")
    if train.frame_size != val.frame_size:
        raise UserError(
            f"training frames are {train.frame_size} but validation frames {val.frame_size}; make both in "
            "one run of preprocess_qwentrend.py"
        )
    if different := [key for key in ALIKE if train.info.get(key) != val.info.get(key)]:
        raise UserError(
            f"{train.names} and {val.names} differ in their {', '.join(different)}; use data of one kind"
        )


def _read_rows(path: Path, video_root: str | None) -> list[_Row]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with preprocess_qwentrend.py")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            task, prompt, answer, pkl_path = (row[key] for key in ("task", "prompt", "answer", "pkl_path"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is no row of a window ({type(error).__name__}: {error})"
            ) from error
        if answer not in LABELS:
            raise UserError(f"{path}:{number}: answer must be one of {', '.join(LABELS)}, got '{answer}'")
        told = row.get("segment_metadata", {})
        source = row.get("source_episode_path")
        rows.append(
            _Row(
                LABELS.index(answer),
                task or "",
                prompt,
                told.get("augmentation") == REVERSED,
                _pickle_path(pkl_path, video_root, path),
                None if source is None else (str(path), source),
                told.get("start_step"),
                told.get("success"),
            )
        )
    if not rows:
        raise UserError(f"{path} holds no windows; check the counts that preprocess_qwentrend.py printed")
    return rows


def _pickle_path(pkl_path: str, video_root: str | None, segments: Path) -> Path:
    """RLinf writes absolute paths: right until the dataset moves, when only their last three parts are."""
    root = Path(video_root) if video_root else segments.parent.parent
    path = Path(pkl_path)
    if path.is_absolute() and not path.is_file():
        return root.joinpath(*path.parts[-3:])
    return root / path  # an absolute path stays as it is


def _read_info(segments: Path) -> dict[str, Any]:
    path = segments.parent.parent / "dataset_info.json"
    return load_json(path) if path.is_file() else {}


# ----------------------------------------------------------------------------------------------------
# Batches


class WindowIndices:
    """Endless batches of indices; `balanced`: each label as often as the others that the data hold.

    No window comes twice before all others of its label (not balanced: all others) have come once.
    """

    def __init__(self, labels: np.ndarray, balanced: bool, seed: int):
        rng = np.random.default_rng(seed)
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._rows = Deck(np.arange(len(labels)), rng)
        self._decks = [Deck(group, rng) for group in groups] if balanced else []
        self._turn = 0  # whose label is next: batches of any size are balanced over time

    def draw(self, batch_size: int) -> np.ndarray:
        """(batch_size,) int64."""
        if not self._decks:
            return self._rows.deal(batch_size)
        turns = (self._turn + np.arange(batch_size)) % len(self._decks)
        self._turn = int(turns[-1] + 1) % len(self._decks)
        counts = np.bincount(turns, minlength=len(self._decks))
        return np.concatenate([deck.deal(count) for deck, count in zip(self._decks, counts, strict=True)])


# ----------------------------------------------------------------------------------------------------
# Windows changed

Frames = dict[str, Tensor]  # view -> (B, K, H, W, 3) uint8


def frozen(frames: Frames) -> Frames:
    """The last frame all the time: nothing moves, and only where things stand can be seen."""
    return {view: images[:, -1:].expand_as(images) for view, images in frames.items()}


def some_reversed(frames: Frames, labels: np.ndarray, share: float) -> tuple[Frames, np.ndarray]:
    """About `share` of the windows played backwards, and their labels (B,) turned round: what comes closer
    loses ground, and unclear stays. Right where the label is a difference of the first and the last frame."""
    backwards = np.flatnonzero(torch.rand(len(labels)).numpy() < share)
    if not len(backwards):
        return frames, labels
    turned = {view: images.clone() for view, images in frames.items()}
    for images in turned.values():
        images[backwards] = images[backwards].flip(1)
    labels = labels.copy()
    labels[backwards] = OPPOSITE[labels[backwards]]
    return turned, labels


def shifted(frames: Frames, pixels: int) -> Frames:
    """Each view of each window moved as a whole by up to `pixels`, like a camera that was nudged."""
    if pixels == 0:
        return frames
    moved = {}
    for view, images in frames.items():
        size = images.shape[1]
        flat = images.permute(0, 2, 3, 1, 4).flatten(3)  # (B, H, W, K*3): what a frame has as channels
        moved[view] = random_shift(flat, pixels).unflatten(3, (size, 3)).permute(0, 3, 1, 2, 4)
    return moved
