"""How good is the policy really, and how good does the reward model think it is?

Both are measured on the same episodes. The truth is reported; a checkpoint is chosen by what was learned
from: the learned verdict, for on a robot there is nothing else to choose by, or an env reward that is shaped.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.audit import frame_rates
from common.envs import Render
from common.judging import distance_of, hear, judged_inside, look_back, make_audit, make_watch
from common.prompts import likeliest
from common.reward_client import RewardClient
from common.trend import LABELS, POSITIVE
from common.video import Trace


class Mistake(NamedTuple):
    """A frame that was called a success and is none."""

    env: int
    episode: int  # of that env, in this evaluation
    step: int  # of that episode, from 1: the frame after so many steps


@dataclass
class Evaluation:
    """Per episode, all (E,). Where no reward model was asked, what it would have said is nan: `learned` and
    `score` of frames, `model_return` of windows."""

    once: np.ndarray  # bool: true success at some step
    at_end: np.ndarray  # bool: true success at the last step
    learned: np.ndarray  # float 0/1: the reward model's verdict, of the last frame or of any frame
    score: np.ndarray  # float: the success_prob behind it, of the last frame or the highest
    env_return: np.ndarray  # float: sum of env_reward
    model_return: np.ndarray  # float: sum of what the reward model paid for windows, bonus left out
    progress: np.ndarray  # float: metres closer to success, last step against first; nan without a rule
    # of the M frames that were judged (none: nobody judged, or windows): success_prob, verdict, truth, and a
    # number for each episode
    frames: tuple[Tensor, Tensor, Tensor, Tensor] | None
    first_mistake: Mistake | None  # of the episodes called a success that are none, the earliest such frame
    num_steps: int
    last_frame_only: bool  # reward_mode terminal
    windows: dict[str, float]  # of windows: how their labels compare with the true ones
    shaped: bool = False  # the model's scores only shape the env reward

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
            learned = self.learned > 0
            out["eval/learned_success"] = float(learned.mean())
            out["eval/score"] = float(self.score.mean())
            out["eval/hack_gap"] = 100 * (float(learned.mean()) - float(truth.mean()))
            out["eval/fooled"] = float((learned & ~truth).mean())
            out["eval/missed"] = float((truth & ~learned).mean())
            out["eval/false_positives_per_1000_steps"] = 1000 * self.false_positives / self.num_steps
            success_prob, success, frame_truth, episode = self.frames
            out |= frame_rates("eval", success, success_prob, frame_truth, episode)
        if not np.isnan(self.model_return).any():
            out["eval/model_return"] = float(self.model_return.mean())
            if self.model_return.std() > 0 and self.progress.std() > 0:  # false for nan
                out["eval/progress_corr"] = float(np.corrcoef(self.model_return, self.progress)[0, 1])
        return out | self.windows

    @property
    def false_positives(self) -> int:
        """Frames judged a success that were none."""
        _, success, truth, _ = self.frames
        return int((success & ~truth).sum())

    @property
    def merit(self) -> tuple[float, float]:
        """What a checkpoint is chosen by: learned success, then the mean score; of windows, what they paid;
        never the truth. Without a reward model, or one that only shapes: the return of the env reward."""
        if self.shaped:
            return float(self.env_return.mean()), 0.0
        if not np.isnan(self.model_return).any():
            return float(self.model_return.mean()), 0.0
        if np.isnan(self.learned).any():
            return float(self.env_return.mean()), 0.0
        return float(self.learned.mean()), float(self.score.mean())


@torch.no_grad()
def evaluate(envs, agent, client: RewardClient | None, num_episodes: int, seed: int) -> Evaluation:
    """Run the deterministic policy for `num_episodes`, as many in each env (rounded up), from `seed` on.

    A fixed number per env: counting the first ones that end would favour short episodes. Of envs in which the
    reward model judges already, its verdicts there count, and the client is not asked.
    """
    inside = judged_inside(envs.spec)
    client = None if inside else client
    if client is not None:
        client.check_idle()
    quota = math.ceil(num_episodes / envs.num_envs)
    watch = make_watch(client.cfg, client, envs.num_envs) if client is not None else None
    obs = envs.reset(seed)
    told = ("success_prob", "learned_success") if inside else ()
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("success", "done", "env_reward", "distance", *told)
    }
    looks = []
    ended = torch.zeros(envs.num_envs, dtype=torch.long)
    while int(ended.min()) < quota:
        render = watch.render() if watch is not None else Render.NONE
        step = envs.step(agent.act(obs, deterministic=True).clamp(-1, 1).to(envs.device), render)
        obs = step.obs
        distance = distance_of(envs.spec, step.next_obs)
        if watch is not None:
            look = watch.look(step.frames, step.frame_ids, step.success, step.done, distance)
            client.submit(look.data, len(rows["done"]) * watch.num_slots + look.slots)
            look.data = {}
            looks.append(look)
        for name in ("success", "done", "env_reward"):
            rows[name].append(getattr(step, name).cpu())
        for name in told:
            rows[name].append(step.info[name].cpu())
        rows["distance"].append(
            torch.full((envs.num_envs,), torch.nan) if distance is None else distance.cpu()
        )
        ended += rows["done"][-1]
    table = {name: torch.stack(values) for name, values in rows.items()}  # (T, N)
    if inside:  # a late verdict is none
        said = {"prob": table["success_prob"].nan_to_num(0.0), "verdict": table["learned_success"]}
        return _by_episode(table, said, quota, False, {})
    if client is None:
        return _by_episode(table, {}, quota, False, {})
    audit, done = make_audit(client.cfg), table["done"]
    counted = done.cumsum(0) - done.long() < quota  # not what fast envs do while the others go on
    heard = hear(client, looks, done, client.decision(envs.num_envs), audit, counted=counted)
    of_windows = client.cfg.of_windows
    said = {"paid": heard.paid} if of_windows else {"prob": heard.score, "verdict": heard.learned}
    last_only = client.cfg.reward_mode == "terminal"
    result = _by_episode(table, said, quota, last_only, audit.metrics("eval") if of_windows else {})
    result.shaped = client.cfg.shaping is not None
    return result


def _by_episode(
    table: dict[str, Tensor], said: dict[str, Tensor], quota: int, last_only: bool, windows: dict
) -> Evaluation:
    """table: name -> (T, N) of the envs; said, of the reward model: verdict and prob (T, N) of frames (of
    last frames, with last_only), or paid (T, B * N) of windows, or nothing."""
    num_envs = table["done"].shape[1]
    frames, of_windows = "verdict" in said, "paid" in said
    columns = ("once", "at_end", "learned", "score", "env_return", "model_return", "progress")
    episodes: dict[str, list[float]] = {name: [] for name in columns}
    judged: list[tuple[Tensor, ...]] = []
    mistakes: list[tuple[int, Mistake]] = []  # the first one of each env, after when
    num_steps = 0
    for env in range(num_envs):
        start = 0
        for number, end in enumerate(table["done"][:, env].nonzero().squeeze(1)[:quota].tolist()):
            span = slice(start, end + 1)
            truth, distance = table["success"][span, env], table["distance"][span, env]
            row = {"once": bool(truth.any()), "at_end": bool(truth[-1])}
            row |= {"learned": math.nan, "score": math.nan, "model_return": math.nan}
            row["env_return"] = float(table["env_reward"][span, env].sum())
            row["progress"] = float(distance[0] - distance[-1])
            if frames:
                verdict, prob = said["verdict"][span, env], said["prob"][span, env]
                row["learned"] = float(verdict[-1] if last_only else verdict.any())
                row["score"] = float(prob[-1] if last_only else prob.max())
                seen = ~prob.isnan()
                this = torch.full((int(seen.sum()),), len(judged))
                judged.append((prob[seen], verdict[seen], truth[seen], this))
                wrong = (verdict & ~truth).nonzero().squeeze(1).tolist()
                fooled = row["learned"] > (row["at_end"] if last_only else row["once"])
                if fooled and (not mistakes or mistakes[-1][1].env != env):
                    mistakes.append((start + wrong[0], Mistake(env, number, wrong[0] + 1)))
            if of_windows:
                row["model_return"] = float(said["paid"][span].view(len(truth), -1, num_envs)[..., env].sum())
            num_steps += len(truth)
            start = end + 1
            for name, value in row.items():
                episodes[name].append(value)
    arrays = {name: np.array(values) for name, values in episodes.items()}
    return Evaluation(
        **arrays,
        frames=tuple(torch.cat(column) for column in zip(*judged, strict=True)) if judged else None,
        first_mistake=min(mistakes)[1] if mistakes else None,
        num_steps=num_steps,
        last_frame_only=last_only,
        windows=windows,
    )


@torch.no_grad()
def replay(envs, agent, client: RewardClient, seed: int, env: int, episode: int) -> Trace:
    """One episode of the evaluation from `seed` once more, every frame of it rendered and scored.

    Policy and simulation are deterministic, so it is the same episode on a CPU; a GPU's sums may differ in
    the last digit, and so may its episodes. Episodes before it are stepped through unseen.
    """
    obs = envs.reset(seed)
    here = torch.tensor([env], device=envs.device)
    number, frames, truth, render = 0, [], [False], torch.zeros(envs.num_envs, dtype=torch.uint8)
    while True:
        if number == episode and not frames:
            frames.append(envs.render(here))
            render[env] = int(Render.ALWAYS)
        step = envs.step(agent.act(obs, deterministic=True).clamp(-1, 1).to(envs.device), render)
        obs, done = step.obs, bool(step.done[env])
        if number == episode:
            frames.append(step.frames)
            truth.append(bool(step.success[env]))
            if done:
                break
        number += done
    shown = {view: torch.cat([f[view] for f in frames]).cpu() for view in frames[0]}
    pictures = {view: images.numpy() for view, images in shown.items()}
    unscored = np.full(len(truth), np.nan, np.float32)
    extra = pictures.get("extra_view_images")
    trace = Trace(pictures["main_images"], unscored, np.array(truth), "", extra_frames=extra)
    judge_trace(trace, client, shown, None)
    return trace


@torch.no_grad()
def record_traces(envs, agent, client: RewardClient | None, num_episodes: int, seed: int) -> list[Trace]:
    """Episodes of the deterministic policy with every frame rendered and scored, to be looked at."""
    inside = judged_inside(envs.spec)
    client = None if inside else client
    obs = envs.reset(seed)
    num_shown = min(num_episodes, envs.num_envs)  # of hundreds of envs the pictures would not fit in memory
    frames = [envs.render(torch.arange(num_shown, device=envs.device))]
    render = torch.full((envs.num_envs,), int(Render.NONE), dtype=torch.uint8)
    render[:num_shown] = int(Render.ALWAYS)
    truth, done, distance = [torch.zeros(envs.num_envs, dtype=torch.bool)], [], []
    prob = [torch.full((envs.num_envs,), torch.nan)]
    said = [torch.zeros(envs.num_envs, dtype=torch.bool)]
    while not done or not torch.stack(done)[:, :num_shown].any(0).all():
        step = envs.step(agent.act(obs, deterministic=True).clamp(-1, 1).to(envs.device), render)
        obs = step.obs
        frames.append(step.frames)
        truth.append(step.success.cpu())
        done.append(step.done.cpu())
        distance.append(distance_of(envs.spec, step.next_obs))
        prob.append(step.info["success_prob"].cpu() if inside else prob[0])
        said.append(step.info["learned_success"].cpu() if inside else said[0])
    ends = torch.stack(done).int().argmax(0) + 2  # frames in the first episode of each env
    traces = []
    for env in range(num_shown):
        mine = {view: torch.stack([f[view][env] for f in frames[: ends[env]]]) for view in frames[0]}
        succeeded = torch.stack(truth)[: ends[env], env]
        score = torch.stack(prob)[: ends[env], env].numpy()
        pictures = {view: images.cpu().numpy() for view, images in mine.items()}
        trace = Trace(
            pictures["main_images"],
            score,
            succeeded.numpy(),
            "",
            extra_frames=pictures.get("extra_view_images"),
        )
        if inside:
            trace.said = torch.stack(said)[: ends[env], env].numpy()
        if client is not None:
            metres = None if distance[0] is None else torch.stack(distance)[: ends[env] - 1, env].cpu()
            judge_trace(trace, client, mine, metres)
        traces.append(trace)
    if num_shown < num_episodes:
        traces += record_traces(envs, agent, client, num_episodes - num_shown, seed + 1)
    for number, trace in enumerate(traces):
        trace.title = f"episode {number}"
    return traces


def judge_trace(trace: Trace, client: RewardClient, frames: dict, distance: Tensor | None) -> None:
    """Let the reward model judge an episode: sets the trace's score and verdict, of windows its labels and
    truth too.

    frames: view -> (T, H, W, 3) uint8; distance: (T-1,) metres to success after each step, None where the
    task has no rule. A window counts at the step it ends with; of several buffers the first one's do.
    """
    if not client.cfg.of_windows:
        score = client.score({view: frames[view] for view in client.views}).success_prob
        first = torch.arange(len(score)) == 0  # the reset's frame, of which nothing is remembered
        trace.score = score.numpy()
        trace.said = client.decision(1)(score[:, None], first[:, None])[:, 0].numpy()
        return
    watch = make_watch(client.cfg, client, 1)
    after_reset = {view: frames[view][1:].cpu() for view in client.camera_views}
    success = torch.from_numpy(trace.truth[1:])
    truth = torch.full((len(success), watch.num_slots), -1)
    for t, look in enumerate(look_back(watch, after_reset, success, distance)):
        client.submit(look.data, t * watch.num_slots + look.slots)
        truth[t, look.slots] = look.truth
    label_prob = torch.full((truth.numel(), len(client.parser.labels)), torch.nan)
    for verdicts in client.receive(wait=True):
        label_prob[verdicts.keys] = verdicts.label_prob
    label_prob = label_prob[:: watch.num_slots].numpy()  # a row per step: the first buffer's
    mass = label_prob.sum(1).clip(min=1e-12)
    trace.question = "positive"
    trace.score[1:] = label_prob[:, POSITIVE] / mass
    # the likeliest label, as `pay` and the audit judge: with three of them 0.4 may be enough
    trace.said = np.append(False, likeliest(torch.from_numpy(label_prob)).numpy() == POSITIVE)
    trace.labels = tuple(client.parser.labels)
    trace.label_prob = np.concatenate([np.full_like(label_prob[:1], np.nan), label_prob])
    if (truth >= 0).any():
        trace.truth_of = "positive"
        label = np.append(-1, truth[:, 0].numpy())
        trace.truth, trace.known = label == POSITIVE, label >= 0
        trace.true_label = label if trace.labels == LABELS else None  # a parser may have labels of its own
