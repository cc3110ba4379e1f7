"""What no reward model is needed for: guesses from the clock, the light or the last picture alone.

A score that these reach as well says nothing about the task: a steadily rising ramp looks like a perfect
judge of progress. So they stand beside every report card's score.
"""

from typing import Any, NamedTuple

import numpy as np

from common.intervals import Interval, interval_of

NUM_FOLDS = 5


class Comparison(NamedTuple):
    """One baseline beside the model."""

    name: str
    score: float
    interval: Interval
    beaten: bool  # the model is better, and would be on 97.5 % of the sets of episodes drawn anew


def compare(name: str, model: tuple[float, np.ndarray], baseline: tuple[float, np.ndarray]) -> Comparison:
    """Each side: its score, and the scores (R,) of the same resamples. Without any the scores decide."""
    difference = interval_of(model[1] - baseline[1])
    least = model[0] - baseline[0] if difference is None else difference[0]
    return Comparison(name, baseline[0], interval_of(baseline[1]), bool(least > 0))


def guess(
    features: np.ndarray, label: np.ndarray, episode: np.ndarray | None, num_labels: int, linear: bool = False
) -> np.ndarray:
    """(B, num_labels) probabilities that a small tree, or logistic regression, gives from (B, F) numbers.

    label (B,) int. Each episode is guessed by what was fitted to other ones, so that nothing is learned by
    heart; where episodes are unknown (None), to blocks of rows further away.
    """
    from sklearn.model_selection import GroupKFold

    label = np.asarray(label, dtype=np.int64)
    if episode is None:
        episode = np.arange(len(label)) * NUM_FOLDS // len(label)
    prob = np.tile(np.bincount(label, minlength=num_labels) / len(label), (len(label), 1))
    num_folds = min(NUM_FOLDS, len(np.unique(episode)))
    for fit, judged in GroupKFold(num_folds).split(features, label, episode) if num_folds > 1 else []:
        if len(classes := np.unique(label[fit])) > 1:
            prob[judged] = 0
            learner = _learner(linear).fit(features[fit], label[fit])
            prob[np.ix_(judged, classes)] = learner.predict_proba(features[judged])
    return prob


def _learner(linear: bool) -> Any:
    if not linear:
        from sklearn.tree import DecisionTreeClassifier

        # few leaves: any bump of a curve over one number, and no more
        return DecisionTreeClassifier(
            max_leaf_nodes=8, min_samples_leaf=10, class_weight="balanced", random_state=0
        )
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
    return make_pipeline(StandardScaler(), regression)
