"""The reward client: inline and in a worker the same numbers, in the same order, or the same error."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from doubles import CRASHES, RENDER, SLEEPS, CountingEnvs, FakeModel, reward_config, use_fake_model
from torch import Tensor

from common import reward_client
from common.envs import EnvSpec, Render
from common.processes import WorkerError
from common.resnet_reward import ResNetRewardConfig
from common.reward_client import RING_CHUNKS, RewardClient, RewardWorker, make_reward_client
from common.reward_config import RewardConfig
from common.rewards import Verdicts
from common.runtime import UserError


def frames_of(pixels: list[int]) -> dict[str, Tensor]:
    """Frames of both views; the model looks at main_images alone."""
    frames = torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3)
    return {"main_images": frames, "extra_view_images": 255 - frames}


def keys_and_probs(parts: list[Verdicts]) -> list[tuple[int, float]]:
    return [
        (key, round(prob, 3))
        for part in parts
        for key, prob in zip(part.keys.tolist(), part.success_prob.tolist(), strict=True)
    ]


@pytest.fixture
def fake(monkeypatch):
    use_fake_model(monkeypatch)


@pytest.fixture(scope="module")
def worker():
    """One worker process for all tests that leave it whole."""
    with pytest.MonkeyPatch.context() as patch:  # until the worker has started
        use_fake_model(patch)
        client = RewardWorker(reward_config(placement="worker"))
    with client:
        yield client


@pytest.fixture(params=["inline", "worker"])
def client(request, fake):
    if request.param == "inline":
        return make_reward_client(reward_config())
    return request.getfixturevalue("worker")


def test_verdicts_come_back_in_order_with_their_keys(client):
    client.submit(frames_of([10, 60]), torch.tensor([7, 3]))
    client.submit(frames_of([20, 30, 40, 50, 90]), torch.tensor([5, 5, 1, 0, 9]))
    verdicts = client.receive(wait=True)
    expected = [(7, 0.1), (3, 0.6), (5, 0.2), (5, 0.3), (1, 0.4), (0, 0.5), (9, 0.9)]
    assert keys_and_probs(verdicts) == expected
    assert torch.cat([v.model_reward for v in verdicts]).allclose(torch.tensor([0, 0.6, 0, 0, 0, 0.5, 0.9]))
    assert [len(v.keys) for v in verdicts] == [3, 3, 1]
    assert not client.busy


def test_what_is_short_of_a_chunk_waits_for_flush(client):
    client.submit(frames_of([10, 20]), torch.tensor([0, 1]))
    time.sleep(0.05)
    assert client.receive() == []
    assert client.busy
    client.flush()
    while not (got := client.receive()):
        time.sleep(0.001)
    assert keys_and_probs(got) == [(0, 0.1), (1, 0.2)]
    client.flush()
    assert client.receive(wait=True) == []


def test_more_chunks_than_the_ring_holds(client):
    """Chunk k + RING_CHUNKS takes the place of chunk k in shared memory: only once that is judged."""
    count = 3 * (2 * RING_CHUNKS + 5) + 1
    pixels = [(7 * i) % 101 for i in range(count)]
    client.submit(frames_of(pixels), torch.arange(count))
    assert keys_and_probs(client.receive(wait=True)) == [(i, p / 100) for i, p in enumerate(pixels)]


def test_nothing_submitted_is_nothing_to_judge(client):
    client.submit({}, torch.empty(0, dtype=torch.long))
    assert not client.busy
    assert client.receive(wait=True) == []


def test_score_refuses_to_take_verdicts_of_others(client):
    assert client.score(frames_of([10, 60, 70, 80])).success.tolist() == [False, True, True, True]
    client.submit(frames_of([10]), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="still owes verdicts to the rollout"):
        client.score(frames_of([10]))
    assert len(client.receive(wait=True)) == 1


def test_chunks_have_the_size_asked_for(fake):
    client = RewardClient(reward_config())
    client.submit(frames_of([0] * 2), torch.arange(2))
    client.submit(frames_of([0] * 8), torch.arange(8))
    assert client.model.batches == [3, 3, 3]
    client.flush()
    assert client.model.batches == [3, 3, 3, 1]


# ----------------------------------------------------------------------------------------------------
# What goes wrong in the worker


@pytest.fixture
def own_worker(fake):
    with RewardWorker(reward_config(placement="worker")) as client:
        yield client
    assert not client.child.process.is_alive()


def test_error_of_the_model_arrives_with_its_traceback(own_worker):
    own_worker.submit(frames_of([10, CRASHES, 30]), torch.arange(3))
    with pytest.raises(WorkerError, match=r"(?s)reward worker failed.*in score.*ValueError: a model bug"):
        own_worker.receive(wait=True)


def test_slow_worker_is_not_waited_for_and_a_killed_one_is_noticed(own_worker):
    start = time.monotonic()
    own_worker.submit(frames_of([SLEEPS, 10, 20]), torch.arange(3))
    assert own_worker.receive() == []
    assert time.monotonic() - start < 5  # the model sleeps for a minute
    os.kill(own_worker.child.process.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="reward worker died with exit code -9"):
        own_worker.receive(wait=True)
    assert time.monotonic() - start < 2
    # a loop that only ever asks with wait=False must find out too
    with pytest.raises(WorkerError, match="died with exit code -9"):
        own_worker.submit(frames_of([1, 2, 3]), torch.arange(3))


def test_frames_may_not_change_their_size(worker):
    """They have one place in shared memory, made for the first ones."""
    worker.score(frames_of([1]))
    larger = {"main_images": torch.zeros(1, 16, 16, 3, dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"main_images changed its size: \(8, 8, 3\) to \(16, 16, 3\)"):
        worker.score(larger)
    assert worker.score(frames_of([60])).success.tolist() == [True]


@pytest.mark.parametrize(("most", "num_chunks"), [(10 * 3 * 192, 10), (0, 2)])
def test_the_ring_is_bounded_by_its_bytes(own_worker, monkeypatch, most, num_chunks):
    """Windows of five 224px frames in two views took 1.5 GB of shared memory."""
    monkeypatch.setattr(reward_client, "RING_BYTES", most)
    pixels = [(7 * i) % 101 for i in range(100)]
    own_worker.submit(frames_of(pixels), torch.arange(100))
    assert own_worker.ring["main_images"].shape == (num_chunks, 3, 8, 8, 3)
    assert keys_and_probs(own_worker.receive(wait=True)) == [(i, p / 100) for i, p in enumerate(pixels)]


def test_too_little_shared_memory_is_named(own_worker, monkeypatch):
    def no_room(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", no_room)
    with pytest.raises(UserError, match=r"no room in /dev/shm for 0 MB .*infer_micro_batch_size"):
        own_worker.score(frames_of([1]))


@pytest.mark.parametrize("placement", ["inline", "worker"])
def test_missing_checkpoint_is_a_complaint_to_the_user(placement, tmp_path):
    cfg = RewardConfig(
        use_reward_model=True,
        placement=placement,
        model=ResNetRewardConfig(model_path=str(tmp_path / "nothing_here.pt")),
    )
    with pytest.raises(UserError, match="nothing_here"):
        make_reward_client(cfg)


# ----------------------------------------------------------------------------------------------------
# Threshold, cameras, settings


def client_with_meta(monkeypatch, meta: dict, **changes) -> RewardClient:
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: FakeModel(meta=meta))
    return RewardClient(reward_config(**changes))


def test_threshold_is_the_stored_one_unless_given(monkeypatch):
    assert client_with_meta(monkeypatch, {"threshold": 0.9}).threshold == 0.9
    assert client_with_meta(monkeypatch, {"threshold": 0.9}, reward_threshold=0.2).threshold == 0.2
    assert client_with_meta(monkeypatch, {}, reward_threshold=0.0).threshold == 0.0
    with pytest.raises(UserError, match="stores no threshold"):
        client_with_meta(monkeypatch, {})


def shown(render: dict) -> EnvSpec:
    return replace(CountingEnvs([[1]]).spec, render=render)


def test_shuffled_scores_are_those_of_other_frames(fake):
    """The control: as many successes as the model sees, but not where it sees them."""
    client = make_reward_client(reward_config(shuffle_scores=True))
    pixels = [90] * 200 + [10] * 200
    client.submit(frames_of([*([10] * 100), *([90] * 100)]), torch.arange(200))
    client.receive(wait=True)
    client.submit(frames_of(pixels), torch.arange(400))
    verdicts = client.receive(wait=True)
    keys, success = (torch.cat([vars(part)[name] for part in verdicts]) for name in ("keys", "success"))
    paid = torch.cat([part.model_reward for part in verdicts])
    assert keys.tolist() == list(range(400))
    assert 0.4 < success.float().mean() < 0.75
    # for the model all of the first half and none of the second are a success
    assert success[:200].float().mean() < 0.8 and success[200:].float().mean() > 0.3
    assert paid[success].allclose(torch.tensor(0.9)) and not paid[~success].any()


def test_other_pictures_are_refused_by_name(monkeypatch):
    client = client_with_meta(monkeypatch, {"threshold": 0.5, "render": RENDER})
    client.check_envs(shown(RENDER))
    other = {"task": "Other", "views": {**RENDER["views"], "main_images": {"fov": 1.5, "width": 64}}}
    with pytest.raises(UserError) as error:
        client.check_envs(shown(other))
    for difference in (
        "task: trained on Count, here Other",
        "main_images.fov: trained on 1.0, here 1.5",
        "main_images.width: trained on None, here 64",
    ):
        assert difference in str(error.value)
    assert "\n" not in str(error.value)


def test_a_view_that_the_model_ignores_may_differ(monkeypatch):
    client = client_with_meta(monkeypatch, {"threshold": 0.5, "render": RENDER})
    client.check_envs(shown({"task": "Count", "views": {"main_images": {"fov": 1.0}}}))


def test_weights_without_a_record_of_cameras_are_taken_at_their_word(monkeypatch):
    client_with_meta(monkeypatch, {"threshold": 0.5}).check_envs(shown({"task": "Other", "views": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_threshold": 1.5}, r"must lie in \[0, 1\]"),
        ({"model": ResNetRewardConfig()}, "names no checkpoint"),
        ({"reward_mode": "history_buffer"}, "resnet, which judges single frames"),
    ],
)
def test_settings_check_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        reward_config(**changes)


def test_only_the_frames_to_be_scored_are_rendered():
    assert RewardConfig().render == Render.NONE
    assert reward_config(reward_mode="terminal").render == Render.IF_DONE
    assert reward_config(reward_mode="per_step").render == Render.ALWAYS


@pytest.mark.parametrize("placement", ["inline", "worker"])
def test_the_clock_tells_what_the_model_costs_since_it_was_asked_last(monkeypatch, placement):
    use_fake_model(monkeypatch)
    with make_reward_client(reward_config(placement=placement)) as client:
        assert "time/verdict_p50_ms" not in client.clock()
        client.score({"main_images": torch.zeros(7, 8, 8, 3, dtype=torch.uint8)})  # three chunks
        assert len(client._latencies) == 3
        cost = client.clock()
        assert 0 < cost["time/verdict_p50_ms"] <= cost["time/verdict_p99_ms"] < 5000
        assert 0 < cost["reward/share_of_time"] <= 1
        assert client.clock().keys() == {"reward/share_of_time"}
