"""All settings of rl_train.py, and which of them do not go together.

`runner` is described in common/run.py, `reward` in common/reward_config.py, `algorithm` in common/ppo.py and
sac.py, `env` in common/scenes.py and, for an arm, common/franka_config.py.
"""

from dataclasses import dataclass, field

from common.devices import DevicesConfig
from common.franka_config import FrankaConfig
from common.nets import ActorModelConfig, OptimConfig
from common.ppo import PPOConfig
from common.reward_config import RewardConfig
from common.run import RunnerConfig
from common.sac import SACConfig
from common.scenes import EnvConfig


@dataclass
class EnvSection:
    train: EnvConfig | FrankaConfig = field(default_factory=EnvConfig)
    eval: EnvConfig | FrankaConfig = field(default_factory=EnvConfig)  # of an arm: leave it out, or as train

    @property
    def at_an_arm(self) -> bool:
        return isinstance(self.train, FrankaConfig)

    @property
    def fps(self) -> int:
        """Of videos."""
        return round(self.train.override_cfg.step_hz) if self.at_an_arm else self.eval.control_freq or 20


@dataclass
class ActorSection:
    model: ActorModelConfig = field(default_factory=ActorModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class Config:
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    env: EnvSection = field(default_factory=EnvSection)
    algorithm: PPOConfig | SACConfig = field(default_factory=PPOConfig)
    actor: ActorSection = field(default_factory=ActorSection)
    reward: RewardConfig = field(default_factory=RewardConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)  # of the operator at an arm

    def __post_init__(self):
        self._check_learner()
        if self.env.at_an_arm:
            self._check_arm()
        else:
            self._check_simulation()
            self._check_windows()

    def _check_learner(self) -> None:
        if self.runner.async_rollout and self.algorithm.name != "sac":
            raise ValueError(
                "runner.async_rollout is for SAC; PPO learns from its own policy's rollout alone"
            )
        if self.runner.async_rollout and self.env.train.data_collection.enabled:
            raise ValueError(
                "env.train.data_collection cannot record an asynchronous rollout; use env.eval's"
            )
        if self.runner.async_rollout and (self.algorithm.n_step > 1 or self.algorithm.imitation_online):
            raise ValueError(
                "an asynchronous rollout sends many steps at once, and algorithm.n_step above 1 and "
                "imitation_online want one after the other: set runner.async_rollout to false"
            )
        if self.algorithm.name == "ppo" and self.actor.model.norm_obs:
            raise ValueError("actor.model.norm_obs takes mean and std from prior data, which PPO has none of")
        if self.actor.model.pixels is not None and self.algorithm.name == "ppo":
            raise ValueError("actor.model.pixels is for SAC; PPO sees the state alone: set it to null")
        if self.actor.model.pixels is not None and self.runner.async_rollout:
            raise ValueError("actor.model.pixels goes without runner.async_rollout: set one of them off")
        if self.reward.shaping is not None and self.algorithm.name == "sac" and self.algorithm.imitates:
            raise ValueError(
                "imitation takes the episodes that were paid most, and reward.shaping pays differences, "
                "whose sum says nothing of an episode: set imitation_coef and imitation_batch to 0, or "
                "reward.shaping to null"
            )
        if self.reward.shaping is not None:
            self._check_shaping()
        if not self.reward.use_reward_model and self.reward.env_reward_weight == 0:
            raise ValueError("nobody pays: set reward.use_reward_model, or reward.env_reward_weight to 1")
        if self.reward.refresh_every:
            self._check_refresh()
        if self.runner.async_rollout and self.reward.keep_hard:
            raise ValueError("reward.keep_hard goes without runner.async_rollout: set one of them off")
        audit = self.reward.audit
        if audit is not None and audit.action == "lower" and self.runner.async_rollout:
            raise ValueError("reward.audit.action lower does not reach an asynchronous rollout; warn or stop")

    def _check_shaping(self) -> None:
        """The potential is 0 at an episode's first step, and where a fixed horizon ends: see `Shaping`."""
        algorithm = self.algorithm
        sees_time = not self.env.at_an_arm and self.env.train.observe_time
        if not sees_time or algorithm.bootstrap_type != "none":
            raise ValueError(
                "reward.shaping moves no optimum only where the policy sees the time and nothing counts "
                "after the limit, in a simulation: set env.*.observe_time to true and "
                "algorithm.bootstrap_type to none"
            )
        if algorithm.name == "sac" and algorithm.target_clip is not None:
            raise ValueError(
                "algorithm.target_clip bounds returns of the env, and reward.shaping lowers them by its "
                "potential: set one of them to null"
            )

    def _check_refresh(self) -> None:
        algorithm = self.algorithm
        if algorithm.name != "sac" or self.runner.async_rollout or self.env.at_an_arm:
            raise ValueError("reward.refresh_every is for SAC in a simulation, without runner.async_rollout")
        if algorithm.n_step > 1 or algorithm.imitates:
            raise ValueError(
                "reward.refresh_every pays single steps again; algorithm.n_step above 1 and imitation keep "
                "whole episodes by what they were paid: turn them off"
            )
        if self.reward.audit is not None and self.reward.audit.action == "lower":
            raise ValueError(
                "reward.refresh_every pays again by one weight, and reward.audit.action lower changes it"
            )

    @property
    def can_replay(self) -> bool:
        """Whether an evaluation can be played once more: in simulation, where nobody records it."""
        return not self.env.at_an_arm and not self.env.eval.data_collection.enabled

    def _check_arm(self) -> None:
        env, reward = self.env, self.reward
        if env.eval not in (env.train, EnvConfig()):
            raise ValueError("env.eval differs from env.train, but there is one arm: leave env.eval out")
        if self.algorithm.name != "sac" or self.runner.async_rollout:
            raise ValueError(
                "at an arm only SAC learns, in this process: algorithm.name sac, runner.async_rollout false"
            )
        if reward.of_windows:
            raise ValueError("at an arm single frames are judged: reward.reward_mode per_step or terminal")
        if reward.standalone_realworld and not (reward.use_reward_model and reward.reward_mode == "per_step"):
            raise ValueError(
                "reward.standalone_realworld may end an episode at any step: it needs "
                "reward.use_reward_model and reward.reward_mode per_step"
            )
        if env.train.data_collection.gae_gamma is not None:
            raise ValueError("data_collection.gae_gamma is for simulations; set it to null")

    def _check_simulation(self) -> None:
        if isinstance(self.env.eval, FrankaConfig):
            raise ValueError("env.eval is an arm, env.train is not; for both: env.train: ${env.eval}")
        if self.reward.standalone_realworld:
            raise ValueError(
                "reward.standalone_realworld is for an arm (env_type: realworld); set it to false"
            )
        for key in ("task", "control_mode"):
            train, evaluation = vars(self.env.train)[key], vars(self.env.eval)[key]
            if train != evaluation:
                raise ValueError(f"env.train.{key} is {train}, but env.eval.{key} {evaluation}; use one")
        writes_gae = any(e.data_collection.gae_gamma is not None for e in (self.env.train, self.env.eval))
        if writes_gae and self.actor.model.pixels is not None:
            raise ValueError(
                "data_collection.gae_gamma scores states, the critic sees pixels: set one to null"
            )
        if writes_gae and self.reward.use_reward_model:
            raise ValueError(
                "data_collection.gae_gamma scores frames by a critic of the env reward, and with a reward "
                "model there is none: set it to null, or reward.use_reward_model to false"
            )
        if writes_gae and self.reward.env_reward_weight != 1:
            raise ValueError(
                "data_collection.gae_gamma wants reward.env_reward_weight 1: critics learn what is paid"
            )
        for section in (self.env.train, self.env.eval):
            gae_gamma = section.data_collection.gae_gamma
            if gae_gamma is not None and gae_gamma != self.algorithm.gamma:
                raise ValueError(
                    f"data_collection.gae_gamma is {gae_gamma}, but the critic learns by algorithm.gamma "
                    f"{self.algorithm.gamma}; use one"
                )
        if self.env.train.data_collection.enabled and self.env.eval.data_collection.enabled:
            raise ValueError("data_collection is on for env.train and for env.eval; record one of them")

    def _check_windows(self) -> None:
        buffers = self.reward.model.history_buffers if self.reward.of_windows else {}
        for name, buffer in buffers.items():
            steps = min(self.env.train.max_episode_steps, self.env.eval.max_episode_steps)
            if not buffer.judges_within(steps):
                raise ValueError(
                    f"no window of reward.model.history_buffers.{name} ends within {steps} steps "
                    f"(max_episode_steps), so nothing would be paid: min_history_size {buffer.least}, "
                    f"input_interval {buffer.input_interval}, input_on_done {buffer.input_on_done}"
                )
