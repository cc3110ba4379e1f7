"""The server's end of the reward link: one reward model answers whoever may ask, until Ctrl-C.

It binds to this machine alone unless it has keys (`common.link_keys`): then all that passes is encrypted, and
only the clients on its list get in. It keeps nothing between two messages (`common.wire`), so it may be
stopped and started at any time. What cannot be used is refused with an answer, or dropped and logged.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from common import wire
from common.link import POLLIN, SNDMORE, Served, receive, set_common_options
from common.link_keys import (
    HOW_TO_MAKE,
    ServerKeys,
    import_zmq,
    is_loopback,
    load_server_keys,
    parse_address,
)
from common.reward_client import set_task
from common.runtime import UserError

DOMAIN = "rewardlink"  # of the authenticator
MAX_AT_ONCE = 64  # messages taken in before the first is answered
MAX_WAITING = 4  # messages that ZeroMQ keeps of one client meanwhile, of up to 64 MB each
MAX_TASK = 2000  # characters
TELL_EVERY_S = 5.0  # between two lines of statistics, while there is something to tell
SAY_EVERY_S = 1.0  # a kind of complaint: whoever sends rubbish shall not fill the disk

Log = Callable[[str], None]


class _Statistics:
    """What happened since the last line about it."""

    def __init__(self):
        self.start = time.monotonic()
        self.clients: set[bytes] = set()
        self.frames = self.void = self.refused = 0
        self.seconds: list[float] = []  # the model's, per request

    def line(self) -> str:
        per_s = 1 / (time.monotonic() - self.start)
        model_ms = [1000 * second for second in self.seconds] or [0.0]
        return (
            f"{len(self.seconds) * per_s:.1f} requests/s with {self.frames * per_s:.1f} frames/s from "
            f"{len(self.clients)} client(s); model {statistics.median(model_ms):.1f} ms, at most "
            f"{max(model_ms):.1f}; {self.void} overtaken, {self.refused} refused"
        )


class _AllowList:
    """Asked by the authenticator's thread for each connection."""

    def __init__(self, clients: dict[bytes, str], log: Log):
        self.clients, self.log = clients, log

    def callback(self, domain: str, key: bytes) -> bool:
        if key in self.clients:
            self.log(f"client {self.clients[key]} is in")
        return key in self.clients


class RewardServer:
    """A reward model (`common.reward_models`) at an address. A context manager.

    address: `tcp://host:port`, port 0 for a free one (`endpoint` tells which). keys_dir: the server's folder
    of keys; without it only this machine's own addresses are allowed. Raises UserError.
    """

    def __init__(self, model: Any, address: str, keys_dir: str | None = None, log: Log = print):
        try:
            host, _ = parse_address(address)
        except ValueError as error:
            raise UserError(str(error)) from None
        if keys_dir is None and not is_loopback(host):
            raise UserError(
                f"{address} can be reached from other machines, and without keys by anybody: {HOW_TO_MAKE}, "
                "or bind to 127.0.0.1"
            )
        keys = None if keys_dir is None else load_server_keys(keys_dir)
        self.model, self.log = model, log
        self.default_task = getattr(model, "task", None)
        self.said = Served.text(model)
        self.name = Served.read(self.said).model
        wire.encode("hello", 0, served=self.said)  # WireError here rather than at the first client
        self.stats, self._said_at = _Statistics(), {}
        self._zmq = import_zmq()
        self._context, self._authenticator = self._zmq.Context(), None
        try:
            self._bind(address, keys)
        except BaseException:
            self.close()
            raise

    def _bind(self, address: str, keys: ServerKeys | None) -> None:
        zmq = self._zmq
        self._socket = self._context.socket(zmq.ROUTER)
        set_common_options(self._socket)
        self._socket.rcvhwm = MAX_WAITING
        self._socket.ipv6 = "[" in address
        if keys is not None:
            from zmq.auth.thread import ThreadAuthenticator

            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.configure_curve_callback(DOMAIN, _AllowList(keys.clients, self.log))
            self._authenticator.start()
            self._socket.zap_domain = DOMAIN.encode()
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no authenticator, no connection
            self._socket.curve_server, self._socket.curve_secretkey = True, keys.secret
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        self._poller = zmq.Poller()
        self._poller.register(self._socket, POLLIN)
        self._poller.register(self._monitor, POLLIN)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise UserError(f"cannot serve at {address}: {error}; choose another port or address") from error
        self.endpoint = self._socket.last_endpoint.decode().rstrip("\0")

    def turn(self, timeout_s: float) -> None:
        """Answer all that has come; wait for it up to `timeout_s`."""
        ready = [socket for socket, _ in self._poller.poll(1000 * timeout_s)]
        if self._monitor in ready:
            self._read_events()
        requests = self._requests() if self._socket in ready else []
        newest = {client: i for i, (client, message) in enumerate(requests) if message.kind == "judge"}
        for i, (client, message) in enumerate(requests):
            if message.kind == "judge" and newest[client] > i:
                self.stats.void += 1
            else:
                self._answer(client, message)
        if time.monotonic() - self.stats.start > TELL_EVERY_S:
            if self.stats.seconds or self.stats.refused:
                self.log(self.stats.line())
            self.stats = _Statistics()

    def _requests(self) -> list[tuple[bytes, wire.Message]]:
        """What has come; there is something."""
        requests = []
        room = wire.MAX_MESSAGE_BYTES
        for _ in range(MAX_AT_ONCE):
            client, message = self._socket.recv(), receive(self._socket)
            self.stats.clients.add(client)
            room -= len(message)
            try:
                requests.append((client, wire.decode(message, "uint8")))
            except wire.WireError as error:
                self._refuse(client, error.id, str(error))
            if room <= 0 or not self._socket.get(self._zmq.EVENTS) & POLLIN:
                break
        return requests

    def _answer(self, client: bytes, message: wire.Message) -> None:
        if message.kind == "hello":
            self._send(client, wire.encode("hello", message.id, served=self.said))
        elif message.kind not in ("score", "judge"):
            self._refuse(client, message.id, f"unknown kind {message.kind!r}")
        elif (fault := self._fault(message)) is not None:
            self._refuse(client, message.id, fault)
        else:
            self._score(client, message)

    def _fault(self, message: wire.Message) -> str | None:
        """What is wrong with frames to be scored; None if nothing is."""
        if message.arrays.keys() != set(self.model.views):
            return f"got the views {list(message.arrays)}, but the model looks at {list(self.model.views)}"
        shapes = {view: array.shape for view, array in message.arrays.items()}
        if not all(len(shape) in (4, 5) and shape[-1] == 3 for shape in shapes.values()):
            return f"frames must be (B, H, W, 3) or (B, K, H, W, 3), got {shapes}"
        if len({shape[0] for shape in shapes.values()}) != 1:
            return f"the views differ in number: {shapes}"
        task = message.fields.get("task")
        if task is not None and not (isinstance(task, str) and len(task) <= MAX_TASK):
            return f"task must be a text of at most {MAX_TASK} characters"
        return None

    def _score(self, client: bytes, message: wire.Message) -> None:
        frames = {view: torch.from_numpy(array) for view, array in message.arrays.items()}
        task = message.fields.get("task")
        set_task(self.model, self.default_task if task is None else task)
        start = time.monotonic()
        try:
            scores = self.model.score(frames).to("cpu", torch.float32).numpy()
            answer = wire.encode("scores", message.id, {"scores": scores}, model=self.name)
        except UserError as error:
            return self._refuse(client, message.id, str(error))
        except Exception as error:  # a bug in the model, or no GPU memory: the next request may do better
            self.log(traceback.format_exc())
            return self._refuse(client, message.id, f"the model failed: {type(error).__name__}: {error}")
        self.stats.seconds.append(time.monotonic() - start)
        self.stats.frames += len(scores)
        return self._send(client, answer)

    def _refuse(self, client: bytes, id: int, reason: str) -> None:
        reason = " ".join(reason.split())[:1000]
        self._complain(reason)
        self._send(client, wire.encode("error", id, message=reason))

    def _send(self, client: bytes, message: bytes) -> None:
        """ZeroMQ drops it where the client has gone, or reads nothing of what it is sent."""
        self._socket.send(client, SNDMORE)
        self._socket.send(message)

    def _read_events(self) -> None:
        from zmq.utils.monitor import recv_monitor_message

        while self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] == self._zmq.EVENT_DISCONNECTED:
                self._say("left", f"a client left, or sent more than {wire.MAX_BYTES >> 20} MB at once")
            else:
                self._complain("a connection without a key that is allowed here")

    def _complain(self, reason: str) -> None:
        self.stats.refused += 1
        self._say("refused", f"refused: {reason}")

    def _say(self, what: str, text: str) -> None:
        now = time.monotonic()
        if now - self._said_at.get(what, -SAY_EVERY_S) >= SAY_EVERY_S:
            self._said_at[what] = now
            self.log(text)

    def close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def __enter__(self) -> "RewardServer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def serve(model: Any, address: str, keys_dir: str | None = None, log: Log = print) -> None:
    """Answer until Ctrl-C (KeyboardInterrupt), which leaves nothing open. Raises UserError."""
    gc.freeze()  # else the search for garbage goes through all of torch now and then, 0.2 s at a time
    with RewardServer(model, address, keys_dir, log) as server:
        who = "this machine alone" if keys_dir is None else f"the clients in {keys_dir}/clients"
        log(
            f"reward server at {server.endpoint} for {who}, looks at {', '.join(model.views)}; Ctrl-C ends it"
        )
        while True:
            server.turn(timeout_s=1.0)
