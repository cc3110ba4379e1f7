"""Episodes collected earlier, as transitions paid as the rollout pays (RLPD, arXiv:2302.02948)."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.audit import Audit, TrendAudit
from common.buffers import FIELDS, ReplayBuffer, Transitions
from common.envs import EnvSpec, Render
from common.episodes import Episode, frame_labels, list_episodes, read_episode, read_frames
from common.judging import (
    Look,
    distance_of,
    hear,
    judged_inside,
    look_back,
    make_audit,
    make_shaping,
    make_watch,
    pay,
)
from common.pixels import seen_views, state_dim, to_pixels
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.rewards import BootstrapType, Shaping, combine_reward, no_bootstrap
from common.runtime import UserError


def prior_buffer(
    folders: list[str],
    spec: EnvSpec,
    client: RewardClient | None,
    cfg: RewardConfig,
    bootstrap_type: BootstrapType,
    device: torch.device,
    gamma: float | None = None,
) -> "Prior":
    """Every episode in `folders`, paid as the rollout pays: by the reward model, and by the recorded env
    reward where `env_reward_weight` is not 0. Where the model is part of the envs (`judging.judged_inside`),
    each step that it calls a success is paid 1 and terminal, and no other one. gamma: the learner's, for
    `reward.shaping`, which alone needs it.

    RLPD (Ball et al., 2023) mixes such data half and half with fresh experience. UserError naming the episode
    that was not recorded in an env like `spec`, or whose frames the model does not know.
    """
    watch, audit = make_watch(cfg, client, 1), make_audit(cfg)
    parts, looks, in_zone = [], [], []
    if client is not None:
        client.check_idle()
    paths = [path for folder in folders for path in list_episodes(folder)]
    for path in tqdm(paths, desc="relabel prior data", unit="ep", leave=False):
        episode = read_episode(path, views=())
        _check_prior(episode, spec, client)
        states = torch.from_numpy(episode.states)
        if cfg.require_in_zone:
            try:
                in_zone.append(torch.from_numpy(frame_labels(episode.infos, "in_zone", required=True)[1:]))
            except ValueError as error:
                raise UserError(
                    f"algorithm.prior_data: {path} {error}; reward.require_in_zone asks for it"
                ) from error
        if client is not None:
            first = episode.length if cfg.render == Render.IF_DONE else 1  # frame 0 is never judged
            shown = range(first, episode.length + 1)
            frames = {view: np.stack(read_frames(path, view, shown)) for view in client.camera_views}
            for look in look_back(
                watch,
                {view: torch.from_numpy(images) for view, images in frames.items()},
                torch.from_numpy(episode.success[1:]),
                distance_of(spec, states[1:]),
            ):
                client.submit(look.data, len(looks) * watch.num_slots + look.slots)
                look.data = {}
                looks.append(look)
        ends = [torch.from_numpy(x[1:]) for x in (episode.terminated, episode.truncated)]
        obs = _with_pixels(states, path, spec)
        parts.append(
            {
                "obs": obs[:-1],
                "next_obs": obs[1:],
                "action": torch.from_numpy(episode.actions),
                "env_reward": torch.from_numpy(episode.rewards[1:]),
                "done": torch.arange(episode.length) == episode.length - 1,
                "terminated": ends[0],
                "truncated": ends[1],
            }
        )
    transitions = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    env_reward, done, terminated, truncated = (
        transitions.pop(name) for name in ("env_reward", "done", "terminated", "truncated")
    )
    model_reward, success = env_reward * 0, torch.zeros_like(done)
    if looks:
        allowed = torch.cat(in_zone) if cfg.require_in_zone else torch.ones_like(done)
        terminal = no_bootstrap(terminated, truncated, bootstrap_type)
        shaping = make_shaping(cfg, gamma, watch.num_slots)
        model_reward, success = _recorded_reward(client, looks, done, terminal, allowed, audit, shaping)
    weights = cfg.env_reward_weight, cfg.reward_weight
    if judged_inside(spec):
        terminated, truncated = success, (terminated | truncated) & ~success
        env_reward, weights = success.float(), (1.0, 0.0)
    transitions["reward"] = combine_reward(env_reward, model_reward, *weights)
    transitions["terminal"] = no_bootstrap(terminated, truncated, bootstrap_type)
    size, obs_dim = transitions["obs"].shape
    buffer = ReplayBuffer(size, obs_dim, transitions["action"].shape[1], device)
    buffer.add(**transitions)
    return Prior(buffer, [len(part["obs"]) for part in parts], audit)


class Prior(NamedTuple):
    """Recorded episodes with their reward."""

    buffer: ReplayBuffer
    lengths: list[int]  # steps of each episode, in the buffer's order
    audit: Audit | TrendAudit  # the verdicts against the recorded truth

    @property
    def transitions(self) -> Transitions:
        """All of them, in order."""
        done = torch.zeros(len(self.buffer), dtype=torch.bool, device=self.buffer.device)
        done[torch.tensor(self.lengths).cumsum(0) - 1] = True
        return {name: self.buffer.field(name) for name in FIELDS if name != "steps"} | {"done": done}

    def best(self, share: float) -> list[Transitions]:
        """The episodes paid most, a share of all, and more than 0, each as far as it was paid."""
        transitions = self.transitions
        episodes = list(zip(*(part.split(self.lengths) for part in transitions.values()), strict=True))
        paid = torch.stack([reward.sum() for reward in self.buffer.reward.split(self.lengths)])
        ranked = paid.argsort(descending=True)[: math.ceil(share * len(paid))].tolist()
        chosen = [dict(zip(transitions, episodes[i], strict=True)) for i in sorted(ranked) if paid[i] > 0]
        return [as_far_as_paid(episode) for episode in chosen]


def as_far_as_paid(episode: Transitions) -> Transitions:
    """Without the steps after the last reward above 0."""
    count = int((episode["reward"] > 0).nonzero().max()) + 1
    return {name: value[:count] for name, value in episode.items()}


def _with_pixels(states: Tensor, path: Path, spec: EnvSpec) -> Tensor:
    """obs (T+1, D) as envs of `spec` give them, of the states (T+1, S) and frames of a recorded episode."""
    views = seen_views(spec)
    if not views:
        return states
    start, stop = spec.obs_layout[views[0]]
    side = math.isqrt((stop - start) // 3)
    steps = range(len(states))
    frames = {view: torch.from_numpy(np.stack(read_frames(path, view, steps))) for view in views}
    return torch.cat([states, to_pixels(frames, views, side)], dim=1)


def _recorded_reward(
    client: RewardClient,
    looks: list[Look],
    done: Tensor,
    terminal: Tensor,
    allowed: Tensor,
    audit: Audit | TrendAudit,
    shaping: Shaping | None,
) -> tuple[Tensor, Tensor]:
    """model_reward (T,) of recorded steps, whose looks have been submitted in order, and where one of them
    was called a success (T,); done, terminal, allowed (T,): see `hear` and `Shaping`."""
    done, terminal, allowed = done[:, None], terminal[:, None], allowed[:, None]
    heard = hear(client, looks, done, client.decision(1), audit, allowed)
    paid = heard.paid if shaping is None else shaping(heard.score, terminal, done)
    audit.step(len(looks))
    lengths, bonus = (torch.stack([getattr(look, name) for look in looks]) for name in ("lengths", "bonus"))
    reward = pay(client.cfg, paid, lengths, bonus, done).squeeze(1)
    return reward, heard.learned.any(1)


def _check_prior(episode: Episode, spec: EnvSpec, client: RewardClient | None) -> None:
    where = f"algorithm.prior_data: {episode.path}"
    if episode.states is None:
        raise UserError(
            f"{where} holds no states, which the policy learns from; collect episodes with states"
        )
    if episode.task not in (None, spec.task):
        raise UserError(f"{where} was recorded in the task '{episode.task}'; the env here is {spec.task}")
    theirs, ours = (episode.states.shape[1], episode.actions.shape[1]), (state_dim(spec), spec.action_dim)
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
            client.check_envs(replace(spec, render=episode.render))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
