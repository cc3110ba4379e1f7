"""What a task on the Franka is: the section `env.train` / `env.eval` where `env_type: realworld`.

`override_cfg` is what differs from task to task and from table to table: the target, the box, the reset.
Names follow RLinf's; where a number has a unit, the name says it.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from common.arms import ArmConfig, ManiSkillArmConfig
from common.cameras import ARM_VIEWS, RealCameraConfig
from common.poses import SafetyBox, to_quat_pose
from common.scenes import DataCollectionConfig

Xyz = tuple[float, float, float]
EulerPose = tuple[float, float, float, float, float, float]  # xyz m, Euler "xyz" rad


@dataclass
class FrankaTaskConfig:
    target_ee_pose: EulerPose  # where the task is done: read it off the arm, standing there

    # reward
    reward_threshold: tuple[float | None, ...] = (0.01, 0.01, 0.01, None, None, None)  # m, rad; null: any
    success_hold_steps: int = 1  # steps in the zone without a break that make a success
    use_dense_reward: bool = False  # outside the zone exp(-500 d^2), d in m; else 0
    enable_gripper_penalty: bool = True
    gripper_penalty: float = 0.1  # off the reward of a step that opens or closes the gripper

    # motion
    action_scale: Xyz = (0.02, 0.1, 1.0)  # what an action of 1 means: m, rad, gripper
    step_hz: float = 10.0
    realtime: bool | None = None  # keep step_hz on the clock; null: where the arm is not simulated
    gripper_sleep_s: float = 0.6  # the arm waits for the fingers

    # safety box: given as limits, or else as ranges around the target
    ee_pose_limit_min: EulerPose | None = None
    ee_pose_limit_max: EulerPose | None = None
    clip_x_range_m: float = 0.05
    clip_y_range_m: float = 0.05
    clip_z_range_low_m: float = 0.0
    clip_z_range_high_m: float = 0.1
    clip_rxy_range_rad: float = 0.01  # roll and pitch
    clip_rz_range_rad: float = 0.5236
    forbidden_box_m: tuple[Xyz, Xyz] | None = None  # corners relative to the target: keep out of it

    # reset
    reset_ee_pose: EulerPose | None = None  # null: above the target, at the top of the box
    reset_y_offsets_m: tuple[float, ...] = (0.0,)  # one per sub-task: reset(options={"task_id": 1})
    random_xy_range_m: float = 0.0
    random_rz_range_rad: float = 0.0
    reset_gripper: Literal["open", "close"] | None = None  # before anything else moves
    reset_from_outside: bool = False  # drive a real arm into the safety box from wherever it stands
    reset_rise_m: float = 0.0  # straight up, before the way to the start
    reset_move_s: float = 1.5  # that the way takes at least
    reset_speed_m_s: float = 0.25  # at most, the way takes longer then
    reset_tolerance_m: float = 0.02  # arrived: so near in xyz ...
    reset_tolerance_rad: float = 0.1  # ... and in orientation
    joint_reset_cycle: int | None = 20000  # resets from one joint reset to the next; null: never
    joint_reset_qpos: tuple[float, ...] = (0.0, 0.0, 0.0, -1.9, 0.0, 2.0, 0.0)  # rad
    max_recoveries: int = 3  # resets in a row that may start by recovering a lost arm

    # cameras
    camera_serials: tuple[str, ...] = ()  # RealSense cameras: wrist_1, wrist_2, ... with default settings
    frame_max_age_s: float = 0.5  # an older frame is that of a stalled camera

    def __post_init__(self):
        if len(self.reward_threshold) != 6:
            raise ValueError(f"reward_threshold has 6 entries, got {len(self.reward_threshold)}")
        if (self.ee_pose_limit_min is None) != (self.ee_pose_limit_max is None):
            raise ValueError("ee_pose_limit_min and ee_pose_limit_max go together: give both or neither")
        low, high = self.limits()
        names = ("x", "y", "z", "roll", "pitch", "yaw")
        for name, least, wanted, most in zip(names, low, self.target_ee_pose, high, strict=True):
            if not least <= wanted <= most:
                raise ValueError(
                    f"target_ee_pose lies outside the safety box: {name} {wanted} is not in [{least}, {most}]"
                )
        if abs(self.target_ee_pose[4]) > 1.4:
            raise ValueError(
                f"target_ee_pose has a pitch of {self.target_ee_pose[4]} rad; near 1.57 Euler angles give out"
            )
        for name in ("step_hz", "reset_speed_m_s", "success_hold_steps", "reset_move_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.joint_reset_cycle is not None and self.joint_reset_cycle < 1:
            raise ValueError(f"joint_reset_cycle must be at least 1 or null, got {self.joint_reset_cycle}")
        if not self.reset_y_offsets_m:
            raise ValueError("reset_y_offsets_m needs an entry per sub-task, at least one")
        forbidden = self.safety_box().forbidden
        if forbidden is not None and not (forbidden[0] < forbidden[1]).all():
            raise ValueError("forbidden_box_m is [low corner, high corner], each low below its high")
        if forbidden is not None and not np.isfinite(forbidden).any():
            raise ValueError("forbidden_box_m fills the safety box: nothing is left to move in")

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Low and high (6,) of the safety box."""
        if self.ee_pose_limit_min is not None:
            return np.array(self.ee_pose_limit_min), np.array(self.ee_pose_limit_max)
        around, rxy, rz = np.array(self.target_ee_pose), self.clip_rxy_range_rad, self.clip_rz_range_rad
        below = np.array([self.clip_x_range_m, self.clip_y_range_m, self.clip_z_range_low_m, rxy, rxy, rz])
        above = below.copy()
        above[2] = self.clip_z_range_high_m
        return around - below, around + above

    def safety_box(self) -> SafetyBox:
        target = np.array(self.target_ee_pose)
        forbidden = self.forbidden_box_m
        if forbidden is not None:
            forbidden = tuple(target[:3] + np.array(corner) for corner in forbidden)
        return SafetyBox(*self.limits(), target[3:], forbidden)

    def reset_pose(self) -> np.ndarray:
        """(7,): where episodes start, before offsets and chance."""
        if self.reset_ee_pose is not None:
            return to_quat_pose(np.array(self.reset_ee_pose))
        above = np.array(self.target_ee_pose)
        above[2] = self.limits()[1][2]
        return to_quat_pose(above)


@dataclass
class FrankaConfig:
    override_cfg: FrankaTaskConfig
    env_type: Literal["realworld"] = "realworld"
    task: str = "franka"  # a name for the records
    task_description: str | None = None  # in words, for vision-language models
    arm: ArmConfig = field(default_factory=ManiSkillArmConfig)
    cameras: dict[str, RealCameraConfig] = field(default_factory=dict)  # by name, beside camera_serials
    no_gripper: bool = False  # actions have six entries and the gripper stays as it is
    use_spacemouse: bool = False  # the operator may take over at any time
    use_relative_frame: bool = True  # actions and state in the axes of the gripper, from where it started
    max_episode_steps: int = 100
    keyboard_reward_wrapper: Literal["single_stage", "multi_stage"] | None = None  # keys pay and end episodes
    main_image_key: str | None = None  # the camera whose frames are main_images; null: the first
    data_collection: DataCollectionConfig = field(default_factory=DataCollectionConfig)

    def __post_init__(self):
        if self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")
        if self.main_image_key not in (None, *self.all_cameras):
            names = ", ".join(self.all_cameras) or "none"
            raise ValueError(f"main_image_key '{self.main_image_key}' names no camera; there is {names}")
        draws = isinstance(self.arm, ManiSkillArmConfig) and self.arm.cameras is not None
        for name, camera in self.all_cameras.items():
            if camera.backend == "maniskill" and not draws:
                raise ValueError(
                    f"cameras.{name}: backend maniskill shows a simulated arm with arm.cameras, and "
                    f"arm.backend is {self.arm.backend}: choose realsense or opencv"
                )

    @property
    def all_cameras(self) -> dict[str, RealCameraConfig]:
        """Name -> camera: of camera_serials, then `cameras`; the simulated arm's own where none is given."""
        named = {
            f"wrist_{number}": RealCameraConfig(serial=serial)
            for number, serial in enumerate(self.override_cfg.camera_serials, start=1)
        } | self.cameras
        if not named and isinstance(self.arm, ManiSkillArmConfig) and self.arm.cameras is not None:
            return {view: RealCameraConfig(backend="maniskill", serial=view) for view in ARM_VIEWS}
        return named

    @property
    def main_camera(self) -> str | None:
        """Whose frames are the main images; None where there are no cameras."""
        return self.main_image_key or next(iter(self.all_cameras), None)

    @property
    def description(self) -> str:
        return self.task_description or f"Do the task {self.task}."
