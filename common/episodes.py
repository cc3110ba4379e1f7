"""Episodes on disk. This docstring is the format's only description.

**Episode**: a pickle of one dict, named `rank_{r}_env_{e}_episode_{id}_step_{global}_{success|fail}.pkl`
(older files lack `step_{global}_`). T is the number of actions.

- `rank`, `env_idx`, `episode_id`, `step`: int; `step` is the recorder's global step.
- `success`: bool, of the whole episode (`success_once`).
- `observations`: list of T+1 dicts, the first from the reset: `main_images` (H, W, 3) uint8 RGB,
  `extra_view_images` (V, H, W, 3) or (H, W, 3) uint8 or None, `states` (D,) float32; in place of pictures
  `sim_state` (S,) float32, from which `collect.py --render-from` draws them.
- `actions`: list of T arrays (A,) float32.
- `rewards`, `terminated`, `truncated`, `infos`: lists of T+1. The first entry is the reset's (0.0, False,
  False, {}), so that all align with `observations`.
- `gae`: list of T+1 float, optional: a critic's score of each observation (`common.trend` says what it is).
- `task`, `task_description`: str, optional: env id, and the task in words.
- `render`, `control`: dict or None, optional: what the cameras were; what an action means (control mode
  and rate). Only ever compared for equality.

We write numpy arrays, `extra_view_images` as (1, H, W, 3), always T+1 entries. We also read what RLinf writes
and has written: torch tensors, 0-d or 1-element values for scalars, lists without the reset entry (T each),
`third_view_images`, which then is the extra view.

**Frame label** (`frame_labels`): `infos[t]["success"]`; where that is missing,
`infos[t]["episode"]["success_once"]`; where both are missing, and for the reset frame, fail. Robots write
`in_zone` too: at the target pose now, where `success` waits until it was held for long enough.
"""

import pickle
import queue
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_write, load_pickle
from common.runtime import UserError

VIEWS = ("main_images", "extra_view_images")

# -----------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Episode:
    """One episode as arrays, whatever layout its file had."""

    path: Path
    states: np.ndarray | None  # (T+1, D) float32; None if the observations hold none
    image_shapes: dict[str, tuple[int, int, int]]  # view -> (H, W, 3), all views that the file has
    images: dict[str, np.ndarray]  # view -> (T+1, H, W, 3) uint8, the views asked for
    actions: np.ndarray  # (T, A) float32
    rewards: np.ndarray  # (T+1,) float32, [0] is the reset's 0
    gae: np.ndarray | None  # (T+1,) float32
    terminated: np.ndarray  # (T+1,) bool
    truncated: np.ndarray  # (T+1,) bool
    success: np.ndarray  # (T+1,) bool, each frame's own truth
    infos: list[dict]  # T+1
    success_once: bool  # the file's `success`
    task: str | None
    task_description: str | None
    render: dict | None
    control: dict | None
    layout: str  # "T+1", or "T": the file had no reset entries
    env_idx: int
    episode_id: int
    step: int

    @property
    def length(self) -> int:
        """T, the number of actions."""
        return len(self.actions)


def list_episodes(folder: str | Path) -> list[Path]:
    """All `*.pkl` under `folder`, sorted. Raises UserError if there is no such folder or nothing in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"episode folder {folder} does not exist")
    paths = sorted(folder.rglob("*.pkl"))
    if not paths:
        raise UserError(f"no episodes (*.pkl) in {folder}; collect some first")
    return paths


def read_episode(path: str | Path, views: tuple[str, ...] | None = ("main_images",)) -> Episode:
    """The episode in `path` with the frames of `views` (None: of all it has).

    Raises UserError naming the file and the reason if it cannot be read, breaks the format, or lacks a view.
    """
    path = Path(path)
    record = _Record(path, load_pickle(path))
    shapes = record.image_shapes()
    times = range(record.length + 1)
    images = {view: np.stack(record.frames(view, times)) for view in (shapes if views is None else views)}
    states = [observation.get("states") for observation in record.observations]
    return Episode(
        path=path,
        states=None if states[0] is None else record.stack("states", states, np.float32),
        image_shapes=shapes,
        images=images,
        actions=record.stack("actions", record.data["actions"], np.float32),
        rewards=record.scalars("rewards", 0.0, np.float32),
        gae=record.gae(),
        terminated=record.scalars("terminated", False, bool),
        truncated=record.scalars("truncated", False, bool),
        success=record.labels(),
        infos=record.infos,
        success_once=bool(record.scalar("success")),
        task=record.data.get("task"),
        task_description=record.data.get("task_description"),
        render=record.data.get("render"),
        control=record.data.get("control"),
        layout=record.layout,
        **{key: int(record.scalar(key)) for key in ("env_idx", "episode_id", "step")},
    )


def read_frames(path: str | Path, view: str, indices: Iterable[int]) -> list[np.ndarray]:
    """Frames `indices` (in 0..T) of one view, each (H, W, 3) uint8. Raises like `read_episode`."""
    path = Path(path)
    return _Record(path, load_pickle(path)).frames(view, indices)


class _Record:
    """An episode's dict, checked, with its lists brought to T+1 entries."""

    def __init__(self, path: Path, data: Any):
        self.path = path
        if not isinstance(data, dict):
            raise self.error(f"holds a {type(data).__name__} where an episode's dict is expected")
        lists = ("observations", "actions", "rewards", "terminated", "truncated", "infos")
        if missing := [key for key in ("success", *lists) if key not in data]:
            raise self.error(f"lacks the key {', '.join(missing)}")
        if wrong := [key for key in lists if not isinstance(data[key], list)]:
            raise self.error(f"has {wrong[0]} as {type(data[wrong[0]]).__name__}, where a list is expected")
        self.data = data
        self.observations: list[dict] = data["observations"]
        self.length = len(data["actions"])
        sizes = {key: len(data[key]) for key in lists[2:]}
        aligned = set(sizes.values()) in ({self.length}, {self.length + 1})
        if not aligned or len(self.observations) != self.length + 1:
            raise self.error(
                f"has {self.length} actions, {len(self.observations)} observations and "
                + ", ".join(f"{count} {key}" for key, count in sizes.items())
                + "; expected T, T+1 and T+1 (or T) of each"
            )
        self.layout = "T" if len(data["rewards"]) == self.length else "T+1"
        self.infos: list[dict] = [{}] * (self.layout == "T") + data["infos"]
        for key, entries in (("observations", self.observations), ("infos", self.infos)):
            if wrong := [type(entry).__name__ for entry in entries if not isinstance(entry, dict)]:
                raise self.error(f"has a {wrong[0]} among its {key}, where dicts are expected")

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.path} {reason}")

    def stack(self, key: str, values: list, dtype: type) -> np.ndarray:
        if not values:
            return np.empty((0, 0), dtype)
        try:
            return np.stack([np.asarray(value) for value in values]).astype(dtype, copy=False)
        except (ValueError, TypeError) as error:
            raise self.error(f"has unusable {key}: {error}") from error

    def scalars(self, key: str, reset: float | bool, dtype: type) -> np.ndarray:
        values = [reset] * (self.layout == "T") + self.data[key]
        try:
            return np.array([_scalar(value) for value in values], dtype=dtype)
        except (ValueError, TypeError) as error:
            raise self.error(f"has unusable {key}: {error}") from error

    def gae(self) -> np.ndarray | None:
        """(T+1,) float32. A list of T, one per action, is brought to T+1 by repeating its last value."""
        values = self.data.get("gae")
        if values is None:
            return None
        try:
            score = np.array([_scalar(value) for value in values], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise self.error(f"has unusable gae: {error}") from error
        if len(score) not in (self.length, self.length + 1):
            raise self.error(f"has {len(score)} gae for {self.length} actions; expected T or T+1")
        return np.append(score, score[-1]) if 0 < len(score) == self.length else score

    def scalar(self, key: str) -> float | int | bool:
        try:
            return _scalar(self.data.get(key, 0))
        except (ValueError, TypeError) as error:
            raise self.error(f"has unusable {key}: {error}") from error

    def labels(self) -> np.ndarray:
        try:
            return frame_labels(self.infos)
        except (ValueError, TypeError) as error:
            raise self.error(str(error)) from error

    def image(self, index: int, view: str) -> np.ndarray | None:
        """(H, W, 3) uint8, or None if the observation has no such view."""
        observation = self.observations[index]
        image = observation.get(view)
        if view == "extra_view_images":
            image = observation.get("third_view_images", image)
        if image is None:
            return None
        image = np.asarray(image)
        if image.ndim == 4 and view == "extra_view_images" and len(image):
            image = image[0]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise self.error(
                f"has {view} of {image.dtype} {image.shape} in observation {index}; need uint8 RGB (H, W, 3)"
            )
        return image

    def image_shapes(self) -> dict[str, tuple[int, int, int]]:
        shapes = {}
        for view in VIEWS:
            found = Counter(
                None if (image := self.image(index, view)) is None else image.shape
                for index in range(len(self.observations))
            )
            if len(found) > 1:
                met = ", ".join(f"{count} x {shape or 'none'}" for shape, count in found.items())
                raise self.error(f"has {view} that differ within the episode: {met}")
            (shape,) = found
            if shape is not None:
                shapes[view] = shape
        return shapes

    def frames(self, view: str, indices: Iterable[int]) -> list[np.ndarray]:
        images = [self.image(index, view) for index in indices]
        if any(image is None for image in images):
            raise self.error(f"has no view {view}; it has {', '.join(self.image_shapes()) or 'no images'}")
        return images


def frame_labels(infos: list[dict], label: str = "success", required: bool = False) -> np.ndarray:
    """Each frame's own label: (T+1,) bool, from T+1 step infos, by the rule in this module's docstring.

    The second source (`episode.success_once`) serves the label `success` alone. Raises ValueError if a label
    is not one value, or, where `required`, if no info after the reset's has one.
    """
    values = [info.get(label) for info in infos]
    if label == "success":
        values = [
            (info.get("episode") or {}).get("success_once") if value is None else value
            for info, value in zip(infos, values, strict=True)
        ]
    if required and all(value is None for value in values[1:]):
        keys = sorted({str(key) for info in infos for key in info})
        raise ValueError(f"has no '{label}' in its step infos, only {', '.join(keys) or 'empty ones'}")
    labels = np.array([value is not None and bool(_scalar(value)) for value in values], dtype=bool)
    if label == "success":
        labels[0] = False  # an env that resets itself may still tell of the episode before
    return labels


def _scalar(value: Any) -> float | int | bool:
    """The Python number in a plain, numpy or torch value of one element. Raises ValueError if it has more."""
    return value if isinstance(value, bool | int | float) else np.asarray(value).item()


# -----------------------------------------------------------------------------------------------------------
# Writing


def episode_name(rank: int, env_idx: int, episode_id: int, step: int, success: bool) -> str:
    """The reference's file name."""
    outcome = "success" if success else "fail"
    return f"rank_{rank}_env_{env_idx}_episode_{episode_id}_step_{step}_{outcome}.pkl"


def write_episode(folder: str | Path, episode: dict) -> Path:
    """Write the dict of one episode into `folder`, whole or not at all, and return the path.

    The dict is in the format above but may hold torch tensors. Raises ValueError if it breaks the format and
    TypeError for a value of another kind: what is written can be read.
    """
    episode = _to_numpy(episode)
    path = Path(folder) / episode_name(
        *(episode[key] for key in ("rank", "env_idx", "episode_id", "step", "success"))
    )
    try:
        record = _Record(path, episode)
        record.image_shapes()
    except UserError as error:
        raise ValueError(str(error)) from error
    if record.layout != "T+1":
        raise ValueError(f"{path} lacks the reset entries of rewards, terminated, truncated and infos")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        pickle.dump(episode, file, protocol=4)  # the reference's
    return path


def _to_numpy(value: Any) -> Any:
    """`value`, its torch tensors as numpy arrays. Raises TypeError for what `load_pickle` would refuse."""
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_numpy(item) for item in value)
    if isinstance(value, np.ndarray | np.generic | bool | int | float | str | None):
        return value
    torch = sys.modules.get("torch")  # where nobody imported it, nothing is a tensor
    if torch and isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    raise TypeError(
        f"an episode cannot hold a {type(value).__name__}; only arrays, numbers, strings, lists and dicts"
    )


class EpisodeWriter:
    """Writes episodes from a thread of its own, so that the caller goes on stepping.

    A context manager; leaving it, by Ctrl-C too, writes what is waiting. An error of the thread (a full disk)
    is raised in the caller at its next `put` or `close`; episodes that were waiting then are lost.
    """

    def __init__(self, folder: str | Path, max_pending: int = 16):
        """`max_pending`: episodes that may wait (memory); with more, `put` blocks."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_written = 0
        self._next_id = _next_episode_ids(self.folder)
        self._waiting: queue.Queue[dict | None] = queue.Queue(max_pending)
        self._error: Exception | None = None
        # daemon: a second Ctrl-C during `close` must end the program, and no file is ever half there
        self._thread = threading.Thread(target=self._write_all, name="episode-writer", daemon=True)
        self._thread.start()

    def put(self, episode: dict) -> int:
        """Hand over an episode's dict; it and its arrays must not be changed afterwards.

        Sets `episode_id` to the next one free for this rank and env in the folder, and returns it.
        """
        if not self._thread.is_alive():
            raise ValueError("this EpisodeWriter is closed")
        self._raise_error()
        key = (int(episode["rank"]), int(episode["env_idx"]))
        episode_id = self._next_id[key]
        self._next_id[key] += 1
        self._waiting.put({**episode, "episode_id": episode_id})
        return episode_id

    def flush(self) -> None:
        """Return once all that was put is on the disk."""
        self._waiting.join()
        self._raise_error()

    def close(self) -> None:
        """Write what is waiting, then stop. May be called again."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._raise_error()

    def __enter__(self) -> "EpisodeWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write_all(self) -> None:
        while (episode := self._waiting.get()) is not None:
            try:
                if self._error is None:  # else keep emptying the queue, or the caller would wait for ever
                    write_episode(self.folder, episode)
                    self.num_written += 1
            except Exception as error:  # whatever it is, it belongs to the caller
                self._error = error
            self._waiting.task_done()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise UserError(f"cannot write episodes to {self.folder}: {error}") from error
            raise error


def _next_episode_ids(folder: Path) -> Counter:
    """(rank, env_idx) -> the id after the largest in `folder`; 0 where there is none."""
    next_id = Counter()
    for path in folder.glob("*.pkl"):
        if match := re.match(r"rank_(\d+)_env_(\d+)_episode_(\d+)_", path.name):
            rank, env_idx, episode_id = map(int, match.groups())
            next_id[rank, env_idx] = max(next_id[rank, env_idx], episode_id + 1)
    return next_id
