"""How a training loop gets its verdicts: frames go in as they appear, verdicts come out later, in order.

    client.submit(frames, keys)          # never waits for the model when it runs in a worker
    client.flush()                       # send what is still short of a chunk
    for verdicts in client.receive():    # finished ones; wait=True: all that was submitted

Frames, or windows of them, are scored in chunks of `infer_micro_batch_size`, inline, in a worker process or
on another machine alike, so all give the same numbers. What is asked of a reward model:
`common.reward_models`.
"""

import gc
import time
from collections import deque
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for

import numpy as np
import torch
from torch import Tensor

from common.envs import EnvSpec
from common.episodes import VIEWS, Episode
from common.link import ScoreLink
from common.metrics import threshold_is
from common.processes import Child
from common.prompts import make_parser
from common.reward_config import RewardConfig
from common.reward_models import load_reward_model
from common.rewards import Decision, Verdicts, WindowVerdicts, differences
from common.runtime import UserError

NUM_LATENCIES = 10_000  # chunks whose latency is remembered until the next `clock`
RING_CHUNKS = 16  # chunks of frames that may be on their way to the model before submit waits,
RING_BYTES = 128 << 20  # and to a worker not more than these, in shared memory, but two chunks in any case


class RewardClient:
    """The model in this process. Also the shape of every other client: chunks, order, latency."""

    def __init__(self, cfg: RewardConfig):
        self.cfg = cfg
        self.parser = (
            make_parser(cfg.model.reward_parser_name, cfg.model.reward_parser_params)
            if cfg.of_windows
            else None
        )
        self.chunk_size = cfg.model.infer_micro_batch_size
        self._parts: list[tuple[dict[str, Tensor], Tensor]] = []  # submitted, short of a chunk
        self._num_waiting = 0
        self._scorer: Child | ScoreLink | None = None  # where the model is, if it is not in this process
        self._sent: deque[tuple[Tensor, float]] = deque()  # keys of each chunk that is there, and since when
        self._done: deque[Verdicts | WindowVerdicts] = deque()
        self._scores_so_far: deque[Tensor] = deque(maxlen=10_000)  # of shuffle_scores
        self._shuffle_rng = np.random.default_rng(0)
        self.seconds = 0.0  # spent waiting for the model in this process, since `clock` was asked
        self._latencies: deque[float] = deque(maxlen=NUM_LATENCIES)  # s, of each chunk since then
        self._asked_at = time.perf_counter()
        self._open()

    # -- what the loop calls -------------------------------------------------------------------------

    def submit(self, frames: dict[str, Tensor], keys: Tensor) -> None:
        """frames: view -> (M, H, W, 3) uint8, or windows (M, K, ...); keys (M,) int64, handed back with the
        verdicts."""
        if len(keys) == 0:
            return
        self._parts.append(({view: frames[view] for view in self.views}, keys))
        self._num_waiting += len(keys)
        while self._num_waiting >= self.chunk_size:
            self._send_chunk(self.chunk_size)

    def flush(self) -> None:
        if self._num_waiting:
            self._send_chunk(self._num_waiting)

    def receive(self, wait: bool = False) -> list[Verdicts | WindowVerdicts]:
        """Verdicts in the order of submission: those at hand, or all that were submitted."""
        if wait:
            self.flush()
        start = time.perf_counter()
        self._collect(wait)
        self.seconds += time.perf_counter() - start
        out = list(self._done)
        self._done.clear()
        return [self._shuffled(verdicts) for verdicts in out] if self.cfg.shuffle_scores else out

    def clock(self) -> dict[str, float]:
        """What the model has cost since the last call: the share of wall time spent waiting for it, and the
        latency of a chunk of frames, from the moment it is sent until its scores are there."""
        now = time.perf_counter()
        out = {"reward/share_of_time": self.seconds / (now - self._asked_at)}
        if self._latencies:
            p50, p99 = 1000 * np.percentile(self._latencies, [50, 99])
            out |= {"time/verdict_p50_ms": float(p50), "time/verdict_p99_ms": float(p99)}
        self.seconds, self._asked_at = 0.0, now
        self._latencies.clear()
        return out

    def await_one(self, timeout_s: float) -> None:
        """Return once `receive` has something to hand out, or when the time is up."""
        start = time.perf_counter()
        self._await_one(timeout_s)
        self.seconds += time.perf_counter() - start

    def _await_one(self, timeout_s: float) -> None:
        """Inline it has already."""

    @property
    def camera_views(self) -> tuple[str, ...]:
        """The views that have to be rendered for the model."""
        return tuple(view for view in self.views if view in VIEWS)

    @property
    def busy(self) -> bool:
        """Whether anything submitted has not been handed out yet."""
        return bool(self._parts or self._sent or self._done)

    def check_idle(self) -> None:
        """RuntimeError where the next verdicts belong to somebody else."""
        if self.busy:
            raise RuntimeError("the reward model still owes verdicts to the rollout: drain that first")

    def score(self, frames: dict[str, Tensor]) -> Verdicts | WindowVerdicts:
        """Submit and wait; keys are 0..M-1. Nothing else may be in flight."""
        self.check_idle()
        count = len(next(iter(frames.values())))
        self.submit(frames, torch.arange(count))
        parts = [vars(part) for part in self.receive(wait=True)]
        kind = WindowVerdicts if self.cfg.of_windows else Verdicts
        return kind(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def decision(self, num_envs: int) -> Decision:
        """How this model's scores become verdicts, for envs at the begin of an episode."""
        cfg = self.cfg
        rule = {name: vars(cfg)[name] for name in ("hold_k", "hold_n", "leave_threshold", "abstain_band")}
        return Decision(self.threshold, num_envs, **rule)

    def _shuffled(self, verdicts: Verdicts | WindowVerdicts) -> Verdicts | WindowVerdicts:
        """The same frames with scores of others: as many that reach the threshold, in the wrong places; so
        several in a row (`hold_k`) are rarer."""
        windows = isinstance(verdicts, WindowVerdicts)
        rows = []
        for row in verdicts.label_prob if windows else verdicts.success_prob:
            self._scores_so_far.append(row)
            rows.append(self._scores_so_far[self._shuffle_rng.integers(len(self._scores_so_far))])
        rule = self.parser if windows else self.threshold
        return type(verdicts).judge(verdicts.keys, torch.stack(rows), rule)

    def swap(self, model_path: str) -> None:
        """Judge by another checkpoint of the same kind from now on, and by its threshold where that is
        `auto`. Nothing may be in flight. UserError where it cannot be loaded."""
        self.check_idle()
        self.close()
        self.cfg = replace(self.cfg, model=replace(self.cfg.model, model_path=model_path))
        self._open()

    @property
    def threshold_is(self) -> str:
        """Which threshold this is, and where it comes from."""
        return f"reward threshold {self.threshold:.3f}, {threshold_is(self.meta, self.threshold)}"

    def check_envs(self, spec: EnvSpec | Episode) -> None:
        """UserError with each difference from the frames the model was trained on, and from their rate where
        it judges motion. spec: of the envs, or an episode; its `render` and `control` are looked at."""
        control = spec.control if self.cfg.of_windows else None
        if different := differences(self.meta, spec.render, control, self.views):
            raise UserError(
                f"the reward model {self.cfg.model_name} knows other pictures than these envs make: "
                + "; ".join(different)
                + " (mend env.*.cameras or control_freq, or collect and train again)"
            )

    def set_task(self, task: str) -> None:
        """The task in words, for models that are told it."""
        set_task(self.model, task)

    def close(self) -> None:
        """Inline only a served model has something to end."""
        if self.cfg.api is not None:
            self.model.close()

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- parts ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.model = load_reward_model(self.cfg.model, self.cfg.api)
        self._read_meta(self.model.meta, self.model.views, self.model.window)

    def _read_meta(self, meta: dict, views: tuple[str, ...], window: int | None) -> None:
        self.meta, self.views = meta, views
        if self.cfg.of_windows:
            self._check_buffers(window)
            self.threshold = 0.5  # of the probability of positive, in pictures alone
            return
        stored = meta.get("threshold")
        if self.cfg.reward_threshold != "auto":
            self.threshold = float(self.cfg.reward_threshold)
        elif stored is not None:
            self.threshold = float(stored)
        else:
            raise UserError(
                f"the reward model {self.cfg.model_name} stores no threshold; "
                "set reward.reward_threshold to a number"
            )
        self.decision(1)  # UserError now where its bounds do not fit the threshold

    def _check_buffers(self, window: int | None) -> None:
        """UserError where the history buffers do not keep what the model was trained on."""
        sizes = {name: buffer.history_size for name, buffer in self.cfg.model.history_buffers.items()}
        if len(set(sizes.values())) != 1:
            raise UserError(
                f"reward.model.history_buffers: one model, one history_size, got {sizes or 'none'}"
            )
        for name, buffer in self.cfg.model.history_buffers.items():
            where = f"reward.model.history_buffers.{name}"
            if window is not None and buffer.history_size != window:
                raise UserError(
                    f"{where}.history_size is {buffer.history_size}, but the reward model judges windows of "
                    f"{window} frames; set it to {window}, or train on windows of {buffer.history_size}"
                )
            if missing := [view for view in self.views if view not in buffer.history_keys]:
                raise UserError(f"{where}.history_keys lacks {missing[0]}, which the reward model looks at")

    def _judge(self, keys: Tensor, scores: Tensor) -> Verdicts | WindowVerdicts:
        """scores: what the model's `score` gave."""
        if self.cfg.of_windows:
            return WindowVerdicts.judge(keys, scores, self.parser)
        return Verdicts.judge(keys, scores, self.threshold)

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
        start = time.perf_counter()
        self._done.append(self._judge(keys, self.model.score(frames)))
        self._latencies.append(time.perf_counter() - start)

    def _take_one(self) -> None:
        scores, there_at = self._answer()
        keys, sent_at = self._sent.popleft()
        self._latencies.append(there_at - sent_at)
        self._done.append(self._judge(keys, scores))

    def _answer(self) -> tuple[Tensor, float]:
        """The scores of the oldest chunk that was sent, and when they were there, on `perf_counter`."""
        return torch.as_tensor(self._scorer.receive()), time.perf_counter()

    def _collect(self, wait: bool) -> None:
        while self._sent and (wait or self._scorer.has_message()):
            self._take_one()


class RewardWorker(RewardClient):
    """The model in a process of its own; frames travel through a ring in shared memory."""

    def _open(self) -> None:
        self.child = Child("reward worker", _reward_worker, (self.cfg.model, self.cfg.api))
        self._scorer = self.child
        self._read_meta(*self.child.receive())
        self.ring: dict[str, Tensor] | None = None
        self._next_chunk = 0

    def _score_chunk(self, frames: dict[str, Tensor], keys: Tensor) -> None:
        if self.ring is None:
            self.ring = self._make_ring(frames)
            self.child.send(("ring", self.ring))
        while len(self._sent) >= self.num_chunks:
            self._take_one()
        for view, frame in frames.items():
            if frame.shape[1:] != self.ring[view].shape[2:]:
                raise UserError(
                    f"{view} changed its size: {tuple(self.ring[view].shape[2:])} to {tuple(frame.shape[1:])}"
                )
            self.ring[view][self._next_chunk, : len(keys)] = frame.cpu()
        self.child.send(("score", (self._next_chunk, len(keys))))
        self._sent.append((keys, time.perf_counter()))
        self._next_chunk = (self._next_chunk + 1) % self.num_chunks

    def _answer(self) -> tuple[Tensor, float]:
        return self.child.receive()  # the worker's clock is ours: it is the machine's

    def _make_ring(self, frames: dict[str, Tensor]) -> dict[str, Tensor]:
        chunk_bytes = self.chunk_size * sum(f[0].nbytes for f in frames.values())
        self.num_chunks = min(max(2, RING_BYTES // chunk_bytes), RING_CHUNKS)
        shape = (self.num_chunks, self.chunk_size)
        try:
            return {
                v: torch.zeros((*shape, *f.shape[1:]), dtype=f.dtype).share_memory_()
                for v, f in frames.items()
            }
        except RuntimeError as error:
            raise UserError(
                f"no room in /dev/shm for {self.num_chunks * chunk_bytes >> 20} MB of frames on their way to "
                "the reward worker; enlarge it (docker: --shm-size), lower "
                "reward.model.infer_micro_batch_size, or set reward.placement to inline"
            ) from error

    def _await_one(self, timeout_s: float) -> None:
        if self._sent and not self._done:
            wait_for([self.child.connection, self.child.process.sentinel], timeout_s)

    def set_task(self, task: str) -> None:
        self.child.send(("task", task))

    def close(self) -> None:
        self.child.close()


class RewardLink(RewardClient):
    """The model on another machine, or in a server here. One link carries frames of any size.

    Raises UserError where the server gives no answer, refuses the frames or changes its model.
    """

    def _open(self) -> None:
        self._scorer = self.link = ScoreLink(self.cfg.placement, self.cfg.link)
        try:
            self._read_meta(self.link.served.meta, self.link.served.views, self.link.served.window)
        except UserError:
            self.close()
            raise

    def _judge(self, keys: Tensor, scores: Tensor) -> Verdicts | WindowVerdicts:
        if scores.dim() != (2 if self.cfg.of_windows else 1):
            raise UserError(
                f"the reward model {self.cfg.model_name} is of another kind than reward.model.model_type "
                f"{self.cfg.model.model_type}; name the server's kind"
            )
        return super()._judge(keys, scores)

    def _score_chunk(self, frames: dict[str, Tensor], keys: Tensor) -> None:
        while len(self._sent) >= RING_CHUNKS:
            self._take_one()
        self.link.send({view: images.cpu().numpy() for view, images in frames.items()})
        self._sent.append((keys, time.perf_counter()))

    def _await_one(self, timeout_s: float) -> None:
        if self._sent and not self._done:
            self.link.has_message(timeout_s)

    def set_task(self, task: str) -> None:
        self.link.task = task

    def drop(self) -> None:
        """Forget what is under way: no verdict on it will come."""
        self.link.drop()
        self._sent.clear()

    def close(self) -> None:
        self.link.close()


def make_reward_client(cfg: RewardConfig) -> RewardClient:
    if cfg.linked:
        return RewardLink(cfg)
    return RewardWorker(cfg) if cfg.in_worker else RewardClient(cfg)


def set_task(model, task: str) -> None:
    if hasattr(model, "task"):
        model.task = task


def _reward_worker(connection: Connection, model_cfg, api) -> None:
    model = load_reward_model(model_cfg, api)
    gc.freeze()  # else the search for garbage goes through all of torch now and then, 0.2 s at a time
    connection.send(("ok", (model.meta, model.views, model.window)))
    ring = None
    while True:
        kind, content = connection.recv()
        if kind == "task":
            set_task(model, content)
        elif kind == "ring":
            ring = content
        else:
            chunk, count = content
            scores = model.score({view: frames[chunk, :count] for view, frames in ring.items()})
            connection.send(("ok", (scores, time.perf_counter())))
