"""Is the reward model right about the policy that it trains? Verdicts against the truth, and an alarm.

`Audit` counts frames and `TrendAudit` windows while a run goes on; `frame_rates` says what such frames amount
to, in training and in evaluations alike. `Alarm` listens to the log's own numbers and speaks up when the
policy is called a success more often than it is one.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.intervals import draw_episodes, per_episode, share_interval
from common.metrics import auprc
from common.rewards import Verdicts, WindowVerdicts
from common.trend import LABELS, NEGATIVE, POSITIVE


def frame_rates(
    group: str, success: Tensor, success_prob: Tensor, truth: Tensor, episode: Tensor
) -> dict[str, float]:
    """How M verdicts on the policy's own frames compare with the truth; each number only where there is
    something to count.

    success, truth (M,) bool, success_prob (M,) float, episode (M,) int64, a number for each. Precision comes
    with its 95 % interval (`share_interval`) and `num_called`, the frames it is a share of: in training these
    may be few.
    """
    called, hits, out = int(success.sum()), int((success & truth).sum()), {}
    if called:
        out[f"{group}/precision"] = hits / called
        _, number = np.unique(episode[success].numpy(), return_inverse=True)
        table = per_episode(number, number.max() + 1, truth[success].numpy(), np.ones(called))
        low, high = share_interval(*table.T, draw_episodes(len(table)))
        out[f"{group}/precision_low"], out[f"{group}/precision_high"] = low, high
        out[f"{group}/num_called"] = called
    if truth.any():
        out[f"{group}/recall"] = hits / int(truth.sum())
        if not truth.all():
            out[f"{group}/auprc"] = auprc(success_prob, truth)
    return out


class Audit:
    """Counts how the verdicts compare with the truth, frame by frame, since the last `metrics` call."""

    def __init__(self):
        self._ended = 0  # episodes of each env, (N,) once there are any
        self._start()

    def _start(self) -> None:
        self.steps, self.reward_sum = 0, 0.0
        self.frames: list[tuple[Tensor, ...]] = []  # success, success_prob, truth, episode, (M,) each

    def step(self, num_env_steps: int) -> None:
        self.steps += num_env_steps

    def episodes(self, done: Tensor) -> Tensor:
        """(T, N) int64: a number for the episode of each of the next T steps of N envs; done (T, N) bool."""
        before = done.cumsum(0) - done.long() + self._ended
        self._ended = self._ended + done.sum(0)
        return before * done.shape[1] + torch.arange(done.shape[1])

    def count(self, verdicts: Verdicts, truth: Tensor, episode: Tensor) -> None:
        """truth (M,) bool: what the simulator (or a person) says of the same frames; episode (M,) int64."""
        self.frames.append((verdicts.success.cpu(), verdicts.success_prob.cpu(), truth.cpu(), episode))
        self.reward_sum += float(verdicts.model_reward.sum())

    def metrics(self, group: str = "reward") -> dict[str, float]:
        """Rates since the last call, `frame_rates` among them.

        Nothing, and nothing forgotten, while no frame has been scored: episodes may be longer than the time
        between two calls, and every env step counts once in the rate of false positives.
        """
        scored = sum(len(truth) for _, _, truth, _ in self.frames)
        if not scored:
            return {}
        success, success_prob, truth, episode = map(torch.cat, zip(*self.frames, strict=True))
        out = {
            f"{group}/false_positives_per_1000_steps": 1000 * int((success & ~truth).sum()) / self.steps,
            f"{group}/model_reward_mean": self.reward_sum / scored,
            **frame_rates(group, success, success_prob.nan_to_num(0.0), truth, episode),
        }
        self._start()
        return out


class TrendAudit:
    """Counts how the trend labels of windows compare with the true ones, since the last `metrics` call."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        self.said = torch.zeros(len(LABELS) + 1, dtype=torch.long)  # the last: invalid
        self.confusion = torch.zeros(len(LABELS), len(LABELS) + 1, dtype=torch.long)  # true, said
        self.scored, self.reward_sum, self.mass_sum = 0, 0.0, 0.0

    def step(self, num_env_steps: int) -> None:
        """Rates here are of windows, whatever the number of env steps."""

    def count(self, verdicts: WindowVerdicts, truth: Tensor) -> None:
        """truth (M,) int64 index into LABELS, -1 where it is not known."""
        self.scored += len(truth)
        self.reward_sum += float(verdicts.model_reward.sum())
        self.mass_sum += float(verdicts.label_prob.sum())
        said = verdicts.label.cpu() % (len(LABELS) + 1)  # -1, invalid: the last column
        self.said += said.bincount(minlength=len(self.said))
        known = truth >= 0
        cells = truth[known] * self.confusion.shape[1] + said[known]
        self.confusion += cells.bincount(minlength=self.confusion.numel()).view_as(self.confusion)

    def metrics(self, group: str = "reward") -> dict[str, float]:
        """Shares of the windows since the last call; those against the truth only where it was known."""
        if not self.scored:
            return {}
        out = {
            f"{group}/positive_share": int(self.said[POSITIVE]) / self.scored,
            f"{group}/negative_share": int(self.said[NEGATIVE]) / self.scored,
            f"{group}/label_mass": self.mass_sum / self.scored,
            f"{group}/model_reward_mean": self.reward_sum / self.scored,
        }
        if known := int(self.confusion.sum()):
            out[f"{group}/agreement"] = int(self.confusion.diagonal().sum()) / known
            if called := int(self.confusion[:, POSITIVE].sum()):
                false = called - int(self.confusion[POSITIVE, POSITIVE])
                out[f"{group}/false_positive_share"] = false / called
        self._start()
        return out


# ----------------------------------------------------------------------------------------------------
# The alarm


@dataclass
class AuditConfig:
    """Section `reward.audit`: what to do once the reward model is fooled."""

    max_hack_gap: float = 10.0  # points of a hundred by which learned success may exceed true success
    # warn: a line in the log; stop: save `last` and end the run; lower: pay less of the learned reward
    action: Literal["warn", "stop", "lower"] = "warn"
    min_episodes: int = 50  # of training, the newest ones, so many at least, are looked at together
    confidence: float = 0.99  # that the gap is wider; it is asked at every log line, so .95 would cry wolf
    lower_by: float = 0.5  # lower: reward_weight is multiplied by it, each time

    def __post_init__(self):
        if not 0 <= self.max_hack_gap < 100:
            raise ValueError(f"max_hack_gap must lie in [0, 100), got {self.max_hack_gap}")
        if self.min_episodes < 1 or not 0.5 <= self.confidence < 1 or not 0 <= self.lower_by < 1:
            raise ValueError(
                "min_episodes must be at least 1, confidence in [.5, 1), lower_by in [0, 1), got "
                f"{self.min_episodes}, {self.confidence}, {self.lower_by}"
            )


def gap_lower_bound(fooled: int, missed: int, episodes: int, confidence: float) -> float:
    """Lower end, one-sided, of the interval of (fooled - missed) / episodes, a share in [-1, 1].

    fooled: episodes called a success that are none; missed: the reverse. For pairs of yes and no on the same
    episodes, with half an episode added to each of the four cells (Agresti & Min, Statistics in Medicine
    2005), so that a few episodes that all agree are not taken for certainty.
    """
    b, c, n = fooled + 0.5, missed + 0.5, episodes + 2
    gap = (b - c) / n
    return gap - NormalDist().inv_cdf(confidence) * math.sqrt((b + c) / n - gap * gap) / math.sqrt(n)


class Alarm:
    """Listens to the numbers of the log, training and evaluations apart, and says when the hack gap is open.
    Evaluations all begin in the same scenes, so only the newest counts.

    `weight` is what `reward_weight` is to be multiplied with from now on.
    """

    def __init__(self, cfg: AuditConfig):
        self.cfg, self.weight = cfg, 1.0
        self._heard: dict[str, deque[tuple[int, int, int]]] = {"rollout": deque(), "eval": deque()}

    def hear(self, metrics: dict[str, float]) -> str | None:
        """The alarm in words, where these metrics (by their tags) set it off. It then listens anew: the next
        one comes from other episodes."""
        for source, heard in self._heard.items():
            episodes = int(metrics.get(f"{source}/num_episodes", 0))
            if episodes and f"{source}/fooled" in metrics:
                if source == "eval":
                    heard.clear()
                shares = metrics[f"{source}/fooled"], metrics[f"{source}/missed"]
                heard.append((*(round(share * episodes) for share in shares), episodes))
            while len(heard) > 1 and sum(n for _, _, n in heard) - heard[0][2] >= self.cfg.min_episodes:
                heard.popleft()
            if message := self._judge(source, heard):
                heard.clear()
                if self.cfg.action == "lower":
                    self.weight *= self.cfg.lower_by
                return message
        return None

    def forget(self) -> None:
        """Another reward model judges from now on: what was heard of the one before says nothing of it."""
        for heard in self._heard.values():
            heard.clear()

    def _judge(self, source: str, heard: deque) -> str | None:
        fooled, missed, episodes = (sum(row[column] for row in heard) for column in range(3))
        if not episodes or (source == "rollout" and episodes < self.cfg.min_episodes):
            return None
        low = 100 * gap_lower_bound(fooled, missed, episodes, self.cfg.confidence)
        if low <= self.cfg.max_hack_gap:
            return None
        where = {"rollout": "training", "eval": "evaluation"}[source]
        return (
            f"the reward model is fooled: of the last {episodes} episodes of {where} it calls {fooled} a "
            f"success that are none, and misses {missed}: hack gap {100 * (fooled - missed) / episodes:+.1f} "
            f"points, with {self.cfg.confidence:.0%} confidence above {low:.1f}; "
            f"reward.audit.max_hack_gap is {self.cfg.max_hack_gap:g}"
        )
