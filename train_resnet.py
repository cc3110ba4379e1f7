"""Train an image success classifier: one frame in, probability of success out.

    python train_resnet.py configs/reward_training.yaml [key=value ...]
    torchrun --nproc_per_node 2 train_resnet.py configs/reward_training.yaml      (data-parallel)
    python train_resnet.py --report CHECKPOINT val.pt [more.pt ...]               (train nothing)

In: `train.pt` and `val.pt` of preprocess_resnet.py (format: common/payload.py), one or several of each.
Out, in the run folder: `config.yaml`, `metrics.jsonl`, `checkpoint/` (format: common/resnet_reward.py) and,
at the end, `report/` (the report card: common/frame_report.py) and `summary.json`.

`checkpoint/` is the best model so far by validation AUPRC (to four digits), ties decided by lower validation
loss. Its threshold is chosen on the same frames by `runner.threshold_rule`. A step is an optimizer step.
Continued from an older checkpoint (`actor.model.model_path`), the run ends with both side by side, on the
same validation frames and on those that `preprocess_resnet.py --add` brought.
`--report` writes the card of any checkpoint on any frames; `--help` after it tells its options.
"""

import contextlib
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from common import config
from common.drift import FrameStatistics
from common.files import new_run_dir, save_json
from common.frame_card import ScoredFrames, frame_card
from common.frame_report import card_table, side_by_side, write_card
from common.frames import AugmentConfig, BatchIndices, FrameSet, augment, check_same_cameras, load_frames
from common.log import LoggerConfig, RunLog
from common.metrics import ThresholdRule, choose_threshold, counts_at, score_metrics, threshold_interval
from common.ranks import Ranks
from common.report import new_report_dir, parse_report_args, report_parser
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.runtime import UserError, run_script, seed_everything, set_threads
from common.training import AdamWConfig, EarlyStop, EarlyStopConfig, build_adamw

NUM_GOLDEN = 4  # validation frames kept in the checkpoint: so many of the least decided, so many of the most

# ----------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    train_data_paths: str | list[str] = "logs/processed_reward_data/train.pt"
    val_data_paths: str | list[str] = "logs/processed_reward_data/val.pt"
    positive_fraction: float | None = 0.5  # of each batch; null: as in the data
    added_fraction: float = 0.25  # of each batch: frames of preprocess_resnet.py --add; 0: drawn as others
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        if not 0 <= self.added_fraction < 1:
            raise ValueError(f"added_fraction must lie in [0, 1), got {self.added_fraction}")
        if self.positive_fraction is not None and not 0 < self.positive_fraction < 1:
            raise ValueError(f"positive_fraction must be in (0, 1) or null, got {self.positive_fraction}")


@dataclass
class ActorConfig:
    """The network and how it learns."""

    model: ResNetRewardConfig = field(default_factory=ResNetRewardConfig)
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    micro_batch_size: int = 32  # frames per forward pass and process
    global_batch_size: int = 64  # frames per optimizer step, over all processes

    def __post_init__(self):
        if self.micro_batch_size < 2 or self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}, and that at least 2 (batch norm)"
            )


@dataclass
class RunnerConfig:
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(experiment_name="reward_training"))
    max_epochs: int = 800  # epoch: as many frames drawn as the training data has; -1: no limit
    max_steps: int = -1  # -1: no limit
    val_check_interval: int = 50  # steps
    save_interval: int = -1  # steps; keeps `checkpoints/step_...` besides the best; -1: never
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    threshold_rule: ThresholdRule = field(default_factory=ThresholdRule)
    seed: int = 42
    num_threads: int = 1  # of torch; 2 only where nothing else runs

    def __post_init__(self):
        if self.max_epochs < 1 and self.max_steps < 1:
            raise ValueError(f"give max_epochs or max_steps, got {self.max_epochs} and {self.max_steps}")
        if self.val_check_interval < 1:
            raise ValueError(f"val_check_interval must be at least 1, got {self.val_check_interval}")


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
    train_set, val_set = load_frames(cfg.data.train_data_paths), load_frames(cfg.data.val_data_paths)
    check_same_cameras(train_set, val_set)
    if actor.global_batch_size % (actor.micro_batch_size * ranks.size):
        raise UserError(
            f"global_batch_size {actor.global_batch_size} is no multiple of micro_batch_size "
            f"{actor.micro_batch_size} x {ranks.size} processes"
        )
    num_micro = actor.global_batch_size // (actor.micro_batch_size * ranks.size)  # per step and process
    steps_per_epoch = max(1, len(train_set) // actor.global_batch_size)
    total_steps = min(
        runner.max_epochs * steps_per_epoch if runner.max_epochs > 0 else math.inf,
        runner.max_steps if runner.max_steps > 0 else math.inf,
    )
    model = build_model(actor.model, train_set.views, ranks.device)
    learner = ranks.parallel(model)
    optimizer, schedule = build_adamw(model, actor.optim, total_steps)
    batches = BatchIndices(
        train_set.labels, cfg.data.positive_fraction, runner.seed, train_set.added, cfg.data.added_fraction
    )
    torch.manual_seed(runner.seed + ranks.rank)  # dropout and augmentation differ between the ranks

    # --- Loop.
    with Judge(cfg, model, train_set, val_set) if ranks.is_first else contextlib.nullcontext() as judge:
        losses = []
        for step in tqdm(range(1, total_steps + 1), unit="step", disable=None if judge else True):
            model.train()
            for micro in range(num_micro):
                # every rank draws for all of them and keeps its own, so that no frame is drawn twice
                indices = [batches.draw(actor.micro_batch_size) for _ in range(ranks.size)][ranks.rank]
                images = augment(train_set.batch(indices).to(ranks.device), cfg.data.augment)
                labels = torch.from_numpy(train_set.labels[indices]).float().to(ranks.device)
                with ranks.exchange_gradients(learner, now=micro == num_micro - 1):
                    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=model.uses_bf16):
                        logits = learner(images)
                    loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
                    (loss / num_micro).backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), actor.optim.clip_grad)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            validation_due = step % runner.val_check_interval == 0 or step == total_steps
            save_due = runner.save_interval > 0 and step % runner.save_interval == 0
            if validation_due or save_due:
                train_loss = float(torch.stack(losses).mean())
                stop = judge is not None and judge.validate(step, train_loss, keep=save_due)
                losses.clear()
                if ranks.agree(stop):
                    break


def build_model(section: ResNetRewardConfig, views: list[str], device: torch.device) -> ResNetRewardModel:
    """Fresh, ImageNet's, or continued from `model_path`; channels-last, where convolutions are fastest.

    views: those of the data.
    """
    fresh = replace(section, views=section.views or views)
    model = load_resnet(section, device) if section.model_path else ResNetRewardModel(fresh)
    if list(model.views) != views:
        raise UserError(
            f"the data show {', '.join(views)}, but the model looks at {', '.join(model.views)}; "
            "leave actor.model.views out"
        )
    return model.to(device=device, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------
# Validation
# ----------------------------------------------------------------------------------------------------


class Judge:
    """Opens the run folder, validates, keeps the best checkpoint, says when to stop, and sums the run up."""

    def __init__(self, cfg: TrainConfig, model: ResNetRewardModel, train_set: FrameSet, val_set: FrameSet):
        self.cfg, self.model, self.train_set, self.val_set = cfg, model, train_set, val_set
        self.started = time.monotonic()
        self.last_step = 0
        self.best: dict[str, Any] | None = None  # what was saved with the best checkpoint
        self.older: dict[str, Any] | None = None  # what the checkpoint was worth that this run goes on from
        self.best_merit = (-1.0, -math.inf)  # its AUPRC to four digits, and minus its loss
        self.early_stop = EarlyStop(cfg.runner.early_stop)
        self.seen = {"train": train_set.sha256, "val": val_set.sha256}
        before = model.meta.get("data_sha256", {})  # of the model that this run goes on from
        if before.keys() == self.seen.keys():
            for role, files in before.items():
                older = {f"{path}, before": sha for path, sha in files.items()}
                self.seen[role] = older | self.seen[role]

    def __enter__(self) -> "Judge":
        logger = self.cfg.runner.logger
        self.folder = new_run_dir(logger.log_path, logger.experiment_name)
        config.save(self.cfg, self.folder / "config.yaml")
        self.log = RunLog(self.folder, logger.logger_backends)
        self.log.__enter__()
        for name, frames in (("train", self.train_set), ("val", self.val_set)):
            height, width = frames.frame_size
            self.log.say(f"{name}: {len(frames)} frames of {height}x{width}, {frames.class_counts}")
        if self.cfg.actor.model.model_path is not None:
            self.older = self._measure_older()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        best = "no checkpoint was written"
        if self.best:
            auprc, path = self.best["val_metrics"]["auprc"], self.folder / "checkpoint"
            best = f"best checkpoint: step {self.best['step']}, validation AUPRC {auprc:.3f}, in {path}"
        if kind is None:
            self._sum_up()
            self.log.say(best)
        elif kind is KeyboardInterrupt:
            self.log.say(f"stopped by Ctrl-C; {best}")
        self.log.__exit__(kind, *exc_info)

    def validate(self, step: int, train_loss: float, keep: bool) -> bool:
        """Score the validation frames, save the model if it is the best (or `keep`). True: time to stop."""
        self.last_step = step
        success_prob, statistics = score_and_look(self.model, self.val_set)
        label = self.val_set.labels
        rule = self.cfg.runner.threshold_rule
        weight, episode = self.val_set.weight, self.val_set.episode
        threshold, counts, rule_kept = choose_threshold(success_prob, label, rule, weight, episode)
        card = score_metrics(success_prob, label, threshold, weight)
        tagged = {f"val/{name}": value for name, value in card.items()}
        self.log.log(step, {"train/loss": train_loss, **tagged, "val/threshold": threshold})

        meta = {
            "threshold": threshold,
            "threshold_rule": {**asdict(rule), "kept": rule_kept, "counts": asdict(counts)},
            "frame_size": self.train_set.frame_size,
            "render": self.train_set.render,
            "label": self.train_set.label,
            "data_sha256": self.seen,
            "class_counts": {"train": self.train_set.class_counts, "val": self.val_set.class_counts},
            "val_metrics": card,
            "step": step,
        }
        order = np.argsort(np.abs(success_prob - threshold))  # where a small change would matter, first
        golden = self.val_set.batch(np.concatenate([order[:NUM_GOLDEN], order[-NUM_GOLDEN:]]))
        merit = (round(card["auprc"], 4), -card["loss"])
        if merit > self.best_merit or keep:
            interval = threshold_interval(success_prob, label, rule, episode, weight)
            meta["threshold_rule"]["interval"] = interval
        if merit > self.best_merit:
            self.best, self.best_merit = meta, merit
            self.model.save(self.folder / "checkpoint", meta, golden, statistics)
        if keep:
            self.model.save(self.folder / "checkpoints" / f"step_{step:06d}", meta, golden, statistics)
        return self.early_stop.is_due(card)

    def _sum_up(self) -> None:
        """The report card of the best checkpoint, loaded as an RL run loads it, and the summary."""
        card, section = self.best["val_metrics"], self.cfg.actor.model
        path = str(self.folder / "checkpoint")
        checkpoint = ResNetRewardConfig(model_path=path, precision=section.precision)
        best = load_resnet(checkpoint, self.model.device)
        success_prob = score_frames(best, self.val_set)
        report = write_card(success_prob, self.val_set, best.meta, best.threshold, self.folder / "report")
        if not self.best["threshold_rule"]["kept"]:
            self.log.say(
                f"warning: no threshold keeps {self.best['threshold_rule']['rule']}; took the nearest. "
                "More data, above all failures that look like successes, would help"
            )
        summary = {
            "seconds": round(time.monotonic() - self.started, 1),
            "steps": self.last_step,
            "best_step": self.best["step"],
            "checkpoint": self.folder / "checkpoint",
            "threshold": self.best["threshold"],
            "val_metrics": card,
            "beats_baselines": report["beats_baselines"],
            "class_counts": self.best["class_counts"],
            "compared": self._compare(best, report["scores"]),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
        }
        save_json(summary, self.folder / "summary.json")
        self.log.say(f"{card_table(report)}\n{summary['seconds']:.0f} s, {self.last_step} steps")

    def _compare(self, best: ResNetRewardModel, scores: dict[str, Any]) -> dict[str, Any] | None:
        """The older checkpoint and the best one of this run, printed side by side. None: it began afresh."""
        if self.older is None:
            return None
        new = {"threshold": best.threshold, "scores": scores, "added": self._of_added(best, best.threshold)}
        compared = {"old": self.older, "new": new}
        self.log.say(side_by_side(**compared))
        return compared

    def _measure_older(self) -> dict[str, Any]:
        """At the older model's own threshold; of a bare state dict, at the one that the rule chooses."""
        val, threshold = self.val_set, self.model.threshold
        success_prob = score_frames(self.model, val)
        if threshold is None:
            rule = self.cfg.runner.threshold_rule
            threshold = choose_threshold(success_prob, val.labels, rule, val.weight, val.episode)[0]
        scores = frame_card(ScoredFrames.of(val, success_prob), threshold)["scores"]
        return {"threshold": threshold, "scores": scores, "added": self._of_added(self.model, threshold)}

    def _of_added(self, model: ResNetRewardModel, threshold: float) -> dict[str, int] | None:
        """Counts of the frames that `preprocess_resnet.py --add` brought; None without any."""
        where = np.flatnonzero(self.train_set.added)
        if not where.size:
            return None
        success_prob = score_frames(model, self.train_set, where)
        return asdict(counts_at(success_prob, self.train_set.labels[where], threshold))


def score_frames(
    model: ResNetRewardModel, frames: FrameSet, where: np.ndarray | None = None, chunk: int = 1024
) -> np.ndarray:
    """success_prob (n,) by the fused network, as in RL, of the frames at the indices `where` (n,), None: all.
    `chunk`: frames in memory at once."""
    model.eval()
    where = np.arange(len(frames)) if where is None else where
    parts = np.array_split(where, math.ceil(len(where) / chunk))
    return np.concatenate([model.score(frames.by_view(part)).numpy() for part in parts])


def score_and_look(model: ResNetRewardModel, frames: FrameSet) -> tuple[np.ndarray, FrameStatistics]:
    """As `score_frames`, and what the frames looked like to the model, for the drift check in RL."""
    looks: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.onlooker = lambda features, brightness: looks.append((features.cpu(), brightness.cpu()))
    success_prob = score_frames(model, frames)
    model.onlooker = None
    return success_prob, FrameStatistics.of(*(torch.cat(part) for part in zip(*looks, strict=True)))


# ----------------------------------------------------------------------------------------------------
# The report card of any checkpoint
# ----------------------------------------------------------------------------------------------------


def report(argv: list[str]) -> None:
    """What follows `--report`: score frames, print the card, and write it into a new folder."""
    parser = report_parser("train_resnet.py", ".pt files of preprocess_resnet.py, together one set of frames")
    parser.add_argument("--threshold", type=float, help="instead of the one stored with the model")
    args = parse_report_args(parser, argv)
    set_threads(1)
    section = config.from_yaml(ResNetRewardConfig, None, args.model)
    frames, model = load_frames(args.data), load_resnet(replace(section, model_path=args.checkpoint))
    threshold = model.threshold if args.threshold is None else args.threshold
    if threshold is None:
        raise UserError(f"{args.checkpoint} stores no threshold; give one by --threshold")
    success_prob = score_frames(model, frames)
    folder = new_report_dir(args.output_dir)
    print(card_table(write_card(success_prob, frames, model.meta, threshold, folder)))
    print(f"pictures and all numbers: {folder}")


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
