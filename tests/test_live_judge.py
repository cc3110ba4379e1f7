"""Live verdicts: never waited for, inline, from a worker or over a link that breaks."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import CRASHES, SLEEPS, FakeModel, reward_config, use_fake_model, window_config
from link_doubles import ANY_PORT, SOON_S, RunningServer, frame_of, frames_of, linked, servers, until
from torch import Tensor

from common import reward_client
from common.link import LinkConfig
from common.link_keys import make_keys
from common.processes import Child, WorkerError
from common.reward_client import RewardLink
from common.reward_link import LiveJudge, LiveVerdict, make_judge
from common.reward_server import RewardServer
from common.runtime import UserError


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with servers() as start:
        yield start


class GatedModel(FakeModel):
    """Scores once the gate is open; says when it has begun."""

    def __init__(self):
        super().__init__()
        self.gate, self.begun, self.seen = threading.Event(), threading.Event(), []

    def score(self, frames: dict[str, Tensor]) -> Tensor:
        self.seen.append(int(frames["main_images"][0, 0, 0, 0]))
        self.begun.set()
        assert self.gate.wait(SOON_S)
        return super().score(frames)


def judge_of(served: RunningServer | str, live_timeout_s: float = SOON_S, **link) -> LiveJudge:
    return make_judge(linked(served, link={"live_timeout_s": live_timeout_s, **link}))


def test_live_verdicts_bear_their_step(start):
    served = start(FakeModel())
    with judge_of(served) as judge:
        assert judge.poll() is None
        assert judge.wait() is None  # nothing was asked
        judge.ask({**frame_of(70), "wrist": np.zeros(1)}, 5)
        verdict = until(judge.poll)
        assert verdict == LiveVerdict(5, pytest.approx(0.7)) == (5, pytest.approx(0.7))
        assert judge.poll() is None  # handed out once
        judge.ask(frame_of(30), 6)
        assert judge.wait() == (6, pytest.approx(0.3))
        assert (judge.asked, judge.answered, judge.late, judge.overtaken) == (2, 2, 0, 0)
        assert judge.client.threshold == 0.5
    assert served.model.batches == [1, 1]


def test_a_frame_may_be_drawn_over_once_it_was_asked_about(start):
    served = start(GatedModel())
    with judge_of(served) as judge:
        frame = frame_of(10)
        judge.ask(frame, 1)
        frame["main_images"][:] = 20
        judge.ask(frame, 2)  # waits here until the first is judged
        frame["main_images"][:] = 30
        served.model.gate.set()
        assert judge.wait() == (2, pytest.approx(0.2))
    assert served.model.seen == [10, 20]


def test_the_newest_frame_overtakes_those_that_wait(start):
    served = start(GatedModel())
    with judge_of(served) as judge:
        judge.ask(frame_of(1), 1)
        assert served.model.begun.wait(SOON_S)
        for step in (2, 3, 4):
            begin = time.monotonic()
            judge.ask(frame_of(step), step)
            assert judge.poll() is None
            assert time.monotonic() - begin < 5
        served.model.gate.set()
        assert judge.wait() == (4, pytest.approx(0.04))
        assert (judge.asked, judge.answered, judge.late, judge.overtaken) == (4, 1, 1, 2)
    assert served.model.seen == [1, 4]


def test_a_late_verdict_never_comes(start):
    served = start(GatedModel())
    with judge_of(served, live_timeout_s=0.1) as judge:
        judge.ask(frame_of(70), 1)
        begin = time.monotonic()
        assert judge.wait() is None
        assert time.monotonic() - begin < 5
        until(lambda: judge.poll() is None and judge.late == 1)
        served.model.gate.set()
        until(lambda: served.model.batches == [1])
        time.sleep(0.1)
        assert judge.poll() is None  # it has come, after its time
        judge.timeout_s = SOON_S
        judge.ask(frame_of(80), 2)
        assert judge.wait() == (2, pytest.approx(0.8))
        assert (judge.answered, judge.late) == (1, 1)


def test_a_verdict_on_an_older_frame_is_late(start):
    """Regression: it was counted as answered, and the driver never saw it."""
    served = start(GatedModel())
    with judge_of(served) as judge:
        judge.ask(frame_of(70), 1)
        assert served.model.begun.wait(SOON_S)
        assert judge.wait(0.01) is None
        served.model.gate.set()
        until(lambda: judge.client.link.has_message(0.1))
        judge.ask(frame_of(80), 2)
        assert judge.wait() == (2, pytest.approx(0.8))
        assert (judge.asked, judge.answered, judge.late, judge.overtaken) == (2, 1, 1, 0)


def test_a_server_with_another_model_is_told_of_and_driving_goes_on(start, capfd):
    """Regression: its answer, read while waiting, ended the session."""
    first = start(FakeModel())
    with judge_of(first) as judge:
        judge.ask(frame_of(70), 1)
        assert judge.wait() == (1, pytest.approx(0.7))
        first.stop()
        start(FakeModel(meta={"threshold": 0.9}), first.endpoint)
        for step in (2, 3):
            judge.ask(frame_of(70), step)
            assert judge.wait() is None
    assert capfd.readouterr().err.count("serves another reward model") == 1


def test_a_server_that_was_busy_judges_the_newest_question_alone(start):
    """Questions that were given up pile up at a slow server; it must not work through the past."""
    served = start(GatedModel())
    with judge_of(served, live_timeout_s=0.05) as judge:
        judge.ask(frame_of(1), 1)
        assert served.model.begun.wait(SOON_S)
        for step in (2, 3, 4):
            until(lambda: judge.poll() is None and judge.late == step - 1)  # noqa: B023  called at once
            judge.ask(frame_of(step), step)
        judge.timeout_s = SOON_S
        served.model.gate.set()
        assert judge.wait() == (4, pytest.approx(0.04))
    assert served.model.seen[-1] == 4
    assert 2 not in served.model.seen  # 3 may have been there before 4 was


def test_driving_goes_on_without_the_server_and_verdicts_return_with_it(start):
    first = start(FakeModel())
    with judge_of(first, live_timeout_s=0.2) as judge:
        judge.ask(frame_of(70), 1)
        until(lambda: judge.poll() == (1, pytest.approx(0.7)))
        first.stop()
        for step in range(2, 6):
            begin = time.monotonic()
            judge.ask(frame_of(70), step)
            assert judge.wait(0.02) is None
            assert time.monotonic() - begin < 5
        start(FakeModel(), first.endpoint)
        steps = iter(range(6, 100_000))

        def drive() -> LiveVerdict | None:
            step = next(steps)
            judge.ask(frame_of(80), step)
            verdict = judge.wait(0.02)
            assert verdict is None or verdict.step == step
            return verdict

        assert until(drive).success_prob == pytest.approx(0.8)


def test_a_refusal_is_told_once_and_driving_goes_on(start, capfd):
    served = start(FakeModel())
    with judge_of(served) as judge:
        for step in range(3):
            judge.ask(frame_of(CRASHES), step)
            assert judge.wait() is None
        judge.ask(frame_of(60), 3)
        assert judge.wait() == (3, pytest.approx(0.6))
        assert (judge.answered, judge.late) == (1, 3)
    err = capfd.readouterr().err
    assert err.count("no verdicts: reward server") == 1
    assert "the model failed: ValueError: a model bug" in err


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({"wrist": np.zeros((8, 8, 3), np.uint8)}, r"looks at main_images, .* among the frames \['wrist'\]"),
        ({"main_images": np.zeros((8, 8, 3))}, r"must be uint8 RGB \(H, W, 3\), got float64 \(8, 8, 3\)"),
        ({"main_images": np.zeros((1, 8, 8, 3), np.uint8)}, r"got uint8 \(1, 8, 8, 3\)"),
    ],
)
def test_frames_that_are_none_are_the_callers_mistake(start, frames, message):
    with judge_of(start(FakeModel())) as judge, pytest.raises(UserError, match=message):
        judge.ask(frames, 1)


class SlowModel(FakeModel):
    def score(self, frames: dict[str, Tensor]) -> Tensor:
        time.sleep(0.15)
        return super().score(frames)


def test_inline_waits_for_the_model_and_is_never_late(monkeypatch):
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: SlowModel())
    with make_judge(reward_config(link=LinkConfig(live_timeout_s=0.1))) as judge:
        judge.ask(frame_of(70), 1)
        assert judge.poll() == (1, pytest.approx(0.7))
        judge.ask(frame_of(20), 2)
        assert judge.wait(0.0) == (2, pytest.approx(0.2))
        assert (judge.asked, judge.answered, judge.late) == (2, 2, 0)


def test_a_worker_is_not_waited_for_and_ends_with_the_judge(monkeypatch):
    use_fake_model(monkeypatch)
    cfg = reward_config(placement="auto", link=LinkConfig(live_timeout_s=0.2))
    with make_judge(cfg) as judge:
        judge.timeout_s = SOON_S
        judge.ask(frame_of(70), 1)
        assert judge.wait() == (1, pytest.approx(0.7))
        judge.ask(frame_of(30), 2)
        assert until(judge.poll) == (2, pytest.approx(0.3))
        judge.timeout_s = 0.2
        judge.ask(frame_of(SLEEPS), 3)  # for a minute
        begin = time.monotonic()
        for step in range(4, 20):
            assert judge.wait(0.02) is None
            judge.ask(frame_of(1), step)
        assert time.monotonic() - begin < 10
        assert judge.answered == 2 and judge.late >= 1 and judge.overtaken >= 10
        process = judge.client.child.process
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="reward worker died with exit code -9"):
            until(lambda: judge.poll() is not None)
    assert not process.is_alive()


def test_windows_have_no_live_verdicts():
    with pytest.raises(UserError, match="history_oracle judges windows; live verdicts on success need"):
        make_judge(window_config())


# ----------------------------------------------------------------------------------------------------
# What a server's end leaves behind, and a client's
# ----------------------------------------------------------------------------------------------------


def serve_fake(connection, address: str) -> None:
    with RewardServer(FakeModel(), address) as server:
        connection.send(("ok", server.endpoint))
        while True:
            server.turn(0.5)


@contextmanager
def server_process(address: str) -> Iterator[tuple[Child, str]]:
    child = Child("reward server", serve_fake, (address,))
    try:
        yield child, child.receive()
    finally:
        child.process.kill()
        child.close()


def test_a_killed_and_a_frozen_server():
    """SIGKILL leaves no farewell; SIGSTOP leaves the connection open and nobody at the other end."""
    with ExitStack() as stack:
        first, endpoint = stack.enter_context(server_process(ANY_PORT))
        judge = stack.enter_context(judge_of(endpoint, live_timeout_s=0.2))
        link = stack.enter_context(RewardLink(linked(endpoint, link={"timeout_s": 60.0})))
        steps = iter(range(1_000_000))

        def drive() -> LiveVerdict | None:
            begin = time.monotonic()
            step = next(steps)
            judge.ask(frame_of(80), step)
            verdict = judge.wait(0.02)
            assert time.monotonic() - begin < 5  # the arm never waits
            assert verdict is None or verdict == (step, pytest.approx(0.8))
            return verdict

        assert until(drive)
        assert link.score(frames_of(60)).success.tolist() == [True]

        os.kill(first.process.pid, signal.SIGSTOP)
        time.sleep(0.3)  # what was under way has come
        judge.poll()
        assert [drive() for _ in range(20)] == 20 * [None]
        os.kill(first.process.pid, signal.SIGCONT)
        assert until(drive)

        os.kill(first.process.pid, signal.SIGKILL)
        first.process.join()
        link.submit(frames_of(10, 20, 70), torch.arange(3))
        assert link.receive() == []
        judge.poll()
        assert [drive() for _ in range(20)] == 20 * [None]
        stack.enter_context(server_process(endpoint))
        assert until(drive)
        (verdicts,) = link.receive(wait=True)
        assert verdicts.success.tolist() == [False, False, True]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open(tmp_path):
    """Neither threads (ZeroMQ's have no name here) nor file descriptors."""
    keys = tmp_path / "keys"
    make_keys(keys)
    threads, files = threading.active_count(), open_files()
    for _ in range(5):
        served = RunningServer(FakeModel(), keys_dir=keys)
        with judge_of(served, keys=str(keys / "robot")) as judge:
            judge.ask(frame_of(70), 1)
            assert judge.wait() == (1, pytest.approx(0.7))
            judge.client.link._link.reopen()
        served.stop()
        with pytest.raises(UserError):
            RewardLink(linked(served, link={"timeout_s": 0.05}))
    assert threading.active_count() == threads
    assert until(lambda: open_files() <= files)
