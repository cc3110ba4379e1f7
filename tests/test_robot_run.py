"""RL at an arm: who is paid by whose verdict, which action is stored, when there is an evaluation."""

import contextlib
import json
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import CountingEnvs, reward_config, use_fake_model, window_config
from test_experience import write

import collect
import rl_train
from common import config
from common.agents import build_agent
from common.arms import ArmError, ManiSkillArmConfig, SerlHttpArmConfig
from common.cameras import CameraError, RealCameraConfig
from common.checkpoint import load_checkpoint
from common.devices import DevicesConfig, KeyboardConfig, MouseReading, ScriptedKeyboard, ScriptedMouse
from common.envs import EnvSpec
from common.episodes import list_episodes, read_episode
from common.evaluation import evaluate, record_traces
from common.experience import Replay, Rollout
from common.franka import FrankaEnv
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.franka_wrappers import RewardModelSuccess, wrap_franka
from common.labelling import read_labelled
from common.nets import ActorModelConfig, OptimConfig
from common.pixels import PixelObs
from common.poses import to_quat_pose
from common.ppo import PPOConfig
from common.prior import prior_buffer
from common.processes import WorkerError
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.reward_link import make_judge
from common.rewards import Decision
from common.rl_config import ActorSection, EnvSection
from common.robot_envs import rewarded_by
from common.robot_run import HelpingOperator, OperatedEnvs, open_robot
from common.run import Run, RunnerConfig
from common.runtime import UserError
from common.sac import SACConfig
from common.session import Session, StatusLine
from tests.arm_servers import SerlServer
from tests.real_doubles import ToyArm, ToyCamera

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TARGET = (0.5, 0.0, 0.1, -3.14, 0.0, 0.0)
MAIN = {"main_images": RealCameraConfig(backend="maniskill", serial="main_images")}
DOWN = np.array([0, 0, -1, 0, 0, 0], np.float32)  # 2 cm towards the target, which is 10 cm away
INSIDE = reward_config(standalone_realworld=True, reward_mode="per_step")


class ToyPolicy:
    """Always the same action."""

    def __init__(self, action: np.ndarray):
        self.action = torch.from_numpy(action)[None]

    def act(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        return self.action


def toy_envs(
    judge=None, mouse=(), keys=(), hands_off=False, lose_control_at=(), answers=False, **changes
) -> OperatedEnvs:
    """judge: frames -> success_prob, 0.5 and more is a success."""
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1)
    settings = {"max_episode_steps": 8, "use_relative_frame": False, "no_gripper": True}
    cfg = FrankaConfig(override_cfg=task, cameras=MAIN, use_spacemouse=True, **(settings | changes))
    arm = ToyArm(task.reset_pose(), lose_control_at=lose_control_at)
    env = FrankaEnv(cfg, arm, {"main_images": ToyCamera()})
    verdict = None if judge is None else partial(RewardModelSuccess, judge=judge, decision=Decision(0.5))
    keyboard = ScriptedKeyboard(list(keys))
    wrapped = wrap_franka(env, cfg, ScriptedMouse(list(mouse)), keyboard, verdict)
    session = Session(wrapped, cfg, keyboard, StatusLine(every_s=1000), answers)
    return OperatedEnvs(session, hands_off, judged=judge is not None)


def says(*probs: float | None):
    """A judge that says these one after the other, then 0.1 for ever."""
    left = iter(probs)
    return lambda frames: next(left, 0.1)


# ----------------------------------------------------------------------------------------------------
# What is stored


def test_the_operators_action_is_stored_and_the_models_verdict_pays():
    """The hand is on the mouse in steps 2 and 3 and keeps the arm for 0.5 s; the policy, which wants to stay,
    has it before and after. The model takes the 9th step for a success, which it is not."""
    hand = [MouseReading(), MouseReading(axes=DOWN), MouseReading(axes=DOWN / 2)]
    envs = PixelObs(toy_envs(says(*[0.2] * 8, 0.9), mouse=hand, max_episode_steps=20), 8)
    rollout = Rollout(envs, None, INSIDE, "standard")
    replay = Replay(SACConfig(buffer_size=20), envs.spec, None, CPU)
    rollout.reset(0)
    between = []
    for _ in range(10):
        rollout.start(torch.full((1, 6), 0.25))
        for transitions in rollout.finish():
            replay.add(transitions)
        between.append(rollout.between_episodes)
    stored = replay.online
    mine, hers = torch.full((6,), 0.25), torch.from_numpy(DOWN)
    expected = torch.stack([mine, hers, hers / 2, *[torch.zeros(6)] * 4, mine, mine])
    told = [*range(7), 8, 9]  # the 8th step is the one in which the 0.5 s are over
    torch.testing.assert_close(stored.action[told], expected, atol=1e-2, rtol=0)
    assert stored.reward[:10].tolist() == [0] * 8 + [1, 0]
    assert stored.terminal[:10].tolist() == [False] * 8 + [True, False]
    assert between == [False] * 8 + [True, False]
    # pictures: the k-th one has k in all places, and the 10th one is of the reset
    shown = (255 * stored.obs[:10, 19:]).round()
    assert (shown == shown[:, :1]).all() and shown[:, 0].tolist() == [*range(9), 10]
    assert (255 * stored.next_obs[:10, -1]).round().tolist() == [*range(1, 10), 11]
    metrics = rollout.metrics()
    assert metrics["rollout/learned_success"] == 1.0 and metrics["rollout/true_success_once"] == 0.0
    assert metrics["rollout/hack_gap"] == 100.0 and metrics["reward/precision"] == 0.0


def test_prior_data_is_paid_by_the_verdict_on_each_frame(tmp_path, monkeypatch):
    """Where the pose has ended the episode, the model may see none: then it was cut, not ended."""
    use_fake_model(monkeypatch)
    write(tmp_path, 0, [90, 60, 20, 80], [False, True, False], terminated=True)
    write(tmp_path, 1, [90, 10, 49], [False, True], terminated=True)
    spec = toy_spec()
    for mode, terminal in (("standard", [1, 0, 1, 0, 0]), ("none", [1, 0, 1, 0, 1]), ("always", [0] * 5)):
        buffer, _, audit = prior_buffer([str(tmp_path)], spec, RewardClient(INSIDE), INSIDE, mode, CPU)
        assert buffer.reward.tolist() == [1, 0, 1, 0, 0]
        assert buffer.terminal.tolist() == [bool(x) for x in terminal]
    assert audit.metrics("prior")["prior/recall"] == 0.0


def test_prior_data_is_held_as_the_env_holds(monkeypatch, tmp_path):
    """Two of the last two; a new episode begins anew."""
    use_fake_model(monkeypatch)
    write(tmp_path, 0, [90, 60, 80, 20, 70], [False] * 4, terminated=True)
    write(tmp_path, 1, [90, 60, 60], [False] * 2, terminated=True)
    cfg = replace(INSIDE, hold_k=2, hold_n=2)
    buffer, _, _ = prior_buffer([str(tmp_path)], toy_spec(), RewardClient(cfg), cfg, "standard", CPU)
    assert buffer.reward.tolist() == [0, 1, 0, 0, 0, 1]
    with pytest.raises(UserError, match="has no 'in_zone'"):
        alone = replace(INSIDE, require_in_zone=True)
        prior_buffer([str(tmp_path)], toy_spec(), RewardClient(alone), alone, "standard", CPU)


def toy_spec() -> EnvSpec:
    spec = CountingEnvs([[1]]).spec
    spec.info_types["success_prob"] = torch.float32
    return spec


# ----------------------------------------------------------------------------------------------------
# Evaluation


def test_an_evaluation_takes_the_verdicts_of_the_env_and_the_truth_of_the_pose():
    """Episode 0: called at its 2nd step, wrongly. Episode 1: at the target in its 5th step, called there.
    Episode 2: two verdicts are late, then time runs out."""
    judge = says(0.1, 0.8, *[0.3] * 4, 0.7, None, 0.2, None)
    result = evaluate(toy_envs(judge, hands_off=True), ToyPolicy(DOWN), None, num_episodes=3, seed=0)
    assert result.learned.tolist() == [1, 1, 0]
    assert result.once.tolist() == [False, True, True]
    np.testing.assert_allclose(result.score, [0.8, 0.7, 0.2], rtol=1e-6)
    assert result.env_return.tolist() == [1, 1, 0]
    assert result.false_positives == 1 and result.num_steps == 2 + 5 + 8
    assert result.merit == (pytest.approx(2 / 3), pytest.approx((0.8 + 0.7 + 0.2) / 3))
    assert result.metrics["eval/hack_gap"] == pytest.approx(0.0)


def test_traces_have_the_scores_of_the_env():
    (trace,) = record_traces(toy_envs(says(0.1, None, 0.9)), ToyPolicy(DOWN), None, num_episodes=1, seed=0)
    np.testing.assert_allclose(trace.score, [np.nan, 0.1, np.nan, 0.9], rtol=1e-6)
    assert trace.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_without_a_model_inside_the_pose_pays():
    envs = toy_envs()
    assert "success_prob" not in envs.spec.info_types
    rollout = Rollout(envs, None, RewardConfig(env_reward_weight=1.0), "standard")
    rollout.reset(0)
    paid = []
    for _ in range(5):
        rollout.start(torch.from_numpy(DOWN)[None])
        paid += [float(t["reward"]) for t in rollout.finish()]
    assert paid == [0, 0, 0, 0, 1]
    assert "rollout/learned_success" not in rollout.metrics()


class ClockedRun(Run):
    """A run whose evaluations are only noted."""

    def __init__(self, **runner):
        self.runner = RunnerConfig(**runner)
        self.runner.log_interval = 0  # never
        self.step, self.owes_evaluation, self.evaluated = 0, False, []
        self.hard = self.alarm = None

    def evaluate(self) -> None:
        self.evaluated.append(self.step)


class ArmRun(ClockedRun):
    """One whose evaluations leave the arm near the target."""

    def __init__(self, envs: OperatedEnvs, **runner):
        super().__init__(**runner)
        self.eval_envs, self.replay = envs, None

    def evaluate(self) -> None:
        super().evaluate()
        self.eval_envs.reset(1)
        for _ in range(2):
            self.eval_envs.step(torch.from_numpy(DOWN)[None])


def test_an_evaluation_waits_until_it_may():
    run = ClockedRun(max_steps=10, val_check_interval=4)
    may = [False, True, True, False, False, True, True, False, False, False]
    said, announced = [], []
    for may_evaluate in may:
        announced.append(run.evaluates_after(1))
        said.append(run.advance(1, {}, dict, may_evaluate))
    assert run.evaluated == [6, 10]  # due at 4, 8 and the end; 8 and the end are one
    assert [step + 1 for step, evaluated in enumerate(said) if evaluated] == [6, 10]
    # from when it is due: the reward model has to be idle by then
    assert [step + 1 for step, told in enumerate(announced) if told] == [4, 5, 6, 8, 9, 10]


def test_after_an_evaluation_training_begins_a_new_episode():
    """One arm: the evaluation moves it, and no transition may lead from the one to the other."""
    task = FrankaTaskConfig(target_ee_pose=TARGET)
    cfg = rl_train.Config(
        env=EnvSection(train=FrankaConfig(override_cfg=task)),
        algorithm=SACConfig(buffer_size=20, learning_starts=100),
        reward=RewardConfig(env_reward_weight=1.0),
        runner=RunnerConfig(max_steps=6),
    )
    envs = toy_envs(max_episode_steps=3)
    run = ArmRun(envs, max_steps=6, val_check_interval=2)
    agent = build_agent(cfg.algorithm, ActorModelConfig((4,)), OptimConfig(), envs.spec, CPU)
    rl_train.train_sac(cfg, run, agent, envs, None)
    assert run.evaluated == [3, 6]  # due at 2, 4 and 6
    place = envs.spec.obs_layout["tcp_pose"][0]
    online = run.replay.online
    z = torch.stack([online.obs[:6, place + 2], online.next_obs[:6, place + 2]])
    assert z[0, 3] == z[0, 0]  # at the start, not where the evaluation left it
    assert (z[0, 1:3] == z[1, 0:2]).all() and (z[0, 4:] == z[1, 3:5]).all()


# ----------------------------------------------------------------------------------------------------
# The operator


def test_q_ends_like_ctrl_c_and_a_pause_holds_the_arm():
    envs = toy_envs(keys=[[], [], [" "], [" "], ["q"]])
    envs.reset(0)
    envs.step(torch.zeros(1, 6))
    envs.step(torch.zeros(1, 6))  # paused and gone on
    with pytest.raises(KeyboardInterrupt):
        envs.step(torch.zeros(1, 6))


@pytest.mark.parametrize("wrapper", [None, "single_stage"])
def test_q_pressed_while_the_arm_resets_ends_too(wrapper):
    with pytest.raises(KeyboardInterrupt):
        toy_envs(keys=[["q"]], keyboard_reward_wrapper=wrapper).reset(0)


def test_q_in_the_last_step_of_an_episode_drives_the_arm_nowhere():
    envs = toy_envs(keys=[[], ["q"]], max_episode_steps=1)
    envs.reset(0)
    arm = envs.session.unwrapped.arm
    moves = len(arm.moves)
    with pytest.raises(KeyboardInterrupt):
        envs.step(torch.zeros(1, 6))
    assert len(arm.moves) == moves + 1


def test_a_lost_arm_cuts_the_episode_and_learning_goes_on():
    """It is lost in the second step; the operator thinks for a look, then recovers it."""
    keys = [[], [], [], [], [" "]]
    envs = toy_envs(says(0.2), keys=keys, lose_control_at=(2,), answers=True)
    first = envs.reset(0)
    kept = envs.step(torch.from_numpy(DOWN)[None])
    lost = envs.step(torch.from_numpy(DOWN)[None])
    assert (bool(lost.truncated), bool(lost.terminated), bool(lost.success)) == (True, False, False)
    assert float(lost.env_reward) == 0 and not bool(lost.info["learned_success"])
    assert lost.info["success_prob"].isnan().all()
    assert lost.next_obs.equal(kept.next_obs)
    torch.testing.assert_close(lost.obs, first)  # it stands at the start again
    assert envs.session.unwrapped.arm.calls.count("recover") == 1
    envs.step(torch.from_numpy(DOWN)[None])
    assert envs.num_episodes == 2


def test_a_signal_ends_rl_like_an_exception():
    """Regression: SIGTERM, or an SSH connection that dropped, left the arm alone with its last command."""
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1)
    cfg = FrankaConfig(override_cfg=task, arm=ManiSkillArmConfig(cameras=None))
    devices = DevicesConfig(keyboard=KeyboardConfig(backend="scripted", keys=[]))
    before, calls = signal.getsignal(signal.SIGTERM), []
    with (
        pytest.raises(SystemExit) as ended,
        open_robot(cfg, devices, RewardConfig(env_reward_weight=1.0), seed=0) as robot,
    ):
        robot.training.reset(0)
        robot.training.session.unwrapped.arm.stop = lambda: calls.append("stop")
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM and calls
    assert signal.getsignal(signal.SIGTERM) == before


def test_code_does_not_learn_at_a_real_arm():
    cfg = FrankaConfig(override_cfg=FrankaTaskConfig(target_ee_pose=TARGET), arm=SerlHttpArmConfig())
    with (
        pytest.raises(UserError, match="operator scripted drives a simulated arm alone"),
        open_robot(cfg, DevicesConfig(operator="scripted"), RewardConfig(), seed=0),
    ):
        pass


def test_the_operator_sees_by_how_much_the_loop_is_late(capsys):
    envs = toy_envs()
    envs.session.line.every_s = 0
    envs.reset(0)
    envs.session.unwrapped.rate.begin = lambda: 0.25
    envs.step(torch.zeros(1, 6))
    assert "episode 1 | the policy drives | 0.25 s late" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt,
        ArmError("lost"),
        CameraError("stalled"),
        UserError("no verdict"),
        SystemExit(143),
        WorkerError("reward worker died"),
    ],
)
def test_what_was_learned_is_saved_however_it_ends(tmp_path, error):
    """Regression: the steps at an arm are dear, and only Ctrl-C kept them."""

    def make_train_envs():
        raise error

    run = ClockedRun(max_steps=1)
    run.folder, run.eval_envs, run.step, saved = tmp_path, toy_envs(), 5, []
    run.save = saved.append
    cfg = rl_train.Config(algorithm=SACConfig(), reward=RewardConfig(env_reward_weight=1.0))
    with pytest.raises(error if isinstance(error, type) else type(error)):
        rl_train.learn(cfg, run, None, None, make_train_envs)
    assert saved == ["last"]


def test_the_scripted_operator_helps_in_some_training_episodes_and_never_in_an_evaluation():
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_move_s=0.1)
    cfg = FrankaConfig(
        override_cfg=task, cameras=MAIN, use_spacemouse=True, no_gripper=True, max_episode_steps=30
    )
    with HelpingOperator(seed=0) as operator, operator.mouse as mouse:
        env = FrankaEnv(cfg, ToyArm(to_quat_pose(np.array(TARGET))), {"main_images": ToyCamera()})
        wrapped = wrap_franka(env, cfg, mouse, operator)
        operator.watch(env)
        session = Session(wrapped, cfg, operator, StatusLine(every_s=1000))
        share, reached = {}, []
        for hands_off in (False, True):
            envs = OperatedEnvs(session, hands_off, judged=False)
            envs.reset(0)
            helped = []
            while len(helped) < 20:
                helped.append(False)
                done = False
                while not done:
                    step = envs.step(torch.zeros(1, 6))
                    helped[-1] |= envs.last_info["intervene_flag"]
                    done = bool(step.done)
                if helped[-1]:
                    reached.append(bool(step.success))
            share[hands_off] = np.mean(helped)
    assert 0.2 < share[False] < 0.8 and share[True] == 0
    assert np.mean(reached) > 0.8


# ----------------------------------------------------------------------------------------------------
# Settings

ARM = """
env:
  train: {env_type: realworld, override_cfg: {target_ee_pose: [0.5, 0.0, 0.1, -3.14, 0.0, 0.0]}}
algorithm: {name: sac}
reward: {use_reward_model: true, standalone_realworld: true, reward_mode: per_step, model: {model_path: x}}
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["algorithm.name=ppo"], "at an arm only SAC learns"),
        (["runner.async_rollout=true"], "at an arm only SAC learns"),
        (["reward.reward_mode=terminal"], "needs reward.use_reward_model and reward.reward_mode per_step"),
        (["reward.use_reward_model=false", "reward.env_reward_weight=1"], "needs reward.use_reward_model"),
        (["env.eval.max_episode_steps=7"], "env.eval differs from env.train, but there is one arm"),
        (["env.train.data_collection={gae_gamma: 0.8, gae_lambda: 0.9}"], "gae_gamma is for simulations"),
    ],
)
def test_what_an_arm_refuses(tmp_path, changes, message):
    path = tmp_path / "arm.yaml"
    path.write_text(ARM)
    with pytest.raises(UserError, match=message):
        config.from_yaml(rl_train.Config, path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hold_k": 3, "hold_n": 2}, "got 3 of 2"),
        ({"hold_k": 0}, "got 0 of 1"),
        (
            {"hold_n": 2, "standalone_realworld": False, "reward_mode": "terminal"},
            "reward_mode per_step, not terminal",
        ),
        ({"require_in_zone": True, "standalone_realworld": False}, "goes with standalone_realworld"),
    ],
)
def test_a_hold_must_be_possible(changes, message):
    with pytest.raises(ValueError, match=message):
        reward_config(**({"standalone_realworld": True, "reward_mode": "per_step"} | changes))


def test_the_hold_of_the_config_is_the_one_that_counts(monkeypatch):
    """Regression: RewardModelSuccess had hold_k, hold_n and require_in_zone, and no config could set them."""
    use_fake_model(monkeypatch)
    reward = replace(INSIDE, hold_k=2, hold_n=3, require_in_zone=True)
    task = FrankaTaskConfig(target_ee_pose=TARGET, reset_ee_pose=TARGET, reset_move_s=0.1)
    cfg = FrankaConfig(override_cfg=task, cameras=MAIN)
    with make_judge(reward) as judge:  # a picture's brightness is what it says
        env = FrankaEnv(cfg, ToyArm(task.reset_pose()), {"main_images": ToyCamera(60)})
        env = rewarded_by(judge, cfg, reward, learns=True)(env)
        env.reset(seed=0)
        assert [env.step(np.zeros(7))[2] for _ in range(2)] == [False, True]
        env.reset()
        env.unwrapped.arm.pushed_to = to_quat_pose(np.array(TARGET) + np.eye(6)[2] * 0.03)
        assert not any(env.step(np.zeros(7))[2] for _ in range(2))


def test_an_arm_has_no_windows_and_a_simulation_no_model_inside():
    arm = EnvSection(train=FrankaConfig(FrankaTaskConfig(target_ee_pose=TARGET)))
    sac = SACConfig()
    with pytest.raises(ValueError, match="single frames are judged"):
        rl_train.Config(env=arm, algorithm=sac, reward=window_config())
    with pytest.raises(ValueError, match="standalone_realworld is for an arm"):
        rl_train.Config(algorithm=sac, reward=INSIDE)
    with pytest.raises(ValueError, match=r"env.eval is an arm, env.train is not"):
        rl_train.Config(env=EnvSection(eval=arm.train), algorithm=sac, reward=reward_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": PPOConfig()}, "pixels is for SAC"),
        ({"runner": RunnerConfig(async_rollout=True)}, "pixels goes without runner.async_rollout"),
        (
            {"runner": RunnerConfig(async_rollout=True), "algorithm": SACConfig(n_step=3)},
            "want one after the other",
        ),
    ],
)
def test_who_sees_no_pixels(changes, message):
    actor = ActorSection(model=ActorModelConfig(pixels=32))
    with pytest.raises(ValueError, match=message):
        rl_train.Config(**({"algorithm": SACConfig(), "actor": actor, "reward": reward_config()} | changes))


def test_an_arm_is_evaluated_in_the_section_it_learns_in(tmp_path):
    path = tmp_path / "arm.yaml"
    path.write_text(ARM)
    cfg = config.from_yaml(rl_train.Config, path)
    assert cfg.env.at_an_arm and cfg.env.fps == 10
    same = config.from_yaml(rl_train.Config, path, ["env.eval=${env.train}"])
    assert same.env.eval == same.env.train == cfg.env.train


def test_the_demo_learns_in_what_its_prior_data_was_collected_in():
    learned = config.from_yaml(rl_train.Config, ROOT / "configs" / "realworld_sac_demo.yaml")
    collected = config.from_yaml(collect.Config, ROOT / "configs" / "realworld_sac_collect.yaml")
    assert learned.env.train == learned.env.eval == collected.env.eval
    assert learned.algorithm.prior_data == f"{collected.runner.logger.log_path}/collected_data"


# ----------------------------------------------------------------------------------------------------
# The arm is gone

LABEL = """
env:
  eval:
    env_type: realworld
    task: toy
    no_gripper: true
    use_spacemouse: true
    max_episode_steps: 20
    arm: {backend: serl_http, url: URL}
    cameras: {main_images: {backend: opencv, serial: "0"}}
    override_cfg: {target_ee_pose: [0.5, 0.0, 0.1, -3.14, 0.0, 0.0], step_hz: 50, reset_move_s: 0.1,
      joint_reset_cycle: null}
devices: {operator: scripted}
runner: {num_success_frames: 15, num_fail_frames: 30, val_split: 0.3, logger: {log_path: run}}
"""


@pytest.mark.slow
def test_a_killed_arm_server_is_one_line_and_labelling_goes_on_where_it_was(monkeypatch, tmp_cwd):
    """collect.py, the operator's devices and the HTTP arm are the real ones; the camera is a toy."""

    @contextlib.contextmanager
    def toy_cameras(*_):
        yield {"main_images": ToyCamera()}

    def label() -> None:
        monkeypatch.setattr(sys, "argv", ["collect.py", "label.yaml"])
        collect.main()

    monkeypatch.setattr("common.franka_wrappers.open_cameras", toy_cameras)
    monkeypatch.setattr("common.session.check_operator", lambda *_: None)  # it drives a double
    home = FrankaTaskConfig(target_ee_pose=TARGET).reset_pose()
    with SerlServer(lambda: ToyArm(home), home_q=[0.0] * 7) as server:
        Path("label.yaml").write_text(LABEL.replace("URL", server.url))

        def kill_in_mid_motion() -> None:
            while not Path("run").is_dir() or server.posts.count("pose") < 40:
                time.sleep(0.01)
            server.kill()

        killer = threading.Thread(target=kill_in_mid_motion)
        killer.start()
        with pytest.raises(UserError, match=r"pose does not answer|getstate does not answer"):
            label()
        killer.join()
        kept = read_labelled("run").label
        assert 5 <= len(kept) < 45
        server.start()
        label()
    frames = read_labelled("run")
    assert (int(frames.label.sum()), len(frames)) == (15, 45)
    log = Path("run/run_collect_process.log").read_text()
    assert "ended by ArmError: " in log
    assert f"run holds {int(kept.sum())} success and {int((kept == 0).sum())} fail frames" in log


# ----------------------------------------------------------------------------------------------------
# The whole way


@pytest.mark.slow
def test_demo(monkeypatch, tmp_cwd, renderer):
    """Collect, then learn for 150 steps, at the simulated arm and by a reward model of random weights."""

    def run(script, name: str, *changes: str) -> None:
        argv = [script.__name__, str(ROOT / "configs" / f"{name}.yaml"), *changes]
        monkeypatch.setattr(sys, "argv", argv)
        script.main()

    short = "env.eval.max_episode_steps=20"
    run(collect, "realworld_sac_collect", short, "runner.num_episodes=2")
    paths = list_episodes("logs/demo_real/episodes/collected_data")
    episodes = [read_episode(path) for path in paths]
    frames = torch.cat([torch.from_numpy(episode.images["main_images"]) for episode in episodes])
    torch.manual_seed(0)
    model = ResNetRewardModel(ResNetRewardConfig(arch="resnet10", image_size=[3, 64, 64])).eval()
    threshold = float(model.score({"main_images": frames}).quantile(0.9))
    meta = {"threshold": threshold, "frame_size": [128, 128], "render": episodes[0].render}
    model.save(Path("reward_model"), meta, frames[:4])

    tiny = [f"runner.num_{name}_episodes=1" for name in ("eval", "final", "video")]
    tiny += ["runner.val_check_interval=50", "runner.log_interval=30", "runner.logger.logger_backends=[]"]
    tiny += ["algorithm.batch_size=16", "algorithm.offline_updates=5", "algorithm.utd=0.5"]
    small = [short, "runner.max_steps=150", "reward.model.model_path=reward_model"]
    run(rl_train, "realworld_sac_demo", *small, *tiny)

    folder = Path("logs/demo_real/rl")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["env_steps"] == 150 and summary["num_episodes"] == 1
    assert {"true_success_once", "learned_success", "hack_gap"} <= set(summary)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tags = set().union(*log)
    assert {"rollout/true_success_once", "rollout/learned_success", "rollout/hack_gap"} <= tags
    assert {"prior/model_reward_mean", "eval/learned_success", "train/q"} <= tags
    files = {"curves.png", "traces.html", "scores.png", "eval.mp4"}
    assert {path.name for path in folder.iterdir()} >= files
    state, meta = load_checkpoint(folder / "checkpoints" / "last")
    assert meta["step"] == len(state["replay"]["online"]["reward"]) == 150
    assert state["replay"]["online"]["obs"].shape == (150, 19 + 3 * 32 * 32)
    assert set(state["replay"]["online"]["reward"].tolist()) <= {0.0, 1.0}
    assert state["replay"]["online"]["terminal"].equal(state["replay"]["online"]["reward"] == 1)
    pictures = state["replay"]["online"]["obs"][:, 19:]
    assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.std(0).max() > 0.05
