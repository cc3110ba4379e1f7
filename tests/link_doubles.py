"""Reward servers in a thread of this process, and settings of their clients."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from doubles import reward_config
from torch import Tensor

from common.link import LinkConfig
from common.reward_config import RewardConfig
from common.reward_server import RewardServer

ANY_PORT = "tcp://127.0.0.1:0"
SOON_S = 60.0  # for what happens at once, even on a machine that is very busy


class RunningServer:
    """A server in a thread: its address, its model, and what it logged."""

    def __init__(self, model: Any, address: str = ANY_PORT, keys_dir: Path | None = None):
        self.model, self.lines = model, []
        self.server = RewardServer(model, address, keys_dir, self.lines.append)
        self.endpoint = self.server.endpoint
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self.server:
            while not self._stop.is_set():
                self.server.turn(0.02)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def log(self) -> str:
        return "\n".join(self.lines)


@contextmanager
def servers() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers, which end with the block."""
    with ExitStack() as stack:

        def start(*args, **kwargs) -> RunningServer:
            served = RunningServer(*args, **kwargs)
            stack.callback(served.stop)
            return served

        yield start


def linked(served: RunningServer | str, **changes) -> RewardConfig:
    """Settings of a client that asks 3 frames at a time."""
    endpoint = served if isinstance(served, str) else served.endpoint
    link = {"timeout_s": SOON_S, "max_retries": 1, **changes.pop("link", {})}
    return reward_config(placement=endpoint, link=LinkConfig(**link), **changes)


def frames_of(*pixels: int, size: int = 8) -> dict[str, Tensor]:
    frames = torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None].expand(-1, size, size, 3)
    return {"main_images": frames}


def frame_of(pixel: int) -> dict[str, np.ndarray]:
    return {"main_images": np.full((8, 8, 3), pixel, dtype=np.uint8)}


def until(condition: Callable[[], Any], timeout_s: float = SOON_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
    return value


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
