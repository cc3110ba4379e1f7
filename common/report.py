"""Pictures of a run: learning curves, and the reward model's scores beside the truth.

Colours are Okabe and Ito's, which colour-blind readers tell apart too ("Color Universal Design", 2008): blue
is success and orange is failure everywhere, and no meaning hangs on a colour alone. Pictures take the format
of their suffix (.png, .pdf, .svg).
"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import atomic_write, new_run_dir
from common.runtime import UserError
from common.video import OPPOSITE, Trace

# What draws is imported where it is used: a spawned worker imports its script again and never draws.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
PALE_BLUE = "#D3E7F5"
RED = "#C00000"  # what a model does not beat; a word says it too

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # fonts that a publisher accepts, not matplotlib's default type 3
}
DPI = 180


# ----------------------------------------------------------------------------------------------------
# Learning curves

STEP_TICKS = {"nbins": 7, "steps": [1, 2, 2.5, 5, 10]}
SUCCESS_CURVES = [  # tag, label, style
    ("eval/true_success_once", "true, at least once", {"color": BLUE, "marker": "o"}),
    ("eval/true_success_at_end", "true, at the end", {"color": "#56B4E9", "marker": "^", "linestyle": "--"}),
    ("eval/learned_success", "by the reward model", {"color": ORANGE, "marker": "s", "linestyle": ":"}),
]
GAP_CURVES = [("eval/hack_gap", "learned - true", {"color": ORANGE, "marker": "s"})]
FALSE_POSITIVE_CURVES = [
    ("reward/false_positives_per_1000_steps", "in training", {"color": "#999999", "linewidth": 1}),
    ("eval/false_positives_per_1000_steps", "in evaluation", {"color": ORANGE, "marker": "s"}),
]


def plot_learning_curves(metrics_jsonl: Path, path: Path) -> None:
    """Draw a run's `metrics.jsonl`: how well it does, and how far its learned reward can be trusted."""
    save_figure(learning_figure(read_metrics(metrics_jsonl)), path)


def read_metrics(metrics_jsonl: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`, step rising. UserError if the file is missing or has no readable line.

    A line that a crash cut short is left out. A resumed run repeats the steps since its checkpoint: the later
    lines count, and what was logged of those steps before is dropped.
    """
    try:
        lines = Path(metrics_jsonl).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{metrics_jsonl}: no such file; a run writes it from its first log line") from error
    rows: list[dict] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        rows.append(row)
    if not rows:
        raise UserError(f"{metrics_jsonl} has no readable line; did the run stop before its first log line?")
    return rows


def curve(rows: list[dict], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a number for `tag`; the log writes nan as null."""
    points = [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def learning_figure(rows: list[dict]) -> "Figure":
    """Left the success rates over env steps, with wall seconds on top; right hack gap and false positives.

    A panel whose tags are all missing says so.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1])
        success = figure.add_subplot(grid[:, 0])
        gap = figure.add_subplot(grid[0, 1], sharex=success)
        false_positives = figure.add_subplot(grid[1, 1], sharex=success)

        _draw_curves(success, rows, SUCCESS_CURVES)
        _draw_curves(gap, rows, GAP_CURVES)
        _draw_curves(false_positives, rows, FALSE_POSITIVE_CURVES)
        success.set(xlabel="env steps", ylabel="success rate of an evaluation", ylim=(-0.03, 1.03))
        success.set_xlim(0, 1.03 * max(rows[-1]["step"], 1))
        success.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))
        success.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 5M
        gap.axhline(0, color=GREY, linewidth=0.8)
        gap.set_ylabel("hack gap\n(percentage points)")
        gap.tick_params(labelbottom=False)
        false_positives.set(xlabel="env steps", ylabel="false positives\nper 1,000 steps")
        false_positives.set_ylim(bottom=0)
        _add_wall_seconds(success, rows)
    return figure


def _draw_curves(axes: "Axes", rows: list[dict], curves: list[tuple[str, str, dict]]) -> None:
    for tag, label, style in curves:
        steps, values = curve(rows, tag)
        if len(steps):
            axes.plot(steps, values, label=label, **style)
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", color=GREY, ha="center", va="center", transform=axes.transAxes)
    elif len(curves) > 1:
        axes.legend(loc="best")


def _add_wall_seconds(axes: "Axes", rows: list[dict]) -> None:
    """A second x axis on top that says how long the run took to each labelled step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps, wall_s = curve(rows, "time/wall_s")
    if not len(steps):
        return
    # the clock of a resumed run may start anew; its time counts on from where the first one stood
    worked_s = np.diff(wall_s, prepend=0).clip(min=0).cumsum()

    def label(step: float, _position: int) -> str:
        return f"{np.interp(step, steps, worked_s):,.0f}" if steps[0] <= step <= steps[-1] else ""

    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))
    top.xaxis.set_major_formatter(FuncFormatter(label))
    top.set_xlabel("wall time (s)")


# ----------------------------------------------------------------------------------------------------
# Scores beside the truth

SCORE_OF = {"success": "success probability", "positive": "probability of positive"}
MAX_EPISODES, NUM_COLUMNS = 8, 4  # panels; the histogram counts all episodes


def plot_scores(traces: list[Trace], threshold: float, path: Path) -> None:
    """Draw the scores of the first 8 episodes beside the truth, and a histogram of all scores."""
    save_figure(score_figure(traces, threshold), path)


def score_figure(traces: list[Trace], threshold: float) -> "Figure":
    """A panel per episode (first and last frame, score, threshold, truth as shade), then the histogram."""
    import matplotlib
    from matplotlib.figure import Figure

    if not traces:
        raise ValueError("no episode to draw")
    shown = traces[:MAX_EPISODES]
    num_rows = math.ceil(len(shown) / NUM_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8 * num_rows + 2.3), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.8 * num_rows, 2.3])
        grid = top.add_gridspec(2 * num_rows, 2 * NUM_COLUMNS, height_ratios=[1.25, 1.2] * num_rows)
        for number, trace in enumerate(shown):
            row, column = divmod(number, NUM_COLUMNS)
            for place, t in enumerate((0, len(trace.frames) - 1)):
                axes = top.add_subplot(grid[2 * row, 2 * column + place])
                _draw_thumbnail(axes, trace.frames[t], trace.steps[t])
            axes = top.add_subplot(grid[2 * row + 1, 2 * column : 2 * column + 2])
            _draw_scores(axes, trace, threshold)
            axes.set_ylabel(SCORE_OF[trace.question] if column == 0 else "")
            axes.tick_params(labelleft=column == 0)
        top.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        _draw_histogram(bottom.add_subplot(), traces, threshold)
    return figure


def _draw_thumbnail(axes: "Axes", frame: np.ndarray, step: int) -> None:
    axes.imshow(frame)
    axes.set_axis_off()
    axes.set_title(f"step {step}", fontsize=8, color=GREY, pad=2)


def _draw_scores(axes: "Axes", trace: Trace, threshold: float) -> None:
    edges = np.append(trace.steps, trace.steps[-1] + 1) - 0.5
    # stairs, since fill_between draws nothing where a single step is true
    heights = np.where(trace.truth, 1.05, -0.05)
    axes.stairs(heights, edges, baseline=-0.05, fill=True, color=PALE_BLUE, label=f"truth: {trace.truth_of}")
    if trace.by_threshold:
        axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1, label=f"threshold {threshold:.3g}")
    axes.plot(trace.steps, trace.score, color="black", marker="o", markersize=2, label="model's score")
    wrong = trace.wrong(threshold)
    axes.plot(trace.steps[wrong], trace.score[wrong], "X", color=ORANGE, markersize=6, label="wrong verdict")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.05, 1.05), yticks=[0, 0.5, 1], xlabel="step")
    axes.set_title(trace.title, loc="left")
    axes.grid(visible=False)


def _draw_histogram(axes: "Axes", traces: list[Trace], threshold: float) -> None:
    question, truth_of = traces[0].question, traces[0].truth_of
    axes.set(xlim=(0, 1), xlabel=SCORE_OF[question], ylabel="frames")
    known = "" if all(trace.known.all() for trace in traces) else " where the truth is known"
    axes.set_title(f"All scored frames of {len(traces)} episodes{known}", loc="left")
    judged = [trace.scored & trace.known for trace in traces]
    if not any(frames.any() for frames in judged):
        axes.text(
            0.5,
            0.5,
            "no scored frame whose truth is known",
            color=GREY,
            ha="center",
            transform=axes.transAxes,
        )
        return
    both = list(zip(traces, judged, strict=True))
    score = np.concatenate([trace.score[frames] for trace, frames in both])
    truth = np.concatenate([trace.truth[frames] for trace, frames in both])
    verdict = np.concatenate([trace.verdict(threshold)[frames] for trace, frames in both])
    counts = {True: "", False: ""}
    if question == truth_of:
        counts[False] = f", {(verdict & ~truth).sum()} false positives"
        counts[True] = f", {(~verdict & truth).sum()} missed"
    for frames, color, hatch, label in (
        (
            ~truth,
            ORANGE,
            "////",
            f"truth: {OPPOSITE[truth_of]} ({(~truth).sum()} frames{counts[False]})",
        ),
        (truth, BLUE, None, f"truth: {truth_of} ({truth.sum()} frames{counts[True]})"),
    ):
        bins = np.linspace(0, 1, 41)
        axes.hist(
            score[frames],
            bins,
            histtype="stepfilled",
            fc=color,
            ec=color,
            alpha=0.55,
            hatch=hatch,
            label=label,
        )
    if traces[0].by_threshold:
        axes.axvline(threshold, color=GREY, linestyle="--", linewidth=1)
    axes.set_yscale("log")  # most frames are easy; the few that count would be too flat to see
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0.7)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


# ----------------------------------------------------------------------------------------------------
# Report cards


def report_parser(script: str, data: str) -> argparse.ArgumentParser:
    """Of `SCRIPT --report CHECKPOINT DATA ...`; `data` says what DATA is."""
    parser = argparse.ArgumentParser(
        prog=f"{script} --report", description="The report card of a checkpoint on data, without training."
    )
    parser.add_argument("checkpoint", help="what the training script wrote")
    parser.add_argument("data", nargs="+", help=data)
    parser.add_argument("--output-dir", help="new folder; default: logs/<date>-<time>-report")
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="key=value", help="how to load it, as in reward.model"
    )
    return parser


def parse_report_args(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """UserError, before anything is scored, where the folder cannot take a report."""
    args = parser.parse_args(argv)
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        for name, what in (("report.json", "a report"), ("summary.json", "a run")):
            if (folder / name).exists():
                raise UserError(f"{folder} holds {what} already; choose another --output-dir")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another --output-dir")
    return args


def new_report_dir(output_dir: str | None) -> Path:
    return new_run_dir(output_dir, "report")


UNSEEN = "no file of its training or validation"


def held_out(sha256: dict[str, str], meta: dict[str, Any], things: str) -> str:
    """What the model has had to do with these data before, in words.

    sha256: file -> hash of its content; meta: the model's reward.json; things: what the files hold.
    """
    if (known := meta.get("data_sha256")) is None:
        return f"whether it has seen these {things} is unknown"
    mine = set(sha256.values())
    if known.keys() != {"train", "val"}:  # older models do not tell the two apart
        seen = mine & set(known.values())
        return f"careful: {things} of its training or validation are among them" if seen else UNSEEN
    if mine & set(known["train"].values()):
        return f"careful: {things} of its training are among them"
    if shared := mine & set(known["val"].values()):
        if shared == mine:
            return f"its validation {things}, by which it was chosen"
        return f"careful: {things} of its validation are among them"
    return UNSEEN


def other_pictures(different: list[str]) -> str:
    """The first of `common.rewards.differences`, to go on with after `held_out`; "" without any."""
    if not different:
        return ""
    more = f", and {len(different) - 1} more" if different[1:] else ""
    return f";\ncareful: other pictures than it knows ({different[0]}{more})"


def draw_confusion(axes: "Axes", counts: np.ndarray, share_format: str) -> None:
    """counts (L, L): row the truth, column what it was called; each with its share of the row."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}\n{share[row, column]:{share_format}}",
            ha="center",
            va="center",
            color="white" if share[row, column] > 0.6 else "black",
        )
    axes.grid(visible=False)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write the picture in the format of its suffix, whole or not at all."""
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=DPI)
