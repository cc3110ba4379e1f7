"""What a reward model's scores are worth: ranking quality, counts at a threshold, and how a threshold is
chosen.

Everything takes `success_prob` (B,) in [0, 1] and `label` (B,) bool, one entry per frame, as numpy arrays or
CPU tensors. False positives come first everywhere: an RL policy seeks out exactly the frames that a reward
model wrongly takes for success, so a threshold is chosen by what it lets through, and recall is what is left.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from common.runtime import UserError


@dataclass(frozen=True)
class Counts:
    """Verdicts against the truth. A ratio with nothing in its denominator is 0."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float:
        return self.true_positives / max(self.true_positives + self.false_positives, 1)

    @property
    def recall(self) -> float:
        return self.true_positives / max(self.true_positives + self.false_negatives, 1)

    @property
    def fp_per_1000(self) -> float:
        """False positives per 1,000 frames that are no success (1,000 times the false-positive rate)."""
        return 1000 * self.false_positives / max(self.false_positives + self.true_negatives, 1)

    @property
    def accuracy(self) -> float:
        right = self.true_positives + self.true_negatives
        return right / max(right + self.false_positives + self.false_negatives, 1)


def auprc(success_prob: ArrayLike, label: ArrayLike) -> float:
    """Area under the precision-recall curve (average precision). Needs both classes, else ValueError.

    The measure that checkpoints are chosen by: successes are rare, and unlike ROC-AUC it does not drown false
    positives in the many easy failures.
    """
    from sklearn.metrics import (
        average_precision_score,
    )  # slow to import, and most scripts never rank anything

    success_prob, label = _scores(success_prob, label)
    return min(float(average_precision_score(label, success_prob)), 1.0)  # rounding goes beyond


def roc_auc(success_prob: ArrayLike, label: ArrayLike) -> float:
    """Probability that a success scores above a failure. Needs both classes, else ValueError."""
    from sklearn.metrics import roc_auc_score

    success_prob, label = _scores(success_prob, label)
    return float(roc_auc_score(label, success_prob))


def log_loss(success_prob: ArrayLike, label: ArrayLike) -> float:
    """Mean binary cross-entropy in nats, kept finite: probabilities stay 1e-6 away from 0 and 1."""
    success_prob, label = _scores(success_prob, label, both=False)
    clipped = success_prob.clip(1e-6, 1 - 1e-6)
    return float(-np.log(np.where(label, clipped, 1 - clipped)).mean())


def counts_at(success_prob: ArrayLike, label: ArrayLike, threshold: float) -> Counts:
    """Counts when frames that reach `threshold` are called a success."""
    success_prob, label = _scores(success_prob, label, both=False)
    tp = int(_num_reaching(success_prob[label], threshold))
    fp = int(_num_reaching(success_prob[~label], threshold))
    return Counts(tp, fp, int(label.sum()) - tp, int((~label).sum()) - fp)


def score_metrics(success_prob: ArrayLike, label: ArrayLike, threshold: float) -> dict[str, float]:
    """The report card: loss, auprc, roc_auc, and at `threshold` accuracy, precision, recall, fp_per_1000."""
    counts = counts_at(success_prob, label, threshold)
    return {
        "loss": log_loss(success_prob, label),
        "auprc": auprc(success_prob, label),
        "roc_auc": roc_auc(success_prob, label),
        "accuracy": counts.accuracy,
        "precision": counts.precision,
        "recall": counts.recall,
        "fp_per_1000": counts.fp_per_1000,
    }


# ------------------------------------------------------------------------------------------------------------
# The threshold


@dataclass
class ThresholdRule:
    """How the success threshold is chosen on the validation frames.

    `max_false_positives_per_1000`: at most `value` of 1,000 failures may reach it.
    `precision_lower_bound`: the precision is at least `value` with 95 % confidence (Wilson's bound, so that 5
    of 5 is not taken for certainty). `fixed`: it is `value`.
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
    success_prob: ArrayLike, label: ArrayLike, rule: ThresholdRule
) -> tuple[float, Counts, bool]:
    """(threshold, its counts, whether it keeps the rule and finds any success at all).

    Of all thresholds that keep the rule, the one with the most true positives, then the fewest false ones; it
    lies in the middle of the gap between two neighbouring scores, so that rounding in a faster forward pass
    moves no frame across. Where none keeps the rule, the one that comes closest to it.
    """
    success_prob, label = _scores(success_prob, label)
    if rule.rule == "fixed":
        counts = counts_at(success_prob, label, rule.value)
        return rule.value, counts, counts.true_positives > 0

    edges = np.concatenate(([0.0], np.unique(success_prob), [1.0]))
    candidates = np.unique(((edges[1:] + edges[:-1]) / 2).clip(min=rule.min_threshold))
    tp = _num_reaching(success_prob[label], candidates)
    fp = _num_reaching(success_prob[~label], candidates)
    if rule.rule == "max_false_positives_per_1000":
        excess = 1000 * fp / (~label).sum() - rule.value
    else:
        excess = rule.value - wilson_lower_bound(tp, tp + fp)
    keeps = (excess <= 0) & (tp > 0)
    if keeps.any():
        best = max(np.flatnonzero(keeps), key=lambda index: (tp[index], -fp[index]))
    else:
        best = np.argmin(np.where(tp > 0, excess, np.inf))
    threshold = float(candidates[best])
    return threshold, counts_at(success_prob, label, threshold), bool(keeps.any())


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


def _num_reaching(success_prob: np.ndarray, thresholds: ArrayLike) -> np.ndarray:
    return len(success_prob) - np.searchsorted(np.sort(success_prob), thresholds, side="left")


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
