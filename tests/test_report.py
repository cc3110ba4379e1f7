"""The pictures hold what the data say: videos and figures are read back, not only made."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from common.report import learning_figure, plot_learning_curves, plot_scores, read_metrics, score_figure
from common.runtime import UserError
from common.video import STRIP_HEIGHT, Trace, save_video, video_pictures

NAN = float("nan")
WHITE_BAR = 39  # row of the strip through the middle of the bar
VERDICT, TRUTH = (68, 18), (68, 156)  # row of the strip and column: centres of the two squares


def trace(prob: list[float], truth: list[int], size: tuple[int, int] = (6, 8), title: str = "toy") -> Trace:
    """Frame t is one grey of its own, so that a video read back tells which frame is where."""
    frames = np.zeros((len(prob), *size, 3), np.uint8)
    frames += (40 * np.arange(1, len(prob) + 1, dtype=np.uint8))[:, None, None, None]
    return Trace(frames, np.array(prob, np.float32), np.array(truth, bool), title)


def is_bright(pixel: np.ndarray) -> bool:
    return int(pixel.max()) > 150


def lines_of(axes) -> dict[str, list]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


# ----------------------------------------------------------------------------------------------------
# Video


def test_video_read_back_holds_every_frame_enlarged_and_the_last_ones_held(tmp_path: Path):
    path = tmp_path / "eval.mp4"
    save_video([trace([0.1, 0.2, 0.9], [0, 0, 1]), trace([0.3, NAN], [0, 0])], 0.5, path, fps=4)
    video = iio.imread(path)
    # 8 x 6 pixels times 48; 3 + 2 frames and twice half a second at 4 per second
    assert video.shape == (3 + 2 + 2 + 2, 6 * 48 + STRIP_HEIGHT, 384, 3)
    greys = video[:, 100, 200, 0].astype(int)
    assert np.abs(greys - [40, 80, 120, 120, 120, 40, 80, 80, 80]).max() <= 4
    assert iio.immeta(path)["fps"] == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.mp4"]


def test_video_has_even_sides_whatever_the_frames_have(tmp_path: Path):
    save_video([trace([0.5], [1], size=(7, 77))], 0.5, tmp_path / "odd.mp4", fps=2)
    assert iio.imread(tmp_path / "odd.mp4").shape == (2, (7 * 5 + STRIP_HEIGHT) // 2 * 2, 384, 3)


def test_video_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "eval.mp4"
    save_video([trace([0.5], [1])], 0.5, path, fps=2)
    before = path.read_bytes()

    def break_down(*_):
        yield np.zeros((10, 10, 3), np.uint8)
        raise RuntimeError("renderer lost")

    monkeypatch.setattr("common.video.video_pictures", lambda *_, **__: break_down())
    with pytest.raises(RuntimeError, match="renderer lost"):
        save_video([trace([0.5], [1])], 0.5, path, fps=2)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("reads", ["cat > /dev/null; ", ""], ids=["after all frames", "before the first"])
def test_video_that_ffmpeg_gives_up_on_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str):
    # imageio's writer ignores the exit code: on a full disk it leaves half a video and says nothing
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{reads}echo 'No space left on device' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(UserError, match=r"eval\.mp4: ffmpeg stopped with code 3: No space left on device"):
        save_video([trace([0.5], [1])], 0.5, tmp_path / "out" / "eval.mp4", fps=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_strip_shows_score_verdict_and_truth():
    shown = trace([0.25, 0.5, 0.75, NAN], [0, 0, 1, 1])
    strips = [picture[-STRIP_HEIGHT:] for picture in video_pictures([shown], 0.5, num_held=0)]
    squares = [(is_bright(strip[VERDICT]), is_bright(strip[TRUTH])) for strip in strips]
    # filled is success; 0.5 reaches a threshold of 0.5, and a frame without a score has no verdict
    assert squares == [(False, False), (True, False), (True, True), (False, True)]
    bar_width = 384 - 165
    for strip, prob in zip(strips, (0.25, 0.5, 0.75, 0.0), strict=True):
        lit = [is_bright(pixel) for pixel in strip[WHITE_BAR, 10 : 10 + bar_width]]
        tick = bar_width // 2
        lit[tick - 3 : tick + 4] = [prob > 0.5] * 7
        assert sum(lit) == pytest.approx(prob * bar_width, abs=4)
        assert is_bright(strip[29, 10 + tick]) or is_bright(strip[29, 11 + tick])  # the threshold's tick


def test_video_refuses_frames_of_two_sizes_and_none(tmp_path: Path):
    two = [trace([0.5], [1]), trace([0.5], [1], size=(8, 8))]
    with pytest.raises(ValueError, match=r"one size, got \[\(6, 8\), \(8, 8\)\]"):
        save_video(two, 0.5, tmp_path / "x.mp4", fps=2)
    with pytest.raises(ValueError, match="one size"):
        save_video([], 0.5, tmp_path / "x.mp4", fps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((2, 4, 4, 3), np.float32)}, "uint8"),
        ({"score": np.zeros(3, np.float32)}, r"share T >= 1, got 2, \(3,\)"),
        ({"truth": np.zeros(2)}, "truth must be bool, got float64"),
        ({"known": np.zeros(2)}, "known must be bool, got float64"),
        ({"known": np.zeros(3, bool)}, r"known must have T = 2 entries, got \(3,\)"),
        ({"extra_frames": np.zeros((2, 4, 4), np.uint8)}, r"extra_frames must be \(T, H, W, 3\) uint8"),
        ({"extra_frames": np.zeros((1, 4, 4, 3), np.uint8)}, "extra_frames must have T = 2 entries"),
        ({"label_prob": np.zeros((1, 3), np.float32)}, "label_prob must have T = 2 entries"),
    ],
)
def test_trace_refuses_what_does_not_fit(change: dict, message: str):
    good = {
        "frames": np.zeros((2, 4, 4, 3), np.uint8),
        "score": np.zeros(2, np.float32),
        "truth": np.zeros(2, bool),
        "title": "",
    }
    Trace(**good)
    with pytest.raises(ValueError, match=message):
        Trace(**(good | change))


# ----------------------------------------------------------------------------------------------------
# Learning curves


def write_metrics(path: Path, rows: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_curves_drawn_are_the_numbers_of_the_file(tmp_path: Path):
    rows = [
        {"step": 0, "time/wall_s": 1.0, "eval/true_success_once": 0.1, "eval/true_success_at_end": 0.0},
        {"step": 100, "time/wall_s": 4.0, "reward/false_positives_per_1000_steps": 7.0, "train/q": 1.0},
        {"step": 200, "time/wall_s": 9.0, "eval/true_success_once": 0.8, "eval/true_success_at_end": None},
        {"step": 200, "time/wall_s": 9.5, "eval/learned_success": 0.9, "eval/hack_gap": 10.0},
    ]
    figure = learning_figure(read_metrics(write_metrics(tmp_path / "metrics.jsonl", rows)))
    success, gap, false_positives = figure.axes
    assert lines_of(success) == {
        "true, at least once": [[0, 0.1], [200, 0.8]],
        "true, at the end": [[0, 0.0]],
        "by the reward model": [[200, 0.9]],
    }
    assert lines_of(gap)["learned - true"] == [[200, 10.0]]
    assert lines_of(false_positives) == {"in training": [[100, 7.0]]}


def test_top_axis_gives_the_wall_seconds_of_the_steps_below(tmp_path: Path):
    # the clock starts anew after a resume at step 100; its 30 s come on top of the first run's 50
    seconds = [(0, 0.0), (100, 50.0), (100, 0.0), (200, 30.0)]
    rows = [{"step": step, "time/wall_s": wall_s} for step, wall_s in seconds]
    figure = learning_figure(read_metrics(write_metrics(tmp_path / "metrics.jsonl", rows)))
    figure.draw_without_rendering()
    top = figure.axes[0].child_axes[0]
    labels = {round(tick.get_loc()): tick.label1.get_text() for tick in top.xaxis.get_major_ticks()}
    labels |= {round(tick.get_loc()): tick.label2.get_text() for tick in top.xaxis.get_major_ticks()}
    assert {step: labels[step] for step in (0, 50, 150, 200)} == {0: "0", 50: "25", 150: "65", 200: "80"}


def test_a_cut_last_line_and_the_steps_before_a_resume_are_left_out(tmp_path: Path):
    rows = [{"step": step, "train/q": 1.0} for step in (0, 100, 200, 300)]
    resumed = [{"step": step, "train/q": 2.0} for step in (150, 250)]
    path = write_metrics(tmp_path / "metrics.jsonl", rows + resumed, tail='{"step": 350, "tra')
    assert read_metrics(path) == rows[:2] + resumed


def test_no_metrics_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        plot_learning_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with pytest.raises(UserError, match="no readable line"):
        plot_learning_curves(
            write_metrics(tmp_path / "metrics.jsonl", [], tail='{"st'), tmp_path / "curves.png"
        )
    assert not (tmp_path / "curves.png").exists()


def test_curves_without_any_known_tag_still_make_a_picture(tmp_path: Path):
    metrics = write_metrics(tmp_path / "metrics.jsonl", [{"step": 0, "train/q": 1.0}])
    plot_learning_curves(metrics, tmp_path / "curves.png")
    assert iio.imread(tmp_path / "curves.png").std() > 0
    panels = learning_figure(read_metrics(metrics)).axes
    assert [panel.texts[0].get_text() for panel in panels] == ["not logged"] * 3


# ----------------------------------------------------------------------------------------------------
# Scores


def test_scores_drawn_are_the_traces_with_gaps_where_not_scored():
    figure = score_figure([trace([0.1, NAN, 0.6, 0.4], [0, 0, 0, 1])], 0.5)
    first, last, scores, histogram = figure.axes
    assert (first.get_title(), last.get_title()) == ("step 0", "step 3")
    assert last.images[0].get_array()[0, 0, 0] == 160  # frame 3
    lines = lines_of(scores)
    assert np.allclose(lines["model's score"], [[0, 0.1], [1, NAN], [2, 0.6], [3, 0.4]], equal_nan=True)
    assert np.allclose(lines["wrong verdict"], [[2, 0.6], [3, 0.4]])
    assert [text.get_text() for text in histogram.get_legend().get_texts()] == [
        "truth: failure (2 frames, 1 false positives)",
        "truth: success (1 frames, 1 missed)",
    ]


def test_a_single_true_step_is_shaded():
    scores = score_figure([trace([0.1, 0.2, 0.3], [0, 1, 0])], 0.5).axes[2]
    heights, edges, baseline = scores.patches[0].get_data()
    assert (heights > baseline).tolist() == [False, True, False]
    assert edges.tolist() == [-0.5, 0.5, 1.5, 2.5]


def test_scores_picture_shows_eight_episodes_and_counts_all(tmp_path: Path):
    many = [trace([0.1, 0.9], [0, 1], title=f"seed {seed}") for seed in range(10)]
    figure = score_figure(many, 0.5)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title.startswith("seed")] == [f"seed {seed}" for seed in range(8)]
    assert titles[-1] == "All scored frames of 10 episodes"
    plot_scores(many[:1], 0.5, tmp_path / "scores.png")
    assert iio.imread(tmp_path / "scores.png").shape[1] == 9 * 180


def test_where_nobody_knows_the_truth_no_verdict_is_wrong():
    """An operator's unmarked steps were once counted and drawn as failures."""
    shown = trace([0.9, 0.9, 0.1], [0, 0, 0])
    shown.known = np.array([False, True, True])
    assert shown.wrong(0.5).tolist() == [False, True, False]
    _, _, scores, histogram = score_figure([shown], 0.5).axes
    assert np.allclose(lines_of(scores)["wrong verdict"], [[1, 0.9]])
    assert histogram.get_title(loc="left") == "All scored frames of 1 episodes where the truth is known"
    texts = [text.get_text() for text in histogram.get_legend().get_texts()]
    assert texts[0] == "truth: failure (2 frames, 1 false positives)"
    strip, *_ = (picture[-STRIP_HEIGHT:] for picture in video_pictures([shown], 0.5, num_held=0))
    red, green, blue = strip[62:75, 149:164].reshape(-1, 3).max(0)
    assert red == green == blue  # the square of a truth that nobody knows is grey


def test_steps_count_from_where_the_trace_begins():
    shown = trace([0.1, 0.9], [0, 0])
    shown.first_step = 7
    first, last, scores, _ = score_figure([shown], 0.5).axes
    assert (first.get_title(), last.get_title(), scores.get_xlim()) == ("step 7", "step 8", (6.5, 8.5))
    assert lines_of(scores)["model's score"] == [[7, pytest.approx(0.1)], [8, pytest.approx(0.9)]]


def test_episodes_that_no_model_scored_make_a_picture_too(tmp_path: Path):
    plot_scores([trace([NAN, NAN], [0, 1])], 0.5, tmp_path / "scores.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.png"]
