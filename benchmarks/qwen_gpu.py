"""Scoring windows on a GPU with a Qwen3-VL of the real 4B shape, weights random.

    python benchmarks/run.py --only qwen_gpu [--quick]

bf16, 2 views x 5 frames of 224x224, the standard prompt (in the tiny tokenizer's tokens, about as many as in
the real one's). Speed does not depend on what the weights have learned, with one exception: random ones never
end their turn, so `generate` is cut after 2 tokens, label and end of turn, the least it takes with trained
ones. Frames start and labels arrive on the CPU. Without a GPU there is nothing to measure: no rows.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.qwen import TASK, load_cpu, make_windows
from benchmarks.tiny_qwen import make_tiny_qwen
from common.fast_vision import use_fast_vision
from common.qwen_reward import HistoryVLMRewardModel

BATCH_SIZES = (1, 8, 32, 64)
TFLOP_PER_WINDOW = 4.0  # vision 0.8, language model 3.2 (435 tokens), counted from the shape below
SHAPE_4B = {  # of the released Qwen3-VL-4B-Instruct's config.json
    "text_config": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
    },
}  # fmt: skip


def random_scorer(device: str, shape: dict) -> HistoryVLMRewardModel:
    """One of that shape with the tiny one's processor and special tokens."""
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig

    with tempfile.TemporaryDirectory() as folder:
        tiny = load_cpu(make_tiny_qwen(Path(folder) / "tiny"))
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(tiny.model.config, name) for name in names}
    config = Qwen3VLConfig(tie_word_embeddings=True, **ids, **shape)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config.pad_token_id = tiny.inputs.tokenizer.pad_token_id
    use_fast_vision(model)
    cfg = replace(tiny.cfg, device=device, precision="bf16", max_new_tokens=2)
    return HistoryVLMRewardModel(cfg, model.eval(), tiny.inputs, tiny.parser, {})


def rows(quick: bool) -> list[dict]:
    """Rows for benchmarks/run.py: generate's time over one forward's."""
    if not torch.cuda.is_available():
        return []
    scorer = random_scorer("cuda", SHAPE_4B)
    return [speed_row(scorer, batch_size, 2 if quick else 6) for batch_size in BATCH_SIZES]


def speed_row(scorer: HistoryVLMRewardModel, batch_size: int, num_rounds: int, size: int = 224) -> dict:
    frames, _ = make_windows(batch_size, size=size)
    modes = ("label_logits", "generate")
    seconds, peak_gb = {mode: [] for mode in modes}, {}
    on_gpu = scorer.device.type == "cuda"
    for _ in range(num_rounds):
        for mode in modes:
            scorer.cfg = replace(scorer.cfg, inference_mode=mode)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            scorer.score(frames, [TASK] * batch_size)  # ends on the CPU, so it waits for the GPU
            seconds[mode].append(time.perf_counter() - start)
            peak_gb[mode] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    ours, theirs = (statistics.median(seconds[mode][1:]) for mode in modes)
    return {
        "name": f"trend labels by one forward, 4B shape on a GPU, batch {batch_size}, against generate",
        "ratio": theirs / ours,
        "target": 1.1,
        "unit": "x, at least",
        "detail": f"{batch_size / ours:.1f} and {batch_size / theirs:.1f} windows/s, "
        f"{TFLOP_PER_WINDOW * batch_size / ours:.0f} TFLOP/s by one forward; peak memory "
        f"{peak_gb['label_logits']:.1f} and {peak_gb['generate']:.1f} GB; "
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}",
    }
