"""Intervals by drawing episodes anew, against scikit-learn and against cases that can be counted."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from common import intervals
from common.intervals import (
    draw_episodes,
    interval_of,
    num_trials,
    per_episode,
    resampled_ranking,
    share_interval,
    wider,
    wilson_interval,
)


def test_each_resample_has_as_many_episodes_as_there_are():
    drawn = draw_episodes(8, 2000)
    assert drawn.shape == (2000, 8) and (drawn.sum(1) == 8).all()
    assert drawn.mean() == 1 and (drawn == 0).mean() == pytest.approx((7 / 8) ** 8, abs=0.02)
    assert np.array_equal(drawn, draw_episodes(8, 2000))
    assert draw_episodes(4).shape == (0, 4)  # too few to say anything about others


def test_the_middle_95_percent():
    assert interval_of(np.arange(1001.0)) == pytest.approx((25, 975))
    assert interval_of(np.array([np.nan, 2.0, np.nan])) == (2.0, 2.0)
    assert interval_of(np.empty(0)) is None and interval_of(np.array([np.nan])) is None


def test_wilson_interval_against_its_closed_form():
    z2 = 1.96**2
    assert wilson_interval(1.0, 10) == pytest.approx((10 / (10 + z2), 1.0))
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, z2 / (10 + z2)))
    assert wilson_interval(0.5, 4) == pytest.approx((0.15, 0.85), abs=0.005)  # the classic table's
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
    assert wider((0.4, 0.5), (0.45, 0.6)) == (0.4, 0.6)
    assert wider(None, (0, 1)) is None


def test_a_share_of_frames_is_as_sure_as_the_episodes_make_it():
    """300 worlds: of each episode's 10 frames nearly all are right or nearly all wrong. Of few episodes that
    are nearly always right, most worlds hold no mistake."""
    rng, num_worlds = np.random.default_rng(0), 300
    covered, by_frames = np.zeros(2), np.zeros(2)
    for case, (num_episodes, share) in enumerate(((30, 0.8), (10, 0.95))):
        drawn, trials = draw_episodes(num_episodes), np.full(num_episodes, 10.0)
        for _ in range(num_worlds):
            hits = rng.binomial(10, rng.beta(share / 10, (1 - share) / 10, num_episodes))
            low, high = share_interval(hits, trials, drawn)
            covered[case] += low <= share <= high
            low, high = wilson_interval(hits.sum() / trials.sum(), trials.sum())
            by_frames[case] += low <= share <= high
    assert (covered / num_worlds > 0.92).all(), covered
    assert (by_frames / num_worlds < 0.7).all(), by_frames


def test_a_share_of_few_episodes_or_without_a_mistake():
    few, drawn = np.array([20.0, 20.0]), draw_episodes(2)
    assert share_interval(few, few, drawn) == wilson_interval(1.0, 2)  # too few to draw from
    many = np.full(10, 4.0)
    assert share_interval(many, many, draw_episodes(10)) == wilson_interval(1.0, 10)
    assert share_interval(0 * many, 0 * many, draw_episodes(10)) == (0.0, 1.0)
    assert num_trials(np.array([3.0, 1.0])) == 16 / 10


@pytest.mark.parametrize("chunk", [1 << 25, 1])
def test_ranking_of_resamples_is_scikit_learns_with_ties_and_weights(monkeypatch, chunk):
    monkeypatch.setattr(intervals, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 12, 200) / 12, rng.random(200) < 0.3
    weight, episode, drawn = np.where(label, 1.0, 2.5), np.repeat(np.arange(20), 10), draw_episodes(20, 25)
    auprc, roc_auc = resampled_ranking(score, label, weight, episode, drawn)
    for times, area, pairs in zip(drawn, auprc, roc_auc, strict=True):
        drawn_weight = weight * times[episode]
        assert area == pytest.approx(average_precision_score(label, score, sample_weight=drawn_weight))
        assert pairs == pytest.approx(roc_auc_score(label, score, sample_weight=drawn_weight))


def test_a_resample_without_a_success_has_no_ranking():
    label = np.array([True, False, False])
    drawn = np.array([[1, 1, 1], [0, 2, 1]])
    auprc, roc_auc = resampled_ranking(np.array([0.9, 0.1, 0.2]), label, np.ones(3), np.arange(3), drawn)
    assert auprc[0] == roc_auc[0] == 1.0 and np.isnan([auprc[1], roc_auc[1]]).all()


def test_sums_per_episode():
    sums = per_episode(np.array([0, 2, 2]), 3, np.array([1.0, 2.0, 3.0]), np.array([True, True, False]))
    assert sums.tolist() == [[1, 1], [0, 0], [5, 1]]
    assert (np.array([[0, 1, 2]]) @ sums).tolist() == [[10, 2]]
