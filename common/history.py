"""History buffers: the last frames of every env, and when a window of them is to be judged.

The rule is RLinf's. After each env step its observation is appended (the reset's is not) and counted:

- fewer entries than `min_history_size`: no window;
- else, if the count is a multiple of `input_interval`: the last `history_size` entries;
- else, if the episode has just ended and `input_on_done`: the entries since the last interval;
- else none. An episode's end empties its env's history.

Stored as one ring per key for all envs, on the device of the frames, instead of lists of clones.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class HistoryBufferConfig:
    history_size: int = 5  # entries of a full window
    min_history_size: int | None = None  # entries from which on windows are judged; null: history_size
    input_interval: int = 1  # env steps between two windows
    history_keys: list[str] = field(default_factory=lambda: ["main_images", "extra_view_images"])
    input_on_done: bool = False  # judge what is left over when the episode ends

    def __post_init__(self):
        if self.history_size < 1 or self.input_interval < 1:
            raise ValueError(
                f"history_size and input_interval must be at least 1, got {self.history_size} and "
                f"{self.input_interval}"
            )
        if not 1 <= self.least <= self.history_size:
            raise ValueError(
                f"min_history_size must lie in [1, history_size {self.history_size}], got {self.least}"
            )
        if not self.history_keys:
            raise ValueError("history_keys must name at least one key, such as main_images")

    def judges_within(self, num_steps: int) -> bool:
        """Whether an episode of so many steps has a window."""
        first = -(-self.least // self.input_interval) * self.input_interval
        return num_steps >= (self.least if self.input_on_done else first)

    @property
    def least(self) -> int:
        return self.history_size if self.min_history_size is None else self.min_history_size


@dataclass
class Windows:
    """What one buffer wants to have judged after one step."""

    env_ids: Tensor  # (M,) int64
    lengths: Tensor  # (M,) int64, entries in each window
    data: dict[
        str, Tensor
    ]  # key -> (M, K, ...), time rising; a shorter window repeats its first entry in front


class HistoryBuffer:
    """One buffer of N envs."""

    def __init__(self, cfg: HistoryBufferConfig, num_envs: int):
        self.cfg, self.num_envs = cfg, num_envs
        self.count = torch.zeros(num_envs, dtype=torch.long)  # entries since the reset
        self.rings: dict[str, Tensor] = {}  # key -> (N, K, ...)

    def reset(self) -> None:
        self.count.zero_()

    def wants_next(self) -> Tensor:
        """(N,) bool: whether the entry of the next step can be part of a window, so its frame is needed."""
        k, interval = self.cfg.history_size, self.cfg.input_interval
        if self.cfg.input_on_done:
            return torch.ones(self.num_envs, dtype=torch.bool)  # any step may be the last one
        number = self.count + 1
        judged_at = -(-torch.maximum(number, torch.tensor(self.cfg.least)) // interval) * interval
        return judged_at - number < k

    def append(self, entries: dict[str, Tensor], env_ids: Tensor, done: Tensor) -> Windows:
        """Count a step of all envs; entries: key -> (M, ...) of the M envs in env_ids, the others have none.

        done (N,) bool. An entry that was not handed over must not have been wanted.
        """
        cfg, k = self.cfg, self.cfg.history_size
        done, ids = done.cpu(), env_ids.cpu()
        slot = self.count % k
        for key in cfg.history_keys:
            if key in entries and len(ids):
                if key not in self.rings:
                    shape = (self.num_envs, k, *entries[key].shape[1:])
                    self.rings[key] = torch.zeros(shape, dtype=entries[key].dtype, device=entries[key].device)
                ring = self.rings[key]
                ring[ids.to(ring.device), slot[ids].to(ring.device)] = entries[key]
        self.count += 1
        length = self._lengths(done)
        rows = length.nonzero().squeeze(1)
        windows = Windows(rows, length[rows], self._gather(rows, length[rows]))
        self.count[done] = 0
        return windows

    def _lengths(self, done: Tensor) -> Tensor:
        """(N,) int64: entries of the window that is judged now, 0: none."""
        cfg, n = self.cfg, self.count
        at_interval = n % cfg.input_interval == 0
        length = torch.where(at_interval, n.clamp(max=cfg.history_size), 0)
        if cfg.input_on_done:
            left_over = (n % cfg.input_interval).clamp(max=cfg.history_size)
            length = torch.where(done & ~at_interval, left_over, length)
        return torch.where(n >= cfg.least, length, 0)

    def _gather(self, rows: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        if not len(rows):
            return {}
        k = self.cfg.history_size
        back = torch.arange(k - 1, -1, -1)  # entry i of a full window lies so many steps back
        entry = self.count[rows, None] - 1 - torch.minimum(back, lengths[:, None] - 1)  # (M, K)
        return {
            key: ring[rows.to(ring.device)[:, None], (entry % k).to(ring.device)]
            for key, ring in self.rings.items()
        }


class HistoryBuffers:
    """The named buffers of `reward.model.history_buffers`; they may keep the same frames."""

    def __init__(self, cfgs: dict[str, HistoryBufferConfig], num_envs: int):
        self.buffers = {name: HistoryBuffer(cfg, num_envs) for name, cfg in cfgs.items()}

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for b in self.buffers.values() for key in b.cfg.history_keys))

    def reset(self) -> None:
        for buffer in self.buffers.values():
            buffer.reset()

    def wants_next(self) -> Tensor:
        """(N,) bool: whether any buffer wants the frame of the next step."""
        return torch.stack([buffer.wants_next() for buffer in self.buffers.values()]).any(0)

    def append(self, entries: dict[str, Tensor], env_ids: Tensor, done: Tensor) -> list[Windows]:
        """Of each buffer, in order."""
        return [buffer.append(entries, env_ids, done) for buffer in self.buffers.values()]


def spread(reward: Tensor, lengths: Tensor, done: Tensor) -> Tensor:
    """`history_reward_assign`: each window's reward also to the earlier steps of that window.

    reward (T, N) at the steps that were judged, lengths (T, N) int64 of their windows (0: none), done (T, N)
    bool. Stays within the T steps and within the episode. -> (T, N).
    """
    total = torch.zeros_like(reward)
    for t in range(len(reward)):
        inside = lengths[t] > 0
        back = 0
        while inside.any():
            total[t - back] += torch.where(inside, reward[t], 0.0)
            back += 1
            if back > t:
                break
            inside = inside & (lengths[t] > back) & ~done[t - back]
    return total
