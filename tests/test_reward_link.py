"""The reward link in training: the same numbers as inline, a wire that breaks, and forged messages.

Servers live in a thread of this process, except for one that Ctrl-C ends.
"""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from doubles import (
    CRASHES,
    RENDER,
    CountingEnvs,
    FakeModel,
    FakeTrendModel,
    reward_config,
    use_fake_model,
    window_config,
)
from link_doubles import ANY_PORT, SOON_S, RunningServer, frames_of, free_endpoint, linked, servers, until

from common import config, reward_client, reward_link, wire
from common.experience import Rollout
from common.history import HistoryBufferConfig
from common.link import LinkConfig, ScoreLink, Served
from common.qwen_reward import HistoryVLMRewardConfig
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.reward_client import RING_CHUNKS, RewardClient, RewardLink, make_reward_client
from common.reward_config import RewardConfig
from common.reward_link import serve_reward_model
from common.reward_server import RewardServer
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with servers() as start:
        yield start


def keys_and_probs(verdicts: list) -> list[tuple[int, float]]:
    return [
        (key, prob)
        for part in verdicts
        for key, prob in zip(part.keys.tolist(), part.success_prob.tolist(), strict=True)
    ]


# ----------------------------------------------------------------------------------------------------
# Training: the same numbers as inline
# ----------------------------------------------------------------------------------------------------


def test_verdicts_are_those_of_an_inline_model(start, monkeypatch):
    use_fake_model(monkeypatch)
    served = start(FakeModel())
    inline = RewardClient(reward_config())
    with make_reward_client(linked(served)) as link:
        assert isinstance(link, RewardLink)
        assert (link.views, link.meta, link.threshold) == (inline.views, inline.meta, inline.threshold)
        for client in (inline, link):
            client.submit(frames_of(10, 60), torch.tensor([7, 3]))
            client.submit(frames_of(20, 30, 40, 50, 99), torch.tensor([5, 5, 1, 0, 9]))
            client.flush()
        expected = inline.receive(wait=True)
        verdicts = link.receive(wait=True)
        assert [part.keys.tolist() for part in verdicts] == [[7, 3, 5], [5, 1, 0], [9]]
        for ours, theirs in zip(verdicts, expected, strict=True):
            for name in ("keys", "success_prob", "success", "model_reward"):
                assert vars(ours)[name].equal(vars(theirs)[name])
        assert not link.busy
    assert served.model.batches == [3, 3, 1]


def test_what_is_short_of_a_chunk_waits_and_nothing_else_does(start):
    with RewardLink(linked(start(FakeModel()))) as link:
        link.submit(frames_of(10, 20), torch.tensor([0, 1]))
        assert link.receive() == []
        assert link.busy
        link.flush()
        got = until(link.receive)
        assert keys_and_probs(got) == [(0, pytest.approx(0.1)), (1, pytest.approx(0.2))]


def test_more_chunks_than_may_be_under_way(start):
    count = 3 * (2 * RING_CHUNKS + 5) + 1
    pixels = [(7 * i) % 101 for i in range(count)]
    with RewardLink(linked(start(FakeModel()))) as link:
        link.submit(frames_of(*pixels), torch.arange(count))
        expected = [(i, pytest.approx(p / 100)) for i, p in enumerate(pixels)]
        assert keys_and_probs(link.receive(wait=True)) == expected


def test_windows_are_judged_as_inline(start, monkeypatch):
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: FakeTrendModel())
    served = start(FakeTrendModel())
    buffers = {"window": HistoryBufferConfig(2, history_keys=["main_images"])}
    section = HistoryVLMRewardConfig(model_path="x", history_buffers=buffers, infer_micro_batch_size=3)
    cfg = RewardConfig(True, "history_buffer", placement="inline", model=section)
    pixels = torch.tensor([[10, 20], [20, 10], [5, 5], [99, 1]], dtype=torch.uint8)
    windows = {"main_images": pixels[:, :, None, None, None].expand(-1, -1, 8, 8, 3)}
    with RewardLink(replace(cfg, placement=served.endpoint)) as link:
        link.set_task("Pull the cube.")
        ours, theirs = link.score(windows), RewardClient(cfg).score(windows)
    assert theirs.label_prob.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    for name in ("keys", "label_prob", "label", "model_reward"):
        assert vars(ours)[name].equal(vars(theirs)[name])
    assert served.model.task == "Pull the cube."
    with pytest.raises(ValueError, match="judges distances, not pictures"):
        replace(window_config(), placement=served.endpoint)


def test_a_task_holds_for_its_message_alone(start):
    """Two clients with two tasks share a server; one that names none gets the model's own."""
    served = start(FakeTrendModel(task="as it was trained"))
    window = np.zeros((1, 2, 8, 8, 3), dtype=np.uint8)
    seen = []
    for task in ("Push.", None):
        link = ScoreLink(served.endpoint, LinkConfig(timeout_s=SOON_S))
        link.task = task
        link.send({"main_images": window})
        link.receive()
        seen.append(served.model.task)
        link.close()
    assert seen == ["Push.", "as it was trained"]


def test_a_trained_network_scores_alike_bit_by_bit(start, tmp_path):
    torch.manual_seed(0)
    model = ResNetRewardModel(ResNetRewardConfig(arch="resnet10", image_size=[3, 32, 32])).eval()
    frames = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)
    model.save(tmp_path / "model", {"threshold": 0.5, "frame_size": [32, 32]}, frames[:2])
    section = ResNetRewardConfig(model_path=str(tmp_path / "model"), infer_micro_batch_size=3)
    inline = RewardClient(reward_config(model=section))
    served = start(load_resnet(section))
    # the client's machine has no checkpoint
    with RewardLink(linked(served, model=replace(section, model_path=None))) as link:
        assert link.meta == inline.meta
        ours, theirs = (client.score({"main_images": frames}) for client in (link, inline))
        assert ours.success_prob.equal(theirs.success_prob)
        assert ours.success.equal(theirs.success)
        with pytest.raises(UserError, match="refused: main_images are 8x8, but the reward model was trained"):
            link.score(frames_of(1))


def test_a_loop_is_paid_over_the_link_as_inline(start, monkeypatch):
    use_fake_model(monkeypatch)
    served = start(FakeModel())
    paid = {}
    for cfg in (reward_config(reward_mode="per_step"), linked(served, reward_mode="per_step")):
        with make_reward_client(cfg) as client:
            envs = CountingEnvs([[2, 3], [3]], pixel=lambda env, episode, t: 30 * env + 10 * episode + 7 * t)
            rollout = Rollout(envs, client, cfg, "standard")
            rollout.reset(0)
            client.check_envs(envs.spec)
            batches = []
            for _ in range(9):
                rollout.start(torch.zeros(2, 2))
                batches += rollout.finish()
            batches += rollout.drain()
            paid[cfg.placement] = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    inline, link = paid.values()
    assert inline["reward"].count_nonzero() > 5
    assert len(inline["reward"]) == 18
    for name in inline:
        assert link[name].equal(inline[name])


# ----------------------------------------------------------------------------------------------------
# Training: what goes wrong
# ----------------------------------------------------------------------------------------------------


def test_nobody_there_is_told_with_the_address():
    endpoint = free_endpoint()
    with pytest.raises(UserError, match=rf"^reward server {endpoint} gave no answer within 0.2 s; is it"):
        RewardLink(linked(endpoint, link={"timeout_s": 0.2}))


def test_a_server_that_never_answers_is_asked_again_and_then_given_up(start):
    served = start(FakeModel())
    with RewardLink(linked(served)) as link:
        link.link.cfg = LinkConfig(timeout_s=0.15, max_retries=2)
        served.stop()
        link.submit(frames_of(1, 2, 3), torch.arange(3))
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"gave no answer within 0.15 s, 3 times; is it running"):
            link.receive(wait=True)
        assert 0.4 < time.monotonic() - begin < 10


def test_frames_under_way_when_the_server_goes_are_sent_to_the_next_one(start):
    with pretended_server(Served.text(FakeModel()), answer=lambda _: None) as address:
        link = RewardLink(linked(address))
        link.submit(frames_of(10, 20, 30, 70, 80, 90, 60), torch.arange(7))
    with link:  # the server went once it had the first chunk
        assert link.receive() == []
        served = start(FakeModel(), address)
        assert [key for key, _ in keys_and_probs(link.receive(wait=True))] == [0, 1, 2, 3, 4, 5, 6]
    assert served.model.batches == [3, 3, 1]


def test_another_model_behind_the_address_ends_the_run(start):
    first = start(FakeModel())
    with RewardLink(linked(first)) as link:
        link.score(frames_of(60))
        first.stop()
        start(FakeModel(meta={"threshold": 0.9}), first.endpoint)
        with pytest.raises(UserError, match="serves another reward model than at the start"):
            link.score(frames_of(60))


def test_a_bug_of_the_model_is_the_servers_to_log_and_the_clients_to_stop_at(start):
    served = start(FakeModel())
    with (
        RewardLink(linked(served)) as link,
        pytest.raises(UserError, match="refused: the model failed: ValueError: a model bug"),
    ):
        link.score(frames_of(10, CRASHES, 30))
    assert "Traceback" in served.log() and "ValueError: a model bug" in served.log()
    with RewardLink(linked(served)) as link:  # and it goes on
        assert link.score(frames_of(60)).success.tolist() == [True]


def test_scores_of_the_other_kind_are_not_taken_for_probabilities(start):
    with RewardLink(linked(start(FakeTrendModel(meta={"threshold": 0.5})))) as link:
        window = torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8)
        with pytest.raises(UserError, match=r"is of another kind than reward.model.model_type resnet"):
            link.score({"main_images": window})


def test_a_chunk_that_is_too_large_names_the_key_to_change(start):
    with RewardLink(linked(start(FakeModel()))) as link:
        frames = torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(3, 4096, 2048, 3)  # 72 MB
        with pytest.raises(UserError, match=r"of at most 64 MB; lower reward.model.infer_micro_batch_size"):
            link.submit({"main_images": frames}, torch.arange(3))


def test_other_pictures_and_a_missing_threshold_are_told_with_the_address(start):
    served = start(FakeModel(meta={"render": RENDER}))
    with pytest.raises(UserError, match=rf"model at {served.endpoint} stores no threshold"):
        RewardLink(linked(served))
    with RewardLink(linked(served, reward_threshold=0.5)) as link:
        spec = replace(CountingEnvs([[1]]).spec, render={**RENDER, "task": "Other"})
        with pytest.raises(UserError, match=rf"model at {served.endpoint} knows other pictures"):
            link.check_envs(spec)


@pytest.mark.parametrize("placement", ["wroker", "tcp://", "tcp://host", "tcp://host:70000", "ipc://x", ""])
def test_a_placement_that_is_none(placement):
    with pytest.raises(ValueError, match=rf"inline, worker or tcp://host:port, got '{placement}'"):
        RewardConfig(placement=placement)


def test_the_section_of_a_config(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "use_reward_model: true\nplacement: tcp://gpu-box:5555\nlink: {keys: keys/robot, live_timeout_s: 1}\n"
    )
    cfg = config.from_yaml(RewardConfig, path)
    assert cfg.linked and cfg.model_files == {}
    assert cfg.link == LinkConfig(keys="keys/robot", live_timeout_s=1.0)
    with pytest.raises(UserError, match="live_timeout_s and timeout_s above 0"):
        config.from_yaml(RewardConfig, path, ["link.timeout_s=0"])


# ----------------------------------------------------------------------------------------------------
# Strangers: forged messages
# ----------------------------------------------------------------------------------------------------


@contextmanager
def raw_client(endpoint: str) -> Iterator[zmq.Socket]:
    """A bare socket that can send anything."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger, dealer.rcvtimeo = 0, int(1000 * SOON_S)
    dealer.connect(endpoint)
    try:
        yield dealer
    finally:
        context.destroy(linger=0)


def score_message(arrays: dict[str, np.ndarray], kind: str = "score", **fields) -> bytes:
    return wire.encode(kind, 9, arrays, **{"task": None, **fields})


FRAME = np.zeros((1, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([b"nonsense"], "no message of this protocol"),
        ([b""], "no message of this protocol"),
        ([score_message({"main_images": FRAME}), b"more"], "no message of this protocol"),
        ([score_message({"main_images": FRAME})[:-1]], "192 bytes of arrays announced, 191 sent"),
        ([score_message({"main_images": FRAME.astype(np.float32)})], "must be uint8, got 'float32'"),
        ([score_message({"wrist": FRAME})], r"got the views \['wrist'\], but the model looks at \['main_"),
        ([score_message({})], r"got the views \[\]"),
        ([score_message({"main_images": FRAME, "wrist": FRAME})], "got the views"),
        ([score_message({"main_images": FRAME[0]})], r"frames must be \(B, H, W, 3\)"),
        ([score_message({"main_images": FRAME[..., :1]})], r"frames must be \(B, H, W, 3\)"),
        ([score_message({"main_images": FRAME}, task="x" * 2001)], "task must be a text"),
        ([score_message({"main_images": FRAME}, task=5)], "task must be a text"),
        ([score_message({"main_images": FRAME}, kind="shutdown")], "unknown kind 'shutdown'"),
    ],
)
def test_a_forged_message_is_answered_with_an_error_and_logged(start, parts, reason):
    served = start(FakeModel())
    with raw_client(served.endpoint) as stranger:
        stranger.send_multipart(parts)
        answer = wire.decode(stranger.recv(), "float32")
        assert answer.kind == "error"
        assert re.search(reason, answer.fields["message"])
        assert answer.fields["message"] in served.log()
        stranger.send(score_message({"main_images": FRAME + 60}))  # the server goes on, even for the same one
        answer = wire.decode(stranger.recv(), "float32")
        assert (answer.id, answer.arrays["scores"].tolist()) == (9, [pytest.approx(0.6)])
    assert served.model.batches == [1]


def test_views_of_different_numbers(start):
    served = start(FakeModel(views=("main_images", "wrist")))
    with raw_client(served.endpoint) as stranger:
        stranger.send(score_message({"main_images": FRAME, "wrist": np.repeat(FRAME, 2, axis=0)}))
        assert "the views differ in number" in wire.decode(stranger.recv(), "float32").fields["message"]


def test_what_is_too_large_never_gets_in(start, monkeypatch):
    """ZeroMQ breaks the connection before it stores the message; the limit is lower here."""
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1 << 20)
    served = start(FakeModel())
    with raw_client(served.endpoint) as stranger, RewardLink(linked(served)) as link:
        stranger.send(bytes(2 << 20))
        until(lambda: "sent more than 64 MB" in served.log())
        assert link.score(frames_of(60)).success.tolist() == [True]
    assert served.server.stats.refused == 0  # nothing of it was read


def test_little_is_taken_in_at_once(monkeypatch):
    """Else a client's backlog of 64 messages could take 4 GB; the limit is lower here."""
    with RewardServer(FakeModel(), ANY_PORT) as server, raw_client(server.endpoint) as stranger:
        monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 500)  # a message takes some 300
        for _ in range(4):
            stranger.send(score_message({"main_images": FRAME}, kind="judge"))
        time.sleep(0.3)
        for _ in range(4):
            server.turn(0.1)
    assert server.model.batches == [1, 1]  # two of them fit, of which the newer one counts


def test_little_of_a_client_waits_in_memory():
    """Else 64 messages of 64 MB could, of each client, however slow the model is."""
    with RewardServer(FakeModel(), ANY_PORT) as server, zmq.Context() as context:
        stranger = context.socket(zmq.DEALER)
        stranger.sndhwm, stranger.linger = 1, 0
        stranger.connect(server.endpoint)
        taken, message = 0, bytes(4 << 20)
        while stranger.poll(500, zmq.POLLOUT):
            stranger.send(message)
            taken += 1
        stranger.close()
    assert taken < 20  # 4 here, and what both ends' sockets hold


def test_a_flood_is_counted_but_not_logged_line_by_line(start):
    served = start(FakeModel())
    with raw_client(served.endpoint) as stranger:
        for _ in range(200):
            stranger.send(b"nonsense")
        for _ in range(200):
            stranger.recv()
    assert len([line for line in served.lines if line.startswith("refused")]) < 50


@contextmanager
def pretended_server(said: Any, answer: Callable[[int], bytes | None] | None = None) -> Iterator[str]:
    """Says hello with `said`, and then gives `answer` (if any) to one question of that id. Yields its
    address, and leaves it once that has happened."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo = int(1000 * SOON_S)
    router.bind(ANY_PORT)

    def pretend() -> None:
        client, _ = router.recv_multipart()
        router.send_multipart([client, wire.encode("hello", 1, served=said)])
        if answer is not None:
            client, message = router.recv_multipart()
            if (reply := answer(wire.decode(message, "uint8").id)) is not None:
                router.send_multipart([client, reply])

    thread = threading.Thread(target=pretend)
    thread.start()
    yield router.last_endpoint.decode()
    thread.join()
    context.destroy(linger=0)


GOOD_HELLO = '{"meta": {"threshold": 0.5}, "views": ["main_images"], "window": 1}'


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("scores", {"arrays": {"scores": np.zeros(2, np.float32)}}, "no scores of 3 frames"),
        ("scores", {"arrays": {"prob": np.zeros(3, np.float32)}}, "no scores of 3 frames"),
        ("scores", {"arrays": {"scores": np.zeros(3, np.uint8)}}, "must be float32, got 'uint8'"),
        ("scores", {"arrays": {"scores": np.zeros(3, np.float32)}, "model": "x"}, "another reward model"),
        ("hello", {}, "no scores of 3 frames"),
        ("error", {"message": "no\n"}, "refused: no"),
    ],
)
def test_a_server_is_not_believed_either(kind, content, reason):
    with (
        pretended_server(GOOD_HELLO, lambda id: wire.encode(kind, id, **content)) as endpoint,
        RewardLink(linked(endpoint)) as link,
    ):
        link.submit(frames_of(1, 2, 3), torch.arange(3))
        with pytest.raises(UserError, match=reason):
            link.receive(wait=True)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"nonsense", "no message of this protocol"), (wire.encode("error", 0, message="who?"), r"who\?")],
)
def test_an_answer_to_nothing(answer, reason):
    with (
        pretended_server(GOOD_HELLO, lambda _: answer) as endpoint,
        RewardLink(linked(endpoint)) as link,
    ):
        link.submit(frames_of(1, 2, 3), torch.arange(3))
        with pytest.raises(UserError, match=f"sent what cannot be used: {reason}"):
            link.receive(wait=True)


@pytest.mark.parametrize(
    "said", [None, 5, "nonsense", "[]", '{"meta": {}, "views": [], "window": 1}', 9000 * "["]
)
def test_a_hello_that_tells_nothing(said):
    with (
        pretended_server(said) as endpoint,
        pytest.raises(UserError, match="sent what cannot be used: a hello"),
    ):
        RewardLink(linked(endpoint))


# ----------------------------------------------------------------------------------------------------
# The server
# ----------------------------------------------------------------------------------------------------


SERVE = """
import sys
sys.path[:0] = {path!r}
from common import reward_link
from common.reward_config import RewardConfig
from common.runtime import run_script
from doubles import FakeModel

if __name__ == "__main__":
    reward_link.load_reward_model = lambda section, api: FakeModel()
    run_script(lambda: reward_link.serve_reward_model(RewardConfig(), {address!r}))
"""


def test_ctrl_c_ends_a_server_cleanly(tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(SERVE.format(path=[str(ROOT), str(ROOT / "tests")], address=ANY_PORT))
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, script], stdout=pipe, stderr=pipe, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("reward server at tcp://127.0.0.1:"), process.communicate()
        assert "for this machine alone" in line
        with RewardLink(linked(line.split()[3])) as link:
            assert link.score(frames_of(60)).success.tolist() == [True]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=SOON_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (130, "\nstopped by Ctrl-C\n")
    assert "Traceback" not in out


def test_serving_what_the_config_names(monkeypatch):
    """The model is loaded, whatever `placement` says to clients; a taken port is named."""
    asked = []
    monkeypatch.setattr(reward_link, "load_reward_model", lambda *args: asked.append(args) or FakeModel())
    cfg = linked("tcp://gpu-box:5555", link={"keys": "keys/robot"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"cannot serve at {address}: .*; choose another port"):
            serve_reward_model(cfg, address)
    assert asked == [(cfg.model, None)]
    with pytest.raises(UserError, match="'5555' is no address"):
        serve_reward_model(cfg, "5555")


def test_the_server_tells_how_it_fares(start, monkeypatch):
    monkeypatch.setattr("common.reward_server.TELL_EVERY_S", 0.05)
    served = start(FakeModel())
    with RewardLink(linked(served)) as link:
        link.score(frames_of(1, 2, 3, 4))
    line = until(lambda: next((line for line in served.lines if "requests/s" in line), None))
    for part in ("frames/s from 1 client(s)", "; model ", "0 overtaken, 0 refused"):
        assert part in line
