"""A toy task for the learning tests: reach a goal in the plane within ten steps."""

import torch
from torch import Tensor

STEP = 0.3  # how far an action of 1 moves
GOAL_RADIUS = 0.2
TIME_LIMIT = 10


class ReachEnv:
    """N points in [-1, 1]^2, each with a goal; obs (N, 4) = point, goal. The reward is minus the distance.

    Resets itself at the time limit, which truncates and never terminates.
    """

    obs_dim, action_dim = 4, 2

    def __init__(self, num_envs: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.num_envs = num_envs
        self.obs = self.start()
        self.elapsed = 0

    def start(self) -> Tensor:
        return torch.rand(self.num_envs, 4, generator=self.generator) * 2 - 1

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        """action (N, 2) -> reward (N,), true next_obs (N, 4), success (N,) bool, truncated (of all envs)."""
        point, goal = self.obs.chunk(2, dim=-1)
        point = (point + STEP * action.clamp(-1, 1)).clamp(-1, 1)
        next_obs = torch.cat([point, goal], dim=-1)
        distance = (point - goal).norm(dim=-1)
        self.elapsed += 1
        truncated = self.elapsed == TIME_LIMIT
        self.obs = self.start() if truncated else next_obs
        self.elapsed %= TIME_LIMIT
        return -distance, next_obs, distance < GOAL_RADIUS, truncated


def success_at_end(agent, num_envs: int = 200) -> float:
    """Share of fresh episodes that end at the goal under the deterministic policy."""
    env = ReachEnv(num_envs, seed=12345)
    for _ in range(TIME_LIMIT):
        _, _, success, _ = env.step(agent.act(env.obs, deterministic=True))
    return success.float().mean().item()
