"""train_vlm.py as users run it, on windows in which a square moves, with a tiny Qwen3-VL made on the spot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_windows import write_windows

import train_vlm
from common import config, ranks
from common.qwen_checkpoint import load_base, load_history_vlm
from common.qwen_inputs import NO_LABEL
from common.qwen_reward import HistoryVLMRewardConfig
from common.qwen_sft import LANGUAGE_LINEARS, add_lora, answer_loss, weighted_mean
from common.ranks import Ranks
from common.runtime import UserError
from common.trend_card import score_windows
from common.windows import WindowSet

ROOT = Path(__file__).parents[1]
FILES = {"config.yaml", "metrics.jsonl", "checkpoint", "report", "summary.json"}
GUESSES = ["always positive", "time alone", "brightness alone", "last frame, 8x8, linear"]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_windows(tmp_path / "data")


def overrides(folder: Path, base: Path, *more: str) -> list[str]:
    return [
        f"data.train_data_paths={folder / 'data/train/segments.jsonl'}",
        f"data.val_data_paths={folder / 'data/eval/segments.jsonl'}",
        f"data.video_root={folder / 'data'}",
        f"actor.model.model_path={base}",
        "actor.model.device=cpu",
        "actor.optim.lr_warmup_steps=2",
        f"runner.logger.log_path={folder / 'run'}",
        "runner.logger.logger_backends=[]",
        "runner.max_steps=4",
        "runner.val_check_interval=2",
        *more,
    ]


def train(folder: Path, base: Path, *more: str) -> Path:
    """Train in this process by the guide's config; returns the run folder."""
    path = ROOT / "configs/qwen3vl_sft_qwentrend.yaml"
    cfg = config.from_yaml(train_vlm.TrainConfig, path, overrides(folder, base, *more))
    torch.manual_seed(0)
    with Ranks("cpu") as ranks:
        train_vlm.train(cfg, ranks)
    return Path(cfg.runner.logger.log_path)


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALVIEW_SFT_DATA_ROOT", str(tmp_path / "data"))


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


# --- The script


@pytest.mark.parametrize("is_lora", [True, False])
def test_a_run_and_its_checkpoint(data, tiny_qwen, tmp_path, is_lora):
    run = train(tmp_path, tiny_qwen, f"actor.model.is_lora={str(is_lora).lower()}", "runner.save_interval=4")
    assert {path.name for path in run.iterdir()} == FILES | {"checkpoints"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000004"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]

    summary = summary_of(run)
    names = [row["control"] for row in summary["report_card"]]
    assert names[0] == "normal" and "reversed, labels flipped" in names and len(names) == 14
    assert np.array(summary["confusion"]).sum() == 11  # of 12 windows one was played backwards
    best = next(line for line in lines if line["step"] == summary["best_step"])
    for name in ("macro_f1", "accuracy", "loss", "label_mass"):
        assert summary["val_metrics"][name] == pytest.approx(best[f"val/{name}"], abs=1e-5)

    paths = {"lora_path": str(run / "checkpoint"), "model_path": str(tiny_qwen)}
    if not is_lora:
        paths = {"model_path": str(run / "checkpoint")}
    model = load_history_vlm(HistoryVLMRewardConfig(**paths), torch.device("cpu"))
    assert (model.window, set(model.views)) == (5, {"main_images", "extra_view_images"})
    meta = model.meta
    assert (meta["template"], meta["delta_threshold"]) == ("{task}?", 0.05)
    assert meta["tasks"] == ["push the square to the right"]
    assert (meta["render"], meta["control"]) == ({"shader": "toy"}, {"freq": 10})
    assert (meta["step"], meta["window_size"]) == (summary["best_step"], 5)
    assert meta["class_counts"]["train"] == {"positive": 8, "negative": 8, "unclear": 8}
    digests = {
        role: [len(digest) for digest in files.values()] for role, files in meta["data_sha256"].items()
    }
    assert digests == {"train": [64], "val": [64]}


OWN = """
from common.prompts import Part


def second_camera(task, views, num_frames, template):
    return [Part("text", f"After {num_frames} frames, closer to '{task}'? "), Part("video", views[1])]
"""


def test_an_input_builder_of_ones_own_is_trained(data, tiny_qwen, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path / 'own.py'}:second_camera"
    run = train(tmp_path, tiny_qwen, f"actor.model.input_builder_name={name}", "runner.max_steps=1")
    assert json.loads((run / "checkpoint/reward.json").read_text())["input_builder_name"] == name
    card = {row["control"]: row for row in summary_of(run)["report_card"]}
    assert card["main view black"]["loss"] == card["normal"]["loss"] != card["extra view black"]["loss"]
    cfg = HistoryVLMRewardConfig(model_path=str(tiny_qwen), lora_path=str(run / "checkpoint"))
    with pytest.raises(UserError, match=r"input_builder_name: trained with .*own\.py:second_camera"):
        load_history_vlm(cfg, torch.device("cpu"))
    cfg.input_builder_name = name
    model = load_history_vlm(cfg, torch.device("cpu"))
    assert model.inputs.parts("push")[0].content == "After 5 frames, closer to 'push'? "


def test_whole_weights_are_validated_as_they_are_trained(data, tiny_qwen, tmp_path, monkeypatch):
    """fp32 weights that compute in bf16: scored without autocast they crashed under flash attention."""
    scored_in = []

    def score_and_note(scorer, *arguments):
        scored_in.append(torch.is_autocast_enabled("cpu"))
        return score_windows(scorer, *arguments)

    monkeypatch.setattr(train_vlm, "score_windows", score_and_note)
    changes = ("actor.model.is_lora=false", "actor.model.precision=bf16", "runner.max_steps=1")
    run = train(tmp_path, tiny_qwen, *changes)
    assert scored_in == [True, False]  # validation, and the checkpoint at the end: its weights are bf16
    assert json.loads((run / "checkpoint/reward.json").read_text())["precision"] == "bf16"


def run_script(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_vlm.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=300
    )


def test_the_command_line(data, tiny_qwen, tmp_path):
    more = overrides(tmp_path, tiny_qwen, "runner.max_steps=1", "runner.max_val_windows=3")
    result = run_script("configs/qwen3vl_sft_qwentrend.yaml", *more)
    assert result.returncode == 0, result.stderr
    assert "validation on 3 of 11 windows" in result.stdout
    assert "report card: 11 windows of 4 episodes, its validation windows" in result.stdout
    assert "frozen (last frame)" in result.stdout and "best checkpoint: step 1" in result.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_the_report_of_any_checkpoint_on_any_windows(data, tiny_qwen, tmp_path, capsys):
    run = train(tmp_path, tiny_qwen, "runner.max_steps=1")
    other = write_windows(tmp_path / "other", num_eval=18)
    told = [str(run / "checkpoint"), str(other), "--output-dir", str(tmp_path / "card"), "--max-windows", "6"]
    train_vlm.report([*told, "--model", "device=cpu"])
    out = capsys.readouterr().out
    assert "report card: 16 windows of 6 episodes, no file of its training or validation" in out
    card = json.loads((tmp_path / "card/report.json").read_text())
    assert np.array(card["confusion"]).sum() == 16 and len(card["controls"]) == 14
    assert card["scores"]["label_mass"]["value"] == pytest.approx(card["controls"][0]["label_mass"], abs=0.05)
    with pytest.raises(UserError, match="holds a report already"):
        train_vlm.report(told)
    # a Qwen3-VL as it comes, from a shell
    told = [
        "--report",
        str(tiny_qwen),
        str(data / "train/segments.jsonl"),
        "--output-dir",
        str(tmp_path / "raw"),
    ]
    result = run_script(*told, "--model", "device=cpu")
    assert result.returncode == 0, result.stderr
    assert "of 8 episodes, whether it has seen these windows is unknown" in result.stdout


def test_a_missing_environment_variable_is_one_line_and_an_exit_code():
    environment = {name: value for name, value in os.environ.items() if name != "DUALVIEW_SFT_DATA_ROOT"}
    command = [sys.executable, "train_vlm.py", "configs/qwen3vl_sft_qwentrend.yaml"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "needs the environment variable DUALVIEW_SFT_DATA_ROOT" in result.stderr


def test_ctrl_c_leaves_the_best_checkpoint_and_says_so(data, tiny_qwen, tmp_path, monkeypatch, capsys):
    steps = []

    def interrupt_at_step_3(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return answer_loss(*arguments)

    monkeypatch.setattr(train_vlm, "answer_loss", interrupt_at_step_3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny_qwen)
    assert "stopped by Ctrl-C; best checkpoint: step 2, validation macro-F1" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/checkpoint/reward.json").read_text())["step"] == 2
    assert not (tmp_path / "run/summary.json").exists()  # so the folder may be used again


def step_losses(folder: Path, base: Path, run: str, *more: str) -> list[float]:
    log_path = f"runner.logger.log_path={folder / run}"
    train(folder, base, "runner.max_steps=3", "runner.val_check_interval=1", log_path, *more)
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


FULL = ("actor.model.is_lora=false", "actor.optim.lr=1e-3")


def test_micro_batches_and_checkpointing_change_no_number(data, tiny_qwen, tmp_path):
    whole = step_losses(tmp_path, tiny_qwen, "whole", *FULL)
    assert whole[2] < whole[0] - 0.01  # it learns, so a wrong gradient would show
    halves = step_losses(tmp_path, tiny_qwen, "halves", *FULL, "actor.micro_batch_size=4")
    assert halves == pytest.approx(whole, rel=1e-4)  # the draws are balanced over time, so the same windows
    thrifty = step_losses(tmp_path, tiny_qwen, "thrifty", *FULL, "actor.model.gradient_checkpointing=true")
    assert thrifty == pytest.approx(whole, rel=1e-4)


def test_the_last_frame_control_sees_one_frame(data, tiny_qwen, tmp_path):
    run = train(tmp_path, tiny_qwen, "data.frames=last", "runner.max_steps=2")
    assert [row["control"] for row in summary_of(run)["report_card"]] == ["normal", *GUESSES]
    assert json.loads((run / "checkpoint/reward.json").read_text())["frames"] == "last"
    path = str(data / "eval/segments.jsonl")
    model = load_history_vlm(
        HistoryVLMRewardConfig(model_path=str(tiny_qwen), lora_path=str(run / "checkpoint")),
        torch.device("cpu"),
    )
    prob = score_windows(model, WindowSet(path, last_frame_only=True), np.arange(12))
    moving = score_windows(model, WindowSet(path), np.arange(12))
    assert (
        np.abs(prob - moving)[2::3].max() < 1e-6 < np.abs(prob - moving)[:2].max()
    )  # unclear ones stand still


FAST = (
    "actor.micro_batch_size=32",
    "actor.global_batch_size=32",
    "actor.optim.lr_warmup_steps=20",
    "runner.val_check_interval=20",
)


@pytest.mark.slow
def test_motion_is_learned_and_then_another_by_an_adapter(tiny_qwen, tmp_path):
    write_windows(tmp_path / "data", num_train=600, num_eval=120)
    run = train(tmp_path, tiny_qwen, *FAST, *FULL, "runner.max_steps=120")
    card = {row["control"]: row for row in summary_of(run)["report_card"]}
    assert card["normal"]["accuracy"] > 0.9
    assert card["reversed, labels flipped"]["accuracy"] > 0.8
    assert card["frozen (last frame)"]["accuracy"] < 0.8  # where the square ends tells something, not all

    write_windows(tmp_path / "data", num_train=600, num_eval=120, mirrored=True)
    log_path = f"runner.logger.log_path={tmp_path / 'mirrored'}"
    adapted = train(
        tmp_path, run / "checkpoint", *FAST, log_path, "actor.optim.lr=5e-3", "runner.max_steps=60"
    )
    card = {row["control"]: row for row in summary_of(adapted)["report_card"]}
    assert card["normal"]["accuracy"] > 0.9


@pytest.mark.slow
def test_two_processes_train_one_model(data, tiny_qwen, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = overrides(tmp_path, tiny_qwen, *FULL, "runner.max_steps=3", "runner.val_check_interval=1")
    result = subprocess.run(
        [
            *command,
            "train_vlm.py",
            "configs/qwen3vl_sft_qwentrend.yaml",
            *settings,
            "actor.micro_batch_size=4",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best checkpoint") == 1  # the second process is silent
    together = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train(
        tmp_path,
        tiny_qwen,
        *FULL,
        "runner.max_steps=3",
        "runner.val_check_interval=1",
        f"runner.logger.log_path={tmp_path / 'alone'}",
    )
    alone = [json.loads(line) for line in (tmp_path / "alone/metrics.jsonl").read_text().splitlines()]
    losses = [[line["val/loss"] for line in lines] for lines in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the same windows, so the same model


# --- What is refused, before anything is written


def write_unfit(folder: Path, base: Path, what: str) -> tuple[str, list[str]]:
    """Returns what the message must say, and overrides."""
    if what == "one label":
        write_windows(folder / "data", labels=("positive",))
        return "holds positive windows only", []
    if what == "other window size":
        return "data.video_nframes is 8, but the windows of .* have 5 frames", ["data.video_nframes=8"]
    if what == "no data":
        (folder / "data/eval/segments.jsonl").unlink()
        return "eval/segments.jsonl: no such file", []
    if what == "no model":
        return "model_path", ["actor.model.model_path=null"]
    if what == "no model folder":
        return "nowhere", ["actor.model.model_path=nowhere"]
    (base / "model.safetensors").rename(folder / "weights")
    return str(base), []


@pytest.mark.parametrize(
    "what", ["one label", "other window size", "no data", "no model", "no model folder", "no weights"]
)
def test_unfit_input(data, tiny_qwen, tmp_path, what):
    base = tmp_path / "tiny"
    shutil.copytree(tiny_qwen, base)
    message, more = write_unfit(tmp_path, base, what)
    with pytest.raises(UserError, match=message) as refusal:
        train(tmp_path, base, *more)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor.micro_batch_size=3", "multiple of micro_batch_size"),
        ("data.random_shift=-1", "random_shift must be at least 0"),
        ("data={frames: last, random_reverse: 0.5}", "a last frame alone has no direction"),
        ("data.frames=first", "must be one of 'all', 'last'"),
        ("actor.model.lora_rank=0", "lora_rank must be at least 1"),
        ("runner.max_steps=0", "max_steps and val_check_interval must be at least 1"),
        ("runner.early_stop.monitor=val_auprc", "monitor must be val_loss"),
        ("actor.model.attn_implementation=flash", "flash_attention_2"),
    ],
)
def test_unfit_settings(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, tmp_path, override)


# --- The parts


def test_golden_windows_are_the_most_decided_ones_of_one_task():
    """Those near a tie let bf16's rounding refuse a sound checkpoint."""
    sure = np.array([0.5, 0.9, 0.8, 0.95, 0.85, 0.97, 0.5, 0.99])  # lead by 1.5 times that minus 0.5
    verdict = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    label_prob = np.repeat((1 - sure)[:, None] / 2, 3, axis=1)
    label_prob[np.arange(8), verdict] = sure
    tasks = ["push"] * 8
    assert train_vlm.most_decided(label_prob, tasks).tolist() == [3, 1, 4, 7, 5]
    tasks[5] = "pull"
    assert train_vlm.most_decided(label_prob, tasks).tolist() == [3, 1, 4, 7]


def test_ranks_wait_while_the_first_one_validates(monkeypatch):
    """By default for ten minutes (nccl), which a validation of many windows takes longer than."""
    asked = {}
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, **more: asked.update(more))
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Ranks("cpu"):
        assert asked["timeout"].total_seconds() >= 4 * 3600


def test_an_answer_counts_once_however_many_tokens_it_has():
    cross_entropy = torch.tensor([[0.0, 2.0, 1.0], [6.0, 1.0, 2.0]])
    is_answer = torch.tensor([[False, True, True], [True, True, True]])
    loss = weighted_mean(cross_entropy, is_answer, tail_weight=0.1)
    assert loss.item() == pytest.approx(((2 + 0.1) / 1.1 + (6 + 0.1 + 0.2) / 1.2) / 2)
    assert weighted_mean(cross_entropy, is_answer, 1.0).item() == pytest.approx((1.5 + 3) / 2)


def test_the_loss_is_that_of_the_answer_tokens():
    """Against a model whose logits are known: token t + 1 is told at place t, and only the end is asked."""

    class Certain(torch.nn.Module):
        def forward(self, input_ids, logits_to_keep, use_cache):
            told = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 7).float() * 3
            told[1] = 0  # knows nothing of the second sample
            return type("Output", (), {"logits": told[:, -logits_to_keep:]})

    input_ids = torch.tensor([[1, 2, 3, 4], [1, 1, 5, 6]])
    labels = torch.tensor([[NO_LABEL, 2, 3, 4], [NO_LABEL, NO_LABEL, 5, 6]])
    loss = answer_loss(Certain(), {"input_ids": input_ids}, labels, tail_weight=1.0)
    sure, ignorant = -np.log(np.exp(3) / (np.exp(3) + 6)), np.log(7)
    assert loss.item() == pytest.approx((sure + ignorant) / 2, rel=1e-5)


def test_adapters_sit_on_the_language_model_only(tiny_qwen):
    model, _ = load_base(
        HistoryVLMRewardConfig(model_path=str(tiny_qwen), precision="fp32"), torch.device("cpu")
    )
    model = add_lora(model, rank=4, alpha=8, dropout=0.0, vision=False)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 7 * 2  # A and B of seven linears in each of two layers
    assert all("language_model" in name and "lora_" in name for name in learning)
    assert "lm_head" not in LANGUAGE_LINEARS and not any("lm_head" in name for name in learning)
