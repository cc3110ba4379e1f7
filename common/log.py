"""What a run says of itself: a progress line, the same numbers in metrics.jsonl and TensorBoard, a glossary.

A number's name, its tag, is `group/name`. The groups are fixed. `GLOSSARY` tells what each tag of the project
means, in which unit, and which of them stand on the progress line. A tag that it lacks is logged all the same
if its group is known (an experiment must not wait for a dictionary); one of an unknown group is an error.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from common.files import to_json
from common.runtime import UserError

# ----------------------------------------------------------------------------------------------------
# The glossary

GROUPS = {
    "rollout": "episodes that ended in training since the last line, with exploration noise",
    "reward": "verdicts of the reward model in training since the last line",
    "train": "the learner's last update",
    "eval": "fresh episodes with the policy as it would be used",
    "final": "the same for the checkpoint kept, on more episodes, once at the end of a run",
    "prior": "verdicts on the recorded episodes that the buffer starts with",
    "val": "a reward model on its validation frames",
    "time": "the run itself",
}


class Tag(NamedTuple):
    """What a number means; `label` and `format` if it stands on the progress line."""

    meaning: str
    label: str = ""
    format: str = ".3g"


_WINDOWS = {
    "positive_share": Tag("share of the windows called positive", "positive", ".2f"),
    "negative_share": Tag("share of the windows called negative"),
    "agreement": Tag("share of the windows called what the label rule calls them", "agree", ".2f"),
    "false_positive_share": Tag("share of the windows called positive that are not", "false", ".2f"),
    "label_mass": Tag("mean probability of the three labels together"),
    "model_reward_mean": Tag("mean model_reward of the frames or windows scored"),
}
_FRAMES = {
    "auprc": Tag("area under the precision-recall curve of the frames scored", "auprc", ".3f"),
    "precision": Tag("share of the frames called a success that are one"),
    "precision_low": Tag("lower end of its 95 % interval, over episodes"),
    "precision_high": Tag("upper end of it"),
    "num_called": Tag("frames called a success, of which the precision is a share"),
    "recall": Tag("share of the successes scored that are called one"),
}
_EVALUATION = {
    "true_success_once": Tag("share of episodes that truly succeed at any step", "true", ".2f"),
    "true_success_at_end": Tag("share of episodes whose last step is a true success", "at_end", ".2f"),
    "learned_success": Tag("share of episodes that the reward model calls a success", "learned", ".2f"),
    "hack_gap": Tag("learned minus true success, in points of a hundred; above 0: fooled", "gap", "+.1f"),
    "return": Tag("mean sum of env_reward over an episode", "return", ".2f"),
    "score": Tag("mean success_prob that the learned success rests on"),
    "false_positives_per_1000_steps": Tag(
        "frames wrongly called a success, per 1,000 env steps", "fp", ".1f"
    ),
    "model_return": Tag("mean sum of model_reward over an episode, bonus left out", "model_return", ".2f"),
    "progress_corr": Tag("correlation of an episode's model_return with its true progress", "corr", ".2f"),
    **_WINDOWS,
    **_FRAMES,
    "num_episodes": Tag("episodes measured"),
    "fooled": Tag("share of episodes that the reward model calls a success and that are none"),
    "missed": Tag("share of episodes that succeed and that the reward model does not call a success"),
}
_EPISODES = {
    "true_success_once": _EVALUATION["true_success_once"],
    "true_success_at_end": Tag("share of episodes whose last step is a true success"),
    "learned_success": _EVALUATION["learned_success"],
    "hack_gap": _EVALUATION["hack_gap"],
    "fooled": _EVALUATION["fooled"],
    "missed": _EVALUATION["missed"],
    "num_episodes": Tag("episodes that ended"),
    "model_return": _EVALUATION["model_return"],
}
_VERDICTS = {
    **_WINDOWS,
    **_FRAMES,
    "false_positives_per_1000_steps": Tag(
        "frames wrongly paid as a success, per 1,000 env steps", "fp", ".1f"
    ),
    "share_of_time": Tag("share of wall time spent waiting for the reward model"),
    "weight": Tag("what reward.audit has left of reward_weight, as a factor"),
}
_UPDATES = {
    "loss": Tag("mean loss of the batches since the last line", "loss", ".4f"),
    "actor_loss": Tag("SAC: alpha * log pi - min Q"),
    "critic_loss": Tag("SAC: squared error to the target, summed over critics"),
    "alpha": Tag("SAC: entropy temperature"),
    "q": Tag("SAC: mean Q of the batch, in reward units", "q", ".2f"),
    "q_target": Tag("SAC: mean target of the critics"),
    "policy_loss": Tag("PPO: clipped surrogate loss"),
    "value_loss": Tag("PPO: half the squared error to the return", "value", ".4f"),
    "entropy": Tag("entropy of the policy in nats", "entropy", ".2f"),
    "approx_kl": Tag("PPO: KL of the new policy from the old one, Schulman's estimate k3", "kl", ".4f"),
    "clip_fraction": Tag("PPO: share of samples whose ratio was clipped"),
    "explained_variance": Tag("PPO: 1 - Var(return - value) / Var(return)"),
    "num_minibatches": Tag("PPO: minibatches of the update; fewer than planned where target_kl stopped it"),
}
_VALIDATION = {
    "loss": Tag("mean cross-entropy of the true label in nats", "loss", ".4f"),
    "auprc": Tag("area under the precision-recall curve", "auprc", ".3f"),
    "roc_auc": Tag("probability that a success scores above a failure"),
    "accuracy": Tag("share judged right: of frames at the threshold, of windows by the likeliest label"),
    "precision": Tag("share of frames called a success that are one", "precision", ".3f"),
    "recall": Tag("share of successes called one", "recall", ".3f"),
    "fp_per_1000": Tag("false positives per 1,000 failures", "fp", ".1f"),
    "threshold": Tag("success_prob from which a frame is called a success", "threshold", ".3f"),
    "macro_f1": Tag("mean F1 of the labels that occur among the windows", "macro-F1", ".3f"),
    "f1_positive": Tag("F1 of the positive windows", "positive", ".3f"),
    "f1_negative": Tag("F1 of the negative windows", "negative", ".3f"),
    "f1_unclear": Tag("F1 of the unclear windows", "unclear", ".3f"),
    "label_mass": Tag("mean probability of the three labels together", "mass", ".3f"),
}
_RUN = {
    "env_steps_per_s": Tag("env steps per second since the last line, all envs together", "steps/s", ".0f"),
    "verdict_p50_ms": Tag("ms from sending the reward model a chunk of frames to its scores, median"),
    "verdict_p99_ms": Tag("the same, 99th percentile"),
    "wall_s": Tag("seconds since this start of the run; on every line of metrics.jsonl"),
}
# Tag -> meaning, in the order of the progress line.
GLOSSARY: dict[str, Tag] = {
    f"{group}/{name}": tag
    for group, tags in {
        "final": _EVALUATION,
        "eval": _EVALUATION,
        "rollout": _EPISODES,
        "prior": _VERDICTS,
        "reward": _VERDICTS,
        "val": _VALIDATION,
        "train": _UPDATES,
        "time": _RUN,
    }.items()
    for name, tag in tags.items()
}


# ----------------------------------------------------------------------------------------------------
# The log


@dataclass
class LoggerConfig:
    """The section `runner.logger`."""

    log_path: str | None = None  # folder of the run; null: logs/<date>-<time>-<experiment_name>
    experiment_name: str = "run"
    logger_backends: list[Literal["tensorboard"]] = field(default_factory=lambda: ["tensorboard"])


def progress_line(step: int, wall_s: float, metrics: dict[str, float]) -> str:
    """`step     1,200  0:01:32  eval: true 0.90, gap +5.0 | time: steps/s 512`, in the order of GLOSSARY."""
    minutes, seconds = divmod(int(wall_s), 60)
    groups: dict[str, list[str]] = {}
    for name, tag in GLOSSARY.items():
        if name in metrics and tag.label:
            value = metrics[name]
            shown = format(value, tag.format) if math.isfinite(value) else str(value)
            groups.setdefault(name.partition("/")[0], []).append(f"{tag.label} {shown}")
    numbers = " | ".join(f"{group}: {', '.join(entries)}" for group, entries in groups.items())
    return f"step {step:>9,}  {minutes // 60}:{minutes % 60:02}:{seconds:02}  {numbers}".rstrip()


class RunLog:
    """The log of one run folder, to be used in a `with`. A folder used before is added to.

    `metrics.jsonl` holds a JSON object a line: `step`, `time/wall_s` (seconds since this log was opened) and
    the metrics, NaN and infinities as null. It is complete up to the last `log`, whatever follows.
    """

    def __init__(self, folder: str | Path, logger_backends: Sequence[str] = ("tensorboard",)):
        self.folder = Path(folder)
        self.logger_backends = tuple(logger_backends)

    def __enter__(self) -> "RunLog":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _open_tensorboard(self.folder) if "tensorboard" in self.logger_backends else None
        path = self.folder / "metrics.jsonl"
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # each line reaches the file at once
        self._start = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def log(self, step: int, metrics: dict[str, float], line: bool = True) -> None:
        """Record numbers (also 0-d tensors) under their tags; `line`: print the telling ones too.

        Raises ValueError for a tag that is not `group/name` with a group of GROUPS.
        """
        wall_s = time.monotonic() - self._start
        metrics = {tag: float(value) for tag, value in metrics.items()}
        for tag in metrics:
            group, slash, name = tag.partition("/")
            if group not in GROUPS or not slash or not name:
                raise ValueError(f"tag '{tag}' must be group/name with a group of {', '.join(GROUPS)}")
        self._file.write(to_json({"step": step, "time/wall_s": round(wall_s, 3), **metrics}) + "\n")
        if self._tensorboard is not None:
            for tag, value in metrics.items():
                self._tensorboard.add_scalar(tag, value, step)
        if line:
            self.say(progress_line(step, wall_s, metrics))

    def say(self, text: str) -> None:
        """Print a line above a tqdm bar, where there is one, and at once, also into a pipe."""
        tqdm.write(text)
        sys.stdout.flush()


def in_red(text: str) -> str:
    """For a terminal; in a file or a pipe the text as it is."""
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text


def _open_tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "logger_backends asks for tensorboard, which is not installed; `pip install tensorboard`, or set "
            "runner.logger.logger_backends=[]"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))


def _drop_torn_line(path: Path) -> None:
    """A run that was killed may have left half a line, which the next one would be glued to."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
