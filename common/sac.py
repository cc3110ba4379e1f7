"""Soft actor-critic (Haarnoja et al. 2018, arXiv:1812.05905) with what makes it work from few samples and
prior data: LayerNorm critics, high update ratios and mixed batches (RLPD, Ball et al. 2023,
arXiv:2302.02948), and against overfitting to a few successful episodes noise on observations, weight decay
and an averaged actor for evaluation.

Policies of pixels go the way of DrQ-v2 (Yarats et al. 2021, arXiv:2107.09645): one encoder, which the loss of
the critics alone trains; actor and target critics see its present features without a gradient.

`SAC.update` is one gradient step of everything on one batch. It never waits for a GPU, and its randomness
comes from the agent's own generator alone.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.nets import (
    ActorModelConfig,
    CriticEnsemble,
    ObsNorm,
    OptimConfig,
    PixelEncoder,
    SquashedGaussianPolicy,
    compiled,
    cpu_copy,
    new_generator,
)


@dataclass
class SACConfig:
    """Section `algorithm` with `name: sac`."""

    name: Literal["sac"] = "sac"
    gamma: float = 0.8  # ManiSkill's own SAC and the reference use 0.8: tasks of 50 short steps
    tau: float = 0.01  # share of the critic that flows into its target at each update
    batch_size: int = 1024
    utd: float = (
        0.5  # updates per env step (all envs together); async_rollout: as many as fit, this is unused
    )
    learning_starts: int = 4000  # env steps before the first online update
    buffer_size: int = 1_000_000
    target_entropy: float | None = None  # null: minus the number of action dimensions
    init_alpha: float = 0.01
    auto_alpha: bool = True  # tune alpha towards target_entropy
    alpha_lr: float = 3e-4
    num_critics: int = 2
    critic_subset: int = 2  # the target takes the minimum over so many, drawn anew at each update (REDQ)
    critic_layer_norm: bool = False
    entropy_in_target: bool = (
        True  # off: the critic values task reward alone (RLPD advises it for sparse rewards)
    )
    target_clip: tuple[float, ...] | None = None  # [lowest, highest] return possible, where it is known
    bootstrap_type: Literal["standard", "always", "none"] = "standard"  # see common/rewards.py
    # folder(s) of episodes; each batch takes prior_fraction from them (RLPD)
    prior_data: str | list[str] | None = None
    prior_fraction: float = 0.5
    n_step: int = 1  # env steps whose reward is summed before the critics' own estimate takes over
    # Self-imitation: a squared error to the actions of the prior episodes that were paid most, in the loss of
    # the policy. It stays where the reward model has seen data, and finds fewer of its mistakes.
    imitation_coef: float = 0.0
    imitation_share: float = 0.1  # of the prior episodes, and only those that were paid more than 0
    imitation_online: bool = False  # the policy's own join them, where paid as much as the least of them
    imitation_batch: float = 0.0  # share of each batch, for critics too, that comes from these episodes
    offline_updates: int = 0  # on prior data, before the first env step
    obs_noise: float = (
        0.0  # sd of Gaussian noise on scaled observations in every update; .2 helped small data
    )
    # sd of Gaussian noise around the mean action of rollouts; null: the policy's own spread, which nothing
    # holds down where imitation and weight decay outweigh Q
    rollout_noise: float | None = None
    pixel_shift: int = 0  # pictures move by up to so many pixels, anew in every update (DrQ: 4 of 84)
    ema_actor: float = 0.0  # rate of an averaged actor used for evaluation (.005); 0 = off
    max_grad_norm: float | None = None
    compile: bool = False  # torch.compile the losses
    cudagraphs: bool = False  # and replay them as CUDA graphs (GPU only)

    def __post_init__(self) -> None:
        for name in ("gamma", "tau", "prior_fraction", "ema_actor", "imitation_share", "imitation_batch"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {vars(self)[name]}")
        for name in ("utd", "init_alpha", "alpha_lr", "max_grad_norm"):
            if vars(self)[name] is not None and vars(self)[name] <= 0:
                raise ValueError(f"{name} must be > 0, got {vars(self)[name]}")
        for name in ("learning_starts", "offline_updates", "obs_noise", "pixel_shift", "imitation_coef"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")
        if self.rollout_noise is not None and self.rollout_noise < 0:
            raise ValueError(f"rollout_noise must not be negative, got {self.rollout_noise}")
        for name in ("batch_size", "buffer_size", "n_step"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if not 1 <= self.critic_subset <= self.num_critics:
            raise ValueError(
                f"critic_subset must lie in 1..num_critics ({self.num_critics}), got {self.critic_subset}"
            )
        clip = self.target_clip
        if clip is not None and (len(clip) != 2 or clip[0] >= clip[1]):
            raise ValueError(f"target_clip must be [low, high] with low < high, got {list(clip)}")
        if self.offline_updates and not self.prior_folders:
            raise ValueError(f"offline_updates is {self.offline_updates}, but prior_data names no folder")
        if self.imitates and not self.prior_folders and not self.imitation_online:
            raise ValueError(
                "nobody to imitate: name a folder in prior_data, or let it imitate itself (imitation_online)"
            )

    @property
    def imitates(self) -> bool:
        return self.imitation_coef > 0 or self.imitation_batch > 0

    @property
    def prior_folders(self) -> list[str]:
        return [self.prior_data] if isinstance(self.prior_data, str) else self.prior_data or []


class SAC:
    """Squashed Gaussian policy, critic ensemble with its target, temperature alpha, and their optimisers.

    With `model.pixels` the first `state_dim` numbers of an observation are the state and the rest is pictures
    (see `PixelEncoder`); scale and noise are for the state alone.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        algorithm: SACConfig,
        model: ActorModelConfig,
        optim: OptimConfig,
        device: torch.device | str = "cpu",
        state_dim: int | None = None,
    ) -> None:
        self.cfg = cfg = algorithm
        self.device = torch.device(device)
        self.action_dim = action_dim
        self.state_dim = obs_dim if state_dim is None else state_dim
        if model.pixels is None and self.state_dim != obs_dim:
            raise ValueError(
                f"of {obs_dim} numbers {self.state_dim} are the state, and nobody sees the others"
            )
        activation = model.activation or "relu"
        self.norm = ObsNorm(self.state_dim).to(self.device)
        self.encoder, in_dim = nn.Identity(), obs_dim
        if model.pixels is not None:
            self.encoder = PixelEncoder(obs_dim, self.state_dim, model.pixels).to(self.device)
            in_dim = self.encoder.out_dim
        self.policy = SquashedGaussianPolicy(in_dim, action_dim, model.hidden_dims, activation).to(
            self.device
        )
        self.critic = CriticEnsemble(
            cfg.num_critics, in_dim + action_dim, model.hidden_dims, activation, cfg.critic_layer_norm
        ).to(self.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.ema_policy = copy.deepcopy(self.policy).requires_grad_(False) if cfg.ema_actor else None
        self.ema_encoder = copy.deepcopy(self.encoder).requires_grad_(False) if cfg.ema_actor else None
        self.log_alpha = torch.tensor(
            [math.log(cfg.init_alpha)], device=self.device, requires_grad=cfg.auto_alpha
        )
        self.target_entropy = -float(action_dim) if cfg.target_entropy is None else cfg.target_entropy

        decay = optim.weight_decay
        seeing = [*self.critic.parameters(), *self.encoder.parameters()]
        self.critic_optimizer = torch.optim.AdamW(
            seeing, lr=optim.value_lr, eps=optim.eps, weight_decay=decay, fused=True
        )
        # Policy and alpha never meet in one gradient, so one optimiser and one backward pass serve both.
        groups = [{"params": list(self.policy.parameters()), "lr": optim.lr, "weight_decay": decay}]
        if cfg.auto_alpha:
            groups.append({"params": [self.log_alpha], "lr": cfg.alpha_lr, "weight_decay": 0.0})
        self.actor_optimizer = torch.optim.AdamW(groups, eps=optim.eps, fused=True)
        self.generator = new_generator(self.device)
        self.critic_loss_function = compiled(self.critic_loss, cfg.compile, cfg.cudagraphs)
        self.actor_loss_function = compiled(self.actor_loss, cfg.compile, cfg.cudagraphs)

    @property
    def eval_actor(self) -> SquashedGaussianPolicy:
        """The policy to evaluate: the averaged one if `ema_actor` is on."""
        return self.policy if self.ema_policy is None else self.ema_policy

    @property
    def eval_encoder(self) -> nn.Module:
        """The encoder that `eval_actor` belongs to."""
        return self.encoder if self.ema_encoder is None else self.ema_encoder

    def set_obs_stats(self, mean: Tensor, std: Tensor) -> None:
        """Scale observations by mean and std (D,) from now on: once, before the first update. Pixels stay."""
        self.norm.set(mean[: self.state_dim], std[: self.state_dim])

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """obs (N, D) -> action (N, A) in [-1, 1]. `deterministic`: the mean of `eval_actor`; else that with
        `rollout_noise`, or a sample of the policy that is being trained."""
        obs, sd = self.scaled(obs.to(self.device)), self.cfg.rollout_noise
        if deterministic or sd is not None:
            mean = self.eval_actor.mean(self.eval_encoder(obs))
            return mean if deterministic else (mean + sd * self.draw(*mean.shape)).clamp(-1, 1)
        return self.policy.sample(self.encoder(obs), self.draw(len(obs), self.action_dim))[0]

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """obs (N, D) -> (N,): what the critics expect, the lowest of them, of the policy's mean action."""
        obs = self.encoder(self.scaled(obs.to(self.device)))
        return self.critic(obs, self.policy.mean(obs)).amin(0)

    def draw(self, rows: int, columns: int) -> Tensor:
        """Standard normal noise (rows, columns) from the agent's generator."""
        return torch.randn(
            rows, columns, generator=self.generator, device=self.device, dtype=self.log_alpha.dtype
        )

    # -- one update ----------------------------------------------------------------------------------------

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One gradient step of critics (and encoder), policy and alpha, then of target and averaged actor.

        batch, on the agent's device: obs, next_obs (B, D), action (B, A), reward, steps (B,) float, terminal
        (B,) bool (see `buffers.ReplayBuffer`); where there is something to imitate, best_obs (B, D) and
        best_action (B, A) too. Returns detached 0-d tensors on the device (reading one waits for the GPU: do
        it rarely).
        """
        cfg = self.cfg
        if cfg.cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        obs = self.encoder(self.noisy(batch["obs"]))
        with torch.no_grad():
            next_obs = self.encoder(self.noisy(batch["next_obs"]))
        next_noise, noise = self.draw(len(obs), 2 * self.action_dim).chunk(2, dim=-1)
        subset = None
        if cfg.critic_subset < cfg.num_critics:
            order = torch.randperm(cfg.num_critics, generator=self.generator, device=self.device)
            subset = order[: cfg.critic_subset]

        loss, critic_watched = self.critic_loss_function(batch, obs, next_obs, next_noise, subset)
        self.descend(loss, self.critic_optimizer)
        best = None
        if "best_obs" in batch:
            with torch.no_grad():
                best = self.encoder(self.noisy(batch["best_obs"])), batch["best_action"]
        loss, actor_watched = self.actor_loss_function(obs.detach(), noise, best)
        self.descend(loss, self.actor_optimizer)
        with torch.no_grad():
            follow(self.target, self.critic, cfg.tau)
            if self.ema_policy is not None:
                follow(self.ema_policy, self.policy, cfg.ema_actor)
                follow(self.ema_encoder, self.encoder, cfg.ema_actor)

        names = ("critic_loss", "q", "q_target", "actor_loss", "entropy", "alpha")
        return dict(zip(names, torch.cat([critic_watched, actor_watched]).unbind(), strict=True))

    def scaled(self, obs: Tensor) -> Tensor:
        """obs (B, D), the state among it scaled."""
        return self.beside_pixels(self.norm(obs[:, : self.state_dim]), obs)

    def noisy(self, obs: Tensor) -> Tensor:
        """`scaled`, with `obs_noise` on the state and pictures moved by up to `pixel_shift`."""
        state = self.norm(obs[:, : self.state_dim])
        if self.cfg.obs_noise:
            state = state + self.cfg.obs_noise * self.draw(*state.shape)
        obs, most = self.beside_pixels(state, obs), self.cfg.pixel_shift
        if not most or not isinstance(self.encoder, PixelEncoder):
            return obs
        size = len(obs) * self.encoder.num_views, 2
        shift = torch.randint(-most, most + 1, size, generator=self.generator, device=self.device)
        return self.encoder.shifted(obs, shift)

    def beside_pixels(self, state: Tensor, obs: Tensor) -> Tensor:
        """obs with another state."""
        pixels = obs[:, self.state_dim :]
        return torch.cat([state, pixels], dim=1) if pixels.shape[1] else state

    @torch.no_grad()
    def target_q(
        self, batch: dict[str, Tensor], next_obs: Tensor, next_noise: Tensor, subset: Tensor | None
    ) -> Tensor:
        """y = reward + gamma^steps * (1 - terminal) * (min_c Q_c(s', a') - alpha * log pi(a'|s')),
        a' ~ pi(s'); (B,).
        """
        cfg = self.cfg
        next_action, next_logprob = self.policy.sample(next_obs, next_noise)
        next_q = self.target(next_obs, next_action)  # (C, B)
        next_value = (next_q if subset is None else next_q[subset]).amin(0)
        if cfg.entropy_in_target:
            next_value = next_value - self.log_alpha.exp() * next_logprob
        y = batch["reward"] + cfg.gamma ** batch["steps"] * (~batch["terminal"]) * next_value
        return y if cfg.target_clip is None else y.clamp(*cfg.target_clip)

    def critic_loss(
        self,
        batch: dict[str, Tensor],
        obs: Tensor,
        next_obs: Tensor,
        next_noise: Tensor,
        subset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Squared error to the target, summed over critics, (); and loss, mean Q, mean target to watch
        (3,).
        """
        y = self.target_q(batch, next_obs, next_noise, subset)
        q = self.critic(obs, batch["action"])  # (C, B)
        loss = (q - y).square().mean(1).sum()
        return loss, torch.stack([loss, q.mean(), y.mean()]).detach()

    def actor_loss(
        self, obs: Tensor, noise: Tensor, best: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """alpha * log pi(a|s) - Q(s, a), plus alpha's own loss, (); and loss, entropy, alpha to watch (3,).

        best: obs (B, D) and action (B, A) to imitate; imitation_coef * |mean(s) - a|^2 joins the loss.
        Q is the minimum of the critics as in SAC, or their mean where targets use a subset of them (REDQ).
        """
        cfg = self.cfg
        action, logprob = self.policy.sample(obs, noise)
        q = self.critic(obs, action, frozen=True)  # (C, B)
        q = q.amin(0) if cfg.critic_subset == cfg.num_critics else q.mean(0)
        alpha = self.log_alpha.detach().exp()
        loss = policy_loss = (alpha * logprob - q).mean()
        entropy = -logprob.detach().mean()
        if best is not None:
            best_obs, best_action = best
            off = (self.policy.mean(best_obs) - best_action).square().sum(-1)
            loss = policy_loss = policy_loss + cfg.imitation_coef * off.mean()
        if cfg.auto_alpha:
            loss = loss + (self.log_alpha.exp() * (entropy - self.target_entropy)).sum()
        return loss, torch.stack([policy_loss.detach(), entropy, alpha.squeeze()])

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.cfg.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.cfg.max_grad_norm)
        optimizer.step()

    # -- state ---------------------------------------------------------------------------------------------

    def actor_state(self) -> dict[str, dict[str, Tensor]]:
        """What a rollout process needs to act, on the CPU and detached from training."""
        return {
            "norm": cpu_copy(self.norm),
            "encoder": cpu_copy(self.encoder),
            "policy": cpu_copy(self.policy),
            "eval_encoder": cpu_copy(self.eval_encoder),
            "eval_policy": cpu_copy(self.eval_actor),
        }

    def load_actor_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over the weights of an `actor_state`."""
        self.norm.load_state_dict(state["norm"])
        self.encoder.load_state_dict(state.get("encoder", {}))  # older checkpoints are of the state alone
        self.policy.load_state_dict(state["policy"])
        if self.ema_policy is not None:
            self.ema_policy.load_state_dict(state["eval_policy"])
            self.ema_encoder.load_state_dict(state.get("eval_encoder", {}))

    def state_dict(self) -> dict:
        """Everything needed to go on (less the replay buffer): tensors and plain containers only."""
        return {
            "norm": self.norm.state_dict(),
            "encoder": self.encoder.state_dict(),
            "policy": self.policy.state_dict(),
            "eval_encoder": self.eval_encoder.state_dict(),
            "eval_policy": self.eval_actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "log_alpha": self.log_alpha.detach(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "generator": {self.device.type: self.generator.get_state()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`, also of another device type (whose random numbers cannot be
        continued).
        """
        self.load_actor_state(state)
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        if self.device.type in state["generator"]:
            self.generator.set_state(state["generator"][self.device.type].cpu())


def follow(average: nn.Module, module: nn.Module, rate: float) -> None:
    """average += rate * (module - average), for all parameters in one call."""
    if parameters := list(average.parameters()):
        torch._foreach_lerp_(parameters, list(module.parameters()), rate)
