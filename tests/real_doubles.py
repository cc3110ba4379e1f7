"""Stand-ins for a robot's hardware in which every number can be worked out by hand."""

import time

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from common.arm_protocol import ArmError, RobotState, check_pose
from common.timing import SimulatedClock


class ToyArm:
    """A gripper without a body: each `move` brings its pose the share `follow` of the way to its goal.

    pose: (7,) to start from. follow: 1 arrives at once, less lags behind. max_turn_rad: what it can turn in
    one move. bias_m: it ends so far beside its commands. lose_control_at: the numbers of the `move` calls
    (from 0, counted on over resets) that raise ArmError; until `recover`, so does everything else. `calls`
    tells what was asked of it, in order, `moves` the poses commanded. pushed_to: a pose (7,) where the next
    `move` ends instead, somebody leans on the arm.
    """

    def __init__(
        self,
        pose: np.ndarray,
        follow: float = 1.0,
        simulated: bool = True,
        max_turn_rad: float = np.inf,
        bias_m: tuple[float, float, float] = (0.0, 0.0, 0.0),
        lose_control_at: tuple[int, ...] = (),
    ):
        self.pose, self.follow, self.simulated = np.array(pose, float), follow, simulated
        self.max_turn_rad = max_turn_rad
        self.bias_m, self.lose_control_at = np.array(bias_m), set(lose_control_at)
        self.opening_m, self.joints = 0.08, np.zeros(7)
        self.pushed_to: np.ndarray | None = None
        self.moves: list[np.ndarray] = []
        self.calls: list[str] = []
        self.in_control = True

    def state(self) -> RobotState:
        self._check()
        return RobotState(
            pose=self.pose.copy(),
            vel=np.arange(6.0),
            force=np.array([1.0, 2.0, 3.0]),
            torque=np.array([4.0, 5.0, 6.0]),
            q=self.joints.copy(),
            dq=np.zeros(7),
            gripper=self.opening_m,
        )

    def move(self, pose: np.ndarray) -> None:
        self._check()
        number = len(self.moves)
        self.moves.append(pose.copy())
        self.calls.append("move")
        if number in self.lose_control_at:
            self.in_control = False
            raise ArmError("the toy arm ran into something; recover it")
        there = check_pose(pose)
        there[:3] += self.bias_m
        xyz = self.pose[:3] + self.follow * (there[:3] - self.pose[:3])
        ends = Rotation.from_quat(np.stack([self.pose[3:], there[3:]]))
        way_rad = (ends[1] * ends[0].inv()).magnitude()
        share = min(self.follow, self.max_turn_rad / way_rad) if way_rad > 0 else self.follow
        quat = Slerp([0.0, 1.0], ends)(share).as_quat() if share < 1 else there[3:]
        self.pose = np.concatenate([xyz if self.follow < 1 else there[:3], quat])
        if self.pushed_to is not None:
            self.pose, self.pushed_to = self.pushed_to.copy(), None

    def gripper(self, open: bool) -> None:
        self._check()
        self.calls.append("open" if open else "close")
        self.opening_m = 0.08 if open else 0.0

    def joint_reset(self, q: np.ndarray) -> None:
        self._check()
        self.calls.append("joint_reset")
        self.joints = q.copy()

    def stop(self) -> None:
        self.calls.append("stop")
        self._check()

    def recover(self) -> None:
        self.calls.append("recover")
        self.in_control = True

    def close(self) -> None:
        self.calls.append("close")

    def __enter__(self) -> "ToyArm":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check(self) -> None:
        if not self.in_control:
            raise ArmError("the toy arm is out of control; recover it")


class ToyCamera:
    """A picture of one colour per read: the k-th one, from 0, has first + k in all places.

    error: what reading raises, once it is set.
    """

    def __init__(self, first: int = 0):
        self.value = first
        self.error: BaseException | None = None

    def read_latest(self, max_age_s: float) -> tuple[np.ndarray, float]:
        if self.error is not None:
            raise self.error
        image = np.full((128, 128, 3), self.value, np.uint8)
        self.value = (self.value + 1) % 256
        return image, time.monotonic()

    def describe(self) -> str:
        return "toy camera"

    def close(self) -> None: ...


class ToyClock(SimulatedClock):
    """A clock in the test's hands: time passes in `sleep`, which takes `late_s` too long, and in `work`."""

    def __init__(self, late_s: float = 0.0):
        super().__init__()
        self.late_s = late_s
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        super().sleep(seconds + self.late_s)

    def work(self, seconds: float) -> None:
        super().sleep(seconds)
