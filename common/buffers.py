"""Replay buffer for off-policy learning, and the mixing of two batches (RLPD, arXiv:2302.02948)."""

import torch
from torch import Tensor

FIELDS = ("obs", "next_obs", "action", "reward", "terminal")


class ReplayBuffer:
    """A ring of transitions on `device`.

    Fields: obs, next_obs (capacity, D), action (capacity, A), reward (capacity,) float32, terminal
    (capacity,) bool (True: the value of next_obs does not count).
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
        self.next_slot = 0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(self, obs: Tensor, next_obs: Tensor, action: Tensor, reward: Tensor, terminal: Tensor) -> None:
        """Store N transitions: obs, next_obs (N, D), action (N, A), reward, terminal (N,), on any device.

        Raises ValueError if N exceeds the capacity.
        """
        count = len(obs)
        if count > self.capacity:
            raise ValueError(f"{count} transitions at once into a buffer of {self.capacity}")
        where = ((self.next_slot + torch.arange(count)) % self.capacity).to(self.device)
        for name, value in zip(FIELDS, (obs, next_obs, action, reward, terminal), strict=True):
            field = self.field(name)
            field[where] = value.to(self.device, field.dtype)
        self.size = min(self.size + count, self.capacity)
        self.next_slot = (self.next_slot + count) % self.capacity

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`batch_size` transitions, uniformly with replacement: a dict of FIELDS, on the buffer's device.

        `generator` must live on that device. Raises RuntimeError while nothing is stored.
        """
        if self.size == 0:
            raise RuntimeError("nothing to sample: the replay buffer is empty")
        slots = torch.randint(self.size, (batch_size,), generator=generator, device=self.device)
        return {name: self.field(name).index_select(0, slots) for name in FIELDS}

    def field(self, name: str) -> Tensor:
        """The whole storage of one of FIELDS, (capacity, ...), filled or not."""
        if name not in FIELDS:
            raise KeyError(f"the replay buffer has {FIELDS}, not '{name}'")
        return vars(self)[name]

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored, oldest first, on the CPU."""
        order = ((self.next_slot - self.size + torch.arange(self.size)) % self.capacity).to(self.device)
        return {name: self.field(name)[order].cpu() for name in FIELDS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the content by a `state_dict`. A buffer too small for it keeps the newest transitions."""
        self.next_slot = self.size = 0
        self.add(*(state[name][-self.capacity :] for name in FIELDS))


def mix_batches(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both batches as one, `a` first. RLPD: a from what the agent met, b from prior data."""
    if a.keys() != b.keys():
        raise ValueError(f"batches have different keys: {sorted(a)} and {sorted(b)}")
    return {name: torch.cat([a[name], b[name]]) for name in a}
