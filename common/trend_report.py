"""What a trend model is worth on held-out windows, and what becomes of it when the windows are tampered with.

One accuracy says little: where things stand in the last frame alone gives much of the label away. So the
report card plays windows backwards, freezes and shuffles them, hides a view and empties the question: a model
that judges motion must answer otherwise then, each time in a way known in advance.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from common.report import STYLE, save_figure
from common.runtime import UserError
from common.trend import LABELS, OPPOSITE
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
    """(3,) F1 of each label in `confusion_counts`; nan for a label that no window has."""
    hits, num_label, num_called = counts.diagonal(), counts.sum(1), counts.sum(0)
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


CONTROLS = [
    Control("reversed", "far below normal", played_backwards),
    Control("shuffled frames", "below normal", shuffled),
    Control("frozen (last frame)", "none called positive", frozen),
    Control("first and last frame", "near normal: the label is their difference", first_and_last),
    Control("views swapped", "below normal", views_swapped),
    Control("main view black", "below normal where this view counts", blacked_out("main_images")),
    Control("extra view black", "below normal where this view counts", blacked_out("extra_view_images")),
    Control("no task text", "shows whether the task is read", blank_task=True),
]


def report_card(
    model: Scorer, windows: WindowSet, indices: np.ndarray, controls: list[Control] = CONTROLS
) -> list[dict[str, Any]]:
    """A row per control on these windows: name, expected, what `trend_metrics` says, the shares of the calls.

    The reversed windows have a second row, judged against flipped labels (positive <-> negative). The last
    row is the best that one and the same answer to everything reaches.
    """
    label = windows.labels[indices]
    rows = [_row("normal", "", score_windows(model, windows, indices), label)]
    for control in controls:
        if control.change is views_swapped and len({tuple(size) for size in windows.frame_size.values()}) > 1:
            continue
        prob = score_windows(model, windows, indices, control.change, control.blank_task)
        rows.append(_row(control.name, control.expected, prob, label))
        if control.change is played_backwards:
            rows.append(_row("reversed, labels flipped", "near normal", prob, OPPOSITE[label]))
    commonest = np.bincount(label, minlength=len(LABELS)).argmax()
    always = np.eye(len(LABELS), dtype=np.float32)[np.full(len(label), commonest)]
    rows.append(_row(f"always {LABELS[commonest]}", "the floor", always, label))
    return rows


def _row(name: str, expected: str, label_prob: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    called = np.bincount(label_prob.argmax(1), minlength=len(LABELS)) / len(label)
    shares = {f"called_{word}": float(share) for word, share in zip(LABELS, called, strict=True)}
    return {"control": name, **trend_metrics(label_prob, label), **shares, "expected": expected}


def card_table(rows: list[dict[str, Any]]) -> str:
    """The report card as text, a line per row."""
    columns = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "f1_negative": "negative F1",
        "called_positive": "called pos.",
        "called_negative": "called neg.",
        "label_mass": "label mass",
    }
    lines = [f"{'held-out windows':<26}" + "".join(f"{title:>13}" for title in columns.values())]
    for row in rows:
        numbers = "".join(f"{row[key]:>13.3f}" for key in columns)
        lines.append(f"{row['control']:<26}{numbers}   {row['expected']}".rstrip())
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# Pictures


def plot_confusion(label_prob: np.ndarray, label: np.ndarray, path: Path) -> None:
    """Counts of label against verdict, shaded by share of the label, with each label's F1."""
    import matplotlib
    from matplotlib.figure import Figure

    counts = confusion_counts(label_prob.argmax(1), label)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    card = trend_metrics(label_prob, label)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            axes.text(
                column,
                row,
                f"{counts[row, column]}\n{share[row, column]:.0%}",
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.6 else "black",
            )
        axes.set_xticks(range(len(LABELS)), LABELS)
        axes.set_yticks(range(len(LABELS)), [f"{name}\nF1 {card[f'f1_{name}']:.2f}" for name in LABELS])
        axes.set(xlabel="the model's answer", ylabel="label")
        axes.set_title(
            f"{len(label)} windows, accuracy {card['accuracy']:.2f}, macro-F1 {card['macro_f1']:.2f}",
            loc="left",
        )
    save_figure(figure, path)


NUM_EXAMPLES = 4  # windows per row of the picture


def plot_examples(label_prob: np.ndarray, windows: WindowSet, indices: np.ndarray, path: Path) -> None:
    """Above windows that were judged right, below the surest mistakes: first, middle and last frame of the
    views, with label and probabilities. label_prob (len(indices), 3)."""
    import matplotlib
    from matplotlib.figure import Figure

    label, verdict = windows.labels[indices], label_prob.argmax(1)
    right, wrong = np.flatnonzero(verdict == label), np.flatnonzero(verdict != label)
    right = right[np.argsort(label[right], kind="stable")]  # spread over the labels
    right = right[np.linspace(0, len(right) - 1, min(NUM_EXAMPLES, len(right))).astype(int)]
    wrong = wrong[np.argsort(-label_prob[wrong].max(1), kind="stable")[:NUM_EXAMPLES]]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.6 * NUM_EXAMPLES, 5), layout="constrained")
        for top, chosen in enumerate((right, wrong)):
            for column, place in enumerate(chosen):
                axes = figure.add_subplot(2, NUM_EXAMPLES, top * NUM_EXAMPLES + column + 1)
                axes.imshow(_strip(windows.windows(indices[place : place + 1])))
                axes.set_axis_off()
                axes.set_title(_caption(label[place], label_prob[place]), loc="left", fontsize=8)
    save_figure(figure, path)


def _strip(frames: Frames) -> np.ndarray:
    """One picture (h, w, 3) of one window: a row per view of its first, middle and last frame."""
    rows = []
    for images in frames.values():
        size = images.shape[1]
        shown = images[0, [0, size // 2, size - 1]].numpy()
        gap = max(images.shape[3] // 32, 1)
        framed = np.pad(shown, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
        rows.append(np.concatenate(framed, axis=1))
    width = max(row.shape[1] for row in rows)
    white = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(white)


def _caption(label: int, label_prob: np.ndarray) -> str:
    verdict = LABELS[label_prob.argmax()]
    said = "right" if verdict == LABELS[label] else f"called {verdict}"
    probabilities = ", ".join(f"{name[:3]} {p:.2f}" for name, p in zip(LABELS, label_prob, strict=True))
    return f"{LABELS[label]}: {said}\n{probabilities}"
