"""The trend of a short window of frames: which windows an episode has, and what each is labelled.

A window is `window_size` consecutive frames. With a score per frame that rises as the task advances, its
label is the sign of `score[last] - score[first]`: `positive`, `negative`, or `unclear` where the change is
within +- `delta_threshold`. Windows and labels follow RLinf's QwenTrend; the scores:

- `gae`: (1 - gamma) times the lambda-return of a critic, written into the episode by rl_train.py
  (`data_collection.gae_gamma`): a smoothed reward, in units of the env reward per step.
- `success_distance`: minus the metres that are left to success, by the task's geometry (`common.geometry`).
- `rewards`: the env reward. A dense reward that is gated (PushCube's says nothing while the cube is pushed)
  makes poor labels.

**Choose the threshold by the horizon**: `delta_threshold` times the number of non-overlapping windows of an
episode should reach the whole range of the score, or crawling, just fast enough to be positive, is paid best.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from common.episodes import Episode
from common.runtime import UserError

LABELS = ("positive", "negative", "unclear")
POSITIVE, NEGATIVE, UNCLEAR = range(3)
OPPOSITE = np.array([NEGATIVE, POSITIVE, UNCLEAR])  # of a window that is played backwards

FRAME_KEYS = {"main_images": "main_frames", "extra_view_images": "extra_view_frames"}  # view -> key in a file
REVERSED = "reverse_positive"  # `augmentation` of a positive window that is played backwards as a negative

ScoreSource = Literal["auto", "gae", "success_distance", "rewards"]


def window_starts(num_frames: int, window_size: int, stride: int = 1, keep_last: bool = True) -> np.ndarray:
    """(n,) int: first frames of an episode's windows, rising; none where it is shorter than a window.

    Every `stride`-th one; `keep_last`: the episode's last window is among them either way.
    """
    last = num_frames - window_size
    if last < 0:
        return np.zeros(0, dtype=int)
    starts = np.arange(0, last + 1, stride)
    return np.append(starts, last) if keep_last and starts[-1] != last else starts


def evenly_spaced(count: int, num_samples: int, keep_last: bool = True) -> np.ndarray:
    """(n,) int, rising: which of an episode's `count` windows to take, all where `num_samples` is 0.

    `keep_last`: the last one is among them.
    """
    if not 0 < num_samples < count:
        return np.arange(count)
    if keep_last:
        chosen = count - 1 - np.linspace(0, count - 1, num_samples)[::-1]
    else:
        chosen = np.linspace(0, count - 1, num_samples, endpoint=False)
    return np.unique(chosen.astype(int))


def episode_score(episode: Episode, source: ScoreSource) -> tuple[np.ndarray, str]:
    """(score (T+1,) float64, which source it is); `auto` takes the first that the episode has.

    The reset entry of rewards is no reward, so frame 0 takes the score of frame 1 there. UserError naming the
    episode where it lacks the source.
    """
    if source in ("auto", "gae") and episode.gae is not None:
        return episode.gae.astype(np.float64), "gae"
    if source in ("auto", "success_distance"):
        distance = [info.get("success_distance") for info in episode.infos]
        if all(value is not None for value in distance[1:]) and len(distance) > 1:
            distance[0] = distance[1] if distance[0] is None else distance[0]
            return -np.array([np.asarray(value).item() for value in distance]), "success_distance"
    if source in ("auto", "rewards"):
        score = episode.rewards.astype(np.float64)
        if len(score) > 1:
            score[0] = score[1]
        return score, "rewards"
    raise UserError(
        f"{episode.path} holds no {source} to label windows by; collect with a version that writes it, or "
        "choose another score source"
    )


def trend_labels(delta: np.ndarray, delta_threshold: float) -> np.ndarray:
    """Index into LABELS, of any shape, of the score's change over each window."""
    delta = np.asarray(delta)
    return np.where(np.abs(delta) <= delta_threshold, UNCLEAR, np.where(delta > 0, POSITIVE, NEGATIVE))


def window_labels(
    score: np.ndarray, starts: np.ndarray, window_size: int, delta_threshold: float, tail_unclear_ratio: float
) -> np.ndarray:
    """(n,) index into LABELS for the windows that begin at `starts`, which are all that the episode has.

    From number `int(n * (1 - tail_unclear_ratio))` on they are unclear whatever the score says: RLinf's rule
    for scores that jump at success. It takes the moment of success out of the positives; 0 leaves it in.
    """
    labels = trend_labels(score[starts + window_size - 1] - score[starts], delta_threshold)
    labels[int(len(starts) * (1.0 - tail_unclear_ratio)) :] = UNCLEAR
    return labels


# ----------------------------------------------------------------------------------------------------
# Many windows


@dataclass
class Windows:
    """Windows named by episode (index) and first frame, in that order."""

    episode: np.ndarray  # (n,) int
    start: np.ndarray  # (n,) int
    label: np.ndarray  # (n,) int, index into LABELS
    reversed: np.ndarray  # (n,) bool, played backwards

    def __len__(self) -> int:
        return len(self.episode)

    def __getitem__(self, chosen: np.ndarray) -> "Windows":
        return Windows(self.episode[chosen], self.start[chosen], self.label[chosen], self.reversed[chosen])

    def count(self) -> dict[str, dict[str, int]]:
        """Source -> label -> number of windows."""
        return {
            source: {
                name: int(((self.label == label) & (self.reversed == backwards)).sum())
                for label, name in enumerate(LABELS)
            }
            for source, backwards in (("natural", False), ("reversed", True))
        }


def list_windows(
    scores: list[np.ndarray],
    window_size: int,
    stride: int,
    num_samples: int,
    keep_last: bool,
    delta_threshold: float,
    tail_unclear_ratio: float,
) -> Windows:
    """All natural windows of episodes with these scores (T+1,), or `num_samples` of each.

    See `window_starts`, `window_labels`, `evenly_spaced`.
    """
    starts, labels = [], []
    for score in scores:
        start = window_starts(len(score), window_size, stride, keep_last)
        label = window_labels(score, start, window_size, delta_threshold, tail_unclear_ratio)
        chosen = evenly_spaced(len(start), num_samples, keep_last)
        starts.append(start[chosen])
        labels.append(label[chosen])
    episode = np.repeat(np.arange(len(scores)), [len(start) for start in starts])
    start = np.concatenate(starts)
    return Windows(episode, start, np.concatenate(labels), np.zeros(len(start), dtype=bool))


def with_reversed(windows: Windows) -> Windows:
    """Each positive window followed by its copy that plays backwards, a negative one."""
    index = np.repeat(np.arange(len(windows)), 1 + (windows.label == POSITIVE))
    is_copy = np.append(False, index[1:] == index[:-1])
    out = windows[index]
    return replace(out, label=np.where(is_copy, NEGATIVE, out.label), reversed=is_copy)


def cut(windows: Windows, balance: bool, cap: int | None, rng: np.random.Generator) -> Windows:
    """At most `cap` windows of each label, and `balance`: as many as of the rarest that there is."""
    counts = np.bincount(windows.label, minlength=len(LABELS))
    most = min(cap or len(windows), counts[counts > 0].min() if balance else len(windows))
    kept = [rng.permutation(np.flatnonzero(windows.label == label))[:most] for label in range(len(LABELS))]
    return windows[np.sort(np.concatenate(kept))]
