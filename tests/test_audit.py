"""Verdicts against the truth by hand-made counts, and an alarm that must not cry wolf."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from common.audit import Alarm, Audit, AuditConfig, frame_rates, gap_lower_bound
from common.reward_config import RewardConfig
from common.rewards import Verdicts


def judge(prob: list[float], threshold: float) -> Verdicts:
    return Verdicts.judge(torch.arange(len(prob)), tensor(prob), threshold)


def audit_of(prob: list[float], truth: Tensor, steps: int) -> Audit:
    audit = Audit()
    audit.step(steps)
    audit.count(judge(prob, 0.5), truth, torch.arange(len(prob)))
    return audit


def test_audit_counts_each_kind_of_verdict():
    # true positive, two false positives, a missed success, two rightly refused
    audit = audit_of([0.75, 1.0, 0.5, 0.0, 0.25, 0.25], tensor([True, False, False, True, False, False]), 50)
    assert audit.metrics() == {
        "reward/false_positives_per_1000_steps": 40.0,
        "reward/model_reward_mean": 2.25 / 6,
        "reward/precision": 1 / 3,
        "reward/precision_low": pytest.approx(0.0615, abs=1e-4),  # Wilson's, 1 of 3
        "reward/precision_high": pytest.approx(0.7923, abs=1e-4),
        "reward/num_called": 3,
        "reward/recall": 1 / 2,
        "reward/auprc": pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * 2 / 6),  # ranked: false, TRUE, 3 false, TRUE
    }


def test_audit_adds_up_and_starts_anew():
    audit = audit_of([1.0], tensor([True]), 10)
    audit.step(10)
    audit.count(judge([1.0, 1.0], 0.5), tensor([True, False]), tensor([1, 2]))
    assert audit.metrics("prior")["prior/precision"] == 2 / 3
    assert audit.metrics() == {}


def test_audit_has_no_rate_of_what_never_came():
    """Precision of no claim and recall of no success would be 0/0."""
    assert set(audit_of([0.0], tensor([False]), 5).metrics()) == {
        "reward/false_positives_per_1000_steps",
        "reward/model_reward_mean",
    }


def test_steps_before_the_first_verdict_count_too():
    """Regression: asked more often than episodes end, the rate was that of the lucky intervals alone."""
    audit = Audit()
    audit.step(30)
    assert audit.metrics() == {}
    audit.step(10)
    audit.count(judge([1.0], 0.5), tensor([False]), tensor([0]))
    assert audit.metrics()["reward/false_positives_per_1000_steps"] == 1000 / 40


def test_precision_comes_with_an_interval():
    """9 of 10, an episode each, z = 1.96: Wilson's (p + z^2/2n - z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    below; above, some bootstrap sample holds no mistake."""
    success, truth = torch.ones(10, dtype=torch.bool), torch.arange(10) > 0
    rates = frame_rates("eval", success, torch.linspace(0.5, 1, 10), truth, torch.arange(10))
    z2 = 1.96**2
    spread = math.sqrt(z2) * math.sqrt(0.9 * 0.1 / 10 + z2 / 400)
    assert rates["eval/precision_low"] == pytest.approx((0.9 + z2 / 20 - spread) / (1 + z2 / 10), abs=1e-6)
    assert rates["eval/precision_high"] == 1
    assert (rates["eval/precision"], rates["eval/num_called"]) == (0.9, 10)
    assert rates["eval/auprc"] == 1.0  # the only failure has the lowest score


def test_steps_are_numbered_by_episode_across_calls():
    """Two envs; the first one's episodes end at its steps 2 and 3, the second one's at step 4."""
    audit = Audit()
    first = audit.episodes(tensor([[False, False], [True, False], [True, False]]))
    second = audit.episodes(tensor([[False, True], [False, False]]))
    assert torch.cat([first, second]).T.tolist() == [[0, 0, 2, 4, 4], [1, 1, 1, 1, 3]]


# ----------------------------------------------------------------------------------------------------
# The alarm


def told(source: str, fooled: int, missed: int, episodes: int) -> dict[str, float]:
    shares = {"fooled": fooled / episodes, "missed": missed / episodes, "num_episodes": episodes}
    return {f"{source}/{name}": value for name, value in shares.items()}


def test_the_gaps_lower_bound():
    """10 fooled, 2 missed of 48, by hand: (10.5 - 2.5) / 50 = .16, variance (13 / 50 - .16^2) / 50."""
    by_hand = 0.16 - 1.6448536 * math.sqrt((13 / 50 - 0.16**2) / 50)
    assert gap_lower_bound(10, 2, 48, 0.95) == pytest.approx(by_hand, abs=1e-6)
    assert gap_lower_bound(3, 0, 3, 0.95) < 0.3  # three fooled of three are no certainty


def test_an_alarm_looks_at_the_newest_episodes_together():
    alarm = Alarm(AuditConfig(max_hack_gap=10, min_episodes=20))
    assert alarm.hear(told("rollout", 8, 0, 10)) is None  # too few to say anything
    assert "of the last 20 episodes of training it calls 17 a success that are none" in alarm.hear(
        told("rollout", 9, 0, 10)
    )
    assert alarm.hear(told("rollout", 9, 0, 10)) is None  # it listens anew
    for _ in range(5):
        alarm.hear(told("rollout", 0, 0, 10))
    assert alarm.hear(told("rollout", 3, 3, 10)) is None  # the fooled ones were long ago
    assert alarm.weight == 1


def test_an_alarm_forgets_what_another_model_has_said():
    alarm = Alarm(AuditConfig(max_hack_gap=10, min_episodes=20))
    assert alarm.hear(told("rollout", 10, 0, 10)) is None
    alarm.forget()
    assert alarm.hear(told("rollout", 10, 0, 10)) is None


def test_training_and_evaluation_are_heard_apart():
    alarm = Alarm(AuditConfig(max_hack_gap=10, min_episodes=20, action="lower", lower_by=0.25))
    assert alarm.hear(told("rollout", 10, 0, 10)) is None
    assert alarm.hear(told("eval", 4, 0, 10)) is None
    assert alarm.hear(told("eval", 4, 0, 10)) is None  # of the same scenes: ten episodes stay ten
    assert "of the last 10 episodes of evaluation" in alarm.hear(told("eval", 10, 0, 10))
    assert alarm.weight == 0.25
    assert alarm.hear({"train/q": 1.0}) is None
    assert "training" in alarm.hear(told("rollout", 10, 0, 10))
    assert alarm.weight == 0.25**2


def test_noise_does_not_set_it_off():
    """A model wrong as often one way as the other, one episode in ten each: 400 lines of 12 episodes. The gap
    alone, without its interval, would have set it off many times."""
    rng, alarms = np.random.default_rng(0), 0
    alarm = Alarm(AuditConfig(max_hack_gap=10, min_episodes=50))
    lines = rng.multinomial(12, [0.1, 0.1, 0.8], size=400)
    for fooled, missed, _ in lines:
        alarms += alarm.hear(told("rollout", fooled, missed, 12)) is not None
    assert alarms == 0
    gaps = lines[:, 0] - lines[:, 1]
    assert sum(gaps[i : i + 5].sum() > 0.1 * 60 for i in range(396)) > 10


def test_a_gap_that_is_there_is_found():
    rng = np.random.default_rng(0)
    alarm = Alarm(AuditConfig(max_hack_gap=10, min_episodes=50))
    lines = iter(range(100))
    while alarm.hear(told("rollout", int(rng.binomial(12, 0.4)), 0, 12)) is None:
        next(lines)
    assert next(lines) < 10


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_hack_gap": 100}, "max_hack_gap must lie in"),
        ({"min_episodes": 0}, "min_episodes must be at least 1"),
    ],
)
def test_settings_of_an_alarm(section, message):
    with pytest.raises(ValueError, match=message):
        AuditConfig(**section)


def test_an_alarm_wants_somebody_to_listen_to():
    with pytest.raises(ValueError, match="it wants a reward model of frames"):
        RewardConfig(env_reward_weight=1.0, audit=AuditConfig())
