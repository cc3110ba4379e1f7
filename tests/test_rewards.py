"""The rules of paying, with exact tensors."""

import math

import pytest
import torch
from torch import tensor

from common.rewards import Verdicts, add_bootstrap, combine_reward, differences, no_bootstrap

NAN, INF = math.nan, math.inf

# Going on, a true end, the time limit, both at once.
TERMINATED = tensor([False, True, False, True])
TRUNCATED = tensor([False, False, True, True])


def judge(prob: list[float], threshold: float) -> Verdicts:
    return Verdicts.judge(torch.arange(len(prob)), tensor(prob), threshold)


def test_success_begins_at_the_threshold():
    verdicts = judge([0.0, 0.49, 0.5, 1.0], 0.5)
    assert verdicts.success.tolist() == [False, False, True, True]
    assert verdicts.model_reward.equal(tensor([0.0, 0.0, 0.5, 1.0]))
    assert verdicts.success_prob.equal(tensor([0.0, 0.49, 0.5, 1.0]))


def test_threshold_is_compared_in_the_precision_of_the_scores():
    """0.7 is no float32: a score of exactly the threshold must not fail for the difference."""
    assert judge([0.7, 0.1, 0.9], 0.7).success.tolist() == [True, False, True]


def test_threshold_zero_calls_everything_a_success():
    assert judge([0.0, 1.0], 0.0).success.all()


def test_nan_score_is_no_success_and_pays_nothing():
    verdicts = judge([NAN], 0.0)
    assert not verdicts.success.any()
    assert verdicts.model_reward.equal(tensor([0.0]))


@pytest.mark.parametrize(
    ("env_reward_weight", "reward_weight", "expected"),
    [
        (0.0, 1.0, [[0.0, 0.75]]),
        (1.0, 0.0, [[3.0, -2.0]]),
        (0.5, 2.0, [[1.5, 0.5]]),
        (-1.0, 1.0, [[-3.0, 2.75]]),
        (0.0, 0.0, [[0.0, 0.0]]),
    ],
)
def test_combine_reward(env_reward_weight, reward_weight, expected):
    env_reward, model_reward = tensor([[3.0, -2.0]]), tensor([[0.0, 0.75]])
    reward = combine_reward(env_reward, model_reward, env_reward_weight, reward_weight)
    assert reward.equal(tensor(expected))
    assert reward.dtype == torch.float32


def test_weight_of_zero_keeps_nan_and_infinity_out():
    broken, fine = tensor([NAN, INF, -INF]), tensor([1.0, 2.0, 3.0])
    assert combine_reward(broken, fine, 0.0, 1.0).equal(fine)
    assert combine_reward(fine, broken, 1.0, 0.0).equal(fine)
    assert combine_reward(broken, fine, 1.0, 1.0).isfinite().logical_not().all()


@pytest.mark.parametrize(
    ("bootstrap_type", "cut"),
    [
        ("standard", [False, True, False, True]),
        ("always", [False, False, False, False]),
        ("none", [False, True, True, True]),
    ],
)
def test_where_the_next_value_does_not_count(bootstrap_type, cut):
    assert no_bootstrap(TERMINATED, TRUNCATED, bootstrap_type).tolist() == cut


@pytest.mark.parametrize(
    ("bootstrap_type", "expected"),
    [
        ("standard", [1.0, 2.0, 3.0 + 0.5 * 30, 4.0]),
        ("always", [1.0, 2.0 + 0.5 * 20, 3.0 + 0.5 * 30, 4.0 + 0.5 * 40]),
        ("none", [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_bootstrap_joins_the_reward_of_an_end_only(bootstrap_type, expected):
    reward, final_value = tensor([1.0, 2.0, 3.0, 4.0]), tensor([10.0, 20.0, 30.0, 40.0])
    paid = add_bootstrap(reward, final_value, TERMINATED, TRUNCATED, 0.5, bootstrap_type)
    assert paid.equal(tensor(expected))


def test_final_value_is_read_at_ends_only():
    """V is computed where an episode ended; what stands elsewhere may be anything."""
    final_value = tensor([NAN, NAN, 30.0, NAN])
    paid = add_bootstrap(torch.zeros(4), final_value, TERMINATED, TRUNCATED, 0.5, "standard")
    assert paid.equal(tensor([0.0, 0.0, 15.0, 0.0]))


def test_pictures_are_compared_by_what_both_sides_tell():
    ours, theirs = {"shader": "a", "views": {"main": {"width": 64}}}, {"render": {"shader": "b"}}
    expected = ["main.width: trained on None, here 64", "shader: trained on b, here a"]
    assert differences(theirs, ours, None, ["main"]) == expected
    assert differences(theirs, ours, None, []) == expected[1:]  # a camera that is not looked at
    assert differences(theirs, None, None, ["main"]) == differences({}, ours, {"freq_hz": 10}, ["main"]) == []
    told = theirs | {"control": {"freq_hz": 20}}
    assert differences(told, theirs["render"], {"freq_hz": 10}, []) == ["freq_hz: trained on 20, here 10"]
    assert differences(theirs | {"control": {"mode": "pos"}}, None, {"mode": "pos"}, []) == []  # no rate told
