"""How evenly a 10 Hz control loop goes while a reward model judges every frame.

    python benchmarks/live_loop.py [--quick]

`FrankaEnv` at an arm that costs nothing, on the clock, one 128x128 picture per step, judged by a ResNet-18 in
fp32 through `make_judge`: in a worker process, or inline, in the loop itself. The error of a period is its
distance from 100 ms. The loop waits for a verdict half a period at most; one that comes later is late.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.arms import ManiSkillArmConfig, RobotState  # noqa: E402
from common.cameras import RealCameraConfig  # noqa: E402
from common.franka import FRAME_SIZE, FrankaEnv  # noqa: E402
from common.franka_config import FrankaConfig, FrankaTaskConfig  # noqa: E402
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel  # noqa: E402
from common.reward_config import RewardConfig  # noqa: E402
from common.reward_link import make_judge  # noqa: E402
from common.robot_envs import Asker  # noqa: E402

HZ = 10.0
LARGEST_P99_MS = 10.0


class StillArm:
    """Is where it was told to be."""

    simulated = False

    def __init__(self, pose: np.ndarray):
        self.pose = pose

    def state(self) -> RobotState:
        three, seven = np.zeros(3), np.zeros(7)
        return RobotState(self.pose, np.zeros(6), three, three, seven, seven, 0.08)

    def move(self, pose: np.ndarray) -> None:
        self.pose = pose

    def gripper(self, open: bool) -> None: ...
    def stop(self) -> None: ...


class NoiseCamera:
    def __init__(self):
        self.rgb = np.random.default_rng(0).integers(0, 256, (FRAME_SIZE, FRAME_SIZE, 3), dtype=np.uint8)

    def read_latest(self, max_age_s: float) -> tuple[np.ndarray, float]:
        return self.rgb, time.monotonic()


def period_errors_ms(placement: str, model_path: str, num_steps: int) -> tuple[list[float], float]:
    """-> (ms off 100 of each period, share of late verdicts)."""
    target = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)
    task = FrankaTaskConfig(target_ee_pose=target, reset_move_s=0.1, step_hz=HZ, realtime=True)
    camera = {"main": RealCameraConfig(backend="maniskill", serial="main_images")}
    cfg = FrankaConfig(
        override_cfg=task, arm=ManiSkillArmConfig(), cameras=camera, max_episode_steps=num_steps + 1
    )
    env = FrankaEnv(cfg, StillArm(task.reset_pose()), {"main": NoiseCamera()})
    model = ResNetRewardConfig(model_path=model_path, arch="resnet18", precision="fp32", device="cpu")
    reward = RewardConfig(use_reward_model=True, reward_threshold=0.5, placement=placement, model=model)
    with make_judge(reward) as judge:
        ask = Asker(judge, cfg)
        obs, _ = env.reset(seed=0)
        ask(obs["frames"])  # warms up
        ends, late = [], 0
        for _ in range(num_steps):
            obs, *_ = env.step(np.zeros(7))
            ends.append(time.monotonic())
            late += ask(obs["frames"]) is None
    errors = [abs(1000 * (end - start) - 1000 / HZ) for start, end in itertools.pairwise(ends[5:])]
    return errors, late / num_steps


def rows(quick: bool) -> list[dict]:
    """The row for benchmarks/run.py."""
    torch.set_num_threads(1)
    num_steps = 40 if quick else 300
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/resnet18.pt"
        torch.save(ResNetRewardModel(ResNetRewardConfig(arch="resnet18")).state_dict(), path)
        p99, told = {}, []
        for placement in ("worker", "inline"):
            errors, late = period_errors_ms(placement, path, num_steps)
            p99[placement] = statistics.quantiles(errors, n=100)[-1]
            told.append(
                f"{placement}: median {statistics.median(errors):.2f} ms, p99 {p99[placement]:.2f} ms, "
                f"{late:.0%} late"
            )
    return [
        {
            "name": "10 Hz loop with ResNet-18 in a worker, 99th percentile of the period's error",
            "ratio": p99["worker"],
            "target": LARGEST_P99_MS,
            "unit": "ms, at most",
            "detail": "; ".join(told),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Evenness of the control loop.")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    for row in rows(parser.parse_args().quick):
        print(f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}); {row['detail']}")


if __name__ == "__main__":
    main()
