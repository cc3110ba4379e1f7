"""The report card of a success classifier, in words, pictures and a file (numbers: common/frame_card.py).

`write_card` leaves a folder: `report.json` (all numbers), `card.png` (the same to look at) and `errors.png`
(the failures that score highest and the successes that score lowest).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import save_json
from common.frame_card import NUM_WORST, ScoredFrames, frame_card, worst
from common.frames import FrameSet
from common.log import in_red
from common.metrics import threshold_is
from common.report import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    STYLE,
    draw_confusion,
    held_out,
    other_pictures,
    save_figure,
)
from common.rewards import differences, reaches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ----------------------------------------------------------------------------------------------------
# Words

SCORES = {
    "auprc": "AUPRC",
    "roc_auc": "ROC-AUC",
    "calibration_error": "calibration error (ECE)",
    "precision": "precision",
    "recall": "recall",
    "false_positive_rate": "false positives / 1,000",
    "kendall_once": "tau-b of highest scores",
    "kendall_at_end": "tau-b of last scores",
}


def card_table(card: dict[str, Any]) -> str:
    """The card as text; what the model does not beat is red on a terminal."""
    episodes = f"{card['num_episodes']} episodes"
    if card["num_episodes"] is None:
        episodes = "unknown episodes (made by an older preprocess_resnet.py, or by others: no intervals)"
    lines = [
        f"report card: {card['num_frames']:,} frames of {episodes}, {card['prevalence']:.1%} successes "
        f"({card['prevalence_is']})",
        f"{card['held_out']}; threshold {card['threshold']:.3f}, {card['threshold_is']}",
        f"{'':<26}{'value':>8}   95 % interval, episodes drawn anew",
    ]
    for name, title in SCORES.items():
        if name in card["scores"]:
            lines.append(f"{title:<26}{_shown(name, card['scores'][name])}")
    right, false, missed, none = card["confusion"].values()
    lines.append(f"{right} successes found, {missed} missed; {false} false positives, {none} failures named")
    lines.append("without a model, by AUPRC:")
    for row in card["baselines"]:
        verdict = "beaten" if row["beaten"] else in_red("NOT BEATEN: it needs no model")
        lines.append(f"{row['name']:<26}{row['score']:>8.3f}   {verdict}")
    return "\n".join(lines)


def side_by_side(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Two models on the same validation frames, which neither has learned from, and on the frames that were
    added to the training data, which the new one has.

    old, new: `threshold`, `scores` of a `frame_card`, and `added`: `metrics.Counts` as a dict, or None.
    """
    lines = [
        f"{'of the same frames':<26}{'old':<30}new",
        f"{'threshold':<26}{old['threshold']:<30.3f}{new['threshold']:.3f}",
    ]
    for name in SCORES:
        if name in old["scores"]:
            cells = ["{} ({})".format(*_texts(name, model["scores"][name])) for model in (old, new)]
            lines.append(f"{SCORES[name]:<26}{cells[0]:<30}{cells[1]}")
    for title, model in (("old", old), ("new", new)):
        if model["added"] is not None:
            found, false, missed, named = model["added"].values()
            lines.append(
                f"added frames, learned from by the new model: {title} calls {false} of {false + named} "
                f"failures a success and misses {missed} of {missed + found} successes"
            )
    return "\n".join(lines)


def _shown(name: str, entry: dict[str, Any]) -> str:
    value, interval = _texts(name, entry)
    untied = f"   (all pairs right, no ties: {entry['untied']:.3f})" if "untied" in entry else ""
    return f"{value:>8}   {interval}{untied}"


def _texts(name: str, entry: dict[str, Any]) -> tuple[str, str]:
    """(value, interval)"""
    scale, form = (1000, ".1f") if name == "false_positive_rate" else (1, ".3f")
    ends = entry["interval"]
    interval = "unknown" if ends is None else " to ".join(format(scale * end, form) for end in ends)
    return format(scale * entry["value"], form), interval


# ----------------------------------------------------------------------------------------------------
# The folder


def write_card(
    success_prob: np.ndarray, frames: FrameSet, meta: dict[str, Any], threshold: float, folder: Path
) -> dict[str, Any]:
    """Write the folder and return the card.

    success_prob (B,): what the model says of `frames`; `meta`: its reward.json, {} without one.
    """
    scored = ScoredFrames.of(frames, success_prob)
    card = {
        "data_sha256": frames.sha256,
        "held_out": held_out(frames.sha256, meta, "frames")
        + other_pictures(differences(meta, frames.render, None, frames.views)),
        "prevalence_is": frames.prevalence,
        "threshold_is": threshold_is(meta, threshold),
        **frame_card(scored, threshold),
    }
    called = reaches(scored.success_prob, threshold)
    rows = {"false_positives": worst(scored, False), "false_negatives": worst(scored, True)}
    card["worst"] = {
        name: [
            {
                "success_prob": float(scored.success_prob[index]),
                "called_success": bool(called[index]),
                "episode": None if frames.episode is None else int(frames.episode[index]),
                "step": None if frames.step is None else int(frames.step[index]),
            }
            for index in indices
        ]
        for name, indices in rows.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _draw_card(card, scored, folder / "card.png")
    _draw_errors(card, frames, list(rows.values()), folder / "errors.png")
    save_json(card, folder / "report.json")
    return card


# ----------------------------------------------------------------------------------------------------
# Pictures


def _draw_card(card: dict[str, Any], scored: ScoredFrames, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 6.8), layout="constrained")
        places = figure.subplots(2, 3, height_ratios=[1.2, 1], width_ratios=[1, 1.1, 1])
        _draw_precision_recall(places[0, 0], card, scored)
        _draw_reliability(places[0, 1], card)
        _draw_confusion(places[0, 2], card)
        _draw_histogram(places[1, 0], card, scored)
        _draw_scores(places[1, 1], card)
        _draw_baselines(places[1, 2], card)
        episodes = card["num_episodes"] or "unknown"
        figure.suptitle(
            f"{card['num_frames']:,} frames, {episodes} episodes, {card['prevalence']:.1%} successes: "
            f"{card['held_out']}\nThreshold {card['threshold']:.3f}, {card['threshold_is']}",
            fontsize=9,
            x=0.01,
            ha="left",
        )
    save_figure(figure, path)


def _draw_precision_recall(axes: "Axes", card: dict[str, Any], scored: ScoredFrames) -> None:
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(
        scored.label, scored.success_prob, sample_weight=scored.weight
    )
    axes.step(recall, precision, where="post", color=BLUE, label="the model", clip_on=False)
    axes.axhline(card["prevalence"], color=GREY, linestyle="--", linewidth=1, label="called at random")
    chosen = [card["scores"][name]["value"] for name in ("recall", "precision")]
    axes.plot(*chosen, "o", color=ORANGE, markersize=6, label="at the threshold", clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"Precision and recall, AUPRC {card['scores']['auprc']['value']:.3f}", loc="left")
    axes.legend(loc="lower left")


def _draw_reliability(axes: "Axes", card: dict[str, Any]) -> None:
    said, came_true, share = (
        np.array([row[key] for row in card["calibration"]]) for key in ("said", "came_true", "share")
    )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="as often as it says")
    axes.plot(said, came_true, color=BLUE, linewidth=1)
    axes.scatter(
        said, came_true, 12 + 250 * share, color=BLUE, alpha=0.7, label="15 bins, area: frames", clip_on=False
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="success probability said", ylabel="share that came true")
    error = card["scores"]["calibration_error"]["value"]
    axes.set_title(f"Reliability, calibration error {error:.3f}", loc="left")
    axes.legend(loc="upper left")


def _draw_confusion(axes: "Axes", card: dict[str, Any]) -> None:
    right, false, missed, none = card["confusion"].values()
    counts = np.array([[none, false], [missed, right]])
    draw_confusion(axes, counts, ".1%")
    axes.set_xticks([0, 1], ["called a failure", "called a success"])
    axes.set_yticks([0, 1], ["failure", "success"], rotation=90, va="center")
    axes.set_title("Frames at the threshold", loc="left")


def _draw_histogram(axes: "Axes", card: dict[str, Any], scored: ScoredFrames) -> None:
    for label, color, hatch, name in ((False, ORANGE, "////", "failures"), (True, BLUE, None, "successes")):
        axes.hist(
            scored.success_prob[scored.label == label],
            np.linspace(0, 1, 31),
            histtype="stepfilled",
            facecolor=color,
            edgecolor=color,
            alpha=0.55,
            hatch=hatch,
            label=name,
        )
    axes.axvline(card["threshold"], color=GREY, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(0, 1), xlabel="success probability", ylabel="frames", ylim=(0.7, None))
    axes.set_axisbelow(True)
    axes.set_title("Scores", loc="left")
    axes.legend(loc="upper center")


def _draw_scores(axes: "Axes", card: dict[str, Any]) -> None:
    """The table of scores with their intervals."""
    axes.set_axis_off()
    axes.set_title("Scores, and 95 % intervals over episodes", loc="left")
    place = {"fontsize": 8, "va": "top", "transform": axes.transAxes}
    for row, (name, entry) in enumerate(card["scores"].items()):
        value, interval, *untied = _shown(name, entry).strip().split("   ")
        y = 0.97 - row * 0.115
        axes.text(0, y, SCORES[name], **place)
        axes.text(0.62, y, value.strip(), ha="right", **place)
        axes.text(0.66, y, interval, color=GREY, **place)
    if untied:
        axes.text(0.66, y - 0.1, f"right, untied: {entry['untied']:.3f}", color=GREY, **place)


def _draw_baselines(axes: "Axes", card: dict[str, Any]) -> None:
    rows = [{"name": "the model", **card["scores"]["auprc"], "beaten": True}]
    rows += [{"value": row["score"], **row} for row in card["baselines"]]
    for place, row in enumerate(rows):
        ends = row["interval"] or (row["value"], row["value"])
        color = BLUE if place == 0 else GREY if row["beaten"] else RED
        axes.barh(place, row["value"], color=color, height=0.6)
        axes.plot(ends, [place, place], color="black", linewidth=1)
        verdict = "" if row["beaten"] else "  NOT BEATEN"
        axes.text(
            0.02, place + 0.42, f"{row['name']}  {row['value']:.3f}{verdict}", fontsize=8, va="center",
            color="black" if row["beaten"] else RED,
        )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.5), yticks=[], xlabel="AUPRC")
    axes.set_axisbelow(True)
    axes.set_title("Beside what needs no model", loc="left")


def _draw_errors(card: dict[str, Any], frames: FrameSet, rows: list[np.ndarray], path: Path) -> None:
    """Above the failures that score highest, below the successes that score lowest."""
    import matplotlib
    from matplotlib.figure import Figure

    titles = ("Failures that score highest", "Successes that score lowest")
    height, width = _one_picture(frames.images[0].numpy()).shape[:2]
    inches = (1.75 * NUM_WORST, 2 * (1.75 * height / width + 0.65))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=inches, layout="constrained")
        parts = figure.subfigures(2, 1)
        for part, title, indices, told in zip(parts, titles, rows, card["worst"].values(), strict=True):
            part.suptitle(f"{title} (threshold {card['threshold']:.3f})", x=0.01, ha="left", fontsize=9)
            places = part.subplots(1, NUM_WORST)
            for axes in places:
                axes.set_axis_off()
            for axes, index, row in zip(places, indices, told, strict=False):
                axes.imshow(_one_picture(frames.images[index].numpy()))
                wrong = row["called_success"] != bool(frames.labels[index])
                where = "" if row["episode"] is None else f"\nepisode {row['episode']}, frame {row['step']}"
                axes.set_title(
                    f"{row['success_prob']:.3f}{' wrong' if wrong else ''}{where}",
                    loc="left",
                    fontsize=8,
                    color=RED if wrong else "black",
                )
    save_figure(figure, path)


def _one_picture(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) as it is; several views (V, H, W, 3) below each other."""
    return image if image.ndim == 3 else np.concatenate(list(image))
