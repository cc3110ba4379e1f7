"""The report card of a scorer that measures motion exactly, and the numbers it is made of."""

import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from toy_windows import write_windows

from common.runtime import UserError
from common.trend import NEGATIVE, POSITIVE, UNCLEAR
from common.trend_card import (
    CONTROLS,
    confusion_counts,
    f1_scores,
    first_and_last,
    natural_windows,
    report_card,
    score_windows,
    shuffled,
    trend_metrics,
    trend_scores,
)
from common.trend_report import (
    card_table,
    plot_confusion,
    plot_examples,
    prevalence_of,
    scores_table,
    write_card,
)
from common.windows import WindowSet

GUESSES = ["time alone", "brightness alone", "last frame, 8x8, linear"]


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
        **{name: accuracy[name] for name in GUESSES},
    }
    assert all(accuracy[name] < 0.9 for name in GUESSES)
    by_name = {row["control"]: row for row in rows}
    assert by_name["frozen (last frame)"]["called_positive"] == 0
    assert by_name["reversed"]["f1_negative"] == 0
    assert by_name["always positive"]["macro_f1"] == pytest.approx(0.5 / 3)
    assert by_name["normal"]["label_mass"] == pytest.approx(0.9)
    must_lose = {row["control"] for row in rows if row["beaten"] is not None}
    assert must_lose == {
        "reversed", "shuffled frames", "frozen (last frame)", "views swapped", "always positive", *GUESSES
    }  # fmt: skip
    assert all(row["beaten"] for row in rows if row["control"] in must_lose)
    assert by_name["normal"]["macro_f1_interval"] == (1.0, 1.0)
    assert scorer.tasks == {"push the square to the right", ""}
    table = card_table(rows).splitlines()
    assert len(table) == len(rows) + 1 == len(CONTROLS) + 4 + len(GUESSES)
    assert table[1].split()[:4] == ["normal", "1.000", "1.000", "1.000"]


class LastFrameScorer(MotionScorer):
    """Looks where the square is at the end, and takes it for where it goes: a shortcut."""

    def score(self, frames, tasks):
        first_blank = {view: images.clone() for view, images in frames.items()}
        first_blank["main_images"][:, 0] = 40
        first_blank["main_images"][:, 0, 12:20, 12:20, 0] = 220  # as if it had always begun in the middle
        return super().score(first_blank, tasks)


def test_a_model_that_sees_no_motion_is_marked(windows):
    rows = {row["control"]: row for row in report_card(LastFrameScorer(), windows, np.arange(30))}
    assert rows["frozen (last frame)"]["macro_f1"] == rows["normal"]["macro_f1"] < 1
    assert rows["frozen (last frame)"]["beaten"] is False
    line = next(line for line in card_table(list(rows.values())).splitlines() if line.startswith("frozen"))
    assert line.endswith("NOT BEATEN, should be none called positive")


def test_the_question_must_count_only_where_there_are_several(windows, monkeypatch):
    def of_empty_question() -> dict:
        rows = report_card(MotionScorer(), windows, np.arange(30))
        return next(row for row in rows if row["control"] == "no task text")

    assert of_empty_question()["beaten"] is None
    monkeypatch.setattr(windows, "tasks", ["push", "pull"] * 15)
    assert of_empty_question()["beaten"] is False


def test_scores_and_intervals_of_a_known_set(windows):
    """10 episodes of three windows, one per label; those of two episodes are all called unclear."""
    prob = np.eye(3)[windows.labels] * 0.8
    prob[:6] = [0, 0, 0.8]
    scores = trend_scores(prob, windows, np.arange(30))
    assert {name: round(entry["value"], 4) for name, entry in scores.items()} == {
        "macro_f1": round((2 * (2 * 8 / 18) + 2 * 10 / 24) / 3, 4),  # of 10 each 8, 8 and 10 are found
        "f1_positive": round(16 / 18, 4),
        "f1_negative": round(16 / 18, 4),
        "f1_unclear": round(20 / 24, 4),
        "accuracy": round(26 / 30, 4),
        "label_mass": 0.8,
        "calibration_error": round(26 / 30 - 0.8, 4),
        # positive and negative cancel out in every episode, so all scores tie
        "kendall": pytest.approx(np.nan, nan_ok=True),
    }
    # an episode is wrong as a whole, so the accuracy is 1/3 of the way down for each one drawn
    low, high = scores["accuracy"]["interval"]
    num_wrong = (1 - low) / (2 / 3 / 10)
    assert high == 1.0 and num_wrong == pytest.approx(round(num_wrong)) and 4 <= num_wrong <= 6
    assert scores["label_mass"]["interval"] == pytest.approx((0.8, 0.8))


def test_kendall_of_episodes_that_lean(windows):
    """Success (every other episode) beside P(positive) - P(negative), which leads it in 4 of 5 episodes."""
    lean = np.where(windows.success, 0.6, 0.2)[:, None] + np.arange(30)[:, None] // 3 * 0.01
    lean[windows.episode == 9] = 0.9  # a failure that leans most
    prob = np.concatenate([lean, np.zeros_like(lean), 1 - lean], axis=1)
    got = trend_scores(prob, windows, np.arange(30))["kendall"]
    # 25 pairs of unlike outcome, 5 of them in the wrong order; no ties in score, 20 in outcome
    assert got["value"] == pytest.approx((20 - 5) / np.sqrt(45 * 25))
    assert got["untied"] == pytest.approx(25 / np.sqrt(45 * 25))
    assert got["interval"][0] < got["value"] < got["interval"][1]


def test_the_folder_of_a_report(windows, tmp_path):
    prob = score_windows(MotionScorer(), windows, np.arange(30))
    rows = report_card(MotionScorer(), windows, np.arange(30))
    meta = {"data_sha256": {"train": {}, "val": windows.sha256}}
    card = write_card(prob, windows, np.arange(30), rows, meta, tmp_path / "report")
    assert card["held_out"] == "its validation windows, by which it was chosen"
    assert (card["num_episodes"], card["beats_baselines"]) == (10, True)
    assert "10 positive, 10 negative, 10 unclear (as in the file, which" in scores_table(card)
    assert "macro-F1                          1.000   1.000 to 1.000" in scores_table(card)
    written = json.loads((tmp_path / "report/report.json").read_text())
    assert written["confusion"] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert written["controls"][1]["control"] == "reversed"
    assert imread(tmp_path / "report/controls.png").std() > 0.05


def test_whether_labels_are_as_often_as_they_occur_is_said(windows):
    assert "does not say" in prevalence_of({}) and "does not say" in prevalence_of(windows.info)
    assert prevalence_of({"natural_eval": True, "balance_labels": True}) == "as often as they occur"
    assert prevalence_of({"natural_eval": False, "balance_labels": True}).startswith("cut to equal numbers")


def test_the_controls_are_of_some_windows_and_say_so(windows, tmp_path):
    """The model is not asked again what it has said of them already."""
    prob, chosen = np.eye(3)[windows.labels], np.arange(0, 30, 2)
    rows = report_card(MotionScorer(), windows, chosen, CONTROLS[:1], label_prob=prob[chosen][:, ::-1])
    assert rows[0]["label_mass"] == 1.0 and rows[0]["accuracy"] < 0.5  # what it was told, not its own
    card = write_card(prob, windows, np.arange(30), rows, {}, tmp_path / "report")
    assert (card["num_windows"], card["num_control_windows"]) == (30, 15)
    assert card_table(rows).startswith("15 windows ")


def test_rows_that_tell_no_episode_have_no_intervals(tmp_path):
    path = write_windows(tmp_path / "data") / "eval/segments.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["source_episode_path"], row["segment_metadata"]["start_step"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    windows = WindowSet(str(path))
    assert windows.episode is windows.start is None
    card = report_card(MotionScorer(), windows, np.arange(12))
    assert "time alone" not in [row["control"] for row in card]
    assert card[0]["macro_f1_interval"] is None and card[1]["beaten"] is True
    assert "kendall" not in trend_scores(np.eye(3)[windows.labels], windows, np.arange(12))


def test_views_of_two_sizes_are_not_swapped(windows, monkeypatch):
    monkeypatch.setattr(windows, "frame_size", {"main_images": [32, 32], "extra_view_images": [16, 16]})
    names = [row["control"] for row in report_card(MotionScorer(), windows, np.arange(6))]
    assert "views swapped" not in names and len(names) == len(CONTROLS) + 2 + len(GUESSES)


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
    indices = np.arange(30)
    prob = score_windows(MotionScorer(), windows, indices)
    plot_confusion(prob, windows.labels, tmp_path / "confusion.png")
    plot_examples(prob, windows, indices, tmp_path / "all_right.png")  # nothing below
    plot_examples(np.roll(prob, 1, axis=1), windows, indices, tmp_path / "all_wrong.png")
    assert imread(tmp_path / "confusion.png").std() > 0.05
    assert imread(tmp_path / "all_right.png").std() > 0.05
    assert imread(tmp_path / "all_wrong.png").std() > 0.05
