"""The replay buffer: the ring, its state, and the mixing of batches."""

import pytest
import torch

from common.buffers import ReplayBuffer, mix_batches, n_step_returns


def add(buffer: ReplayBuffer, numbers: list[int]) -> None:
    """Transitions whose every field carries its number; terminal if the number is odd."""
    x = torch.tensor(numbers, dtype=torch.float32)
    obs = x.unsqueeze(1).expand(-1, 3)
    buffer.add(obs, obs + 0.5, obs[:, :2] / 100, x, x % 2 == 1)


def stored(buffer: ReplayBuffer, draws: int = 300) -> set[int]:
    return set(buffer.sample(draws)["obs"][:, 0].int().tolist())


def test_ring_keeps_the_newest():
    buffer = ReplayBuffer(5, 3, 2)
    add(buffer, [0, 1, 2])
    assert stored(buffer) == {0, 1, 2}
    add(buffer, [3, 4, 5, 6])
    assert len(buffer) == 5
    assert stored(buffer) == {2, 3, 4, 5, 6}


def test_fields_stay_together():
    buffer = ReplayBuffer(10, 3, 2)
    add(buffer, [4, 7])
    batch = buffer.sample(50)
    number = batch["obs"][:, 0]
    assert torch.equal(batch["next_obs"], number.unsqueeze(1).expand(-1, 3) + 0.5)
    assert torch.equal(batch["action"], (number / 100).unsqueeze(1).expand(-1, 2))
    assert torch.equal(batch["reward"], number)
    assert torch.equal(batch["terminal"], number == 7)


def test_nothing_to_sample_is_said():
    with pytest.raises(RuntimeError, match="the replay buffer is empty"):
        ReplayBuffer(10, 3, 2).sample(1)


def test_state_is_compact_and_oldest_first():
    buffer = ReplayBuffer(4, 3, 2)
    add(buffer, [0, 1, 2])
    add(buffer, [4, 5])
    state = buffer.state_dict()
    assert state["reward"].tolist() == [1.0, 2.0, 4.0, 5.0]
    loaded = ReplayBuffer(2, 3, 2)
    loaded.load_state_dict(state)
    assert stored(loaded) == {4, 5}
    add(loaded, [6])
    assert stored(loaded) == {5, 6}


def test_same_generator_same_batch():
    buffer = ReplayBuffer(50, 3, 2)
    add(buffer, list(range(50)))
    draws = [buffer.sample(20, torch.Generator().manual_seed(1))["reward"].tolist() for _ in range(2)]
    assert draws[0] == draws[1]


def test_too_many_at_once():
    with pytest.raises(ValueError, match="3 transitions at once into a buffer of 2"):
        add(ReplayBuffer(2, 3, 2), [0, 1, 2])


def test_mix_batches_keeps_order_and_refuses_other_keys():
    a, b = {"reward": torch.tensor([1.0])}, {"reward": torch.tensor([2.0, 3.0])}
    assert mix_batches([a, b, a])["reward"].tolist() == [1.0, 2.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="different keys"):
        mix_batches([a, b | {"obs": torch.zeros(2)}])


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_n_step_returns_stay_within_their_episode(n):
    """Against a walk through each episode: one of 4 steps, one of 1, one of 3 that a true end closes."""
    lengths, gamma = [4, 1, 3], 0.5
    count = sum(lengths)
    end = torch.zeros(count, dtype=torch.bool)
    end[torch.tensor(lengths).cumsum(0) - 1] = True
    number = torch.arange(float(count))
    one = {"obs": number[:, None], "next_obs": number[:, None] + 100, "reward": number + 1}
    one["terminal"] = number == count - 1
    many = n_step_returns(one, end, n, gamma)
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            last = min(t + n, start + length) - 1
            paid = sum(gamma ** (k - t) * (k + 1) for k in range(t, last + 1))
            got = {name: float(value[t].squeeze()) for name, value in many.items()}
            wanted = {"obs": t, "next_obs": last + 100, "reward": paid, "terminal": float(last == count - 1)}
            assert got == pytest.approx(wanted | {"steps": last - t + 1})
        start += length
    assert one["reward"].equal(number + 1), "what went in stays as it was"
