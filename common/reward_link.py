"""Verdicts while the world moves: a judge that is never waited for, here or asked over a link.

    serve_reward_model(cfg.reward, "tcp://127.0.0.1:5555")    # on the GPU machine, until Ctrl-C

    with make_judge(cfg.reward) as judge:           # reward.placement: inline, worker or tcp://host:port
        judge.ask({"main_images": frame}, step)     # (H, W, 3) uint8
        verdict = judge.poll()                      # (step, success_prob), or None: nothing new yet

A server may be stopped and started at any time; training asks it through `common.reward_client.RewardLink`.
"""

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.reward_client import RewardClient, RewardLink, make_reward_client
from common.reward_config import RewardConfig
from common.reward_models import OF_WINDOWS, load_reward_model
from common.reward_server import serve
from common.runtime import UserError

LOOK_EVERY_S = 0.02  # while waiting for a verdict, whether it is late by now


class LiveVerdict(NamedTuple):
    step: int  # of the frames that were judged
    success_prob: float


class LiveJudge:
    """Judges the newest frames; whoever asks goes on meanwhile. A context manager.

    One question is under way at a time. Frames asked about meanwhile wait, and newer ones take their place.
    A verdict that has not come `timeout_s` after its question, or before the next one, is late, and never
    comes. Counts since the start: `asked`, `answered`, `late` (a server's refusals too, each told on stderr
    once) and `overtaken` (never looked at). `client` has the model's `views`, `meta` and `threshold`.
    """

    def __init__(self, client: RewardClient, timeout_s: float):
        self.client, self.timeout_s = client, timeout_s
        self.asked = self.answered = self.late = self.overtaken = 0
        self._under_way: tuple[int, float] | None = None  # step, when it was asked
        self._is_late = False  # the one under way
        self._waiting: tuple[dict[str, Tensor], int, float] | None = None  # frames, step, when
        self._verdict: LiveVerdict | None = None
        self._last_step: int | None = None
        self._told: set[str] = set()

    def ask(self, frames: dict[str, np.ndarray], step: int) -> None:
        """frames: view -> (H, W, 3) uint8, for each of `client.views` (others are ignored). Never waits for
        the model, unless that is inline. Raises UserError for other frames, WorkerError for a dead worker."""
        chosen = {view: self._checked(view, frames) for view in self.client.views}
        self.asked += 1
        self._last_step, self._verdict = step, None
        self._look()
        if self._waiting is not None:
            self.overtaken += 1
        self._waiting = chosen, step, time.monotonic()
        self._start_waiting()

    def poll(self) -> LiveVerdict | None:
        """The verdict on the frames asked about last, once, or None. Never waits."""
        self._look()
        verdict, self._verdict = self._verdict, None
        return verdict

    def wait(self, timeout_s: float | None = None) -> LiveVerdict | None:
        """The verdict on the frames asked about last, or None when the time (None: `timeout_s`) is up."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        self._look()
        while self._waiting is not None or (self._under_way is not None and not self._is_late):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            self._look(min(left_s, LOOK_EVERY_S))
        return self.poll()

    def _checked(self, view: str, frames: dict[str, np.ndarray]) -> Tensor:
        """(1, H, W, 3), a copy: the caller may draw the next frame into the same memory."""
        if view not in frames:
            raise UserError(f"the reward model looks at {view}, which is not among the frames {list(frames)}")
        frame = np.array(frames[view])
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise UserError(f"{view} must be uint8 RGB (H, W, 3), got {frame.dtype} {frame.shape}")
        return torch.from_numpy(frame)[None]

    def _look(self, wait_s: float = 0.0) -> None:
        """Take in a verdict that has come, give up one that has not, start what waits."""
        try:
            self.client.await_one(wait_s)
            verdicts = self.client.receive()
        except UserError as error:
            self._refused(error)
            verdicts = []
        if verdicts:
            step, prob = int(verdicts[-1].keys[-1]), float(verdicts[-1].success_prob[-1])
            if not self._is_late and step == self._last_step:
                self.answered += 1
                self._verdict = LiveVerdict(step, prob)
            elif not self._is_late:
                self.late += 1
            self._under_way, self._is_late = None, False
        elif self._under_way is not None and not self._is_late and self._is_old(self._under_way[1]):
            self._give_up()
        self._start_waiting()

    def _is_old(self, asked_at: float) -> bool:
        return time.monotonic() - asked_at > self.timeout_s

    def _start_waiting(self) -> None:
        if self._waiting is None or self._under_way is not None:
            return
        (frames, step, asked_at), self._waiting = self._waiting, None
        if self._is_old(asked_at):
            self.late += 1
            return
        self._under_way = step, asked_at
        try:
            self.client.submit(frames, torch.tensor([step]))
            self.client.flush()
        except UserError as error:
            self._refused(error)

    def _give_up(self) -> None:
        """A worker keeps the question, and is asked the next one when it is through; a server may be gone."""
        self.late += 1
        if isinstance(self.client, RewardLink):
            self.client.drop()
            self._under_way = None
        else:
            self._is_late = True

    def _refused(self, error: UserError) -> None:
        if not isinstance(self.client, RewardLink):
            raise error
        if str(error) not in self._told:
            self._told.add(str(error))
            print(f"no verdicts: {error}", file=sys.stderr)
        if self._under_way is not None:
            self._give_up()

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> "LiveJudge":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def make_judge(cfg: RewardConfig) -> LiveJudge:
    """The reward model that `cfg` names, where `cfg.placement` says; `auto` is a worker here.

    Waits until the model is loaded, or its server has answered. Raises UserError.
    """
    if isinstance(cfg.model, OF_WINDOWS):
        raise UserError(
            f"reward.model.model_type {cfg.model.model_type} judges windows; live verdicts on success need a "
            "model of single frames: resnet or vlm"
        )
    placement = "worker" if cfg.placement == "auto" else cfg.placement
    model = replace(cfg.model, infer_micro_batch_size=1)
    client = make_reward_client(replace(cfg, use_reward_model=True, placement=placement, model=model))
    if isinstance(client, RewardLink):
        client.link.kind = "judge"
    return LiveJudge(client, cfg.link.live_timeout_s)


def serve_reward_model(cfg: RewardConfig, address: str, keys_dir: str | None = None) -> None:
    """Serve the model that `cfg.model` (or `cfg.api`) names; `cfg.placement` is for clients."""
    model = load_reward_model(cfg.model, cfg.api)
    with closing(model) if cfg.api is not None else nullcontext():
        serve(model, address, keys_dir, lambda text: print(text, flush=True))
