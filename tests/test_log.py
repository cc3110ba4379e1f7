"""common/log.py: one line, one file, one glossary."""

import json
import re
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from common.config import to_dict
from common.log import GLOSSARY, GROUPS, LoggerConfig, RunLog, progress_line

ROOT = Path(__file__).resolve().parents[1]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_progress_line_has_one_form():
    """In the order of the glossary, whatever the order of the call; silent numbers stay silent."""
    metrics = {
        "time/env_steps_per_s": 512.4,
        "eval/hack_gap": 5.0,
        "eval/true_success_once": 0.9,
        "train/alpha": 0.1,
        "train/q": 0.625,
        "eval/learned_success": 0.95,
        "eval/my_new_number": 3.0,
    }
    assert progress_line(1200, 3692.9, metrics) == (
        "step     1,200  1:01:32  eval: true 0.90, learned 0.95, gap +5.0 | train: q 0.62 | time: steps/s 512"
    )
    assert progress_line(0, 0, {"val/auprc": float("nan")}) == "step         0  0:00:00  val: auprc nan"
    assert progress_line(1_000_000, 59.9, {}) == "step 1,000,000  0:00:59"


def test_log_prints_a_line_and_appends_all_numbers(tmp_path, capsys):
    with RunLog(tmp_path / "run", logger_backends=()) as log:
        log.log(10, {"eval/true_success_once": torch.tensor(0.5), "train/alpha": float("nan")})
        log.log(20, {"train/q": 1}, line=False)
        assert [row["step"] for row in lines(tmp_path / "run")] == [10, 20]  # there before the end
        log.say("saved")
    assert capsys.readouterr().out == "step        10  0:00:00  eval: true 0.50\nsaved\n"
    first, second = lines(tmp_path / "run")
    assert 0 <= first.pop("time/wall_s") <= second.pop("time/wall_s") < 60
    assert first == {"step": 10, "eval/true_success_once": 0.5, "train/alpha": None}
    assert second == {"step": 20, "train/q": 1.0}


@pytest.mark.parametrize("tag", ["evall/true_success_once", "true_success_once", "eval/", "/loss"])
def test_tags_of_no_known_group_are_refused(tmp_path, tag):
    with RunLog(tmp_path, logger_backends=()) as log:
        with pytest.raises(ValueError, match=f"tag '{tag}' must be group/name with a group of rollout"):
            log.log(1, {"train/loss": 1.0, tag: 1.0})
        assert lines(tmp_path) == []


def test_a_torn_line_of_a_killed_run_is_dropped(tmp_path):
    """The next line used to be glued to it, and the whole file could not be read any more."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "train/lo')
    with RunLog(tmp_path, logger_backends=()) as log:
        log.log(2, {"train/loss": 0.5}, line=False)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert lines(tmp_path)[1]["train/loss"] == 0.5


def test_say_leaves_a_bar_whole(tmp_path, capsys):
    with RunLog(tmp_path, logger_backends=()) as log, tqdm(total=2, desc="collect") as bar:
        bar.update()
        log.say("a note")
    assert capsys.readouterr().out == "a note\n"  # the bar itself is on stderr


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with RunLog(tmp_path, logger_backends=["tensorboard"]) as log:
        log.log(5, {"train/loss": 0.25, "eval/return": 3.0}, line=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/return", "train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.25)]


def test_glossary_covers_every_tag_in_the_code():
    """A tag is written once with its meaning, or nobody can read a run. f-strings are beyond this test."""
    pattern = re.compile(rf'"((?:{"|".join(GROUPS)})/[a-z][a-z0-9_]*)"')
    code = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]
    missing = {
        f"{path.name}: {tag}"
        for path in code
        for tag in pattern.findall(path.read_text())
        if tag not in GLOSSARY
    }
    assert missing == set(), "add them to GLOSSARY in common/log.py"
    assert {tag.partition("/")[0] for tag in GLOSSARY} == set(GROUPS)
    assert all(tag.meaning for tag in GLOSSARY.values())


def test_logger_section_has_the_guides_keys():
    assert to_dict(LoggerConfig()) == {
        "log_path": None,
        "experiment_name": "run",
        "logger_backends": ["tensorboard"],
    }
