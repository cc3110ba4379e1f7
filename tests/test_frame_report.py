"""The report card of a success classifier: every number against a case that can be counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.frame_card import ScoredFrames, frame_card, worst
from common.frame_report import card_table, write_card
from common.frames import load_frames
from common.payload import RewardDatasetPayload
from common.report import held_out

# 6 episodes of 4 frames; success in the last two of episodes 0, 1 and 2
LABEL = np.array([0, 0, 1, 1] * 3 + [0, 0, 0, 0] * 3, dtype=bool)
PROB = np.array([0.1, 0.1, 0.9, 0.9] * 3 + [0.1] * 12)


def scored(prob: np.ndarray = PROB, **changes) -> ScoredFrames:
    parts = {
        "success_prob": prob,
        "label": LABEL,
        "weight": np.ones(24),
        "episode": np.repeat(np.arange(6), 4),
        "step": np.tile(np.arange(4), 6),
        "brightness": np.zeros((24, 1)),
        "whole": True,
    }
    return ScoredFrames(**(parts | changes))


def values(card: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in card["scores"].items()}


def test_every_number_of_a_model_with_one_mistake():
    prob = PROB.copy()
    prob[23] = 0.95  # the last frame of a failed episode scores above all successes
    card = frame_card(scored(prob), threshold=0.5)
    assert card["prevalence"] == 0.25
    got = values(card)
    # by rank: the mistake, then six successes that tie
    assert got["auprc"] == pytest.approx(6 / 7)
    assert got["roc_auc"] == pytest.approx(17 / 18)
    # 17 failures at 0.1 of which none came true, 6 successes at 0.9, one at 0.95 that did not: one bin each
    assert got["calibration_error"] == pytest.approx((17 * 0.1 + 6 * 0.1 + 0.95) / 24)
    assert got["precision"] == pytest.approx(6 / 7)
    assert got["recall"] == 1.0
    assert got["false_positive_rate"] == pytest.approx(1 / 18)
    assert list(card["confusion"].values()) == [6, 1, 0, 17]
    # outcomes 1 1 1 0 0 0, scores .9 .9 .9 .1 .1 .95: of 9 pairs of unlike outcome 6 are right and 3 wrong;
    # of the 15 pairs 3 + 1 are tied in score, 6 in outcome
    assert got["kendall_once"] == got["kendall_at_end"] == pytest.approx((6 - 3) / np.sqrt(11 * 9))
    assert card["scores"]["kendall_once"]["untied"] == pytest.approx(9 / np.sqrt(15 * 9))
    assert card["calibration"] == [
        {"share": 17 / 24, "said": pytest.approx(0.1), "came_true": 0.0},
        {"share": 6 / 24, "said": pytest.approx(0.9), "came_true": 1.0},
        {"share": 1 / 24, "said": pytest.approx(0.95), "came_true": 0.0},
    ]


def test_the_two_rankings_of_episodes_look_at_different_frames():
    prob = PROB.copy()
    prob[[3, 7, 11]] = 0.05  # success is seen when it comes, and lost in the last frame
    got = values(frame_card(scored(prob), 0.5))
    assert got["kendall_once"] == 1.0  # two values on both sides: perfect, with ties
    assert got["kendall_at_end"] == -1.0


def test_intervals_are_over_episodes_and_never_narrower_than_wilsons_of_episodes():
    card = frame_card(scored(), 0.5)
    # no mistake anywhere: the bootstrap alone would be sure of 1
    assert card["scores"]["auprc"]["interval"] == (1.0, 1.0)
    z2 = 1.96**2
    assert card["scores"]["recall"]["interval"] == pytest.approx((3 / (3 + z2), 1.0))
    failures = 18**2 / (3 * 2**2 + 3 * 4**2)  # two in each episode that succeeds, four in the others
    assert card["scores"]["false_positive_rate"]["interval"] == pytest.approx((0.0, z2 / (failures + z2)))
    prob = PROB.copy()
    prob[12:16] = 0.95  # all four mistakes in one of six episodes, which is in 67 % of the sets drawn anew
    low, high = frame_card(scored(prob), 0.5)["scores"]["false_positive_rate"]["interval"]
    assert low == 0.0 and high > 0.45  # of 4 in 18 independent frames Wilson says 0.09 to 0.45


def test_frames_that_were_cut_count_with_those_kept():
    whole = scored()
    kept = np.concatenate([np.arange(12), np.arange(12, 24, 2)])  # every second frame of the failed episodes
    parts = {name: getattr(whole, name)[kept] for name in ("label", "step", "episode", "brightness")}
    prob, weight = PROB[kept].copy(), np.where(kept < 12, 1.0, 2.0)
    prob[-1] = 0.95
    card = frame_card(scored(prob, weight=weight, **parts), 0.5)
    assert card["prevalence"] == 0.25
    assert values(card)["precision"] == pytest.approx(6 / 8)
    assert values(card)["auprc"] == pytest.approx(6 / 8)
    assert list(card["confusion"].values()) == [6, 1, 0, 11]  # frames, as they are


def test_precision_is_no_surer_than_the_false_positive_rate():
    # 100 successes are called and none of 60 failures, each of which stands for 10
    label = np.repeat([True, False], [100, 60])
    parts = {"label": label, "weight": np.where(label, 1.0, 10.0), "episode": np.arange(160)}
    parts |= {"step": np.zeros(160, int), "brightness": np.zeros((160, 1))}
    scores = frame_card(scored(label * 0.9, **parts), 0.5)["scores"]
    highest = 1.96**2 / (60 + 1.96**2)
    assert scores["false_positive_rate"]["interval"] == pytest.approx((0, highest))
    assert scores["precision"]["interval"] == pytest.approx((100 / (100 + 600 * highest), 1.0))


def test_a_model_that_knows_the_time_only_is_marked():
    step, label = np.tile(np.arange(20), 20), np.tile(np.arange(20) > 14, 20)
    parts = {
        "label": label,
        "weight": np.ones(400),
        "episode": np.repeat(np.arange(20), 20),
        "step": step,
        "brightness": np.zeros((400, 1)),
    }
    card = frame_card(ScoredFrames(success_prob=step / 20, **parts), 0.5)
    beaten = {row["name"]: row["beaten"] for row in card["baselines"]}
    assert beaten == {"constant": True, "frame index alone": False, "brightness alone": True}
    assert not card["beats_baselines"]
    table = card_table({**card, "prevalence_is": "", "held_out": "", "threshold_is": ""})
    assert "frame index alone            1.000   NOT BEATEN" in table and "\033" not in table


def test_red_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    card = frame_card(scored(np.full(24, 0.5)), 0.5)
    table = card_table({**card, "prevalence_is": "", "held_out": "", "threshold_is": ""})
    assert "\033[31mNOT BEATEN" in table


def test_the_worst_frames_are_of_different_episodes():
    prob = np.linspace(0.99, 0.1, 24)
    assert worst(scored(prob), False).tolist() == [0, 4, 8, 12, 16, 20]
    assert worst(scored(prob), True).tolist() == [11, 7, 3]
    assert worst(scored(prob, episode=None), True).tolist() == [11, 10, 7, 6, 3, 2]


# --- The folder


def write_data(path: Path, **metadata) -> Path:
    images = [torch.full((8, 10, 3), 10 * index, dtype=torch.uint8) for index in range(24)]
    known = {
        "split": "val",
        "frame_episodes": [7 + index // 4 for index in range(24)],
        "frame_steps": [index % 4 for index in range(24)],
        "frames": {"val": {"success": 6, "fail": 18}},
        "frames_before_cut": {"val": {"success": 6, "fail": 18}},
        "num_samples_per_episode": 0,
    }
    RewardDatasetPayload(images, LABEL.astype(int).tolist(), known | metadata).save(path)
    return path


def test_the_folder_of_a_report(tmp_path):
    from matplotlib.image import imread

    frames = load_frames(str(write_data(tmp_path / "val.pt")))
    card = write_card(PROB, frames, {}, 0.5, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json",
        "card.png",
        "errors.png",
    }
    written = json.loads((tmp_path / "report/report.json").read_text())
    assert written["scores"]["auprc"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert written["worst"]["false_negatives"][0] == {
        "success_prob": 0.9,
        "called_success": True,
        "episode": 7,
        "step": 2,
    }
    assert written["beats_baselines"] is card["beats_baselines"] is True
    assert imread(tmp_path / "report/card.png").std() > 0.05
    assert imread(tmp_path / "report/errors.png").std() > 0.05


def test_data_that_tell_no_episodes_have_no_intervals(tmp_path):
    path = tmp_path / "val.pt"
    images = [torch.full((2, 8, 10, 3), 10 * index, dtype=torch.uint8) for index in range(24)]
    views = {"views": ["main_images", "extra_view_images"]}
    RewardDatasetPayload(images, LABEL.astype(int).tolist(), views).save(path)  # as RLinf's
    frames = load_frames(str(path))
    card = write_card(PROB, frames, {"threshold": 0.5}, 0.5, tmp_path / "report")
    assert [entry["interval"] for entry in card["scores"].values()] == [None] * 6
    assert "unknown episodes" in card_table(card)
    assert "does not say what was left out" in card_table(card)


def test_frames_know_what_they_stand_for(tmp_path):
    path = write_data(tmp_path / "a.pt", frames_before_cut={"val": {"success": 6, "fail": 45}})
    frames = load_frames(str(path))
    assert frames.weight.tolist() == np.where(LABEL, 1, 2.5).tolist()
    assert frames.prevalence == "natural: frames cut from the file count with those that were kept"
    two = load_frames([str(path), str(write_data(tmp_path / "b.pt"))])
    assert two.episode.tolist() == [*(7 + i // 4 for i in range(24)), *(20 + i // 4 for i in range(24))]
    assert two.step.tolist() == [i % 4 for i in range(48)]


def test_what_a_model_has_had_to_do_with_the_frames(tmp_path):
    """By the role that a file had, whatever it says of itself."""
    told = load_frames(str(write_data(tmp_path / "val.pt"))).sha256
    (digest,) = told.values()

    def seen(known: dict, **more: str) -> str:
        return held_out({**told, **more}, {"data_sha256": known}, "frames")

    assert held_out(told, {}, "frames") == "whether it has seen these frames is unknown"
    assert seen({"train": {"a": "other"}, "val": {}}) == "no file of its training or validation"
    validated = {"train": {"a": "other"}, "val": {"elsewhere/val.pt": digest}}
    assert seen(validated) == "its validation frames, by which it was chosen"
    assert seen(validated, more="fresh") == "careful: frames of its validation are among them"
    trained = {"train": {"a": digest}, "val": {"a": digest}}
    assert seen(trained) == "careful: frames of its training are among them"
    older = {"somewhere/val.pt": digest}  # roles untold
    assert seen(older) == "careful: frames of its training or validation are among them"
    assert seen({"somewhere/val.pt": "other"}) == "no file of its training or validation"


def test_pictures_that_the_model_does_not_know_are_told(tmp_path):
    views = {"main_images": {"width": 128}, "extra_view_images": {"width": 64}}
    frames = load_frames(str(write_data(tmp_path / "val.pt", render={"shader": "default", "views": views})))

    def told(**trained) -> str:
        meta = {"render": {"shader": "default", "views": trained}}
        return write_card(PROB, frames, meta, 0.5, tmp_path / "report")["held_out"]

    assert "careful" not in told(main_images={"width": 128}, extra_view_images={"width": 32})  # not looked at
    other = told(main_images={"width": 256})
    assert other.endswith(
        ";\ncareful: other pictures than it knows (main_images.width: trained on 256, here 128)"
    )


@pytest.mark.parametrize(
    ("metadata", "prevalence"),
    [
        ({}, "natural: all frames of the episodes"),
        ({"num_samples_per_episode": 4}, "not natural: 4 frames of each episode, evenly spaced"),
        ({"label": "operator"}, "that of the frames an operator labelled"),
        ({"frames_before_cut": {"val": {"success": 6, "fail": 45}}}, "natural: frames cut from the file"),
    ],
)
def test_episodes_are_ranked_by_all_of_their_frames_only(tmp_path, metadata, prevalence):
    frames = load_frames(str(write_data(tmp_path / "val.pt", **metadata)))
    assert frames.prevalence.startswith(prevalence)
    scores = frame_card(ScoredFrames.of(frames, PROB), 0.5)["scores"]
    assert ("kendall_once" in scores) is (metadata == {})
