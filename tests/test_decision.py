"""From scores to verdicts: k of n, hysteresis and the abstain band, by hand and wherever they are paid."""

import pytest
import torch
from doubles import CountingEnvs, StillAgent, reward_config, use_fake_model
from test_experience import CPU, SPEC, ppo_rollouts, rollout_of, step_once, told, write
from torch import Tensor, tensor

import rl_train
from common import config
from common.evaluation import evaluate, record_traces
from common.prior import prior_buffer
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.reward_models import load_reward_model
from common.rewards import Decision, reaches
from common.runtime import UserError

NAN = float("nan")


def decided(scores: list[float], ends: tuple[int, ...] = (), **rule) -> str:
    """The verdicts of one env as letters: S success, . none; the episode ends at the steps `ends`."""
    decision = Decision(rule.pop("threshold", 0.5), **rule)
    done = tensor([[t in ends] for t in range(len(scores))])
    whole = decision(tensor(scores)[:, None], done)[:, 0]
    decision.reset()
    # how the steps are cut into calls changes nothing
    parts = [decision(tensor([[score]]), last[None]) for score, last in zip(scores, done, strict=True)]
    assert torch.cat(parts)[:, 0].equal(whole)
    return "".join("S" if success else "." for success in whole)


def test_without_options_a_score_is_its_own_verdict():
    score = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    score[3, 2] = NAN
    decision = Decision(0.5, num_envs=7)
    assert decision(score, torch.zeros(50, 7, dtype=torch.bool)).equal(reaches(score, 0.5))
    assert not decision.remembers


@pytest.mark.parametrize(
    ("rule", "scores", "verdicts"),
    [
        ({"hold_k": 2, "hold_n": 2}, [0.9, 0.1, 0.9, 0.5, 0.4], "...S."),
        ({"hold_k": 2, "hold_n": 3}, [0.9, 0.1, 0.9, 0.1, 0.1, 0.9, 0.9], "..S...S"),
        ({"hold_k": 3, "hold_n": 4}, [0.9, 0.1, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1, 0.9], "........S"),
        ({"hold_k": 2, "hold_n": 2}, [0.9, NAN, 0.9, 0.9], "...S"),  # a score that never came
        ({"hold_k": 2, "hold_n": 3}, [0.9, 0.9, NAN, 0.9, NAN], ".S.S."),
        ({"leave_threshold": 0.3}, [0.4, 0.5, 0.3, 0.4, 0.29, 0.4, 0.6], ".SSS..S"),
        ({"leave_threshold": 0.3}, [0.6, NAN, 0.4], "S.."),
        # while the verdict stands, 0.3 is a vote for it
        ({"hold_k": 2, "hold_n": 2, "leave_threshold": 0.3}, [0.6, 0.4, 0.6, 0.6, 0.4, 0.4, 0.2], "...SSS."),
        # the two votes around an abstention are neighbours
        ({"abstain_band": [0.2, 0.8], "hold_k": 2, "hold_n": 2}, [0.9, 0.5, 0.9, 0.5, 0.9, 0.1], "..S.S."),
    ],
)
def test_verdicts_by_hand(rule, scores, verdicts):
    assert decided(scores, **rule) == verdicts


def test_an_episode_knows_nothing_of_the_one_before():
    assert decided([0.9] * 5, ends=(1,), hold_k=2, hold_n=2) == ".S.SS"
    assert decided([0.9, 0.4, 0.4], ends=(1,), leave_threshold=0.3) == "SS."


def test_envs_are_decided_apart():
    decision = Decision(0.5, 2, hold_k=2, hold_n=2)
    score, done = (
        tensor([[0.9, 0.1], [0.9, 0.9], [0.9, 0.9]]),
        tensor([[False, False], [True, False], [False] * 2]),
    )
    assert decision(score, done).tolist() == [[False, False], [True, False], [False, True]]


def test_what_may_not_succeed_votes_against():
    decision = Decision(0.5, hold_k=2, hold_n=2)
    allowed = tensor([[False], [True], [True]])
    assert decision(tensor([[0.9]] * 3), tensor([[False]] * 3), allowed).tolist() == [
        [False],
        [False],
        [True],
    ]


def test_bounds_that_do_not_fit_the_threshold():
    with pytest.raises(UserError, match=r"leave_threshold 0\.6 lies above the threshold 0\.5"):
        Decision(0.5, leave_threshold=0.6)
    with pytest.raises(UserError, match=r"must lie around the threshold, which is 0\.5"):
        Decision(0.5, abstain_band=[0.6, 0.8])


def test_a_client_says_so_at_once(monkeypatch):
    use_fake_model(monkeypatch)
    with pytest.raises(UserError, match=r"leave_threshold 0\.6 lies above the threshold 0\.5"):
        RewardClient(reward_config(reward_mode="per_step", leave_threshold=0.6))


@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("rule", [{}, {"abstain_band": [0.25, 0.75]}])
def test_a_higher_score_is_never_worth_less(held, rule):
    """Every sequence of 5 scores below, within and above the band, each score raised in turn."""
    levels = tensor([0.1, 0.5, 0.9])
    score = torch.cartesian_prod(*[levels] * 5).T  # (5, 243)
    never = torch.zeros_like(score, dtype=torch.bool)
    rule = {**rule, "hold_k": held, "hold_n": held} if rule else {"hold_k": held, "hold_n": 3}
    said = Decision(0.5, score.shape[1], **rule)(score, never)
    for t in range(5):
        for step in (1, 2):
            higher = score.clone()
            higher[t] = levels[(torch.searchsorted(levels, score[t].contiguous()) + step).clamp(max=2)]
            raised = Decision(0.5, score.shape[1], **rule)(higher, never)
            assert not (said & ~raised).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hold_k": 3, "hold_n": 2}, "got 3 of 2"),
        ({"hold_n": 2, "reward_mode": "terminal"}, "reward_mode per_step, not terminal"),
        ({"leave_threshold": 1.5}, r"leave_threshold must lie in \[0, 1\]"),
        ({"abstain_band": [0.8, 0.2]}, "0 <= low < high <= 1"),
        ({"abstain_band": [0.8]}, "0 <= low < high <= 1"),
        ({"abstain_band": [0.2, 0.8]}, r"abstain_band .* wants hold_k = hold_n above 1, got 1 of 1"),
        ({"abstain_band": [0.2, 0.8], "hold_k": 2, "hold_n": 3}, "got 2 of 3"),
        (
            {"abstain_band": [0.2, 0.8], "hold_k": 2, "hold_n": 2, "leave_threshold": 0.3},
            "leave_threshold keeps a success at a score at which abstain_band takes it away",
        ),
    ],
)
def test_what_the_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        reward_config(**({"reward_mode": "per_step"} | changes))


# ----------------------------------------------------------------------------------------------------
# Wherever verdicts are paid: 2 of the last 2. Env 0's episodes have 3 steps, env 1's 4.

SCORES = {0: [60, 70, 20], 1: [80, 10, 90, 50]}
HELD = {0: [0, 0.7, 0], 1: [0, 0, 0, 0.5]}
TRUE = frozenset({(0, k, 2) for k in range(9)} | {(1, k, 1) for k in range(9)})


@pytest.fixture
def fake_model(monkeypatch):
    use_fake_model(monkeypatch)


def counting() -> CountingEnvs:
    return CountingEnvs(
        [[3], [4]], successes=TRUE, pixel=lambda env, episode, t: 99 if t == 0 else SCORES[env][t - 1]
    )


def held(steps: int) -> Tensor:
    """(T, 2): what each step is to be paid."""
    return tensor([[HELD[env][t % len(HELD[env])] for env in (0, 1)] for t in range(steps)])


@pytest.mark.parametrize("placement", ["inline", "worker"])
@pytest.mark.parametrize("verdict_every", [1, 3, 5])
def test_the_rollout_holds(fake_model, verdict_every, placement):
    """Episodes end within a batch of verdicts and across two; batches are longer than a worker's chunk."""
    rule = {"hold_k": 2, "hold_n": 2, "reward_mode": "per_step"}
    rollout = rollout_of(counting(), verdict_every=verdict_every, placement=placement, **rule)
    with rollout.client:
        batches = [batch for _ in range(12) for batch in step_once(rollout)] + list(rollout.drain())
    torch.testing.assert_close(torch.stack([batch["reward"] for batch in batches]), held(12))
    assert [row[0] for row in told(batches)][:4] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    metrics = rollout.metrics()
    # env 0 is called a success where it is one, in 4 episodes; env 1 where it is none, in 3
    assert metrics["reward/precision"] == 4 / 7 and metrics["reward/recall"] == 4 / 7
    assert metrics["reward/false_positives_per_1000_steps"] == 1000 * 3 / 24
    assert metrics["reward/model_reward_mean"] == pytest.approx(float(held(12).mean()))
    assert metrics["rollout/learned_success"] == 1.0


def test_ppo_holds_across_rollouts(fake_model):
    """Rollouts of 2 steps: both votes of env 0's first success lie in one, those of env 1's last in two."""
    rollouts, _ = ppo_rollouts(counting(), 2, 24, reward_mode="per_step", hold_k=2, hold_n=2)
    torch.testing.assert_close(torch.cat([rollout["reward"] for rollout in rollouts]), held(12))


def test_the_evaluation_holds(fake_model):
    cfg = reward_config(reward_mode="per_step", hold_k=2, hold_n=2)
    result = evaluate(counting(), StillAgent(), RewardClient(cfg), num_episodes=2, seed=0)
    assert result.learned.tolist() == [1, 1]
    assert result.false_positives == 1  # the last frame of env 1's episode
    cfg = reward_config(reward_mode="per_step", hold_k=3, hold_n=3)
    result = evaluate(counting(), StillAgent(), RewardClient(cfg), num_episodes=2, seed=0)
    assert result.learned.tolist() == [0, 0] and result.metrics["eval/hack_gap"] == -100.0


def test_prior_data_is_held(fake_model, tmp_path):
    write(tmp_path, 0, [90, 60, 80, 20, 70], [False] * 4)
    write(tmp_path, 1, [90, 60, 60], [False, True])
    cfg = reward_config(reward_mode="per_step", hold_k=2, hold_n=2)
    buffer, _, audit = prior_buffer([str(tmp_path)], SPEC, RewardClient(cfg), cfg, "standard", CPU)
    torch.testing.assert_close(buffer.reward, tensor([0, 0.8, 0, 0, 0, 0.6]))
    assert audit.metrics("prior")["prior/precision"] == 1 / 2


def test_a_frame_that_pays_for_others_votes_is_paid_its_own_score(fake_model):
    """2 of 3: the step after two votes pays, though its own score (0.2) is below the threshold."""
    rollout = rollout_of(counting(), reward_mode="per_step", hold_k=2, hold_n=3)
    batches = [batch for _ in range(3) for batch in step_once(rollout)] + list(rollout.drain())
    expected = tensor([[0, 0], [0.7, 0], [0.2, 0.9]])
    torch.testing.assert_close(torch.stack([batch["reward"] for batch in batches]), expected)


def test_pictures_show_the_verdict_that_counts(fake_model):
    """The reset's frame (.99) casts no vote."""
    cfg = reward_config(reward_mode="per_step", hold_k=2, hold_n=2)
    traces = record_traces(counting(), StillAgent(), RewardClient(cfg), num_episodes=2, seed=0)
    assert traces[0].verdict(0.5).tolist() == [False, False, True, False]
    assert traces[1].verdict(0.5).tolist() == [False] * 4 + [True]
    assert traces[0].wrong(0.5).sum() == 0 and traces[1].wrong(0.5).tolist() == [
        False,
        True,
        False,
        False,
        True,
    ]


# ----------------------------------------------------------------------------------------------------
# Several models as one


def save_model(folder, seed: int, **meta) -> str:
    torch.manual_seed(seed)
    model = ResNetRewardModel(ResNetRewardConfig(arch="resnet10", image_size=[3, 32, 32]))
    model.backbone.fc.weight.data *= 30  # else a random network says 0.5 to everything
    rule = {"rule": "rare", "value": 2, "kept": True}
    model.save(
        folder / str(seed),
        {
            "threshold": 0.1 * seed,
            "threshold_rule": rule,
            "frame_size": [32, 32],
            "render": {"fov": 1.0},
            **meta,
        },
        torch.zeros(1, 32, 32, 3, dtype=torch.uint8),
    )
    return str(folder / str(seed))


@pytest.mark.parametrize(("combine", "of"), [("min", lambda x: x.amin(0)), ("mean", lambda x: x.mean(0))])
def test_an_ensemble_scores_as_its_members_do(tmp_path, combine, of):
    paths = [save_model(tmp_path, seed) for seed in (1, 7, 3)]
    frames = {"main_images": torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)}
    alone = torch.stack([load_resnet(ResNetRewardConfig(model_path=path)).score(frames) for path in paths])
    assert (alone.std(0) > 0.01).all()  # they do not agree
    section = ResNetRewardConfig(model_path=paths, ensemble=combine)
    threshold = {"min": "auto", "mean": 0.6}[combine]
    with RewardClient(RewardConfig(True, "per_step", threshold, placement="inline", model=section)) as client:
        verdicts = client.score(frames)
    torch.testing.assert_close(verdicts.success_prob, of(alone))
    assert client.threshold == pytest.approx({"min": 0.7, "mean": 0.6}[combine])
    assert (
        client.threshold_is.partition(", ")[2]
        == {
            "min": "the strictest member's of 3, chosen by rare 2 for it alone",
            "mean": "set by hand; the model stores none",
        }[combine]
    )
    assert client.cfg.model_files["reward.model.model_path.1"] == paths[1]


def test_no_threshold_is_one_of_a_mean():
    section = ResNetRewardConfig(model_path=["a", "b"], ensemble="mean")
    with pytest.raises(ValueError, match=r"ensemble mean: .* set reward\.reward_threshold to a number"):
        RewardConfig(True, "per_step", model=section)


def test_models_of_other_pictures_do_not_judge_together(tmp_path):
    paths = [save_model(tmp_path, 1), save_model(tmp_path, 2, render={"fov": 2.0})]
    with pytest.raises(UserError, match=r"2 and .*1 cannot judge together.* render: .*2\.0"):
        load_reward_model(ResNetRewardConfig(model_path=paths))
    with pytest.raises(UserError, match="must name one checkpoint"):
        load_resnet(ResNetRewardConfig(model_path=paths))


def test_a_config_names_one_model_or_several(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("reward: {use_reward_model: true, model: {model_type: resnet, model_path: a}}\n")
    cfg = config.from_yaml(rl_train.Config, path, ["reward.model.model_path=[a, b]"])
    assert cfg.reward.model.model_path == ["a", "b"]
    with pytest.raises(UserError, match=r"reward.model.model_path.0: a does not exist"):
        rl_train.check_inputs(cfg)
