"""Replay buffer for off-policy learning, and the mixing of two batches (RLPD, arXiv:2302.02948)."""

import torch
from torch import Tensor

FIELDS = ("obs", "next_obs", "action", "reward", "terminal", "steps")


# obs, next_obs (M, D), action (M, A), reward (M,), terminal, done (M,) bool
Transitions = dict[str, Tensor]


class ReplayBuffer:
    """A ring of transitions on `device`.

    Fields: obs, next_obs (capacity, D), action (capacity, A), reward (capacity,) float32, terminal
    (capacity,) bool (True: the value of next_obs does not count), steps (capacity,) float32: how far next_obs
    lies ahead, in env steps, whose discounted sum reward is.
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
        self.steps = torch.zeros(capacity, device=self.device)
        self.next_slot = 0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        obs: Tensor,
        next_obs: Tensor,
        action: Tensor,
        reward: Tensor,
        terminal: Tensor,
        steps: Tensor | None = None,
    ) -> None:
        """Store N transitions: obs, next_obs (N, D), action (N, A), reward, terminal, steps (N,), on any
        device; without steps 1 each. Raises ValueError if N exceeds the capacity.
        """
        count = len(obs)
        steps = torch.ones(count) if steps is None else steps
        if count > self.capacity:
            raise ValueError(f"{count} transitions at once into a buffer of {self.capacity}")
        where = ((self.next_slot + torch.arange(count)) % self.capacity).to(self.device)
        for name, value in zip(FIELDS, (obs, next_obs, action, reward, terminal, steps), strict=True):
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


def mix_batches(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All batches as one, in order. RLPD: one of what the agent met, one of prior data."""
    if any(batch.keys() != batches[0].keys() for batch in batches):
        raise ValueError(f"batches have different keys: {', '.join(str(sorted(batch)) for batch in batches)}")
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def n_step_returns(transitions: dict[str, Tensor], end: Tensor, n: int, gamma: float) -> dict[str, Tensor]:
    """Transitions over up to n steps each, of transitions (M, ...) over one, in order of time.

    end (M,) bool: the next transition begins another episode; nothing reaches beyond it. A reward is what n
    steps paid, discounted, and next_obs and terminal are of the last of them (Sutton 1988; in DQN: Hessel et
    al. 2018, arXiv:1710.02298).
    """
    count = len(end)
    now = torch.arange(count, device=end.device)
    last = torch.where(end, now, count - 1).flip(0).cummin(0).values.flip(0)  # of its episode
    last = torch.minimum(now + n - 1, last)
    reward = torch.zeros_like(transitions["reward"])
    for ahead in range(n):
        then = (now + ahead).clamp(max=count - 1)
        reward += gamma**ahead * torch.where(now + ahead <= last, transitions["reward"][then], 0.0)
    return {
        **transitions,
        "reward": reward,
        "next_obs": transitions["next_obs"][last],
        "terminal": transitions["terminal"][last],
        "steps": (last - now + 1).float(),
    }
