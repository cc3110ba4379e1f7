"""A simulated Panda in this process: ManiSkill's `pd_ee_pose`, and two cameras on a task's scene.

Time stands still between calls: `move` passes one control period, `joint_reset` as many as it needs.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.spatial.transform import Rotation

from common.arm_protocol import ArmError, RobotState, check_joints, check_pose
from common.runtime import UserError
from common.scenes import VIEWS, CamerasConfig, EnvConfig, make_base_env

SIM_HZ = 100  # ManiSkill's physics steps per second
JOINT_SPEED_RAD_S = 1.0  # of a joint reset
SETTLED_RAD = 0.01  # joints this near count as there
SETTLE_S = 2.0
HAND_LINKS = ("panda_hand", "panda_leftfinger", "panda_rightfinger")  # whose contacts are felt


@dataclass
class ManiSkillArmConfig:
    backend: Literal["maniskill"] = "maniskill"
    task: str = "PickCube-v1"  # whose scene stands around the arm: any ManiSkill task with a Panda
    seed: int = 0  # of the first scene
    # null: no pictures, and no render device needed. Otherwise what `render` shows, when it is called.
    cameras: CamerasConfig | None = field(default_factory=CamerasConfig)
    render_backend: Literal["auto", "cpu", "gpu"] = "auto"  # auto: gpu where torch sees one


class ManiSkillArm:
    """See common/arm_protocol.py. One thread drives it and looks at its pictures.

    UserError for an unknown task, one without a Panda, a rate that does not divide 100 Hz.
    """

    simulated = True

    def __init__(self, cfg: ManiSkillArmConfig, control_hz: float):
        if control_hz < 1 or SIM_HZ % control_hz:
            raise UserError(
                f"a simulated arm's rate must divide {SIM_HZ} Hz, got {control_hz:g}: choose 10 or 20"
            )
        self.cfg, self.control_hz = cfg, int(control_hz)
        self.env = make_base_env(
            EnvConfig(
                task=cfg.task,
                control_mode="pd_ee_pose",
                control_freq=self.control_hz,
                sim_backend="cpu",
                render_backend="none" if cfg.cameras is None else cfg.render_backend,
                reward_mode="sparse",
                cameras=cfg.cameras or CamerasConfig(),
            ),
            num_envs=1,
        )
        if self.env.single_action_space.shape != (7,):  # pose and gripper
            raise UserError(f"arm.task {cfg.task} has no single Panda with a gripper; choose another")
        self.reset_scene(cfg.seed)

    def reset_scene(self, seed: int) -> None:
        """Objects anew, as the task places them; the arm where the task starts it, its gripper open."""
        self.env.reset(seed=seed)
        agent = self.env.agent
        self._articulation, self._tcp = agent.robot._objs[0], agent.tcp._objs[0]  # in C++, without torch
        self._hand = {link for link in self._articulation.links if link.name.endswith(HAND_LINKS)}
        self._open = True
        self._drawn = False

    def state(self) -> RobotState:
        base, tcp = self._articulation.root_pose.inv(), self._tcp.entity_pose
        pose = base * tcp
        to_base, to_tcp = _rotation(base), _rotation(tcp).inv()
        force, torque = self._contact_wrench(tcp.p)
        q, dq = self._articulation.qpos.astype(np.float64), self._articulation.qvel.astype(np.float64)
        vel = [to_base.apply(self._tcp.linear_velocity), to_base.apply(self._tcp.angular_velocity)]
        return RobotState(
            pose=np.concatenate([pose.p, np.roll(pose.q, -1)]).astype(np.float64),  # wxyz -> xyzw
            vel=np.concatenate(vel),
            force=to_tcp.apply(force),
            torque=to_tcp.apply(torque),
            q=q[:7],
            dq=dq[:7],
            gripper=float(q[7] + q[8]),
        )

    def move(self, pose: np.ndarray) -> None:
        """Out of reach, the joints stay where they are."""
        pose = check_pose(pose)
        # capital letters: about the axes turned already, unlike RLinf's and SERL's "xyz"
        self._step("pd_ee_pose", [*pose[:3], *Rotation.from_quat(pose[3:]).as_euler("XYZ")])

    def gripper(self, open: bool) -> None:
        self._open = open

    def joint_reset(self, q: np.ndarray) -> None:
        q = check_joints(q)
        start = self.state().q
        num_steps = math.ceil(np.abs(q - start).max() / JOINT_SPEED_RAD_S * self.control_hz)
        for i in range(num_steps):
            self._step("pd_joint_pos", start + (q - start) * (i + 1) / num_steps)
        for _ in range(math.ceil(SETTLE_S * self.control_hz)):
            if np.abs(self.state().q - q).max() < SETTLED_RAD:
                return
            self._step("pd_joint_pos", q)
        raise ArmError(
            f"the simulated arm cannot get to the joints {q.round(2).tolist()}: something is in the way, or "
            "they are beyond its limits; reset the scene, or choose others"
        )

    def stop(self) -> None:
        """Time stands still until the next `move`."""

    def recover(self) -> None:
        """Control of a simulation is never lost."""

    def render(self, view: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB of the present state, of the camera `main_images` or `extra_view_images`."""
        if self.cfg.cameras is None:
            raise UserError("the simulated arm has no cameras: arm.cameras is null, delete that line")
        if view not in VIEWS:
            raise ValueError(f"a simulated arm has the views {' and '.join(VIEWS)}, not '{view}'")
        scene, hidden = self.env.scene, self.env._hidden_objects  # goal sites, unless they are to be seen
        for marker in hidden:
            marker.hide_visual()
        if not self._drawn:
            scene.update_render(update_sensors=True, update_human_render_cameras=False)
            self._drawn = True
        camera = scene.sensors[view]
        camera.capture()
        rgb = camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"]
        for marker in hidden:
            marker.show_visual()
        return rgb[0].cpu().numpy().copy()  # the renderer fills the same buffer again

    def close(self) -> None:
        self.env.close()

    def __enter__(self) -> "ManiSkillArm":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- parts ---------------------------------------------------------------------------------------

    def _step(self, control_mode: str, target) -> None:
        """One control period. target: (6,) xyz and Euler angles, or (7,) joints."""
        action = np.array([[*target, 1.0 if self._open else -1.0]], dtype=np.float32)
        self.env.step({"control_mode": control_mode, "action": action})
        self._drawn = False

    def _contact_wrench(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N and Nm about the point that the hand and its fingers press with, in the world's axes.

        Of the last physics step; what two of them do to each other does not count.
        """
        force, torque = np.zeros(3), np.zeros(3)
        for contact in self.env.scene.px.get_contacts():
            ours = [body in self._hand for body in contact.bodies]
            if sum(ours) != 1:
                continue
            sign = -1.0 if ours[0] else 1.0  # an impulse acts on the first of the two bodies
            for touch in contact.points:
                pressed = sign * touch.impulse * SIM_HZ
                force += pressed
                torque += np.cross(touch.position - point, pressed)
        return force, torque


def _rotation(pose) -> Rotation:
    return Rotation.from_quat(np.roll(pose.q, -1))  # wxyz -> xyzw
