"""The numbers of a success classifier's report card: what its scores on held-out frames are worth, and how
sure that is.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common import metrics
from common.baselines import Comparison, compare, guess
from common.frames import FrameSet
from common.intervals import (
    Interval,
    draw_episodes,
    interval_of,
    per_episode,
    resampled_ranking,
    share_interval,
    wider,
)
from common.rewards import reaches

NUM_WORST = 6  # frames of each kind, each of another episode


@dataclass
class ScoredFrames:
    """What the card is made of. Episodes are numbered 0..E-1; None where the data do not tell them."""

    success_prob: np.ndarray  # (B,) float64
    label: np.ndarray  # (B,) bool
    weight: np.ndarray  # (B,) float64, see `FrameSet.weight`
    episode: np.ndarray | None  # (B,) int64
    step: np.ndarray | None  # (B,) int64
    brightness: np.ndarray  # (B, V) float64, mean of each view
    whole: bool = False  # no frame of the episodes is missing

    @classmethod
    def of(cls, frames: FrameSet, success_prob: np.ndarray) -> "ScoredFrames":
        episode = None if frames.episode is None else np.unique(frames.episode, return_inverse=True)[1]
        brightness = [image.float().mean((-3, -2, -1)).reshape(-1).numpy() for image in frames.images]
        return cls(
            np.asarray(success_prob, dtype=np.float64),
            frames.labels,
            frames.weight,
            episode,
            frames.step,
            np.array(brightness, dtype=np.float64),
            frames.whole,
        )

    @property
    def num_episodes(self) -> int | None:
        return None if self.episode is None else int(self.episode.max()) + 1


# ----------------------------------------------------------------------------------------------------
# Numbers


def frame_card(scored: ScoredFrames, threshold: float) -> dict[str, Any]:
    """All numbers of the card.

    `scores`: name -> {"value", "interval"}; intervals are [low, high] or null (`common.intervals`), that of
    precision as wide as the false-positive rate's allows.
    `confusion`: counts of frames as they are in the data; everything else weighs them (`FrameSet.weight`).
    `baselines`: what the clock, the light and a constant reach by AUPRC.
    """
    prob, label, weight = scored.success_prob, scored.label, scored.weight
    plain = metrics.counts_at(prob, label, threshold)
    episode = np.zeros(len(label), dtype=np.int64) if scored.episode is None else scored.episode
    drawn = draw_episodes(scored.num_episodes or 1)  # none of a single one
    area, pairs = resampled_ranking(prob, label, weight, episode, drawn)
    counts = metrics.counts_at(prob, label, threshold, weight)
    error, errors = _calibration(scored, episode, drawn)
    scores = {
        "auprc": _entry(metrics.auprc(prob, label, weight), interval_of(area)),
        "roc_auc": _entry(metrics.roc_auc(prob, label, weight), interval_of(pairs)),
        "calibration_error": _entry(error, interval_of(errors)),
        **_shares(scored, threshold, counts, episode, drawn),
    }
    if scored.whole and scored.episode is not None and scored.step is not None:
        scores |= _rank_episodes(scored, drawn)
    baselines = _baselines(scored, (scores["auprc"]["value"], area), episode, drawn)
    return {
        "num_frames": len(label),
        "num_episodes": scored.num_episodes,
        "prevalence": float(np.average(label, weights=weight)),
        "threshold": threshold,
        "scores": scores,
        "confusion": asdict(plain),
        "calibration": _reliability(scored),
        "baselines": [row._asdict() for row in baselines],
        "beats_baselines": all(row.beaten for row in baselines),
    }


def _entry(value: float, interval: Interval) -> dict[str, Any]:
    return {"value": value, "interval": interval}


def _shares(
    scored: ScoredFrames,
    threshold: float,
    counts: metrics.Counts,
    episode: np.ndarray,
    drawn: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """Precision, recall and false-positive rate at the threshold."""
    called = reaches(scored.success_prob, threshold)
    label, weight = scored.label, scored.weight
    cells = (called & label, called & ~label, ~called & label, ~called & ~label)
    sums = per_episode(episode, drawn.shape[1], *(cell * weight for cell in cells))  # (E, 4)
    shares = {}
    for name, value, (part, rest) in (
        ("precision", counts.precision, (0, 1)),
        ("recall", counts.recall, (0, 2)),
        ("false_positive_rate", counts.fp_per_1000 / 1000, (1, 3)),
    ):
        known = len(drawn) > 0  # which frames are of one episode, and there are enough of them
        interval = share_interval(sums[:, part], sums[:, part] + sums[:, rest], drawn) if known else None
        shares[name] = _entry(value, interval)
    ends, (_, highest) = shares["precision"]["interval"], shares["false_positive_rate"]["interval"] or (0, 0)
    if ends is not None:
        # were as many failures called as their own interval allows; a failure that was kept stands for others
        low = float(metrics.precision_at(counts.true_positives, highest, weight[~label].sum()))
        shares["precision"]["interval"] = wider(ends, (low, low))
    return shares


def _calibration(scored: ScoredFrames, episode: np.ndarray, drawn: np.ndarray) -> tuple[float, np.ndarray]:
    """(expected calibration error, the same of the resamples (R,))."""
    num_episodes, bins = drawn.shape[1], metrics.NUM_BINS
    cell = episode * bins + metrics.calibration_bins(scored.success_prob)
    weight = scored.weight
    sums = [
        np.bincount(cell, column, num_episodes * bins).reshape(num_episodes, bins)
        for column in (weight, weight * scored.success_prob, weight * scored.label)
    ]
    error = metrics.calibration_error(*(column.sum(0) for column in sums))
    return float(error), metrics.calibration_error(*(drawn @ column for column in sums))


def _reliability(scored: ScoredFrames) -> list[dict[str, float]]:
    """A row per bin that holds frames: their share, the mean probability said, the share of successes."""
    bins, rows = metrics.calibration_bins(scored.success_prob), []
    for place in np.unique(bins):
        held = bins == place
        rows.append(
            {
                "share": float(scored.weight[held].sum() / scored.weight.sum()),
                "said": float(np.average(scored.success_prob[held], weights=scored.weight[held])),
                "came_true": float(np.average(scored.label[held], weights=scored.weight[held])),
            }
        )
    return rows


def _rank_episodes(scored: ScoredFrames, drawn: np.ndarray) -> dict[str, dict[str, Any]]:
    """Kendall's tau-b of episodes: the highest score against success at any frame, which per-step rewards
    depend on, and the last score against success in the last frame, which terminal ones do. Whole episodes
    only: in what preprocessing left of one, the highest score and success may be missing.
    """
    order = np.lexsort((scored.step, scored.episode))
    first = np.flatnonzero(np.diff(scored.episode[order], prepend=-1))
    last = np.append(first[1:], len(order)) - 1
    prob, label = scored.success_prob[order], scored.label[order]
    columns = {
        "kendall_once": (np.maximum.reduceat(prob, first), np.logical_or.reduceat(label, first)),
        "kendall_at_end": (prob[last], label[last]),
    }
    return {name: metrics.kendall_of_episodes(*column, drawn) for name, column in columns.items()}


def _baselines(
    scored: ScoredFrames, model: tuple[float, np.ndarray], episode: np.ndarray, drawn: np.ndarray
) -> list[Comparison]:
    label, weight = scored.label, scored.weight
    guesses = {"constant": np.zeros(len(label))}
    if scored.step is not None:
        guesses["frame index alone"] = guess(scored.step[:, None], label, scored.episode, 2)[:, 1]
    guesses["brightness alone"] = guess(scored.brightness, label, scored.episode, 2)[:, 1]
    return [
        compare(
            name,
            model,
            (metrics.auprc(score, label, weight), resampled_ranking(score, label, weight, episode, drawn)[0]),
        )
        for name, score in guesses.items()
    ]


def worst(scored: ScoredFrames, label: bool) -> np.ndarray:
    """Frames whose truth is `label` and whose score is furthest from it, worst first, one of each episode."""
    frames = np.flatnonzero(scored.label == label)
    order = frames[np.argsort(scored.success_prob[frames] * (1 if label else -1), kind="stable")]
    if scored.episode is not None:
        order = order[np.sort(np.unique(scored.episode[order], return_index=True)[1])]
    return order[:NUM_WORST]
