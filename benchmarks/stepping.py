"""What a learned reward and frames cost while envs step, and stepping itself, against the plain way.

    python benchmarks/stepping.py [--quick] [--only rl|per_step|frame|states]

PushCube-v1 on the CPU, `pd_ee_delta_pos`; random actions, except in `rl`. Both sides run in turn, after a
warm-up of each; a ratio is the median of five pairs. Each side does what its user would do:

rl        `rl_train.train_sac` as configs/demo_rl.yaml sets it, without prior data: env steps/s with the
          demo's network (ResNet-10, 64 px) judging the last frame of each episode, over those with env
          reward only.
per_step  `Rollout`, 2 env workers and a `RewardWorker` judging each frame (ResNet-18, 128 px), against one
          process that steps two envs, renders them, scores both frames by torchvision's forward in fp32 and
          waits. The same envs and low-poly pictures, and no learning, on both sides. The blocking loop's
          torch gets one thread or all cores, whichever is faster here.
frame     a state step with one 128x128 frame on demand, drawn as we draw by default (low-poly), against a
          step of ManiSkill's own `obs_mode="rgb"`: the same camera, the scene as the task comes. One process,
          one env.
states    2 env workers against gymnasium's `AsyncVectorEnv` over `CPUGymWrapper`: at the task's own 20 Hz and
          50 steps, and at the demo's 10 Hz and 12, where PhysX and resets weigh more, the same for both.
"""

import argparse
import contextlib
import functools
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rl_train  # noqa: E402
from benchmarks.scoring import plain_score  # noqa: E402
from common import config  # noqa: E402
from common.agents import build_agent  # noqa: E402
from common.env_workers import EnvPool  # noqa: E402
from common.envs import ManiSkillEnvs, Render  # noqa: E402
from common.experience import Rollout  # noqa: E402
from common.files import save_torch  # noqa: E402
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel  # noqa: E402
from common.reward_client import make_reward_client  # noqa: E402
from common.reward_config import RewardConfig  # noqa: E402
from common.scenes import EnvConfig  # noqa: E402

TASK, CONTROL_MODE = "PushCube-v1", "pd_ee_delta_pos"
VIEW = ("main_images",)

Side = Callable[[], float]  # does its work once, returns the seconds it took


def cpu_env(num_envs: int, control_freq: int | None = None, max_episode_steps: int = 50) -> EnvConfig:
    return EnvConfig(
        task=TASK,
        num_envs=num_envs,
        max_episode_steps=max_episode_steps,
        control_mode=CONTROL_MODE,
        control_freq=control_freq,
        sim_backend="cpu",
        render_backend="cpu",
    )


def random_actions(num_steps: int, num_envs: int) -> torch.Tensor:
    return torch.rand(num_steps, num_envs, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def fresh_weights(folder: Path, **settings) -> ResNetRewardConfig:
    """A reward model with random weights on disk, as the section that loads it."""
    path = folder / "weights.pt"
    save_torch(ResNetRewardModel(ResNetRewardConfig(**settings)).state_dict(), path)
    return ResNetRewardConfig(model_path=str(path), device="cpu", **settings)


def compare(name: str, target: float, ours: Side, theirs: Side, quick: bool, detail: str) -> dict:
    """A row for benchmarks/run.py: how many times as fast as theirs ours is."""
    torch.set_num_threads(1)  # of this process, for both sides
    ours(), theirs()
    ratios = []
    for _ in range(1 if quick else 5):
        ours_s = ours()
        ratios.append(theirs() / ours_s)
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "target": target,
        "unit": "x, at least",
        "detail": f"pairs from {min(ratios):.2f} to {max(ratios):.2f}; {detail}",
    }


# ----------------------------------------------------------------------------------------------------
# A learned reward
# ----------------------------------------------------------------------------------------------------


class Stopwatch:
    """Stands in for `common.run.Run`: counts env steps and times them; logs, evaluates and saves nothing."""

    def __init__(self, max_steps: int, envs):
        self.step, self.max_steps, self.eval_envs, self.buffer = 0, max_steps, envs, None
        self.first = self.last = 0.0

    @property
    def running(self) -> bool:
        return self.step < self.max_steps

    def evaluates_after(self, env_steps: int) -> bool:
        return self.step + env_steps >= self.max_steps

    def advance(
        self, env_steps: int, losses: dict, rollout_metrics: Callable, may_evaluate: bool = True
    ) -> bool:
        self.last = time.perf_counter()
        if self.step == 0:
            self.first = self.last  # what comes before is making the buffer and the first reset
        self.step += env_steps
        return False


def rl_rows(quick: bool) -> list[dict]:
    env_reward_only = ["reward.use_reward_model=false", "reward.env_reward_weight=1"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = fresh_weights(folder, arch="resnet10", hidden_dim=64, image_size=[3, 64, 64])
        overrides = [
            "runner.device=cpu",
            "algorithm.prior_data=null",
            "algorithm.offline_updates=0",
            "actor.model.norm_obs=false",
            "reward.reward_threshold=0.5",
            *(f"env.train.{backend}=cpu" for backend in ("sim_backend", "render_backend")),
            *(f"reward.model.{key}={value}" for key, value in vars(model).items() if value is not None),
        ]
        pool = stack.enter_context(EnvPool(num_workers=2))
        sides = []
        for extra in ([], env_reward_only):
            cfg = config.from_yaml(rl_train.Config, ROOT / "configs" / "demo_rl.yaml", overrides + extra)
            client = None
            if cfg.reward.use_reward_model:
                client = stack.enter_context(make_reward_client(cfg.reward))
            envs = pool.make(cfg.env.train, client.views if client is not None else ())
            parts = (cfg.algorithm, cfg.actor.model, cfg.actor.optim, envs.spec, torch.device("cpu"))
            agent = build_agent(*parts)

            def side(cfg=cfg, agent=agent, envs=envs, client=client) -> float:
                run = Stopwatch(120 if quick else 480, envs)
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    rl_train.train_sac(cfg, run, agent, envs, client)
                return run.last - run.first

            sides.append(side)
        name = "RL env steps/s, terminal reward by ResNet-10, against env reward only"
        return [compare(name, 0.95, *sides, quick, "2 envs, SAC, demo_rl.yaml without prior data")]


def per_step_rows(quick: bool) -> list[dict]:
    num_steps, num_envs = (40, 2) if quick else (150, 2)
    actions = random_actions(num_steps, num_envs)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model_cfg = fresh_weights(folder, arch="resnet18", image_size=[3, 128, 128])
        reward = RewardConfig(
            use_reward_model=True,
            reward_mode="per_step",
            reward_threshold=0.5,
            placement="worker",
            model=model_cfg,
        )
        pool = stack.enter_context(EnvPool(num_workers=2))
        client = stack.enter_context(make_reward_client(reward))
        rollout = Rollout(pool.make(cpu_env(num_envs), VIEW), client, reward, "none")
        rollout.reset(0)
        blocking_envs = [ManiSkillEnvs(cpu_env(num_envs), 1, i, VIEW) for i in range(num_envs)]
        for envs in blocking_envs:
            envs.reset(0)
            stack.callback(envs.close)
        model = ResNetRewardModel(model_cfg)
        model.load_weights(model_cfg.model_path)
        score = plain_score(model.eval())

        def ours() -> float:
            start, num_paid = time.perf_counter(), 0
            for action in actions:
                rollout.start(action)
                num_paid += sum(len(paid["reward"]) for paid in rollout.finish())
            num_paid += sum(len(paid["reward"]) for paid in rollout.drain())
            seconds = time.perf_counter() - start
            assert num_paid == num_steps * num_envs
            return seconds

        def blocking(num_threads: int) -> float:
            torch.set_num_threads(num_threads)
            start = time.perf_counter()
            for action in actions:
                steps = [envs.step(action[i : i + 1], Render.ALWAYS) for i, envs in enumerate(blocking_envs)]
                success_prob = score(torch.cat([step.frames[VIEW[0]] for step in steps]))
                success_prob.where(success_prob >= 0.5, 0.0)
            seconds = time.perf_counter() - start
            torch.set_num_threads(1)
            return seconds

        blocking(1)
        num_threads = min((1, len(os.sched_getaffinity(0))), key=blocking)
        name = "env steps/s, per_step reward by ResNet-18, against a blocking loop"
        detail = f"2 envs, nothing learns; blocking loop with {num_threads} torch thread(s)"
        return [compare(name, 1.5, ours, lambda: blocking(num_threads), quick, detail)]


# ----------------------------------------------------------------------------------------------------
# Envs alone
# ----------------------------------------------------------------------------------------------------


def make_gym_env(obs_mode: str, control_freq: int, max_episode_steps: int):
    """ManiSkill's env as its users make it, behind gymnasium's interface, one torch thread."""
    import gymnasium
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    torch.set_num_threads(1)
    env = gymnasium.make(
        TASK,
        obs_mode=obs_mode,
        control_mode=CONTROL_MODE,
        reward_mode="normalized_dense",
        sim_backend="physx_cpu",
        render_backend="cpu",
        sim_config={"control_freq": control_freq},
        max_episode_steps=max_episode_steps,
    )
    return CPUGymWrapper(env, ignore_terminations=True)


def frame_rows(quick: bool) -> list[dict]:
    num_steps = 25 if quick else 100
    actions = random_actions(num_steps, 1)
    envs = ManiSkillEnvs(cpu_env(1), 1, 0, VIEW)
    rgb_env = make_gym_env("rgb", control_freq=20, max_episode_steps=num_steps)
    shape = rgb_env.observation_space["sensor_data"]["base_camera"]["rgb"].shape
    assert envs.spec.frame_shape["main_images"] == shape == (128, 128, 3)

    def ours() -> float:
        envs.reset(0)
        start = time.perf_counter()
        for action in actions:
            envs.step(action, Render.ALWAYS)
        return time.perf_counter() - start

    def rgb() -> float:
        rgb_env.reset(seed=0)
        start = time.perf_counter()
        for action in actions[:, 0].numpy():
            rgb_env.step(action)
        return time.perf_counter() - start

    name = "a step with a 128x128 frame on demand, against obs_mode rgb"
    row = compare(name, 5.0, ours, rgb, quick, "1 env, 1 camera; ours with a state, low-poly")
    envs.close()
    rgb_env.close()
    return [row]


def states_rows(quick: bool) -> list[dict]:
    return [_states_row(quick, 20, 50), _states_row(quick, 10, 12)]


def _states_row(quick: bool, control_freq: int, max_episode_steps: int) -> dict:
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode

    num_steps, num_envs = (100, 2) if quick else (400, 2)
    actions = random_actions(num_steps, num_envs)
    make = functools.partial(make_gym_env, "state", control_freq, max_episode_steps)
    with ExitStack() as stack:
        pool = stack.enter_context(EnvPool(num_workers=2))
        envs = pool.make(cpu_env(num_envs, control_freq, max_episode_steps), ())
        # like ours, a finished env is reset within the step; spawned because Vulkan does not survive a fork
        vector_env = AsyncVectorEnv([make] * 2, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
        stack.callback(vector_env.close)
        envs.reset(0)
        vector_env.reset(seed=0)

        def ours() -> float:
            start = time.perf_counter()
            for action in actions:
                envs.step(action)
            return time.perf_counter() - start

        def gymnasium_s() -> float:
            start = time.perf_counter()
            for action in actions.numpy():
                vector_env.step(action)
            return time.perf_counter() - start

        name = f"state steps/s at {control_freq} Hz, 2 workers, against gymnasium's AsyncVectorEnv"
        return compare(name, 1.3, ours, gymnasium_s, quick, f"episodes of {max_episode_steps} steps")


BENCHMARKS = {"rl": rl_rows, "per_step": per_step_rows, "frame": frame_rows, "states": states_rows}


def rows(quick: bool) -> list[dict]:
    """Rows for benchmarks/run.py."""
    return [row for benchmark in BENCHMARKS.values() for row in benchmark(quick)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of stepping, frames and rewards.")
    parser.add_argument("--quick", action="store_true", help="shorter runs, one pair")
    parser.add_argument("--only", choices=BENCHMARKS)
    args = parser.parse_args()
    for row in BENCHMARKS[args.only](args.quick) if args.only else rows(args.quick):
        verdict = "ok" if row["ratio"] >= row["target"] else "FALLS SHORT"
        print(
            f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}) {verdict}; {row['detail']}"
        )


if __name__ == "__main__":
    main()
