"""common/robot_envs.py: a robot driven and recorded like any batch of envs."""

from functools import partial

import numpy as np
import pytest
import torch

from common.arms import ManiSkillArmConfig, SerlHttpArmConfig
from common.cameras import RealCameraConfig
from common.devices import MouseReading, ScriptedMouse
from common.envs import Render
from common.episodes import EpisodeWriter, list_episodes, read_episode
from common.franka import FrankaEnv
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.franka_wrappers import RewardModelSuccess, wrap_franka
from common.reward_link import LiveVerdict
from common.rewards import Decision
from common.robot_envs import Asker, RobotEnvs, check_pictures, need_camera, render_facts, view_cameras
from common.runtime import UserError
from common.scenes import DataCollectionConfig
from common.wrappers import EpisodeRecorder
from tests.real_doubles import ToyArm, ToyCamera

TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)
ONE = {"main": RealCameraConfig(backend="maniskill", serial="main_images")}
DOWN = torch.tensor([[0.0, 0.0, -1.0, 0.0, 0.0, 0.0]])  # 2 cm towards the target, in the base's axes


def make(mouse=None, verdict=None, seen=("main",), **changes) -> RobotEnvs:
    """The start is 10 cm above the target: five steps down."""
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1, success_hold_steps=2)
    settings = {"cameras": ONE, "max_episode_steps": 8, "use_relative_frame": False, "no_gripper": True}
    cfg = FrankaConfig(override_cfg=task, **(settings | changes))
    env = FrankaEnv(cfg, ToyArm(task.reset_pose()), {name: ToyCamera() for name in seen})
    return RobotEnvs(wrap_franka(env, cfg, mouse, None, verdict), cfg)


def test_the_main_camera_comes_first_and_a_third_one_shows_nothing():
    other = RealCameraConfig(backend="maniskill", serial="extra_view_images")
    cfg = make(seen="abc", cameras={"a": other, "b": ONE["main"], "c": other}).cfg
    assert view_cameras(cfg) == {"main_images": "a", "extra_view_images": "b"}
    cfg.main_image_key = "b"
    assert view_cameras(cfg) == {"main_images": "b", "extra_view_images": "a"}


def test_what_made_the_pictures_is_told():
    facts = render_facts(make().cfg)
    assert (facts["task"], facts["scene"], list(facts["views"])) == ("franka", "PickCube-v1", ["main_images"])
    assert facts["views"]["main_images"]["image_size"] == 128
    moved = make(arm=ManiSkillArmConfig(seed=1)).cfg
    assert render_facts(moved) == facts  # where the objects lie is no fact of the camera
    moved.arm.cameras.main_images.fov = 0.5
    assert render_facts(moved) != facts


def test_an_episode_ends_at_the_target_and_the_next_begins():
    envs = make()
    assert (envs.spec.obs_dim, envs.spec.action_dim) == (19, 6)
    assert envs.spec.obs_layout["tcp_pose"] == (4, 10)
    obs = envs.reset(seed=0)
    z = envs.spec.obs_layout["tcp_pose"][0] + 2
    assert obs.shape == (1, 19) and obs[0, z] == pytest.approx(0.2)
    steps = [envs.step(DOWN, Render.IF_DONE) for _ in range(6)]
    assert [bool(s.info["in_zone"]) for s in steps] == [False] * 4 + [True] * 2
    assert [bool(s.success) for s in steps] == [False] * 5 + [True]  # held for two steps
    assert [bool(s.terminated) for s in steps] == [False] * 5 + [True]
    assert [float(s.env_reward) for s in steps] == [0, 0, 0, 0, 1, 1]
    assert [list(s.frames) for s in steps] == [[]] * 5 + [["main_images"]]
    assert int(steps[5].frames["main_images"][0, 0, 0, 0]) == 6  # a picture per observation
    assert steps[5].next_obs[0, z] == pytest.approx(0.1) and steps[5].obs[0, z] == pytest.approx(0.2)
    assert not any(s.truncated for s in steps)


def test_time_runs_out():
    envs = make()
    envs.reset(seed=0)
    steps = [envs.step(torch.zeros(1, 6)) for _ in range(8)]
    assert [bool(s.truncated) for s in steps] == [False] * 7 + [True]
    assert not any(s.terminated for s in steps)


def test_the_operators_action_is_the_one_that_counts(tmp_path):
    down = MouseReading(axes=np.array([0, 0, -1, 0, 0, 0], np.float32))
    envs = make(mouse=ScriptedMouse(lambda _: down), use_spacemouse=True)
    with EpisodeWriter(tmp_path) as writer:
        recorder = EpisodeRecorder(envs, DataCollectionConfig(enabled=True), writer)
        recorder.reset(seed=0)
        done, count = False, 0
        while not done:
            step = recorder.step(torch.ones(1, 6))
            np.testing.assert_allclose(step.action[0], down.axes)
            done, count = bool(step.done), count + 1
    (path,) = list_episodes(tmp_path)
    episode = read_episode(path)
    assert episode.length == count and (episode.actions == down.axes).all()
    assert episode.control["arm"] == "maniskill" and episode.render == envs.spec.render
    assert [bool(info.get("in_zone")) for info in episode.infos].count(True) >= 1
    assert len(episode.images["main_images"]) == count + 1


def test_a_verdict_inside_the_env_stays_apart_from_the_truth():
    """The reward model takes the third frame for a success, which it is not."""
    judge = iter([0.1, 0.2, 0.9])
    envs = make(verdict=partial(RewardModelSuccess, judge=lambda frames: next(judge), decision=Decision(0.5)))
    envs.reset(seed=0)
    steps = [envs.step(DOWN) for _ in range(3)]
    assert [bool(s.terminated) for s in steps] == [False, False, True]
    assert float(steps[2].env_reward) == 1.0
    assert bool(steps[2].info["learned_success"]) and not bool(steps[2].success)


def test_an_arm_without_cameras_is_recorded_too(tmp_path):
    """Regression: a KeyError at the end of its first episode."""
    envs = make(seen=(), cameras={}, arm=SerlHttpArmConfig())
    with EpisodeWriter(tmp_path) as writer:
        recorder = EpisodeRecorder(envs, DataCollectionConfig(enabled=True), writer)
        recorder.reset(seed=0)
        for _ in range(9):
            recorder.step(torch.zeros(1, 6))
    (path,) = list_episodes(tmp_path)
    episode = read_episode(path, views=())
    assert episode.length == 8 and episode.states.shape == (9, 19)


def test_a_camera_that_is_not_there_is_an_error_of_the_user():
    cfg = make(seen=(), cameras={}, arm=SerlHttpArmConfig()).cfg
    with pytest.raises(UserError, match="frames are labelled, and there is no camera: name some"):
        need_camera(cfg, "frames are labelled")
    need_camera(make().cfg, "frames are labelled")


def test_a_model_that_looks_at_another_camera_is_refused():
    class Client:
        views = ("main_images", "extra_view_images")

        def check_envs(self, spec):
            raise AssertionError("too late")

    with pytest.raises(UserError, match="looks at extra_view_images, and the arm's env has no camera for it"):
        check_pictures(Client(), make().spec)


class ToyJudge:
    """Gives these answers one after the other, then none; keeps how long it was waited for."""

    timeout_s = 0.2

    def __init__(self, *probs: float | None):
        self.probs, self.waited_s = list(probs), []

    def ask(self, frames, step: int) -> None:
        self.step = step

    def wait(self, timeout_s: float) -> LiveVerdict | None:
        self.waited_s.append(timeout_s)
        prob = self.probs.pop(0) if self.probs else None
        return None if prob is None else LiveVerdict(self.step, prob)


REAL = FrankaConfig(FrankaTaskConfig(target_ee_pose=TARGET), arm=SerlHttpArmConfig())  # 10 Hz, no cameras


def test_rl_waits_for_a_verdict_as_long_as_the_judge_allows_and_a_driver_half_a_period():
    """Regression: a model slower than half a period never gave RL a verdict."""
    judge = ToyJudge()
    Asker(judge, REAL)({}), Asker(judge, REAL, learns=True)({})
    assert judge.waited_s == [0.05, 0.2]


def test_five_seconds_without_a_verdict_end_rl():
    ask = Asker(ToyJudge(*[None] * 40, 0.7), REAL, learns=True)
    assert [ask({}) for _ in range(41)] == [None] * 40 + [0.7]
    for _ in range(49):
        assert ask({}) is None
    with pytest.raises(UserError, match=r"no verdict for 50 steps: .* raise reward.link.live_timeout_s"):
        ask({})


def test_five_seconds_without_a_verdict_are_told_a_driver_once():
    told = []
    ask = Asker(ToyJudge(), REAL, notice=told.append)
    for _ in range(200):
        assert ask({}) is None
    (text,) = told
    assert text.startswith("no verdict for 50 steps: the reward model needs more than the 0.05 s")


def test_the_last_frames_can_be_asked_for():
    envs = make()
    envs.reset(seed=0)
    envs.step(DOWN)
    assert int(envs.render(torch.arange(1))["main_images"][0, 0, 0, 0]) == 1
    assert envs.render(torch.arange(0)) == {}
