"""Recorded episodes on a page: `collect.py --view`, with and without a reward model."""

import sys
from pathlib import Path

import numpy as np
import pytest
from doubles import RENDER, FakeModel, FakeTrendModel
from test_experience import write
from test_resnet_reward import frames, small_model
from test_trace_page import read

import collect
from common import reward_client
from common.episodes import list_episodes
from common.files import save_json
from common.recorded import open_checkpoint, read_trace
from common.runtime import UserError, run_script


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch):
    """`view(folder, "--option", ...)` runs collect.py --view in this process. -> the page's HTML and data."""

    def view(folder: Path, *options: str) -> tuple[str, dict]:
        monkeypatch.setattr(sys, "argv", ["collect.py", "--view", str(folder), *options])
        run_script(collect.main)
        return read(folder / "traces.html")

    return view


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model of frames that says a hundredth of the first pixel; its threshold is 0.5."""
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: FakeModel())
    save_json({"model_type": "resnet"}, tmp_path / "checkpoint" / "reward.json")
    return tmp_path / "checkpoint"


def titles(data: dict) -> list[str]:
    return [episode["title"].split("_")[5] for episode in data["episodes"]]


def test_of_many_episodes_the_worst_are_shown(tmp_path, view, checkpoint, capsys):
    folder = tmp_path / "episodes"
    write(folder, 0, [10, 20, 90], [False, True])  # no mistake
    write(folder, 1, [10, 40, 40], [True, True])  # two missed
    write(folder, 2, [10, 60, 90], [False, True])  # a false positive
    write(folder, 3, [60, 60, 10], [False, False], control={"freq_hz": 20})  # two, one of them at the reset
    page, data = view(folder, "--model", str(checkpoint), "--episodes", "3")
    assert titles(data) == ["3", "2", "1"]
    assert [(e["false_positives"], e["missed"]) for e in data["episodes"]] == [(2, 0), (1, 0), (0, 2)]
    assert data["episodes"][0]["score"] == [0.6, 0.6, 0.1] and data["threshold"] == 0.5
    assert data["episodes"][1]["truth"] == [False, False, True]
    note = f"3 of 4 episodes, those with most false positives, scored by {checkpoint}"
    assert f"{note}." in page
    assert capsys.readouterr().out == f"{note}; open {folder}/traces.html in a browser\n"
    assert list_episodes(folder) == sorted(folder.glob("*.pkl"))  # the page is none of them


def test_without_a_model_the_truth_alone_is_shown(tmp_path, view):
    for number in range(5):
        extra = {"control": {"freq_hz": 20}}
        write(tmp_path, number, [10, 20], [number == 4], **extra)
    page, data = view(tmp_path, "--episodes", "3")
    assert titles(data) == ["0", "2", "4"] and "3 of 5 episodes, evenly spaced." in page
    assert data["fps"] == 20
    assert data["episodes"][2]["truth"] == [False, True]
    assert all(score is None for episode in data["episodes"] for score in episode["score"])
    assert "All episodes." in view(tmp_path)[0]


def test_a_checkpoint_of_train_resnet_scores_them(tmp_path, view):
    model = small_model()
    folder, path = tmp_path / "episodes", tmp_path / "checkpoint"
    write(folder, 0, [10, 200, 90], [False, True])
    model.save(
        path, {"threshold": 0.3, "frame_size": [8, 8], "render": RENDER}, frames(4)["main_images"][:, :8, :8]
    )
    _, data = view(folder, "--model", str(path))
    trace = read_trace(*list_episodes(folder), None)
    with open_checkpoint(path) as client:
        assert client.threshold == data["threshold"] == 0.3
        expected = read_trace(*list_episodes(folder), client).score
    assert np.isnan(trace.score).all() and len(set(expected)) == 3
    assert data["episodes"][0]["score"] == [round(float(score), 4) for score in expected]


def test_windows_are_judged_by_label_where_the_episode_says_the_distance(tmp_path, monkeypatch, view):
    meta = {"score_source": "success_distance", "delta_threshold": 0.1}
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: FakeTrendModel(meta=meta))
    told = {"model_type": "history_vlm", "window": 2, "views": ["main_images"]}
    told |= {"input_builder_name": "qwentrend_input_builder", "use_chat_template": True}
    save_json(told, tmp_path / "checkpoint" / "reward.json")
    folder = tmp_path / "episodes"
    metres = [1.0, 0.9, 0.5, 0.5, 0.9]
    infos = [{"success": False, "success_distance": value} for value in metres]
    write(folder, 0, [0, 1, 2, 3, 3], [False] * 4, infos=infos)
    write(folder, 1, [0, 1, 2, 3, 3], [False] * 4)
    _, data = view(folder, "--model", str(tmp_path / "checkpoint"))
    known, unknown = data["episodes"]
    assert known["label"] == [None, None, "positive", "positive", "unclear"]
    assert known["true_label"] == [None, None, "positive", "unclear", "negative"]
    assert (known["false_positives"], known["truth_says"]) == (1, ["positive", "not positive"])
    assert unknown["label"] == known["label"] and "true_label" not in unknown
    assert unknown["false_positives"] == 0 and unknown["truth_says"] == ["success", "failure"]


def test_an_adapter_names_its_base_model(tmp_path, monkeypatch):
    sections = []
    monkeypatch.setattr(
        reward_client, "load_reward_model", lambda section, _: sections.append(section) or FakeTrendModel()
    )
    told = {"model_type": "history_vlm", "window": 3, "views": ["main_images"]}
    told |= {"input_builder_name": "mine.py:builder", "use_chat_template": False}
    save_json(told, tmp_path / "reward.json")
    open_checkpoint(tmp_path)
    save_json({"base_model_name_or_path": "models/Qwen"}, tmp_path / "adapter_config.json")
    open_checkpoint(tmp_path)
    whole, adapter = sections
    assert (whole.model_path, whole.lora_path) == (str(tmp_path), None)
    assert (adapter.model_path, adapter.lora_path) == ("models/Qwen", str(tmp_path))
    assert (adapter.input_builder_name, adapter.use_chat_template) == ("mine.py:builder", False)
    assert adapter.history_buffers["history_window"].history_size == 3


def test_what_cannot_be_shown_is_named(tmp_path, view, checkpoint, capsys):
    def refused(*args) -> str:
        with pytest.raises(SystemExit):
            view(*args)
        return capsys.readouterr().err.strip().splitlines()[-1]

    folder = tmp_path / "episodes"
    path = write(folder, 0, [10, 20], [True], render={**RENDER, "shader": "other"})
    assert f"{path}: the reward model" in refused(folder, "--model", str(checkpoint))
    assert not (folder / "traces.html").exists()
    assert "--episodes 0: must be 1 or more" in refused(folder, "--episodes", "0")
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "no such file" in refused(folder, "--model", str(tmp_path))
    save_json({"model_type": "other"}, checkpoint / "reward.json")
    assert "model_type 'other', not resnet or history_vlm" in refused(folder, "--model", str(checkpoint))
    states = [{"states": np.zeros(2, np.float32), "sim_state": np.zeros(3, np.float32)}] * 2
    blind = write(tmp_path / "blind", 0, [10, 20], [True], observations=states)
    assert f"{blind} holds no pictures; draw them first" in refused(tmp_path / "blind")
    with pytest.raises(UserError, match="holds no pictures"):
        read_trace(blind, None)
