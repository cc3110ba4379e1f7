"""Replay buffer for off-policy learning, and the mixing of two batches (RLPD, arXiv:2302.02948)."""

import torch
from torch import Tensor

FIELDS = ("obs", "next_obs", "action", "reward", "terminal")


class ReplayBuffer:
    """A ring of transitions. A transition may wait for its reward (a reward model that answers later): until
    `set_reward` it is stored but never sampled.

    Fields, on `device`: obs, next_obs (capacity, D), action (capacity, A), reward (capacity,) float32,
    terminal (capacity,) bool (True: the value of next_obs does not count). Slot numbers live on the CPU,
    where the ring is kept, so that adding never waits for a GPU.
    """

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.device = torch.device(device)
        self.obs = torch.zeros(capacity, obs_dim, device=self.device)
        self.next_obs = torch.zeros(capacity, obs_dim, device=self.device)
        self.action = torch.zeros(capacity, action_dim, device=self.device)
        self.reward = torch.zeros(capacity, device=self.device)
        self.terminal = torch.zeros(capacity, dtype=torch.bool, device=self.device)
        self.ready = torch.zeros(capacity, dtype=torch.bool)
        self.next_slot = 0
        self.size = 0
        self.num_ready = 0

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        obs: Tensor,
        next_obs: Tensor,
        action: Tensor,
        reward: Tensor,
        terminal: Tensor,
        ready: bool = True,
    ) -> Tensor:
        """Store N transitions: obs, next_obs (N, D), action (N, A), reward, terminal (N,), on any device.

        `ready=False`: they wait for `set_reward`. Returns their slots, LongTensor (N,) on the CPU, valid
        until the ring comes round. Raises ValueError if N exceeds the capacity, RuntimeError before a
        transition that still waits for its reward would be overwritten (its reward would land on another
        transition).
        """
        count = len(obs)
        if count > self.capacity:
            raise ValueError(f"{count} transitions at once into a buffer of {self.capacity}")
        slots = (self.next_slot + torch.arange(count)) % self.capacity
        filled = slots[slots < self.size]
        replaced = int(self.ready[filled].sum())
        if replaced < len(filled):
            raise RuntimeError(
                f"the replay buffer ({self.capacity}) came round to transitions that still wait for their "
                "reward; make buffer_size larger or wait for the reward model"
            )
        where = slots.to(self.device)
        values = (obs, next_obs, action, reward, terminal)
        for name, value in zip(FIELDS, values, strict=True):
            field = self.field(name)
            field[where] = value.to(self.device, field.dtype)
        self.ready[slots] = ready
        self.num_ready += (count if ready else 0) - replaced
        self.size += count - len(filled)
        self.next_slot = (self.next_slot + count) % self.capacity
        return slots

    def set_reward(self, slots: Tensor, reward: Tensor) -> None:
        """Write rewards (N,) to slots (N,), which may be sampled from now on. Also relabels ready
        transitions.
        """
        self.reward[slots.to(self.device)] = reward.to(self.device, self.reward.dtype)
        self.num_ready += int((~self.ready[slots]).sum())
        self.ready[slots] = True

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`batch_size` ready transitions, uniformly with replacement: a dict of FIELDS, on the buffer's
        device.

        `generator` must live on that device. Raises RuntimeError while nothing is ready.
        """
        if self.num_ready == 0:
            raise RuntimeError(f"nothing to sample: {self.size} transitions stored, none has its reward yet")
        slots = torch.randint(self.num_ready, (batch_size,), generator=generator, device=self.device)
        if self.num_ready < self.size:
            slots = self.ready.nonzero().squeeze(1).to(self.device)[slots]
        return {name: self.field(name).index_select(0, slots) for name in FIELDS}

    def field(self, name: str) -> Tensor:
        """The whole storage of one of FIELDS, (capacity, ...), filled or not."""
        if name not in FIELDS:
            raise KeyError(f"the replay buffer has {FIELDS}, not '{name}'")
        return vars(self)[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The ready transitions, oldest first, on the CPU. Those that wait are left out: after a restart
        nobody would ever send their rewards."""
        order = (self.next_slot - self.size + torch.arange(self.size)) % self.capacity
        order = order[self.ready[order]].to(self.device)
        return {name: self.field(name)[order].cpu() for name in FIELDS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the content by a `state_dict`. A buffer too small for it keeps the newest transitions."""
        self.next_slot = self.size = self.num_ready = 0
        self.ready.zero_()
        self.add(*(state[name][-self.capacity :] for name in FIELDS))


def mix_batches(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both batches as one, `a` first. RLPD: a from what the agent met, b from prior data."""
    if a.keys() != b.keys():
        raise ValueError(f"batches have different keys: {sorted(a)} and {sorted(b)}")
    return {name: torch.cat([a[name], b[name]]) for name in a}
