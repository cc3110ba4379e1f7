"""What a trend model is worth on held-out windows, and what becomes of it when the windows are tampered with.

One accuracy says little: where things stand in the last frame alone gives much of the label away. So the
report card plays windows backwards, freezes and shuffles them, hides a view and empties the question: a model
that judges motion must answer otherwise then, each time in a way known in advance. And it sets beside the
model what can be guessed without one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import metrics
from common.baselines import compare, guess
from common.intervals import draw_episodes, interval_of
from common.runtime import UserError
from common.trend import LABELS, NEGATIVE, OPPOSITE, POSITIVE
from common.windows import Frames, WindowSet, frozen


class Scorer(Protocol):
    def score(self, frames: Frames, tasks: list[str] | None = None) -> Tensor:
        """label_prob (B, 3) of windows; a row's sum is at most 1."""


def natural_windows(windows: WindowSet) -> tuple[np.ndarray, str]:
    """(indices of the windows that nobody reversed, a warning or ""); all where those are of one label."""
    natural = np.flatnonzero(~windows.reversed)
    held = np.unique(windows.labels[natural])
    if len(held) < 2:
        return np.arange(len(windows)), "; warning: reversed ones are among them"
    lacking = [LABELS[label] for label in np.setdiff1d(windows.labels, held)]
    if lacking:
        return natural, f"; warning: none of the natural ones is {lacking[0]}, so that its F1 is unknown"
    return natural, ""


def some_of(indices: np.ndarray, count: int) -> np.ndarray:
    """`count` of them, drawn once, in order; all where that is below 1."""
    count = len(indices) if count < 1 else min(count, len(indices))
    return np.sort(np.random.default_rng(0).permutation(indices)[:count])


def score_windows(
    model: Scorer,
    windows: WindowSet,
    indices: np.ndarray,
    change: Callable[[Frames], Frames] = lambda frames: frames,
    blank_task: bool = False,
    chunk: int = 256,
) -> np.ndarray:
    """label_prob (len(indices), 3) by the online scorer. `chunk`: windows in memory at once."""
    prob = []
    for start in range(0, len(indices), chunk):
        part = indices[start : start + chunk]
        tasks = [""] * len(part) if blank_task else windows.tasks_of(part)
        prob.append(model.score(change(windows.windows(part)), tasks).numpy())
    return np.concatenate(prob)


# ----------------------------------------------------------------------------------------------------
# Numbers


def confusion_counts(verdict: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(3, 3) int64: [label, verdict] of (B,) indices into LABELS."""
    return np.bincount(label * len(LABELS) + verdict, minlength=len(LABELS) ** 2).reshape(len(LABELS), -1)


def f1_scores(counts: np.ndarray) -> np.ndarray:
    """(..., 3) F1 of each label in `confusion_counts` (..., 3, 3); nan for a label that no window has."""
    hits, num_label, num_called = counts.diagonal(axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    return np.where(num_label > 0, 2 * hits / np.maximum(num_label + num_called, 1), np.nan)


def trend_metrics(label_prob: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """loss (nats), accuracy, macro_f1 (mean over the labels that occur), f1_<label>, label_mass.

    label_prob (B, 3), label (B,). Raises UserError where a probability is no number.
    """
    if not np.isfinite(label_prob).all():
        raise UserError("a label's probability is not finite: the model diverged, so lower the learning rate")
    verdict = label_prob.argmax(1)
    f1 = f1_scores(confusion_counts(verdict, label))
    of_truth = label_prob[np.arange(len(label)), label].astype(np.float64)
    return {
        "loss": float(-np.log(of_truth.clip(min=1e-12)).mean()),
        "accuracy": float((verdict == label).mean()),
        "macro_f1": float(np.nanmean(f1)),
        **{f"f1_{name}": float(value) for name, value in zip(LABELS, f1, strict=True)},
        "label_mass": float(label_prob.sum(1).mean()),
    }


# ----------------------------------------------------------------------------------------------------
# The report card


def played_backwards(frames: Frames) -> Frames:
    return {view: images.flip(1) for view, images in frames.items()}


def shuffled(frames: Frames) -> Frames:
    """An order of frames drawn per window, the same in all views and at every call."""
    batch, size = next(iter(frames.values())).shape[:2]
    order = torch.rand(batch, size, generator=torch.Generator().manual_seed(0)).argsort(1)  # (B, K)
    return {view: images[torch.arange(batch)[:, None], order] for view, images in frames.items()}


def first_and_last(frames: Frames) -> Frames:
    """The first frame for the first half, the last one for the second: `[0, 0, 0, 4, 4]`."""
    size = next(iter(frames.values())).shape[1]
    order = [0 if index < (size + 1) // 2 else size - 1 for index in range(size)]
    return {view: images[:, order] for view, images in frames.items()}


def views_swapped(frames: Frames) -> Frames:
    """Each camera shows what the other one saw; both must be of one size."""
    return dict(zip(frames, reversed(frames.values()), strict=True))


def blacked_out(view: str) -> Callable[[Frames], Frames]:
    return lambda frames: {
        name: torch.zeros_like(images) if name == view else images for name, images in frames.items()
    }


class Control(NamedTuple):
    """A way to tamper with windows, and what a model that judges motion does then."""

    name: str
    expected: str
    change: Callable[[Frames], Frames] = lambda frames: frames
    blank_task: bool = False
    must_hurt: bool = False  # a model whose score does not fall does not look at what was taken away


CONTROLS = [
    Control("reversed", "far below normal", played_backwards, must_hurt=True),
    Control("shuffled frames", "below normal", shuffled, must_hurt=True),
    Control("frozen (last frame)", "none called positive", frozen, must_hurt=True),
    Control("first and last frame", "near normal: the label is their difference", first_and_last),
    Control("views swapped", "below normal", views_swapped, must_hurt=True),
    Control("main view black", "below normal where this view counts", blacked_out("main_images")),
    Control("extra view black", "below normal where this view counts", blacked_out("extra_view_images")),
    Control("no task text", "shows whether the task is read", blank_task=True),
]


class Table:
    """Rows of scores on the same windows, each compared with the first."""

    def __init__(self, label: np.ndarray, episode: np.ndarray | None):
        self.label = label
        self.episode = np.zeros(len(label), dtype=np.int64)
        if episode is not None:
            self.episode = np.unique(episode, return_inverse=True)[1]
        self.drawn = draw_episodes(int(self.episode.max()) + 1)  # none of a single one
        self.rows: list[dict[str, Any]] = []
        self._first: tuple[float, np.ndarray] | None = None

    def f1_of_resamples(self, verdict: np.ndarray, label: np.ndarray) -> np.ndarray:
        """(R, 3)."""
        size = len(LABELS) ** 2
        cell = self.episode * size + label * len(LABELS) + verdict
        counts = np.bincount(cell, minlength=self.drawn.shape[1] * size).reshape(-1, size)
        return f1_scores((self.drawn @ counts).reshape(-1, len(LABELS), len(LABELS)))

    def add(
        self,
        name: str,
        expected: str,
        label_prob: np.ndarray,
        must_lose: bool = False,
        label: np.ndarray | None = None,
    ) -> None:
        """`must_lose`: to the first row. Its `beaten` says whether it does; None where it need not."""
        label = self.label if label is None else label
        verdict, numbers = label_prob.argmax(1), trend_metrics(label_prob, label)
        f1 = self.f1_of_resamples(verdict, label)
        occurs = ~np.isnan(f1).all(1)
        resampled = np.full(len(f1), np.nan)
        resampled[occurs] = np.nanmean(f1[occurs], axis=1)
        score = (numbers["macro_f1"], resampled)
        self._first = self._first or score
        called = np.bincount(verdict, minlength=len(LABELS)) / len(label)
        shares = {f"called_{word}": float(share) for word, share in zip(LABELS, called, strict=True)}
        self.rows.append(
            {
                "control": name,
                "num_windows": len(label),
                **numbers,
                **shares,
                "macro_f1_interval": interval_of(resampled),
                "beaten": compare(name, self._first, score).beaten if must_lose else None,
                "expected": expected,
            }
        )


def report_card(
    model: Scorer,
    windows: WindowSet,
    indices: np.ndarray,
    controls: list[Control] = CONTROLS,
    label_prob: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """A row per control on these windows, then a row per guess that needs no model: name, expected, how many
    windows, what `trend_metrics` says, the shares of the calls, the interval of macro-F1 over episodes (None
    where they are unknown), and whether the model's own score beats it (None where it need not).

    label_prob (len(indices), 3): what the model says of them as they are; None: it is asked.
    The reversed windows have a second row, judged against flipped labels (positive <-> negative). The empty
    question has to hurt only where the windows show several tasks.
    """
    label = windows.labels[indices]
    table = Table(label, None if windows.episode is None else windows.episode[indices])
    table.add("normal", "", score_windows(model, windows, indices) if label_prob is None else label_prob)
    num_tasks = len(set(windows.tasks_of(indices)))
    for control in controls:
        if control.change is views_swapped and len({tuple(size) for size in windows.frame_size.values()}) > 1:
            continue
        prob = score_windows(model, windows, indices, control.change, control.blank_task)
        must_lose = control.must_hurt or (control.blank_task and num_tasks > 1)
        table.add(control.name, control.expected, prob, must_lose)
        if control.change is played_backwards:
            table.add("reversed, labels flipped", "near normal", prob, label=OPPOSITE[label])
    for name, prob in guesses(windows, indices).items():
        table.add(name, "below normal: it needs no model", prob, must_lose=True)
    return table.rows


def guesses(windows: WindowSet, indices: np.ndarray, chunk: int = 256) -> dict[str, np.ndarray]:
    """label_prob (len(indices), 3) of what needs no reward model: always the same word, the time of the
    window alone, the brightness of its first and last frame, and a linear look at a thumbnail of the last."""
    label = windows.labels[indices]
    episode = None if windows.episode is None else windows.episode[indices]
    commonest = np.bincount(label, minlength=len(LABELS)).argmax()
    always = np.eye(len(LABELS), dtype=np.float32)[np.full(len(label), commonest)]
    out = {f"always {LABELS[commonest]}": always}
    brightness, thumbnails = [], []
    for start in range(0, len(indices), chunk):
        frames = windows.windows(indices[start : start + chunk]).values()
        ends = [images[:, [0, -1]].float().mean((2, 3, 4)) for images in frames]
        brightness.append(torch.cat(ends, dim=1))
        last = [images[:, -1].permute(0, 3, 1, 2).float() for images in frames]
        thumbnails.append(torch.cat([F.adaptive_avg_pool2d(image, 8).flatten(1) for image in last], dim=1))
    if windows.start is not None:
        out["time alone"] = guess(windows.start[indices][:, None], label, episode, len(LABELS))
    out["brightness alone"] = guess(torch.cat(brightness).numpy(), label, episode, len(LABELS))
    out["last frame, 8x8, linear"] = guess(
        torch.cat(thumbnails).numpy(), label, episode, len(LABELS), linear=True
    )
    return out


def trend_scores(
    label_prob: np.ndarray, windows: WindowSet, indices: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Name -> {"value", "interval"}: macro-F1, F1 of each label, accuracy, label mass, calibration error of
    the likeliest label, Kendall's tau-b of the episodes' mean P(positive) - P(negative) with their success.

    label_prob (len(indices), 3). Intervals are over episodes, null where those are not known.
    """
    label = windows.labels[indices]
    table = Table(label, None if windows.episode is None else windows.episode[indices])
    table.add("normal", "", label_prob)
    (row,), drawn, episode = table.rows, table.drawn, table.episode
    verdict, sure = label_prob.argmax(1), label_prob.max(1)
    f1 = table.f1_of_resamples(verdict, label)
    right = verdict == label
    num_episodes, bins = drawn.shape[1], metrics.NUM_BINS

    def sums(cell: np.ndarray, column: np.ndarray, size: int) -> np.ndarray:  # (E, size)
        cell = episode * size + cell
        return np.bincount(cell, column, num_episodes * size).reshape(num_episodes, size)

    zero = np.zeros(len(label), dtype=np.int64)
    total, num_right, mass = (
        sums(zero, column, 1) for column in (np.ones(len(label)), right, label_prob.sum(1))
    )
    place = metrics.calibration_bins(sure)
    cells = [sums(place, column, bins) for column in (np.ones(len(label)), sure, right)]
    out = {"macro_f1": {"value": row["macro_f1"], "interval": row["macro_f1_interval"]}}
    for number, name in enumerate(LABELS):
        out[f"f1_{name}"] = {"value": row[f"f1_{name}"], "interval": interval_of(f1[:, number])}
    for name, column in (("accuracy", num_right), ("label_mass", mass)):
        ratio = (drawn @ column / (drawn @ total)).ravel()
        out[name] = {"value": row[name], "interval": interval_of(ratio)}
    error = float(metrics.calibration_error(*(column.sum(0) for column in cells)))
    errors = metrics.calibration_error(*(drawn @ column for column in cells))
    out["calibration_error"] = {"value": error, "interval": interval_of(errors)}
    if windows.episode is not None and windows.success is not None:
        lean = label_prob[:, POSITIVE] - label_prob[:, NEGATIVE]
        score = (sums(zero, lean, 1) / total).ravel()
        outcome = sums(zero, windows.success[indices], 1).ravel() > 0
        out["kendall"] = metrics.kendall_of_episodes(score, outcome, drawn)
    return out
