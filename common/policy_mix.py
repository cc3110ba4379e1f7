"""A weighted mix of policies that drive envs while episodes are collected: random, scripted, trained.

Each env gets a policy for one episode at a time. What is wanted is data that shows both outcomes and the ways
between them: experts that arrive, tremble, turn back, miss the object, and hands that wander.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.agents import load_agent
from common.envs import EnvSpec
from common.scenes import EnvConfig
from common.scripted import ScriptedExpert

NOISE_MEMORY = 0.7  # share of the action noise that stays from one step to the next (Ornstein-Uhlenbeck)

# ----------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------


def check_range(name: str, low_high: tuple[float, float]) -> None:
    low, high = low_high
    if not 0 <= low <= high:
        raise ValueError(f"{name} is a range [low, high] from 0 up, got [{low}, {high}]")


@dataclass
class PolicyConfig:
    """What all policies share. Ranges are drawn from anew for each episode."""

    weight: float = 1.0  # share of the episodes, relative to the other policies
    noise: tuple[float, float] = (0.0, 0.0)  # sd of the noise on actions in [-1, 1]
    stop_after: tuple[float, float] = (1.0, 1.0)  # fraction of the episode; then only the noise acts

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be 0 or more, got {self.weight}")
        check_range("noise", self.noise)
        check_range("stop_after", self.stop_after)

    @property
    def label(self) -> str:
        """What the table calls it."""
        return self.name


@dataclass
class RandomPolicy(PolicyConfig):
    name: Literal["random"] = "random"
    noise: tuple[float, float] = (0.3, 1.0)
    # Under the noise, an action of this size in a direction that stays for the episode. With the noise alone
    # the gripper trembles about one place; with a drift it comes around.
    drift: tuple[float, float] = (0.0, 0.0)
    to_object: float = 0.0  # share of the drifting episodes whose direction is to the object

    def __post_init__(self):
        super().__post_init__()
        check_range("drift", self.drift)
        if not 0 <= self.to_object <= 1:
            raise ValueError(f"to_object is a share from 0 to 1, got {self.to_object}")

    @property
    def label(self) -> str:
        return self.name if self.drift == (0.0, 0.0) else "random, drifting"


@dataclass
class ScriptedPolicy(PolicyConfig):
    name: Literal["scripted"] = "scripted"
    # retreat: turns back once; oscillate: turns back and forth; wrong_way: takes the object from the goal
    motion: Literal["forward", "retreat", "oscillate", "wrong_way"] = "forward"
    turn_after: tuple[float, float] = (0.2, 0.6)  # fraction of the episode, anew for each turn
    speed: tuple[float, float] = (1.0, 1.0)  # times the expert's
    goal_offset_m: tuple[float, float] = (0.0, 0.0)  # aims so far beside the goal, in a random direction
    # Fraction of the episode after which it aims anew, again and again: near misses and hits come and go.
    aim_again_after: tuple[float, float] | None = None
    object_offset_m: tuple[float, float] = (0.0, 0.0)  # takes the object to be so far aside, and misses it
    skip_object: bool = False  # brings an empty hand to the goal

    def __post_init__(self):
        super().__post_init__()
        for name in ("turn_after", "speed", "goal_offset_m", "object_offset_m"):
            check_range(name, getattr(self, name))
        if self.aim_again_after is not None:
            check_range("aim_again_after", self.aim_again_after)

    @property
    def label(self) -> str:
        return self.name if self.motion == "forward" else f"{self.name}, {self.motion}"


@dataclass
class CheckpointPolicy(PolicyConfig):
    name: Literal["checkpoint"] = "checkpoint"
    path: str = ""  # a checkpoint folder of rl_train.py
    deterministic: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise ValueError("a checkpoint policy needs the path of a checkpoint folder of rl_train.py")


# ----------------------------------------------------------------------------------------------------
# The mix
# ----------------------------------------------------------------------------------------------------


class Mix:
    """Gives each env a policy, drawn by weight, for one episode at a time."""

    def __init__(self, policies: list[PolicyConfig], spec: EnvSpec, env: EnvConfig, seed: int):
        self.policies, self.num_steps = policies, env.max_episode_steps
        self.weights = torch.tensor([float(policy.weight) for policy in policies])
        self.rng = torch.Generator().manual_seed(seed)
        # of its own: what motions draw leaves the noise of policies without them as it was
        self.motion_rng = torch.Generator().manual_seed(seed + 1)
        n, self.action_dim = env.num_envs, spec.action_dim
        self.choice = torch.zeros(n, dtype=torch.long)  # which policy has the env now
        self.sd, self.stop_step, self.clock = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        self.goal_offset, self.object_offset = torch.zeros(n, 3), torch.zeros(n, 3)
        self.skip_object = torch.zeros(n, dtype=torch.bool)
        self.noise = torch.zeros(n, self.action_dim)
        self.first_obs = torch.zeros(n, spec.obs_dim)
        self.speed, self.turn_step, self.aim_step = torch.ones(n), torch.zeros(n), torch.zeros(n)
        self.backwards, self.to_object = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        self.drift = torch.zeros(n, self.action_dim)
        self.actors = [self._actor(policy, spec, env) for policy in policies]

    def _actor(self, policy, spec: EnvSpec, env: EnvConfig):
        if policy.name == "checkpoint":
            agent = load_agent(Path(policy.path), spec, torch.device("cpu"))
            return lambda obs: agent.act(obs, deterministic=policy.deterministic).clamp(-1, 1)
        if policy.name == "random" and policy.to_object == 0:
            return lambda obs: self.drift.clone()  # zeros where it has none: the noise is all it does
        expert = ScriptedExpert(env.task, env.control_mode, spec.obs_layout)
        if policy.name == "random":
            return lambda obs: self._drift_to_object(expert, obs)
        return lambda obs: self._scripted(policy, expert, obs)

    def _drift_to_object(self, expert: ScriptedExpert, obs: torch.Tensor) -> torch.Tensor:
        size, action = self.drift.norm(dim=1), expert.touch(obs)
        action[:, :3] *= (size / action[:, :3].norm(dim=1).clamp(min=1e-6)).clamp(max=1)[:, None]
        return torch.where(self.to_object[:, None], action, self.drift)

    def _scripted(self, policy: ScriptedPolicy, expert: ScriptedExpert, obs: torch.Tensor) -> torch.Tensor:
        if policy.motion == "wrong_way":
            action = expert.wrong_way(obs, self.first_obs)
        else:
            action = expert.act(obs, self.goal_offset, self.object_offset, self.skip_object)
            action = torch.where(self.backwards[:, None], expert.back(obs, self.first_obs), action)
        action[:, :3] *= self.speed[:, None]
        return action

    def _uniform(self, low_high: tuple[float, float], rng: torch.Generator | None = None) -> float:
        low, high = low_high
        return low + (high - low) * float(torch.rand((), generator=rng or self.rng))

    def begin(self, env_ids: torch.Tensor) -> None:
        """A new episode starts in these envs."""
        for i in env_ids.tolist():
            self.choice[i] = torch.multinomial(self.weights, 1, generator=self.rng)
            policy = self.policies[self.choice[i]]
            self.sd[i], self.clock[i] = self._uniform(policy.noise), 0
            self.stop_step[i] = self._uniform(policy.stop_after) * self.num_steps
            self.backwards[i], self.turn_step[i], self.aim_step[i] = False, torch.inf, torch.inf
            if policy.name == "scripted":
                self._aim(i, policy, self.rng)
                across = torch.randn(2, generator=self.motion_rng)
                aside = self._uniform(policy.object_offset_m, self.motion_rng)
                self.object_offset[i, :2] = aside * across / across.norm()
                self.skip_object[i] = policy.skip_object
                self.speed[i] = self._uniform(policy.speed, self.motion_rng)
                if policy.motion in ("retreat", "oscillate"):
                    self.turn_step[i] = self._uniform(policy.turn_after, self.motion_rng) * self.num_steps
            if policy.name == "random":
                direction = torch.randn(self.action_dim, generator=self.motion_rng)
                size = self._uniform(policy.drift, self.motion_rng)
                self.drift[i] = size * direction / direction.norm()
                self.to_object[i] = torch.rand((), generator=self.motion_rng) < policy.to_object
            self.noise[i] = self.sd[i] * torch.randn(self.action_dim, generator=self.rng)

    def _aim(self, i: int, policy: ScriptedPolicy, rng: torch.Generator) -> None:
        """The expert in env i takes the goal to be somewhere near it."""
        direction = torch.randn(3, generator=rng)
        self.goal_offset[i] = self._uniform(policy.goal_offset_m, rng) * direction / direction.norm()
        if policy.aim_again_after is not None:
            leg = self._uniform(policy.aim_again_after, self.motion_rng) * self.num_steps
            self.aim_step[i] = self.clock[i] + max(leg, 1.0)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (N, D) -> action (N, A) in [-1, 1]."""
        self.first_obs[self.clock == 0] = obs[self.clock == 0]
        for i in (self.clock >= self.aim_step).nonzero().squeeze(1).tolist():
            self._aim(i, self.policies[self.choice[i]], self.motion_rng)
        for i in (self.clock >= self.turn_step).nonzero().squeeze(1).tolist():
            policy = self.policies[self.choice[i]]
            leg = self._uniform(policy.turn_after, self.motion_rng) * self.num_steps
            self.backwards[i] = ~self.backwards[i]
            self.turn_step[i] = self.clock[i] + leg if policy.motion == "oscillate" else torch.inf
        action = torch.stack([actor(obs) for actor in self.actors])[self.choice, torch.arange(len(obs))]
        action[self.clock >= self.stop_step] = 0.0
        fresh = torch.randn(self.noise.shape, generator=self.rng) * self.sd[:, None]
        self.noise = NOISE_MEMORY * self.noise + (1 - NOISE_MEMORY**2) ** 0.5 * fresh
        self.clock += 1
        return (action + self.noise).clamp(-1, 1)
