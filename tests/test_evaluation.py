"""Evaluations of hand-made episodes: which ones count, what is true, what is learned, how far apart."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from doubles import CountingEnvs, StillAgent, reward_config, use_fake_model

from common.evaluation import Evaluation, evaluate, record_traces, replay
from common.reward_client import RewardClient

# Two envs. Env 0's episodes take 2 steps, env 1's 3; (env, episode, t) of the frames that truly succeed:
SUCCESSES = frozenset({(0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 3)})
# and how the model scores what is not .10. It misses (0, 0, 1), and is fooled by (0, 1, 2) and (1, 1, 1).
PIXELS = {(0, 0, 2): 90, (0, 1, 1): 80, (0, 1, 2): 60, (1, 0, 3): 70, (1, 1, 1): 50}


def envs() -> CountingEnvs:
    return CountingEnvs(
        [[2], [3]], SUCCESSES, pixel=lambda *where: 99 if where[2] == 0 else PIXELS.get(where, 10)
    )


@pytest.fixture
def client(monkeypatch, request) -> RewardClient:
    use_fake_model(monkeypatch)
    return RewardClient(reward_config(reward_mode=request.param))


terminal = pytest.mark.parametrize("client", ["terminal"], indirect=True)
per_step = pytest.mark.parametrize("client", ["per_step"], indirect=True)


@terminal
def test_terminal_verdict_is_that_of_the_last_frame(client):
    """Episodes in the order of envs: (0, 0), (0, 1), (1, 0), (1, 1)."""
    result = evaluate(envs(), StillAgent(), client, num_episodes=4, seed=7)
    assert result.once.tolist() == [True, True, True, False]
    assert result.at_end.tolist() == [True, False, True, False]
    assert result.learned.tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(result.score, [0.9, 0.6, 0.7, 0.1], rtol=1e-6)
    # the step to (env, k, t) pays 100 env + 10 k + t
    assert result.env_return.tolist() == [1 + 2, 11 + 12, 101 + 102 + 103, 111 + 112 + 113]
    assert (result.false_positives, result.num_steps) == (1, 10)
    assert result.metrics == {
        "eval/num_episodes": 4,
        "eval/true_success_once": 0.75,
        "eval/true_success_at_end": 0.5,
        "eval/return": (3 + 23 + 306 + 336) / 4,
        "eval/learned_success": 0.75,
        "eval/score": pytest.approx(0.575),
        "eval/hack_gap": 25.0,  # of last frames: .75 learned, .5 true
        "eval/fooled": 0.25,
        "eval/missed": 0.0,
        "eval/false_positives_per_1000_steps": 100.0,
        "eval/precision": 2 / 3,
        "eval/precision_low": pytest.approx(0.2077, abs=1e-4),  # Wilson's, 2 of 3
        "eval/precision_high": pytest.approx(0.9385, abs=1e-4),
        "eval/num_called": 3,
        "eval/recall": 1.0,
        "eval/auprc": 1.0,  # of four last frames: .9 and .7 true, .6 and .1 false
    }
    assert result.first_mistake == (0, 1, 2)  # env 0's second episode, after two steps
    assert result.merit == (0.75, pytest.approx(0.575))


@per_step
def test_per_step_verdict_is_that_of_any_frame(client):
    result = evaluate(envs(), StillAgent(), client, num_episodes=4, seed=7)
    assert result.learned.tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(result.score, [0.9, 0.8, 0.7, 0.5], rtol=1e-6)
    assert result.metrics["eval/hack_gap"] == 25.0  # of any frame: 1 learned, .75 true
    assert result.false_positives == 2
    # env 0's second episode is called a success at (0, 1, 2) too, but had been one before
    assert result.first_mistake == (1, 1, 1)
    assert result.metrics["eval/num_called"] == 5
    assert result.metrics["eval/false_positives_per_1000_steps"] == 200.0


@terminal
def test_each_env_gives_the_same_number_of_episodes(client):
    """Of the first 4 to end 3 are env 0's short ones, which fail more often: that must not sway the rate."""
    counted = CountingEnvs([[1], [5]], frozenset({(1, 0, 5), (1, 1, 5)}))
    result = evaluate(counted, StillAgent(), client, num_episodes=4, seed=0)
    assert result.at_end.tolist() == [False, False, True, True]
    assert result.num_steps == 1 + 1 + 5 + 5
    assert len(evaluate(counted, StillAgent(), client, num_episodes=5, seed=0).once) == 6  # rounded up


@terminal
def test_an_evaluation_starts_from_its_seed_and_acts_deterministically(client):
    class Watched(StillAgent):
        def __init__(self):
            self.asked = []

        def act(self, obs, deterministic=False):
            self.asked.append(deterministic)
            return torch.full((len(obs), 2), 7.0)

    counted, agent = envs(), Watched()
    evaluate(counted, agent, client, num_episodes=2, seed=41)
    assert counted.seeds == [41]
    assert set(agent.asked) == {True}
    assert all(action.eq(1).all() for action in counted.actions)  # clipped to what the env takes


def test_without_a_reward_model_nothing_is_rendered_or_claimed():
    counted = envs()
    result = evaluate(counted, StillAgent(), None, num_episodes=4, seed=7)
    assert counted.rendered == 0
    assert np.isnan(result.learned).all()
    assert set(result.metrics) == {
        "eval/num_episodes",
        "eval/true_success_once",
        "eval/true_success_at_end",
        "eval/return",
    }
    assert result.merit == ((3 + 23 + 306 + 336) / 4, 0.0)


def test_merit_never_reads_the_truth():
    """A policy that truly always fails, but is liked better, is the one that is kept."""
    two = dict.fromkeys(("once", "at_end"), np.array([True, True]))
    honest = Evaluation(
        **two,
        learned=np.array([1.0, 0.0]),
        score=np.array([0.9, 0.1]),
        env_return=np.array([5.0, 5.0]),
        model_return=np.full(2, np.nan),
        progress=np.full(2, np.nan),
        windows={},
        frames=(torch.tensor([0.9, 0.1]), torch.tensor([True, False]), torch.ones(2) > 0, torch.arange(2)),
        first_mistake=None,
        num_steps=2,
        last_frame_only=True,
    )
    failing = dataclasses.replace(
        honest, once=~honest.once, at_end=~honest.at_end, env_return=-honest.env_return
    )
    liked = dataclasses.replace(failing, learned=np.array([1.0, 1.0]))
    surer = dataclasses.replace(failing, score=np.array([0.95, 0.1]))
    assert failing.merit == honest.merit
    assert liked.merit > honest.merit
    assert surer.merit > honest.merit  # equal success: by the mean score


def test_with_shaping_the_env_reward_chooses(monkeypatch):
    """What only shapes is no aim: the same episodes as above, liked by the model for other reasons."""
    use_fake_model(monkeypatch)
    shaped = reward_config(reward_mode="per_step", shaping="potential", env_reward_weight=1.0)
    result = evaluate(envs(), StillAgent(), RewardClient(shaped), num_episodes=4, seed=7)
    assert result.learned.tolist() == [1, 1, 1, 1]
    assert result.merit == ((3 + 23 + 306 + 336) / 4, 0.0)


@terminal
def test_evaluation_refuses_a_model_that_owes_verdicts_to_the_rollout(client):
    client.submit({"main_images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="still owes verdicts to the rollout"):
        evaluate(envs(), StillAgent(), client, num_episodes=1, seed=0)


# ----------------------------------------------------------------------------------------------------
# Traces


@terminal
def test_traces_hold_every_frame_of_each_first_episode(client):
    first, second = record_traces(envs(), StillAgent(), client, num_episodes=2, seed=3)
    assert first.frames[:, 0, 0, 0].tolist() == [99, 10, 90]
    np.testing.assert_allclose(first.score, [0.99, 0.1, 0.9], rtol=1e-6)
    assert first.truth.tolist() == [False, True, True]
    assert second.frames[:, 0, 0, 0].tolist() == [99, 10, 10, 70]
    assert second.truth.tolist() == [False, False, False, True]


@terminal
def test_more_traces_than_envs_take_more_rounds_and_fewer_render_fewer(client):
    counted = envs()
    assert len(record_traces(counted, StillAgent(), client, num_episodes=3, seed=3)) == 3
    assert counted.seeds == [3, 4]
    counted = CountingEnvs([[2]] * 4)
    assert len(record_traces(counted, StillAgent(), client, num_episodes=1, seed=3)) == 1
    assert counted.rendered == 3


def test_traces_without_a_reward_model_have_no_scores():
    (trace,) = record_traces(envs(), StillAgent(), None, num_episodes=1, seed=3)
    assert all(math.isnan(prob) for prob in trace.score)


# ----------------------------------------------------------------------------------------------------
# A mistake, once more


@terminal
@pytest.mark.parametrize(
    ("env", "episode", "scores"), [(0, 1, [0.99, 0.8, 0.6]), (1, 0, [0.99, 0.1, 0.1, 0.7])]
)
def test_a_replay_shows_one_episode_and_draws_nothing_else(client, env, episode, scores):
    counted = envs()
    trace = replay(counted, StillAgent(), client, 5, env, episode)
    assert counted.seeds == [5]
    np.testing.assert_allclose(trace.score, scores, rtol=1e-6)
    assert trace.truth.tolist() == [(env, episode, t) in SUCCESSES for t in range(len(scores))]
    assert counted.rendered == len(scores)
