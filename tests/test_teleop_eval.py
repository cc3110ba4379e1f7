"""teleop_eval.py within this process: an arm, a camera and a reward model in which all can be counted."""

import contextlib
import json

import numpy as np
import pytest
from arm_servers import SerlServer
from doubles import FakeModel, reward_config

import teleop_eval
from common import reward_client
from common.arms import ArmError, FrankyArmConfig, ManiSkillArmConfig, SerlHttpArmConfig
from common.cameras import RealCameraConfig
from common.devices import DevicesConfig, KeyboardConfig
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.live_trace import LiveTrace
from common.poses import to_quat_pose
from common.reward_config import RewardConfig
from common.runtime import UserError
from tests.real_doubles import ToyArm, ToyCamera

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)
MAIN = {"main_images": RealCameraConfig(backend="maniskill", serial="main_images")}


@pytest.mark.parametrize(
    ("info", "shows_prob", "line"),
    [
        ({}, True, "Step 7"),
        ({"success_prob": 0.931, "verdict": True}, True, "Step 7 | prob 0.93 | rm_reward: 1 | success: True"),
        ({"success_prob": 0.1, "verdict": False}, False, "Step 7 | rm_reward: 0 | success: False"),
        ({"success_prob": None, "verdict": False}, True, "Step 7 | prob -- | rm_reward: - | success: False"),
        ({"success_prob": None, "verdict": False}, False, "Step 7 | rm_reward: - | success: False"),
    ],
)
def test_what_the_operator_sees_of_a_step(info, shows_prob, line):
    assert teleop_eval.line_of(7, info, RewardConfig(use_reward_prob=shows_prob)) == line


class TaskModel(FakeModel):
    """One that is told its task."""

    task = "that of its training"


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> tuple[ToyArm, TaskModel]:
    """The arm and the reward model that the script finds."""
    arm = ToyArm(FrankaTaskConfig(target_ee_pose=TARGET).reset_pose())
    model = TaskModel(meta={"threshold": 0.5})
    arm.reset_scene = lambda seed: None

    @contextlib.contextmanager
    def toy_cameras(*_):
        yield {"main_images": ToyCamera()}

    monkeypatch.setattr("common.franka_wrappers.make_arm", lambda *_: arm)
    monkeypatch.setattr("common.franka_wrappers.open_cameras", toy_cameras)
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: model)
    return arm, model


def config(arm=None, cameras=MAIN, **changes) -> teleop_eval.Config:
    """Four steps, the second of them marked."""
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1)
    env = FrankaConfig(task, arm=arm or ManiSkillArmConfig(), cameras=cameras, task_description="Press it.")
    settings = {
        "runner": teleop_eval.RunnerConfig(max_steps=4),
        "reward": reward_config(reward_mode="per_step"),
        "devices": DevicesConfig(keyboard=KeyboardConfig(backend="scripted", keys=["", "", "c", "u"])),
    }
    return teleop_eval.Config(env=teleop_eval.EnvSection(env), **(settings | changes))


def test_the_judge_is_told_the_task(rig, tmp_path):
    teleop_eval.evaluate(config(), tmp_path)
    assert rig[1].task == "Press it."


def test_the_arm_is_let_go_before_anything_is_reported(rig, tmp_path, monkeypatch):
    """Regression: it was held, and the terminal raw, for as long as drawing took."""
    seen, save_json, draw = [], teleop_eval.save_json, LiveTrace.draw
    arm = rig[0]

    def watched(name, real):
        return lambda *args, **kwargs: (seen.append((name, arm.calls[-1])), real(*args, **kwargs))

    monkeypatch.setattr(teleop_eval, "save_json", watched("summary", save_json))
    monkeypatch.setattr(LiveTrace, "draw", watched("draw", draw))
    teleop_eval.evaluate(config(), tmp_path)
    assert seen == [("summary", "close"), ("draw", "close")]
    files = {"summary.json", "trace.npz", "traces.html", "trace.mp4", "scores.png"}
    assert {path.name for path in tmp_path.iterdir()} >= files
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_steps"], summary["num_marked"], summary["answered"]) == (4, 1, 4)


def test_what_ended_the_session_is_not_hidden_behind_a_picture(rig, tmp_path, monkeypatch, capsys):
    def draw(*_):
        raise ValueError("no font")

    monkeypatch.setattr(LiveTrace, "draw", draw)
    rig[0].lose_control_at = {3}
    with pytest.raises(ArmError, match="ran into something"):
        teleop_eval.evaluate(config(), tmp_path)
    assert "no pictures: ValueError: no font" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["num_steps"] == 2
    assert (tmp_path / "trace.npz").is_file()


def test_marked_frames_need_a_camera(rig, tmp_path):
    """Regression: a KeyError at the first mark."""
    blind = config(arm=SerlHttpArmConfig(), cameras={}, reward=RewardConfig())
    with pytest.raises(UserError, match=r"\(runner.save_labelled\), and there is no camera"):
        teleop_eval.evaluate(blind, tmp_path)
    assert rig[0].calls == []


# ----------------------------------------------------------------------------------------------------
# --check


@pytest.fixture
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teleop_eval, "describe_devices", lambda cfg: [])
    monkeypatch.setattr(teleop_eval, "describe_cameras", lambda cameras, arm, folder: list(cameras))


def test_a_check_tells_where_a_real_arm_stands_and_moves_nothing(no_devices, capsys):
    pose = to_quat_pose(np.array([0.5812, -0.1, 0.4024, -3.1, 0.05, 0.25]))
    with SerlServer(lambda: ToyArm(pose), home_q=[0.0] * 7) as server:
        teleop_eval.check(config(arm=SerlHttpArmConfig(url=server.url), cameras={}))
    out = capsys.readouterr().out
    stands = "[0.5812, -0.1, 0.4024, -3.1, 0.05, 0.25]"
    assert out == f"arm (serl_http): stands at {stands}, in the order of target_ee_pose\n"
    assert server.posts == ["getstate"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (SerlHttpArmConfig(url="http://127.0.0.1:9"), "http://127.0.0.1:9/getstate does not answer"),
        (FrankyArmConfig(robot_ip="127.9.9.9", realtime=False), "the arm at 127.9.9.9 cannot be read"),
    ],
)
def test_a_check_goes_on_without_the_arm(no_devices, capsys, arm, message):
    if arm.backend == "franky":
        pytest.importorskip("franky")
    front = {"front": RealCameraConfig(backend="opencv", serial="0")}
    teleop_eval.check(config(arm=arm, cameras=front))
    said, camera = capsys.readouterr().out.splitlines()
    assert said.startswith(f"arm ({arm.backend}): {message}") and camera == "front"


def test_a_check_builds_a_simulated_arm(no_devices, capsys):
    teleop_eval.check(config(arm=ManiSkillArmConfig(cameras=None), cameras={}))
    (said,) = capsys.readouterr().out.splitlines()
    x, y, z = json.loads(said.removeprefix("arm (maniskill): stands at ").partition(", in")[0])[:3]
    assert 0.4 < x < 0.8 and abs(y) < 0.1 and 0 < z < 0.5
