"""Refreshing the reward model during RL: what is paid anew, by hand; batches that see hard frames; a run."""

import numpy as np
import pytest
import torch
from doubles import CountingEnvs, FakeModel, reward_config
from torch import tensor

from common import reward_client
from common.buffers import ReplayBuffer
from common.experience import Rollout
from common.frames import BatchIndices
from common.refresh import JudgedFrames
from common.resnet_reward import ResNetRewardConfig
from common.reward_client import RewardClient
from common.reward_config import RewardConfig


class Stricter(FakeModel):
    """What it sees is worth half."""

    def score(self, frames):
        return super().score(frames) / 2


@pytest.fixture
def client(monkeypatch) -> RewardClient:
    models = {"fake": FakeModel, "stricter": Stricter}
    monkeypatch.setattr(reward_client, "load_reward_model", lambda cfg, *_: models[cfg.model_path]())
    return RewardClient(reward_config())


def live(client: RewardClient, memory: JudgedFrames, buffer: ReplayBuffer, steps: int) -> None:
    """Episodes of 2 and 3 steps; last frames of env 0 score .6, .7 in turn, those of env 1 always .99."""
    pixel = {0: lambda episode: 60 + 10 * (episode % 2), 1: lambda _: 99}
    envs = CountingEnvs([[2], [3]], pixel=lambda env, episode, t: pixel[env](episode))
    rollout = Rollout(envs, client, client.cfg, "standard", memory=memory)
    rollout.reset(0)
    for _ in range(steps):
        rollout.start(torch.zeros(2, 2))
        for batch in rollout.finish():
            buffer.add(**{name: batch[name] for name in ("obs", "next_obs", "action", "reward", "terminal")})
    for batch in rollout.drain():
        buffer.add(**{name: batch[name] for name in ("obs", "next_obs", "action", "reward", "terminal")})


def rewards(buffer: ReplayBuffer) -> list[float]:
    """Oldest first, two per step: env 0, env 1."""
    return [round(reward, 3) for reward in buffer.state_dict()["reward"].tolist()]


def test_the_buffer_is_paid_anew_by_the_model_of_now(client):
    memory, buffer = JudgedFrames(10), ReplayBuffer(100, 3, 2)
    live(client, memory, buffer, 4)
    assert rewards(buffer) == [0, 0, 0.6, 0, 0, 0.99, 0.7, 0]
    client.swap("stricter")
    assert memory.pay_again(buffer, client, 1.0) == 3
    assert rewards(buffer) == [0] * 8  # .3, .35 and .495 do not reach the threshold of .5
    client.swap("fake")
    assert memory.pay_again(buffer, client, 1.0) == 3
    assert rewards(buffer) == [0, 0, 0.6, 0, 0, 0.99, 0.7, 0]


def test_a_ring_that_went_round_pays_what_is_left(client):
    """Of 12 transitions the buffer holds the last 5: (step 3, env 1) and on."""
    memory, buffer = JudgedFrames(10), ReplayBuffer(5, 3, 2)
    live(client, memory, buffer, 6)
    assert rewards(buffer) == [0, 0, 0, 0.6, 0.99]
    client.swap("stricter")
    assert memory.pay_again(buffer, client, 1.0) == 2
    assert rewards(buffer) == [0] * 5


def test_frames_that_were_forgotten_stay_as_they_were_paid(client):
    memory, buffer = JudgedFrames(2), ReplayBuffer(100, 3, 2)
    live(client, memory, buffer, 4)
    client.swap("stricter")
    assert memory.pay_again(buffer, client, 1.0) == 2  # the newest two frames of three
    assert rewards(buffer) == [0, 0, 0.6, 0, 0, 0, 0, 0]


def test_env_reward_and_weight_stay(client):
    client.cfg = reward_config(env_reward_weight=0.01, reward_weight=2.0)
    memory, buffer = JudgedFrames(10), ReplayBuffer(100, 3, 2)
    live(client, memory, buffer, 2)
    assert rewards(buffer) == [0.01, 1.01, pytest.approx(0.02 + 1.2), 1.02]
    client.swap("stricter")
    memory.pay_again(buffer, client, 2.0)
    assert rewards(buffer) == [0.01, 1.01, 0.02, 1.02]


def test_batches_hold_their_share_of_added_frames():
    labels = np.array([True] * 10 + [False] * 90 + [False] * 3)
    added = np.arange(103) >= 100
    batches = BatchIndices(labels, 0.5, seed=0, added=added, added_fraction=0.25)
    drawn = np.stack([batches.draw(8) for _ in range(30)])
    assert (added[drawn].sum(1) == 2).all()
    assert (labels[drawn].sum(1) == 3).all()  # half of the other six
    assert np.bincount(drawn[added[drawn]] - 100).tolist() == [20, 20, 20]
    plain = BatchIndices(labels, 0.5, seed=0, added=added, added_fraction=0.0)
    same = BatchIndices(labels, 0.5, seed=0)
    assert np.array_equal(plain.draw(8), same.draw(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_hard": 0}, "learns from keep_hard frames"),
        ({"hard_truth": "ask"}, "learns from keep_hard frames"),
        ({"refresh_data": None}, "wants refresh_config, a YAML of train_resnet.py, and refresh_data"),
        ({"placement": "tcp://a:1"}, "a resnet in this process or its worker"),
        ({"reward_mode": "per_step", "hold_k": 2, "hold_n": 2}, "set hold_n to 1"),
    ],
)
def test_what_a_refresh_wants(changes, message):
    settings = {"use_reward_model": True, "keep_hard": 9, "refresh_every": 10, "refresh_config": "x.yaml"}
    settings |= {"refresh_data": "data", "model": ResNetRewardConfig(model_path="fake")}
    RewardConfig(**settings)
    with pytest.raises(ValueError, match=message):
        RewardConfig(**(settings | changes))


def test_a_tensor_of_nothing_is_kept_as_nothing():
    memory = JudgedFrames(4)
    memory.add({}, torch.zeros(0, dtype=torch.long), tensor([0.0, 0.0]))
    assert (len(memory), memory.num_transitions) == (0, 2)
