"""RL on the trend of windows against a loop that lets the model write its answer and waits for it.

    python benchmarks/trend_rl.py [--quick]

SAC as configs/demo_trend_rl.yaml sets it, without prior data, in turn on both sides: the same envs, pictures
and number of updates, and at every env step the window of each env is judged by the same tiny Qwen3-VL, once
an episode has five frames.

ours      `rl_train.train_sac`: 2 env workers, frames in one ring, a `RewardWorker` that is asked every
          `verdict_every` steps and scores those windows in one forward pass.
blocking  one process steps and renders the envs one after the other and keeps a list of frames for each;
          then transformers' processor and greedy `generate` judge the windows of this step, all in one batch,
          and then the learner updates. Its torch gets one thread or all cores, whichever is faster here.

The model has learned to answer by labels (benchmarks/qwen.py), so `generate` stops after two tokens. Updates
and physics cost the same on both sides, so there is a bound: the detail says what ours would reach if reward
model and pictures cost nothing.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rl_train  # noqa: E402
from benchmarks.qwen import NUM_FRAMES, Frames, load_cpu, plain_judge, train_tiny  # noqa: E402
from benchmarks.stepping import Side, Stopwatch, compare  # noqa: E402
from common import config  # noqa: E402
from common.agents import build_agent  # noqa: E402
from common.env_workers import EnvPool  # noqa: E402
from common.envs import ManiSkillEnvs, Render  # noqa: E402
from common.reward_client import RewardClient, make_reward_client  # noqa: E402
from common.reward_config import RewardConfig  # noqa: E402
from common.rewards import no_bootstrap  # noqa: E402
from common.sac import SAC  # noqa: E402

Judge = Callable[[list[Frames]], list[str]]


def rows(quick: bool) -> list[dict]:
    """The row for benchmarks/run.py."""
    torch.set_num_threads(1)
    num_steps = 160 if quick else 240
    with ExitStack() as stack:
        folder = train_tiny(Path(stack.enter_context(tempfile.TemporaryDirectory())), 50)
        cfg = load_config(folder)
        client = stack.enter_context(make_reward_client(cfg.reward))
        pool = stack.enter_context(EnvPool(num_workers=2))
        envs = pool.make(cfg.env.train, client.camera_views)
        client.set_task(envs.spec.task_description)
        lone_envs = [
            ManiSkillEnvs(cfg.env.train, 1, i, client.camera_views) for i in range(cfg.env.train.num_envs)
        ]
        for lone in lone_envs:
            stack.callback(lone.close)
        judge = plain_judge(folder, load_cpu(folder).inputs.text(envs.spec.task_description))
        parts = (cfg.algorithm, cfg.actor.model, cfg.actor.optim, envs.spec, torch.device("cpu"))
        agents = {side: build_agent(*parts) for side in ("ours", "blocking")}

        def ours(client: RewardClient | None = client, reward: RewardConfig = cfg.reward) -> float:
            run = Stopwatch(num_steps, envs)
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                rl_train.train_sac(replace(cfg, reward=reward), run, agents["ours"], envs, client)
            return run.last - run.first

        def blocking(num_threads: int, num_steps: int = num_steps) -> float:
            torch.set_num_threads(num_threads)
            run = Stopwatch(num_steps, lone_envs[0])
            with contextlib.redirect_stderr(io.StringIO()):
                train_blocking(cfg, run, agents["blocking"], lone_envs, judge)
            torch.set_num_threads(1)
            return run.last - run.first

        blocking(1, 40)  # warms up
        num_threads = min((1, len(os.sched_getaffinity(0))), key=lambda count: blocking(count, 40))
        free = ours(None, RewardConfig(env_reward_weight=1.0))
        bound = blocking(num_threads) / free
        sides: list[Side] = [ours, lambda: blocking(num_threads)]
        name = "RL env steps/s, history_buffer reward by a tiny Qwen3-VL, against a blocking loop"
        detail = f"2 envs, SAC, demo_trend_rl.yaml; blocking loop with {num_threads} torch thread(s); "
        detail += f"without any reward model and frames it would be {bound:.2f}"
        return [compare(name, 3.0, *sides, quick, detail)]


def load_config(folder: Path) -> rl_train.Config:
    """demo_trend_rl.yaml with the model in `folder` and no prior data, all on the CPU."""
    overrides = [
        "runner.device=cpu",
        "algorithm.prior_data=null",
        "algorithm.offline_updates=0",
        "algorithm.imitation_coef=0",
        "algorithm.learning_starts=100",  # later than our first verdicts, so that both update as often
        "actor.model.norm_obs=false",
        "env.train.sim_backend=cpu",
        "env.train.render_backend=cpu",
        "reward.placement=worker",
        "reward.model.device=cpu",
        f"reward.model.model_path={folder}",
    ]
    return config.from_yaml(rl_train.Config, ROOT / "configs" / "demo_trend_rl.yaml", overrides)


def train_blocking(
    cfg: rl_train.Config, run: Stopwatch, agent: SAC, lone_envs: list[ManiSkillEnvs], judge: Judge
) -> None:
    """`rl_train.train_sac`, each thing waiting for the one before it."""
    algorithm, params = cfg.algorithm, cfg.reward.model.reward_parser_params
    worth = {"positive": params["positive_reward"], "negative": params["negative_reward"], "unclear": 0.0}
    replay = rl_train.start_sac(cfg, run, agent, None)
    histories: list[list[Frames]] = [[] for _ in lone_envs]
    obs = torch.cat([envs.reset(0) for envs in lone_envs])
    while run.running:
        action = agent.act(obs)
        if run.step < algorithm.learning_starts:
            action = torch.rand_like(action) * 2 - 1
        steps = [envs.step(action[i : i + 1], Render.ALWAYS) for i, envs in enumerate(lone_envs)]
        reward = torch.zeros(len(steps))
        for step, history in zip(steps, histories, strict=True):
            history.append({view: images[0].clone() for view, images in step.frames.items()})
            del history[:-NUM_FRAMES]
        full = [i for i, history in enumerate(histories) if len(history) == NUM_FRAMES]
        if full:
            windows = [{view: [one[view] for one in histories[i]] for view in histories[i][0]} for i in full]
            reward[full] = torch.tensor([worth[answer] for answer in judge(windows)])
        for step, history in zip(steps, histories, strict=True):
            if step.done:
                history.clear()
        terminated, truncated, next_obs = (
            torch.cat([vars(step)[name] for step in steps])
            for name in ("terminated", "truncated", "next_obs")
        )
        terminal = no_bootstrap(terminated, truncated, algorithm.bootstrap_type)
        replay.online.add(obs=obs, next_obs=next_obs, action=action, reward=reward, terminal=terminal)
        obs = torch.cat([step.obs for step in steps])
        if run.step >= algorithm.learning_starts:
            for _ in range(int(algorithm.utd * len(steps))):
                agent.update(replay.sample(agent.generator))
        run.advance(len(steps), {}, dict)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of RL on the trend of windows.")
    parser.add_argument("--quick", action="store_true", help="shorter runs, one pair")
    for row in rows(parser.parse_args().quick):
        verdict = "ok" if row["ratio"] >= row["target"] else "FALLS SHORT"
        print(
            f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}) {verdict}; {row['detail']}"
        )


if __name__ == "__main__":
    main()
