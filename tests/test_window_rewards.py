"""Who is paid what by a model of windows: rollouts of SAC and PPO, evaluation and prior data, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doubles import CountingEnvs, FakeTrendModel, StillAgent, use_fake_trend_model, window_config
from test_experience import CPU, FakeRun, Recorder, step_once, write
from torch import tensor

import rl_train
from common.audit import TrendAudit
from common.evaluation import evaluate, judge_trace, record_traces
from common.experience import Rollout
from common.geometry import success_distance
from common.judging import make_watch, pay
from common.log import GLOSSARY, progress_line
from common.ppo import PPOConfig
from common.prior import prior_buffer
from common.reward_client import RewardClient
from common.reward_models import HistoryOracle, HistoryOracleConfig
from common.rewards import WindowVerdicts
from common.run import Run, RunnerConfig
from common.runtime import UserError
from common.trace_page import errors
from common.video import Trace

# What env 0's frames show after steps 1, 2, ... of an episode: a window of 2 ending at step t is judged by
# frames t - 1 and t: up, up, down, still.
PIXELS = [7, 1, 2, 3, 2, 2]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch):
    use_fake_trend_model(monkeypatch)


def pixels(env: int, episode: int, t: int) -> int:
    return PIXELS[t] if env == 0 else 50


def rewards_of(envs: CountingEnvs, num_steps: int, cfg, env: int = 0) -> list[list[float]]:
    """What each `finish` hands out, rewards of one env alone; the last entry is `drain`'s."""
    rollout = Rollout(envs, RewardClient(cfg), cfg, "standard")
    rollout.reset(0)
    batches = [step_once(rollout) for _ in range(num_steps)] + [list(rollout.drain())]
    return [[float(batch["reward"][env]) for batch in handed] for handed in batches]


def test_a_window_pays_its_last_step():
    told = rewards_of(CountingEnvs([[5], [5]], pixel=pixels), 7, window_config())
    # step 1 has no window, and what was judged after step t is handed out by the finish of t + 1
    assert told == [[0.0], [], [1.0], [1.0], [-1.0], [0.0, 0.0], [], [1.0]]


def test_assign_pays_every_step_of_the_window():
    told = rewards_of(CountingEnvs([[5]], pixel=pixels), 7, window_config(history_reward_assign=True))
    # windows end at 2 (+1), 3 (+1), 4 (-1), 5 (0): steps 1..5 get 1, 1 + 1, 1 - 1, -1 + 0, 0
    assert [reward for handed in told for reward in handed] == [1.0, 2.0, 0.0, -1.0, 0.0, 1.0]
    assert told[0] == told[1] == []  # step 1 waits for what step 2 pays it


def test_three_frames_reach_two_steps_back_but_not_into_the_last_episode():
    cfg = window_config(3, history_reward_assign=True)
    told = rewards_of(CountingEnvs([[3]], pixel=pixels), 9, cfg)
    # an episode has one window, of frames 1, 2, 3: up
    assert [reward for handed in told for reward in handed] == [1.0] * 7


def test_the_model_may_be_asked_only_every_few_steps():
    """Later, in larger batches, and the same numbers."""
    told = rewards_of(CountingEnvs([[5]], pixel=pixels), 9, window_config(verdict_every=4))
    assert told == [[], [], [], [], [], [], [], [0.0, 1.0, 1.0, -1.0], [], [0.0, 0.0, 1.0, 1.0, -1.0]]


def test_only_frames_of_windows_are_rendered():
    envs = CountingEnvs([[6]], pixel=lambda env, episode, t: t)
    rewards_of(envs, 6, window_config(2, buffer={"input_interval": 3}))
    assert envs.rendered == 4  # frames 2, 3 and 5, 6


def test_invalid_and_interval_rewards_and_the_bonus_once():
    envs = CountingEnvs(
        [[4]], pixel=lambda env, episode, t: [0, 1, 99, 99, 4][t], successes=frozenset({(0, 0, 3), (0, 0, 4)})
    )
    cfg = window_config(
        model={"interval_reward": -0.25, "gt_success_bonus": 20.0}, history_reward_assign=True
    )
    told = rewards_of(envs, 4, cfg)
    # step 1 has no window of its own; windows ending at 2, 3, 4 all hold a 99: -5 for both of their steps,
    # and the bonus at step 3 alone; step 4 still waits for a successor
    assert [reward for handed in told for reward in handed] == [-5.25, -10.0, 10.0]


def test_two_buffers_pay_side_by_side():
    cfg = window_config()
    cfg.model.history_buffers["rare"] = window_config(buffer={"input_interval": 4}).model.history_buffers[
        "window"
    ]
    told = rewards_of(CountingEnvs([[5]], pixel=pixels), 5, cfg)
    assert [reward for handed in told for reward in handed] == [0.0, 1.0, 1.0, -2.0, 0.0]


def test_the_control_with_weight_zero_is_paid_nothing():
    cfg = window_config(model={"gt_success_bonus": 20.0}, reward_weight=0.0)
    envs = CountingEnvs([[2]], pixel=pixels, successes=frozenset({(0, 0, 1)}))
    assert {r for handed in rewards_of(envs, 5, cfg) for r in handed} == {0.0}


def test_rollout_metrics_of_windows():
    cfg = window_config()
    rollout = Rollout(CountingEnvs([[5]], pixel=pixels), RewardClient(cfg), cfg, "standard")
    rollout.reset(0)
    for _ in range(5):
        step_once(rollout)
    list(rollout.drain())
    assert rollout.metrics() == {
        "rollout/true_success_once": 0.0,
        "rollout/true_success_at_end": 0.0,
        "rollout/model_return": 1.0,
        "rollout/num_episodes": 1,
        "reward/positive_share": 0.5,
        "reward/negative_share": 0.25,
        "reward/label_mass": 1.0,
        "reward/model_reward_mean": 0.25,
    }


@pytest.mark.parametrize("assign", [False, True])
def test_ppo_is_paid_for_the_same_windows(assign):
    """Rollouts of 4 steps, episodes of 5: the window ending at the second rollout's first step does not reach
    back into the first rollout."""
    cfg = rl_train.Config(
        algorithm=PPOConfig(num_steps=4, bootstrap_type="none"),
        reward=window_config(history_reward_assign=assign),
        runner=RunnerConfig(max_steps=16),
    )
    run, agent = FakeRun(cfg), Recorder()
    run.client = RewardClient(cfg.reward)
    rl_train.train_ppo(cfg, run, agent, CountingEnvs([[5], [5]], pixel=pixels), run.client)
    rewards = [rollout["reward"][:, 0].tolist() for rollout in agent.rollouts]
    if assign:
        assert rewards == [[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 2.0, 1.0]]
    else:
        assert rewards == [[0.0, 1.0, 1.0, -1.0], [0.0, 0.0, 1.0, 1.0]]


def test_a_summary_names_no_threshold_of_windows(tmp_path):
    envs, client, log = CountingEnvs([[5]], pixel=pixels), RewardClient(window_config()), SimpleNamespace()
    log.log = lambda step, metrics: None
    run = Run(RunnerConfig(num_final_episodes=1), tmp_path, StillAgent(), {}, envs, client, log)
    assert run.measure()["reward_threshold"] is None


def test_evaluation_and_traces_of_windows():
    envs = CountingEnvs([[5], [5]], pixel=pixels, successes=frozenset({(0, 0, 5)}))
    client = RewardClient(window_config())
    result = evaluate(envs, StillAgent(), client, num_episodes=2, seed=0)
    assert result.model_return.tolist() == [1.0, 0.0]
    assert result.merit == (0.5, 0.0)
    assert result.metrics["eval/model_return"] == 0.5
    assert result.metrics["eval/positive_share"] == 0.25
    assert "eval/learned_success" not in result.metrics and "eval/hack_gap" not in result.metrics
    first, second = record_traces(envs, StillAgent(), client, num_episodes=2, seed=0)
    np.testing.assert_array_equal(first.score, [np.nan, np.nan, 1, 1, 0, 0])
    np.testing.assert_array_equal(second.score, [np.nan, np.nan, 0, 0, 0, 0])
    assert (first.question, first.truth_of) == ("positive", "success")  # no geometry is known here
    assert first.truth.tolist() == [False] * 5 + [True] and not first.wrong(0.5).any()
    assert first.labels == ("positive", "negative", "unclear") and first.true_label is None
    np.testing.assert_array_equal(first.label_prob[:3], [[np.nan] * 3, [np.nan] * 3, [1, 0, 0]])


def test_windows_of_episodes_beyond_an_envs_share_do_not_count():
    """Env 1 lives through two episodes of 2 steps, a window each, while env 0 has one: 2 of 4 + 1 windows."""
    result = evaluate(
        CountingEnvs([[5], [2]], pixel=pixels), StillAgent(), RewardClient(window_config()), 2, seed=0
    )
    assert result.metrics["eval/positive_share"] == 2 / 5


def test_a_trace_is_called_what_is_paid_the_likeliest_label(monkeypatch):
    unsure = torch.tensor([0.45, 0.3, 0.25])  # below 0.5, and positive all the same
    monkeypatch.setattr(
        FakeTrendModel, "score", lambda self, frames, *_: unsure.repeat(len(frames["main_images"]), 1)
    )
    frames = {
        view: torch.zeros(4, 8, 8, 3, dtype=torch.uint8) for view in ("main_images", "extra_view_images")
    }
    trace = Trace(frames["main_images"].numpy(), np.full(4, np.nan, np.float32), np.zeros(4, bool), "away")
    client = RewardClient(window_config())
    client.meta = {"score_source": "success_distance", "delta_threshold": 0.05}
    judge_trace(trace, client, frames, torch.tensor([0.1, 0.2, 0.3]))
    assert trace.true_label.tolist() == [-1, -1, 1, 1]  # ever further away
    assert trace.said.tolist() == [False, False, True, True]
    assert errors(trace, 0.5) == (2, 0)


@pytest.mark.parametrize("assign", [False, True])
def test_prior_data_is_paid_as_the_rollout_pays(tmp_path, assign):
    write(tmp_path, 0, PIXELS, [False] * 5)
    write(tmp_path, 1, [0, 5, 6], [False] * 2)
    cfg = window_config(history_reward_assign=assign)
    spec = CountingEnvs([[1]]).spec
    buffer, _, audit = prior_buffer([str(tmp_path)], spec, RewardClient(cfg), cfg, "standard", CPU)
    expected = [1, 2, 0, -1, 0, 1, 1] if assign else [0, 1, 1, -1, 0, 0, 1]
    assert buffer.reward.tolist() == expected
    assert audit.metrics("prior")["prior/positive_share"] == 3 / 5


# ----------------------------------------------------------------------------------------------------
# Parts


def test_the_audit_tells_false_positives_from_others():
    audit = TrendAudit()
    prob = torch.eye(3)[[0, 0, 0, 1, 2, 2]]
    prob[5] = 0.0  # invalid
    verdicts = WindowVerdicts(torch.arange(6), prob, tensor([0, 0, 0, 1, 2, -1]), torch.full((6,), 0.5))
    audit.count(verdicts, tensor([0, 1, -1, 1, 0, 2]))
    assert audit.metrics() == {
        "reward/positive_share": 0.5,
        "reward/negative_share": 1 / 6,
        "reward/label_mass": 5 / 6,
        "reward/model_reward_mean": 0.5,
        "reward/agreement": 2 / 5,  # of the five whose truth is known
        "reward/false_positive_share": 1 / 2,
    }
    assert audit.metrics() == {}


@pytest.mark.parametrize("group", ["reward", "prior", "eval", "final"])
def test_what_the_audit_counts_is_in_the_glossary(group):
    """Those of an evaluation were not, so its line kept quiet of what the reward model calls wrongly."""
    audit = TrendAudit()
    verdicts = WindowVerdicts(torch.arange(2), torch.eye(3)[[0, 0]], tensor([0, 0]), torch.ones(2))
    audit.count(verdicts, tensor([0, 1]))
    assert audit.metrics(group).keys() <= GLOSSARY.keys()
    audit.count(verdicts, tensor([0, 1]))
    assert "false 0.50" in progress_line(0, 0, audit.metrics(group))


def test_the_oracle_says_what_the_rule_says():
    oracle = HistoryOracle(HistoryOracleConfig(delta_threshold=0.1))
    distance = tensor([[0.5, 9.0, 0.3], [0.3, 0.0, 0.5], [0.3, 0.0, 0.25]])
    assert oracle.score({"success_distance": distance}).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_watch_knows_the_true_label_where_the_task_has_a_rule(monkeypatch):
    cfg = window_config()
    client = RewardClient(cfg)
    client.meta = {"score_source": "success_distance", "delta_threshold": 0.05}
    watch = make_watch(cfg, client, 1)
    frame, ids, no = {"main_images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}, tensor([0]), tensor([False])
    truths = [
        watch.look(frame, ids, no, no, tensor([metres])).truth.tolist() for metres in (0.5, 0.4, 0.39, 0.6)
    ]
    assert truths == [[], [0], [2], [1]]
    assert success_distance("Count", {}, torch.zeros(1, 3)) is None


def test_pay_leaves_single_frames_as_they_are():
    from doubles import reward_config

    verdict = tensor([[0.0, 0.7]])
    done = torch.zeros(1, 2, dtype=torch.bool)
    assert pay(reward_config(), verdict, torch.ones(1, 2), torch.zeros(1, 2), done).equal(verdict)


def test_buffers_of_one_model_are_of_one_size():
    cfg = window_config()
    cfg.model.history_buffers["long"] = window_config(3).model.history_buffers["window"]
    with pytest.raises(UserError, match=r"one history_size, got \{'window': 2, 'long': 3\}"):
        RewardClient(cfg)


def test_buffers_must_keep_what_the_model_looks_at(monkeypatch):
    cfg = window_config()
    cfg.model.history_buffers["window"].history_keys = ["extra_view_images"]
    with pytest.raises(UserError, match="history_keys lacks main_images"):
        RewardClient(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_mode": "terminal"}, "history_oracle, which judges windows"),
        ({"history_reward_assign": True, "use_reward_model": False}, "frames have no past"),
        ({"verdict_every": 0}, "at least 1"),
    ],
)
def test_settings_check_themselves(changes, message):
    cfg = vars(window_config()) | changes
    with pytest.raises(ValueError, match=message):
        type(window_config())(**cfg)
