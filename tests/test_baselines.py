"""Guesses that need no reward model: what can be known from a number is, and nothing is learned by heart."""

import numpy as np
import pytest

from common.baselines import compare, guess


def test_what_the_number_tells_is_found_whatever_its_direction_or_middle():
    step, episode = np.tile(np.arange(20), 15), np.repeat(np.arange(15), 20)
    for label in (step >= 12, step < 8, (step > 5) & (step < 11)):
        prob = guess(step[:, None], label, episode, 2)
        assert (prob.argmax(1) == label).all()
        assert prob.sum(1) == pytest.approx(np.ones(300))


def test_an_episode_is_not_guessed_by_itself():
    # brightness names the episode and with it the label, but only of episodes that were seen
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(60), 20)
    label = rng.permutation(np.arange(60) % 2)[episode]
    brightness = rng.permutation(60)[episode][:, None] * 1.0
    right = (guess(brightness, label, episode, 2).argmax(1) == label).mean()
    known_frames = guess(brightness, label, rng.permutation(1200), 2).argmax(1)  # split by frame, a leak
    assert right < 0.65 < (known_frames == label).mean()


def test_a_linear_guess_and_a_label_that_a_fold_lacks():
    rng = np.random.default_rng(0)
    features, episode = rng.normal(size=(200, 4)), np.repeat(np.arange(10), 20)
    label = (features @ [1, -1, 0, 2] > 0).astype(int)
    assert (guess(features, label, episode, 3, linear=True).argmax(1) == label).mean() > 0.9
    label[episode == 9] = 2  # the fold that judges episode 9 has never met it
    prob = guess(features, label, episode, 3)
    assert prob[episode == 9, 2].max() == 0 and prob.sum(1) == pytest.approx(np.ones(200))


def test_one_episode_and_one_label_give_the_share_of_each_label():
    features, label = np.arange(4.0)[:, None], np.array([0, 0, 0, 1])
    assert guess(features, label, np.zeros(4, int), 2).tolist() == [[0.75, 0.25]] * 4
    assert guess(features, np.zeros(4, int), None, 2).tolist() == [[1, 0]] * 4


def test_beaten_means_better_on_nearly_all_sets_of_episodes():
    baseline = np.full(1000, 0.5)
    mostly = np.where(np.arange(1000) < 30, 0.4, 0.9)  # worse on 3 % of the resamples
    nearly_always = np.where(np.arange(1000) < 20, 0.4, 0.9)
    assert not compare("x", (0.9, mostly), (0.5, baseline)).beaten
    assert compare("x", (0.9, nearly_always), (0.5, baseline)) == ("x", 0.5, (0.5, 0.5), True)
    none = np.empty(0)  # unknown episodes: the scores decide
    assert compare("x", (0.9, none), (0.5, none)) == ("x", 0.5, None, True)
    assert not compare("x", (0.5, none), (0.5, none)).beaten
