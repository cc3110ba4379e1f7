"""How good is the policy really, and how good does the reward model think it is?

Both are measured on the same episodes. The truth is reported; a checkpoint is chosen by the learned verdict
alone, because on a robot there is nothing else to choose by.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.envs import Render
from common.reward_client import RewardClient
from common.video import Trace


@dataclass
class Evaluation:
    """Per episode, all (E,). Where no reward model was asked, `learned` and `score` are nan."""

    once: np.ndarray  # bool: true success at some step
    at_end: np.ndarray  # bool: true success at the last step
    learned: np.ndarray  # float 0/1: the reward model's verdict, of the last frame or of any frame
    score: np.ndarray  # float: the success_prob behind it, of the last frame or the highest
    env_return: np.ndarray  # float: sum of env_reward
    false_positives: int  # frames judged a success that were none
    num_steps: int
    last_frame_only: bool  # reward_mode terminal

    @property
    def metrics(self) -> dict[str, float]:
        """Tags of one evaluation. The gap compares like with like: the verdict on last frames with the truth
        of last frames, the verdict on any frame with the truth of any frame."""
        out = {
            "eval/num_episodes": len(self.once),
            "eval/true_success_once": float(self.once.mean()),
            "eval/true_success_at_end": float(self.at_end.mean()),
            "eval/return": float(self.env_return.mean()),
        }
        if not np.isnan(self.learned).any():
            truth = self.at_end if self.last_frame_only else self.once
            learned = float(self.learned.mean())
            out["eval/learned_success"] = learned
            out["eval/score"] = float(self.score.mean())
            out["eval/hack_gap"] = 100 * (learned - float(truth.mean()))
            out["eval/false_positives_per_1000_steps"] = 1000 * self.false_positives / self.num_steps
        return out

    @property
    def merit(self) -> tuple[float, float]:
        """What a checkpoint is chosen by: learned success, then the mean score; never the truth. Without a
        reward model: the return of the env reward that was learned from."""
        if np.isnan(self.learned).any():
            return float(self.env_return.mean()), 0.0
        return float(self.learned.mean()), float(self.score.mean())


@torch.no_grad()
def evaluate(envs, agent, client: RewardClient | None, num_episodes: int, seed: int) -> Evaluation:
    """Run the deterministic policy for `num_episodes`, as many in each env (rounded up), from `seed` on.

    A fixed number per env: counting the first ones that end would favour short episodes.
    """
    if client is not None:
        client.check_idle()
    quota = math.ceil(num_episodes / envs.num_envs)
    render = client.cfg.render if client is not None else Render.NONE
    obs = envs.reset(seed)
    rows: dict[str, list[Tensor]] = {"success": [], "done": [], "env_reward": []}
    ended = torch.zeros(envs.num_envs, dtype=torch.long)
    while int(ended.min()) < quota:
        step = envs.step(agent.act(obs, deterministic=True).clamp(-1, 1).to(envs.device), render)
        obs = step.obs
        if client is not None:
            client.submit(step.frames, len(rows["done"]) * envs.num_envs + step.frame_ids.cpu())
        for name in rows:
            rows[name].append(getattr(step, name).cpu())
        ended += rows["done"][-1]
    table = {name: torch.stack(values) for name, values in rows.items()}  # (T, N)
    prob = torch.full(table["done"].shape, torch.nan)
    verdict = torch.zeros(table["done"].shape, dtype=torch.bool)
    for verdicts in client.receive(wait=True) if client is not None else []:
        prob.view(-1)[verdicts.keys] = verdicts.success_prob
        verdict.view(-1)[verdicts.keys] = verdicts.success
    return _by_episode(table, prob, verdict, quota, client)


def _by_episode(
    table: dict[str, Tensor], prob: Tensor, verdict: Tensor, quota: int, client: RewardClient | None
) -> Evaluation:
    last_only = client is not None and client.cfg.reward_mode == "terminal"
    once, at_end, learned, score, env_return = [], [], [], [], []
    false_positives = num_steps = 0
    for env in range(table["done"].shape[1]):
        start = 0
        for end in table["done"][:, env].nonzero().squeeze(1)[:quota].tolist():
            span = slice(start, end + 1)
            start = end + 1
            truth, said = table["success"][span, env], verdict[span, env]
            once.append(bool(truth.any()))
            at_end.append(bool(truth[-1]))
            env_return.append(float(table["env_reward"][span, env].sum()))
            learned.append(float(said[-1] if last_only else said.any()) if client is not None else math.nan)
            score.append(float(prob[end, env] if last_only else prob[span, env].max()))
            false_positives += int((said & ~truth).sum())
            num_steps += len(truth)
    arrays = [np.array(values) for values in (once, at_end, learned, score, env_return)]
    return Evaluation(*arrays, false_positives, num_steps, last_only)


@torch.no_grad()
def record_traces(envs, agent, client: RewardClient | None, num_episodes: int, seed: int) -> list[Trace]:
    """Episodes of the deterministic policy with every frame rendered and scored, to be looked at."""
    obs = envs.reset(seed)
    num_shown = min(num_episodes, envs.num_envs)  # of hundreds of envs the pictures would not fit in memory
    frames = [envs.render(torch.arange(num_shown, device=envs.device))]
    render = torch.full((envs.num_envs,), int(Render.NONE), dtype=torch.uint8)
    render[:num_shown] = int(Render.ALWAYS)
    truth, done = [torch.zeros(envs.num_envs, dtype=torch.bool)], []
    while not done or not torch.stack(done)[:, :num_shown].any(0).all():
        step = envs.step(agent.act(obs, deterministic=True).clamp(-1, 1).to(envs.device), render)
        obs = step.obs
        frames.append(step.frames)
        truth.append(step.success.cpu())
        done.append(step.done.cpu())
    ends = torch.stack(done).int().argmax(0) + 2  # frames in the first episode of each env
    traces = []
    for env in range(num_shown):
        mine = {view: torch.stack([f[view][env] for f in frames[: ends[env]]]) for view in frames[0]}
        prob = np.full(len(mine["main_images"]), np.nan, np.float32)
        if client is not None:
            prob = client.score({view: mine[view] for view in client.views}).success_prob.numpy()
        succeeded = torch.stack(truth)[: ends[env], env].numpy()
        traces.append(Trace(mine["main_images"].cpu().numpy(), prob, succeeded, ""))
    if num_shown < num_episodes:
        traces += record_traces(envs, agent, client, num_episodes - num_shown, seed + 1)
    for number, trace in enumerate(traces):
        trace.title = f"episode {number}"
    return traces
