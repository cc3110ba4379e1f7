"""The GPU benchmark's path, on the CPU with a small shape: without a GPU nothing else runs it."""

import copy

import torch

from benchmarks import qwen_gpu
from benchmarks.run import is_met


def test_the_gpu_rows_on_a_small_shape():
    shape = copy.deepcopy(qwen_gpu.SHAPE_4B)
    shape["text_config"] |= {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 3}
    shape["text_config"] |= {"vocab_size": 700, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape["vision_config"] |= {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64}
    shape["vision_config"] |= {"out_hidden_size": 256, "deepstack_visual_indexes": [0, 1, 2]}
    scorer = qwen_gpu.random_scorer("cpu", shape)
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.bfloat16}
    row = qwen_gpu.speed_row(scorer, batch_size=2, num_rounds=2, size=64)
    assert row["ratio"] > 0
    assert isinstance(is_met(row), bool)
    assert "batch 2" in row["name"] and "windows/s" in row["detail"]
