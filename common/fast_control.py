"""ManiSkill's `pd_ee_delta_pos` on the CPU, without its tensors of one row.

Half of a state step on the CPU is this controller's `set_action`, and little of that is inverse kinematics:
the rest multiplies poses as torch tensors of one row, dozens of calls of some microseconds each. SAPIEN's own
poses do the same in C++, in the same precision.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mani_skill.agents.base_agent import BaseAgent
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController


def use_fast_control(agent: "BaseAgent | None") -> None:
    """Speed up the present controllers of a robot in CPU simulation; those not known to be equal stay."""
    from mani_skill.agents.base_agent import BaseAgent
    from mani_skill.agents.controllers.base_controller import DictController

    if not isinstance(agent, BaseAgent) or agent.scene.gpu_sim_enabled:
        return  # several robots, or none, or many envs in one tensor
    if isinstance(agent.controller, DictController):
        for controller in agent.controller.controllers.values():
            if _is_known(controller):
                controller.set_action = MoveBy(controller)  # shadows the method of the class


def _is_known(controller) -> bool:
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController

    return (
        type(controller) is PDEEPosController
        and controller.config.frame == "root_translation"
        and controller.config.use_delta
        and not controller.config.use_target
        and not controller.config.interpolate
    )


class MoveBy:
    """`PDEEPosController.set_action` for one env: the joints are driven to where the end effector stands
    `action` further, along the axes of the robot's root, in its present orientation. What the method
    remembers of its last target is not kept: only interpolation and `use_target` read it."""

    def __init__(self, controller: "PDEEPosController"):
        self.controller = controller
        kinematics = controller.kinematics
        self.model, self.end_link = kinematics.pmodel, kinematics.end_link_idx
        self.robot = controller.articulation._objs[0]
        self.root, self.hand = controller.root_link._objs[0], controller.ee_link._objs[0]
        self.joints = [joint._objs[0] for joint in controller.joints]
        # the model has joints in an order of its own: where they are in the robot's qpos, which of them move
        self.known = kinematics.pmodel_active_joint_indices.numpy()
        self.moved = kinematics.pmodel_controlled_joint_indices.numpy()
        self.may_move = kinematics.qmask.numpy()

    def __call__(self, action: torch.Tensor) -> None:
        """action (1, 3) in [-1, 1], clipped."""
        step = self.controller._preprocess_action(action)[0].numpy()  # m
        target = self.root.entity_pose.inv() * self.hand.entity_pose
        target.p = target.p + step
        present = self.robot.qpos[self.known]
        result, success, _ = self.model.compute_inverse_kinematics(
            self.end_link, target, initial_qpos=present, active_qmask=self.may_move, max_iterations=100
        )
        goal = result if success else present  # out of reach: hold the joints where they are
        for joint, angle in zip(self.joints, goal[self.moved], strict=True):
            joint.set_drive_target(angle)
