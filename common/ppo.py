"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with the details and names of
CleanRL.

Rewards enter with the time-limit bootstrap already added (`common/rewards.py`), so every end of an episode
cuts the return here. The same code runs on CPU and GPU: a rollout is a dict of (T, N, ...) tensors on the
agent's device.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.nets import (
    MLP,
    ActorModelConfig,
    GaussianPolicy,
    ObsNorm,
    OptimConfig,
    compiled,
    cpu_copy,
    new_generator,
)


@dataclass
class PPOConfig:
    """Section `algorithm` with `name: ppo`."""

    name: Literal["ppo"] = "ppo"
    gamma: float = 0.8  # ManiSkill's own PPO and the reference use 0.8: tasks of 50 short steps
    gae_lambda: float = 0.9
    num_steps: int = 50  # per env and rollout
    update_epochs: int = 8
    minibatch_size: int = 6400  # samples; a rollout is cut into equal parts of about this size
    clip_coef: float = 0.2
    clip_value_loss: bool = True
    norm_adv: bool = True  # per minibatch
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float | None = 0.5
    target_kl: float | None = None  # stop a rollout's epochs once the policy moved this far
    anneal_lr: bool = False  # linearly to 0 over the run
    bootstrap_type: Literal["standard", "always", "none"] = "standard"  # see common/rewards.py
    compile: bool = False  # torch.compile the loss
    cudagraphs: bool = False  # and replay it as CUDA graphs (GPU only)

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ValueError(
                f"gamma and gae_lambda must lie in [0, 1], got {self.gamma} and {self.gae_lambda}"
            )
        for name in ("num_steps", "update_epochs", "minibatch_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        for name in ("clip_coef", "max_grad_norm", "target_kl"):
            if vars(self)[name] is not None and vars(self)[name] <= 0:
                raise ValueError(f"{name} must be > 0, got {vars(self)[name]}")


def gae(
    reward: Tensor, value: Tensor, last_value: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438).

    reward, value (T, N); last_value (N,): value of the observation after the rollout; done (T, N) bool: the
    episode ended with step t, for whatever reason. Returns advantage and return, both (T, N).
    """
    advantage = torch.empty_like(reward)
    going_on = (~done).to(reward.dtype)
    next_value, next_advantage = last_value, torch.zeros_like(last_value)
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * going_on[t] * next_value - value[t]
        next_advantage = delta + gamma * gae_lambda * going_on[t] * next_advantage
        advantage[t] = next_advantage
        next_value = value[t]
    return advantage, advantage + value


class PPO:
    """Gaussian policy and value function with their optimiser."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        algorithm: PPOConfig,
        model: ActorModelConfig,
        optim: OptimConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cfg = algorithm
        self.device = torch.device(device)
        self.action_dim = action_dim
        activation = model.activation or "tanh"
        hidden = model.hidden_dims
        self.norm = ObsNorm(obs_dim).to(self.device)
        self.policy = GaussianPolicy(obs_dim, action_dim, hidden, activation, model.log_std_init).to(
            self.device
        )
        self.critic = MLP(obs_dim, hidden, 1, activation, out_gain=1.0).to(self.device)
        self.learning_rates = (optim.lr, optim.value_lr)
        groups = [
            {"params": list(self.policy.parameters()), "lr": optim.lr},
            {"params": list(self.critic.parameters()), "lr": optim.value_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)
        self.generator = new_generator(self.device)
        self.loss_function = compiled(self.loss, algorithm.compile, algorithm.cudagraphs)

    def set_obs_stats(self, mean: Tensor, std: Tensor) -> None:
        """Scale observations by mean and std (D,) from now on: once, before the first rollout."""
        self.norm.set(mean, std)

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """obs (N, D) -> action (N, A), not clipped: the env's caller does that."""
        if deterministic:
            return self.policy.mean(self.norm(obs.to(self.device)))
        return self.act_with_value(obs)[0]

    @torch.no_grad()
    def act_with_value(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs (N, D) -> action (N, A) not clipped, its logprob (N,), value (N,)."""
        obs = self.norm(obs.to(self.device))
        noise = torch.randn(
            len(obs), self.action_dim, generator=self.generator, device=self.device, dtype=obs.dtype
        )
        action, logprob = self.policy.sample(obs, noise)
        return action, logprob, self.critic(obs).squeeze(-1)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """obs (N, D) -> value (N,)."""
        return self.critic(self.norm(obs.to(self.device))).squeeze(-1)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss () of a minibatch, and what to watch: policy loss, value loss, entropy, approx KL, clip
        fraction (5,).
        """
        cfg = self.cfg
        logprob, entropy = self.policy.logprob_and_entropy(batch["obs"], batch["action"])
        value = self.critic(batch["obs"]).squeeze(-1)
        logratio = logprob - batch["logprob"]
        ratio = logratio.exp()

        advantage = batch["advantage"]
        if cfg.norm_adv:
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        unclipped = -advantage * ratio
        clipped = -advantage * ratio.clamp(1 - cfg.clip_coef, 1 + cfg.clip_coef)
        policy_loss = torch.max(unclipped, clipped).mean()

        squared_error = (value - batch["return"]).square()
        if cfg.clip_value_loss:
            near_old = batch["value"] + (value - batch["value"]).clamp(-cfg.clip_coef, cfg.clip_coef)
            squared_error = torch.max(squared_error, (near_old - batch["return"]).square())
        value_loss = 0.5 * squared_error.mean()

        loss = policy_loss - cfg.ent_coef * entropy + cfg.vf_coef * value_loss
        approx_kl = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
        clip_fraction = ((ratio - 1).abs() > cfg.clip_coef).to(ratio.dtype).mean()
        watched = torch.stack([policy_loss, value_loss, entropy, approx_kl, clip_fraction]).detach()
        return loss, watched

    def update(self, rollout: dict[str, Tensor], progress: float = 0.0) -> dict[str, float]:
        """Learn from one rollout: obs (T, N, D), action (T, N, A), logprob, value, reward (T, N), done (T, N)
        bool and last_value (N,). `progress` in [0, 1] is the share of the run already done, for
        `anneal_lr`.
        """
        cfg = self.cfg
        if cfg.anneal_lr:
            for group, lr in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = lr * (1 - progress)
        advantage, returns = gae(
            rollout["reward"],
            rollout["value"],
            rollout["last_value"],
            rollout["done"],
            cfg.gamma,
            cfg.gae_lambda,
        )
        data = {name: rollout[name].flatten(0, 1) for name in ("action", "logprob", "value")}
        data["obs"] = self.norm(rollout["obs"].flatten(0, 1))
        data["advantage"], data["return"] = advantage.flatten(), returns.flatten()

        watched, last_kl = [], torch.zeros(())
        for epoch in range(cfg.update_epochs):
            if epoch > 0 and cfg.target_kl is not None and last_kl > cfg.target_kl:
                break
            for indices in self.minibatches(len(data["obs"])):
                watched.append(self.step({name: field[indices] for name, field in data.items()}))
            last_kl = watched[-1][3]

        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
        metrics = dict(zip(names, torch.stack(watched).mean(0).tolist(), strict=True))
        unexplained = (data["return"] - data["value"]).var() / data["return"].var().clamp_min(1e-12)
        metrics["explained_variance"] = 1 - float(unexplained)
        metrics["num_minibatches"] = float(len(watched))
        return metrics

    def minibatches(self, num_samples: int) -> tuple[Tensor, ...]:
        """A random order of all samples, cut into parts whose sizes differ by one at most: a small remainder
        would have advantages that cannot be normalised."""
        order = torch.randperm(num_samples, generator=self.generator, device=self.device)
        return order.tensor_split(max(1, round(num_samples / self.cfg.minibatch_size)))

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """One gradient step; returns what `loss` watches."""
        if self.cfg.cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss, watched = self.loss_function(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.cfg.max_grad_norm is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, self.cfg.max_grad_norm)
        self.optimizer.step()
        return watched.clone() if self.cfg.cudagraphs else watched

    def actor_state(self) -> dict[str, dict[str, Tensor]]:
        """What a rollout process needs to act, on the CPU and detached from training."""
        modules = {"norm": self.norm, "policy": self.policy, "critic": self.critic}
        return {name: cpu_copy(module) for name, module in modules.items()}

    def load_actor_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over the weights of an `actor_state`."""
        self.norm.load_state_dict(state["norm"])
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])

    def state_dict(self) -> dict:
        """Everything needed to go on: tensors and plain containers only."""
        return {
            "norm": self.norm.state_dict(),
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": {self.device.type: self.generator.get_state()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`, also of another device type (whose random numbers cannot be
        continued).
        """
        self.load_actor_state(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.device.type in state["generator"]:
            self.generator.set_state(state["generator"][self.device.type].cpu())
