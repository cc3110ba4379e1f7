"""The real-world scripts as an operator starts them, on a simulated arm: label, record, train, judge live."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.episodes import list_episodes, read_episode
from common.labelling import read_labelled

ROOT = Path(__file__).resolve().parents[1]
COLLECT, TELEOP = (str(ROOT / f"configs/demo_real_{name}.yaml") for name in ("collect", "teleop"))
SMALL = [f"env.eval.arm.cameras.main_images.{side}=64" for side in ("width", "height")]

pytestmark = pytest.mark.slow


def command(script: str, *argv: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *argv]


def run(script: str, *argv: str, cwd: Path, code: int = 0) -> str:
    """What the script printed, errors included."""
    done = subprocess.run(command(script, *argv), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def label(folder: Path, successes: int, fails: int) -> list[str]:
    targets = [f"runner.num_success_frames={successes}", f"runner.num_fail_frames={fails}"]
    return [COLLECT, *SMALL, *targets, "runner.val_split=0.3", f"runner.logger.log_path={folder}"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A run folder with 30 success and 45 fail frames, the process killed half way and started again."""
    folder = tmp_path_factory.mktemp("real") / "collect"
    argv = label(folder, 30, 45)
    with subprocess.Popen(
        command("collect.py", *argv), cwd=folder.parent, stdout=subprocess.DEVNULL
    ) as killed:
        deadline = time.monotonic() + 200
        while not (folder / "labelled_frames.bin").exists() or len(read_labelled(folder)) < 8:
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        killed.kill()
    before = len(read_labelled(folder))
    assert 8 <= before < 75
    out = run("collect.py", *argv, cwd=folder.parent)
    assert "labelled: 30 success, 45 fail" in out
    return folder


def test_labelled_frames_become_a_data_set(labelled):
    frames = read_labelled(labelled)
    assert (int(frames.label.sum()), len(frames)) == (30, 75)
    assert frames.image_shape == (128, 128, 3) and len(np.unique(frames.episode)) >= 2  # of two starts
    assert (labelled / "train.pt").is_file() and (labelled / "val.pt").is_file()
    log = (labelled / "run_collect_process.log").read_text()
    assert "keys: c success, a fail" in log and "labelled: 30 success, 45 fail" in log


def test_another_camera_may_not_add_to_them(labelled):
    argv = [*label(labelled, 40, 45), "env.eval.arm.cameras.main_images.fov=0.9"]
    assert run("collect.py", *argv, cwd=labelled.parent, code=2).startswith("error: ")
    assert len(read_labelled(labelled)) == 75


@pytest.fixture(scope="module")
def checkpoint(labelled) -> Path:
    folder = labelled.parent / "resnet"
    run(
        "train_resnet.py",
        str(ROOT / "configs/demo_real_resnet.yaml"),
        f"data.train_data_paths={labelled}/train.pt",
        f"data.val_data_paths={labelled}/val.pt",
        "actor.model.image_size=[3, 32, 32]",
        "runner.max_steps=60",
        "runner.val_check_interval=20",
        "runner.num_threads=1",
        f"runner.logger.log_path={folder}",
        cwd=labelled.parent,
    )
    return folder / "checkpoint"


def teleop(folder: Path, checkpoint: Path, *changes: str) -> list[str]:
    where = [f"runner.logger.log_path={folder}", f"reward.model.model_path={checkpoint}"]
    return [TELEOP, *SMALL, *where, *changes]


def test_live_verdicts_are_held_against_the_marks(checkpoint, tmp_path):
    out = run("teleop_eval.py", *teleop(tmp_path / "run", checkpoint, "runner.max_steps=60"), cwd=tmp_path)
    lines = re.findall(
        r"Step \d+ \| prob (?:\d\.\d\d|--) \| rm_reward: ([01-]) \| success: (True|False)",
        (tmp_path / "run/teleop.log").read_text(),
    )
    assert len(lines) == 60 and all((reward == "1") == (said == "True") for reward, said in lines)
    numbers = summary(tmp_path / "run")
    assert numbers["num_steps"] == 60 and numbers["num_marked"] > 20
    assert {"precision", "recall", "lag_s", "flicker_per_min", "late_share"} <= set(numbers)
    assert "60 steps" in out and (tmp_path / "run/trace.mp4").is_file()
    marked = read_labelled(tmp_path / "run")
    assert len(marked) == numbers["num_marked"] and int(marked.label.sum()) == numbers["num_success"]
    with np.load(tmp_path / "run/trace.npz") as trace:
        assert len(trace["prob"]) == 60


def test_the_verdict_ends_episodes_where_it_stands_alone(checkpoint, tmp_path):
    changes = ["runner.max_steps=60", "reward.standalone_realworld=true", "reward.reward_threshold=0.0"]
    run("teleop_eval.py", *teleop(tmp_path / "run", checkpoint, *changes), cwd=tmp_path)
    assert summary(tmp_path / "run")["num_episodes"] >= 50  # all is a success: nearly every step ends one


def test_a_reward_server_that_dies_and_comes_back(checkpoint, tmp_path):
    """Driving goes on without verdicts, and they return."""
    address = "tcp://127.0.0.1:15873"
    serving = teleop(tmp_path / "unused", checkpoint, f"runner.serve_address={address}")
    changes = [
        f"reward.placement={address}",
        "env.eval.override_cfg.realtime=true",
        "runner.max_steps=100000",
    ]

    def serve() -> subprocess.Popen:
        server = subprocess.Popen(
            command("teleop_eval.py", "--serve", *serving), stdout=subprocess.PIPE, text=True
        )
        assert "reward server at" in server.stdout.readline()
        return server

    def wait_for(pattern: str, since: int) -> int:
        """Until the log has it after character `since`. -> how long the log is."""
        deadline = time.monotonic() + 120
        while not re.search(pattern, text := (log.read_text() if log.exists() else "")[since:]):
            assert driving.poll() is None and time.monotonic() < deadline, text[-500:]
            time.sleep(0.1)
        return since + len(text)

    log, server = tmp_path / "run/teleop.log", serve()
    argv = teleop(tmp_path / "run", checkpoint, *changes)
    driving = subprocess.Popen(command("teleop_eval.py", *argv), stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        seen = wait_for(r"prob \d", 0)
        server.kill()
        server.wait()
        seen = wait_for(r"(prob -- .*\n[^\n]*){3}", seen)
        server = serve()
        wait_for(r"prob \d", seen)
        driving.send_signal(signal.SIGINT)
        assert driving.wait(60) == 130
    finally:
        for process in (driving, server):
            if process.poll() is None:
                process.kill()
            process.wait()
    assert 0 < summary(tmp_path / "run")["late_share"] < 1  # what was driven is reported after Ctrl-C too


def test_fixed_pose_episodes_are_labelled_by_where_the_arm_is(tmp_path):
    changes = ["runner.num_success_frames=null", "runner.num_fail_frames=null", "runner.num_episodes=3"]
    changes += ["env.eval.override_cfg.success_hold_steps=4", "env.eval.max_episode_steps=80"]
    run("collect.py", COLLECT, *SMALL, *changes, f"runner.logger.log_path={tmp_path}/run", cwd=tmp_path)
    episodes = [read_episode(path) for path in list_episodes(tmp_path / "run/collected_data")]
    assert len(episodes) == 3 and summary(tmp_path / "run")["num_episodes"] == 3
    for episode in episodes:
        inside = [bool(info.get("in_zone")) for info in episode.infos]
        assert episode.success_once == ("1111" in "".join(str(int(now)) for now in inside))
        assert np.abs(episode.actions).max() > 0  # the operator's, not the zeros the script gave
    run(
        "preprocess_resnet.py", "--raw-data-path", "run/collected_data", "--output-dir", "data",
        "--fail-success-ratio", "3", "--val-split", "0.4",
        cwd=tmp_path,
    )  # fmt: skip
    assert torch.load(tmp_path / "data/train.pt", weights_only=True)["metadata"]["label"] == "in_zone"


def test_ctrl_c_in_a_terminal_leaves_it_as_it_was(tmp_path):
    """A person's terminal: keys label, Ctrl-C stops the arm, frames are safe and the terminal is restored."""
    (tmp_path / "still.txt").write_text("\n")
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    argv = label(tmp_path / "run", 50, 50)
    argv += ["devices.operator=human", "devices.mouse.backend=scripted", "devices.mouse.script=still.txt"]
    argv += ["env.eval.override_cfg.realtime=true"]
    process = subprocess.Popen(
        command("collect.py", *argv), stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    shown = b""

    def wait_until(what) -> None:
        nonlocal shown
        deadline = time.monotonic() + 150
        while not what():
            assert process.poll() is None and time.monotonic() < deadline, shown[-800:].decode()
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)

    try:
        wait_until(lambda: b"success: 0/50" in shown)
        os.write(ours, b"a")
        wait_until(lambda: b"fail: 1/50" in shown)
        os.write(ours, b"c")
        wait_until(lambda: b"success: 1/50" in shown)
        os.write(ours, b"u")
        wait_until(lambda: shown.rstrip().rpartition(b"\r")[2].count(b"success: 0/50") > 0)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    assert process.returncode == 130, shown[-800:].decode()
    assert termios.tcgetattr(theirs) == before
    frames = read_labelled(tmp_path / "run")
    assert frames.label.tolist() == [False]
    os.close(ours)
    os.close(theirs)
