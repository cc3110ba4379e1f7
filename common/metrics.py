"""What a reward model's scores are worth: ranking quality, counts at a threshold, and how a threshold is
chosen.

Everything takes `success_prob` (B,) in [0, 1] and `label` (B,) bool, one entry per frame, as numpy arrays or
CPU tensors. False positives come first everywhere: an RL policy seeks out exactly the frames that a reward
model wrongly takes for success, so a threshold is chosen by what it lets through, and recall is what is left.

`weight` (B,): how many frames of the world each one stands for, where the data were thinned out by label
(`FrameSet.weight`); None: each for itself.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from common.intervals import Interval, draw_episodes, interval_of, num_trials, wilson_lower_bound
from common.rewards import reaches
from common.runtime import UserError

NUM_THRESHOLDS = 200  # resamples of a threshold's interval: at each of them the rule is followed anew


@dataclass(frozen=True)
class Counts:
    """Verdicts against the truth. A ratio with nothing in its denominator is 0."""

    true_positives: float  # whole numbers unless frames are weighted
    false_positives: float
    false_negatives: float
    true_negatives: float

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.false_positives)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.false_negatives)

    @property
    def fp_per_1000(self) -> float:
        """False positives per 1,000 frames that are no success (1,000 times the false-positive rate)."""
        return 1000 * _ratio(self.false_positives, self.true_negatives)

    @property
    def accuracy(self) -> float:
        right = self.true_positives + self.true_negatives
        return _ratio(right, self.false_positives + self.false_negatives)


def _ratio(part: float, rest: float) -> float:
    return part / (part + rest) if part else 0.0


def auprc(success_prob: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Area under the precision-recall curve (average precision). Needs both classes, else ValueError.

    The measure that checkpoints are chosen by: successes are rare, and unlike ROC-AUC it does not drown false
    positives in the many easy failures.
    """
    from sklearn.metrics import (
        average_precision_score,
    )  # slow to import, and most scripts never rank anything

    success_prob, label = _scores(success_prob, label)
    area = average_precision_score(label, success_prob, sample_weight=weight)
    return min(float(area), 1.0)  # rounding goes beyond


def roc_auc(success_prob: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Probability that a success scores above a failure. Needs both classes, else ValueError."""
    from sklearn.metrics import roc_auc_score

    success_prob, label = _scores(success_prob, label)
    return float(roc_auc_score(label, success_prob, sample_weight=weight))


def log_loss(success_prob: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean binary cross-entropy in nats, kept finite: probabilities stay 1e-6 away from 0 and 1."""
    success_prob, label = _scores(success_prob, label, both=False)
    clipped = success_prob.clip(1e-6, 1 - 1e-6)
    return float(-np.average(np.log(np.where(label, clipped, 1 - clipped)), weights=weight))


def counts_at(
    success_prob: ArrayLike, label: ArrayLike, threshold: float, weight: ArrayLike | None = None
) -> Counts:
    """Counts when frames that reach `threshold` are called a success."""
    success_prob, label = _scores(success_prob, label, both=False)
    called = reaches(success_prob, threshold)
    cells = (called & label, called & ~label, ~called & label, ~called & ~label)
    if weight is None:
        return Counts(*(int(cell.sum()) for cell in cells))
    return Counts(*(float(np.asarray(weight)[cell].sum()) for cell in cells))


def score_metrics(
    success_prob: ArrayLike, label: ArrayLike, threshold: float, weight: ArrayLike | None = None
) -> dict[str, float]:
    """In short: loss, auprc, roc_auc, and at `threshold` accuracy, precision, recall, fp_per_1000."""
    counts = counts_at(success_prob, label, threshold, weight)
    return {
        "loss": log_loss(success_prob, label, weight),
        "auprc": auprc(success_prob, label, weight),
        "roc_auc": roc_auc(success_prob, label, weight),
        "accuracy": counts.accuracy,
        "precision": counts.precision,
        "recall": counts.recall,
        "fp_per_1000": counts.fp_per_1000,
    }


def kendall_tau_b(score: ArrayLike, outcome: ArrayLike) -> float:
    """Rank correlation of episodes' scores with their outcomes (E,), ties allowed; nan where one is constant.

    With an outcome of two values an untied score reaches less than 1: `kendall_tau_b(rank, outcome)` of the
    right ranking, 0.71 where half of many episodes succeed.
    """
    from scipy.stats import kendalltau

    return float(kendalltau(score, outcome).statistic)


def kendall_of_episodes(score: np.ndarray, outcome: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """value, interval, and `untied`: what a ranking with all pairs right and no two scores alike reaches.

    Where scores within an outcome are alike, tau-b of the right ranking is higher than that, up to 1.

    score (E,), outcome (E,) bool; drawn (R, E): `common.intervals.draw_episodes`.
    """
    resampled = [
        kendall_tau_b(np.repeat(score, times), np.repeat(outcome, times))
        if 0 < times @ outcome < times.sum()
        else np.nan
        for times in drawn
    ]
    untied = kendall_tau_b(np.arange(len(score)), np.sort(outcome))
    value = kendall_tau_b(score, outcome)
    return {"value": value, "interval": interval_of(np.array(resampled)), "untied": untied}


NUM_BINS = 15  # Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


def calibration_bins(success_prob: ArrayLike) -> np.ndarray:
    """(B,) int64 in [0, NUM_BINS): which of the equally wide bins of probability a frame is in."""
    return (np.asarray(success_prob, dtype=np.float64) * NUM_BINS).astype(np.int64).clip(max=NUM_BINS - 1)


def calibration_error(total: np.ndarray, prob: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Expected calibration error (...,): mean distance of the probability said from the share that came true.

    Sums over the frames of each bin (..., NUM_BINS): of weights, of weight * success_prob, of weight * label.
    """
    return np.abs(prob - hits).sum(-1) / total.sum(-1)


# ------------------------------------------------------------------------------------------------------------
# The threshold


@dataclass
class ThresholdRule:
    """How the success threshold is chosen on the validation frames.

    `max_false_positives_per_1000`: at most `value` of 1,000 failures may reach it.
    `precision_lower_bound`: the precision is at least `value` with about 95 % confidence (Wilson's bound, so
    that 5 of 5 is not taken for certainty; what counts as one trial is an episode, since its frames look
    alike: with no mistake in n of them n / (n + 2.7) is all that can be claimed). `fixed`: it is `value`.
    """

    rule: Literal["max_false_positives_per_1000", "precision_lower_bound", "fixed"] = (
        "max_false_positives_per_1000"
    )
    value: float = 5.0
    min_threshold: float = 0.5  # never below: there the model itself holds a failure to be likelier

    def __post_init__(self):
        top = 1000.0 if self.rule == "max_false_positives_per_1000" else 1.0
        if not 0 <= self.value <= top:
            raise ValueError(f"value of '{self.rule}' must be in [0, {top:g}], got {self.value}")
        if not 0 <= self.min_threshold < 1:
            raise ValueError(f"min_threshold must be in [0, 1), got {self.min_threshold}")


def choose_threshold(
    success_prob: ArrayLike,
    label: ArrayLike,
    rule: ThresholdRule,
    weight: ArrayLike | None = None,
    episode: np.ndarray | None = None,
) -> tuple[float, Counts, bool]:
    """(threshold, its counts of frames, whether it keeps the rule and finds any success at all).

    Of all thresholds that keep the rule, the one with the most true positives, then the fewest false ones; it
    lies in the middle of the gap between two neighbouring scores, so that rounding in a faster forward pass
    moves no frame across. Where none keeps the rule, the one that comes closest to it.

    episode (B,) int, for `precision_lower_bound`; without it every frame counts as an episode.
    """
    success_prob, label = _scores(success_prob, label)
    if rule.rule == "fixed":
        counts = counts_at(success_prob, label, rule.value)
        return rule.value, counts, counts.true_positives > 0

    weight = np.ones(len(label)) if weight is None else np.asarray(weight, dtype=np.float64)
    edges = np.concatenate(([0.0], np.unique(success_prob), [1.0]))
    candidates = np.unique(((edges[1:] + edges[:-1]) / 2).clip(min=rule.min_threshold))
    tp = _weight_reaching(success_prob[label], weight[label], candidates)
    fp = _weight_reaching(success_prob[~label], weight[~label], candidates)
    if rule.rule == "max_false_positives_per_1000":
        excess = 1000 * fp / weight[~label].sum() - rule.value
    else:
        episode = np.arange(len(label)) if episode is None else episode
        seen = _effective_number(success_prob, weight, episode, candidates)
        bound = wilson_lower_bound(seen * tp / np.maximum(tp + fp, 1e-12), seen)
        # few failures that were kept, each for many that were not, may be called by chance alone
        _, number = np.unique(episode[~label], return_inverse=True)
        trials = num_trials(np.bincount(number))
        num_false = _weight_reaching(success_prob[~label], np.ones(len(number)), candidates)
        false_rate = 1 - wilson_lower_bound(trials * (1 - num_false / len(number)), trials)
        excess = rule.value - np.minimum(bound, precision_at(tp, false_rate, weight[~label].sum()))
    keeps = (excess <= 1e-12) & (tp > 0)
    if keeps.any():
        kept = np.flatnonzero(keeps)
        best = kept[np.lexsort((fp[kept], -tp[kept]))[0]]
    else:
        best = np.argmin(np.where(tp > 0, excess, np.inf))
    threshold = float(candidates[best])
    return threshold, counts_at(success_prob, label, threshold), bool(keeps.any())


def threshold_interval(
    success_prob: ArrayLike,
    label: ArrayLike,
    rule: ThresholdRule,
    episode: np.ndarray | None,
    weight: np.ndarray | None = None,
) -> Interval:
    """The middle 95 % of the thresholds that `rule` chooses on episodes drawn anew (`common.intervals`).

    episode (B,) int. None where that is not known, or of too few episodes.
    """
    success_prob, label = _scores(success_prob, label)
    if episode is None or rule.rule == "fixed":
        return None
    names, episode = np.unique(episode, return_inverse=True)
    weight = np.ones(len(label)) if weight is None else weight
    chosen = []
    for times in draw_episodes(len(names), NUM_THRESHOLDS):
        drawn = np.repeat(np.arange(len(label)), times[episode])
        if 0 < label[drawn].sum() < len(drawn):
            # an episode that was drawn twice counts as two
            copy = np.concatenate([np.arange(count) for count in times[episode]])
            anew = episode[drawn] * (times.max() + 1) + copy
            chosen.append(choose_threshold(success_prob[drawn], label[drawn], rule, weight[drawn], anew)[0])
    return interval_of(np.array(chosen))


def threshold_is(meta: dict[str, Any], threshold: float) -> str:
    """Where the threshold comes from, in words; `meta`: the model's reward.json."""
    stored, rule = meta.get("threshold"), meta.get("threshold_rule")
    if stored is None:
        return "set by hand; the model stores none"
    if stored != threshold:
        return f"set by hand; the model's own is {stored:.3f}"
    if members := meta.get("strictest_of"):  # an ensemble's: the rule was never followed for all of them
        alone = {key: value for key, value in meta.items() if key != "strictest_of"}
        return f"the strictest member's of {members}, {threshold_is(alone, threshold)} for it alone"
    if rule is None:
        return "stored with the model"
    ends = rule.get("interval")  # models of before have none
    kept = "" if rule["kept"] else ", which no threshold keeps"
    sure = "" if ends is None else f", 95 % interval {ends[0]:.3f} to {ends[1]:.3f}"
    return f"chosen by {rule['rule']} {rule['value']:g}{kept}{sure}"


def precision_at(hits: ArrayLike, false_rate: ArrayLike, failures: float) -> np.ndarray:
    """Precision where of `failures` (their weight) the share `false_rate` is called a success.

    At the high end of the rate it is at its low end, also where each failure stands for others.
    """
    hits = np.asarray(hits, float)
    return hits / np.maximum(hits + np.asarray(false_rate) * failures, 1e-12)


def _effective_number(
    success_prob: np.ndarray, weight: np.ndarray, episode: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """How many episodes of equal weight the frames that reach each threshold are worth: (sum w)^2 / sum w^2
    over the episodes' weights there (Kish, "Survey Sampling", 1965). episode (B,) int."""
    order = np.lexsort((-success_prob, episode))  # within an episode the highest score first
    own = weight[order]
    first = np.flatnonzero(np.diff(episode[order], prepend=episode[order[0]] - 1))
    total = own.cumsum()
    start = np.repeat((total - own)[first], np.diff(np.append(first, len(order))))
    before = total - own - start  # the episode's weight that reaches higher
    grown = np.empty(len(order))
    grown[order] = (2 * before + own) * own  # by so much a frame makes its episode's square larger
    squares = _weight_reaching(success_prob, grown, thresholds)
    return _weight_reaching(success_prob, weight, thresholds) ** 2 / np.maximum(squares, 1e-12)


def _weight_reaching(success_prob: np.ndarray, weight: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Sum of the weights of the frames that reach each threshold."""
    order = np.argsort(success_prob)
    below = np.concatenate(([0.0], weight[order].cumsum()))
    return below[-1] - below[np.searchsorted(success_prob[order], thresholds, side="left")]


def _scores(success_prob: ArrayLike, label: ArrayLike, both: bool = True) -> tuple[np.ndarray, np.ndarray]:
    success_prob = np.asarray(success_prob, dtype=np.float64)
    label = np.asarray(label, dtype=bool)
    if success_prob.shape != label.shape or success_prob.ndim != 1:
        raise ValueError(
            f"success_prob and label must both be (B,), got {success_prob.shape} and {label.shape}"
        )
    if not np.isfinite(success_prob).all():
        raise UserError("a success_prob is not finite: the model diverged, so lower the learning rate")
    if both and (label.all() or not label.any()):
        raise ValueError("the frames are all of one class; ranking them needs successes and failures")
    return success_prob, label
