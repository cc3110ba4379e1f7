"""The report card of a trend model, in words, pictures and a file (numbers: common/trend_card.py).

`write_card` leaves a folder: `report.json` (all numbers), `controls.png` (what becomes of the score when the
windows are tampered with, and what needs no model), `confusion.png` and `examples.png`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from common.files import save_json
from common.log import in_red
from common.report import BLUE, GREY, RED, STYLE, draw_confusion, held_out, other_pictures, save_figure
from common.rewards import differences
from common.trend import LABELS
from common.trend_card import confusion_counts, trend_metrics, trend_scores
from common.windows import Frames, WindowSet

# ----------------------------------------------------------------------------------------------------
# Words


SCORES = {
    "macro_f1": "macro-F1",
    "f1_positive": "F1 of positive",
    "f1_negative": "F1 of negative",
    "f1_unclear": "F1 of unclear",
    "accuracy": "accuracy",
    "label_mass": "label mass",
    "calibration_error": "calibration error (ECE)",
    "kendall": "tau-b of episodes, success",
}


def card_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `trend_card.report_card` as text; red on a terminal is what the model should beat and does
    not."""
    columns = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "f1_negative": "negative F1",
        "called_positive": "called pos.",
        "called_negative": "called neg.",
    }
    told = f"{rows[0]['num_windows']:,} windows"
    lines = [f"{told:<26}" + "".join(f"{title:>13}" for title in columns.values())]
    for row in rows:
        numbers = "".join(f"{_number(row[key]):>13}" for key in columns)
        told = in_red(f"NOT BEATEN, should be {row['expected']}") if is_suspect(row) else row["expected"]
        lines.append(f"{row['control']:<26}{numbers}   {told}".rstrip())
    return "\n".join(lines)


def is_suspect(row: dict[str, Any]) -> bool:
    return row["beaten"] is False


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"  # None: nan, from a JSON file


def scores_table(card: dict[str, Any]) -> str:
    """What the card's numbers are of, and those of the windows as they are."""
    episodes = "unknown" if card["num_episodes"] is None else card["num_episodes"]
    lines = [
        f"report card: {card['num_windows']:,} windows of {episodes} episodes, {card['held_out']}",
        ", ".join(f"{count:,} {name}" for name, count in card["class_counts"].items())
        + f" ({card['prevalence_is']})",
        f"{'':<26}{'value':>13}   95 % interval, episodes drawn anew",
    ]
    for name, entry in card["scores"].items():
        lines.append(f"{SCORES[name]:<26}{_number(entry['value']):>13}   {_interval(entry)}")
    return "\n".join(lines)


def _interval(entry: dict[str, Any]) -> str:
    ends = entry["interval"]
    text = "unknown" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
    return text + (f"   (all pairs right, no ties: {entry['untied']:.3f})" if "untied" in entry else "")


# ----------------------------------------------------------------------------------------------------
# The folder


def write_card(
    label_prob: np.ndarray,
    windows: WindowSet,
    indices: np.ndarray,
    rows: list[dict[str, Any]],
    meta: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Write the folder and return the card.

    label_prob (len(indices), 3): what the model says of these windows; `rows`: those of its `report_card`;
    `meta`: its reward.json, {} without one.
    """
    label, info = windows.labels[indices], windows.info
    card = {
        "num_windows": len(indices),
        "num_episodes": None if windows.episode is None else len(np.unique(windows.episode[indices])),
        "data_sha256": windows.sha256,
        "held_out": held_out(windows.sha256, meta, "windows")
        + other_pictures(differences(meta, info.get("render"), info.get("control"), windows.views)),
        "prevalence_is": prevalence_of(info),
        "class_counts": dict(zip(LABELS, np.bincount(label, minlength=len(LABELS)).tolist(), strict=True)),
        "scores": trend_scores(label_prob, windows, indices),
        "confusion": confusion_counts(label_prob.argmax(1), label),
        "num_control_windows": rows[0]["num_windows"],
        "controls": rows,
        "beats_baselines": not any(is_suspect(row) for row in rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    plot_controls(rows, folder / "controls.png")
    plot_confusion(label_prob, label, folder / "confusion.png")
    plot_examples(label_prob, windows, indices, folder / "examples.png")
    save_json(card, folder / "report.json")
    return card


def prevalence_of(info: dict[str, Any]) -> str:
    """In words, of what the shares of the labels are the shares; info: dataset_info.json, {} without one."""
    if not info.keys() >= {"natural_eval", "balance_labels"}:
        return "as in the file, which does not say what was left out"
    if info["natural_eval"]:
        return "as often as they occur"
    if info["balance_labels"]:
        return "cut to equal numbers by preprocessing; its --natural-eval keeps them as often as they occur"
    return "as preprocessing cut them; its --natural-eval keeps them as often as they occur"


# ----------------------------------------------------------------------------------------------------
# Pictures


def plot_controls(rows: list[dict[str, Any]], path: Path) -> None:
    """Macro-F1 of the model, of tampered windows and of guesses, with intervals; red: NOT BEATEN."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            color = BLUE if place == 0 else RED if is_suspect(row) else GREY
            axes.barh(place, row["macro_f1"], color=color, height=0.65, alpha=1 if place == 0 else 0.6)
            if row["macro_f1_interval"] is not None:
                axes.plot(row["macro_f1_interval"], [place, place], color="black", linewidth=1)
            told = "NOT BEATEN" if is_suspect(row) else "" if row["beaten"] is None else "beaten"
            axes.text(1.02, place, told, color=color, va="center", fontsize=8)
        axes.axvline(rows[0]["macro_f1"], color=BLUE, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["control"] for row in rows])
        axes.set(
            xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="macro-F1, and its 95 % interval over episodes"
        )
        axes.set_axisbelow(True)
        axes.grid(visible=False, axis="y")
        told = f"{rows[0]['num_windows']:,} windows as they are, tampered with, and what needs no model"
        axes.set_title(told, loc="left")
    save_figure(figure, path)


def plot_confusion(label_prob: np.ndarray, label: np.ndarray, path: Path) -> None:
    """Counts of label against verdict, shaded by share of the label, with each label's F1."""
    import matplotlib
    from matplotlib.figure import Figure

    counts = confusion_counts(label_prob.argmax(1), label)
    card = trend_metrics(label_prob, label)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        draw_confusion(axes, counts, ".0%")
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
