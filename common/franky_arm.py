"""A Franka Research 3 through franky-control 2 (https://github.com/TimSchneider42/franky), no ROS.

franky runs the Cartesian impedance law at 1 kHz in a thread of its own, in C++: `move` only sets its target.
The same code runs against franky-sim (`realtime: false`). The hand has a thread of ours: a command of it
takes a second, and reading its width can block for 0.1 s. After power-up it must be homed once, in Desk.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.arm_protocol import ArmError, RobotState, check_joints, check_pose
from common.runtime import UserError

HAND_POLL_S = 0.05
HAND_STOP_S = 0.5  # that a command which was broken off may take to say so
SETTLED_RAD = 0.01  # joints this near count as there
SETTLE_S = 5.0  # after a joint motion: the position controller lags behind its reference


@dataclass
class FrankyArmConfig:
    robot_ip: str
    backend: Literal["franky"] = "franky"
    realtime: bool = True  # only under a realtime kernel, as libfranka demands; false for franky-sim
    # The springs that pull the end effector to its target. A clip bounds the pull of a far target:
    # 2000 N/m over at most 0.01 m are 20 N.
    translational_stiffness_n_m: float = 2000.0
    rotational_stiffness_nm_rad: float = 150.0
    translational_clip_m: float = 0.01  # per axis
    rotational_clip_rad: float = 0.05  # per axis
    posture_stiffness_nm_rad: float = 10.0  # keeps the elbow where control began; 0: it may drift
    # Reflexes: beyond these external loads the robot stops itself.
    force_threshold_n: float = 30.0
    torque_threshold_nm: float = 20.0
    joint_reset_speed: float = 0.2  # share of the robot's limits
    hand_speed_m_s: float = 0.1
    grip_force_n: float = 60.0

    def __post_init__(self):
        springs = (self.translational_stiffness_n_m, self.rotational_stiffness_nm_rad)
        if min(*springs, self.translational_clip_m, self.rotational_clip_rad) <= 0:
            raise ValueError("stiffnesses and clips must be positive")
        if self.posture_stiffness_nm_rad < 0:
            raise ValueError(
                f"posture_stiffness_nm_rad must be 0 or more, got {self.posture_stiffness_nm_rad}"
            )
        if not 0 < self.joint_reset_speed <= 1:
            raise ValueError(f"joint_reset_speed must lie in (0, 1], got {self.joint_reset_speed}")


class FrankyArm:
    """See common/arm_protocol.py. UserError without franky, or if the robot cannot be reached."""

    simulated = False

    def __init__(self, cfg: FrankyArmConfig):
        self.cfg = cfg
        self.franky = _import_franky()
        self.robot = self.tracker = self.hand = None
        try:
            self.recover()
        except ArmError as error:
            raise UserError(str(error)) from error

    def state(self) -> RobotState:
        with self._control():
            measured = self.robot.state
            jacobian = self.robot.model.zero_jacobian(self.franky.Frame.EndEffector, measured)
            pose = measured.O_T_EE
            return RobotState(
                pose=np.concatenate([pose.translation, pose.quaternion]),
                vel=jacobian @ measured.dq,
                force=measured.K_F_ext_hat_K[:3].copy(),
                torque=measured.K_F_ext_hat_K[3:].copy(),
                q=measured.q,
                dq=measured.dq,
                gripper=self.hand.width_m,
            )

    def move(self, pose: np.ndarray) -> None:
        pose = check_pose(pose)
        with self._control():
            self.tracker.set_target(self.franky.Affine(pose[:3], pose[3:]))

    def gripper(self, open: bool) -> None:
        with self._control():
            self.hand.wanted_open = open

    def joint_reset(self, q: np.ndarray) -> None:
        q = check_joints(q)
        with self._control():
            try:
                self._end_motion()
                self._drive_joints(q)
            except (KeyboardInterrupt, SystemExit):  # then `stop` must find an arm that it can stop
                self._end_motion()
                self._track()
                raise
            self._track()

    def stop(self) -> None:
        if self.hand is not None:  # also where the arm has stopped by itself
            self.hand.stop()
        with self._control():
            self.tracker.set_target(self.robot.state.O_T_EE)

    def recover(self) -> None:
        """Connect anew: a robot object of franky that has lost its connection once never works again."""
        self.close()
        self._lost = None
        with self._control(check=False):
            self.robot = self.franky.Robot(
                self.cfg.robot_ip,
                default_force_threshold=self.cfg.force_threshold_n,
                default_torque_threshold=self.cfg.torque_threshold_nm,
                realtime_config=getattr(
                    self.franky.RealtimeConfig, "Enforce" if self.cfg.realtime else "Ignore"
                ),
            )
            if self.robot.has_errors and not self.robot.recover_from_errors():
                raise RuntimeError("it has errors that do not clear")
            self.hand = Hand(self.franky, self.cfg)
            self._track()

    def close(self) -> None:
        if self.hand is not None:
            self.hand.stop()
        # Any error: the robot may be gone, and then it has stopped by itself.
        with contextlib.suppress(Exception):
            self._end_motion()
        if self.hand is not None:  # last: it may have to be waited for
            self.hand.close()
        self.robot = self.tracker = self.hand = None  # a robot serves one connection: let go of this one
        self._lost = f"the arm at {self.cfg.robot_ip} has been closed"

    def __enter__(self) -> "FrankyArm":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- parts ---------------------------------------------------------------------------------------

    def _track(self) -> None:
        """Take control: a spring to where the end effector is."""
        cfg, franky = self.cfg, self.franky
        self.tracker = franky.CartesianImpedanceTracker(
            self.robot,
            translational_stiffness=cfg.translational_stiffness_n_m,
            rotational_stiffness=cfg.rotational_stiffness_nm_rad,
            translational_error_clip=np.full(3, cfg.translational_clip_m),
            rotational_error_clip=np.full(3, cfg.rotational_clip_rad),
            posture_task=franky.PostureTask(self.robot.state.q, cfg.posture_stiffness_nm_rad),
        )

    def _drive_joints(self, q: np.ndarray) -> None:
        motion = self.franky.JointMotion(q, relative_dynamics_factor=self.cfg.joint_reset_speed)
        self.robot.move(motion, asynchronous=True)
        self._wait_for_end()
        deadline = time.monotonic() + SETTLE_S
        while (away := np.abs(self.robot.state.q - q).max()) > SETTLED_RAD:
            if time.monotonic() > deadline:
                raise RuntimeError(f"a joint stays {away:.2f} rad away from where it was sent")
            time.sleep(0.02)

    def _end_motion(self) -> None:
        """Bring the arm to rest and give up control."""
        if self.robot is None or not self.robot.is_in_control:
            return
        in_joint_reset = self.robot.current_control_signal_type != self.franky.ControlSignalType.Torques
        stop = self.franky.JointStopMotion() if in_joint_reset else self.franky.TorqueStopMotion()
        self.robot.move(stop, asynchronous=True)
        self._wait_for_end()

    def _wait_for_end(self) -> None:
        # franky's own waiting (join_motion, tracker.stop) turns Ctrl-C into an error of control
        while self.robot.is_in_control:
            time.sleep(0.01)
        self.robot.join_motion(0)  # raises what ended it, if it was an error

    @contextlib.contextmanager
    def _control(self, check: bool = True) -> Iterator[None]:
        """Whatever goes wrong in here is a loss of control, and stays one until `recover`."""
        if self._lost:
            raise ArmError(self._lost)
        try:
            if check:
                self._check_control()
            yield
        # franky's own exceptions share no base class, and a dead connection is a bare RuntimeError
        except Exception as error:
            self._lost = (
                f"no control of the arm at {self.cfg.robot_ip} ({error}): see that it stands free, FCI is on "
                "in Desk and the stop button is out; then recover, or start again"
            )
            raise ArmError(self._lost) from error

    def _check_control(self) -> None:
        """Raises what ended it. libfranka gives up a robot that has been silent for a second; until then
        `state` is the last that came."""
        if self.hand.error is not None:
            raise self.hand.error
        if not self.robot.is_in_control:
            self._wait_for_end()
            raise RuntimeError("the robot has left the impedance control")


class Hand:
    """The Franka hand, served by a thread: `wanted_open` goes in, `width_m` and `error` come out.

    A command that comes while another runs waits for its end; of several, the last counts. Without one (None)
    the fingers stop if they are moving; what they have gripped stays gripped.
    """

    def __init__(self, franky, cfg: FrankyArmConfig):
        self.franky, self.cfg = franky, cfg
        self.gripper = franky.Gripper(cfg.robot_ip)
        self.wanted_open: bool | None = None
        self.width_m: float = self.gripper.width
        self.error: Exception | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="franka hand", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.wanted_open = None

    def close(self) -> None:
        self.stop()
        self._ending.set()
        self._thread.join(3)  # a command that still runs does not hold it up, a silent hand does for 1 s

    def _run(self) -> None:
        begun, running, ending = None, None, False
        try:
            # A command waits for its answer in a thread of its own, which lets go of libfranka's lock for no
            # longer than it takes to yield. `stop` gets it at once from the same core, from another after
            # about a second: here both stay on one.
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            while not ending:
                ending = self._ending.wait(HAND_POLL_S)  # once more after that, to stop them
                if running is not None and running.wait(0):
                    running = self._end(running)
                wanted = self.wanted_open
                if running is not None and wanted is None:
                    begun, running = None, self._break_off(running)
                if running is None and wanted not in (None, begun):
                    begun, running = wanted, self._begin(wanted)
                self.width_m = self.gripper.width  # takes up to 0.1 s
        except Exception as error:  # handed to the arm's next call
            self.error = error

    def _begin(self, open: bool):
        if open:
            return self.gripper.open_async(self.cfg.hand_speed_m_s)
        # So wide an epsilon takes any width for a grasp: how far it closes depends on what is in between.
        return self.gripper.grasp_async(0.0, self.cfg.hand_speed_m_s, self.cfg.grip_force_n, 1.0, 1.0)

    def _break_off(self, running) -> None:
        # `stop` of a hand at rest would let go of what it holds, so only a running command is broken off
        with contextlib.suppress(self.franky.CommandException):
            self.gripper.stop()
        if not running.wait(HAND_STOP_S):  # franky-sim never says so
            # the destructor would wait for that, and everybody with it: let it never be called
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.gripper))

    def _end(self, running) -> None:
        # A hand that could not do it is no loss of control: its width tells.
        with contextlib.suppress(self.franky.CommandException):
            running.get()


def read_pose(cfg: FrankyArmConfig) -> np.ndarray:
    """(7,) where the end effector stands, without taking control of the arm. Raises UserError."""
    franky = _import_franky()
    try:
        robot = franky.Robot(cfg.robot_ip, realtime_config=franky.RealtimeConfig.Ignore)
        pose = robot.state.O_T_EE
    except Exception as error:  # as in FrankyArm._control
        raise UserError(
            f"the arm at {cfg.robot_ip} cannot be read ({error}): see that it is on, FCI too, in Desk"
        ) from error
    return np.concatenate([pose.translation, pose.quaternion])


def _import_franky():
    try:
        import franky
    except ImportError as error:
        raise UserError(
            f"arm.backend franky needs the package franky-control ({error}): "
            ".venv/bin/python -m pip install -e '.[franka]'"
        ) from error
    return franky
