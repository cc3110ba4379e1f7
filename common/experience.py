"""Transitions whose reward is known, for an off-policy learner.

`Rollout` steps the training envs; `prior_buffer` relabels episodes collected earlier. Both pay by the same
rules (`common.rewards`), so a transition looks the same whichever way it came.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.buffers import FIELDS, ReplayBuffer, mix_batches, n_step_returns
from common.envs import EnvSpec, Render
from common.episodes import Episode, frame_labels, list_episodes, read_episode, read_frames
from common.judging import Look, distance_of, judged_inside, look_back, make_audit, make_watch, pay
from common.pixels import seen_views, state_dim, to_pixels
from common.reward_client import RewardClient, RewardConfig
from common.rewards import Audit, BootstrapType, Hold, TrendAudit, Verdicts, combine_reward, no_bootstrap
from common.runtime import UserError
from common.sac import SACConfig

# obs, next_obs (M, D), action (M, A), reward (M,), terminal, done (M,) bool
Transitions = dict[str, Tensor]


@dataclass
class _Taken:
    """One step of all envs, on its way to the learner."""

    transitions: Transitions  # without the reward
    env_reward: Tensor  # (N,)
    success: Tensor  # (N,) bool
    done: Tensor  # (N,) bool
    look: Look | None  # None: nobody judges
    verdict: Tensor  # (B * N,) float32, what the reward model paid for each slot
    learned: Tensor  # (B * N,) bool: called a success


class Rollout:
    """Steps the envs, shows the reward model what it wants to see, and hands out each step once it is paid.

        rollout.start(action)            # the envs move ...
        agent.update(...)                # ... while the learner works
        for transitions in rollout.finish(): buffer.add(**transitions)

    The model is asked every `verdict_every` steps, about the steps since, and its answers are waited for when
    it is asked next: it works while the envs move on, and the order of transitions does not depend on how
    fast it was. A step that later windows may still pay for (`history_reward_assign`) waits for them.

    Envs in which the model judges already (`judging.judged_inside`) pay as they do, and it is not asked here.
    """

    def __init__(self, envs, client: RewardClient | None, cfg: RewardConfig, bootstrap_type: BootstrapType):
        self.envs, self.cfg, self.bootstrap_type = envs, cfg, bootstrap_type
        self.inside = judged_inside(envs.spec)
        self.client = None if self.inside else client
        self.weights = (1.0, 0.0) if self.inside else (cfg.env_reward_weight, cfg.reward_weight)
        self.num_envs = envs.num_envs
        self.between_episodes = True  # all envs have just begun one
        self.watch = make_watch(cfg, self.client, self.num_envs)
        self.audit = make_audit(cfg)
        self.stats = EpisodeStats(self.num_envs, cfg)
        self._fresh: list[_Taken] = []  # since the model was last asked
        self._asked: list[_Taken] = []  # what it was asked then
        self._judged: deque[_Taken] = deque()  # judged, not handed out
        buffers = cfg.model.history_buffers.values() if cfg.history_reward_assign else ()
        self._lag = max((buffer.history_size - 1 for buffer in buffers), default=0)

    def reset(self, seed: int | None) -> None:
        """Begin anew; what has been lived through stays to be handed out."""
        self.watch.reset()
        self.obs = self.envs.reset(seed)

    def start(self, action: Tensor) -> None:
        """action (N, A) in [-1, 1]."""
        self.action = action.to(self.envs.device)
        self.envs.step_async(self.action, self.watch.render())

    def finish(self) -> Iterator[Transitions]:
        """Complete the step; hand out what is paid."""
        step = self.envs.step_wait()
        self.audit.step(self.num_envs)
        success, done = step.success.cpu(), step.done.cpu()
        self.between_episodes = bool(done.all())
        look = None
        if self.client is not None:
            distance = distance_of(self.envs.spec, step.next_obs)
            look = self.watch.look(step.frames, step.frame_ids, success, done, distance)
        transitions = {
            "obs": self.obs,
            "next_obs": step.next_obs,
            "action": self.action if step.action is None else step.action.to(self.envs.device),
            "terminal": no_bootstrap(step.terminated, step.truncated, self.bootstrap_type),
        }
        self.obs = step.obs
        slots = self.watch.num_slots
        verdict, learned = torch.zeros(slots), torch.zeros(slots, dtype=torch.bool)
        if self.inside:
            learned, prob = (step.info[name].cpu() for name in ("learned_success", "success_prob"))
            self.audit.count(Verdicts(torch.arange(slots), prob, learned, step.env_reward.cpu()), success)
        self._fresh.append(_Taken(transitions, step.env_reward, success, done, look, verdict, learned))
        if len(self._fresh) >= self.cfg.verdict_every:
            self._ask()
        return iter(list(self._paid()))

    def drain(self) -> Iterator[Transitions]:
        """Wait for all that is with the reward model. Call it before anyone else asks the model: verdicts
        come back in order, to whoever asks first."""
        self._ask()
        self._receive()
        return iter(list(self._paid()))

    def metrics(self) -> dict[str, float]:
        """Of the rollout since the last call."""
        return {**self.stats.metrics(), **self.audit.metrics()}

    # -- parts ---------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Wait for the answers about the steps before, and ask about the fresh ones."""
        self._receive()
        self._asked, self._fresh = self._fresh, []
        if self.client is None:
            return self._receive()
        for number, taken in enumerate(self._asked):
            keys = number * self.watch.num_slots + taken.look.slots
            self.client.submit(taken.look.data, keys)
            taken.look.data = {}
        self.client.flush()
        if not self.client.busy:  # nothing to wait for
            self._receive()

    def _receive(self) -> None:
        asked, self._asked = self._asked, []
        if asked and self.client is not None:
            verdict = torch.stack([taken.verdict for taken in asked])
            learned = torch.stack([taken.learned for taken in asked])
            truth = torch.zeros(verdict.numel(), dtype=asked[0].look.truth.dtype)
            for number, taken in enumerate(asked):
                truth[number * self.watch.num_slots + taken.look.slots] = taken.look.truth
            for verdicts in self.client.receive(wait=True):
                self.audit.count(verdicts, truth[verdicts.keys])
                verdict.view(-1)[verdicts.keys] = verdicts.model_reward.cpu()
                learned.view(-1)[verdicts.keys] = verdicts.success.cpu()
            for number, taken in enumerate(asked):
                taken.verdict, taken.learned = verdict[number], learned[number]
        for taken in asked:
            self.stats.add(taken.success, taken.done, taken.learned, taken.verdict)
        self._judged.extend(asked)

    def _paid(self) -> Iterator[Transitions]:
        """The steps whose reward can no longer change, in order."""
        while len(self._judged) > self._lag:
            taken = self._judged[0]
            reward = combine_reward(
                taken.env_reward,
                self._model_reward().to(taken.env_reward.device),
                *self.weights,
            )
            self._judged.popleft()
            yield {**taken.transitions, "reward": reward, "done": taken.done}

    def _model_reward(self) -> Tensor:
        """(N,) float32 of the oldest judged step, with what the `_lag` steps after it pay for it."""
        if self.client is None:
            return torch.zeros(self.num_envs)
        rows = [self._judged[i] for i in range(self._lag + 1)]
        return pay(
            self.cfg,
            torch.stack([row.verdict for row in rows]),
            torch.stack([row.look.lengths for row in rows]),
            torch.stack([row.look.bonus for row in rows]),
            torch.stack([row.done for row in rows]),
        )[0]


class EpisodeStats:
    """True and learned success of the training episodes that ended since the last `metrics`.

    Learned: the model calls a frame a success, the last one in `terminal` mode, any one otherwise. The gap
    compares it with the truth of the same frames, as `common.evaluation` does. Of windows, the sum of what
    they paid.
    """

    def __init__(self, num_envs: int, cfg: RewardConfig):
        self.judged, self.last_frame_only = cfg.use_reward_model, cfg.reward_mode == "terminal"
        self.of_windows = cfg.of_windows
        self.success_once = torch.zeros(num_envs, dtype=torch.bool)
        self.learned_once = torch.zeros(num_envs, dtype=torch.bool)
        self.model_return = torch.zeros(num_envs)
        self._start()

    def _start(self) -> None:
        self.episodes = self.once = self.at_end = self.learned = 0
        self.model_returns = 0.0

    def add(self, success: Tensor, done: Tensor, learned: Tensor, verdict: Tensor) -> None:
        """One step of all N envs, on the CPU: success, done (N,) bool, learned (B * N,) bool and verdict
        (B * N,) float32 of the reward model's slots, False and 0 where it was not asked."""
        n = len(success)
        self.success_once |= success
        self.learned_once |= learned.view(-1, n).any(0)
        self.model_return += verdict.view(-1, n).sum(0)
        self.episodes += int(done.sum())
        self.once += int(self.success_once[done].sum())
        self.at_end += int(success[done].sum())
        self.learned += int(self.learned_once[done].sum())
        self.model_returns += float(self.model_return[done].sum())
        self.success_once[done] = self.learned_once[done] = False
        self.model_return[done] = 0.0

    def metrics(self) -> dict[str, float]:
        out = {}
        if self.episodes:
            out["rollout/true_success_once"] = self.once / self.episodes
            out["rollout/true_success_at_end"] = self.at_end / self.episodes
            if self.of_windows:
                out["rollout/model_return"] = self.model_returns / self.episodes
            elif self.judged:
                truth = self.at_end if self.last_frame_only else self.once
                out["rollout/learned_success"] = self.learned / self.episodes
                out["rollout/hack_gap"] = 100 * (self.learned - truth) / self.episodes
        self._start()
        return out


def prior_buffer(
    folders: list[str],
    spec: EnvSpec,
    client: RewardClient | None,
    cfg: RewardConfig,
    bootstrap_type: BootstrapType,
    device: torch.device,
) -> "Prior":
    """Every episode in `folders`, paid as the rollout pays: by the reward model, and by the recorded env
    reward where `env_reward_weight` is not 0. Where the model is part of the envs (`judging.judged_inside`),
    each step that it calls a success is paid 1 and terminal, and no other one.

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
    model_reward = _recorded_reward(client, watch, looks, done, cfg, audit) if looks else env_reward * 0
    weights = cfg.env_reward_weight, cfg.reward_weight
    if judged_inside(spec):
        allowed = torch.cat(in_zone) if cfg.require_in_zone else torch.ones_like(done)
        success = held((model_reward > 0) & allowed, done, Hold(cfg.hold_k, cfg.hold_n))
        terminated, truncated = success, (terminated | truncated) & ~success
        env_reward, weights = success.float(), (1.0, 0.0)
    transitions["reward"] = combine_reward(env_reward, model_reward, *weights)
    transitions["terminal"] = no_bootstrap(terminated, truncated, bootstrap_type)
    size, obs_dim = transitions["obs"].shape
    buffer = ReplayBuffer(size, obs_dim, transitions["action"].shape[1], device)
    buffer.add(**transitions)
    return Prior(buffer, [len(part["obs"]) for part in parts], audit)


def held(success: Tensor, done: Tensor, hold: Hold) -> Tensor:
    """(T,) bool: what `hold` makes of success (T,) in the episodes that end where done (T,) is."""
    out = []
    hold.reset()
    for verdict, last in zip(success.tolist(), done.tolist(), strict=True):
        out.append(hold(verdict))
        if last:
            hold.reset()
    return torch.tensor(out, dtype=torch.bool, device=success.device)


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


def _recorded_reward(client, watch, looks: list[Look], done: Tensor, cfg, audit) -> Tensor:
    """model_reward (T,) of recorded steps, whose looks have been submitted in order."""
    truth = torch.cat([look.truth for look in looks])
    verdict = torch.zeros(len(looks), watch.num_slots)
    row = 0
    for verdicts in client.receive(wait=True):
        audit.count(verdicts, truth[row : row + len(verdicts.keys)])
        row += len(verdicts.keys)
        verdict.view(-1)[verdicts.keys] = verdicts.model_reward.cpu()
    audit.step(len(looks))
    lengths, bonus = (torch.stack([getattr(look, name) for look in looks]) for name in ("lengths", "bonus"))
    return pay(cfg, verdict, lengths, bonus, done[:, None]).squeeze(1)


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


class Replay:
    """SAC's experience: what the policy lived through, and prior data mixed in half and half (RLPD); beside
    them the episodes to imitate, those paid most.

    Where returns are over several steps, or the policy imitates itself, an episode is stored when it ends.
    """

    def __init__(self, cfg: SACConfig, spec: EnvSpec, prior: Prior | None, device: torch.device):
        self.cfg, self.prior, self.best = cfg, None, None
        self.online = ReplayBuffer(cfg.buffer_size, spec.obs_dim, spec.action_dim, device)
        self.whole_episodes = cfg.n_step > 1 or cfg.imitation_online
        self._unfinished: list[Transitions] = []  # the last steps of all envs, (N, ...) each
        self._num_kept: list[int] = []  # of each env: how many of them are its episode's
        if prior is not None:
            self.prior = prior.buffer
            if cfg.n_step > 1:
                self.prior = ReplayBuffer(len(prior.buffer), spec.obs_dim, spec.action_dim, device)
                self._store(prior.transitions, self.prior)
        if cfg.imitates:
            chosen = prior.best(cfg.imitation_share) if prior is not None else []
            self.least_paid = min((float(episode["reward"].sum()) for episode in chosen), default=0.0)
            size = sum(len(episode["reward"]) for episode in chosen)
            size += cfg.buffer_size // 4 if cfg.imitation_online else 0
            self.best = ReplayBuffer(max(size, 1), spec.obs_dim, spec.action_dim, device)
            for episode in chosen:
                self._store(episode, self.best)

    def add(self, transitions: Transitions) -> None:
        """One step of all N envs, in the order of time."""
        if not self.whole_episodes:
            return self._store(transitions, self.online)
        self._unfinished.append(transitions)
        self._num_kept = [count + 1 for count in self._num_kept or [0] * len(transitions["done"])]
        for i in transitions["done"].nonzero().squeeze(1).tolist():
            steps = self._unfinished[-self._num_kept[i] :]
            self._num_kept[i] = 0
            self._add_episode({name: torch.stack([step[name][i] for step in steps]) for name in transitions})
        self._unfinished = self._unfinished[len(self._unfinished) - max(self._num_kept) :]

    def _add_episode(self, episode: Transitions) -> None:
        self._store(episode, self.online)
        if self.best is not None and self.cfg.imitation_online:
            paid = float(episode["reward"].sum())
            if paid > 0 and paid >= self.least_paid:
                self._store(as_far_as_paid(episode), self.best)

    def _store(self, transitions: Transitions, buffer: ReplayBuffer) -> None:
        done = transitions["done"] | transitions["terminal"]
        if self.cfg.n_step > 1:
            transitions = n_step_returns(transitions, done, self.cfg.n_step, self.cfg.gamma)
        buffer.add(**{name: transitions[name] for name in FIELDS if name in transitions})

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch for `SAC.update`."""
        cfg = self.cfg
        if not self.best:
            return self._mixed(cfg.batch_size, generator)
        num_best = round(cfg.batch_size * cfg.imitation_batch)
        batch = self._mixed(cfg.batch_size - num_best, generator)
        if num_best:
            batch = mix_batches([batch, self.best.sample(num_best, generator)])
        if cfg.imitation_coef:
            best = self.best.sample(cfg.batch_size, generator)
            batch |= {"best_obs": best["obs"], "best_action": best["action"]}
        return batch

    def _mixed(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.prior is None:
            return self.online.sample(count, generator)
        if len(self.online) == 0:
            return self.prior.sample(count, generator)
        num_prior = round(count * self.cfg.prior_fraction)
        online = self.online.sample(count - num_prior, generator)
        return mix_batches([online, self.prior.sample(num_prior, generator)])

    @property
    def ready(self) -> bool:
        return len(self.online) > 0 or self.prior is not None
