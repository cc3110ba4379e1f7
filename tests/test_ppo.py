"""PPO: GAE against explicit sums, one loss by hand, target-KL and minibatches, and learning a toy task."""

import pytest
import torch
from toy import ReachEnv, success_at_end

from common.nets import ActorModelConfig, OptimConfig
from common.ppo import PPO, PPOConfig, gae

MODEL = ActorModelConfig(hidden_dims=(16, 16))


def make_ppo(seed: int = 0, lr: float = 1e-3, **algorithm) -> PPO:
    torch.manual_seed(seed)
    return PPO(4, 2, PPOConfig(**algorithm), MODEL, OptimConfig(lr=lr))


def collect(agent: PPO, env: ReachEnv, num_steps: int) -> dict[str, torch.Tensor]:
    """A rollout of (T, N, ...) tensors, with gamma * V(final_obs) added where the time limit cut."""
    steps = []
    for _ in range(num_steps):
        obs = env.obs
        action, logprob, value = agent.act_with_value(obs)
        reward, next_obs, _, truncated = env.step(action)
        if truncated:
            reward = reward + agent.cfg.gamma * agent.value(next_obs)
        done = torch.full((env.num_envs,), truncated)
        steps.append(
            {"obs": obs, "action": action, "logprob": logprob, "value": value, "reward": reward, "done": done}
        )
    rollout = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    return rollout | {"last_value": agent.value(env.obs)}


def test_gae_matches_the_sum_over_td_errors():
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, up to the end of the episode; float64, to 1e-6."""
    torch.manual_seed(0)
    num_steps, num_envs, gamma, lam = 12, 5, 0.9, 0.8
    reward = torch.randn(num_steps, num_envs, dtype=torch.float64)
    value = torch.randn(num_steps, num_envs, dtype=torch.float64)
    last_value = torch.randn(num_envs, dtype=torch.float64)
    done = torch.rand(num_steps, num_envs) < 0.2
    assert done.any() and not done.all()
    advantage, returns = gae(reward, value, last_value, done, gamma, lam)
    for n in range(num_envs):
        for t in range(num_steps):
            expected, discount = 0.0, 1.0
            for k in range(t, num_steps):
                after = last_value[n] if k == num_steps - 1 else value[k + 1, n]
                delta = reward[k, n] + (0 if done[k, n] else gamma * after) - value[k, n]
                expected += discount * delta.item()
                discount *= gamma * lam
                if done[k, n]:
                    break
            assert advantage[t, n].item() == pytest.approx(expected, abs=1e-6)
            assert returns[t, n].item() == pytest.approx(expected + value[t, n].item(), abs=1e-6)


def test_gae_with_lambda_one_is_the_discounted_return():
    reward, value = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [0.5], [0.5]])
    done = torch.tensor([[False], [True], [False]])
    _, returns = gae(reward, value, torch.tensor([10.0]), done, gamma=0.5, gae_lambda=1.0)
    assert returns.flatten().tolist() == [1 + 0.5 * 2, 2.0, 3 + 0.5 * 10]


def test_loss_by_hand():
    """Two samples whose ratios and values lie beyond both clips; advantages not normalised."""
    agent = make_ppo(norm_adv=False, ent_coef=0.1, vf_coef=0.5)
    obs, action = torch.rand(2, 4), torch.rand(2, 2)
    mean = agent.policy.mean(obs)
    normal = torch.distributions.Normal(mean, agent.policy.log_std.exp())
    logprob, value = normal.log_prob(action).sum(-1).detach(), agent.value(obs)
    batch = {
        "obs": obs,
        "action": action,
        "logprob": logprob - torch.tensor([1.5, 0.5]).log(),  # ratios 1.5 and 0.5
        "advantage": torch.tensor([2.0, 3.0]),
        "value": value - 1.0,  # moved by +1 since: clipped to +0.2
        "return": value + torch.tensor([1.0, -1.0]),
    }
    loss, watched = agent.loss(batch)
    policy_loss = (
        -2.0 * 1.2 + -3.0 * 0.5
    ) / 2  # the gain of the first is clipped, the loss of the second is not
    value_loss = 0.5 * (1.8**2 + max(1.0, 0.2**2)) / 2  # clipped value is value - 0.8
    entropy = normal.entropy().sum(-1)[0].item()
    approx_kl = (0.5 - torch.tensor(1.5).log() + -0.5 - torch.tensor(0.5).log()).item() / 2
    assert watched.tolist() == pytest.approx([policy_loss, value_loss, entropy, approx_kl, 1.0], abs=1e-5)
    assert loss.item() == pytest.approx(policy_loss - 0.1 * entropy + 0.5 * value_loss, abs=1e-5)


def test_first_step_has_ratio_one():
    """The log-probability stored while acting is the one the update computes: else every ratio is off."""
    agent = make_ppo(update_epochs=1, minibatch_size=1000)
    agent.set_obs_stats(torch.full((4,), 0.3), torch.full((4,), 2.0))
    metrics = agent.update(collect(agent, ReachEnv(8, seed=0), 10))
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0


def test_minibatches_hold_every_sample_once_and_leave_no_rest():
    agent = make_ppo(minibatch_size=30)
    parts = agent.minibatches(100)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    assert sorted(len(part) for part in parts) == [33, 33, 34]
    assert len(agent.minibatches(10)) == 1


def test_target_kl_stops_the_epochs():
    rollout_of = {}
    for target_kl in (None, 1e-9):
        agent = make_ppo(update_epochs=6, minibatch_size=1000, target_kl=target_kl, lr=1e-2)
        metrics = agent.update(collect(agent, ReachEnv(8, seed=0), 10))
        rollout_of[target_kl] = metrics["num_minibatches"]
    assert rollout_of == {None: 6.0, 1e-9: 2.0}  # the first epoch's KL is 0: the policy has not moved yet


def test_annealed_learning_rate():
    agent = make_ppo(anneal_lr=True, lr=1e-2)
    rollout = collect(agent, ReachEnv(4, seed=0), 10)
    agent.update(rollout, progress=0.75)
    assert [group["lr"] for group in agent.optimizer.param_groups] == pytest.approx([2.5e-3, 2.5e-3])
    before = [p.clone() for p in agent.policy.parameters()]
    agent.update(rollout, progress=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


def test_a_loaded_agent_goes_on_as_the_saved_one_would(tmp_path):
    agent, env = make_ppo(minibatch_size=20, update_epochs=2), ReachEnv(8, seed=0)
    agent.update(collect(agent, env, 10))
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    loaded = make_ppo(seed=5, minibatch_size=20, update_epochs=2)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(agent.act(env.obs), loaded.act(env.obs))
    rollout = collect(agent, ReachEnv(8, seed=1), 10)
    loaded.generator.set_state(agent.generator.get_state())
    assert agent.update(rollout) == loaded.update(rollout)
    assert torch.equal(agent.act(env.obs, deterministic=True), loaded.act(env.obs, deterministic=True))


def test_actor_state_lets_a_rollout_process_act_alike():
    agent, rollout_agent = make_ppo(), make_ppo(seed=7)
    obs = torch.rand(3, 4)
    rollout_agent.load_actor_state(agent.actor_state())
    assert torch.equal(agent.act(obs, deterministic=True), rollout_agent.act(obs, deterministic=True))
    assert torch.equal(agent.value(obs), rollout_agent.value(obs))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"minibatch_size": 0}, "minibatch_size must be at least 1"),
        ({"clip_coef": 0.0}, "clip_coef must be > 0"),
    ],
)
def test_config_checks_itself(wrong, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**wrong)


@pytest.mark.slow
def test_compiled_loss_is_the_same():
    """Takes half a minute of compiling, and needs a C++ compiler on the CPU."""
    after = []
    for compile in (False, True):
        agent = make_ppo(update_epochs=2, minibatch_size=40, compile=compile)
        agent.update(collect(agent, ReachEnv(8, seed=0), 10))
        after.append(agent.policy.mean(torch.ones(1, 4)))
    torch.testing.assert_close(after[0], after[1], atol=1e-5, rtol=0)


def test_ppo_learns_to_reach():
    torch.manual_seed(0)
    cfg = PPOConfig(gamma=0.8, num_steps=20, update_epochs=8, minibatch_size=320)
    env = ReachEnv(64, seed=0)
    agent = PPO(
        env.obs_dim, env.action_dim, cfg, ActorModelConfig(hidden_dims=(64, 64)), OptimConfig(lr=3e-3)
    )
    assert success_at_end(agent) < 0.2
    for _ in range(25):
        agent.update(collect(agent, env, cfg.num_steps))
    assert success_at_end(agent) == 1.0
