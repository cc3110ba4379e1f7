"""Exact values on toy scores; each expected number can be checked by hand."""

import numpy as np
import pytest

from common.intervals import wilson_lower_bound
from common.metrics import (
    NUM_BINS,
    Counts,
    ThresholdRule,
    auprc,
    calibration_bins,
    calibration_error,
    choose_threshold,
    counts_at,
    kendall_tau_b,
    log_loss,
    roc_auc,
    score_metrics,
    threshold_interval,
    threshold_is,
)
from common.runtime import UserError

PROB = np.array([0.1, 0.4, 0.6, 0.7, 0.8, 0.9])
LABEL = np.array([0, 0, 0, 1, 0, 1], dtype=bool)


def test_ranking_measures_by_hand():
    # from the top: hit (1/1), miss, hit (2/3)
    assert auprc(PROB, LABEL) == pytest.approx((1 + 2 / 3) / 2)
    # of 8 pairs of a success and a failure, one is the wrong way round
    assert roc_auc(PROB, LABEL) == pytest.approx(7 / 8)
    assert log_loss([0.5, 0.25], [True, False]) == pytest.approx((np.log(2) - np.log(0.75)) / 2)
    assert log_loss([0.0], [True]) == pytest.approx(-np.log(1e-6))


def test_counts_include_scores_that_just_reach_the_threshold():
    counts = counts_at(PROB, LABEL, 0.7)
    assert counts == Counts(true_positives=2, false_positives=1, false_negatives=0, true_negatives=3)
    assert (counts.precision, counts.recall) == (pytest.approx(2 / 3), 1.0)
    assert (counts.fp_per_1000, counts.accuracy) == (250.0, pytest.approx(5 / 6))


def test_ratios_with_nothing_to_divide_by_are_zero():
    none = Counts(0, 0, 0, 0)
    assert (none.precision, none.recall, none.fp_per_1000, none.accuracy) == (0, 0, 0, 0)


def test_weighted_frames_count_as_often_as_they_stand_for_others():
    # each failure stands for two: the same as having it twice
    weight = np.where(LABEL, 1.0, 2.0)
    twice = np.repeat(np.arange(6), weight.astype(int))
    weighted, doubled = score_metrics(PROB, LABEL, 0.7, weight), score_metrics(PROB[twice], LABEL[twice], 0.7)
    assert weighted == pytest.approx(doubled)
    assert weighted["auprc"] == pytest.approx((1 + 2 / 4) / 2)  # hit, two misses, hit
    assert counts_at(PROB, LABEL, 0.7, weight) == Counts(2, 2, 0, 6)
    assert weighted["fp_per_1000"] == 250.0  # a rate among failures, whatever each stands for


def test_kendall_tau_b_by_hand():
    # of 3 x 1 pairs of unlike outcome 2 are in order, 1 is not; 6 pairs of scores, one of them tied
    score, outcome = [0.1, 0.6, 0.6, 0.4], [0, 0, 1, 0]
    assert kendall_tau_b([0.1, 0.7, 0.6, 0.4], outcome) == pytest.approx((2 - 1) / np.sqrt(6 * 3))
    assert kendall_tau_b(score, outcome) == pytest.approx(2 / np.sqrt(5 * 3))  # the tie is neither
    assert kendall_tau_b([1, 2, 3, 4], [0, 0, 1, 1]) == pytest.approx(4 / np.sqrt(6 * 4))  # perfect: below 1
    assert np.isnan(kendall_tau_b([0.5, 0.5], [0, 1]))


def test_calibration_error_by_hand():
    # two bins: 0.1, 0.1 of which none came true, and 0.7, 0.7, 0.7, 0.7 of which two did
    prob, label = np.array([0.1, 0.1, 0.7, 0.7, 0.7, 0.7]), np.array([0, 0, 1, 1, 0, 0])
    bins = calibration_bins(prob)
    assert bins.tolist() == [1, 1, 10, 10, 10, 10] and calibration_bins([0.0, 1.0]).tolist() == [0, 14]
    sums = [np.bincount(bins, column, NUM_BINS) for column in (np.ones(6), prob, label)]
    assert calibration_error(*sums) == pytest.approx((2 * 0.1 + 4 * (0.7 - 0.5)) / 6)


def test_report_card():
    card = score_metrics(PROB, LABEL, 0.85)
    assert set(card) == {"loss", "auprc", "roc_auc", "accuracy", "precision", "recall", "fp_per_1000"}
    assert (card["precision"], card["recall"], card["fp_per_1000"]) == (1.0, 0.5, 0.0)


def test_one_class_cannot_be_ranked():
    with pytest.raises(ValueError, match="one class"):
        auprc(PROB, np.zeros(6, dtype=bool))


def test_a_diverged_model_is_named():
    with pytest.raises(UserError, match="diverged"):
        score_metrics(np.array([0.2, np.nan]), np.array([True, False]), 0.5)


@pytest.mark.parametrize(
    ("allowed", "threshold", "hits"),
    [
        (0.0, 0.85, 1),  # above the failure at 0.8
        (250.0, 0.65, 2),  # one of four failures may pass: between 0.6 and 0.7
        (1000.0, 0.65, 2),  # a larger allowance buys no further hit, so it is not used
    ],
)
def test_threshold_by_false_positives(allowed, threshold, hits):
    rule = ThresholdRule("max_false_positives_per_1000", allowed)
    chosen, counts, kept = choose_threshold(PROB, LABEL, rule)
    assert (chosen, counts.true_positives, kept) == (pytest.approx(threshold), hits, True)


def test_thresholds_of_thinned_data_are_those_of_all_of_it():
    label = np.array([True] * 40 + [False] * 41)
    prob = np.concatenate([np.linspace(0.6, 0.9, 40), [0.703], np.full(40, 0.1)])
    rule = ThresholdRule("precision_lower_bound", 0.75)
    assert choose_threshold(prob, label, rule)[1].false_positives == 1
    # the failure at 0.703 stands for 15: 40 of 55 is too few, so it has to stay below
    weight = np.where(prob == 0.703, 15, 1)
    assert choose_threshold(prob, label, rule, weight)[1:] == (Counts(26, 0, 14, 41), True)
    # all failures do: that none of 41 is called does not exclude 40 of 615, as many as there are hits
    assert choose_threshold(prob, label, rule, np.where(label, 1, 15))[2] is False


def test_the_interval_of_a_threshold_follows_the_rule_on_other_episodes():
    # 10 episodes of a failure and a success; one failure scores high, and is in 65 % of the sets drawn anew
    prob = np.array([0.6, 0.95] * 10)
    prob[0] = 0.75
    label, episode = np.array([False, True] * 10), np.repeat(np.arange(10), 2)
    rule = ThresholdRule("max_false_positives_per_1000", 0)
    assert choose_threshold(prob, label, rule)[0] == pytest.approx(0.85)
    # with that episode (0.75 + 0.95) / 2, without it (0.6 + 0.95) / 2
    assert threshold_interval(prob, label, rule, episode) == pytest.approx((0.775, 0.85))
    assert threshold_interval(prob, label, rule, episode // 3) is None  # 4 episodes tell nothing of others
    assert threshold_interval(prob, label, rule, None) is None
    assert threshold_interval(prob, label, ThresholdRule("fixed", 0.5), episode) is None


def test_a_clean_gap_is_split_in_the_middle_but_never_below_the_minimum():
    label = np.array([False, True])
    assert choose_threshold([0.6, 0.8], label, ThresholdRule())[0] == pytest.approx(0.7)
    assert choose_threshold([0.1, 0.3], label, ThresholdRule())[2] is False
    assert choose_threshold([0.1, 0.7], label, ThresholdRule())[0] == 0.5
    assert choose_threshold([0.1, 0.97], label, ThresholdRule(min_threshold=0.9))[0] == 0.9


def test_threshold_by_precision_bound():
    prob = np.concatenate([np.linspace(0.6, 0.9, 20), [0.65, 0.1]])
    label = np.array([True] * 20 + [False] * 2)
    # all 20 hits with one false positive are 20 of 21: bound 0.815; without it 16 of 16: 0.855
    loose = choose_threshold(prob, label, ThresholdRule("precision_lower_bound", 0.8))
    tight = choose_threshold(prob, label, ThresholdRule("precision_lower_bound", 0.85))
    assert (loose[1].true_positives, loose[1].false_positives, loose[2]) == (20, 1, True)
    assert (tight[1].true_positives, tight[1].false_positives, tight[2]) == (16, 0, True)


def test_frames_that_look_alike_are_one_trial():
    # 12 successful episodes of 20 equal frames, and as many failed ones, without a mistake
    label, prob = np.repeat([True, False], 240), np.repeat([0.9, 0.1], 240)
    rule = ThresholdRule("precision_lower_bound", 0.95)
    assert choose_threshold(prob, label, rule)[2] is True
    assert choose_threshold(prob, label, rule, episode=np.arange(480) // 20)[2] is False
    known = ThresholdRule("precision_lower_bound", 12 / (12 + 1.645**2) - 1e-9)  # all of 12: n / (n + z^2)
    assert choose_threshold(prob, label, known, episode=np.arange(480) // 20)[2] is True


def test_a_precision_bound_holds_in_19_of_20_draws():
    """Of the episodes that reach any threshold 10 % are failures, in 20 frames alike each."""
    rng, rule, num_kept = np.random.default_rng(0), ThresholdRule("precision_lower_bound", 0.9001), 0
    for _ in range(200):
        called, episode = rng.random(60) > 0.1, np.repeat(np.arange(80), 20)
        label = np.repeat(np.append(called, np.zeros(20, bool)), 20)
        prob = np.where(episode < 60, 0.9, 0.1)
        num_kept += choose_threshold(prob, label, rule, episode=episode)[2]
    assert num_kept <= 10


def test_an_unreachable_rule_takes_what_comes_closest_and_says_so():
    chosen, counts, kept = choose_threshold(PROB, LABEL, ThresholdRule("precision_lower_bound", 0.99))
    assert (kept, counts.false_positives, counts.true_positives) == (False, 0, 1)
    assert chosen == pytest.approx(0.85)
    # the highest score is a failure's: every threshold that finds a success lets it through
    assert choose_threshold([0.7, 0.9], [True, False], ThresholdRule())[2] is False


def test_fixed_threshold():
    chosen, counts, kept = choose_threshold(PROB, LABEL, ThresholdRule("fixed", 0.2))
    assert (chosen, counts.false_positives, kept) == (0.2, 3, True)


def test_wilson_lower_bound_against_its_closed_form():
    z = 1.645
    assert wilson_lower_bound(10, 10) == pytest.approx(10 / (10 + z * z))  # all hits: n / (n + z^2)
    assert wilson_lower_bound(0, 10) == pytest.approx(0)
    assert wilson_lower_bound(0, 0) == 0


@pytest.mark.parametrize(
    ("rule", "value"),
    [("precision_lower_bound", 5.0), ("fixed", -0.1), ("max_false_positives_per_1000", 1001)],
)
def test_senseless_rules_are_refused(rule, value):
    with pytest.raises(ValueError, match="must be in"):
        ThresholdRule(rule, value)


def test_where_a_threshold_comes_from():
    rule = {"rule": "max_false_positives_per_1000", "value": 2.0, "kept": True, "interval": [0.81, 0.97]}
    meta = {"threshold": 0.9, "threshold_rule": rule}
    assert threshold_is(meta, 0.9) == (
        "chosen by max_false_positives_per_1000 2, 95 % interval 0.810 to 0.970"
    )
    assert threshold_is(meta, 0.5) == "set by hand; the model's own is 0.900"
    assert threshold_is({}, 0.5) == "set by hand; the model stores none"
    assert threshold_is({"threshold": 0.5}, 0.5) == "stored with the model"
    meta["threshold_rule"] = {"rule": "precision_lower_bound", "value": 0.98, "kept": False}
    assert threshold_is(meta, 0.9) == "chosen by precision_lower_bound 0.98, which no threshold keeps"
