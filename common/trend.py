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

from typing import Literal

import numpy as np

from common.episodes import Episode
from common.runtime import UserError

LABELS = ("positive", "negative", "unclear")
POSITIVE, NEGATIVE, UNCLEAR = range(3)

ScoreSource = Literal["auto", "gae", "success_distance", "rewards"]


def window_starts(
    num_frames: int, window_size: int, stride: int = 1, num_samples: int = 0, keep_last: bool = True
) -> np.ndarray:
    """(n,) int: first frames of an episode's windows, rising; none where it is shorter than a window.

    Every `stride`-th one, or `num_samples` of those, evenly spaced; `keep_last`: the episode's last window is
    among them either way.
    """
    last = num_frames - window_size
    if last < 0:
        return np.zeros(0, dtype=int)
    starts = np.arange(0, last + 1, stride)
    if keep_last and starts[-1] != last:
        starts = np.append(starts, last)
    if 0 < num_samples < len(starts):
        chosen = np.linspace(0, len(starts) - (0 if keep_last else 1), num_samples, endpoint=False)
        if keep_last:
            chosen = len(starts) - 1 - np.linspace(0, len(starts) - 1, num_samples)[::-1]
        starts = starts[np.unique(chosen.astype(int))]
    return starts


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
    """(n,) index into LABELS for the windows that begin at `starts`.

    The last `int(n * tail_unclear_ratio)` windows are unclear whatever the score says: RLinf's rule, for
    scores that jump at success. It takes the moment of success out of the positives; 0 leaves it in.
    """
    labels = trend_labels(score[starts + window_size - 1] - score[starts], delta_threshold)
    num_tail = int(len(starts) * tail_unclear_ratio)
    if num_tail:
        labels[-num_tail:] = UNCLEAR
    return labels
