"""Which windows an episode has, and what each is labelled: exact values."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.runtime import UserError
from common.trend import (
    NEGATIVE,
    POSITIVE,
    UNCLEAR,
    cut,
    episode_score,
    evenly_spaced,
    list_windows,
    trend_labels,
    window_labels,
    window_starts,
    with_reversed,
)


@pytest.mark.parametrize(
    ("num_frames", "stride", "num_samples", "keep_last", "expected"),
    [
        (4, 1, 0, True, []),  # shorter than a window
        (5, 1, 0, True, [0]),
        (8, 1, 0, True, [0, 1, 2, 3]),
        (9, 3, 0, True, [0, 3, 4]),  # the last window is added
        (9, 3, 0, False, [0, 3]),
        (14, 1, 4, True, [0, 3, 6, 9]),
        (15, 1, 2, True, [0, 10]),
        (15, 1, 2, False, [0, 5]),
        (15, 1, 1, True, [10]),
        (15, 1, 1, False, [0]),
        (8, 1, 9, True, [0, 1, 2, 3]),  # fewer than asked for
    ],
)
def test_window_starts(num_frames, stride, num_samples, keep_last, expected):
    starts = window_starts(num_frames, 5, stride, keep_last)
    assert starts[evenly_spaced(len(starts), num_samples, keep_last)].tolist() == expected


def test_a_change_of_exactly_the_threshold_is_unclear():
    assert trend_labels(np.array([0.5, 0.25, 0.0, -0.25, -0.5]), 0.25).tolist() == [
        POSITIVE,
        UNCLEAR,
        UNCLEAR,
        UNCLEAR,
        NEGATIVE,
    ]


def test_the_tail_is_unclear_whatever_the_score_says():
    score = np.arange(14.0)  # 10 windows of 5
    starts = np.arange(10)
    for ratio, first in ((0.0, 10), (0.01, 9), (0.15, 8), (0.2, 8), (0.29, 7), (0.85, 1)):
        labels = window_labels(score, starts, 5, 0.05, ratio)
        assert labels.tolist() == [POSITIVE] * first + [UNCLEAR] * (10 - first)


def test_the_tail_is_that_of_all_windows_not_of_those_chosen():
    """The last fifth of ten are numbers 8 and 9, the last half those from 5 on."""
    listed = list_windows([np.arange(14.0)], 5, 1, 4, True, 0.05, 0.2)
    assert listed.start.tolist() == [0, 3, 6, 9]
    assert listed.label.tolist() == [POSITIVE] * 3 + [UNCLEAR]
    half = list_windows([np.arange(14.0)], 5, 1, 2, False, 0.05, 0.5)
    assert (half.start.tolist(), half.label.tolist()) == ([0, 4], [POSITIVE, POSITIVE])


def episode(**changes):
    fields = {
        "path": Path("e.pkl"),
        "gae": None,
        "infos": [{}, {}, {}],
        "rewards": np.array([0, 3, 4], np.float32),
    }
    return SimpleNamespace(**{**fields, **changes})


def test_score_sources_in_their_order():
    """The reset entry's made-up 0 labels nothing: frame 0 takes what frame 1 has."""
    score, source = episode_score(episode(), "auto")
    assert (score.tolist(), source) == ([3, 3, 4], "rewards")
    distances = [{}, {"success_distance": 0.5}, {"success_distance": np.float32(0.25)}]
    score, source = episode_score(episode(infos=distances), "auto")
    assert (score.tolist(), source) == ([-0.5, -0.5, -0.25], "success_distance")
    at_reset = [{"success_distance": 0.75}, *distances[1:]]
    assert episode_score(episode(infos=at_reset), "auto")[0].tolist() == [-0.75, -0.5, -0.25]
    gae = np.array([1, 2, 4], np.float32)
    score, source = episode_score(episode(infos=distances, gae=gae), "auto")
    assert (score.tolist(), source) == ([1, 2, 4], "gae")
    assert episode_score(episode(infos=distances, gae=gae), "rewards")[1] == "rewards"
    assert episode_score(episode(infos=distances, gae=gae), "success_distance")[1] == "success_distance"


@pytest.mark.parametrize("source", ["gae", "success_distance"])
def test_a_missing_source_is_named(source):
    with pytest.raises(UserError, match=rf"e\.pkl holds no {source}"):
        episode_score(episode(infos=[{}, {"success_distance": 1.0}, {}]), source)


def windows():
    """Two episodes; windows of 2 frames: + + ? and - ?."""
    return list_windows([np.array([0.0, 1, 2, 2]), np.array([1.0, 0, 0])], 2, 1, 0, True, 0.1, 0.0)


def test_windows_of_several_episodes():
    listed = windows()
    assert listed.episode.tolist() == [0, 0, 0, 1, 1]
    assert listed.start.tolist() == [0, 1, 2, 0, 1]
    assert listed.label.tolist() == [POSITIVE, POSITIVE, UNCLEAR, NEGATIVE, UNCLEAR]
    assert not listed.reversed.any()


def test_positives_played_backwards_become_negatives():
    doubled = with_reversed(windows())
    assert doubled.episode.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert doubled.start.tolist() == [0, 0, 1, 1, 2, 0, 1]
    assert doubled.label.tolist() == [
        POSITIVE,
        NEGATIVE,
        POSITIVE,
        NEGATIVE,
        UNCLEAR,
        NEGATIVE,
        UNCLEAR,
    ]
    assert doubled.reversed.tolist() == [False, True, False, True, False, False, False]
    assert doubled.count() == {
        "natural": {"positive": 2, "negative": 1, "unclear": 2},
        "reversed": {"positive": 0, "negative": 2, "unclear": 0},
    }


@pytest.mark.parametrize(
    ("balance", "cap", "counts"),
    [
        (False, None, [40, 20, 60]),
        (True, None, [20, 20, 20]),
        (False, 30, [30, 20, 30]),
        (True, 7, [7, 7, 7]),
    ],
)
def test_cut_balances_and_caps(balance, cap, counts):
    scores = [np.array([0.0, 1, 2, 1, 1, 1, 1])] * 20
    listed = list_windows(scores, 2, 1, 0, True, 0.1, 0.0)
    kept = cut(listed, balance, cap, np.random.default_rng(0))
    assert np.bincount(kept.label, minlength=3).tolist() == counts
    place = kept.episode * 10 + kept.start
    assert (np.diff(place) > 0).all()  # in their old order, none twice


def test_a_label_that_nothing_has_does_not_empty_the_others():
    listed = list_windows([np.array([0.0, 1, 1])], 2, 1, 0, True, 0.1, 0.0)
    assert cut(listed, True, None, np.random.default_rng(0)).label.tolist() == [POSITIVE, UNCLEAR]
