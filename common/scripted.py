"""Scripted experts: proportional controllers on the state, in `pd_ee_delta_pos` (x, y, z, gripper, -1 to 1).

They choose the next point from the state alone, without a memory of phases, so they recover from noise.
Distances in metres. At 10 Hz they succeed after about 8 (push), 6 (pull) and 10 (pick) steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.geometry import CUBE_HALF
from common.runtime import UserError

STEP_M = 0.1  # what an action of 1 moves the gripper by in one control step
OPEN, CLOSED = 1.0, -1.0
CLEAR_HEIGHT = 0.12  # the closed hand passes over a cube
SHOVE_HEIGHT, SHOVE_STEP = 0.03, 0.06  # longer steps near the end of the arm's reach find no joint solution


def push_cube(tcp: Tensor, cube: Tensor, goal: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Behind the cube, down, then forward (+x) through it to the goal."""
    return _shove(tcp, cube, goal, side=-1.0)


def pull_cube(tcp: Tensor, cube: Tensor, goal: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """In front of the cube, down, then backward (-x)."""
    return _shove(tcp, cube, goal, side=1.0)


def _shove(tcp: Tensor, cube: Tensor, goal: Tensor, side: float) -> tuple[Tensor, Tensor]:
    beside = cube.clone()
    beside[:, 0] += side * (CUBE_HALF + 0.035)
    ready = (tcp[:, 1] - cube[:, 1]).abs() < 0.015
    ready &= side * (tcp[:, 0] - cube[:, 0]) > CUBE_HALF
    low = tcp[:, 2] < SHOVE_HEIGHT + 0.02
    target = beside.clone()
    target[:, 2] = torch.where(ready, SHOVE_HEIGHT, 0.08)  # come down only beside the cube, not on it
    onward = goal[:, 0] + side * CUBE_HALF - tcp[:, 0]
    through = torch.stack(
        [tcp[:, 0] + onward.clamp(-SHOVE_STEP, SHOVE_STEP), cube[:, 1], target[:, 2]], dim=1
    )
    target = torch.where((ready & low)[:, None], through, target)
    return target, torch.full_like(tcp[:, 0], CLOSED)


def pick_cube(tcp: Tensor, cube: Tensor, goal: Tensor, grasped: Tensor) -> tuple[Tensor, Tensor]:
    """Above the cube with the gripper open, down, close, carry to the goal."""
    across = (tcp[:, :2] - cube[:, :2]).norm(dim=1)
    above = cube.clone()
    above[:, 2] = torch.where(across < 0.015, cube[:, 2], cube[:, 2] + 0.08)
    at_cube = (tcp - cube).norm(dim=1) < 0.015
    target = torch.where((grasped > 0.5)[:, None], goal, above)
    gripper = torch.where(at_cube | (grasped > 0.5), CLOSED, OPEN)
    return target, gripper


EXPERTS: dict[str, Callable] = {
    "PushCube-v1": push_cube,
    "PullCube-v1": pull_cube,
    "PickCube-v1": pick_cube,
}


class ScriptedExpert:
    """The expert of one task, for batches of states laid out as `obs_layout` says."""

    def __init__(self, task: str, control_mode: str, obs_layout: dict[str, tuple[int, int]]):
        if task not in EXPERTS:
            raise UserError(f"no scripted expert for {task}; there is one for {', '.join(EXPERTS)}")
        if control_mode != "pd_ee_delta_pos":
            raise UserError(f"the scripted experts speak pd_ee_delta_pos, not {control_mode}")
        self.expert, self.layout = EXPERTS[task], obs_layout

    def act(self, obs: Tensor, goal_offset: Tensor, skip_object: Tensor) -> Tensor:
        """obs (N, D) -> action (N, 4) in [-1, 1]. goal_offset (N, 3) in metres: aim beside the goal;
        skip_object (N,) bool: bring an empty hand to the goal, over the object.
        """
        tcp, cube, goal = (self._part(obs, name)[:, :3] for name in ("tcp_pose", "obj_pose", "goal_pos"))
        grasped = (
            self._part(obs, "is_grasped")[:, 0] if "is_grasped" in self.layout else torch.zeros(len(obs))
        )
        aim = goal + goal_offset
        target, gripper = self.expert(tcp, cube, aim, grasped)
        arrived = (tcp[:, :2] - aim[:, :2]).norm(dim=1) < 0.03
        straight = aim.clone()
        straight[:, 2] = aim[:, 2].clamp(min=SHOVE_HEIGHT)
        straight[~arrived, 2] = straight[~arrived, 2].clamp(min=CLEAR_HEIGHT)
        target = torch.where(skip_object[:, None], straight, target)
        return torch.cat([((target - tcp) / STEP_M).clamp(-1, 1), gripper[:, None]], dim=1)

    def _part(self, obs: Tensor, name: str) -> Tensor:
        start, stop = self.layout[name]
        return obs[:, start:stop]
