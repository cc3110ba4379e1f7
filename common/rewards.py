"""From a reward model's probability to the number the learner is told: pure functions, one for each rule.

    success      = success_prob >= reward_threshold             (the one verdict; metrics.py counts by it)
    model_reward = success_prob where success, else 0
    reward       = env_reward_weight * env_reward + reward_weight * model_reward

`per_step` scores the true next observation of every step, `terminal` only the last one of an episode, and its
reward lands on that step alone. Semantics follow RLinf's env worker.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BootstrapType = Literal["standard", "always", "none"]


@dataclass
class Verdicts:
    """What a reward model says of M frames. `keys` are the caller's own numbers for them."""

    keys: Tensor  # (M,) int64
    success_prob: Tensor  # (M,) float32 in [0, 1]
    success: Tensor  # (M,) bool
    model_reward: Tensor  # (M,) float32

    @classmethod
    def judge(cls, keys: Tensor, success_prob: Tensor, threshold: float) -> "Verdicts":
        success = success_prob >= threshold
        return cls(keys, success_prob, success, torch.where(success, success_prob, 0.0))


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


class Audit:
    """Counts how the verdicts compare with the truth, frame by frame, since the last `metrics` call."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        self.true_positives = self.false_positives = self.positives = self.scored = self.steps = 0
        self.reward_sum = 0.0

    def step(self, num_env_steps: int) -> None:
        self.steps += num_env_steps

    def count(self, verdicts: Verdicts, truth: Tensor) -> None:
        """truth (M,) bool: what the simulator (or a person) says of the same frames."""
        success = verdicts.success.cpu()
        truth = truth.cpu()
        self.true_positives += int((success & truth).sum())
        self.false_positives += int((success & ~truth).sum())
        self.positives += int(truth.sum())
        self.scored += len(truth)
        self.reward_sum += float(verdicts.model_reward.sum())

    def metrics(self, group: str = "reward") -> dict[str, float]:
        """Rates since the last call; precision and recall only where something was there to be found.

        Nothing, and nothing forgotten, while no frame has been scored: episodes may be longer than the time
        between two calls, and every env step counts once in the rate of false positives.
        """
        if not self.scored:
            return {}
        out = {
            f"{group}/false_positives_per_1000_steps": 1000 * self.false_positives / self.steps,
            f"{group}/model_reward_mean": self.reward_sum / self.scored,
        }
        if self.true_positives + self.false_positives:
            out[f"{group}/precision"] = self.true_positives / (self.true_positives + self.false_positives)
        if self.positives:
            out[f"{group}/recall"] = self.true_positives / self.positives
        self._start()
        return out
