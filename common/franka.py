"""A Franka arm and its cameras as a gymnasium env: one arm, one task, no batch.

    obs, info = env.reset(seed=0)                 # drives the arm to where episodes start
    obs, reward, terminated, truncated, info = env.step(action)   # returns one control period later

action (7,) in [-1, 1]: dx dy dz, turns about x y z, gripper. The first six, times `action_scale`, move the
*measured* pose along the axes of the robot's base; the result is clipped to the safety box and commanded. At
-0.5 or less the gripper closes, at 0.5 or more it opens, where its last command was another one; the arm
stands still in such a step.

obs["state"], float32: tcp_pose (7,) xyz m + quaternion xyzw, tcp_vel (6,) m/s and rad/s,
gripper_position (1,) m, tcp_force (3,) N, tcp_torque (3,) Nm. obs["frames"]: camera -> (128, 128, 3) uint8.

info: in_zone (bool: at the target pose now), hold_steps (int: for how many steps without a break), success
(bool: for success_hold_steps of them), gripper_penalty (float: what this step paid for the gripper), late_s
(float: by how much the step overran its period).

Semantics follow RLinf's Franka env. Differences: the penalty does not keep a complete hold from ending the
episode, orientation is tested where its threshold is a number, reset moves stay in the box too, and a step
that has waited for the fingers moves nothing else: its axes are 0.6 s old by then.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from common.arms import Arm, ArmError, RobotState
from common.cameras import FRAME_SIZE, Camera
from common.franka_config import FrankaConfig
from common.poses import distances, moved, pose_error, to_euler_pose, to_quat_pose, waypoints
from common.runtime import UserError
from common.timing import Rate, SimulatedClock

GRIPPER_THRESHOLD = 0.5  # of action[6] * action_scale[2]
WIDE_OPEN_M = 0.07  # of the Franka hand's 0.08
RESET_TURN_RAD_S = 0.5  # at most
OUTSIDE_M = 0.05  # so far outside the safety box a real arm is brought back by hand
RESET_PATIENCE_S = 1.5  # to come a tenth nearer; a soft arm turns at 0.1 rad/s, whatever is commanded


def state_vector(state: dict[str, np.ndarray]) -> np.ndarray:
    """The parts of obs["state"] in the order of their names, (D,) float32: 20, or 19 with Euler angles."""
    return np.concatenate([state[name] for name in sorted(state)])


class FrankaEnv(gymnasium.Env):
    """See the top of this file. `arm` and `cameras` (name -> Camera) stay their maker's to close.

    Whatever goes wrong in `step` or `reset` (ArmError, CameraError, Ctrl-C) stops the arm before it is raised
    on; the next call must be `reset`, which recovers an arm whose control was lost, up to `max_recoveries`
    times in a row. new_scene(seed): called by `reset` before anything moves, to draw simulated objects anew.
    """

    def __init__(
        self,
        cfg: FrankaConfig,
        arm: Arm,
        cameras: dict[str, Camera],
        new_scene: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.cfg, self.task, self.arm, self.cameras, self.new_scene = (
            cfg, cfg.override_cfg, arm, cameras, new_scene,
        )  # fmt: skip
        task = self.task
        realtime = not arm.simulated if task.realtime is None else task.realtime
        if not realtime and not arm.simulated:
            raise UserError("override_cfg.realtime: false would rush a real arm; it is for simulated ones")
        if not realtime:
            clock = SimulatedClock()
            sleep = clock.sleep
        self.now, self._sleep = clock, sleep  # now(): s, of the arm's own time
        self.rate = Rate(task.step_hz, clock, sleep)
        self.box = task.safety_box()
        self.target = to_quat_pose(np.array(task.target_ee_pose))
        self.threshold = np.array([np.inf if t is None else t for t in task.reward_threshold])
        self.num_steps = self.hold_steps = self._num_resets = self._recoveries = 0
        self._gripper_command: bool | None = None  # open? None: not known, the next command acts
        self._lost_control = False
        self._state: RobotState | None = None  # None: reset first
        self._command = self.target  # the last pose sent

        self.action_space = Box(-1.0, 1.0, (7,), np.float32)
        sizes = {"tcp_pose": 7, "tcp_vel": 6, "gripper_position": 1, "tcp_force": 3, "tcp_torque": 3}
        self.observation_space = Dict(
            {
                "state": Dict(
                    {name: Box(-np.inf, np.inf, (size,), np.float32) for name, size in sizes.items()}
                ),
                "frames": Dict(
                    {name: Box(0, 255, (FRAME_SIZE, FRAME_SIZE, 3), np.uint8) for name in self.cameras}
                ),
            }
        )

    @property
    def pose(self) -> np.ndarray | None:
        """(7,) measured last, in the base frame; None before a reset and after an error."""
        return None if self._state is None else self._state.pose

    @property
    def gripper_open(self) -> bool | None:
        """By the last command. None before the first one, unless it was found wide open."""
        return self._gripper_command

    # -- a step -------------------------------------------------------------------------------------

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() first: the arm has not been brought to its start")
        action = self._checked(action)
        with self._stopped_by_errors():
            late_s = self.rate.begin()
            gripper_acted = self._act_gripper(action[6] * self.task.action_scale[2])
            twist = np.zeros(6) if gripper_acted else action[:6] * np.repeat(self.task.action_scale[:2], 3)
            target = moved(self._state.pose, twist)
            self._move(self.box.clip(target, self._state.pose[:3]))
            late_s = max(late_s, self.rate.wait())
            obs = self._observe()
        self.num_steps += 1
        in_zone = self._in_zone()
        self.hold_steps = self.hold_steps + 1 if in_zone else 0
        penalty = self.task.gripper_penalty if gripper_acted and self.task.enable_gripper_penalty else 0.0
        info = self._info(in_zone) | {"gripper_penalty": penalty, "late_s": late_s}
        truncated = self.num_steps >= self.cfg.max_episode_steps
        return obs, self._pose_reward(in_zone) - penalty, info["success"], truncated, info

    def _checked(self, action: np.ndarray) -> np.ndarray:
        """(7,) float64 in [-1, 1]."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"an action is seven finite numbers, got {action.tolist()}")
        return np.clip(action, -1.0, 1.0)

    def _act_gripper(self, command: float) -> bool:
        """Open or close, and wait for the fingers, if that changes anything. -> whether it did."""
        if abs(command) < GRIPPER_THRESHOLD:
            return False
        return self._set_gripper(bool(command > 0))

    def _set_gripper(self, opened: bool) -> bool:
        if self._gripper_command == opened:
            return False
        self.arm.gripper(opened)
        self._gripper_command = opened
        self._hold(self.task.gripper_sleep_s)
        self._state = self.arm.state()  # the arm went on to its last command meanwhile
        return True

    def _hold(self, seconds: float) -> None:
        """Let time pass at the last command."""
        if not self.arm.simulated:
            self._sleep(seconds)
            self.rate.restart()
            return
        for _ in range(round(seconds * self.task.step_hz)):
            self._move(self._command)
            self.rate.wait()

    def _move(self, pose: np.ndarray) -> None:
        self.arm.move(pose)
        self._command = pose

    def _in_zone(self) -> bool:
        return bool((np.abs(pose_error(self._state.pose, self.target)) <= self.threshold).all())

    def _pose_reward(self, in_zone: bool) -> float:
        if in_zone:
            return 1.0
        if not self.task.use_dense_reward:
            return 0.0
        return float(np.exp(-500 * np.square(self._state.pose[:3] - self.target[:3]).sum()))

    def _info(self, in_zone: bool) -> dict[str, Any]:
        success = self.hold_steps >= self.task.success_hold_steps
        return {"in_zone": in_zone, "hold_steps": self.hold_steps, "success": success}

    def _observe(self) -> dict[str, dict[str, np.ndarray]]:
        """Read the arm and the cameras."""
        self._state = state = self.arm.state()
        pose = state.pose.copy()
        if pose[3:] @ self.target[3:] < 0:
            pose[3:] *= -1  # q and -q are one orientation; a policy must not see it jump between them
        parts = {
            "tcp_pose": pose,
            "tcp_vel": state.vel,
            "gripper_position": np.array([state.gripper]),
            "tcp_force": state.force,
            "tcp_torque": state.torque,
        }
        frames = {
            name: camera.read_latest(self.task.frame_max_age_s)[0] for name, camera in self.cameras.items()
        }
        return {"state": {name: part.astype(np.float32) for name, part in parts.items()}, "frames": frames}

    @contextlib.contextmanager
    def _stopped_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._state = self._gripper_command = None  # the fingers stop wherever they are
            self._lost_control = self._lost_control or isinstance(error, ArmError)
            with contextlib.suppress(ArmError):  # nothing more can be done, and the first error says it all
                self.arm.stop()
            raise

    # -- a pause ------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop arm and fingers where they are, until `go_on`."""
        with self._stopped_by_errors():
            self.arm.stop()

    def go_on(self) -> None:
        """After a `pause`: the next step starts from where the arm is now, and the fingers go on."""
        with self._stopped_by_errors():
            if self._gripper_command is not None:
                self.arm.gripper(self._gripper_command)
            self._stand_still()

    # -- a reset ------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict, dict[str, Any]]:
        """Bring the arm to where episodes start.

        options: task_id (int: which of reset_y_offsets_m), joint_reset (bool: now, whatever the cycle says).
        Raises ArmError if the arm does not get there, UserError where a real one stands so far from the
        safety box that nobody knows what is in between.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := sorted(set(options) - {"task_id", "joint_reset"}):
            raise ValueError(f"reset knows the options task_id and joint_reset, got {unknown[0]}")
        self.num_steps = self.hold_steps = 0
        with self._stopped_by_errors():
            self._recover()
            self._num_resets += 1
            if self.new_scene is not None:
                self.new_scene(int(self.np_random.integers(2**31)))
                self._gripper_command = None
            self._stand_still()
            self._check_place()
            if self.task.reset_gripper is not None:
                self._set_gripper(self.task.reset_gripper == "open")
            self._rise()
            cycle = self.task.joint_reset_cycle
            if options.get("joint_reset") or (cycle is not None and self._num_resets % cycle == 0):
                self.arm.joint_reset(np.array(self.task.joint_reset_qpos))
                self._stand_still()
            self._go_to(self._draw_start(options.get("task_id", 0)))
            obs = self._observe()
        self.rate.restart()
        return obs, self._info(self._in_zone())

    def _recover(self) -> None:
        if not self._lost_control:
            self._recoveries = 0
            return
        if self._recoveries >= self.task.max_recoveries:
            raise ArmError(
                f"control of the arm was lost in {self._recoveries + 1} episodes in a row; look what it runs "
                "into, then start again"
            )
        self._recoveries += 1
        self.arm.recover()
        self._lost_control, self._gripper_command = False, None

    def _stand_still(self) -> None:
        """What is commanded next starts from what the arm is now."""
        self._state = self.arm.state()
        self._command = self._state.pose
        if self._gripper_command is None and self._state.gripper > WIDE_OPEN_M:
            self._gripper_command = True
        self.rate.restart()

    def _check_place(self) -> None:
        xyz = self._state.pose[:3]
        away_m = np.linalg.norm(xyz - np.clip(xyz, self.box.low[:3], self.box.high[:3]))
        if away_m > OUTSIDE_M and not self.arm.simulated and not self.task.reset_from_outside:
            raise UserError(
                f"the arm stands {away_m:.2f} m outside the safety box, at xyz {xyz.round(3).tolist()}: "
                "bring it there by hand, or set override_cfg.reset_from_outside=true and it drives straight"
            )

    def _draw_start(self, task_id: int) -> np.ndarray:
        """(7,): the reset pose with the sub-task's offset and a random shift and yaw."""
        task = self.task
        if not 0 <= task_id < len(task.reset_y_offsets_m):
            raise ValueError(f"task_id {task_id} has no entry in reset_y_offsets_m {task.reset_y_offsets_m}")
        start = to_euler_pose(task.reset_pose())
        start[1] += task.reset_y_offsets_m[task_id]
        reach = np.array([task.random_xy_range_m, task.random_xy_range_m, task.random_rz_range_rad])
        start[[0, 1, 5]] += self.np_random.uniform(-reach, reach)
        return to_quat_pose(start)

    def _rise(self) -> None:
        """Straight up, out of a slot or a bin, no higher than the box."""
        rise_m = min(self.task.reset_rise_m, self.box.high[2] - self._state.pose[2])
        if rise_m > 0:
            goal = self._state.pose.copy()
            goal[2] += rise_m
            self._travel(goal, least_s=1.0)

    def _go_to(self, start: np.ndarray) -> None:
        """To the pose (7,) where an episode starts, clipped to the box; waits while the arm comes nearer."""
        task, start = self.task, self.box.clip(start, start[:3])
        self._travel(self.box.clip(start, self._state.pose[:3]), task.reset_move_s)
        tolerance = np.array([task.reset_tolerance_m, task.reset_tolerance_rad])
        before, waited_s = distances(self._state.pose, start), 0.0
        while ((away := distances(self._state.pose, start)) > tolerance).any():
            if waited_s >= RESET_PATIENCE_S:
                if (away > np.maximum(tolerance, 0.9 * before)).any():
                    raise ArmError(
                        f"the arm does not reach the start of an episode: it stands {away[0]:.3f} m and "
                        f"{away[1]:.2f} rad away from it; look what holds it, or raise reset_tolerance_m or "
                        "reset_tolerance_rad of env.override_cfg"
                    )
                before, waited_s = away, 0.0
            self._move(self.box.clip(start, self._state.pose[:3]))
            self.rate.wait()
            waited_s += self.rate.period_s
            self._state = self.arm.state()

    def _travel(self, goal: np.ndarray, least_s: float) -> None:
        """In a straight line to goal (7,), which the caller has clipped: from inside the box the line stays
        inside, from outside it only comes nearer."""
        way_m, way_rad = distances(goal, self._state.pose)
        seconds = max(least_s, way_m / self.task.reset_speed_m_s, way_rad / RESET_TURN_RAD_S)
        self.rate.restart()
        for pose in waypoints(self._state.pose, goal, math.ceil(seconds * self.task.step_hz)):
            self._move(pose)
            self.rate.wait()
        self._state = self.arm.state()

    def close(self) -> None:
        """Stop the arm."""
        with contextlib.suppress(ArmError):  # then it has stopped by itself
            self.arm.stop()
