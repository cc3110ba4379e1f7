"""SAC: its target and one whole update against slow references, determinism, and learning a toy task."""

import math

import pytest
import torch
from toy import ReachEnv, success_at_end

from common.buffers import ReplayBuffer, mix_batches
from common.nets import ActorModelConfig, OptimConfig
from common.sac import SAC, SACConfig

OBS_DIM, ACTION_DIM, BATCH = 5, 2, 7


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_sac(seed: int = 0, lr: float = 1e-3, weight_decay: float = 0.0, **algorithm) -> SAC:
    torch.manual_seed(seed)
    model, optim = ActorModelConfig(hidden_dims=(16, 16)), OptimConfig(lr=lr, weight_decay=weight_decay)
    return SAC(OBS_DIM, ACTION_DIM, SACConfig(**algorithm), model, optim)


def make_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.get_default_dtype())

    return {
        "obs": randn(BATCH, OBS_DIM),
        "next_obs": randn(BATCH, OBS_DIM),
        "action": torch.tanh(randn(BATCH, ACTION_DIM)),
        "reward": randn(BATCH),
        "terminal": randn(BATCH) > 0.5,
        "steps": torch.arange(BATCH) % 3 + 1.0,
    }


def test_value_is_the_lowest_critic_of_the_mean_action():
    sac, obs = make_sac(num_critics=3, critic_subset=3), make_batch()["obs"]
    sac.set_obs_stats(torch.full((OBS_DIM,), 0.5), torch.full((OBS_DIM,), 2.0))
    q = sac.critic(sac.norm(obs), sac.act(obs, deterministic=True))
    assert sac.value(obs).tolist() == [min(column) for column in q.T.tolist()]
    assert not sac.value(obs).requires_grad


def sample_by_hand(sac: SAC, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Action (A,) and logprob () of one observation, with the textbook formula for the squashed density."""
    out = sac.policy.net(obs.unsqueeze(0)).squeeze(0)
    mean, log_std = out[:ACTION_DIM], -5 + 3.5 * (torch.tanh(out[ACTION_DIM:]) + 1)
    raw = mean + log_std.exp() * noise
    logprob = torch.distributions.Normal(mean, log_std.exp()).log_prob(raw) - torch.log(
        1 - torch.tanh(raw) ** 2
    )
    return torch.tanh(raw), logprob.sum()


def q_by_hand(critic, index: int, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """One critic, one sample, layer by layer with the means and variances of LayerNorm written out."""
    x = torch.cat([obs, action])
    for layer in range(len(critic.weights)):
        x = x @ critic.weights[layer][index]
        last = layer == len(critic.weights) - 1
        if critic.layer_norm and not last:
            x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        x = x + critic.biases[layer][index, 0]
        x = x if last else x.clamp_min(0)
    return x.squeeze()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("entropy_in_target", [False, True])
@pytest.mark.parametrize("target_clip", [None, (0.0, 0.5)])
def test_target_matches_slow_reference(float64, layer_norm, entropy_in_target, target_clip):
    sac = make_sac(
        critic_layer_norm=layer_norm,
        entropy_in_target=entropy_in_target,
        target_clip=target_clip,
        init_alpha=0.3,
        gamma=0.9,
    )
    batch = make_batch()
    noise = torch.randn(BATCH, ACTION_DIM)
    y = sac.target_q(batch, batch["next_obs"], noise, subset=None)
    for i in range(BATCH):
        action, logprob = sample_by_hand(sac, batch["next_obs"][i], noise[i])
        value = min(q_by_hand(sac.target, c, batch["next_obs"][i], action).item() for c in range(2))
        if entropy_in_target:
            value -= 0.3 * logprob.item()
        expected = batch["reward"][i].item() + (
            0 if batch["terminal"][i] else 0.9 ** batch["steps"][i].item() * value
        )
        if target_clip is not None:
            expected = min(max(expected, target_clip[0]), target_clip[1])
        assert y[i].item() == pytest.approx(expected, abs=1e-6)


def test_subset_limits_the_minimum_to_the_chosen_critics(float64):
    sac = make_sac(num_critics=5, critic_subset=2, entropy_in_target=False)
    batch, noise = make_batch(), torch.randn(BATCH, ACTION_DIM)
    action, _ = sac.policy.sample(batch["next_obs"], noise)
    q = sac.target(batch["next_obs"], action)
    y = sac.target_q(batch, batch["next_obs"], noise, subset=torch.tensor([3, 1]))
    expected = batch["reward"] + 0.8 ** batch["steps"] * (~batch["terminal"]) * torch.minimum(q[1], q[3])
    torch.testing.assert_close(y, expected)


def test_rollout_noise_surrounds_the_mean_of_the_averaged_policy():
    sac = make_sac(rollout_noise=0.1, ema_actor=0.5)
    for parameter in sac.policy.parameters():  # the averaged policy alone counts
        parameter.data.fill_(torch.nan)
    action = sac.act(torch.zeros(2000, OBS_DIM))
    mean = sac.act(torch.zeros(1, OBS_DIM), deterministic=True)
    assert (action.mean(0) - mean).abs().max() < 0.01 and abs(float(action.std()) - 0.1) < 0.01
    with pytest.raises(ValueError, match="rollout_noise must not be negative"):
        SACConfig(rollout_noise=-0.1)


def test_update_matches_slow_reference(float64):
    """One update against separate losses, sample by sample, stepped by plain AdamW."""
    sac, twin = (
        make_sac(critic_layer_norm=True, init_alpha=0.2, weight_decay=0.1, tau=0.05) for _ in range(2)
    )
    sac.generator.manual_seed(5)
    batch = make_batch()
    sac.update(batch)

    noise = torch.randn(BATCH, 2 * ACTION_DIM, generator=torch.Generator().manual_seed(5))
    y = twin.target_q(batch, batch["next_obs"], noise[:, :ACTION_DIM], None)
    critic_loss = 0.0
    for c in range(2):
        for i in range(BATCH):
            critic_loss += (
                q_by_hand(twin.critic, c, batch["obs"][i], batch["action"][i]) - y[i]
            ) ** 2 / BATCH
    critic_adam = torch.optim.AdamW(twin.critic.parameters(), lr=1e-3, weight_decay=0.1)
    critic_loss.backward()
    critic_adam.step()

    actor_loss, mean_logprob = 0.0, 0.0
    for i in range(BATCH):
        action, logprob = sample_by_hand(twin, batch["obs"][i], noise[i, ACTION_DIM:])
        q = min((q_by_hand(twin.critic, c, batch["obs"][i], action) for c in range(2)), key=torch.detach)
        actor_loss += (0.2 * logprob - q) / BATCH
        mean_logprob += logprob.item() / BATCH
    actor_adam = torch.optim.AdamW(twin.policy.parameters(), lr=1e-3, weight_decay=0.1)
    actor_loss.backward()
    actor_adam.step()

    for name, module in (("critic", twin.critic), ("policy", twin.policy)):
        updated = getattr(sac, name).state_dict()
        for key, value in module.state_dict().items():
            torch.testing.assert_close(updated[key], value, atol=1e-6, rtol=0, msg=f"{name}.{key}")
    for target, before, after in zip(
        sac.target.parameters(), twin.target.parameters(), sac.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.95 * before + 0.05 * after, atol=1e-9, rtol=0)
    # The gradient of log_alpha has the sign of entropy - target, and Adam's first step is lr long.
    sign = math.copysign(1, -mean_logprob + ACTION_DIM)
    assert sac.log_alpha.item() == pytest.approx(math.log(0.2) - 3e-4 * sign, abs=1e-6)


def test_imitation_adds_a_squared_error_of_the_mean_action():
    sac, batch = make_sac(imitation_coef=3.0, prior_data="x"), make_batch()
    best_obs, best_action = batch["next_obs"], batch["action"]
    noise = torch.zeros(BATCH, ACTION_DIM)
    plain, _ = sac.actor_loss(batch["obs"], noise)
    pulled, _ = sac.actor_loss(batch["obs"], noise, (best_obs, best_action))
    off = sum((sac.policy.mean(best_obs[i : i + 1])[0] - best_action[i]).square().sum() for i in range(BATCH))
    torch.testing.assert_close(pulled - plain, 3.0 * off / BATCH)
    before = float(off.detach() / BATCH)
    for _ in range(300):
        sac.update(batch | {"best_obs": best_obs, "best_action": best_action})
    after = (sac.policy.mean(best_obs) - best_action).square().sum(-1).mean()
    assert float(after.detach()) < 0.1 * before


def test_frozen_critic_passes_gradients_to_actions_only():
    sac = make_sac()
    batch = make_batch()
    action = batch["action"].clone().requires_grad_()
    sac.critic(batch["obs"], action, frozen=True).sum().backward()
    assert action.grad.abs().sum() > 0
    assert all(p.grad is None for p in sac.critic.parameters())


def test_updates_depend_on_the_seed_alone():
    """The global generator may be used by anybody in between."""

    def run(disturb: bool, seed: int = 3) -> dict[str, torch.Tensor]:
        sac = make_sac(seed, obs_noise=0.2, num_critics=4, critic_subset=2, ema_actor=0.1)
        for step in range(3):
            if disturb:
                torch.rand(step + 1)
            sac.update(make_batch(step))
        return sac.actor_state()["eval_policy"]

    first, again, other = run(False), run(True), run(False, seed=4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_loaded_agent_goes_on_as_the_saved_one_would(tmp_path):
    sac = make_sac(obs_noise=0.1, ema_actor=0.1)
    sac.set_obs_stats(torch.arange(5.0), torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]))
    sac.update(make_batch())
    torch.save(sac.state_dict(), tmp_path / "state.pt")
    loaded = make_sac(seed=9, obs_noise=0.1, ema_actor=0.1)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for agent in (sac, loaded):
        agent.update(make_batch(2))
    obs = make_batch(3)["obs"]
    assert torch.equal(sac.act(obs), loaded.act(obs))
    assert torch.equal(sac.act(obs, deterministic=True), loaded.act(obs, deterministic=True))
    assert torch.equal(sac.log_alpha, loaded.log_alpha)
    assert loaded.norm.std.tolist() == pytest.approx([1.0, 2.0, 3.0, 4.0, 0.01])  # the floor


def test_actor_state_is_a_snapshot_that_acts_alike():
    sac, rollout = make_sac(ema_actor=0.1), make_sac(seed=8, ema_actor=0.1)
    obs = make_batch()["obs"]
    state, before = sac.actor_state(), sac.act(obs, deterministic=True)
    sac.update(make_batch())
    rollout.load_actor_state(state)
    assert torch.equal(rollout.act(obs, deterministic=True), before)
    assert not torch.equal(sac.act(obs, deterministic=True), before)


def test_ema_actor_evaluates_and_policy_explores():
    sac = make_sac(ema_actor=0.25)
    before = [p.clone() for p in sac.policy.parameters()]
    sac.update(make_batch())
    for ema, old, new in zip(sac.eval_actor.parameters(), before, sac.policy.parameters(), strict=True):
        torch.testing.assert_close(ema, 0.75 * old + 0.25 * new)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"critic_subset": 3}, "critic_subset"),
        ({"target_clip": (1.0, 0.0)}, "low < high"),
        ({"offline_updates": 5}, "prior_data names no folder"),
        ({"imitation_coef": 1.0}, "nobody to imitate"),
        ({"n_step": 0}, "n_step must be at least 1"),
        ({"imitation_coef": -1.0}, "imitation_coef must not be negative"),
        ({"imitation_share": 1.5}, r"imitation_share must lie in \[0, 1\]"),
        ({"utd": 0}, "utd must be > 0"),
    ],
)
def test_config_checks_itself(wrong, message):
    with pytest.raises(ValueError, match=message):
        SACConfig(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_compiled_losses_are_the_same(cudagraphs):
    """Takes half a minute of compiling. On the CPU it needs a C++ compiler, and CUDA graphs are left out."""
    after = []
    for compile in (False, True):
        sac = make_sac(critic_layer_norm=True, compile=compile, cudagraphs=compile and cudagraphs)
        for seed in range(3):
            metrics = sac.update(make_batch(seed))
        after.append(
            torch.stack([*metrics.values(), sac.act(torch.ones(1, OBS_DIM), deterministic=True).sum()])
        )
    torch.testing.assert_close(after[0], after[1], atol=1e-4, rtol=1e-4)


def interact(agent: SAC, env: ReachEnv, buffer: ReplayBuffer, dense: float, sparse: float) -> None:
    """One step of all envs into the buffer, paid by these weights. Time limits are no terminals."""
    obs, action = env.obs, agent.act(env.obs)
    distance_reward, next_obs, success, _ = env.step(action)
    reward = dense * distance_reward + sparse * success
    buffer.add(obs, next_obs, action, reward, torch.zeros(env.num_envs, dtype=torch.bool))


def test_sac_learns_to_reach():
    torch.manual_seed(0)
    cfg = SACConfig(gamma=0.8, tau=0.05, init_alpha=0.02, critic_layer_norm=True)
    env = ReachEnv(16, seed=0)
    agent = SAC(
        env.obs_dim, env.action_dim, cfg, ActorModelConfig(hidden_dims=(64, 64)), OptimConfig(lr=3e-3)
    )
    buffer = ReplayBuffer(5000, env.obs_dim, env.action_dim)
    assert success_at_end(agent) < 0.2
    for step in range(250):
        interact(agent, env, buffer, dense=1.0, sparse=0.0)
        for _ in range(4 if step >= 10 else 0):
            agent.update(buffer.sample(128, agent.generator))
    assert success_at_end(agent) == 1.0


def prior_buffer(paid: bool) -> ReplayBuffer:
    """Noisy episodes towards the goal; reward 1 at the goal, or (the control) never."""
    env, buffer = ReachEnv(100, seed=7), ReplayBuffer(2000, 4, 2)
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        obs = env.obs
        action = 2 * (obs[:, 2:] - obs[:, :2]) + 0.5 * torch.randn(100, 2, generator=generator)
        action = action.clamp(-1, 1)
        _, next_obs, success, _ = env.step(action)
        buffer.add(obs, next_obs, action, success.float() * paid, torch.zeros(100, dtype=torch.bool))
    return buffer


@pytest.mark.parametrize("paid", [True, False])
def test_prior_data_carries_a_sparse_reward(paid):
    """RLPD with all that steadies it: half of each batch is prior data. Unpaid, the same teach nothing."""
    torch.manual_seed(0)
    cfg = SACConfig(
        gamma=0.9,
        tau=0.05,
        critic_layer_norm=True,
        entropy_in_target=False,
        target_clip=(0.0, 10.0),
        obs_noise=0.05,
        ema_actor=0.02,
    )
    model, optim = ActorModelConfig(hidden_dims=(64, 64)), OptimConfig(lr=3e-3, weight_decay=0.01)
    env, prior = ReachEnv(8, seed=0), prior_buffer(paid)
    agent = SAC(env.obs_dim, env.action_dim, cfg, model, optim)
    agent.set_obs_stats(prior.obs.mean(0), prior.obs.std(0))
    online = ReplayBuffer(2000, env.obs_dim, env.action_dim)
    for step in range(150):
        interact(agent, env, online, dense=0.0, sparse=float(paid))
        for _ in range(4 if step >= 5 else 0):
            agent.update(mix_batches([buffer.sample(64, agent.generator) for buffer in (online, prior)]))
    assert success_at_end(agent) == 1.0 if paid else success_at_end(agent) < 0.2
