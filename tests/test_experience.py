"""Who is paid what: the rollouts of SAC and PPO, the prior data and the replay, step by step by hand."""

import numpy as np
import pytest
import torch
from doubles import RENDER, CountingEnvs, StillAgent, pixel_of, reward_config, use_fake_model
from torch import Tensor, tensor

import rl_train
from common.agents import build_agent
from common.async_rollout import SharedWeights
from common.audit import Audit
from common.buffers import FIELDS, ReplayBuffer, Transitions
from common.episodes import write_episode
from common.experience import EpisodeStats, Replay, Rollout
from common.nets import ActorModelConfig, OptimConfig
from common.ppo import PPOConfig
from common.prior import Prior, prior_buffer
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.rl_config import EnvSection
from common.run import RunnerConfig
from common.runtime import UserError
from common.sac import SACConfig
from common.scenes import EnvConfig

CPU = torch.device("cpu")
SPEC = CountingEnvs([[1]]).spec


@pytest.fixture(autouse=True)
def fake_model(monkeypatch):
    use_fake_model(monkeypatch)


def step_once(rollout: Rollout) -> list[Transitions]:
    rollout.start(torch.zeros(rollout.num_envs, 2))
    return list(rollout.finish())


def told(batches: list[Transitions]) -> list[tuple]:
    """(state, next state, reward) of each transition handed out; a state is (env, episode, t)."""
    return [
        (tuple(map(int, obs)), tuple(map(int, next_obs)), round(reward, 3))
        for batch in batches
        for obs, next_obs, reward in zip(
            batch["obs"].tolist(), batch["next_obs"].tolist(), batch["reward"].tolist(), strict=True
        )
    ]


def rollout_of(envs: CountingEnvs, bootstrap_type: str = "standard", **reward) -> Rollout:
    cfg = reward_config(**reward)
    rollout = Rollout(envs, RewardClient(cfg), cfg, bootstrap_type)
    rollout.reset(0)
    return rollout


# ----------------------------------------------------------------------------------------------------
# SAC's rollout

# Pixels of last frames: env 0 ends at t = 2 with .60 and .70, env 1 at t = 3 with .23 (below the threshold).
PIXEL = {(0, 0, 2): 60, (0, 1, 2): 70, (1, 0, 3): 23}


def last_pixels(env: int, episode: int, t: int) -> int:
    return PIXEL.get((env, episode, t), 99)  # any other frame would be paid .99


def test_terminal_pays_the_last_step_and_hands_it_out_one_step_late():
    envs = CountingEnvs([[2], [3]], pixel=last_pixels)
    rollout = rollout_of(envs)
    assert told(step_once(rollout)) == [((0, 0, 0), (0, 0, 1), 0.0), ((1, 0, 0), (1, 0, 1), 0.0)]
    # env 0 ends: the whole step waits for its verdict
    assert told(step_once(rollout)) == []
    # it arrives now, with the state before the auto-reset; env 1 ends
    assert told(step_once(rollout)) == [((0, 0, 1), (0, 0, 2), 0.6), ((1, 0, 1), (1, 0, 2), 0.0)]
    # env 1's last score is below the threshold; env 0 ends again
    assert told(step_once(rollout)) == [((0, 1, 0), (0, 1, 1), 0.0), ((1, 0, 2), (1, 0, 3), 0.0)]
    assert told(rollout.drain()) == [((0, 1, 1), (0, 1, 2), 0.7), ((1, 1, 0), (1, 1, 1), 0.0)]
    assert told(rollout.drain()) == []
    assert envs.rendered == 3  # the last frames and nothing else


def test_all_envs_end_at_once():
    """Nothing is ready then, and nothing gets lost."""
    rollout = rollout_of(CountingEnvs([[1], [1]], pixel=lambda env, episode, t: 50 + 10 * env + episode))
    assert told(step_once(rollout)) == []
    assert told(step_once(rollout)) == [((0, 0, 0), (0, 0, 1), 0.5), ((1, 0, 0), (1, 0, 1), 0.6)]
    assert told(rollout.drain()) == [((0, 1, 0), (0, 1, 1), 0.51), ((1, 1, 0), (1, 1, 1), 0.61)]


def test_per_step_scores_the_true_next_observation():
    """The frame after an auto-reset (pixel 90 here) belongs to another episode and must not be scored."""
    envs = CountingEnvs([[2]], pixel=lambda env, episode, t: 90 if t == 0 else 60 + 10 * episode + t)
    rollout = rollout_of(envs, reward_mode="per_step")
    assert told(step_once(rollout)) == []
    assert told(step_once(rollout)) == [((0, 0, 0), (0, 0, 1), 0.61)]
    assert told(step_once(rollout)) == [((0, 0, 1), (0, 0, 2), 0.62)]
    assert told(rollout.drain()) == [((0, 1, 0), (0, 1, 1), 0.71)]


def test_both_rewards_with_their_weights():
    rollout = rollout_of(CountingEnvs([[1]], pixel=lambda *_: 80), env_reward_weight=0.1, reward_weight=2.0)
    step_once(rollout)
    assert told(rollout.drain()) == [((0, 0, 0), (0, 0, 1), 1.7)]


def test_without_a_reward_model_the_env_pays_at_once():
    envs = CountingEnvs([[1], [2]])
    cfg = RewardConfig(env_reward_weight=1.0)
    rollout = Rollout(envs, None, cfg, "standard")
    rollout.reset(0)
    assert told(step_once(rollout)) == [((0, 0, 0), (0, 0, 1), 1.0), ((1, 0, 0), (1, 0, 1), 101.0)]
    assert envs.rendered == 0
    episodes = {"true_success_once": 0.0, "true_success_at_end": 0.0, "num_episodes": 1}
    assert rollout.metrics() == {f"rollout/{name}": value for name, value in episodes.items()}


@pytest.mark.parametrize(
    ("bootstrap_type", "terminal"),
    [("standard", [True, False]), ("always", [False, False]), ("none", [True, True])],
)
def test_which_ends_are_terminal(bootstrap_type, terminal):
    """Env 0 reaches a true end, env 1 its time limit."""
    envs = CountingEnvs([[1], [1]], terminates=frozenset({(0, 0)}))
    rollout = rollout_of(envs, bootstrap_type)
    step_once(rollout)
    (batch,) = rollout.drain()
    assert batch["terminal"].tolist() == terminal


def test_verdicts_are_compared_with_the_truth_of_the_same_frame():
    # ends: env 0 called and true; env 1 called, false; env 2 not called, true (and true once before)
    envs = CountingEnvs(
        [[2], [2], [2]],
        successes=frozenset({(0, 0, 2), (2, 0, 1), (2, 0, 2)}),
        pixel=lambda env, episode, t: (80, 70, 10)[env],
    )
    rollout = rollout_of(envs)
    step_once(rollout)
    step_once(rollout)
    assert list(rollout.metrics()) == []  # nothing judged, nothing counted
    list(rollout.drain())
    metrics = rollout.metrics()
    assert metrics["rollout/true_success_once"] == metrics["rollout/true_success_at_end"] == 2 / 3
    assert metrics["rollout/learned_success"] == 2 / 3
    assert metrics["rollout/hack_gap"] == 0
    assert metrics["reward/precision"] == metrics["reward/recall"] == 1 / 2
    assert (metrics["rollout/fooled"], metrics["rollout/missed"]) == (1 / 3, 1 / 3)
    assert metrics["reward/auprc"] == pytest.approx((1 + 2 / 3) / 2)  # ranked: true, false, true


@pytest.mark.parametrize(("mode", "learned", "gap"), [("terminal", 0.0, -100.0), ("per_step", 1.0, 0.0)])
def test_learned_success_of_training_episodes(mode, learned, gap):
    """True and called at t = 1; at the end still true, no longer called. The gap compares like with like."""
    stats = EpisodeStats(1, reward_config(reward_mode=mode))
    true, false = tensor([True]), tensor([False])
    paid = tensor([0.0])
    stats.add(true, false, tensor([mode == "per_step"]), paid)
    stats.add(true, true, false, paid)
    metrics = stats.metrics()
    assert (metrics["rollout/learned_success"], metrics["rollout/hack_gap"]) == (learned, gap)
    stats.add(false, true, false, paid)  # the next episode starts from nothing
    assert stats.metrics()["rollout/true_success_once"] == 0
    assert stats.metrics() == {}


def test_evaluation_between_two_steps_does_not_take_the_verdicts_of_training():
    """Regression: `evaluate` asked the model while a training step's verdict was on its way; the verdict went
    into the evaluation, and the training step was silently paid nothing."""
    cfg = rl_train.Config(
        algorithm=SACConfig(learning_starts=100, buffer_size=50),
        reward=reward_config(),
        runner=RunnerConfig(max_steps=4),
    )
    run = FakeRun(cfg, evaluate_at=(2,))
    run.client = RewardClient(cfg.reward)
    agent = build_agent(cfg.algorithm, ActorModelConfig((8,)), OptimConfig(), run.eval_envs.spec, CPU)
    rl_train.train_sac(cfg, run, agent, CountingEnvs([[2]], pixel=lambda *_: 80), run.client)
    assert run.idle_at_evaluation == [True, True]  # at step 2 and at the end
    assert run.replay.online.reward[: len(run.replay.online)].tolist() == pytest.approx([0, 0.8, 0, 0.8])


class FakeRun:
    """What the training loops ask of `common.run.Run`."""

    def __init__(self, cfg: rl_train.Config, evaluate_at: tuple[int, ...] = ()):
        self.cfg, self.evaluate_at, self.step, self.client = cfg, evaluate_at, 0, None
        self.eval_envs, self.replay, self.weight_factor = CountingEnvs([[1]]), None, 1.0
        self.hard = None
        self.idle_at_evaluation, self.logged = [], []

    @property
    def running(self) -> bool:
        return self.step < self.cfg.runner.max_steps

    def evaluates_after(self, env_steps: int) -> bool:
        return self.step + env_steps in (*self.evaluate_at, self.cfg.runner.max_steps)

    def advance(self, env_steps: int, losses: dict, rollout_metrics, may_evaluate: bool = True) -> bool:
        if self.evaluates_after(env_steps):
            self.idle_at_evaluation.append(not self.client.busy)
        self.step += env_steps
        self.logged.append(rollout_metrics())
        return False


# ----------------------------------------------------------------------------------------------------
# PPO's rollout


class Recorder(StillAgent):
    """An agent that keeps what `update` is told."""

    def __init__(self):
        self.rollouts: list[dict[str, Tensor]] = []

    def update(self, rollout: dict[str, Tensor], progress: float) -> dict[str, float]:
        self.rollouts.append(rollout)
        return {}


def ppo_rollouts(envs: CountingEnvs, num_steps: int, total: int, bootstrap_type="none", **reward):
    """The rollouts that PPO learns from, and the run's metrics after each."""
    cfg = rl_train.Config(
        algorithm=PPOConfig(num_steps=num_steps, gamma=0.5, bootstrap_type=bootstrap_type),
        reward=reward_config(**reward),
        runner=RunnerConfig(max_steps=total),
        env=EnvSection(train=EnvConfig(observe_time=True)),
    )
    run, agent = FakeRun(cfg), Recorder()
    run.client = RewardClient(cfg.reward)
    rl_train.train_ppo(cfg, run, agent, envs, run.client)
    return agent.rollouts, run.logged


def test_ppo_terminal_reward_lands_on_the_last_step_at_any_place_in_the_rollout():
    """Rollouts of 3 steps; env 0's episodes of 4 steps end on the second rollout's first step and the third's
    second, env 1's of 3 on the last step of each."""
    envs = CountingEnvs([[4], [3]], pixel=lambda env, episode, t: 99 if t < 3 else 60 + 10 * env + episode)
    rollouts, _ = ppo_rollouts(envs, num_steps=3, total=18)
    expected = [
        [[0, 0], [0, 0], [0, 0.70]],
        [[0.60, 0], [0, 0], [0, 0.71]],
        [[0, 0], [0.61, 0], [0, 0.72]],
    ]
    for rollout, reward in zip(rollouts, expected, strict=True):
        torch.testing.assert_close(rollout["reward"], tensor(reward))
        assert rollout["done"].equal(tensor(reward) > 0)
    assert envs.rendered == 5


def test_ppo_per_step_scores_every_true_next_observation():
    envs = CountingEnvs(
        [[2], [3]], pixel=lambda env, episode, t: 0 if t == 0 else 50 + pixel_of(env, episode, t)
    )
    (rollout, _), _ = ppo_rollouts(envs, num_steps=4, total=16, reward_mode="per_step")
    expected = [[0.51, 0.71], [0.52, 0.72], [0.61, 0.73], [0.62, 0.81]]
    torch.testing.assert_close(rollout["reward"], tensor(expected))
    assert rollout["obs"][2, 0].tolist() == [0, 1, 0]
    assert rollout["next_obs"][1, 0].tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("bootstrap_type", "at_the_end", "at_the_limit"),
    [("standard", 0.0, 0.5 * 0.2), ("always", 0.5 * 0.2, 0.5 * 0.2), ("none", 0.0, 0.0)],
)
def test_ppo_bootstraps_from_the_last_observation_of_the_episode(bootstrap_type, at_the_end, at_the_limit):
    """V is episode + t / 10: V(last observation) = 0.2, while the state after the auto-reset has V = 1."""
    envs = CountingEnvs([[2], [2]], terminates=frozenset({(0, 0)}), pixel=lambda *_: 0)
    (rollout,), _ = ppo_rollouts(envs, 2, 4, bootstrap_type)
    torch.testing.assert_close(rollout["reward"], tensor([[0, 0], [at_the_end, at_the_limit]]))
    assert rollout["last_value"].tolist() == [1, 1]


def test_ppo_counts_verdicts_and_episodes_across_rollouts():
    """The episode begins in one rollout, where it truly succeeds, and ends in the next, called a success."""
    envs = CountingEnvs([[3]], successes=frozenset({(0, 0, 1)}), pixel=lambda *_: 80)
    _, logged = ppo_rollouts(envs, num_steps=2, total=4)
    assert logged[0] == {}
    assert logged[1] == {
        "rollout/true_success_once": 1.0,
        "rollout/true_success_at_end": 0.0,
        "rollout/learned_success": 1.0,
        "rollout/hack_gap": 100.0,
        "rollout/fooled": 1.0,
        "rollout/missed": 0.0,
        "rollout/num_episodes": 1,
        "reward/false_positives_per_1000_steps": 250.0,  # of 4 steps, those before the verdict included
        "reward/model_reward_mean": pytest.approx(0.8),
        "reward/precision": 0.0,
        "reward/precision_low": 0.0,
        "reward/precision_high": pytest.approx(3.8415 / 4.8415, abs=1e-4),  # z^2 / (1 + z^2), z = 1.96
        "reward/num_called": 1,
    }


def test_precision_counts_an_episode_once():
    """Four frames of one episode, all wrongly called: as sure as of one, z^2 / (1 + z^2), and not of four."""
    envs = CountingEnvs([[4]], pixel=lambda *_: 80)
    _, (logged,) = ppo_rollouts(envs, num_steps=4, total=4, reward_mode="per_step")
    assert logged["reward/num_called"] == 4
    assert logged["reward/precision_high"] == pytest.approx(3.8415 / 4.8415, abs=1e-4)


# ----------------------------------------------------------------------------------------------------
# Prior data


def write(
    folder, episode_id: int, pixels: list[int], success: list[bool], terminated: bool = False, **changes
):
    """An episode of len(pixels) - 1 steps whose state and frame at step t are t and pixels[t]."""
    length = len(pixels) - 1
    frames = [np.full((8, 8, 3), pixel, np.uint8) for pixel in pixels]
    episode = {
        "rank": 0,
        "env_idx": 0,
        "episode_id": episode_id,
        "step": 0,
        "success": any(success),
        "observations": [
            {"main_images": frame, "states": np.array([10 * episode_id + t, 1, 2], np.float32)}
            for t, frame in enumerate(frames)
        ],
        "actions": [np.array([t, -t], np.float32) for t in range(length)],
        "rewards": [0.0, *(1.0 + t for t in range(length))],
        "terminated": [False] * length + [terminated],
        "truncated": [False] * length + [not terminated],
        "infos": [{}, *({"success": s} for s in success)],
        "task": "Count",
        "task_description": "Count.",
        "render": RENDER,
        **changes,
    }
    return write_episode(folder, episode)


@pytest.mark.parametrize(
    ("mode", "reward", "audit"),
    [
        ("terminal", [0, 0, 0.8, 0, 0], {"precision": 0.0, "fp": 1000 / 5}),
        ("per_step", [0.6, 0, 0.8, 0, 0], {"precision": 1 / 2, "fp": 1000 / 5}),
    ],
)
def test_prior_data_is_paid_as_the_rollout_pays(tmp_path, mode, reward, audit):
    """Frames 90 are resets, which nobody may score."""
    folders = [str(tmp_path / name) for name in ("mixed", "later")]
    write(tmp_path / "mixed", 0, [90, 60, 20, 80], [True, False, False], terminated=True)
    write(tmp_path / "later", 1, [90, 10, 49], [False, False])
    cfg = reward_config(reward_mode=mode)
    buffer, _, told = prior_buffer(folders, CountingEnvs([[1]]).spec, RewardClient(cfg), cfg, "standard", CPU)
    torch.testing.assert_close(buffer.reward, tensor(reward, dtype=torch.float32))
    assert buffer.obs[:, 0].tolist() == [0, 1, 2, 10, 11]
    assert buffer.next_obs[:, 0].tolist() == [1, 2, 3, 11, 12]
    assert buffer.action[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert buffer.terminal.tolist() == [False, False, True, False, False]
    assert len(buffer) == 5
    metrics = told.metrics("prior")
    assert metrics["prior/precision"] == audit["precision"]
    assert metrics["prior/false_positives_per_1000_steps"] == audit["fp"]


def test_prior_data_paid_by_the_recorded_env_reward(tmp_path):
    write(tmp_path, 0, [90, 60, 80], [False, True])
    cfg = reward_config(env_reward_weight=2.0)
    buffer, _, _ = prior_buffer([str(tmp_path)], SPEC, RewardClient(cfg), cfg, "none", CPU)
    torch.testing.assert_close(buffer.reward, tensor([2.0, 4.8]))
    assert buffer.terminal.tolist() == [False, True]
    cfg = RewardConfig(env_reward_weight=1.0)
    buffer, _, _ = prior_buffer([str(tmp_path)], SPEC, None, cfg, "none", CPU)
    assert buffer.reward.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"render": {**RENDER, "task": "Other"}}, "task: trained on Count, here Other"),
        ({"observations": [{"main_images": np.zeros((8, 8, 3), np.uint8)}] * 3}, "holds no states"),
        ({"observations": [{"states": np.zeros(3, np.float32)}] * 3}, "has no view main_images"),
        ({"task": "Other"}, "task 'Other'"),
        ({"actions": [np.zeros(7, np.float32)] * 2}, "actions of 7"),
    ],
)
def test_prior_data_that_does_not_fit_is_named(tmp_path, changes, message):
    """The second episode is the bad one: each is looked at."""
    write(tmp_path, 0, [90, 60, 80], [False, True])
    bad = write(tmp_path, 1, [90, 60, 80], [False, True], **changes)
    cfg = reward_config()
    with pytest.raises(UserError, match=message) as error:
        prior_buffer([str(tmp_path)], SPEC, RewardClient(cfg), cfg, "none", CPU)
    assert bad.name in str(error.value)


def test_replay_mixes_prior_data_half_and_half():
    def buffer_of(value: float) -> ReplayBuffer:
        buffer = ReplayBuffer(4, 3, 2)
        buffer.add(
            torch.full((2, 3), value), torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2)
        )
        return buffer

    cfg = SACConfig(batch_size=10, prior_fraction=0.3, buffer_size=4)
    generator = torch.Generator()
    replay = Replay(cfg, SPEC, Prior(buffer_of(1.0), [2], Audit()), CPU)
    assert replay.ready
    assert replay.sample(generator)["obs"][:, 0].tolist() == [1.0] * 10  # nothing lived through yet
    replay.online = buffer_of(0.0)
    assert replay.sample(generator)["obs"][:, 0].tolist() == [0.0] * 7 + [1.0] * 3
    replay = Replay(cfg, SPEC, None, CPU)
    assert not replay.ready
    replay.online = buffer_of(0.0)
    assert replay.sample(generator)["obs"][:, 0].tolist() == [0.0] * 10


def test_the_episodes_that_were_paid_most_are_imitated():
    """Five of 2 steps, told apart by their obs; paid 1, 0, 3, -1 and 2."""
    buffer = ReplayBuffer(10, 3, 2)
    number = torch.arange(5.0).repeat_interleave(2)
    reward = torch.tensor([1.0, 0, 0, 0, 1, 2, 1, -2, 0, 2])
    buffer.add(
        number[:, None].expand(10, 3), torch.zeros(10, 3), number[:, None].expand(10, 2), reward, number > 9
    )
    prior = Prior(buffer, [2] * 5, Audit())

    def numbers(share: float) -> list[float]:
        return [x for episode in prior.best(share) for x in episode["obs"][:, 0].tolist()]

    assert numbers(0.4) == numbers(0.21) == [2, 2, 4, 4]
    assert numbers(1.0) == [0, 2, 2, 4, 4]  # not what was paid nothing, nor what came after the pay
    replay = Replay(SACConfig(batch_size=8, imitation_coef=1.0, prior_data="x"), SPEC, prior, CPU)
    batch = replay.sample(torch.Generator())
    assert set(batch["best_obs"][:, 0].tolist()) == {2.0}  # a tenth, rounded up
    torch.testing.assert_close(batch["best_action"], batch["best_obs"][:, :2])
    assert "best_obs" not in Replay(SACConfig(batch_size=8), SPEC, prior, CPU).sample(torch.Generator())
    buffer.reward.zero_()  # the control that is paid nothing
    assert prior.best(1.0) == []
    nothing = Replay(SACConfig(batch_size=8, imitation_coef=1.0, prior_data="x"), SPEC, prior, CPU)
    assert "best_obs" not in nothing.sample(torch.Generator())


def steps_of(*episodes: list[float]) -> list[dict[str, torch.Tensor]]:
    """Steps of envs side by side, each living through one episode of such rewards; obs: 10 * env + step."""
    steps = []
    for t in range(max(map(len, episodes))):
        left = [(env, episode) for env, episode in enumerate(episodes)]
        number = torch.tensor([10.0 * env + t for env, _ in left])
        steps.append(
            {
                "obs": number[:, None].expand(-1, 3),
                "next_obs": number[:, None].expand(-1, 3) + 1,
                "action": torch.zeros(len(left), 2),
                "reward": torch.tensor([float(ep[t]) if t < len(ep) else 0.0 for _, ep in left]),
                "terminal": torch.zeros(len(left), dtype=torch.bool),
                "done": torch.tensor([t == len(ep) - 1 for _, ep in left]),
            }
        )
    return steps


def test_returns_over_several_steps_go_to_the_buffer_when_an_episode_ends():
    replay = Replay(SACConfig(n_step=2, gamma=0.5, buffer_size=20), SPEC, None, CPU)
    stored = []
    for step in steps_of([1, 1, 1], [0, 4]):
        replay.add(step)
        stored.append(len(replay.online))
    assert stored == [0, 2, 5]
    online = {name: replay.online.field(name)[:5] for name in FIELDS}
    assert online["obs"][:, 0].tolist() == [10, 11, 0, 1, 2]
    assert online["reward"].tolist() == [2, 4, 1.5, 1.5, 1]
    assert online["steps"].tolist() == [2, 1, 2, 2, 1]
    assert online["next_obs"][:, 0].tolist() == [12, 12, 2, 3, 3]


def test_the_policy_imitates_its_own_episodes_that_were_paid_enough():
    buffer = ReplayBuffer(3, 3, 2)
    paid = torch.tensor([0.0, 2, 0])
    buffer.add(torch.full((3, 3), 7.0), torch.zeros(3, 3), torch.zeros(3, 2), paid, torch.zeros(3))
    cfg = SACConfig(
        batch_size=8, imitation_coef=1.0, imitation_online=True, imitation_batch=0.5, prior_data="x"
    )
    replay = Replay(cfg, SPEC, Prior(buffer, [3], Audit()), CPU)
    assert len(replay.best) == 2
    for step in steps_of([1, 0.5], [0, 2, 0, 0], [3]):  # too little; as much; more
        replay.add(step)
    assert replay.best.obs[: len(replay.best), 0].tolist() == [7, 7, 20, 10, 11]
    batch = replay.sample(torch.Generator().manual_seed(0))
    assert len(batch["obs"]) == 8 and set(batch["obs"][4:, 0].tolist()) <= {7, 20, 10, 11}
    assert set(batch["best_obs"][:, 0].tolist()) <= {7, 20, 10, 11}
    resumed = Replay(cfg, SPEC, Prior(buffer, [3], Audit()), CPU)
    resumed.load_state_dict(replay.state_dict())
    assert resumed.best.obs[:5, 0].tolist() == [7, 7, 20, 10, 11]
    assert len(resumed.online) == len(replay.online) == 7


# ----------------------------------------------------------------------------------------------------
# Weights for a rollout in another process


def test_published_weights_arrive_once_and_are_a_copy():
    torch.manual_seed(0)
    learner, actor = (
        build_agent(SACConfig(), ActorModelConfig((8,)), OptimConfig(), SPEC, CPU) for _ in range(2)
    )
    shared = SharedWeights(learner.actor_state())
    version, state = shared.newer_than(-1)
    actor.load_actor_state(state)
    obs = torch.ones(1, 3)
    assert actor.policy.mean(obs).equal(learner.policy.mean(obs))
    assert shared.newer_than(version) == (version, None)
    with torch.no_grad():
        learner.policy.net.layers[-1].bias.fill_(0.5)
    assert shared.newer_than(version) == (version, None)  # not before it is published
    shared.publish(learner.actor_state())
    newer, state = shared.newer_than(version)
    assert newer == version + 1
    actor.load_actor_state(state)
    assert actor.policy.mean(obs).equal(learner.policy.mean(obs))
    assert all(tensor.is_shared() for part in shared.state.values() for tensor in part.values())
