"""One conformance test for all arms, and the faults that each must survive.

`franky` drives franky-sim over libfranka's protocol, `serl_http` a simulated Panda behind SERL's server.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from arm_servers import FrankaSim, SerlServer
from scipy.spatial.transform import Rotation

from common.arm_protocol import check_joints, check_pose
from common.arms import (
    Arm,
    ArmConfig,
    ArmError,
    FrankyArmConfig,
    ManiSkillArmConfig,
    RobotState,
    SerlHttpArmConfig,
    make_arm,
)
from common.config import from_dict, to_dict
from common.franky_arm import read_pose
from common.runtime import UserError
from common.scenes import CameraConfig, CamerasConfig
from common.serl_arm import SerlHttpArm
from common.session import ended_by_signals

HOME_Q = [0.0, 0.0, 0.0, -1.9, 0.0, 2.0, 0.0]
# Where a Franka's fingertips are at HOME_Q, from its Denavit-Hartenberg table (the same for Panda and FR3):
# tilted by q6 - |q4| = 0.1 rad from straight down, and turned by the hand's 45 degrees.
HOME_XYZ = [0.5811, 0.0, 0.4024]
HOME_QUAT = [0.92272, 0.38220, 0.04617, 0.01913]
PERIOD_S = 0.1
STEP_M = 0.02
NEAR_M = 0.008
MAX_STEPS = 100

BLIND = ManiSkillArmConfig(cameras=None)


def blind_arm() -> Arm:
    return make_arm(BLIND, control_hz=1 / PERIOD_S)


def skip_without_franky() -> None:
    """franky-sim is looked for, not imported: it would bring pinocchio into this process, where SAPIEN is."""
    for package in ("franky", "franky_sim"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")


@dataclass
class Rig:
    """An arm to test, and whether a `move` has passed its period when it returns."""

    cfg: ArmConfig
    passes_time: bool

    def connect(self) -> Arm:
        return make_arm(self.cfg, control_hz=1 / PERIOD_S)

    def move(self, arm: Arm, pose: np.ndarray) -> RobotState:
        arm.move(pose)
        if not self.passes_time:
            time.sleep(PERIOD_S)
        return arm.state()


@contextlib.contextmanager
def maniskill_rig() -> Iterator[Rig]:
    yield Rig(BLIND, passes_time=True)


@contextlib.contextmanager
def serl_http_rig() -> Iterator[Rig]:
    with SerlServer(blind_arm, HOME_Q) as server:
        # the first calls wait for the simulation behind it to be built
        yield Rig(SerlHttpArmConfig(url=server.url, timeout_s=20), passes_time=True)


@contextlib.contextmanager
def franky_rig() -> Iterator[Rig]:
    skip_without_franky()
    with FrankaSim() as robot:
        cfg = FrankyArmConfig(robot_ip=robot.ip, realtime=False, joint_reset_speed=0.5)
        yield Rig(cfg, passes_time=False)


@pytest.fixture(params=[maniskill_rig, serl_http_rig, franky_rig], ids=lambda rig: rig.__name__)
def rig(request) -> Iterator[Rig]:
    with request.param() as rig:
        yield rig


@pytest.fixture
def franka_sim() -> Iterator[FrankaSim]:
    skip_without_franky()
    with FrankaSim() as robot:
        yield robot


@pytest.fixture
def serl_server() -> Iterator[SerlServer]:
    with SerlServer(blind_arm, HOME_Q) as server:
        yield server


def turn(pose: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Rotation vector (3,), in the base frame, that leads from the reference's orientation to the pose's."""
    return (Rotation.from_quat(pose[3:]) * Rotation.from_quat(reference[3:]).inv()).as_rotvec()


def shifted(pose: np.ndarray, y: float) -> np.ndarray:
    return pose + np.array([0, y, 0, 0, 0, 0, 0])


def drive(rig: Rig, arm: Arm, goal: np.ndarray) -> list[RobotState]:
    """As FrankaEnv steps: from the measured position, STEP_M at most; orientation as in the goal."""
    states = [arm.state()]
    while np.linalg.norm(way := goal[:3] - states[-1].pose[:3]) > NEAR_M and len(states) < MAX_STEPS:
        way *= min(1.0, STEP_M / np.linalg.norm(way))
        states.append(rig.move(arm, np.concatenate([states[-1].pose[:3] + way, goal[3:]])))
    return states


def hold(rig: Rig, arm: Arm, goal: np.ndarray, until: Callable[[RobotState], bool]) -> RobotState:
    """Command the goal until something is so, MAX_STEPS at most: robots simulated elsewhere may be slow."""
    for _ in range(MAX_STEPS):
        state = rig.move(arm, goal)
        if until(state):
            break
    return state


# -- what all arms do alike ------------------------------------------------------------------------


def test_every_arm_does_the_same(rig: Rig):
    threads = set(threading.enumerate())
    with rig.connect() as arm:
        assert arm.simulated == (rig.cfg.backend == "maniskill")
        check_joint_reset(arm)
        check_way_of_12_cm(rig, arm)
        check_yaw(rig, arm)
        check_gripper(rig, arm)
        check_stop(rig, arm)
    assert set(threading.enumerate()) == threads
    arm.close()  # once more does no harm


def check_joint_reset(arm: Arm) -> None:
    arm.joint_reset(np.array(HOME_Q))
    state = arm.state()
    for name, size in {"pose": 7, "vel": 6, "force": 3, "torque": 3, "q": 7, "dq": 7}.items():
        array = getattr(state, name)
        assert (array.shape, array.dtype) == ((size,), np.float64), name
    assert isinstance(state.gripper, float)
    np.testing.assert_allclose(state.q, HOME_Q, atol=0.02)
    np.testing.assert_allclose(state.pose[:3], HOME_XYZ, atol=0.005)
    np.testing.assert_allclose(turn(state.pose, np.array(HOME_XYZ + HOME_QUAT)), 0, atol=0.03)


def check_way_of_12_cm(rig: Rig, arm: Arm) -> None:
    start = arm.state().pose
    goal = shifted(start, 0.12)
    states = drive(rig, arm, goal)
    assert len(states) > 6  # a target STEP_M away is no jump
    assert max(state.vel[1] for state in states) > 0.05  # m/s
    for _ in range(5):
        state = rig.move(arm, goal)
        np.testing.assert_allclose(state.pose[:3], goal[:3], atol=0.01)
    assert np.abs(turn(state.pose, start)).max() < 0.05
    np.testing.assert_array_equal(states[0].pose, start)  # what has been read does not change with the arm


def check_yaw(rig: Rig, arm: Arm) -> None:
    start = arm.state().pose
    yaw = Rotation.from_euler("z", 0.3) * Rotation.from_quat(start[3:])
    goal = np.concatenate([start[:3], yaw.as_quat()])
    state = hold(rig, arm, goal, until=lambda state: abs(turn(state.pose, start)[2] - 0.3) < 0.01)
    np.testing.assert_allclose(turn(state.pose, start), [0, 0, 0.3], atol=0.03)
    np.testing.assert_allclose(state.pose[:3], start[:3], atol=0.01)
    state = rig.move(arm, goal * [1, 1, 1, -1, -1, -1, -1])  # the same orientation
    np.testing.assert_allclose(turn(state.pose, start), [0, 0, 0.3], atol=0.03)


def check_gripper(rig: Rig, arm: Arm) -> None:
    pose = arm.state().pose
    for open, low_m, high_m in [(True, 0.07, 0.09), (False, -0.001, 0.01), (True, 0.07, 0.09)]:
        arm.gripper(open)
        state = hold(rig, arm, pose, until=lambda state: low_m < state.gripper < high_m)  # noqa: B023
        assert low_m < state.gripper < high_m
    assert np.abs(state.pose[:3] - pose[:3]).max() < 0.01


def check_stop(rig: Rig, arm: Arm) -> None:
    goal = shifted(arm.state().pose, 0.2)
    state = rig.move(arm, goal)
    assert goal[1] - state.pose[1] > 0.05  # on its way
    arm.stop()
    time.sleep(0.5)
    rest = arm.state().pose
    assert goal[1] - rest[1] > 0.05
    time.sleep(0.5)
    assert np.abs(arm.state().pose - rest).max() < 0.005


@pytest.mark.parametrize(
    ("pose", "met"),
    [
        ([0, 0, 0, 0, 0, 1], "7 finite numbers"),
        ([0, 0, np.nan, 0, 0, 0, 1], "7 finite numbers"),
        ([0.5, 0, 0.3, 0, 0, 0, 0], "of length 0.000"),
        ([0.5, 0, 0.3, -3.14, 0, 0, 1], "of length 3.295"),
    ],
)
def test_what_is_no_pose_reaches_no_motor(pose, met):
    with pytest.raises(ValueError, match=met):
        check_pose(pose)


def test_quaternions_are_normalised():
    assert check_pose([0.5, 0, 0.3, 0, 0, 0, 1.005]).tolist() == [0.5, 0, 0.3, 0, 0, 0, 1]


def test_joints_are_checked():
    with pytest.raises(ValueError, match="7 finite angles"):
        check_joints(HOME_Q[:6])


@dataclass
class Section:
    arm: ArmConfig


@pytest.mark.parametrize("backend", ["maniskill", "franky", "serl_http"])
def test_configs_are_told_apart_by_backend(backend):
    given = {"backend": backend} | ({"robot_ip": "172.16.0.2"} if backend == "franky" else {})
    section = from_dict(Section, {"arm": given}, "test")
    assert section.arm.backend == backend
    assert from_dict(Section, to_dict(section), "test") == section


@pytest.mark.parametrize(
    ("make", "met"),
    [
        (lambda: SerlHttpArmConfig(url="127.0.0.1:5000"), "got '127.0.0.1:5000'"),
        (lambda: SerlHttpArmConfig(timeout_s=0), "timeout_s"),
        (lambda: FrankyArmConfig("1.2.3.4", joint_reset_speed=1.5), "got 1.5"),
        (lambda: FrankyArmConfig("1.2.3.4", translational_clip_m=0), "clips must be positive"),
        (lambda: FrankyArmConfig("1.2.3.4", posture_stiffness_nm_rad=-1), "got -1"),
    ],
)
def test_configs_check_themselves(make, met):
    with pytest.raises(ValueError, match=met):
        make()


# -- maniskill -------------------------------------------------------------------------------------


def test_velocity_is_that_of_the_pose():
    with make_arm(BLIND, control_hz=100) as arm:
        arm.joint_reset(HOME_Q)
        state, start = arm.state(), arm.state().pose
        for i in range(50):
            yaw = Rotation.from_euler("z", 0.003 * (i + 1)) * Rotation.from_quat(start[3:])
            before = state
            arm.move(np.concatenate([shifted(start, 0.002 * (i + 1))[:3], yaw.as_quat()]))
            state = arm.state()
        np.testing.assert_allclose((state.pose - before.pose)[:3] * 100, [0, 0.2, 0], atol=0.01)
        np.testing.assert_allclose(state.vel, [0, 0.2, 0, 0, 0, 0.3], atol=0.02)


def test_force_is_what_the_hand_presses_with():
    with make_arm(BLIND, control_hz=10) as arm:
        arm.joint_reset(HOME_Q)
        assert arm.state().force.tolist() == [0, 0, 0]
        down = np.array([0.45, 0.2, 0.1, 1, 0, 0, 0])
        for z in np.linspace(0.1, -0.002, 30):
            down[2] = z
            arm.move(down)
        force = arm.state().force
        assert force[2] > 1  # N, along the end effector's z axis, which points down into the table
        assert abs(force[2]) > 3 * np.abs(force[:2]).max()


def test_a_scene_comes_anew_by_its_seed():
    with make_arm(BLIND, control_hz=10) as arm:
        first = arm.env.unwrapped.cube.pose.p.clone()
        arm.reset_scene(7)
        other = arm.env.unwrapped.cube.pose.p.clone()
        arm.move(shifted(arm.state().pose, 0.02))
        arm.reset_scene(0)
        assert torch.equal(arm.env.unwrapped.cube.pose.p, first)
        assert not torch.equal(other, first)


def test_pictures_follow_the_arm(renderer):
    cameras = CamerasConfig(main_images=CameraConfig(width=64, height=48))
    with make_arm(ManiSkillArmConfig(cameras=cameras), control_hz=10) as arm:
        first = {view: arm.render(view) for view in ("main_images", "extra_view_images")}
        assert first["main_images"].shape == (48, 64, 3)
        assert first["extra_view_images"].shape == (128, 128, 3)
        for view, frame in first.items():
            assert frame.dtype == np.uint8
            np.testing.assert_array_equal(arm.render(view), frame)  # nothing has moved
        for _ in range(5):
            arm.move(shifted(arm.state().pose, 0.05))
        for view, frame in first.items():
            assert (arm.render(view) != frame).any(axis=2).sum() > 20  # pixels
        with pytest.raises(ValueError, match="not 'wrist'"):
            arm.render("wrist")


def test_without_cameras_it_needs_no_renderer():
    with make_arm(BLIND, control_hz=10) as arm:
        assert not arm.env.scene.can_render()
        with pytest.raises(UserError, match=r"arm\.cameras"):
            arm.render("main_images")


def test_joints_out_of_reach_are_an_error():
    with make_arm(BLIND, control_hz=10) as arm, pytest.raises(ArmError, match="cannot get to the joints"):
        arm.joint_reset([0, 0, 0, 1.0, 0, 2.0, 0])  # the fourth bends backwards only


@pytest.mark.parametrize(
    ("cfg", "control_hz", "met"),
    [
        (BLIND, 15, "divide 100 Hz, got 15"),
        (ManiSkillArmConfig(task="PickCub-v1", cameras=None), 10, "did you mean 'PickCube-v1'"),
        (ManiSkillArmConfig(task="TwoRobotPickCube-v1", cameras=None), 10, "TwoRobotPickCube-v1"),
    ],
)
def test_what_a_simulated_arm_refuses(cfg, control_hz, met):
    with pytest.raises(UserError, match=met):
        make_arm(cfg, control_hz)


# -- franky ----------------------------------------------------------------------------------------


def franky_arm(robot: FrankaSim, **settings) -> Arm:
    return make_arm(FrankyArmConfig(robot_ip=robot.ip, realtime=False, **settings), control_hz=10)


def until_error(act: Callable[[], object], seconds: float) -> tuple[ArmError, float]:
    """The first ArmError of `act`, called at 20 Hz, and the seconds until it came."""
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        try:
            act()
        except ArmError as error:
            return error, time.monotonic() - start
        time.sleep(0.05)
    raise AssertionError(f"no ArmError in {seconds} s")


def test_a_robot_killed_in_mid_motion_is_an_error_and_recovers(franka_sim: FrankaSim):
    with franky_arm(franka_sim) as arm:
        rig, pose = Rig(arm.cfg, passes_time=False), arm.state().pose
        for _ in range(3):
            rig.move(arm, shifted(pose, 0.2))
        franka_sim.kill()
        error, seconds = until_error(lambda: arm.move(arm.state().pose), 10)
        assert seconds < 5  # measured: 1.1, libfranka's own patience
        assert franka_sim.ip in str(error) and "recover" in str(error)
        for act in (arm.state, arm.stop, lambda: arm.move(pose), lambda: arm.gripper(True)):
            with pytest.raises(ArmError, match=str(error)[:20]):  # it stays lost, without waiting
                act()
        with pytest.raises(ArmError, match="refused"):
            arm.recover()
        franka_sim.start_again()
        arm.recover()
        goal = shifted(arm.state().pose, 0.05)
        assert np.linalg.norm(drive(rig, arm, goal)[-1].pose[:3] - goal[:3]) < NEAR_M


def test_a_robot_that_falls_silent_is_an_error(franka_sim: FrankaSim):
    with franky_arm(franka_sim) as arm:
        rig, goal = Rig(arm.cfg, passes_time=False), shifted(arm.state().pose, 0.2)
        for _ in range(3):
            rig.move(arm, goal)
        os.kill(franka_sim.process.pid, signal.SIGSTOP)
        error, seconds = until_error(arm.state, 10)
        assert franka_sim.ip in str(error)
        assert seconds < 5


def test_a_robot_killed_in_a_joint_reset_is_an_error(franka_sim: FrankaSim):
    with franky_arm(franka_sim) as arm:
        killer = threading.Timer(0.5, franka_sim.process.kill)
        killer.start()
        with pytest.raises(ArmError, match=franka_sim.ip):
            arm.joint_reset([1.5, 0, 0, -1.9, 0, 2, 0])
        killer.join()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_in_a_joint_reset_stops_the_arm(franka_sim: FrankaSim, number: int, error: type):
    with ended_by_signals(), franky_arm(franka_sim) as arm:
        killer = threading.Timer(1.0, os.kill, (os.getpid(), number))
        killer.start()
        with pytest.raises(error):
            arm.joint_reset([1.5, 0, 0, -1.9, 0, 2, 0])
        killer.join()
        arm.stop()
        time.sleep(0.3)
        rest = arm.state().q
        time.sleep(0.5)
        assert np.abs(arm.state().q - rest).max() < 0.02
        assert abs(rest[0] - 1.5) > 0.2


def test_the_last_of_several_gripper_commands_counts(franka_sim: FrankaSim):
    with franky_arm(franka_sim) as arm:
        for open in (True, False, True, False):
            arm.gripper(open)
            time.sleep(0.1)
        deadline = time.monotonic() + 20
        while arm.state().gripper > 0.01 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert arm.state().gripper < 0.01


def until_width(arm: Arm, is_so: Callable[[float], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so(arm.state().gripper):
        assert time.monotonic() < deadline, f"the fingers stay at {arm.state().gripper} m"
        time.sleep(0.05)


def test_stopping_stops_moving_fingers_and_a_new_command_moves_them_on(franka_sim: FrankaSim):
    """Regression: they closed on, whoever had stopped the arm because of what was between them."""
    with franky_arm(franka_sim, hand_speed_m_s=0.04) as arm:
        arm.gripper(True)
        until_width(arm, lambda width: width > 0.075)
        arm.gripper(False)
        until_width(arm, lambda width: width < 0.065)
        arm.stop()
        time.sleep(1.0)
        rest_m = arm.state().gripper
        assert rest_m > 0.03
        time.sleep(0.5)
        assert abs(arm.state().gripper - rest_m) < 0.002
        arm.gripper(False)
        until_width(arm, lambda width: width < 0.01)


class StopCounter:
    """A gripper, and how often it was told to stop."""

    def __init__(self, gripper):
        self.gripper, self.stops = gripper, 0

    def stop(self) -> bool:
        self.stops += 1
        return self.gripper.stop()

    def __getattr__(self, name: str):
        return getattr(self.gripper, name)


def test_what_is_gripped_stays_gripped(franka_sim: FrankaSim):
    """A real hand at rest lets go when it is told to stop: a pause must drop nothing."""
    with franky_arm(franka_sim) as arm:
        arm.hand.gripper = hand = StopCounter(arm.hand.gripper)
        arm.gripper(False)
        until_width(arm, lambda width: width < 0.01)
        time.sleep(1.0)  # until the command is through
        arm.stop()
        time.sleep(0.3)
        arm.gripper(False)
    assert hand.stops == 0


def test_closing_ends_the_motion_before_it_waits_for_the_hand(franka_sim: FrankaSim):
    """Regression: an arm that was driving drove on for as long as the hand took, up to three seconds."""
    with franky_arm(franka_sim) as arm:
        robot, hand, in_control = arm.robot, arm.hand, []
        close_hand = hand.close

        def close() -> None:
            in_control.append(robot.is_in_control)
            close_hand()

        hand.close = close
        hand.gripper = gripper = StopCounter(hand.gripper)
        arm.move(shifted(arm.state().pose, 0.2))
        arm.gripper(True)
        until_width(arm, lambda width: width > 0.05)  # on its way from 0.04 to 0.08
    assert in_control == [False]
    assert gripper.stops == 1  # and the fingers with it


def test_a_hand_that_never_says_that_it_has_stopped_holds_nobody_up():
    """As franky-sim by itself: the destructor of franky's Gripper waits for that answer."""
    skip_without_franky()
    with FrankaSim(says_stopped=False) as robot, franky_arm(robot) as arm:
        arm.gripper(True)
        until_width(arm, lambda width: width > 0.05)
        begin = time.monotonic()
        arm.close()
        assert time.monotonic() - begin < 5


def test_a_pose_is_read_without_taking_control(franka_sim: FrankaSim):
    cfg = FrankyArmConfig(robot_ip=franka_sim.ip, realtime=False)
    poses = [read_pose(cfg) for _ in range(2)]
    with make_arm(cfg, control_hz=10) as arm:
        poses.append(arm.state().pose)
    np.testing.assert_allclose(poses[1:], poses[:-1], atol=2e-3)


def test_a_closed_arm_says_so(franka_sim: FrankaSim):
    with franky_arm(franka_sim) as arm:
        pass
    with pytest.raises(ArmError, match="has been closed"):
        arm.state()
    with franky_arm(franka_sim) as arm:  # it has let go of the robot
        arm.state()


def test_no_robot_is_an_error_of_the_user():
    pytest.importorskip("franky")
    cfg = FrankyArmConfig(robot_ip="127.9.9.9", realtime=False)
    with pytest.raises(UserError, match=r"no control of the arm at 127\.9\.9\.9 .*refused"):
        make_arm(cfg, control_hz=10)
    with pytest.raises(UserError, match=r"the arm at 127\.9\.9\.9 cannot be read .*refused"):
        read_pose(cfg)


def test_without_franky_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "franky", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[franka\]'"):
        make_arm(FrankyArmConfig(robot_ip="127.0.0.1"), control_hz=10)


# -- serl_http -------------------------------------------------------------------------------------


NUMBERS_FOR_ARRAYS = '{"pose": 1, "vel": 1, "force": 1, "torque": 1, "q": 1, "dq": 1, "gripper_pos": 1}'


def serl_arm(server: SerlServer, **settings) -> Arm:
    arm = make_arm(SerlHttpArmConfig(url=server.url, timeout_s=20, **settings), control_hz=10)
    arm.cfg.timeout_s = 1.0  # once the simulation is built
    return arm


def test_a_state_is_one_call(serl_server: SerlServer):
    arm = serl_arm(serl_server)
    serl_server.posts.clear()
    arm.state()
    assert serl_server.posts == ["getstate"]


def test_a_state_is_read_without_taking_control(serl_server: SerlServer):
    state = SerlHttpArm(SerlHttpArmConfig(url=serl_server.url, timeout_s=20), take_control=False).state()
    assert serl_server.posts == ["getstate"] and state.pose.shape == (7,)


def test_compliance_is_sent_when_it_begins_and_recovers(serl_server: SerlServer):
    arm = serl_arm(serl_server, compliance={"translational_stiffness": 1500.0})
    assert serl_server.posts == ["clearerr", "update_param", "getstate", "pose"]
    arm.recover()
    assert serl_server.posts[4:] == serl_server.posts[:4]


def test_a_server_killed_in_mid_motion_is_an_error_and_recovers(serl_server: SerlServer):
    arm = serl_arm(serl_server)
    pose = arm.state().pose
    arm.move(pose)
    serl_server.kill()
    error, seconds = until_error(lambda: arm.move(pose), 10)
    assert seconds < 5
    assert f"{serl_server.url}/pose does not answer" in str(error) and "recover" in str(error)
    with pytest.raises(ArmError, match="clearerr does not answer"):
        arm.recover()
    serl_server.start()
    arm.cfg.timeout_s = 20  # it builds its simulation again
    arm.recover()
    assert arm.state().pose.shape == (7,)


def test_a_server_that_stalls_is_an_error(serl_server: SerlServer):
    arm = serl_arm(serl_server)
    serl_server.stalled.set()
    error, seconds = until_error(arm.state, 10)
    assert seconds < 5
    assert f"{serl_server.url}/getstate does not answer (timed out)" in str(error)


@pytest.mark.parametrize(
    ("answer", "met"),
    [
        ((500, "no jacobian"), r"answers 500 \('no jacobian'\)"),
        ((200, "<html>"), "no state of a SERL server"),
        ((200, "{}"), "no state of a SERL server"),
        (
            (200, '{"pose": 1, "vel": 1, "force": 1, "torque": 1, "q": 1, "dq": 1, "gripper_pos": 1}'),
            "'pose'",
        ),
    ],
)
def test_what_is_no_state(serl_server: SerlServer, answer, met):
    arm = serl_arm(serl_server)
    serl_server.answers["getstate"] = answer
    with pytest.raises(ArmError, match=met):
        arm.state()


def test_a_reset_to_other_joints_is_an_error(serl_server: SerlServer):
    arm = serl_arm(serl_server)
    arm.cfg.reset_timeout_s = 20
    with pytest.raises(ArmError, match="--reset_joint_target"):
        arm.joint_reset([0.5, *HOME_Q[1:]])


def test_no_server_is_an_error_of_the_user():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/clearerr does not answer"):
        make_arm(SerlHttpArmConfig(url="http://127.0.0.1:9"), control_hz=10)


def test_the_proxy_of_the_environment_is_not_asked(serl_server: SerlServer, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert serl_arm(serl_server).state().pose.shape == (7,)
