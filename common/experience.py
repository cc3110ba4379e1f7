"""Transitions whose reward is known, for an off-policy learner.

`Rollout` steps the training envs; `prior_buffer` relabels episodes collected earlier. Both pay by the same
rules (`common.rewards`), so a transition looks the same whichever way it came.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.buffers import ReplayBuffer, mix_batches
from common.envs import EnvSpec, Step
from common.episodes import Episode, list_episodes, read_episode, read_frames
from common.reward_client import RewardClient, RewardConfig
from common.rewards import Audit, BootstrapType, combine_reward, no_bootstrap
from common.runtime import UserError
from common.sac import SACConfig

Transitions = dict[str, Tensor]  # obs, next_obs (M, D), action (M, A), reward (M,), terminal (M,) bool


class Rollout:
    """Steps the envs, sends frames to the reward model, and hands out each transition once it is paid.

        rollout.start(action)            # the envs move ...
        agent.update(...)                # ... while the learner works
        for transitions in rollout.finish(): buffer.add(**transitions)

    What step t sends to the model is waited for in step t + 1's `finish`, after the envs have moved on: the
    model works while they do, and the order of transitions does not depend on how fast it was.
    """

    def __init__(self, envs, client: RewardClient | None, cfg: RewardConfig, bootstrap_type: BootstrapType):
        self.envs, self.client, self.cfg, self.bootstrap_type = envs, client, cfg, bootstrap_type
        self.num_envs = envs.num_envs
        self.render = cfg.render
        self.audit = Audit()
        self._waiting: Transitions | None = None  # of the last step, not judged yet
        self.stats = EpisodeStats(self.num_envs, cfg)

    def reset(self, seed: int) -> None:
        self.obs = self.envs.reset(seed)

    def start(self, action: Tensor) -> None:
        """action (N, A) in [-1, 1]."""
        self.action = action.to(self.envs.device)
        self.envs.step_async(self.action, self.render)

    def finish(self) -> Iterator[Transitions]:
        """Complete the step; hand out what is paid: the last step's judged transitions, this one's others."""
        step = self.envs.step_wait()
        paid = list(self._judged())
        self.audit.step(self.num_envs)
        transitions = {
            "obs": self.obs,
            "next_obs": step.next_obs,
            "action": self.action,
            "env_reward": step.env_reward,
            "model_reward": torch.zeros_like(step.env_reward),
            "terminal": no_bootstrap(step.terminated, step.truncated, self.bootstrap_type),
        }
        self.obs = step.obs
        unpaid = self._send(step)
        if unpaid.any():
            self._waiting = {key: value[unpaid] for key, value in transitions.items()}
            self._asked = step.frame_ids.cpu(), step.success.cpu(), step.done.cpu()
        else:
            self.stats.add(step.success.cpu(), step.done.cpu(), torch.zeros(self.num_envs, dtype=torch.bool))
        if not unpaid.all():
            paid.append(self._pay({key: value[~unpaid] for key, value in transitions.items()}))
        return iter(paid)

    def drain(self) -> Iterator[Transitions]:
        """What is still with the reward model. Call it before anyone else asks the model: verdicts come back
        in order, to whoever asks first."""
        return self._judged()

    def metrics(self) -> dict[str, float]:
        """Of the rollout since the last call."""
        return {**self.stats.metrics(), **self.audit.metrics()}

    # -- parts ---------------------------------------------------------------------------------------

    def _send(self, step: Step) -> Tensor:
        """-> (N,) bool: transitions that wait for a verdict."""
        unpaid = torch.zeros(self.num_envs, dtype=torch.bool, device=step.done.device)
        if self.client is None or len(step.frame_ids) == 0:
            return unpaid
        unpaid[step.frame_ids] = True
        self.client.submit(step.frames, torch.arange(len(step.frame_ids)))
        self.client.flush()
        return unpaid

    def _judged(self) -> Iterator[Transitions]:
        if self._waiting is None:
            return
        transitions, self._waiting = self._waiting, None
        frame_ids, success, done = self._asked
        learned = torch.zeros(self.num_envs, dtype=torch.bool)
        for verdicts in self.client.receive(wait=True):
            envs = frame_ids[verdicts.keys]
            self.audit.count(verdicts, success[envs])
            learned[envs] = verdicts.success
            transitions["model_reward"][verdicts.keys] = verdicts.model_reward.to(self.obs.device)
        self.stats.add(success, done, learned)
        yield self._pay(transitions)

    def _pay(self, transitions: Transitions) -> Transitions:
        reward = combine_reward(
            transitions.pop("env_reward"),
            transitions.pop("model_reward"),
            self.cfg.env_reward_weight,
            self.cfg.reward_weight,
        )
        return {**transitions, "reward": reward}


class EpisodeStats:
    """True and learned success of the training episodes that ended since the last `metrics`.

    Learned: the model calls a frame a success, the last one in `terminal` mode, any one otherwise. The gap
    compares it with the truth of the same frames, as `common.evaluation` does.
    """

    def __init__(self, num_envs: int, cfg: RewardConfig):
        self.judged, self.last_frame_only = cfg.use_reward_model, cfg.reward_mode == "terminal"
        self.success_once = torch.zeros(num_envs, dtype=torch.bool)
        self.learned_once = torch.zeros(num_envs, dtype=torch.bool)
        self._start()

    def _start(self) -> None:
        self.episodes = self.once = self.at_end = self.learned = 0

    def add(self, success: Tensor, done: Tensor, learned: Tensor) -> None:
        """One step of all envs, each (N,) bool on the CPU; learned: the verdict, False without one."""
        self.success_once |= success
        self.learned_once |= learned
        self.episodes += int(done.sum())
        self.once += int(self.success_once[done].sum())
        self.at_end += int(success[done].sum())
        self.learned += int(self.learned_once[done].sum())
        self.success_once[done] = self.learned_once[done] = False

    def metrics(self) -> dict[str, float]:
        out = {}
        if self.episodes:
            out["rollout/true_success_once"] = self.once / self.episodes
            out["rollout/true_success_at_end"] = self.at_end / self.episodes
            if self.judged:
                truth = self.at_end if self.last_frame_only else self.once
                out["rollout/learned_success"] = self.learned / self.episodes
                out["rollout/hack_gap"] = 100 * (self.learned - truth) / self.episodes
        self._start()
        return out


def prior_buffer(
    folder: str,
    spec: EnvSpec,
    client: RewardClient | None,
    cfg: RewardConfig,
    bootstrap_type: BootstrapType,
    device: torch.device,
) -> tuple[ReplayBuffer, Audit]:
    """Every episode in `folder`, paid as the rollout pays: by the reward model, and by the recorded env
    reward where `env_reward_weight` is not 0. -> the buffer, and the verdicts against the recorded truth.

    RLPD (Ball et al., 2023) mixes such data half and half with fresh experience. UserError naming the episode
    that was not recorded in an env like `spec`, or whose frames the model does not know.
    """
    parts, audit = [], Audit()
    for path in tqdm(list_episodes(folder), desc="relabel prior data", unit="ep", leave=False):
        episode = read_episode(path, views=())
        _check_prior(episode, spec, client)
        last = episode.length
        judged = range(last, last + 1) if cfg.reward_mode == "terminal" else range(1, last + 1)
        model_reward = torch.zeros(last)
        if client is not None:
            frames = {view: np.stack(read_frames(path, view, judged)) for view in client.views}
            verdicts = client.score({view: torch.from_numpy(images) for view, images in frames.items()})
            model_reward[judged.start - 1 :] = verdicts.model_reward
            audit.step(last)
            audit.count(verdicts, torch.from_numpy(episode.success[judged.start :]))
        terminated = torch.from_numpy(episode.terminated[1:])
        truncated = torch.from_numpy(episode.truncated[1:])
        states = torch.from_numpy(episode.states)
        env_reward = torch.from_numpy(episode.rewards[1:])
        parts.append(
            {
                "obs": states[:-1],
                "next_obs": states[1:],
                "action": torch.from_numpy(episode.actions),
                "reward": combine_reward(env_reward, model_reward, cfg.env_reward_weight, cfg.reward_weight),
                "terminal": no_bootstrap(terminated, truncated, bootstrap_type),
            }
        )
    transitions = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    size, obs_dim = transitions["obs"].shape
    buffer = ReplayBuffer(size, obs_dim, transitions["action"].shape[1], device)
    buffer.add(**transitions)
    return buffer, audit


def _check_prior(episode: Episode, spec: EnvSpec, client: RewardClient | None) -> None:
    where = f"algorithm.prior_data: {episode.path}"
    if episode.states is None:
        raise UserError(
            f"{where} holds no states, which the policy learns from; collect episodes with states"
        )
    if episode.task not in (None, spec.task):
        raise UserError(f"{where} was recorded in the task '{episode.task}'; the env here is {spec.task}")
    theirs, ours = (episode.states.shape[1], episode.actions.shape[1]), (spec.obs_dim, spec.action_dim)
    if theirs != ours:
        raise UserError(
            f"{where} has states of {theirs[0]} and actions of {theirs[1]} numbers, the env here of "
            f"{ours[0]} and {ours[1]}; use the same task and control_mode"
        )
    if episode.control not in (None, spec.control):
        raise UserError(
            f"{where} was recorded under control {episode.control}; the env here has {spec.control}"
        )
    if client is not None and episode.render is not None:
        try:
            client.check_render(episode.render)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


class Replay:
    """SAC's experience: what the policy lived through, and prior data mixed in half and half (RLPD)."""

    def __init__(self, cfg: SACConfig, spec: EnvSpec, prior: ReplayBuffer | None, device: torch.device):
        self.cfg, self.prior = cfg, prior
        self.online = ReplayBuffer(cfg.buffer_size, spec.obs_dim, spec.action_dim, device)

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        cfg = self.cfg
        if self.prior is None:
            return self.online.sample(cfg.batch_size, generator)
        if len(self.online) == 0:
            return self.prior.sample(cfg.batch_size, generator)
        num_prior = round(cfg.batch_size * cfg.prior_fraction)
        online = self.online.sample(cfg.batch_size - num_prior, generator)
        return mix_batches(online, self.prior.sample(num_prior, generator))

    @property
    def ready(self) -> bool:
        return len(self.online) > 0 or self.prior is not None
