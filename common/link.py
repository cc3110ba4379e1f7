"""The client's end of the reward link: frames to a reward server, scores back, over a wire that may break.

    link = ScoreLink("tcp://127.0.0.1:5555", LinkConfig())    # waits for the server, reads what it serves
    link.send({"main_images": frames})                        # never waits; (B, H, W, 3) uint8
    scores = link.receive()                                   # those of the oldest frames sent

Frames whose connection broke are sent again once there is a new one, so a server may be restarted at any
time. Messages: `common.wire`; the server: `common.reward_link`.
"""

import hashlib
import itertools
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common import wire
from common.files import to_json
from common.link_keys import import_zmq, is_loopback, load_client_keys, parse_address
from common.runtime import UserError

if TYPE_CHECKING:
    import zmq

POLLIN, SNDMORE = 1, 2  # ZeroMQ's, as plain numbers: its flags are slow to compare
HEARTBEAT_MS = 1000  # a machine that has vanished is noticed after four of them; TCP alone takes hours
REOPEN_S = 2.0  # without a connection: ZeroMQ stops trying after a refused key or a stranger at the port
SLICE_S = 0.02  # between two tries to send while there is no connection
TELL_WAITING_S = 2.0  # how long to wait for a server in silence


@dataclass
class LinkConfig:
    """Section `reward.link`, for `reward.placement: tcp://host:port`."""

    keys: str | None = None  # this client's folder of keys; null: only to a server on this machine
    live_timeout_s: float = 0.2  # of a live verdict (a worker's too), after which driving goes on without
    timeout_s: float = 60.0  # of an answer that a training run waits for, and of the server's first hello
    max_retries: int = 3  # after which a training run gives up

    def __post_init__(self):
        if self.live_timeout_s <= 0 or self.timeout_s <= 0 or self.max_retries < 0:
            raise ValueError(
                "reward.link needs live_timeout_s and timeout_s above 0 and max_retries from 0, got "
                f"{self.live_timeout_s}, {self.timeout_s} and {self.max_retries}"
            )


@dataclass
class Served:
    """What a server says of its reward model (`common.reward_models`)."""

    meta: dict[str, Any]
    views: tuple[str, ...]
    window: int | None
    model: str  # a short name for it: the hash of all this

    @staticmethod
    def text(model: Any) -> str:
        return to_json({"meta": model.meta, "views": model.views, "window": model.window})

    @classmethod
    def read(cls, text: Any) -> "Served":
        """Raises WireError."""
        try:
            said = json.loads(text)
            meta, views, window = said["meta"], said["views"], said["window"]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise wire.WireError("a hello that does not tell meta, views and window") from None
        views_fit = isinstance(views, list) and views and all(isinstance(view, str) for view in views)
        if not (isinstance(meta, dict) and views_fit and (window is None or type(window) is int)):
            raise wire.WireError("a hello with meta, views or window of another kind")
        return cls(meta, tuple(views), window, hashlib.sha256(text.encode()).hexdigest()[:16])


def set_common_options(socket: "zmq.Socket") -> None:
    """What holds at both ends."""
    socket.linger = 0  # closing never waits for a peer
    socket.maxmsgsize = wire.MAX_MESSAGE_BYTES  # a larger one breaks the connection before it is stored
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = 3 * HEARTBEAT_MS


def receive(socket: "zmq.Socket") -> memoryview:
    """The message that is there, without a copy. Empty, which is none of ours, if it has several parts."""
    frame, is_ours = socket.recv(copy=False), True
    while frame.more:
        frame, is_ours = socket.recv(copy=False), False
    return frame.buffer if is_ours else memoryview(b"")


# ----------------------------------------------------------------------------------------------------
# One connection
# ----------------------------------------------------------------------------------------------------


class Link:
    """A connection that mends itself. Messages under way when it breaks are lost, which `broke` tells."""

    def __init__(self, address: str, keys_dir: str | None):
        host, _ = parse_address(address)
        if keys_dir is None and not is_loopback(host):
            raise UserError(
                f"{address} is another machine: name the folder of this client's keys in reward.link.keys, "
                "so that nobody can read along or answer in its place"
            )
        self.address = address
        self.keys = None if keys_dir is None else load_client_keys(keys_dir)
        self.problem = ""  # why there is no connection, where that is known
        self._broke = False
        self._zmq = import_zmq()
        self._context = self._zmq.Context()
        self._open()

    def _open(self) -> None:
        zmq = self._zmq
        self._socket = self._context.socket(zmq.DEALER)
        set_common_options(self._socket)
        self._socket.immediate = True  # nothing is queued for a server that is not there
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 50, 1000
        self._socket.ipv6 = "[" in self.address
        if self.keys is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = self.keys.public, self.keys.secret
            self._socket.curve_serverkey = self.keys.server
        self._monitor = self._socket.get_monitor_socket()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, POLLIN)
        self._poller.register(self._monitor, POLLIN)
        self._connected, self._since = False, time.monotonic()
        self._socket.connect(self.address)

    def reopen(self) -> None:
        """Start anew: what the old connection still brings is never seen."""
        self._broke = True
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._open()

    def post(self, message: bytes) -> bool:
        """Send a message, or return False where there is no connection or no room. Never waits."""
        try:
            self._socket.send(message, self._zmq.NOBLOCK, copy=False)
        except self._zmq.Again:
            return False
        return True

    def take(self, timeout_s: float = 0.0) -> memoryview | None:
        """The next message; None once the time is up, or the state of the connection changes."""
        ready = [socket for socket, _ in self._poller.poll(1000 * timeout_s)]
        if self._monitor in ready:
            self._read_events()
        if self._socket in ready:
            return receive(self._socket)
        if not self._connected and time.monotonic() - self._since > REOPEN_S:
            self.reopen()
        return None

    def broke(self) -> bool:
        """Whether the connection broke since the last call."""
        broke, self._broke = self._broke, False
        return broke

    def _read_events(self) -> None:
        from zmq.utils.monitor import recv_monitor_message

        Event = self._zmq.Event
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == Event.HANDSHAKE_SUCCEEDED:
                self._connected, self.problem = True, ""
            elif event == Event.DISCONNECTED:
                self._connected, self._broke, self._since = False, True, time.monotonic()
            elif event == Event.HANDSHAKE_FAILED_AUTH:
                self.problem = "it does not know this client's key"
            elif event in (Event.HANDSHAKE_FAILED_PROTOCOL, Event.HANDSHAKE_FAILED_NO_DETAIL):
                self.problem = "its keys are not those of reward.link.keys, or no reward server is there"

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._context.destroy(linger=0)


# ----------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    message: bytes
    count: int  # frames or windows in it
    sent: bool = False
    scores: np.ndarray | None = None
    refusal: str | None = None

    @property
    def answered(self) -> bool:
        return self.scores is not None or self.refusal is not None


class ScoreLink:
    """Frames out, scores back in the order of sending. A UserError for whatever cannot be mended here."""

    def __init__(self, address: str, cfg: LinkConfig):
        self.address, self.cfg = address, cfg
        self.kind: Literal["score", "judge"] = "score"  # judge: a newer message makes an older one void
        self.task: str | None = None  # in words, for models that are told it; null: the server's own
        self._ids = itertools.count(1)
        self._chunks: dict[int, _Chunk] = {}  # by id, in the order of sending
        self._link = Link(address, cfg.keys)
        try:
            self.served = self._hello()
        except BaseException:
            self.close()
            raise

    def send(self, frames: dict[str, np.ndarray]) -> None:
        """view -> (B, H, W, 3) or (B, K, H, W, 3) uint8. Never waits."""
        id, count = next(self._ids), len(next(iter(frames.values())))
        try:
            message = wire.encode(self.kind, id, frames, task=self.task)
        except wire.WireError as error:
            raise self._error(f"{error}; lower reward.model.infer_micro_batch_size?") from error
        self._chunks[id] = _Chunk(message, count)
        self._post()

    def has_message(self, timeout_s: float = 0.0) -> bool:
        """True where `receive` would not wait; waits up to `timeout_s` for that."""
        deadline = time.monotonic() + timeout_s
        while not self._oldest_is_answered():
            left_s = deadline - time.monotonic()
            if not self._turn(max(left_s, 0.0)) and left_s <= 0:
                return False
        return True

    def receive(self) -> np.ndarray:
        """Scores (B,) or (B, L) float32 of the oldest frames that have been sent, once they are there."""
        for attempt in range(self.cfg.max_retries + 1):
            if attempt:
                self._link.reopen()
            if self.has_message(self.cfg.timeout_s):
                chunk = self._chunks.pop(next(iter(self._chunks)))
                if chunk.refusal is not None:
                    raise self._error(f"refused: {chunk.refusal}")
                return chunk.scores
        tries = self.cfg.max_retries + 1
        raise self._error(f"gave no answer within {self.cfg.timeout_s:g} s, {tries} times{self._why()}")

    def drop(self) -> None:
        """Forget what is under way: answers to it are ignored."""
        self._chunks.clear()

    def close(self) -> None:
        self._link.close()

    # -- parts ---------------------------------------------------------------------------------------

    def _oldest_is_answered(self) -> bool:
        chunk = next(iter(self._chunks.values()), None)
        return chunk is not None and chunk.answered

    def _post(self) -> bool:
        """Send what has not been sent, oldest first. -> whether all is under way."""
        for chunk in self._chunks.values():
            if not chunk.sent:
                chunk.sent = self._link.post(chunk.message)
                if not chunk.sent:
                    return False
        return True

    def _turn(self, timeout_s: float) -> bool:
        """Send, and take in at most one message. -> whether one came."""
        if not self._post():
            timeout_s = min(timeout_s, SLICE_S)
        message = self._link.take(timeout_s)
        if self._link.broke():
            for chunk in self._chunks.values():
                chunk.sent = chunk.answered
        if message is not None:
            self._read(message)
        return message is not None

    def _read(self, message: memoryview) -> None:
        try:
            answer = wire.decode(message, "float32")
            chunk = self._chunks.get(answer.id)
            if answer.kind == "error" and answer.id == 0:
                raise wire.WireError(f"{answer.fields.get('message')!s:.300}")
            if chunk is None:  # dropped, or asked twice
                return
            if answer.kind == "error":
                chunk.refusal = f"{answer.fields.get('message')!s:.300}"
                return
            scores = answer.arrays.get("scores")
            if answer.kind != "scores" or scores is None or len(scores) != chunk.count:
                raise wire.WireError(f"an answer that gives no scores of {chunk.count} frames")
        except wire.WireError as error:
            raise self._error(f"sent what cannot be used: {error}") from error
        if answer.fields.get("model") != self.served.model:
            raise self._error("serves another reward model than at the start; start this program again")
        chunk.scores = scores.copy()

    def _hello(self) -> Served:
        start = time.monotonic()
        asked, told = False, False
        while (waited_s := time.monotonic() - start) < self.cfg.timeout_s:
            if not told and waited_s > TELL_WAITING_S:
                print(f"waiting for the reward server at {self.address}{self._why()}", file=sys.stderr)
                told = True
            asked = asked or self._link.post(wire.encode("hello", next(self._ids)))
            message = self._link.take(SLICE_S)
            asked = asked and not self._link.broke()
            if message is None:
                continue
            try:
                answer = wire.decode(message, "float32")
                if answer.kind == "error":
                    raise wire.WireError(f"{answer.fields.get('message')!s:.300}")
                return Served.read(answer.fields.get("served"))
            except wire.WireError as error:
                raise self._error(f"sent what cannot be used: {error}") from error
        raise self._error(f"gave no answer within {self.cfg.timeout_s:g} s{self._why()}")

    def _why(self) -> str:
        return f": {self._link.problem}" if self._link.problem else "; is it running, and the address right?"

    def _error(self, what: str) -> UserError:
        return UserError(f"reward server {self.address} {what}")
