"""Collect episodes: drive an env with a mix of policies and write every episode as one pickle file.

    python collect.py configs/demo_collect.yaml [key=value ...]

In: a task (`env.eval`), a weighted mix of policies (`policies`), a stop rule (`runner`).
Out: `<log_path>/collected_data/*.pkl` (format: common/episodes.py), `config.yaml`, `summary.json`.
A second start with the same `log_path` goes on where the first one stopped.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common import config
from common.agents import load_agent
from common.env_workers import EnvPool
from common.envs import EnvSpec
from common.episodes import EpisodeWriter, read_episode
from common.files import new_run_dir, save_json
from common.log import LoggerConfig
from common.runtime import UserError, run_script, seed_everything, set_threads
from common.scenes import EnvConfig
from common.scripted import ScriptedExpert
from common.wrappers import EpisodeRecorder

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
    object_offset_m: tuple[float, float] = (0.0, 0.0)  # takes the object to be so far aside, and misses it
    skip_object: bool = False  # brings an empty hand to the goal

    def __post_init__(self):
        super().__post_init__()
        for name in ("turn_after", "speed", "goal_offset_m", "object_offset_m"):
            check_range(name, getattr(self, name))

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


@dataclass
class RunnerConfig:
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(experiment_name="collect"))
    seed: int = 0
    num_episodes: int | None = None  # stop here; null: by the two numbers below, 200 if they are null too
    num_successes: int | None = None  # stop once so many episodes succeeded ...
    num_failures: int | None = None  # ... and so many failed

    @property
    def episode_limit(self) -> int | None:
        """`num_episodes`, or 200 where nothing says when to stop."""
        said = self.num_episodes, self.num_successes, self.num_failures
        return 200 if said == (None, None, None) else self.num_episodes


@dataclass
class EnvSection:
    eval: EnvConfig = field(default_factory=EnvConfig)


@dataclass
class Config:
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    env: EnvSection = field(default_factory=EnvSection)
    policies: list[RandomPolicy | ScriptedPolicy | CheckpointPolicy] = field(
        default_factory=lambda: [RandomPolicy()]
    )

    def __post_init__(self):
        if not sum(policy.weight for policy in self.policies) > 0:
            raise ValueError("policies: name at least one with a weight above 0")
        if self.env.eval.data_collection.gae_gamma is not None:
            raise ValueError(
                "data_collection.gae_gamma scores by a critic: rl_train.py has one, this does not"
            )
        if self.runner.num_failures is not None and self.env.eval.data_collection.only_success:
            raise ValueError("runner.num_failures is never reached where only_success keeps no failures")


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
        self.speed, self.turn_step = torch.ones(n), torch.zeros(n)
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
            self.backwards[i], self.turn_step[i] = False, torch.inf
            if policy.name == "scripted":
                direction = torch.randn(3, generator=self.rng)
                self.goal_offset[i] = self._uniform(policy.goal_offset_m) * direction / direction.norm()
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

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (N, D) -> action (N, A) in [-1, 1]."""
        self.first_obs[self.clock == 0] = obs[self.clock == 0]
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


# ----------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------


def enough(cfg: RunnerConfig, episodes: int, successes: int) -> bool:
    """The stop rule: N episodes, or N successes and M failures."""
    if cfg.episode_limit is not None and episodes >= cfg.episode_limit:
        return True
    quotas, have = [cfg.num_successes, cfg.num_failures], [successes, episodes - successes]
    return quotas != [None, None] and all(q is None or h >= q for q, h in zip(quotas, have, strict=True))


def episodes_present(folder: Path, spec: EnvSpec) -> tuple[int, int]:
    """-> episodes, successes of an earlier start. UserError if it had another task, cameras or controls."""
    paths = sorted(folder.glob("*.pkl"))
    for path in paths:
        episode = read_episode(path, views=())
        for name, theirs, ours in (
            ("cameras", episode.render, spec.render),
            ("controls", episode.control, spec.control),
        ):
            if theirs != ours:
                raise UserError(f"{path} was made with another task or other {name}; choose another log_path")
    return len(paths), sum(path.stem.endswith("_success") for path in paths)


def collect(cfg: Config, run_dir: Path, folder: Path) -> dict:
    """Fill `folder` up to the stop rule. -> the numbers of this start, for the table and summary.json."""
    env, runner = cfg.env.eval, cfg.runner
    by_policy = [{"policy": p.label, "episodes": 0, "success_once": 0} for p in cfg.policies]
    with EnvPool(env.num_workers, env.num_envs) as pool:
        envs = pool.make(env)
        before, successes_before = episodes_present(folder, envs.spec)
        config.save(cfg, run_dir / "config.yaml")  # not where the start is refused: it tells of what is there
        if before:
            print(f"{folder} holds {before} episodes ({successes_before} successes); going on from there")
        seed = runner.seed + before  # what is appended must not repeat what is there
        mix = Mix(cfg.policies, envs.spec, env, seed)
        with (
            EpisodeWriter(folder) as writer,
            tqdm(total=runner.episode_limit, initial=before, unit="ep", mininterval=0.5) as bar,
        ):
            recorder = EpisodeRecorder(envs, env.data_collection, writer)
            start = time.perf_counter()
            obs = recorder.reset(seed)
            mix.begin(torch.arange(env.num_envs))
            success_once = torch.zeros(env.num_envs, dtype=torch.bool)
            while not enough(runner, bar.n, successes_before + recorder.num_successes):
                step = recorder.step(mix.act(obs.cpu()).to(recorder.device))
                obs = step.obs
                success_once |= step.success.cpu()
                ended = step.done.cpu().nonzero().squeeze(1)
                for i in ended.tolist():
                    by_policy[mix.choice[i]]["episodes"] += 1
                    by_policy[mix.choice[i]]["success_once"] += int(success_once[i])
                mix.begin(ended)
                success_once[ended] = False
                bar.update(before + recorder.num_episodes - bar.n)
        seconds = time.perf_counter() - start
    return {
        "num_episodes": before + recorder.num_episodes,
        "num_successes": successes_before + recorder.num_successes,
        "num_frames": recorder.num_frames,
        "env_steps": recorder.num_steps,
        "seconds": round(seconds, 1),
        "env_steps_per_s": round(recorder.num_steps / seconds, 1),
        "by_policy": by_policy,
    }


def print_table(summary: dict, folder: Path) -> None:
    print(f"\n{'policy':<20}{'episodes':>10}{'succeeded once':>16}")
    for row in summary["by_policy"]:
        print(f"{row['policy']:<20}{row['episodes']:>10}{row['success_once']:>16}")
    print(
        f"\n{folder}: {summary['num_episodes']} episodes, {summary['num_successes']} successes; "
        f"this start wrote {summary['num_frames']} frames in {summary['seconds']} s, "
        f"{summary['env_steps_per_s']} env steps/s"
    )


def main() -> None:
    cfg = config.load(Config, description=__doc__)
    set_threads(1)
    seed_everything(cfg.runner.seed)
    run_dir = new_run_dir(cfg.runner.logger.log_path, cfg.runner.logger.experiment_name, may_append=True)
    folder = Path(cfg.env.eval.data_collection.save_dir or run_dir / "collected_data")
    summary = collect(cfg, run_dir, folder)
    if summary["env_steps"] or not (run_dir / "summary.json").exists():  # else it tells of an earlier start
        save_json(summary, run_dir / "summary.json")
    print_table(summary, folder)


if __name__ == "__main__":
    run_script(main)
