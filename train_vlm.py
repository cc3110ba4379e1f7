"""Fine-tune a Qwen3-VL to judge the trend of a window: positive, negative or unclear.

    export DUALVIEW_SFT_DATA_ROOT=logs/processed_qwentrend_reward_data
    python train_vlm.py configs/qwen3vl_sft_qwentrend.yaml [key=value ...]
    torchrun --nproc_per_node 2 train_vlm.py configs/qwen3vl_sft_qwentrend.yaml      (data-parallel)
    python train_vlm.py --report CHECKPOINT WINDOWS [...]                            (train nothing)

In: the windows of preprocess_qwentrend.py (format: common/windows.py), and the folder of a Qwen3-VL.
Out, in the run folder: `config.yaml`, `metrics.jsonl`, `checkpoint/` (a LoRA adapter, or the whole model;
format: common/qwen_checkpoint.py) and, at the end, `report/` (the report card: common/trend_report.py) and
`summary.json`.

Validation asks the model as it will be asked online, on held-out windows that nobody reversed. `checkpoint/`
is the best model so far by macro-F1 (to four digits), ties decided by lower loss. A step is an optimizer
step. `--report` writes the card of any checkpoint, or of a Qwen3-VL as it comes, on any windows.
"""

import contextlib
import math
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from common import config
from common.files import new_run_dir, save_json
from common.log import LoggerConfig, RunLog
from common.qwen_checkpoint import save_vlm
from common.qwen_sft import ModelConfig, Pupil, answer_loss, load_scorer
from common.ranks import Ranks
from common.report import new_report_dir, parse_report_args, report_parser
from common.runtime import UserError, pick_device, run_script, seed_everything, set_threads
from common.training import AdamWConfig, EarlyStop, EarlyStopConfig, build_adamw
from common.trend import LABELS
from common.trend_card import (
    CONTROLS,
    confusion_counts,
    natural_windows,
    report_card,
    score_windows,
    some_of,
    trend_metrics,
)
from common.trend_report import card_table, scores_table, write_card
from common.windows import WindowIndices, WindowSet, check_windows, shifted, some_reversed

NUM_GOLDEN = 3  # validation windows of each verdict that are kept in the checkpoint, at most

# ----------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    type: Literal["vlm"] = "vlm"
    dataset_name: str = "qwentrend_progress_sft"  # what the checkpoint calls its data
    train_data_paths: str | list[str] = "logs/processed_qwentrend_reward_data/train/segments.jsonl"
    val_data_paths: str | list[str] = "logs/processed_qwentrend_reward_data/eval/segments.jsonl"
    video_root: str | None = None  # where relative pkl_paths start; null: the folder above train/ and eval/
    video_nframes: int = 5  # frames per window, the window_size of preprocessing
    balance_labels: bool | None = True  # draw each label equally often; false: as in the data
    frames: Literal["all", "last"] = "all"  # last: a control that cannot see motion
    random_reverse: float = 0.0  # share of training windows played backwards, their labels turned round
    random_shift: int = 0  # pixels that a training window moves each way, views apart
    cache_gb: float = 8.0  # of frames in memory, per set; the rest is read from the disk each time

    def __post_init__(self):
        if self.random_shift < 0:
            raise ValueError(f"random_shift must be at least 0, got {self.random_shift}")
        if not 0 <= self.random_reverse <= 1:
            raise ValueError(f"random_reverse must be in [0, 1], got {self.random_reverse}")
        if self.frames == "last" and self.random_reverse:
            raise ValueError("a last frame alone has no direction: frames: last needs random_reverse: 0")


@dataclass
class ActorConfig:
    """The network and how it learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    micro_batch_size: int = 8  # windows per forward pass and process
    global_batch_size: int = 8  # windows per optimizer step, over all processes
    tail_weight: float = 0.1  # in the loss, of an answer's tokens after the first (`answer_loss`)

    def __post_init__(self):
        if self.micro_batch_size < 1 or self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )


@dataclass
class RunnerConfig:
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(experiment_name="qwentrend_sft"))
    max_steps: int = 3000
    val_check_interval: int = 100  # steps
    save_interval: int = -1  # steps; keeps `checkpoints/step_...` besides the best; -1: never
    max_val_windows: int = -1  # of a validation and of the report's controls, drawn once; -1: all
    early_stop: EarlyStopConfig = field(default_factory=lambda: EarlyStopConfig(enabled=False))
    seed: int = 42
    num_threads: int = 1  # of torch; 2 only where nothing else runs

    def __post_init__(self):
        if self.max_steps < 1 or self.val_check_interval < 1:
            raise ValueError(
                f"max_steps and val_check_interval must be at least 1, got {self.max_steps} and "
                f"{self.val_check_interval}"
            )
        if self.early_stop.monitor != "val_loss":
            raise ValueError(f"early_stop.monitor must be val_loss here, got {self.early_stop.monitor}")


@dataclass
class TrainConfig:
    data: DataConfig = field(default_factory=DataConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


def train(cfg: TrainConfig, ranks: Ranks) -> None:
    runner, actor = cfg.runner, cfg.actor

    # --- Build. What may be wrong with data or model is found before anything is written.
    train_set, val_set = load_data(cfg.data)
    if actor.global_batch_size % (actor.micro_batch_size * ranks.size):
        raise UserError(
            f"global_batch_size {actor.global_batch_size} is no multiple of micro_batch_size "
            f"{actor.micro_batch_size} x {ranks.size} processes"
        )
    num_micro = actor.global_batch_size // (actor.micro_batch_size * ranks.size)  # per step and process
    pupil = Pupil(actor.model, train_set, ranks.device)
    learner = ranks.parallel(pupil.model)
    optimizer, schedule = build_adamw(pupil.model, actor.optim, runner.max_steps)
    batches = WindowIndices(train_set.labels, bool(cfg.data.balance_labels), runner.seed)
    torch.manual_seed(runner.seed + ranks.rank)  # dropout and shifts differ between the ranks

    # --- Loop.
    with Judge(cfg, train_set, val_set) if ranks.is_first else contextlib.nullcontext() as judge:
        losses = []
        for step in tqdm(range(1, runner.max_steps + 1), unit="step", disable=None if judge else True):
            pupil.model.train()
            for micro in range(num_micro):
                # every rank draws for all of them and keeps its own, so that no window is drawn twice
                indices = [batches.draw(actor.micro_batch_size) for _ in range(ranks.size)][ranks.rank]
                frames = to_device(train_set.windows(indices), ranks.device)
                frames, classes = some_reversed(frames, train_set.labels[indices], cfg.data.random_reverse)
                frames = shifted(frames, cfg.data.random_shift)
                answers = [LABELS[label] for label in classes]
                lessons, labels = pupil.inputs.lessons(frames, train_set.tasks_of(indices), answers)
                lessons, labels = to_device(lessons, ranks.device), labels.to(ranks.device)
                with ranks.exchange_gradients(learner, now=micro == num_micro - 1):
                    with pupil.autocast():
                        loss = answer_loss(learner, lessons, labels, actor.tail_weight)
                    (loss / num_micro).backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(pupil.model.parameters(), actor.optim.clip_grad)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            validation_due = step % runner.val_check_interval == 0 or step == runner.max_steps
            save_due = runner.save_interval > 0 and step % runner.save_interval == 0
            if validation_due or save_due:
                train_loss = float(torch.stack(losses).mean())
                stop = judge is not None and judge.validate(pupil, step, train_loss, keep=save_due)
                losses.clear()
                if ranks.agree(stop):
                    break
        if judge:
            del pupil, learner, optimizer, schedule  # room for the checkpoint, which is loaded as in RL
            judge.sum_up(ranks.device)


def to_device(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def load_data(section: DataConfig) -> tuple[WindowSet, WindowSet]:
    """Training and validation windows. UserError where they cannot be trained on."""
    train_set, val_set = (
        WindowSet(paths, section.video_root, section.cache_gb * 1e9, last_frame_only=section.frames == "last")
        for paths in (section.train_data_paths, section.val_data_paths)
    )
    check_windows(train_set, val_set, section.video_nframes)
    return train_set, val_set


# ----------------------------------------------------------------------------------------------------
# Validation
# ----------------------------------------------------------------------------------------------------


def most_decided(label_prob: np.ndarray, tasks: list[str]) -> np.ndarray:
    """Indices of the golden windows, whose scores are checked at every load: of each verdict the surest.

    All are of one task, and none is near a tie, where bf16 alone may change a score by more than is allowed.
    label_prob (B, 3).
    """
    likeliest = np.sort(label_prob)
    lead = likeliest[:, -1] - likeliest[:, -2]
    order = np.argsort(-lead, kind="stable")
    order = order[(np.array(tasks)[order] == tasks[order[0]]) & (lead[order] >= lead.max() / 2)]
    verdict = label_prob[order].argmax(1)
    return np.concatenate([order[verdict == label][:NUM_GOLDEN] for label in range(len(LABELS))])


class Judge:
    """Opens the run folder, validates, keeps the best checkpoint, says when to stop, and sums the run up."""

    def __init__(self, cfg: TrainConfig, train_set: WindowSet, val_set: WindowSet):
        self.cfg, self.train_set, self.val_set = cfg, train_set, val_set
        self.natural, self.warning = natural_windows(val_set)
        self.chosen = some_of(self.natural, cfg.runner.max_val_windows)
        self.started = time.monotonic()
        self.validating_s = 0.0
        self.last_step = 0
        self.best: dict[str, Any] | None = None  # what was saved with the best checkpoint
        self.best_merit = (-1.0, -math.inf)  # its macro-F1 to four digits, and minus its loss
        self.early_stop = EarlyStop(cfg.runner.early_stop)

    def __enter__(self) -> "Judge":
        logger = self.cfg.runner.logger
        self.folder = new_run_dir(logger.log_path, logger.experiment_name)
        config.save(self.cfg, self.folder / "config.yaml")
        self.log = RunLog(self.folder, logger.logger_backends)
        self.log.__enter__()
        for name, windows in (("train", self.train_set), ("val", self.val_set)):
            sizes = ", ".join(f"{height}x{width}" for height, width in windows.frame_size.values())
            self.log.say(
                f"{name}: {len(windows)} windows of {windows.window_size} frames ({sizes}), "
                f"{windows.class_counts}, {int(windows.reversed.sum())} of them played backwards"
            )
        self.log.say(f"validation on {len(self.chosen)} of {len(self.natural)} windows{self.warning}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        best = "no checkpoint was written"
        if self.best:
            card, path = self.best["val_metrics"], self.folder / "checkpoint"
            best = (
                f"best checkpoint: step {self.best['step']}, validation macro-F1 {card['macro_f1']:.3f}, "
                f"negative F1 {card['f1_negative']:.3f}, in {path}"
            )
        if kind is None:
            self.log.say(best)
        elif kind is KeyboardInterrupt:
            self.log.say(f"stopped by Ctrl-C; {best}")
        self.log.__exit__(kind, *exc_info)

    def validate(self, pupil: Pupil, step: int, train_loss: float, keep: bool) -> bool:
        """Score the validation windows, save the model if it is the best (or `keep`). True: time to stop."""
        before = time.monotonic()
        self.last_step = step
        pupil.model.eval()
        with pupil.autocast():
            prob = score_windows(pupil.scorer, self.val_set, self.chosen)
        card = trend_metrics(prob, self.val_set.labels[self.chosen])
        tagged = {f"val/{name}": value for name, value in card.items()}
        self.log.log(step, {"train/loss": train_loss, **tagged})

        golden = self.chosen[most_decided(prob, self.val_set.tasks_of(self.chosen))]
        meta = {**self._meta(step, card), "golden_task": self.val_set.tasks[golden[0]]}
        merit = (round(card["macro_f1"], 4), -card["loss"])
        places = []
        if merit > self.best_merit:
            self.best, self.best_merit = meta, merit
            places.append(self.folder / "checkpoint")
        if keep:
            places.append(self.folder / "checkpoints" / f"step_{step:06d}")
        for place in places:
            with pupil.autocast():
                save_vlm(place, pupil.scorer, meta, self.val_set.windows(golden))
        self.validating_s += time.monotonic() - before
        return self.early_stop.is_due(card)

    def _meta(self, step: int, card: dict[str, float]) -> dict[str, Any]:
        """What reward.json holds besides what `save_vlm` knows itself."""
        info, data = self.train_set.info, self.cfg.data
        told = {key: info.get(key) for key in ("render", "control", "delta_threshold", "score_source")}
        return {
            **told,
            "frame_size": self.train_set.frame_size,
            "window_size": self.train_set.window_size,
            "template": self.train_set.template,
            "tasks": sorted(set(self.train_set.tasks)),
            "dataset_name": data.dataset_name,
            "frames": data.frames,
            "data_sha256": {"train": self.train_set.sha256, "val": self.val_set.sha256},
            "class_counts": {"train": self.train_set.class_counts, "val": self.val_set.class_counts},
            "val_metrics": card,
            "step": step,
        }

    def sum_up(self, device: torch.device) -> None:
        """The report card of the best checkpoint, loaded as an RL run loads it."""
        trained_s = time.monotonic() - self.started - self.validating_s
        checkpoint = str(self.folder / "checkpoint")
        model = load_scorer(self.cfg.actor.model, checkpoint, self.val_set, device)
        prob = score_windows(model, self.val_set, self.natural)
        label = self.val_set.labels[self.natural]
        controls = CONTROLS if self.cfg.data.frames == "all" else []
        of_chosen = prob[np.searchsorted(self.natural, self.chosen)]
        rows = report_card(model, self.val_set, self.chosen, controls, of_chosen)
        card = write_card(prob, self.val_set, self.natural, rows, model.meta, self.folder / "report")
        num_drawn = self.last_step * self.cfg.actor.global_batch_size
        summary = {
            "seconds": round(time.monotonic() - self.started, 1),
            "train_ms_per_window": round(1000 * trained_s / num_drawn, 2),
            "steps": self.last_step,
            "best_step": self.best["step"],
            "checkpoint": checkpoint,
            "val_metrics": trend_metrics(prob, label),
            "confusion": confusion_counts(prob.argmax(1), label),
            "report_card": rows,
            "beats_baselines": card["beats_baselines"],
            "class_counts": self.best["class_counts"],
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "peft")},
            },
        }
        save_json(summary, self.folder / "summary.json")
        self.log.say(
            f"{scores_table(card)}\n{card_table(rows)}\n{summary['seconds']:.0f} s, {self.last_step} steps"
        )


# ----------------------------------------------------------------------------------------------------
# The report card of any checkpoint
# ----------------------------------------------------------------------------------------------------


def report(argv: list[str]) -> None:
    """What follows `--report`: score windows, print the card, and write it into a new folder."""
    parser = report_parser(
        "train_vlm.py", "folders of preprocess_qwentrend.py (their eval/), or segments.jsonl"
    )
    parser.add_argument("--max-windows", type=int, default=600, help="of the controls, drawn once; 0: all")
    args = parse_report_args(parser, argv)
    set_threads(1)
    section = config.from_yaml(ModelConfig, None, args.model)
    paths = [path if path.endswith(".jsonl") else f"{path}/eval/segments.jsonl" for path in args.data]
    windows = WindowSet(paths)
    indices, warning = natural_windows(windows)
    model = load_scorer(section, args.checkpoint, windows, pick_device(section.device))
    prob = score_windows(model, windows, indices)
    chosen = some_of(indices, args.max_windows)
    rows = report_card(model, windows, chosen, label_prob=prob[np.searchsorted(indices, chosen)])
    folder = new_report_dir(args.output_dir)
    card = write_card(prob, windows, indices, rows, model.meta, folder)
    print(f"{scores_table(card)}{warning}\n{card_table(rows)}\npictures and all numbers: {folder}")


def main() -> None:
    if sys.argv[1:2] == ["--report"]:
        return report(sys.argv[2:])
    cfg = config.load(TrainConfig, description=__doc__)
    set_threads(cfg.runner.num_threads)
    seed_everything(cfg.runner.seed)
    with Ranks(cfg.actor.model.device) as ranks:
        train(cfg, ranks)


if __name__ == "__main__":
    run_script(main)
