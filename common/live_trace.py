"""What happened in a live session, step by step, and what the verdicts were worth against the marks.

Precision and recall are over marked steps. A verdict that was late counts as no success, as the arm takes it.
"""

import itertools
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from common.episodes import VIEWS
from common.files import atomic_write
from common.metrics import Counts
from common.report import plot_scores
from common.session import Moment
from common.trace_page import save_trace_page
from common.video import Trace, save_video

UNKNOWN = -1  # truth that nobody has marked

# Number in summary.json -> unit, those that the operator is told.
REPORTED = {
    "precision": "",
    "recall": "",
    "false_positives_per_1000_steps": "",
    "lag_s": "s from a success to its verdict, median",
    "successes_missed": "successes without one",
    "flicker_per_min": "changes of the verdict while the truth stayed",
    "late_share": "of the verdicts came late",
    "rate_hz": "steps per second",
    "period_error_p99_ms": "ms, p99 of what a period was off",
}
ARRAYS = {
    "time_s": np.float64,  # monotonic, when the step was over
    "episode": np.int64,
    "step": np.int64,
    "prob": np.float32,  # nan: late, or nobody judges
    "verdict": bool,
    "truth": np.int8,  # 1 success, 0 none, UNKNOWN
    "in_zone": bool,  # at the target pose
}


class LiveTrace:
    """Rows of all steps, and the frames of the last `num_frames`, of the main camera and a second one."""

    def __init__(self, num_frames: int):
        self._rows: list[tuple] = []
        self._frames: deque[dict[str, np.ndarray]] = deque(maxlen=num_frames)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, moment: Moment, truth: int, time_s: float) -> None:
        prob = moment.info.get("success_prob")
        verdict = bool(moment.info.get("verdict", False))
        prob = np.nan if prob is None else prob
        in_zone = moment.info["in_zone"]
        self._rows.append((time_s, moment.episode, moment.step, prob, verdict, truth, in_zone))
        if "main_images" in moment.frames:
            self._frames.append({view: moment.frames[view] for view in VIEWS if view in moment.frames})

    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> (T,), see ARRAYS."""
        columns = zip(*self._rows, strict=True)
        return {name: np.array(c, kind) for (name, kind), c in zip(ARRAYS.items(), columns, strict=True)}

    def save(self, path: Path) -> None:
        """All rows, for `numpy.load`."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **self.arrays())

    def draw(self, folder: Path, threshold: float, rate_hz: float) -> None:
        """traces.html, trace.mp4 and scores.png of the last frames, an episode each."""
        if not self._frames:
            return
        arrays = {name: column[-len(self._frames) :] for name, column in self.arrays().items()}
        frames = {view: np.stack([shown[view] for shown in self._frames]) for view in self._frames[0]}
        traces = []
        for episode in np.unique(arrays["episode"]):
            mine = arrays["episode"] == episode
            truth = arrays["truth"][mine]
            trace = Trace(
                frames["main_images"][mine],
                arrays["prob"][mine],
                truth == 1,
                f"episode {episode}",
                said=arrays["verdict"][mine],
                known=truth != UNKNOWN,
                extra_frames=frames["extra_view_images"][mine] if "extra_view_images" in frames else None,
                first_step=int(arrays["step"][mine][0]),
            )
            traces.append(trace)
        note = f"The last {len(self._frames)} steps of the session."
        save_trace_page(traces, threshold, folder / "traces.html", str(folder), rate_hz, note)
        save_video(traces, threshold, folder / "trace.mp4", round(rate_hz))
        plot_scores(traces, threshold, folder / "scores.png")


def live_metrics(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `summary.json` holds; None where nothing was there to be measured. arrays: `LiveTrace.arrays`."""
    truth, verdict = arrays["truth"], arrays["verdict"]
    marked = truth != UNKNOWN
    hit, said = truth[marked] == 1, verdict[marked]
    counts = Counts(
        int((said & hit).sum()), int((said & ~hit).sum()), int((~said & hit).sum()), int((~said & ~hit).sum())
    )
    judged = np.isfinite(arrays["prob"])
    lags, missed = detection_lags(arrays)
    out: dict[str, Any] = {
        "num_steps": len(truth),
        "num_episodes": len(np.unique(arrays["episode"])),
        "num_marked": int(marked.sum()),
        "num_success": int(hit.sum()),
        "precision": counts.precision if said.any() else None,
        "recall": counts.recall if hit.any() else None,
        "false_positives_per_1000_steps": 1000 * counts.false_positives / max(marked.sum(), 1),
        "lag_s": float(np.median(lags)) if lags else None,
        "successes_missed": missed,
        "flicker_per_min": flicker_per_min(arrays),
        "late_share": float(1 - judged.mean()) if judged.any() else None,
    }
    return out | timing(arrays)


def detection_lags(arrays: dict[str, np.ndarray]) -> tuple[list[float], int]:
    """(s from the begin of each stretch of success to its first verdict, stretches without one)."""
    lags, missed = [], 0
    for stretch in _stretches(arrays):
        if arrays["truth"][stretch.start] != 1:
            continue
        seen = np.flatnonzero(arrays["verdict"][stretch])
        if len(seen):
            times_s = arrays["time_s"][stretch]
            lags.append(float(times_s[seen[0]] - times_s[0]))
        else:
            missed += 1
    return lags, missed


def flicker_per_min(arrays: dict[str, np.ndarray]) -> float | None:
    """Changes of the verdict within stretches of one truth, beyond the first one of each success, per minute
    of those stretches. The first one is the detection."""
    changes, seconds = 0, 0.0
    for stretch in _stretches(arrays):
        verdict, times_s = arrays["verdict"][stretch], arrays["time_s"][stretch]
        turned = int((verdict[1:] != verdict[:-1]).sum())
        is_success = arrays["truth"][stretch.start] == 1
        settles = 1 if (not verdict[0] if is_success else verdict[0]) else 0
        changes += max(0, turned - settles)
        seconds += float(times_s[-1] - times_s[0])
    return 60 * changes / seconds if seconds > 0 else None


def _stretches(arrays: dict[str, np.ndarray]) -> list[slice]:
    """Runs of steps of one episode and one known truth."""
    truth, episode = arrays["truth"], arrays["episode"]
    borders = np.flatnonzero((truth[1:] != truth[:-1]) | (episode[1:] != episode[:-1])) + 1
    edges = [0, *borders.tolist(), len(truth)]
    runs = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return [run for run in runs if run.stop > run.start and truth[run.start] != UNKNOWN]


def timing(arrays: dict[str, np.ndarray]) -> dict[str, float | None]:
    """rate_hz and period_error_p99_ms, within episodes: resets and pauses (over 3 periods) are left out."""
    period_s = np.diff(arrays["time_s"])[np.diff(arrays["episode"]) == 0]
    if len(period_s) < 2:
        return {"rate_hz": None, "period_error_p99_ms": None}
    usual_s = float(np.median(period_s))
    kept = period_s[period_s < 3 * usual_s]
    error_s = np.abs(kept - usual_s)
    return {
        "rate_hz": float(1 / kept.mean()) if kept.mean() > 0 else None,
        "period_error_p99_ms": 1000 * float(np.quantile(error_s, 0.99)),
    }
