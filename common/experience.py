"""Transitions whose reward is known, for an off-policy learner.

`Rollout` steps the training envs, `common.prior` relabels episodes collected earlier; both pay by the same
rules (`common.rewards`). `Replay` keeps what came either way and deals batches.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.buffers import FIELDS, ReplayBuffer, Transitions, mix_batches, n_step_returns
from common.envs import EnvSpec
from common.hard_frames import HardFrames
from common.judging import (
    Look,
    distance_of,
    hear,
    judged_inside,
    make_audit,
    make_shaping,
    make_watch,
    pay,
)
from common.prior import Prior, as_far_as_paid
from common.refresh import JudgedFrames
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.rewards import BootstrapType, Verdicts, combine_reward, no_bootstrap
from common.sac import SACConfig


@dataclass
class _Taken:
    """One step of all envs, on its way to the learner."""

    transitions: Transitions  # without the reward
    env_reward: Tensor  # (N,)
    success: Tensor  # (N,) bool
    done: Tensor  # (N,) bool
    info: dict[str, Tensor]  # name -> (N,)
    look: Look | None  # None: nobody judges
    verdict: Tensor  # (B * N,) float32, what the verdict on each slot is worth
    paid: Tensor  # (B * N,) float32, what it pays: that, or a difference of potentials
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

    def __init__(
        self,
        envs,
        client: RewardClient | None,
        cfg: RewardConfig,
        bootstrap_type: BootstrapType,
        gamma: float | None = None,
        hard: HardFrames | None = None,
        memory: JudgedFrames | None = None,
    ):
        """gamma: the learner's, for `reward.shaping`, which alone needs it; hard: is shown what the model has
        judged, to keep what it got wrong; memory: keeps the frames of the transitions handed out, to be paid
        again."""
        self.envs, self.cfg, self.bootstrap_type = envs, cfg, bootstrap_type
        self.inside = judged_inside(envs.spec)
        self.client = None if self.inside else client
        self.judge = client  # which may judge inside the envs, and be swapped for a better one
        self.weights = (1.0, 0.0) if self.inside else (cfg.env_reward_weight, cfg.reward_weight)
        self.weight_factor = 1.0  # of reward_weight, for the steps that are paid from here on
        self.num_envs = envs.num_envs
        self.between_episodes = True  # all envs have just begun one
        self.watch = make_watch(cfg, self.client, self.num_envs)
        self.decision = None if self.client is None else client.decision(self.num_envs)
        self.shaping = make_shaping(cfg, gamma, self.watch.num_slots)
        self.audit, self.hard, self.memory = make_audit(cfg), hard, memory
        self.stats = EpisodeStats(self.num_envs, cfg)
        self._fresh: list[_Taken] = []  # since the model was last asked
        self._asked: list[_Taken] = []  # what it was asked then
        self._judged: deque[_Taken] = deque()  # judged, not handed out
        buffers = cfg.model.history_buffers.values() if cfg.history_reward_assign else ()
        self._lag = max((buffer.history_size - 1 for buffer in buffers), default=0)

    def reset(self, seed: int | None) -> None:
        """Begin anew, between episodes; what has been lived through stays to be handed out."""
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
            verdicts = Verdicts(torch.arange(slots), prob, learned, step.env_reward.cpu())
            self.audit.count(verdicts, success, self.audit.episodes(done[None])[0])
            if self.hard is not None:
                self.hard.keep(step.frames, step.frame_ids, prob, self.judge.threshold, step.info, done)
        self._fresh.append(
            _Taken(transitions, step.env_reward, success, done, step.info, look, verdict, verdict, learned)
        )
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
            if self.hard is None and self.memory is None:
                taken.look.data = {}
        self.client.flush()
        if not self.client.busy:  # nothing to wait for
            self._receive()

    def _receive(self) -> None:
        asked, self._asked = self._asked, []
        if asked and self.client is not None:
            looks, done = [taken.look for taken in asked], torch.stack([taken.done for taken in asked])
            heard = hear(self.client, looks, done, self.decision, self.audit)
            paid = heard.paid
            if self.shaping is not None:
                terminal = torch.stack([taken.transitions["terminal"].cpu() for taken in asked])
                paid = self.shaping(heard.score, terminal, done)
            for taken, *row in zip(asked, heard.paid, paid, heard.learned, strict=True):
                taken.verdict, taken.paid, taken.learned = row
            if self.hard is not None:
                for taken, prob in zip(asked, heard.score, strict=True):
                    data, slots = taken.look.data, taken.look.slots
                    self.hard.keep(data, slots, prob, self.judge.threshold, taken.info, taken.done)
                    if self.memory is None:
                        taken.look.data = {}
        for taken in asked:
            self.stats.add(taken.success, taken.done, taken.learned, taken.verdict)
        self._judged.extend(asked)

    def _paid(self) -> Iterator[Transitions]:
        """The steps whose reward can no longer change, in order."""
        while len(self._judged) > self._lag:
            taken = self._judged[0]
            env_weight, weight = self.weights
            model_reward = self._model_reward().to(taken.env_reward.device)
            weight *= self.weight_factor
            reward = combine_reward(taken.env_reward, model_reward, env_weight, weight)
            if self.memory is not None:
                self.memory.add(taken.look.data, taken.look.slots, weight * model_reward)
                taken.look.data = {}
            self._judged.popleft()
            yield {**taken.transitions, "reward": reward, "done": taken.done}

    def _model_reward(self) -> Tensor:
        """(N,) float32 of the oldest judged step, with what the `_lag` steps after it pay for it."""
        if self.client is None:
            return torch.zeros(self.num_envs)
        rows = [self._judged[i] for i in range(self._lag + 1)]
        return pay(
            self.cfg,
            torch.stack([row.paid for row in rows]),
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
        self.episodes = self.once = self.at_end = self.learned = self.fooled = self.missed = 0
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
        truth = (success if self.last_frame_only else self.success_once)[done]
        learned = self.learned_once[done]
        self.learned += int(learned.sum())
        self.fooled += int((learned & ~truth).sum())
        self.missed += int((truth & ~learned).sum())
        self.model_returns += float(self.model_return[done].sum())
        self.success_once[done] = self.learned_once[done] = False
        self.model_return[done] = 0.0

    def metrics(self) -> dict[str, float]:
        out = {}
        if self.episodes:
            out["rollout/num_episodes"] = self.episodes
            out["rollout/true_success_once"] = self.once / self.episodes
            out["rollout/true_success_at_end"] = self.at_end / self.episodes
            if self.of_windows:
                out["rollout/model_return"] = self.model_returns / self.episodes
            elif self.judged:
                out["rollout/learned_success"] = self.learned / self.episodes
                out["rollout/hack_gap"] = 100 * (self.fooled - self.missed) / self.episodes
                out["rollout/fooled"] = self.fooled / self.episodes
                out["rollout/missed"] = self.missed / self.episodes
        self._start()
        return out


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
        if self.cfg.n_step > 1:
            transitions = {name: value.to(buffer.device) for name, value in transitions.items()}
            end = transitions["done"] | transitions["terminal"]
            transitions = n_step_returns(transitions, end, self.cfg.n_step, self.cfg.gamma)
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

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What the policy has lived through and imitates; prior data is read anew."""
        buffers = {"online": self.online, "best": self.best}
        return {name: buffer.state_dict() for name, buffer in buffers.items() if buffer is not None}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from a `state_dict`."""
        for name, buffer in (("online", self.online), ("best", self.best)):
            if buffer is not None and name in state:
                buffer.load_state_dict(state[name])
