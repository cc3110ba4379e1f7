"""A window's label by one forward pass of Qwen3-VL against letting it write the label by greedy `generate`.

    python benchmarks/qwen.py [--quick] [--threads 1]

The tiny Qwen3-VL of benchmarks/tiny_qwen.py in fp32, windows of 2 views x 5 frames of 64x64 (the demo's).
All sides have the same weights and windows and give one of the three labels for each:

one forward  `HistoryVLMRewardModel.score` with `inference_mode: label_logits`.
generate     the same with `inference_mode: generate`: our inputs and vision tower, the answer written out.
plain        what one writes with transformers alone: its processor, its vision tower, `generate`. Only told
             in the details.

The model learns for some seconds first, to name the colour of a square by a label: with random weights it
says no label at all, and `generate` would never end its turn. So it stops after two tokens, label and end of
turn, the least that it can take. One process, sides in turn, the median of five rounds after a warm-up.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tiny_qwen import make_tiny_qwen
from common.prompts import likeliest
from common.qwen_checkpoint import load_history_vlm
from common.qwen_inputs import VIDEO_FPS
from common.qwen_reward import HistoryVLMRewardConfig, HistoryVLMRewardModel
from common.scenes import TASK_DESCRIPTIONS
from common.trend import LABELS

TASK = TASK_DESCRIPTIONS["PushCube-v1"]
VIEWS, NUM_FRAMES, SIZE = ("main_images", "extra_view_images"), 5, 64
TARGETS = {1: 1.3, 8: 1.3, 64: 1.3}  # batch size -> how many times as fast
NUM_CHECKED = 192  # windows whose labels are compared

Frames = dict[str, Tensor]  # view -> (B, K, H, W, 3) uint8


def make_windows(count: int, seed: int = 0, size: int = SIZE) -> tuple[Frames, Tensor]:
    """Noise with a square of mixed colour; label (count,) int64: the strongest of red, green and blue."""
    generator = torch.Generator().manual_seed(seed)
    color = torch.rand(count, 3, generator=generator)
    frames = {}
    for view in VIEWS:
        shape = (count, NUM_FRAMES, size, size, 3)
        frames[view] = torch.randint(0, 60, shape, dtype=torch.uint8, generator=generator)
        square = slice(size // 4, 3 * size // 4)
        frames[view][:, :, square, square] += (180 * color).to(torch.uint8)[:, None, None, None]
    return frames, color.argmax(1)


def load_cpu(folder: Path) -> HistoryVLMRewardModel:
    cfg = HistoryVLMRewardConfig(model_path=str(folder), device="cpu")
    return load_history_vlm(cfg)


def train_tiny(folder: Path, num_steps: int) -> Path:
    """A tiny Qwen3-VL that answers by labels -> its folder, within `folder`."""
    torch.manual_seed(0)
    scorer = load_cpu(make_tiny_qwen(folder / "random"))
    model = scorer.model.train()
    frames, label = make_windows(8 * num_steps, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for start in range(0, len(label), 8):
        piece = slice(start, start + 8)
        answers = [LABELS[i] for i in label[piece]]
        inputs, target = scorer.inputs.lessons({v: f[piece] for v, f in frames.items()}, [TASK] * 8, answers)
        model(**inputs, labels=target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "trained")
    scorer.inputs.processor.save_pretrained(folder / "trained")
    return folder / "trained"


def plain_judge(folder: Path, text: str) -> Callable[[list[Frames]], list[str]]:
    """What one writes with transformers alone: windows, each view -> K frames (H, W, 3) uint8 -> answers.

    text: the question about one window, as the chat template gives it.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    metadata = {"fps": VIDEO_FPS, "frames_indices": list(range(NUM_FRAMES)), "total_num_frames": NUM_FRAMES}

    @torch.inference_mode()
    def judge(windows: list[Frames]) -> list[str]:
        videos = [torch.stack(list(window[view])).numpy() for window in windows for view in VIEWS]
        inputs = processor(
            text=[text] * len(windows),
            videos=videos,
            video_metadata=[metadata] * len(videos),
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            padding=True,
            return_tensors="pt",
        )
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        tokens = model.generate(**inputs, max_new_tokens=16, **greedy)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)

    return judge


def rows(quick: bool, num_threads: int = 1) -> list[dict]:
    """Rows for benchmarks/run.py: generate's time over ours for each batch size, and equal labels."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory() as name:
        folder = train_tiny(Path(name), num_steps=50 if quick else 100)
        scorer = load_cpu(folder)
        judge = plain_judge(folder, scorer.inputs.text(TASK))
        writer = HistoryVLMRewardModel(
            replace(scorer.cfg, inference_mode="generate"), scorer.model, scorer.inputs, scorer.parser, {}
        )

        def plain(frames: Frames, tasks: list[str]) -> Tensor:
            answers = judge([{view: frames[view][row] for view in VIEWS} for row in range(len(tasks))])
            return torch.tensor([scorer.parser.parse(answer) for answer in answers])

        sides = {
            "one forward": lambda frames, tasks: likeliest(scorer.score(frames, tasks)),
            "generate": lambda frames, tasks: likeliest(writer.score(frames, tasks)),
            "plain": plain,
        }
        out = [_speed_row(sides, batch_size, target, quick) for batch_size, target in TARGETS.items()]
        out.append(_equality_row(sides))
    torch.set_num_threads(threads_before)
    return out


def _speed_row(sides: dict[str, Callable], batch_size: int, target: float, quick: bool) -> dict:
    frames, _ = make_windows(batch_size, seed=2)
    repeats = max(1, (32 if quick else 128) // batch_size)
    rounds = []
    for _ in range(2 if quick else 6):
        took = {}
        for name, side in sides.items():
            start = time.perf_counter()
            for _ in range(repeats):
                side(frames, [TASK] * batch_size)
            took[name] = time.perf_counter() - start
        rounds.append({name: seconds / took["one forward"] for name, seconds in took.items()})
    ratios, plain = ([one[name] for one in rounds[1:]] for name in ("generate", "plain"))
    return {
        "name": f"trend labels by one forward, batch {batch_size}, against greedy generate",
        "ratio": statistics.median(ratios),
        "target": target,
        "unit": "x, at least",
        "detail": f"rounds from {min(ratios):.2f} to {max(ratios):.2f}; against transformers' own processor "
        f"and vision tower as well: {statistics.median(plain):.2f}",
    }


def _equality_row(sides: dict[str, Callable]) -> dict:
    """How many labels are the same in all sides; an answer that is no label differs."""
    frames, _ = make_windows(NUM_CHECKED, seed=3)
    labels = {name: side(frames, [TASK] * NUM_CHECKED) for name, side in sides.items()}
    ours = labels["one forward"]
    same = (ours == labels["generate"]) & (ours == labels["plain"])
    counts = ours.bincount(minlength=len(LABELS)).tolist()
    told = ", ".join(f"{count} {label}" for count, label in zip(counts, LABELS, strict=True))
    return {
        "name": "trend labels by one forward that equal generate's",
        "ratio": same.float().mean().item(),
        "target": 1.0,
        "unit": "at least",
        "detail": f"{NUM_CHECKED} windows ({told}), by our generate and by the plain one",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of a window's label.")
    parser.add_argument("--quick", action="store_true", help="less training, fewer repeats")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on all sides")
    args = parser.parse_args()
    for row in rows(args.quick, args.threads):
        verdict = "ok" if row["ratio"] >= row["target"] else "FALLS SHORT"
        print(
            f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}) {verdict}; {row['detail']}"
        )


if __name__ == "__main__":
    main()
