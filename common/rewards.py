"""From a reward model's probability to the number the learner is told: pure functions, one for each rule.

    success      = success_prob >= reward_threshold             (one frame; metrics.py counts by it)
    success      = what `Decision` makes of that, step after step, where it is told to remember
    model_reward = success_prob where success, else 0
    reward       = env_reward_weight * env_reward + reward_weight * model_reward

`per_step` scores the true next observation of every step, `terminal` only the last one of an episode, and its
reward lands on that step alone. `history_buffer` scores windows: the model gives a probability to each label,
a parser says what that is worth (`common.prompts`), and the reward lands on the window's last step or, with
`history_reward_assign`, on every step of it. Semantics follow RLinf's env worker. With `shaping: potential`
differences of the score are paid instead (`Shaping`), on top of the env reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.prompts import likeliest
from common.runtime import UserError

Scores = TypeVar("Scores", Tensor, np.ndarray)
BootstrapType = Literal["standard", "always", "none"]


def reaches(success_prob: Scores, threshold: float | Tensor) -> Scores:
    """Bool: the one comparison of a score with a threshold; nan reaches none."""
    return success_prob >= threshold


def worth(success_prob: Tensor, success: Tensor) -> Tensor:
    """model_reward of frames."""
    return torch.where(success, success_prob, 0.0)


@dataclass
class Verdicts:
    """What a reward model says of M frames. `keys` are the caller's own numbers for them."""

    keys: Tensor  # (M,) int64
    success_prob: Tensor  # (M,) float32 in [0, 1]
    success: Tensor  # (M,) bool
    model_reward: Tensor  # (M,) float32

    @classmethod
    def judge(cls, keys: Tensor, success_prob: Tensor, threshold: float) -> "Verdicts":
        success = reaches(success_prob, threshold)
        return cls(keys, success_prob, success, worth(success_prob, success))


@dataclass
class WindowVerdicts:
    """What a reward model says of M windows."""

    keys: Tensor  # (M,) int64
    label_prob: (
        Tensor  # (M, L) float32 of the labels' first tokens in the whole vocabulary; a row's sum: mass
    )
    label: Tensor  # (M,) int64 index into the parser's labels, prompts.INVALID for none of them
    model_reward: Tensor  # (M,) float32

    @classmethod
    def judge(cls, keys: Tensor, label_prob: Tensor, parser) -> "WindowVerdicts":
        return cls(keys, label_prob, likeliest(label_prob), parser.reward(label_prob))


class Decision:
    """From the scores of N envs to their verdicts, in order of time: a single score may be a mistake.

    A score votes for success where it reaches `threshold`; while the verdict stands, `leave_threshold` is
    enough (hysteresis). The verdict is success where `hold_k` of an env's last `hold_n` votes of this episode
    are for it. A score in `abstain_band` (low <= score < high) is no success, whoever counts, and casts no
    vote: it pays nothing, and the votes before it stay the last ones. nan, a score that never came, is no
    success either, and votes against. `RewardConfig` refuses rules by which a higher score is worth less.

    With the defaults the verdict is `success_prob >= threshold`, and nothing is remembered. UserError where
    the bounds do not lie around the threshold.
    """

    def __init__(
        self,
        threshold: float,
        num_envs: int = 1,
        hold_k: int = 1,
        hold_n: int = 1,
        leave_threshold: float | None = None,
        abstain_band: list[float] | None = None,
    ):
        if leave_threshold is not None and leave_threshold > threshold:
            raise UserError(
                f"reward.leave_threshold {leave_threshold} lies above the threshold {threshold}; lower it"
            )
        if abstain_band is not None and not abstain_band[0] <= threshold <= abstain_band[1]:
            raise UserError(
                f"reward.abstain_band {abstain_band} must lie around the threshold, which is {threshold}"
            )
        self.threshold, self.hold_k = threshold, hold_k
        self.leave_threshold = threshold if leave_threshold is None else leave_threshold
        self.abstain_band = abstain_band
        self.remembers = hold_n > 1 or leave_threshold is not None
        self._votes = torch.zeros(hold_n, num_envs, dtype=torch.bool)  # the newest last
        self._stands = torch.zeros(num_envs, dtype=torch.bool)  # the verdict

    def reset(self) -> None:
        """All envs begin an episode."""
        self._votes.zero_()
        self._stands.zero_()

    def __call__(self, success_prob: Tensor, done: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The verdict (T, N) bool on T steps that follow those before, of success_prob (T, N).

        done (T, N) bool: the episode ends there, and nothing of it is remembered. allowed (T, N) bool: where
        a vote for success may be cast. All on the CPU.
        """
        abstains = torch.zeros_like(done)
        if self.abstain_band is not None:
            low, high = self.abstain_band
            abstains = reaches(success_prob, low) & ~reaches(success_prob, high)
        allowed = torch.ones_like(done) if allowed is None else allowed
        if not self.remembers:
            return reaches(success_prob, self.threshold) & allowed & ~abstains
        rows = [self._step(*row) for row in zip(success_prob, allowed, abstains, done, strict=True)]
        return torch.stack(rows)

    def _step(self, success_prob: Tensor, allowed: Tensor, abstains: Tensor, done: Tensor) -> Tensor:
        needed = torch.where(self._stands, self.leave_threshold, self.threshold)
        vote = reaches(success_prob, needed) & allowed
        self._votes = torch.where(abstains, self._votes, torch.cat([self._votes[1:], vote[None]]))
        self._stands = self._votes.sum(0) >= self.hold_k
        success = self._stands & ~abstains & ~success_prob.isnan()
        self._votes, self._stands = self._votes & ~done, self._stands & ~done
        return success


class Shaping:
    """gamma * Phi(s') - Phi(s) of N envs, in order of time, Phi being the reward model's score.

    Where Phi is a function of what the learner sees, what is optimal for the env reward stays optimal (Ng,
    Harada and Russell 1999): a wrong model can slow learning down and cannot be exploited, for all it pays in
    an episode comes to Phi of its ends. So Phi is 0 where the value of the next state does not count
    (`no_bootstrap`). It is 0 as well of an episode's first state, whose picture nobody draws. A potential may
    depend on the time (Devlin and Kudenko 2012), but then the learner has to see the time: to one that does
    not, a start that comes back later has two potentials, and going back to it pays. `rl_train.py` therefore
    wants `observe_time`. Of windows Phi depends on the frames before as well, and nothing is guaranteed. A
    step without a score (nan) leaves Phi as it was.
    """

    def __init__(self, gamma: float, num_slots: int):
        """num_slots: B * N, see `common.judging`."""
        self.gamma = gamma
        self._phi = torch.zeros(num_slots)

    def __call__(self, score: Tensor, terminal: Tensor, done: Tensor) -> Tensor:
        """(T, B*N) float32: what T steps that follow those before are paid, of score (T, B*N) and terminal,
        done (T, N) bool; on the CPU."""
        out, repeats = torch.empty_like(score), score.shape[1] // done.shape[1]
        for t in range(len(score)):
            phi = torch.where(score[t].isnan(), self._phi, score[t])
            out[t] = self.gamma * torch.where(terminal[t].repeat(repeats), 0.0, phi) - self._phi
            self._phi = torch.where(done[t].repeat(repeats), 0.0, phi)
        return out


def combine_reward(
    env_reward: Tensor, model_reward: Tensor, env_reward_weight: float, reward_weight: float
) -> Tensor:
    """What the learner is told, float32 of any shape. A weight of 0 removes its part, whatever that holds."""
    reward = torch.zeros_like(env_reward)
    if env_reward_weight != 0:
        reward = reward + env_reward_weight * env_reward
    if reward_weight != 0:
        reward = reward + reward_weight * model_reward
    return reward


def no_bootstrap(terminated: Tensor, truncated: Tensor, bootstrap_type: BootstrapType) -> Tensor:
    """Bool, where the value of the next state must not count.

    `standard`: at a true end only, a time limit is bootstrapped through. `always`: nowhere. `none`: at both,
    for a reward paid on the last step of a fixed horizon, where life after the limit would be paid twice.
    """
    if bootstrap_type == "standard":
        return terminated
    if bootstrap_type == "always":
        return torch.zeros_like(terminated)
    return terminated | truncated


def add_bootstrap(
    reward: Tensor,
    final_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    bootstrap_type: BootstrapType,
) -> Tensor:
    """PPO's form of the same rule: gamma * V(last observation) joins the reward of an episode's last step.

    All (T, N); final_value is V(next_obs), of the state before the auto-reset, read only where an episode
    ended. The GAE that follows must cut at terminated | truncated.
    """
    ended = terminated | truncated
    bootstrapped = ended & ~no_bootstrap(terminated, truncated, bootstrap_type)
    return reward + torch.where(bootstrapped, gamma * final_value, 0.0)


# ------------------------------------------------------------------------------------------------------------
# What a model was trained on


def differences(
    meta: dict[str, Any], render: dict[str, Any] | None, control: dict[str, Any] | None, views: Sequence[str]
) -> list[str]:
    """Each difference of these pictures from those the model was trained on (meta: its reward.json), and of
    their rate, unless `control` is None. Of cameras only `views` are compared; a None on either side is not.
    """
    ours, theirs = {}, {}
    if render is not None and meta.get("render") is not None:
        ours, theirs = _flatten(render, views), _flatten(meta["render"], views)
    if control is not None and meta.get("control"):
        ours["freq_hz"], theirs["freq_hz"] = control.get("freq_hz"), meta["control"].get("freq_hz")
    return [
        f"{k}: trained on {theirs.get(k)}, here {ours.get(k)}"
        for k in sorted(ours.keys() | theirs.keys())
        if ours.get(k) != theirs.get(k)
    ]


def _flatten(render: dict[str, Any], views: Sequence[str]) -> dict[str, Any]:
    """Only what shows in the views that the model looks at."""
    flat = {k: v for k, v in render.items() if k != "views"}
    for view in views:
        flat |= {f"{view}.{k}": v for k, v in render.get("views", {}).get(view, {}).items()}
    return flat
