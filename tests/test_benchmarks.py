"""Parts of benchmarks that nothing else runs: the GPU's path on the CPU with a small shape, and tables."""

import copy
from pathlib import Path

import numpy as np
import torch

import collect
import preprocess_resnet
import rl_train
import train_resnet
from benchmarks import demo_trend, qwen_gpu, refresh
from benchmarks.run import is_met
from common import config
from common.files import save_json
from common.trend_card import trend_metrics

ROOT = Path(__file__).resolve().parents[1]


def test_the_trend_demos_table_is_the_readmes(tmp_path, monkeypatch, capsys):
    """Also where nothing was called positive and all episodes were paid the same: two numbers are unknown."""
    monkeypatch.setattr(demo_trend, "ROOT", tmp_path)
    names = ("normal", "reversed, labels flipped", "frozen (last frame)")
    card = trend_metrics(np.eye(3), np.arange(3)) | {"called_positive": 0.0, "called_negative": 0.0}
    told = {"num_windows": 4, "expected": "", "beaten": None, "macro_f1_interval": None}
    vlm = {
        "report_card": [{"control": name, **card, **told} for name in names],
        "val_metrics": card,
    }
    rl = {"true_success_once": 0.5, "true_success_at_end": 0.25, "model_return": 0.0, "num_episodes": 4}
    summaries = {"collect": {"env_steps": 8}, "vlm": vlm, "vlm_last_frame": vlm, "rl": {**rl, "env_steps": 9}}
    for stage, summary in summaries.items():
        (tmp_path / "demo" / stage).mkdir(parents=True)
        save_json(summary, tmp_path / "demo" / stage / "summary.json")
    row = demo_trend.numbers("demo", {"all": 61.2}, seed=3)
    demo_trend.print_report("demo", row)
    assert "true progress: -; of windows called positive false: -" in capsys.readouterr().out
    demo_trend.print_table([{**row, "controls": {"imitation": 0.125}}])
    header, _, line = capsys.readouterr().out.strip().splitlines()
    assert line == "| 3 | 1.000 | 1.000 | 1.000 | 0% | 0.50 / 0.25 | 0.12 | - | - | 1.000 | 61 |"
    readme = next(line for line in (ROOT / "README.md").read_text().splitlines() if "frozen, called" in line)
    assert header.startswith(readme)


def test_the_commands_of_the_refresh_benchmark_fit_their_configs():
    scripts = {"collect.py": collect, "train_resnet.py": train_resnet, "rl_train.py": rl_train}
    for script, *arguments in refresh.commands("logs/x", 2400):
        if script in scripts:
            kind = vars(scripts[script]).get("TrainConfig") or scripts[script].Config
            config.from_yaml(kind, ROOT / arguments[0], arguments[1:])
        else:
            assert preprocess_resnet.parse_args(arguments).output_dir == Path("logs/x/reward_data")


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
