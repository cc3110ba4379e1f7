"""How sure a figure is: 95 % intervals, by drawing episodes anew.

Frames of one episode look alike: fifty of them are nearer to one observation than to fifty. So the bootstrap
draws whole episodes, with replacement (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapters 8 and 13), and what it says is how far the figure would move with other episodes of the same kind.
Where no episode holds a mistake it cannot imagine one; Wilson's interval can, and there too an episode counts
once.
"""

import numpy as np
from numpy.typing import ArrayLike

NUM_RESAMPLES = 1000
MIN_EPISODES = 5  # fewer say nothing about others
CHUNK_BYTES = 1 << 25  # of the weights of all frames in several resamples, at once in memory

Interval = tuple[float, float] | None


def draw_episodes(num_episodes: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """(R, E) int64: how often each episode is in each resample; the same at every call."""
    drawn = np.random.default_rng(0).multinomial(
        num_episodes, np.full(num_episodes, 1 / num_episodes), num_resamples
    )
    return drawn if num_episodes >= MIN_EPISODES else drawn[:0]


def interval_of(values: np.ndarray) -> Interval:
    """The middle 95 % of a figure's resampled values (R,), those that are no number left out.

    None without any: too few episodes, or a figure that is not defined there.
    """
    values = values[np.isfinite(values)]
    return tuple(np.quantile(values, [0.025, 0.975]).tolist()) if len(values) else None


def wilson_lower_bound(hits: ArrayLike, trials: ArrayLike, z: float = 1.645) -> np.ndarray:
    """Lower end of Wilson's score interval of hits / trials (z 1.645: 95 % one-sided); 0 without trials.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    hits, trials = np.asarray(hits, float), np.asarray(trials, float)
    some = np.maximum(trials, 1)
    share = hits / some
    centre = share + z * z / (2 * some)
    spread = z * np.sqrt(share * (1 - share) / some + z * z / (4 * some * some))
    return np.where(trials > 0, (centre - spread) / (1 + z * z / some), 0.0)


def wilson_interval(share: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of `trials`; (0, 1) without trials."""
    hits = share * trials
    low, miss = (float(wilson_lower_bound(count, trials, z)) for count in (hits, trials - hits))
    return max(low, 0.0), min(1 - miss, 1.0)


def wider(first: Interval, second: Interval) -> Interval:
    """What holds both; None where either is."""
    if first is None or second is None:
        return None
    return min(first[0], second[0]), max(first[1], second[1])


def num_trials(weight: np.ndarray) -> float:
    """How many episodes of equal weight those of `weight` (E,) are worth, (sum w)^2 / sum w^2 (Kish, "Survey
    Sampling", 1965): as many trials as their frames are together, where an episode is all right or all wrong.
    """
    return float(weight.sum() ** 2 / max((weight**2).sum(), 1e-12))


def share_interval(hits: np.ndarray, trials: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """95 % interval of the share of hits among frames: hits, trials (E,) sums over each episode's frames (or
    of their weights), drawn (R, E).

    What holds the bootstrap's interval and Wilson's, in which an episode is a trial; that alone where there
    are too few episodes to draw from, or no frames.
    """
    share, total = hits.sum() / max(trials.sum(), 1e-12), drawn @ trials
    resampled = interval_of((drawn @ hits)[total > 0] / total[total > 0])
    of_counts = wilson_interval(share, num_trials(trials))
    return wider(resampled, of_counts) or of_counts


def resampled_ranking(
    score: np.ndarray, label: np.ndarray, weight: np.ndarray, episode: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(AUPRC (R,), ROC-AUC (R,)) of the resamples `drawn` (R, E); nan where one lacks a class.

    score, label (bool), weight, episode (index below E): (B,). The same numbers as scikit-learn's
    average_precision_score and roc_auc_score with sample weights, which take minutes for a thousand of them.
    """
    order = np.argsort(-score, kind="stable")
    label, weight, episode = label[order], weight[order], episode[order]
    last_of_ties = np.flatnonzero(np.diff(score[order], append=-np.inf))  # equal scores share a threshold
    auprc, roc_auc = [np.empty(0)], [np.empty(0)]
    size = max(1, CHUNK_BYTES // (8 * len(score)))
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, len(drawn), size):
            drawn_weight = weight * drawn[start : start + size, episode]  # (r, B)
            hits = (drawn_weight * label).cumsum(1)[:, last_of_ties]
            misses = (drawn_weight * ~label).cumsum(1)[:, last_of_ties]
            recall, false_rate = hits / hits[:, -1:], misses / misses[:, -1:]
            precision = np.nan_to_num(hits / (hits + misses))
            auprc.append((np.diff(recall, prepend=0) * precision).sum(1))
            before = np.pad(recall, ((0, 0), (1, 0)))[:, :-1]
            roc_auc.append((np.diff(false_rate, prepend=0) * (recall + before) / 2).sum(1))
    return np.concatenate(auprc), np.concatenate(roc_auc)


def per_episode(episode: np.ndarray, num_episodes: int, *columns: np.ndarray) -> np.ndarray:
    """(E, len(columns)) float64: each episode's sums of the columns (B,). `drawn @` it sums the resamples."""
    return np.stack([np.bincount(episode, column, num_episodes) for column in columns], axis=1)
