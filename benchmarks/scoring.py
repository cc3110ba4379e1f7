"""Scoring frames with a ResNet-18 reward model against the plain torchvision forward pass in fp32.

    python benchmarks/scoring.py [--quick] [--threads 2]

Both sides get the same uint8 128x128 frames and return probabilities on the CPU: to float, resize (nothing to
do at this size), normalise, forward, sigmoid. One process, the sides in turn, medians of five after one run
of each that warms up. The network learns for a few steps first: a random one's probabilities say little.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel

SIZE = 128
TARGETS = {1: 1.4, 8: 2.0, 64: 2.0}  # batch size -> how many times as fast
LARGEST_ERROR = 0.01


def make_frames(count: int) -> tuple[Tensor, Tensor]:
    """Noise with a square between red and green: (count, H, W, 3) uint8; whether it is greener: (count,)."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 60, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    green = torch.rand(count, generator=generator)
    color = torch.stack([200 * (1 - green), 200 * green, torch.zeros(count)], dim=-1).to(torch.uint8)
    frames[:, 40:80, 40:80] = color[:, None, None]
    return frames, (green > 0.5).float()


def train_briefly(model: ResNetRewardModel, num_steps: int) -> None:
    frames, labels = make_frames(64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for step in range(num_steps):
        batch = slice(16 * step % 64, 16 * step % 64 + 16)
        F.binary_cross_entropy_with_logits(model(frames[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # batch norms average over some 20 batches: let them catch up with the weights
        for _ in range(20):
            model(frames[torch.randperm(64)[:16]])
    model.eval()


def plain_score(model: ResNetRewardModel) -> Callable[[Tensor], Tensor]:
    """What one writes with torchvision alone, on the same weights."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    @torch.inference_mode()
    def score(frames: Tensor) -> Tensor:
        images = frames.permute(0, 3, 1, 2).contiguous().float() / 255
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return model.backbone((images - mean) / std).squeeze(-1).sigmoid()

    return score


def seconds(score: Callable[[Tensor], Tensor], frames: Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        score(frames)
    return (time.perf_counter() - start) / repeats


def rows(quick: bool, num_threads: int = 1) -> list[dict]:
    """Rows for benchmarks/run.py: plain time over ours for each batch size, and the largest difference."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    model = ResNetRewardModel(ResNetRewardConfig(arch="resnet18", hidden_dim=256, image_size=[3, SIZE, SIZE]))
    train_briefly(model, num_steps=8 if quick else 24)
    plain = plain_score(model)
    out = []
    for batch_size, target in TARGETS.items():
        frames, _ = make_frames(batch_size)
        repeats = max(1, (16 if quick else 64) // batch_size)
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(6):
            times["plain"].append(seconds(plain, frames, repeats))
            times["ours"].append(
                seconds(lambda frames: model.score({"main_images": frames}), frames, repeats)
            )
        plain_s, ours_s = (statistics.median(times[side][1:]) for side in ("plain", "ours"))
        fastest = min(times["plain"][1:]) / min(times["ours"][1:])
        out.append(
            {
                "name": f"ResNet-18 scoring, batch {batch_size}, against plain torchvision fp32",
                "ratio": plain_s / ours_s,
                "target": target,
                "unit": "x, at least",
                "detail": f"{fastest:.2f} between the fastest runs; bf16: {model.uses_bf16}",
            }
        )
    frames, _ = make_frames(200)
    expected = plain(frames)
    errors = (model.score({"main_images": frames}) - expected).abs()
    num_between = int(((expected > 0.05) & (expected < 0.95)).sum())
    torch.set_num_threads(threads_before)
    out.append(
        {
            "name": "ResNet-18 scoring, largest difference of a probability",
            "ratio": errors.max().item(),
            "target": LARGEST_ERROR,
            "unit": "at most",
            "detail": f"200 frames, {num_between} of them scored between 0.05 and 0.95",
        }
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of ResNetRewardModel.score.")
    parser.add_argument("--quick", action="store_true", help="less training, fewer repeats")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    args = parser.parse_args()
    for row in rows(args.quick, args.threads):
        reached = row["ratio"] >= row["target"] if "least" in row["unit"] else row["ratio"] <= row["target"]
        verdict = "ok" if reached else "FALLS SHORT"
        print(
            f"{row['name']}: {row['ratio']:.3f} ({row['unit']} {row['target']:g}) {verdict}; {row['detail']}"
        )


if __name__ == "__main__":
    main()
