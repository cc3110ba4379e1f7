"""What the reward model is shown of an env step, and what its verdicts pay: frames or windows alike.

A `Watch` looks at every step and says what is to be judged (`Look`). Verdicts come back under `slots`, one
per env and history buffer; `hear` makes a table of them, decided in order of time, and `pay` turns that into
model_reward. PPO, SAC, the evaluation and the relabelling of recorded episodes all go this way, so a step is
paid alike wherever it comes from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.audit import Audit, TrendAudit
from common.envs import EnvSpec, Render
from common.geometry import success_distance
from common.history import HistoryBuffers, spread
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.rewards import Decision, Shaping, Verdicts, WindowVerdicts, worth
from common.trend import trend_labels

DISTANCE = "success_distance"


@dataclass
class Look:
    """What is to be judged after one step of N envs, by B buffers (one for frames)."""

    slots: Tensor  # (M,) int64, buffer * N + env: where the verdicts belong
    data: dict[str, Tensor]  # key -> (M, ...): frames, or windows (M, K, ...); empty once submitted
    lengths: Tensor  # (B * N,) int64: steps that each slot's verdict is about, 0 where none is asked for
    truth: Tensor  # (M,): frames: bool true success; windows: index of the true label, -1 unknown
    bonus: Tensor  # (N,) float32: gt_success_bonus, where the step is the episode's first true success


class FrameWatch:
    """Single frames: those that the envs have rendered as asked."""

    def __init__(self, cfg: RewardConfig, num_envs: int):
        self.cfg, self.num_slots = cfg, num_envs
        self.bonus = torch.zeros(num_envs)

    def reset(self) -> None:
        """Frames have no past."""

    def render(self) -> Render | Tensor:
        """What to render after the next step."""
        return self.cfg.render

    def look(
        self, frames: dict, frame_ids: Tensor, success: Tensor, done: Tensor, distance: Tensor | None
    ) -> Look:
        """frames: view -> (M, H, W, 3) of the envs in frame_ids; success, done (N,) bool; after a step."""
        ids = frame_ids.cpu()
        lengths = torch.zeros(self.num_slots, dtype=torch.long)
        lengths[ids] = 1
        return Look(ids, frames, lengths, success.cpu()[ids], self.bonus)


class WindowWatch:
    """Windows of the frames since the reset, from history buffers."""

    def __init__(self, cfg: RewardConfig, client: RewardClient, num_envs: int):
        self.cfg, self.num_envs = cfg, num_envs
        cfgs = cfg.model.history_buffers
        self.num_slots = len(cfgs) * num_envs
        self.views = client.camera_views
        # the distance travels with the frames, so that each window's true label is known
        keys = [*self.views, DISTANCE]
        self.buffers = HistoryBuffers({n: replace(c, history_keys=keys) for n, c in cfgs.items()}, num_envs)
        known = client.meta.get("score_source") == DISTANCE
        self.delta_threshold = client.meta["delta_threshold"] if known else None
        self.reset()

    def reset(self) -> None:
        self.buffers.reset()
        self.succeeded = torch.zeros(self.num_envs, dtype=torch.bool)

    def render(self) -> Render | Tensor:
        """Only frames that will be part of a window."""
        if not self.views:
            return Render.NONE
        wanted = self.buffers.wants_next()
        return torch.where(wanted, int(Render.ALWAYS), int(Render.NONE)).to(torch.uint8)

    def look(
        self, frames: dict, frame_ids: Tensor, success: Tensor, done: Tensor, distance: Tensor | None
    ) -> Look:
        """As `FrameWatch.look`; distance (N,) float32: metres to success, None where the task has no rule."""
        success, done = success.cpu(), done.cpu()
        ids = frame_ids.cpu() if self.views else torch.arange(self.num_envs)
        entries = dict(frames)
        if distance is not None:
            entries[DISTANCE] = distance.cpu()[ids]
        slots, lengths, data = [], torch.zeros(self.num_slots, dtype=torch.long), []
        for number, windows in enumerate(self.buffers.append(entries, ids, done)):
            slots.append(number * self.num_envs + windows.env_ids)
            lengths[slots[-1]] = windows.lengths
            if len(windows.env_ids):
                data.append(windows.data)
        slots = torch.cat(slots)
        data = {key: torch.cat([part[key] for part in data]) for key in data[0]} if data else {}
        first = success & ~self.succeeded
        self.succeeded = (self.succeeded | success) & ~done
        bonus = torch.where(first, self.cfg.model.gt_success_bonus, 0.0)
        return Look(slots, data, lengths, self._truth(data, len(slots)), bonus)

    def _truth(self, data: dict[str, Tensor], count: int) -> Tensor:
        if self.delta_threshold is None or DISTANCE not in data:
            return torch.full((count,), -1)
        closer = data[DISTANCE][:, 0] - data[DISTANCE][:, -1]
        return torch.from_numpy(trend_labels(closer.numpy(), self.delta_threshold))


def make_watch(cfg: RewardConfig, client: RewardClient | None, num_envs: int) -> FrameWatch | WindowWatch:
    if client is not None and cfg.of_windows:
        return WindowWatch(cfg, client, num_envs)
    return FrameWatch(cfg, num_envs)


def make_audit(cfg: RewardConfig) -> Audit | TrendAudit:
    return TrendAudit() if cfg.of_windows else Audit()


def judged_inside(spec: EnvSpec) -> bool:
    """Whether a reward model inside the envs pays and ends episodes (`standalone_realworld`): nobody else is
    to judge then, env_reward is its pay, and info has its success_prob and learned_success."""
    return "success_prob" in spec.info_types


def distance_of(spec: EnvSpec, obs: Tensor) -> Tensor | None:
    """(N,) float32 metres to success of obs (N, D), None where the task has no rule."""
    return success_distance(spec.task, spec.obs_layout, obs)


@dataclass
class Heard:
    """What the reward model says of T steps, after the decision."""

    paid: Tensor  # (T, B*N) float32: what the verdict is worth; 0 where nothing was asked
    learned: Tensor  # (T, B*N) bool: called a success; of windows nowhere, a trend is no such verdict
    score: Tensor  # (T, B*N) float32: success_prob, of windows what they are worth; nan: nothing was asked


def hear(
    client: RewardClient,
    looks: list[Look],
    done: Tensor,
    decision: Decision,
    audit: Audit | TrendAudit,
    allowed: Tensor | None = None,
    counted: Tensor | None = None,
) -> Heard:
    """Wait for the verdicts on `looks` of T steps in order of time, the next ones after those that `decision`
    has heard of; count them in `audit` (of windows those at steps in `counted` (T, N) bool; None: all).

    The looks' data has been submitted under the keys t * (B*N) + slot. done, allowed (T, N) bool on the CPU:
    see `Decision`, which judges frames; windows are worth what the parser says.
    """
    shape = len(looks), len(looks[0].lengths)
    score, truth = torch.full(shape, torch.nan), torch.zeros(shape, dtype=looks[0].truth.dtype)
    for t, look in enumerate(looks):
        truth[t, look.slots] = look.truth
    heard = client.receive(wait=True)
    for verdicts in heard:
        said = verdicts.model_reward if isinstance(verdicts, WindowVerdicts) else verdicts.success_prob
        score.view(-1)[verdicts.keys] = said.cpu()
    if client.cfg.of_windows:
        asked = torch.stack([look.lengths for look in looks]) > 0
        paid, learned = torch.where(asked, score, 0.0), torch.zeros(shape, dtype=torch.bool)
        counted = torch.ones_like(asked) if counted is None else counted.repeat(1, shape[1] // done.shape[1])
        for verdicts in heard:
            kept = counted.view(-1)[verdicts.keys]
            of_kept = {name: value[kept.to(value.device)] for name, value in vars(verdicts).items()}
            audit.count(WindowVerdicts(**of_kept), truth.view(-1)[verdicts.keys[kept]])
    else:
        learned = decision(score, done, allowed)
        paid = worth(score, learned)
        flat = [x.view(-1) for x in (score, learned, paid, truth, audit.episodes(done))]
        for keys in (verdicts.keys for verdicts in heard):
            *said, true, episode = (x[keys] for x in flat)
            audit.count(Verdicts(keys, *said), true, episode)
    return Heard(paid, learned, score)


def make_shaping(cfg: RewardConfig, gamma: float | None, num_slots: int) -> Shaping | None:
    """None: the verdicts themselves are paid."""
    return None if cfg.shaping is None else Shaping(gamma, num_slots)


def pay(cfg: RewardConfig, verdict: Tensor, lengths: Tensor, bonus: Tensor, done: Tensor) -> Tensor:
    """model_reward (T, N) of T steps.

    verdict (T, B*N) float32: what the model, or its `Shaping`, pays for each slot; lengths (T, B*N); bonus
    (T, N); done (T, N) bool, all of the same device. `history_reward_assign` spreads within these T steps.
    """
    if not cfg.of_windows:
        return verdict
    steps, num_envs = done.shape
    total = torch.zeros_like(bonus)
    for paid, length in zip(verdict.split(num_envs, dim=1), lengths.split(num_envs, dim=1), strict=True):
        total += spread(paid, length, done) if cfg.history_reward_assign else paid
    judged = lengths.view(steps, -1, num_envs).any(1)
    return total + torch.where(judged, 0.0, cfg.model.interval_reward) + bonus


def look_back(
    watch: FrameWatch | WindowWatch,
    frames: dict[str, Tensor],
    success: Tensor,
    distance: Tensor | None,
) -> Iterator[Look]:
    """The T looks at a recorded episode, by a watch of one env.

    frames: view -> (n, H, W, 3) of its last n steps; success (T,) bool, distance (T,) m, after each step.
    """
    watch.reset()
    num_steps = len(success)
    num_blind = num_steps - (len(next(iter(frames.values()))) if frames else 0)
    for t in range(num_steps):
        shown = {view: images[t - num_blind][None] for view, images in frames.items() if t >= num_blind}
        yield watch.look(
            shown,
            torch.zeros(int(bool(shown)), dtype=torch.long),
            success[t : t + 1],
            torch.tensor([t == num_steps - 1]),
            None if distance is None else distance[t : t + 1],
        )
