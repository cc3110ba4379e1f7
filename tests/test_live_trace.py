"""common/live_trace.py: numbers of a live session that can be counted by hand."""

import json
import re

import numpy as np
import pytest

from common.live_trace import (
    ARRAYS,
    UNKNOWN,
    LiveTrace,
    detection_lags,
    flicker_per_min,
    live_metrics,
    timing,
)
from common.session import Moment

X = UNKNOWN


def arrays(truth, verdict, episode=None, prob=None, time_s=None) -> dict[str, np.ndarray]:
    n = len(truth)
    columns = {
        "time_s": np.arange(n) / 10 if time_s is None else time_s,
        "episode": [0] * n if episode is None else episode,
        "step": range(1, n + 1),
        "prob": np.where(verdict, 0.9, 0.1) if prob is None else prob,
        "verdict": verdict,
        "truth": truth,
        "in_zone": [False] * n,
    }
    return {name: np.array(columns[name], kind) for name, kind in ARRAYS.items()}


def test_precision_and_recall_are_over_marked_steps():
    out = live_metrics(arrays([X, 0, 0, 1, 1, 1, X], [1, 1, 0, 0, 1, 1, 0]))
    assert (out["num_steps"], out["num_marked"], out["num_success"]) == (7, 5, 3)
    assert out["precision"] == pytest.approx(2 / 3) and out["recall"] == pytest.approx(2 / 3)
    assert out["false_positives_per_1000_steps"] == pytest.approx(200)
    assert out["lag_s"] == pytest.approx(0.1) and out["successes_missed"] == 0
    assert out["late_share"] == 0


def test_nothing_marked_and_nobody_judging_is_no_number():
    out = live_metrics(arrays([X, X, X], [0, 0, 0], prob=[np.nan] * 3))
    for name in ("precision", "recall", "lag_s", "flicker_per_min", "late_share"):
        assert out[name] is None, name


def test_late_verdicts_are_counted_and_detect_nothing():
    out = live_metrics(arrays([0, 1, 1, 1], [0, 0, 0, 1], prob=[0.1, np.nan, np.nan, 0.8]))
    assert out["late_share"] == 0.5
    assert out["lag_s"] == pytest.approx(0.2)


def test_lag_is_measured_from_each_success_within_its_own_stretch():
    lags, missed = detection_lags(arrays([0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1]))
    assert lags == [pytest.approx(0.1)] and missed == 1
    lags, missed = detection_lags(arrays([1, 1, 1, 1], [0, 0, 0, 1], episode=[0, 0, 1, 1]))
    assert lags == [pytest.approx(0.1)] and missed == 1  # the verdict of another episode detects nothing


def test_flicker_leaves_out_the_detection_and_what_follows_the_truth():
    # one second of success: found after 0.3 s, lost and found again: two changes too many
    truth, verdict = [1] * 11, [0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1]
    assert flicker_per_min(arrays(truth, verdict)) == pytest.approx(60 * 2 / 1.0)
    assert flicker_per_min(arrays([0] * 6 + [1] * 6, [0] * 6 + [1] * 6)) == 0
    # falling is detection too: the verdict may go on for a while after the truth has ended
    assert flicker_per_min(arrays([1] * 6 + [0] * 6, [1] * 7 + [0] * 5)) == 0


def test_the_clock_leaves_out_resets_and_pauses():
    time_s = [0.0, 0.1, 0.2, 0.31, 5.0, 5.1, 9.0, 9.1]  # a pause before 5.0, a reset before 9.0
    out = timing(arrays([X] * 8, [0] * 8, episode=[0] * 6 + [1] * 2, time_s=time_s))
    assert out["rate_hz"] == pytest.approx(1 / np.mean([0.1, 0.1, 0.11, 0.1, 0.1]))
    assert 5 < out["period_error_p99_ms"] <= 10


def test_a_trace_keeps_all_rows_and_the_last_frames(tmp_path):
    trace = LiveTrace(num_frames=8)
    for t in range(12):
        frame = np.full((32, 32, 3), 10 * t, np.uint8)
        info = {"success_prob": None if t == 3 else t / 12, "verdict": t > 8, "in_zone": t > 6}
        shown = {"main_images": frame, "extra_view_images": frame}
        moment = Moment(t // 6, t % 6 + 1, shown, 0.0, info, [], t % 6 == 5)
        trace.add(moment, X if t == 7 else int(t > 6), time_s=t / 10)
    trace.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz") as saved:
        assert {name: saved[name].dtype for name in saved} == {n: np.dtype(k) for n, k in ARRAYS.items()}
        assert np.isnan(saved["prob"]).tolist() == [t == 3 for t in range(12)]
        assert saved["truth"].tolist() == [0] * 7 + [X] + [1] * 4
    trace.draw(tmp_path, threshold=0.5, rate_hz=10)
    assert (tmp_path / "trace.mp4").stat().st_size > 0 and (tmp_path / "scores.png").stat().st_size > 0
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "traces.html").read_text())[1]
    # of 12 steps the last 8: two of the first episode; the second has a false positive
    second, first = json.loads(data)["episodes"]
    assert (first["title"], first["first_step"], len(first["truth"])) == ("episode 0", 5, 2)
    assert (second["title"], second["first_step"], len(second["truth"])) == ("episode 1", 1, 6)
    assert second["truth"] == [False, None, True, True, True, True]
    assert second["score"] == [round(t / 12, 4) for t in range(6, 12)]
    assert [view["name"] for view in second["views"]] == ["main camera", "second camera"]
