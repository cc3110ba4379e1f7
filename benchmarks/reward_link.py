"""A frame to the reward server and its score back, against the same bytes through a raw pipe and back.

    python benchmarks/reward_link.py [--quick]

One 128x128 RGB frame, both ends on this machine, each in a process of its own. The pipe is multiprocessing's,
its child sends back what it was sent. The server's model costs nothing: it gives every frame the same score.
The sides take turns, and medians are of all round trips. The 99th percentile is that of what a control loop
does, `LiveJudge.ask` and `wait`; it says most of what else the machine is doing.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.link import LinkConfig, ScoreLink
from common.link_keys import make_keys
from common.processes import Child
from common.reward_config import RewardConfig
from common.reward_link import make_judge
from common.reward_server import RewardServer

SIZE = 128
LARGEST_RATIO = 5.0
LARGEST_P99_MS = 5.0
LIMIT_S = 5.0  # for one round trip


class ConstantModel:
    views, window, meta = ("main_images",), 1, {"threshold": 0.5}

    def __init__(self):
        self.scores = torch.tensor([0.25])

    def score(self, frames: dict[str, Tensor]) -> Tensor:
        return self.scores


def echo(connection: Connection) -> None:
    while True:
        connection.send_bytes(connection.recv_bytes())


def serve(connection: Connection, keys_dir: str | None) -> None:
    gc.freeze()  # as `common.reward_server.serve` does
    with RewardServer(ConstantModel(), "tcp://127.0.0.1:0", keys_dir, log=lambda text: None) as server:
        connection.send(("ok", server.endpoint))
        while True:
            server.turn(timeout_s=1.0)


def start_server(stack: ExitStack, keys_dir: str | None) -> str:
    """-> its address; it ends with the stack."""
    child = Child("reward server", serve, (keys_dir,))
    stack.callback(child.close)
    stack.callback(child.process.kill)  # it does not listen to its parent while it serves
    return child.receive()


def round_trips(stack: ExitStack, frame: np.ndarray) -> dict[str, Callable[[], None]]:
    """Each function sends the frame and waits for what comes back."""
    pipe = Child("echo", echo)
    stack.callback(pipe.close)
    raw = frame.tobytes()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    client_keys = str(make_keys(f"{folder}/keys"))
    cfg = LinkConfig(live_timeout_s=LIMIT_S, timeout_s=60.0)
    address = start_server(stack, None)
    link = ScoreLink(address, cfg)
    secret = ScoreLink(start_server(stack, f"{folder}/keys"), LinkConfig(keys=client_keys))
    judge = make_judge(RewardConfig(use_reward_model=True, placement=address, link=cfg))
    for end in (link, secret, judge):
        stack.callback(end.close)

    def over_pipe() -> None:
        pipe.connection.send_bytes(raw)
        pipe.connection.recv_bytes()

    def over(link: ScoreLink) -> None:
        link.send({"main_images": frame[None]})
        link.receive()

    def judged() -> None:
        judge.ask({"main_images": frame}, judge.asked)
        if judge.wait(LIMIT_S) is None:
            raise RuntimeError(f"no verdict within {LIMIT_S} s")

    return {"pipe": over_pipe, "link": lambda: over(link), "secret": lambda: over(secret), "judge": judged}


def measure(quick: bool) -> dict[str, list[float]]:
    """Seconds of each round trip, by side."""
    frame = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    num_rounds, per_round = (2, 50) if quick else (10, 200)
    with ExitStack() as stack:
        sides = round_trips(stack, frame)
        gc.freeze()  # as a control loop should
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(num_rounds + 1):
            for name, go in sides.items():
                for _ in range(per_round):
                    start = time.perf_counter()
                    go()
                    if number > 0:  # the first round warms up
                        times[name].append(time.perf_counter() - start)
    return times


def rows(quick: bool) -> list[dict]:
    """Rows for benchmarks/run.py: the link's median time over the pipe's, and a judge's slowest hundredth."""
    torch.set_num_threads(1)
    times = measure(quick)
    median_ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
    p99_ms = 1000 * statistics.quantiles(times["judge"], n=100)[-1]
    return [
        {
            "name": "round trip of a 128x128 frame over the reward link, against a raw pipe: time",
            "ratio": median_ms["link"] / median_ms["pipe"],
            "target": LARGEST_RATIO,
            "unit": "at most",
            "detail": f"{median_ms['secret'] / median_ms['pipe']:.2f} with keys; medians, loopback",
        },
        {
            "name": "live verdict over the reward link, 99th percentile",
            "ratio": p99_ms,
            "target": LARGEST_P99_MS,
            "unit": "ms, at most",
            "detail": f"median {median_ms['judge']:.2f} ms; a model that costs nothing, loopback",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the reward link.")
    parser.add_argument("--quick", action="store_true", help="fewer round trips")
    for row in rows(parser.parse_args().quick):
        print(f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}); {row['detail']}")


if __name__ == "__main__":
    main()
