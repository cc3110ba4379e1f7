"""How a training loop gets its verdicts: frames go in as they appear, verdicts come out later, in order.

    client.submit(frames, keys)          # never waits for the model when it runs in a worker
    client.flush()                       # send what is still short of a chunk
    for verdicts in client.receive():    # finished ones; wait=True: all that was submitted

Frames are scored in chunks of `infer_micro_batch_size`, inline or in a worker process alike, so both give the
same numbers. All that is asked of a reward model is one method, `score(frames) -> success_prob`.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal

import torch
from torch import Tensor

from common.envs import Render
from common.processes import Child
from common.resnet_reward import ResNetRewardConfig, load_reward_model
from common.rewards import Verdicts
from common.runtime import UserError

RING_CHUNKS = 16  # chunks of frames that may be on their way to the worker before submit waits


@dataclass
class RewardConfig:
    use_reward_model: bool = False
    reward_mode: Literal["per_step", "terminal", "history_buffer"] = "terminal"
    reward_threshold: float | Literal["auto"] = "auto"  # auto: the one stored with the model
    reward_weight: float = 1.0
    env_reward_weight: float = 0.0
    placement: Literal["auto", "inline", "worker"] = "auto"  # auto: worker for per_step on the CPU
    model: ResNetRewardConfig = field(default_factory=ResNetRewardConfig)

    def __post_init__(self):
        if self.reward_threshold != "auto" and not 0 <= self.reward_threshold <= 1:
            raise ValueError(f"reward_threshold must lie in [0, 1] or be 'auto', got {self.reward_threshold}")
        if self.use_reward_model and self.model.model_path is None:
            raise ValueError("use_reward_model is on but model.model_path names no checkpoint")
        if self.reward_mode == "history_buffer" and self.model.model_type == "resnet":
            raise ValueError("history_buffer needs a model of windows; a resnet judges single frames")

    @property
    def render(self) -> Render:
        """Which frames the reward needs."""
        if not self.use_reward_model:
            return Render.NONE
        return Render.IF_DONE if self.reward_mode == "terminal" else Render.ALWAYS

    @property
    def in_worker(self) -> bool:
        if self.placement == "auto":
            return self.reward_mode != "terminal" and not torch.cuda.is_available()
        return self.placement == "worker"


class RewardClient:
    """The model in this process. Also the shape of every other client: chunks, order, latency."""

    def __init__(self, cfg: RewardConfig):
        self.cfg = cfg
        self.chunk_size = cfg.model.infer_micro_batch_size
        self._parts: list[tuple[dict[str, Tensor], Tensor]] = []  # submitted, short of a chunk
        self._num_waiting = 0
        self._done: deque[Verdicts] = deque()
        self.seconds = 0.0  # spent waiting for the model in this process
        self._open()

    # -- what the loop calls -------------------------------------------------------------------------

    def submit(self, frames: dict[str, Tensor], keys: Tensor) -> None:
        """frames: view -> (M, H, W, 3) uint8; keys (M,) int64, handed back with the verdicts."""
        if len(keys) == 0:
            return
        self._parts.append(({view: frames[view] for view in self.views}, keys))
        self._num_waiting += len(keys)
        while self._num_waiting >= self.chunk_size:
            self._send_chunk(self.chunk_size)

    def flush(self) -> None:
        if self._num_waiting:
            self._send_chunk(self._num_waiting)

    def receive(self, wait: bool = False) -> list[Verdicts]:
        """Verdicts in the order of submission: those at hand, or all that were submitted."""
        if wait:
            self.flush()
        start = time.perf_counter()
        self._collect(wait)
        self.seconds += time.perf_counter() - start
        out = list(self._done)
        self._done.clear()
        return out

    @property
    def busy(self) -> bool:
        """Whether anything submitted has not been handed out yet."""
        return bool(self._parts or self._done)

    def check_idle(self) -> None:
        """RuntimeError where the next verdicts belong to somebody else."""
        if self.busy:
            raise RuntimeError("the reward model still owes verdicts to the rollout: drain that first")

    def score(self, frames: dict[str, Tensor]) -> Verdicts:
        """Submit and wait; keys are 0..M-1. For videos and relabelling; nothing else may be in flight."""
        self.check_idle()
        count = len(next(iter(frames.values())))
        self.submit(frames, torch.arange(count))
        parts = self.receive(wait=True)
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "success_prob")]
        return Verdicts.judge(*joined, self.threshold)

    def check_render(self, render: dict) -> None:
        """UserError with each difference from the frames the model was trained on."""
        trained = self.meta.get("render")
        if trained is None:
            return
        ours, theirs = _flatten(render, self.views), _flatten(trained, self.views)
        different = [
            f"{k}: trained on {theirs.get(k)}, here {ours.get(k)}"
            for k in sorted(ours.keys() | theirs.keys())
            if ours.get(k) != theirs.get(k)
        ]
        if different:
            raise UserError(
                f"the reward model {self.cfg.model.model_path} knows other pictures than these envs make: "
                + "; ".join(different)
                + " (mend env.*.cameras, or collect and train again)"
            )

    def close(self) -> None:
        """Nothing to end inline."""

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- parts ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.model = load_reward_model(self.cfg.model)
        self._read_meta(self.model.meta, self.model.views)

    def _read_meta(self, meta: dict, views: tuple[str, ...]) -> None:
        self.meta, self.views = meta, views
        stored = meta.get("threshold")
        if self.cfg.reward_threshold != "auto":
            self.threshold = float(self.cfg.reward_threshold)
        elif stored is not None:
            self.threshold = float(stored)
        else:
            raise UserError(
                f"{self.cfg.model.model_path} stores no threshold; set reward.reward_threshold to a number"
            )

    def _send_chunk(self, count: int) -> None:
        frames = {v: torch.cat([part[0][v] for part in self._parts]) for v in self.views}
        keys = torch.cat([part[1] for part in self._parts])
        self._parts = []
        self._num_waiting = len(keys) - count
        if self._num_waiting:
            self._parts = [({v: f[count:] for v, f in frames.items()}, keys[count:])]
        start = time.perf_counter()
        self._score_chunk({v: f[:count] for v, f in frames.items()}, keys[:count])
        self.seconds += time.perf_counter() - start

    def _score_chunk(self, frames: dict[str, Tensor], keys: Tensor) -> None:
        self._done.append(Verdicts.judge(keys, self.model.score(frames), self.threshold))

    def _collect(self, wait: bool) -> None:
        """Everything inline is done already."""


class RewardWorker(RewardClient):
    """The model in a process of its own; frames travel through a ring in shared memory."""

    def _open(self) -> None:
        self.child = Child("reward worker", _reward_worker, (self.cfg.model,))
        self._read_meta(*self.child.receive())
        self.ring: dict[str, Tensor] | None = None
        self._sent: deque[tuple[int, Tensor]] = deque()  # (ring chunk, keys) in order
        self._next_chunk = 0

    def _score_chunk(self, frames: dict[str, Tensor], keys: Tensor) -> None:
        if self.ring is None:
            shape = (RING_CHUNKS, self.chunk_size)
            self.ring = {
                v: torch.zeros((*shape, *f.shape[1:]), dtype=torch.uint8).share_memory_()
                for v, f in frames.items()
            }
            self.child.send(self.ring)
        while len(self._sent) >= RING_CHUNKS:
            self._take_one()
        for view, frame in frames.items():
            if frame.shape[1:] != self.ring[view].shape[2:]:
                raise UserError(
                    f"{view} changed its size: {tuple(self.ring[view].shape[2:])} to {tuple(frame.shape[1:])}"
                )
            self.ring[view][self._next_chunk, : len(keys)] = frame.cpu()
        self.child.send((self._next_chunk, len(keys)))
        self._sent.append((self._next_chunk, keys))
        self._next_chunk = (self._next_chunk + 1) % RING_CHUNKS

    def _take_one(self) -> None:
        success_prob = self.child.receive()
        _, keys = self._sent.popleft()
        self._done.append(Verdicts.judge(keys, success_prob, self.threshold))

    def _collect(self, wait: bool) -> None:
        while self._sent and (wait or self.child.has_message()):
            self._take_one()

    @property
    def busy(self) -> bool:
        return bool(self._parts or self._sent or self._done)

    def close(self) -> None:
        self.child.close()


def make_reward_client(cfg: RewardConfig) -> RewardClient:
    return RewardWorker(cfg) if cfg.in_worker else RewardClient(cfg)


def _reward_worker(connection: Connection, model_cfg) -> None:
    model = load_reward_model(model_cfg)
    connection.send(("ok", (model.meta, model.views)))
    ring = connection.recv()
    while True:
        chunk, count = connection.recv()
        success_prob = model.score({view: frames[chunk, :count] for view, frames in ring.items()})
        connection.send(("ok", success_prob))


def _flatten(render: dict, views: tuple[str, ...]) -> dict[str, object]:
    """Only what shows in the views that the model looks at."""
    flat = {k: v for k, v in render.items() if k != "views"}
    for view in views:
        flat |= {f"{view}.{k}": v for k, v in render["views"].get(view, {}).items()}
    return flat
