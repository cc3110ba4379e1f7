"""Frames that an operator labelled while the robot moved: kept at once, made into a data set later.

**Store**: a folder with `labelled_frames.bin`, which only grows. The folder may hold other files.
- A first line of JSON: `format`, `frame_shape` [H, W, 3] and `facts` (`FrameFacts`), true of all frames.
- Then records of one size, little-endian and packed, so that `np.fromfile` reads them too (`record_type`):
  `crc` (u4, CRC-32 of the rest of the record), `label` (i1: 1 success, 0 fail, -1 undo), `episode` and `step`
  (i8), `time` (f8, Unix seconds), `frame` ((H, W, 3) uint8 RGB; zeros in an undo).
- An undo takes back the last frame that still stands.

Each record is on the disk before `FrameStore.add` returns. A dying process or machine leaves at most one torn
record, at the end: too short, or with a wrong checksum. Readers pass over it, the next writer cuts it off. A
wrong checksum anywhere else is a fault of the disk and stops the reader.
"""

import contextlib
import fcntl
import json
import os
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.block_split import split_by_block
from common.files import atomic_write, to_json
from common.payload import PayloadFile
from common.preprocessing import check_alike
from common.runtime import UserError

LOG_NAME, LOCK_NAME = "labelled_frames.bin", "labelled_frames.lock"
FORMAT = "labelled frames, version 1"
UNDO = -1

# ----------------------------------------------------------------------------------------------------
# The store


@dataclass
class FrameFacts:
    """What all frames of a store share."""

    task: str
    render: dict[str, Any] | None  # what the cameras were, as `EnvSpec.render`; only compared for equality
    view: str = "main_images"
    task_description: str | None = None

    def __post_init__(self):
        self.render = json.loads(to_json(self.render))  # as a reader gets it: lists for tuples and arrays


def record_type(frame_shape: tuple[int, ...]) -> np.dtype:
    return np.dtype(
        [
            ("crc", "<u4"),
            ("label", "i1"),
            ("episode", "<i8"),
            ("step", "<i8"),
            ("time", "<f8"),
            ("frame", "u1", tuple(frame_shape)),
        ]
    )


@dataclass
class LabelledFrames:
    """What a store holds: the n frames that stand, in the order in which they were labelled."""

    path: Path
    facts: FrameFacts
    log: np.ndarray  # (num_records,) of `record_type`: all of them, on the disk until touched
    standing: np.ndarray  # (n,) int64, which records count
    size: int  # bytes up to the end of the last whole record

    def __len__(self) -> int:
        return len(self.standing)

    @property
    def label(self) -> np.ndarray:  # (n,) bool, True: success
        return self.log["label"][self.standing] == 1

    @property
    def episode(self) -> np.ndarray:  # (n,) int64
        return self.log["episode"][self.standing]

    @property
    def step(self) -> np.ndarray:  # (n,) int64, rises within an episode
        return self.log["step"][self.standing]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.log.dtype["frame"].shape

    def frame(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.log[self.standing[index]]["frame"]


def read_labelled(folder: str | Path) -> LabelledFrames:
    """The store in `folder`, which may be in use. Raises UserError if there is none or it is damaged."""
    path = Path(folder) / LOG_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no labelled frames ({LOG_NAME}); label some first")
    with path.open("rb") as file:
        header = file.readline()
    try:
        content = json.loads(header)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is '{content['format']}'")
        facts, record = FrameFacts(**content["facts"]), record_type(content["frame_shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no store of {FORMAT} ({error}); use another folder") from error
    count = (path.stat().st_size - len(header)) // record.itemsize
    log = np.memmap(path, record, "r", len(header), (count,)) if count else np.empty(0, record)
    content_bytes = log.view(np.uint8).reshape(count, record.itemsize)[:, record["crc"].itemsize :]
    for index, crc in enumerate(log["crc"].tolist()):
        if zlib.crc32(content_bytes[index]) != crc:
            if index < count - 1:
                raise UserError(
                    f"{path} is damaged in record {index + 1} of {count} (checksum); restore a copy, or keep "
                    f"what is before it: truncate -s {len(header) + index * record.itemsize} {path}"
                )
            log = log[:index]
    standing = []
    for index, label in enumerate(log["label"].tolist()):
        if label == UNDO:
            standing.pop()
        else:
            standing.append(index)
    return LabelledFrames(path, facts, log, np.array(standing, dtype=np.int64), len(header) + log.nbytes)


class FrameStore:
    """Adds labelled frames to the store in `folder`, which is made if need be. A context manager.

    One process at a time may write; readers need not care. `torn_bytes` is what was cut off the end at
    opening: a frame in writing when the last process died.
    """

    def __init__(self, folder: str | Path, facts: FrameFacts):
        """Raises UserError if another process writes there, or if frames of other facts are there."""
        self.folder, self.facts = Path(folder), facts
        self.torn_bytes = 0
        self._path = self.folder / LOG_NAME
        self._file = None  # opened at the first frame: the header tells its size
        self._size = 0  # of the file, up to the end of the last whole record
        self._standing: list[tuple[int, int, int]] = []  # (label, episode, step)
        self._first_episode = 0  # episodes are counted on from where an older run stopped
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK_NAME).open("w")
        except OSError as error:
            raise UserError(f"cannot keep labelled frames in {folder}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._path.exists():
                self._go_on(read_labelled(self.folder))
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"another process is adding frames to {folder}; stop it, or use another folder"
                ) from error
            raise

    @property
    def num_success(self) -> int:
        return sum(label for label, _, _ in self._standing)

    @property
    def num_fail(self) -> int:
        return len(self._standing) - self.num_success

    def add(self, frame: np.ndarray, label: int, episode: int, step: int) -> None:
        """Append a frame (H, W, 3) uint8 RGB, label 1 (success) or 0 (fail); it is on the disk on return.

        `episode` counts the resets of this run, `step` the env steps in it; both only rise, and no step is
        labelled twice unless the first label was undone. Raises UserError for a frame of another size than
        the store's, and if it cannot be written (the store is as before); ValueError for a mistake in code.
        """
        if self._lock.closed:
            raise ValueError(f"the store in {self.folder} is closed; another process may be writing there")
        episode += self._first_episode
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or label not in (0, 1):
            raise ValueError(f"need uint8 (H, W, 3), label 0 or 1; got {frame.dtype} {frame.shape}, {label}")
        if self._standing and (episode, step) <= self._standing[-1][1:]:
            raise ValueError(f"episode, step {episode, step} is no later than {self._standing[-1][1:]}")
        if self._file is None:
            self._create(frame.shape)
        if frame.shape != self._record["frame"].shape:
            raise UserError(
                f"the camera gives frames of {frame.shape}, but {self.folder} holds frames of "
                f"{self._record['frame'].shape}; use another folder, or set the size back"
            )
        self._append(int(label), episode, step, frame)
        self._standing.append((int(label), episode, step))

    def undo(self) -> int | None:
        """Take back the last frame that stands, also an older run's. Returns its label, None without one."""
        if not self._standing:
            return None
        label, episode, step = self._standing[-1]
        self._append(UNDO, episode, step, frame=0)
        self._standing.pop()
        return label

    def close(self) -> None:
        """Let others write. May be called again."""
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def __enter__(self) -> "FrameStore":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- parts ---------------------------------------------------------------------------------------

    def _go_on(self, older: LabelledFrames) -> None:
        for name, value in asdict(older.facts).items():
            ours = getattr(self.facts, name)
            if value != ours:
                raise UserError(
                    f"{self.folder} holds frames with {name} {value}, but this run has {ours}; use another "
                    "folder, or set it back"
                )
        columns = (older.label.astype(int), older.episode, older.step)
        self._standing = list(zip(*(column.tolist() for column in columns), strict=True))
        self._first_episode = max(older.log["episode"].tolist(), default=-1) + 1
        self._open(older.log.dtype, older.size)

    def _create(self, frame_shape: tuple[int, ...]) -> None:
        header = to_json({"format": FORMAT, "frame_shape": frame_shape, "facts": asdict(self.facts)})
        with atomic_write(self._path) as temporary:
            temporary.write_text(header + "\n", encoding="utf-8")
        self._open(record_type(frame_shape), self._path.stat().st_size)

    def _open(self, record: np.dtype, size: int) -> None:
        self._record, self._size = record, size
        self._file = self._path.open("r+b", buffering=0)
        self.torn_bytes = self._path.stat().st_size - size
        self._file.truncate(size)

    def _append(self, label: int, episode: int, step: int, frame: np.ndarray | int) -> None:
        record = np.array((0, label, episode, step, time.time(), frame), self._record)
        record["crc"] = zlib.crc32(record.tobytes()[self._record["crc"].itemsize :])
        left = memoryview(record.tobytes())
        try:
            self._file.seek(self._size)  # over what is left of a record that could not be written
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except BaseException as error:  # Ctrl-C too
            with contextlib.suppress(OSError, ValueError):
                self._file.truncate(self._size)
            if isinstance(error, OSError):
                raise UserError(f"cannot write a labelled frame to {self._path}: {error}") from error
            raise
        self._size += record.nbytes


# ----------------------------------------------------------------------------------------------------
# Data set


def write_payloads(
    folders: list[str | Path],
    out_dir: str | Path,
    val_split: float = 0.2,
    fail_success_ratio: float = 2.0,
    random_seed: int = 42,
    gap_steps: int = 5,
) -> dict[str, Any]:
    """Stores -> `out_dir`/train.pt and val.pt (format: common/payload.py), both or none; older ones go.

    `val_split`: fraction of the frames, see `split_by_block`. Train is cut to `fail_success_ratio` fails per
    success, drawn at random (0: no cut); val stays at the prevalence that the operator met. Returns the
    metadata. Raises UserError, such as where a file would lack a label or stores come from different cameras.
    """
    if not 0 < val_split < 1 or fail_success_ratio < 0 or gap_steps < 2:
        raise UserError(
            f"val_split must be between 0 and 1, fail_success_ratio 0 or more, gap_steps 2 or more (1 would "
            f"let neighbours in); got {val_split}, {fail_success_ratio}, {gap_steps}"
        )
    stores = [read_labelled(folder) for folder in folders]
    _check_mergeable(stores)
    label, step = (np.concatenate([getattr(store, name) for store in stores]) for name in ("label", "step"))
    episode = _episodes(stores)
    whole = split_by_block(episode, step, label, val_split, gap_steps, random_seed)
    cut = {**whole, "train": _cut_fails(whole["train"], label, fail_success_ratio, random_seed)}
    metadata = {
        "num_success_frames": int(label.sum()),
        "num_fail_frames": int((~label).sum()),
        "total_frames": len(label),
        "val_split": val_split,
        "fail_success_ratio": fail_success_ratio,
        "random_seed": random_seed,
        "num_train_samples": len(cut["train"]),
        "num_val_samples": len(cut["val"]),
        "gap_steps": gap_steps,
        "num_gap_frames": len(label) - len(whole["train"]) - len(whole["val"]),
        "frames_before_cut": {split: _count(label[indices]) for split, indices in whole.items()},
        "frames": {split: _count(label[indices]) for split, indices in cut.items()},
        **_origin(stores),
    }
    source = [(store, index) for store in stores for index in range(len(store))]
    try:
        with contextlib.ExitStack() as stack:
            for split, indices in cut.items():
                temporary = stack.enter_context(atomic_write(Path(out_dir) / f"{split}.pt"))
                file = stack.enter_context(PayloadFile(temporary))
                for store, index in (source[i] for i in indices):
                    file.add(store.frame(index))
                own = {
                    "frame_episodes": episode[indices].tolist(),
                    "frame_steps": step[indices].tolist(),
                }
                file.finish(label[indices].astype(int).tolist(), {"split": split, **metadata, **own})
    except OSError as error:
        raise UserError(f"cannot write train.pt and val.pt to {out_dir}: {error}") from error
    return metadata


def _origin(stores: list[LabelledFrames]) -> dict[str, Any]:
    """The part of the metadata that says what the frames show."""
    facts = stores[0].facts
    return {
        "label": "operator",
        "view": facts.view,
        "image_size": list(stores[0].image_shape[:2]),  # [H, W] pixels
        "render": facts.render,
        "tasks": sorted({store.facts.task for store in stores}),
        "task_descriptions": sorted({store.facts.task_description or "" for store in stores} - {""}),
        "stores": {str(store.path.parent): len(store) for store in stores},
    }


def _episodes(stores: list[LabelledFrames]) -> np.ndarray:
    """(n,) int, of all frames of all stores: those of two stores are different episodes."""
    episodes, upto = [], 0
    for store in stores:
        episodes.append(store.episode + upto)
        upto = max(episodes[-1].tolist(), default=upto) + 1
    return np.concatenate(episodes)


def _check_mergeable(stores: list[LabelledFrames]) -> None:
    """UserError if frames look different from store to store, or are in two: then val would be trained on."""
    traits = {
        "image sizes": lambda store: store.image_shape,
        "cameras ('render')": lambda store: store.facts.render,
        "views": lambda store: store.facts.view,
    }
    check_alike(stores, traits)
    seen: dict[tuple[float, int], Path] = {}
    for store in stores:
        stamps = store.log[store.standing][["time", "crc"]].tolist()
        if twice := [seen[stamp] for stamp in stamps if stamp in seen]:
            raise UserError(f"{store.path} holds frames that are also in {twice[0]}; name only one of them")
        seen |= dict.fromkeys(stamps, store.path)


def _cut_fails(train: np.ndarray, label: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Of the frames `train` all successes and at most `int(successes * ratio)` fails (0: all), in order."""
    if ratio == 0:
        return train
    success, fail = train[label[train]], train[~label[train]]
    num_fail = int(len(success) * ratio)
    if num_fail == 0:
        raise UserError(
            f"fail_success_ratio {ratio} would leave no fail frame beside {len(success)} successes; raise it"
        )
    return np.sort(np.concatenate([success, np.random.default_rng(seed).permutation(fail)[:num_fail]]))


def _count(label: np.ndarray) -> dict[str, int]:
    return {"success": int(label.sum()), "fail": int((~label).sum())}


# ----------------------------------------------------------------------------------------------------
# Progress

MIN_BAR_CELLS = 4


def progress_line(num_success: int, target_success: int, num_fail: int, target_fail: int, width: int) -> str:
    """`success: 12/50 [####----]  fail: 28/150 [##------]`, exactly `width` characters.

    Filled up with spaces, so that it covers an older line. Without room for the bars they go, then the
    words, then the targets. A bar is full when the target is met, not before. Give one column less than the
    terminal has: some wrap as soon as the last one is written.
    """
    counts = [(num_success, target_success), (num_fail, target_fail)]
    success, fail = (f"{num}/{target}" for num, target in counts)
    words = f"success: {success}  fail: {fail}"
    cells = (width - len(words) - len(" [] []")) // 2
    if cells >= MIN_BAR_CELLS:
        full = [cells if num >= target else cells * num // target for num, target in counts]
        bars = [f"[{'#' * num}{'-' * (cells - num)}]" for num in full]
        return f"success: {success} {bars[0]}  fail: {fail} {bars[1]}".ljust(width)
    for shorter in (words, f"c {success}  a {fail}", f"{success} {fail}", f"{num_success} {num_fail}"):
        if len(shorter) <= width:
            break
    return shorter.ljust(width)[:width]
