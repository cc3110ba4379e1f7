"""Networks of the agents: small MLPs over state vectors, Gaussian policies, all critics as one module.

Nothing here draws random numbers while running: noise enters as an argument, so that an update is a pure
function of its inputs (the same numbers in one process, in many, compiled or not).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
HIDDEN_GAIN = math.sqrt(2)  # orthogonal init of hidden layers, as CleanRL and the reference
STD_FLOOR = 1e-2  # metres, radians: what varies less than this in the data is noise to a policy, not signal
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # range of SAC's log-std, as CleanRL
NUM_FILTERS, NUM_PIXEL_FEATURES = 32, 50  # of the pixel encoder, as SAC+AE, DrQ


@dataclass
class ActorModelConfig:
    """Section `actor.model`: the policy network; the critics get the same hidden layers."""

    hidden_dims: tuple[int, ...] = (256, 256, 256)
    activation: Literal["tanh", "relu"] | None = None  # null: tanh for PPO, relu for SAC
    log_std_init: float = -0.5  # PPO: start of its state-independent log-std; SAC's comes from the network
    norm_obs: bool = False  # scale observations by a fixed mean and std, set once from data
    pixels: int | None = None  # SAC: side of the square picture it sees of each view (32, 64); null: none

    def __post_init__(self) -> None:
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims must list sizes of at least 1, got {self.hidden_dims}")
        if self.pixels is not None and self.pixels < 8:
            raise ValueError(f"pixels must be at least 8, or null for the state alone, got {self.pixels}")


@dataclass
class OptimConfig:
    """Section `actor.optim`: AdamW for actor and critic."""

    lr: float = 3e-4
    critic_lr: float | None = None  # null: lr
    eps: float = 1e-8
    weight_decay: float = 0.0  # AdamW; 1 at lr 1e-3 was decisive where little data is reused often

    def __post_init__(self) -> None:
        if self.lr <= 0 or (self.critic_lr is not None and self.critic_lr <= 0):
            raise ValueError(f"lr and critic_lr must be > 0, got {self.lr} and {self.critic_lr}")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(f"eps must be > 0, weight_decay >= 0; got {self.eps} and {self.weight_decay}")

    @property
    def value_lr(self) -> float:
        """Learning rate of critics and value functions."""
        return self.lr if self.critic_lr is None else self.critic_lr


class ObsNorm(nn.Module):
    """(obs - mean) / std with statistics that are set once and then stay; the identity until then."""

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and std, each (D,). A std below STD_FLOOR is raised to it."""
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise ValueError(
                f"mean and std must have shape {tuple(self.mean.shape)}, "
                f"got {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(STD_FLOOR))

    def forward(self, obs: Tensor) -> Tensor:
        return (obs - self.mean) / self.std


class MLP(nn.Module):
    """(B, in_dim) -> (B, out_dim); activations between the layers, none after the last."""

    def __init__(
        self, in_dim: int, hidden_dims: tuple[int, ...], out_dim: int, activation: str, out_gain: float
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        dims = [in_dim, *hidden_dims, out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, out_gain if layer is self.layers[-1] else HIDDEN_GAIN)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class PixelEncoder(nn.Module):
    """(B, S + V * side * side * 3) -> (B, S + NUM_PIXEL_FEATURES): the state as it is, pictures as features.

    An observation is the state, then V pictures of floats in [0, 1], each row by row, RGB last. Convolutions
    of 3x3, all views through the same ones, then Linear, LayerNorm and tanh over the views together, as in
    SAC+AE (Yarats et al. 2019, arXiv:1910.01741) and DrQ (Kostrikov et al. 2020, arXiv:2004.13649), but all
    convolutions save the last have stride 2: a fifth of the work at 64 pixels, so that CPUs do it.
    """

    def __init__(self, obs_dim: int, state_dim: int, side: int) -> None:
        """ValueError unless whole pictures follow the state."""
        super().__init__()
        self.state_dim, self.side = state_dim, side
        self.num_views, rest = divmod(obs_dim - state_dim, 3 * side * side)
        if self.num_views < 1 or rest:
            raise ValueError(
                f"{obs_dim} numbers, {state_dim} of them state, hold no whole pictures of {side} x {side}"
            )
        channels, convolutions = 3, []
        while side > 8:
            convolutions.append(nn.Conv2d(channels, NUM_FILTERS, 3, stride=2, padding=1))
            channels, side = NUM_FILTERS, (side + 1) // 2
        convolutions.append(nn.Conv2d(channels, NUM_FILTERS, 3))
        self.convolutions = nn.ModuleList(convolutions)
        self.linear = nn.Linear(self.num_views * NUM_FILTERS * (side - 2) ** 2, NUM_PIXEL_FEATURES)
        self.layer_norm = nn.LayerNorm(NUM_PIXEL_FEATURES)
        for layer in (*self.convolutions, self.linear):
            nn.init.orthogonal_(layer.weight, 1.0 if layer is self.linear else HIDDEN_GAIN)
            nn.init.zeros_(layer.bias)

    @property
    def out_dim(self) -> int:
        return self.state_dim + NUM_PIXEL_FEATURES

    def pictures(self, obs: Tensor) -> Tensor:
        """(B * V, side, side, 3)"""
        return obs[:, self.state_dim :].reshape(-1, self.side, self.side, 3)

    def shifted(self, obs: Tensor, shift: Tensor) -> Tensor:
        """obs, each picture moved by shift (B * V, 2) int64 pixels; what comes in repeats the border."""
        pictures, place = self.pictures(obs), torch.arange(self.side, device=obs.device)
        rows, columns = ((place + by[:, None]).clamp(0, self.side - 1) for by in shift.unbind(1))
        number = torch.arange(len(pictures), device=obs.device)[:, None, None]
        moved = pictures[number, rows[:, :, None], columns[:, None, :]]
        return torch.cat([obs[:, : self.state_dim], moved.reshape(len(obs), -1)], dim=1)

    def forward(self, obs: Tensor) -> Tensor:
        x = self.pictures(obs).permute(0, 3, 1, 2) - 0.5
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        x = self.linear(x.reshape(len(obs), -1))
        return torch.cat([obs[:, : self.state_dim], torch.tanh(self.layer_norm(x))], dim=1)


class GaussianPolicy(nn.Module):
    """PPO's policy: mean from the network, one log-std per action dimension that no observation moves.

    Actions are unbounded: the log-probability belongs to the raw action, and whoever steps the env clips it.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...],
        activation: str,
        log_std_init: float,
    ) -> None:
        super().__init__()
        self.net = MLP(obs_dim, hidden_dims, action_dim, activation, out_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), float(log_std_init)))

    def mean(self, obs: Tensor) -> Tensor:
        return self.net(obs)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, D), standard normal noise (B, A) -> action (B, A), logprob (B,)."""
        mean = self.net(obs)
        action = mean + self.log_std.exp() * noise
        return action, gaussian_logprob(noise, self.log_std)

    def logprob_and_entropy(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, D), action (B, A) -> logprob (B,), entropy () (it depends on the log-std only)."""
        mean = self.net(obs)
        logprob = gaussian_logprob((action - mean) / self.log_std.exp(), self.log_std)
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return logprob, entropy


class SquashedGaussianPolicy(nn.Module):
    """SAC's policy: tanh of a Gaussian whose mean and log-std both come from the network; actions in (-1,
    1).
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_dims: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.net = MLP(obs_dim, hidden_dims, 2 * action_dim, activation, out_gain=0.01)

    def mean(self, obs: Tensor) -> Tensor:
        mean, _ = self.net(obs).chunk(2, dim=-1)
        return torch.tanh(mean)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, D), standard normal noise (B, A) -> action (B, A) in (-1, 1), logprob (B,)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
        raw = mean + log_std.exp() * noise
        # log(1 - tanh(x)^2) in a form that neither overflows nor needs an epsilon (Spinning Up)
        log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return torch.tanh(raw), gaussian_logprob(noise, log_std) - log_slope.sum(-1)


def gaussian_logprob(standardised: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian at (x - mean) / std = `standardised` (B, A) -> (B,)."""
    return (-0.5 * standardised.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class CriticEnsemble(nn.Module):
    """C independent Q functions as one network over stacked weights (C, in, out): a batched matmul per layer.

    With LayerNorm the layer is act(norm(x W) + b): as Linear, LayerNorm, activation, less what is redundant
    there (a bias the norm would remove again, a gain the next layer's weights can take up).
    """

    def __init__(
        self,
        num_critics: int,
        in_dim: int,
        hidden_dims: tuple[int, ...],
        activation: str,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        self.activation = ACTIVATIONS[activation]
        dims = [in_dim, *hidden_dims, 1]
        pairs = list(pairwise(dims))
        self.weights = nn.ParameterList(torch.empty(num_critics, a, b) for a, b in pairs)
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, b) for _, b in pairs)
        for layer, weight in enumerate(self.weights):
            for one in weight.detach():
                nn.init.orthogonal_(one, HIDDEN_GAIN if layer < len(pairs) - 1 else 1.0)

    def layers(self, frozen: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            yield (weight.detach(), bias.detach()) if frozen else (weight, bias)

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """obs (B, D), action (B, A) -> Q (C, B). `frozen`: gradients reach the inputs, never the weights."""
        x = torch.cat([obs, action], dim=-1).expand(len(self.weights[0]), -1, -1)  # (C, B, in)
        *hidden, last = self.layers(frozen)
        for weight, bias in hidden:
            if self.layer_norm:
                x = F.layer_norm(torch.bmm(x, weight), weight.shape[-1:]) + bias
            else:
                x = torch.baddbmm(bias, x, weight)
            x = self.activation(x)
        weight, bias = last
        return torch.baddbmm(bias, x, weight).squeeze(-1)


def compiled(function: Callable, compile: bool, cudagraphs: bool) -> Callable:
    """`function` as it is, or through torch.compile; `cudagraphs` replays it as CUDA graphs (GPU only).

    Kernel launches dominate updates of networks this small on a GPU (LeanRL measures 2-7x). Compile loss
    functions, not whole updates: tracing stops at `backward()` anyway, and fused optimisers are one kernel
    already. Outputs of a CUDA graph are overwritten by the next call: callers clone what they keep and mark
    each step's begin.
    """
    if cudagraphs:
        return torch.compile(function, mode="reduce-overhead")
    return torch.compile(function) if compile else function


def new_generator(device: torch.device) -> torch.Generator:
    """A generator of its own for one agent, seeded from torch's global one (so from the run's seed)."""
    seed = int(torch.randint(2**31 - 1, ()))
    return torch.Generator(device=device).manual_seed(seed)


def cpu_copy(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict as CPU tensors that later training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}
