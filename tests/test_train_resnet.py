"""train_resnet.py as users run it, on frames whose class is a colour, and the parts it is made of."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_resnet
from common import config
from common.frames import AugmentConfig, BatchIndices, augment, load_frames, random_shift
from common.payload import RewardDatasetPayload
from common.ranks import Ranks
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.runtime import UserError
from common.training import AdamWConfig, EarlyStop, EarlyStopConfig, build_adamw

ROOT = Path(__file__).parents[1]
GREEN, RED = (0, 200, 0), (200, 0, 0)


def write_data(path: Path, num: int, share: float = 0.25, size: int = 32, render: dict | None = None) -> Path:
    """Noise with a square somewhere: green is a success, red is none."""
    rng = np.random.default_rng(num)
    images, labels = [], [int(index < share * num) for index in range(num)]
    for label in labels:
        image = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        y, x = rng.integers(0, size - 10, 2)
        image[y : y + 10, x : x + 10] = GREEN if label else RED
        images.append(torch.from_numpy(image))
    episodes = [index % 10 for index in range(num)]
    metadata = {"render": render, "frame_episodes": episodes, "frame_steps": [i // 10 for i in range(num)]}
    RewardDatasetPayload(images, labels, metadata).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "train.pt", 120).parent, write_data(tmp_path / "val.pt", 60)


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"data.train_data_paths={folder / 'train.pt'}",
        f"data.val_data_paths={folder / 'val.pt'}",
        f"runner.logger.log_path={folder / 'run'}",
        "runner.logger.logger_backends=[]",
        "runner.num_threads=1",
        "runner.max_steps=20",
        "runner.val_check_interval=10",
        "actor.micro_batch_size=16",
        "actor.global_batch_size=16",
        "actor.model.image_size=[3, 32, 32]",
        "actor.model.device=cpu",
        *more,
    ]


def demo_config(folder: Path, *more: str) -> train_resnet.TrainConfig:
    path = ROOT / "configs/demo_resnet.yaml"
    return config.from_yaml(train_resnet.TrainConfig, path, overrides(folder, *more))


def train(folder: Path, *more: str) -> Path:
    """Train in this process; returns the run folder."""
    torch.manual_seed(0)
    with Ranks("cpu") as ranks:
        train_resnet.train(demo_config(folder, *more), ranks)
    return folder / "run"


# --- The script


def test_two_colours_are_learned_to_the_last_frame(data):
    folder, val_path = data
    run = train(folder, "runner.max_steps=40", "runner.val_check_interval=20")

    model = load_resnet(ResNetRewardConfig(model_path=str(run / "checkpoint")))
    val = load_frames(str(val_path))
    success_prob = model.score({"main_images": val.batch(np.arange(len(val)))}).numpy()
    assert ((success_prob >= model.threshold) == val.labels).all()
    assert success_prob[val.labels].min() - success_prob[~val.labels].max() > 0.5

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["val_metrics"]["auprc"]) == (40, 1.0)
    assert (summary["val_metrics"]["recall"], summary["val_metrics"]["fp_per_1000"]) == (1.0, 0.0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert lines[1]["train/loss"] < lines[0]["train/loss"] / 2

    meta = model.meta
    assert meta["class_counts"] == {"train": {"success": 30, "fail": 90}, "val": {"success": 15, "fail": 45}}
    assert (meta["frame_size"], meta["render"]) == ([32, 32], None)
    assert meta["threshold_rule"]["rule"] == "max_false_positives_per_1000"
    assert meta["threshold_rule"]["kept"] is True
    assert meta["threshold_rule"]["counts"]["true_positives"] == 15
    low, high = meta["threshold_rule"]["interval"]
    assert low <= meta["threshold"] <= high
    digests = {
        role: [len(digest) for digest in files.values()] for role, files in meta["data_sha256"].items()
    }
    assert digests == {"train": [64], "val": [64]}


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_resnet.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_line(data):
    """The guide's config from a shell, with ResNet-18, for two steps."""
    folder, _ = data
    more = overrides(folder, "runner.max_steps=2", "runner.save_interval=1")
    result = run_script("configs/reward_training.yaml", *more)
    assert result.returncode == 0, result.stderr
    assert "best checkpoint: step" in result.stdout and "report card: 60 frames" in result.stdout
    run = folder / "run"
    written = {"config.yaml", "metrics.jsonl", "checkpoint", "checkpoints", "report", "summary.json"}
    assert {path.name for path in run.iterdir()} == written
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_the_report_of_any_checkpoint_on_any_data(data):
    folder, val_path = data
    run = train(folder, "runner.max_steps=40", "runner.val_check_interval=20")
    other = write_data(folder / "other.pt", 50)
    told = [
        "--report",
        str(run / "checkpoint"),
        str(val_path),
        str(other),
        "--output-dir",
        str(folder / "card"),
    ]
    result = run_script(*told, "--threshold", "0.25")
    assert result.returncode == 0, result.stderr
    assert "report card: 110 frames of 20 episodes, 25.5% successes" in result.stdout
    assert "threshold 0.250, set by hand; the model's own is" in result.stdout
    card = json.loads((folder / "card/report.json").read_text())
    assert card["num_frames"] == 110 and card["scores"]["auprc"]["value"] == 1.0
    assert {path.name for path in (folder / "card").iterdir()} == {"report.json", "card.png", "errors.png"}
    with pytest.raises(UserError, match="holds a report already; choose another --output-dir"):
        train_resnet.report(told[1:])
    # before anything is loaded, let alone scored
    with pytest.raises(UserError, match="run holds a run already; choose another --output-dir"):
        train_resnet.report(["no such model", "no such data", "--output-dir", str(run)])


def test_bare_weights_are_reported_when_told_what_they_are(data, capsys):
    folder, val_path = data
    weights = ResNetRewardModel(ResNetRewardConfig(arch="resnet10", hidden_dim=8)).state_dict()
    torch.save(weights, folder / "rlinf.pt")
    told = [str(folder / "rlinf.pt"), str(val_path), "--output-dir", str(folder / "card")]
    keys = ["--model", "arch=resnet10", "hidden_dim=8", "image_size=[3, 32, 32]"]
    with pytest.raises(UserError, match="stores no threshold; give one by --threshold"):
        train_resnet.report([*told, *keys])
    assert not (folder / "card").exists()
    train_resnet.report([*told, "--threshold", "0.5", *keys])
    assert "threshold 0.500, set by hand; the model stores none" in capsys.readouterr().out


def test_a_wrong_key_is_one_line_and_an_exit_code():
    result = run_script("configs/demo_resnet.yaml", "actor.optim.learning_rate=1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "learning_rate" in result.stderr


def test_a_finished_run_is_not_overwritten(data):
    folder, _ = data
    written = (train(folder, "runner.max_steps=1") / "checkpoint/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a finished run"):
        train(folder, "runner.seed=8")
    assert (folder / "run/checkpoint/model.safetensors").read_bytes() == written


def test_training_continues_from_a_checkpoint(data):
    folder, _ = data
    first = train(folder)
    config_of_continuation = (
        f"actor.model.model_path={first / 'checkpoint'}",
        f"runner.logger.log_path={folder / 'second'}",
        "runner.max_steps=1",
        "actor.optim.lr=0",
        "actor.model.precision=fp32",
    )
    train(folder, *config_of_continuation)
    before = json.loads((first / "summary.json").read_text())["val_metrics"]
    after = json.loads((folder / "second/summary.json").read_text())["val_metrics"]
    assert after["loss"] == pytest.approx(before["loss"], abs=0.1)  # batch norms moved, weights did not
    with pytest.raises(UserError, match="trained with arch resnet10, but the config says resnet18"):
        train(folder, *config_of_continuation, "actor.model.arch=resnet18")


def test_old_and_new_stand_side_by_side(data, capsys):
    """Blue squares, which the old model has never seen, are failures among the added frames."""
    folder, _ = data
    first = train(folder, "runner.max_steps=40", "runner.val_check_interval=40")
    payload = RewardDatasetPayload.load(folder / "train.pt")
    old = load_resnet(ResNetRewardConfig(model_path=str(first / "checkpoint")))
    blue = [image[..., [0, 2, 1]] for image in payload.images[:6]]  # green becomes blue
    payload.images += blue
    payload.labels += [0] * 6
    payload.metadata |= {"num_added": 6}
    payload.metadata["frame_episodes"] += [999] * 6
    payload.metadata["frame_steps"] += list(range(6))
    payload.save(folder / "more.pt")
    more = [f"data.train_data_paths={folder / 'more.pt'}", f"runner.logger.log_path={folder / 'second'}"]
    capsys.readouterr()
    train(folder, f"actor.model.model_path={first / 'checkpoint'}", *more, "runner.val_check_interval=20")
    compared = json.loads((folder / "second" / "summary.json").read_text())["compared"]
    fooled = int((old.score({"main_images": torch.stack(blue)}) >= old.threshold).sum())
    assert compared["old"]["added"]["false_positives"] == fooled
    assert compared["old"]["threshold"] == old.threshold
    assert compared["new"]["added"]["false_positives"] + compared["new"]["added"]["true_negatives"] == 6
    # 15 of 15, two each of five episodes and one each of five: worth 15^2 / (5 * 2^2 + 5) = 9
    assert compared["new"]["scores"]["recall"]["interval"] == pytest.approx([0.701, 1], abs=1e-3)
    out = capsys.readouterr().out
    assert f"by the new model: old calls {fooled} of 6 failures a success and misses 0 of 0 successes" in out
    assert re.search(r"recall +[01]\.\d+ \(.*\) +1\.000 \(0\.701 to 1\.000\)", out)


def test_ctrl_c_leaves_the_best_checkpoint_and_says_so(data, monkeypatch, capsys):
    folder, _ = data
    steps = []

    def interrupt_at_step_15(*arguments):
        steps.append(1)
        if len(steps) == 15:
            raise KeyboardInterrupt
        return augment(*arguments)

    monkeypatch.setattr(train_resnet, "augment", interrupt_at_step_15)
    with pytest.raises(KeyboardInterrupt):
        train(folder)
    assert "stopped by Ctrl-C; best checkpoint: step 10, validation AUPRC" in capsys.readouterr().out
    assert load_resnet(ResNetRewardConfig(model_path=str(folder / "run/checkpoint"))).meta["step"] == 10
    assert not (folder / "run/summary.json").exists()  # so the folder may be used again


def step_losses(folder: Path, run: str, *more: str) -> list[float]:
    log_path = f"runner.logger.log_path={folder / run}"
    train(folder, "runner.max_steps=3", "runner.val_check_interval=1", log_path, *more)
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def test_same_seed_same_numbers(data):
    folder, _ = data
    first = step_losses(folder, "a")
    assert step_losses(folder, "b") == first
    assert step_losses(folder, "c", "runner.seed=7") != first


def test_two_micro_batches_are_one_batch(data, monkeypatch):
    """Without what sees a batch as a whole or is random (batch norm, dropout, augmentation), to rounding."""

    class AlwaysEval(ResNetRewardModel):
        def train(self, mode: bool = True) -> ResNetRewardModel:
            return super().train(False)

    monkeypatch.setattr(train_resnet, "ResNetRewardModel", AlwaysEval)
    folder, _ = data
    plain = [f"data.augment.{name}=0" for name in ("random_shift", "brightness", "color")]
    plain += ["actor.model.precision=fp32", "data.positive_fraction=0.5"]
    whole = step_losses(folder, "whole", *plain)
    assert whole[2] < whole[0] - 0.01  # it learns, so a wrong gradient would show
    assert step_losses(folder, "halves", *plain, "actor.micro_batch_size=8") == pytest.approx(whole, rel=1e-3)


def test_early_stop_ends_the_run(data):
    folder, _ = data
    early = [
        "runner.early_stop.enabled=true",
        "runner.early_stop.patience=2",
        "runner.early_stop.min_delta=100",
    ]
    run = train(folder, "runner.max_steps=100", "runner.val_check_interval=1", *early)
    assert json.loads((run / "summary.json").read_text())["steps"] == 3  # the first counts as progress


@pytest.mark.slow
def test_two_processes_train_one_model(data):
    folder, _ = data
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [
            *command,
            "train_resnet.py",
            "configs/demo_resnet.yaml",
            *overrides(folder, "actor.micro_batch_size=8"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "run/summary.json").read_text())
    assert (summary["steps"], summary["val_metrics"]["auprc"]) == (20, 1.0)
    assert result.stdout.count("best checkpoint") == 1  # the second process is silent


# --- What is refused, before anything is written


def write_unfit(folder: Path, what: str) -> str:
    """Returns what the message must say."""
    if what == "missing":
        (folder / "val.pt").unlink()
        return "val.pt: no such file; make it with preprocess_resnet.py"
    if what == "one class":
        write_data(folder / "train.pt", 20, share=0)
        return "train.pt holds failures only; collect episodes with successes too"
    if what == "other size":
        write_data(folder / "val.pt", 60, size=48)
        return "training frames are 32x32 but validation frames 48x48"
    if what == "other cameras":
        write_data(folder / "val.pt", 60, render={"fov": 0.5})
        return "different camera set-ups"
    (folder / "train.pt").write_bytes(b"junk")
    return "train.pt is not a readable torch file"


@pytest.mark.parametrize("what", ["missing", "one class", "other size", "other cameras", "broken"])
def test_unfit_data(data, what):
    folder, _ = data
    message = write_unfit(folder, what)
    with pytest.raises(UserError, match=message):
        train(folder)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor.micro_batch_size=5", "multiple of micro_batch_size"),
        ("data.positive_fraction=1.5", r"positive_fraction must be in \(0, 1\)"),
        ("data.augment.brightness=1", "brightness"),
        ("runner.max_steps=-1", "give max_epochs or max_steps"),
        ("runner.val_check_interval=0", "val_check_interval must be at least 1"),
        ("actor.model.image_size=[64, 64]", r"image_size must be \[3, height, width\]"),
        ("actor.model.arch=resnet19", "resnet18"),
    ],
)
def test_unfit_settings(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        demo_config(tmp_path, override)


def test_several_files_are_one_data_set(tmp_path):
    paths = [str(write_data(tmp_path / f"{num}.pt", num)) for num in (20, 40)]
    together = load_frames(paths)
    assert (len(together), together.class_counts) == (60, {"success": 15, "fail": 45})
    apart = load_frames(paths[1])
    assert torch.equal(together.batch(np.array([20, 59])), apart.batch(np.array([0, 39])))
    write_data(tmp_path / "large.pt", 20, size=48)
    with pytest.raises(UserError, match="mixes frames of 32x32 and 48x48"):
        load_frames([*paths, str(tmp_path / "large.pt")])


# --- The parts


def test_batches_are_balanced_and_deal_every_frame_before_any_again():
    labels = np.arange(20) < 4  # 4 successes, 16 failures
    batches = BatchIndices(labels, 0.25, seed=0)
    drawn = [batches.draw(8) for _ in range(4)]
    assert all(labels[indices].sum() == 2 for indices in drawn)
    everything = np.concatenate(drawn)
    assert sorted(everything[labels[everything]][:4]) == [0, 1, 2, 3]
    assert sorted(everything[~labels[everything]][:16]) == list(range(4, 20))

    natural = BatchIndices(labels, None, seed=0)
    assert sorted(np.concatenate([natural.draw(10), natural.draw(10)])) == list(range(20))
    assert BatchIndices(labels, 0.01, seed=0).draw(4)[0] in range(4)  # at least one success


def test_random_shift_moves_whole_frames_and_repeats_edges():
    """On a frame whose pixel says where it is, a shift by (dy, dx) shows clamped coordinates."""
    torch.manual_seed(0)
    size, pixels = 8, 2
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    frame = torch.stack([y, x, torch.zeros_like(y)], dim=-1).to(torch.uint8)
    shifted = random_shift(frame.expand(64, size, size, 3), pixels)
    assert (shifted.dtype, shifted.shape) == (torch.uint8, (64, size, size, 3))
    seen = set()
    for image in shifted:
        dy, dx = int(image[4, 4, 0]) - 4, int(image[4, 4, 1]) - 4
        seen.add((dy, dx))
        assert torch.equal(image[..., 0], (y + dy).clamp(0, size - 1).to(torch.uint8))
        assert torch.equal(image[..., 1], (x + dx).clamp(0, size - 1).to(torch.uint8))
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == {-2, -1, 0, 1, 2}


def test_augmentation_stays_in_range_and_can_be_switched_off():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 4, 4, 3), dtype=torch.uint8)
    off = AugmentConfig(random_shift=0, brightness=0, color=0)
    assert torch.equal(augment(images, off), images.float() / 255)
    grey = torch.full((200, 1, 1, 3), 100, dtype=torch.uint8)
    factor = augment(grey, AugmentConfig(0, 0.2, 0.1)) / (100 / 255)
    assert 0.8 * 0.9 <= factor.min() < 0.85 and 1.15 < factor.max() <= 1.2 * 1.1
    assert factor.std(dim=-1).mean() > 0.02  # channels differ
    bright = augment(torch.full((50, 1, 1, 3), 250, dtype=torch.uint8), AugmentConfig(0, 0.9, 0))
    assert bright.max() == 1.0


@pytest.mark.parametrize(
    ("monitor", "validations", "due_at"),
    [
        ("val_loss", [1.0, 0.5, 0.45, 0.44, 0.1], 3),  # 0.45 and 0.44 are no progress by 0.1
        ("val_loss", [1.0, 0.8, 0.6, 0.4, 0.2], None),
        ("val_auprc", [0.5, 0.7, 0.7, 0.7, 0.9], 3),
    ],
)
def test_early_stop_counts_validations_without_progress(monitor, validations, due_at):
    stop = EarlyStop(EarlyStopConfig(patience=2, min_delta=0.1, monitor=monitor))
    due = [stop.is_due({"loss": value, "auprc": value}) for value in validations]
    assert (due.index(True) if True in due else None) == due_at


def test_learning_rate_over_time():
    def rates(style: str) -> list[float]:
        optim = AdamWConfig(lr=1.0, lr_warmup_steps=2, warmup_style=style)
        optimizer, schedule = build_adamw(torch.nn.Linear(1, 1), optim, total_steps=4)
        seen = []
        for _ in range(5):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    assert rates("constant") == [0.5, 1, 1, 1, 1]
    assert rates("cosine") == pytest.approx(
        [0.5, (1 + np.cos(np.pi / 4)) / 2, 0.5, (1 - np.cos(np.pi / 4)) / 2, 0]
    )


def test_shipped_configs_load():
    guide = config.from_yaml(train_resnet.TrainConfig, ROOT / "configs/reward_training.yaml")
    assert dataclasses.asdict(guide.actor.model)["arch"] == "resnet18"
    assert (guide.runner.max_epochs, guide.actor.global_batch_size) == (800, 64)
    demo = config.from_yaml(train_resnet.TrainConfig, ROOT / "configs/demo_resnet.yaml")
    assert demo.actor.model.image_size == [3, 64, 64]
