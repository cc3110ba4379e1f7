"""The report card of a scorer that measures motion exactly, and the numbers it is made of."""

import numpy as np
import pytest
import torch
from toy_windows import write_windows

from common.runtime import UserError
from common.trend import NEGATIVE, POSITIVE, UNCLEAR
from common.trend_report import (
    CONTROLS,
    card_table,
    confusion_counts,
    f1_scores,
    first_and_last,
    natural_windows,
    plot_confusion,
    plot_examples,
    report_card,
    score_windows,
    shuffled,
    trend_metrics,
)
from common.windows import WindowSet


class MotionScorer:
    """Looks where the square is in the first and in the last main image; sure of itself."""

    def __init__(self):
        self.tasks: set[str] = set()

    def score(self, frames, tasks):
        self.tasks.update(tasks)
        red = frames["main_images"][..., 0].float() - 40  # (B, K, H, W)
        columns = torch.arange(red.shape[-1])
        place = (red.sum(2) * columns).sum(-1) / red.sum((2, 3)).clamp(min=1)  # (B, K)
        motion = place[:, -1] - place[:, 0]
        label = torch.where(motion.abs() < 2, UNCLEAR, torch.where(motion > 0, POSITIVE, NEGATIVE))
        return 0.9 * torch.nn.functional.one_hot(label, 3).float()


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> WindowSet:
    folder = write_windows(tmp_path_factory.mktemp("data"), num_eval=30)
    return WindowSet(str(folder / "eval/segments.jsonl"))


def test_controls_of_a_model_that_measures_motion(windows):
    scorer = MotionScorer()
    rows = report_card(scorer, windows, np.arange(30))
    accuracy = {row["control"]: round(row["accuracy"], 3) for row in rows}
    third = 0.333
    shuffle = accuracy.pop("shuffled frames")
    assert third < shuffle < 0.9
    assert accuracy == {
        "normal": 1.0,
        "reversed": third,  # the unclear ones
        "reversed, labels flipped": 1.0,
        "frozen (last frame)": third,
        "first and last frame": 1.0,
        "views swapped": third,  # the second camera sees the square go down
        "main view black": third,
        "extra view black": 1.0,
        "no task text": 1.0,
        "always positive": third,
    }
    by_name = {row["control"]: row for row in rows}
    assert by_name["frozen (last frame)"]["called_positive"] == 0
    assert by_name["reversed"]["f1_negative"] == 0
    assert by_name["always positive"]["macro_f1"] == pytest.approx(0.5 / 3)
    assert by_name["normal"]["label_mass"] == pytest.approx(0.9)
    assert scorer.tasks == {"push the square to the right", ""}
    table = card_table(rows).splitlines()
    assert len(table) == len(rows) + 1 == len(CONTROLS) + 4
    assert table[1].split()[:4] == ["normal", "1.000", "1.000", "1.000"]


def test_views_of_two_sizes_are_not_swapped(windows, monkeypatch):
    monkeypatch.setattr(windows, "frame_size", {"main_images": [32, 32], "extra_view_images": [16, 16]})
    names = [row["control"] for row in report_card(MotionScorer(), windows, np.arange(6))]
    assert "views swapped" not in names and len(names) == len(CONTROLS) + 2


def test_metrics_of_a_known_confusion():
    #                 positive            negative      unclear
    label = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    verdict = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 0])
    counts = confusion_counts(verdict, label)
    assert counts.tolist() == [[3, 1, 0], [0, 2, 1], [1, 0, 2]]
    assert f1_scores(counts).tolist() == [6 / 8, 4 / 6, 4 / 6]
    prob = np.full((10, 3), 0.1)
    prob[np.arange(10), verdict] = 0.6
    card = trend_metrics(prob, label)
    assert card["accuracy"] == 0.7
    assert card["macro_f1"] == pytest.approx((6 / 8 + 4 / 6 + 4 / 6) / 3)
    assert card["f1_negative"] == pytest.approx(4 / 6)
    assert card["label_mass"] == pytest.approx(0.8)
    assert card["loss"] == pytest.approx(-(7 * np.log(0.6) + 3 * np.log(0.1)) / 10)


def test_a_label_that_no_window_has_does_not_count():
    card = trend_metrics(np.eye(3)[[0, 0, 2, 1]], np.array([0, 0, 2, 2]))
    assert np.isnan(card["f1_negative"])
    assert card["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_diverged_model_is_named():
    with pytest.raises(UserError, match="diverged, so lower the learning rate"):
        trend_metrics(np.full((2, 3), np.nan), np.array([0, 1]))


def test_natural_windows_are_judged_where_they_say_something(windows, monkeypatch):
    natural, warning = natural_windows(windows)
    assert (warning, set(natural)) == ("", set(range(30)) - {4, 16, 28})
    monkeypatch.setattr(windows, "reversed", windows.labels == NEGATIVE)  # RLinf's: all negatives are
    natural, warning = natural_windows(windows)
    assert "none of the natural ones is negative" in warning
    assert (windows.labels[natural] != NEGATIVE).all() and len(natural) == 20
    monkeypatch.setattr(windows, "reversed", windows.labels != POSITIVE)
    natural, warning = natural_windows(windows)
    assert "reversed ones are among them" in warning and len(natural) == 30


def test_windows_are_scored_in_their_order_whatever_the_chunk(windows):
    indices = np.array([7, 3, 20, 1, 2])
    whole = score_windows(MotionScorer(), windows, indices)
    assert whole.argmax(1).tolist() == windows.labels[indices].tolist()
    assert np.array_equal(score_windows(MotionScorer(), windows, indices, chunk=2), whole)


def test_changes_of_order():
    frames = {"main_images": torch.arange(5).view(1, 5, 1, 1, 1).expand(40, 5, 2, 2, 3)}
    assert first_and_last(frames)["main_images"][0, :, 0, 0, 0].tolist() == [0, 0, 0, 4, 4]
    times = shuffled(frames)["main_images"][..., 0, 0, 0]
    assert torch.equal(times.sort(1).values, torch.arange(5).expand(40, 5))
    assert len({tuple(row.tolist()) for row in times}) > 10
    assert torch.equal(shuffled(frames)["main_images"][..., 0, 0, 0], times)


def test_pictures(windows, tmp_path):
    from matplotlib.image import imread

    indices = np.arange(30)
    prob = score_windows(MotionScorer(), windows, indices)
    plot_confusion(prob, windows.labels, tmp_path / "confusion.png")
    plot_examples(prob, windows, indices, tmp_path / "all_right.png")  # nothing below
    plot_examples(np.roll(prob, 1, axis=1), windows, indices, tmp_path / "all_wrong.png")
    assert imread(tmp_path / "confusion.png").std() > 0.05
    assert imread(tmp_path / "all_right.png").std() > 0.05
    assert imread(tmp_path / "all_wrong.png").std() > 0.05
