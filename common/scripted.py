"""Scripted experts: proportional controllers on the state, in `pd_ee_delta_pos` (x, y, z, gripper, -1 to 1).

They choose the next point from the state alone, without a memory of phases, so they recover from noise.
They also know how not to do the task: `back` gives up ground, `wrong_way` takes the object from the goal.
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
SPHERE_LOW = 0.032  # of the sphere's centre over the bin's: it lies there at .025
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


def place_sphere(tcp: Tensor, sphere: Tensor, goal: Tensor, grasped: Tensor) -> tuple[Tensor, Tensor]:
    """Picked as a cube is, carried over the bin, lowered into it, let go; then the hand goes up."""
    across = (sphere[:, :2] - goal[:, :2]).norm(dim=1)
    low = sphere[:, 2] - goal[:, 2] < SPHERE_LOW
    into_bin = goal.clone()
    into_bin[:, 2] += torch.where(across < 0.01, 0.02, 0.1)
    target, gripper = pick_cube(tcp, sphere, into_bin, grasped)
    placed = (across < 0.02) & low
    up = tcp.clone()
    up[:, 2] += torch.where(grasped > 0.5, 0.0, 0.05)
    target = torch.where(placed[:, None], up, target)
    return target, torch.where(placed, OPEN, gripper)


EXPERTS: dict[str, Callable] = {
    "PushCube-v1": push_cube,
    "PullCube-v1": pull_cube,
    "PickCube-v1": pick_cube,
    "PlaceSphere-v1": place_sphere,
}

AWAY: dict[str, Callable] = {  # who brings an object to a goal on its other side
    "PushCube-v1": pull_cube,
    "PullCube-v1": push_cube,
    "PickCube-v1": pick_cube,
    "PlaceSphere-v1": pick_cube,
}
GOALS = ("goal_pos", "bin_pos")  # what tasks call the place of their goal


class ScriptedExpert:
    """The expert of one task, for batches of states laid out as `obs_layout` says."""

    def __init__(self, task: str, control_mode: str, obs_layout: dict[str, tuple[int, int]]):
        if task not in EXPERTS:
            raise UserError(f"no scripted expert for {task}; there is one for {', '.join(EXPERTS)}")
        if control_mode != "pd_ee_delta_pos":
            raise UserError(f"the scripted experts speak pd_ee_delta_pos, not {control_mode}")
        self.expert, self.away, self.layout = EXPERTS[task], AWAY[task], obs_layout

    def act(self, obs: Tensor, goal_offset: Tensor, object_offset: Tensor, skip_object: Tensor) -> Tensor:
        """obs (N, D) -> action (N, 4) in [-1, 1]. goal_offset and object_offset (N, 3) in metres: take goal
        and object to be so far from where they are; skip_object (N,) bool: bring an empty hand to the goal,
        over the object.
        """
        tcp, cube, goal, grasped = self._parts(obs)
        aim, cube = goal + goal_offset, cube + object_offset
        target, gripper = self.expert(tcp, cube, aim, grasped)
        arrived = (tcp[:, :2] - aim[:, :2]).norm(dim=1) < 0.03
        straight = aim.clone()
        straight[:, 2] = aim[:, 2].clamp(min=SHOVE_HEIGHT)
        straight[~arrived, 2] = straight[~arrived, 2].clamp(min=CLEAR_HEIGHT)
        target = torch.where(skip_object[:, None], straight, target)
        return _towards(target, gripper, tcp)

    def back(self, obs: Tensor, first_obs: Tensor) -> Tensor:
        """-> action (N, 4): the closed hand returns to where it was in first_obs (N, D)."""
        tcp = self._parts(obs)[0]
        return _towards(self._parts(first_obs)[0], torch.full_like(tcp[:, 0], CLOSED), tcp)

    def touch(self, obs: Tensor) -> Tensor:
        """-> action (N, 4): the closed hand goes straight to the object."""
        tcp, cube, _, _ = self._parts(obs)
        return _towards(cube, torch.full_like(tcp[:, 0], CLOSED), tcp)

    def wrong_way(self, obs: Tensor, first_obs: Tensor) -> Tensor:
        """-> action (N, 4): the object goes as far from where first_obs (N, D) had it, away from the goal."""
        tcp, cube, goal, grasped = self._parts(obs)
        cube_then = self._parts(first_obs)[1]
        mirrored = 2 * cube_then - goal
        mirrored[:, 2] = cube_then[:, 2]
        target, gripper = self.away(tcp, cube, mirrored, grasped)
        return _towards(target, gripper, tcp)

    def _parts(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tcp, cube, goal (N, 3) in metres, grasped (N,)."""
        start = {name: columns[0] for name, columns in self.layout.items()}
        names = ("tcp_pose", "obj_pose", *(name for name in GOALS if name in start))
        tcp, cube, goal = (obs[:, start[name] : start[name] + 3] for name in names)
        grasped = obs[:, start["is_grasped"]] if "is_grasped" in start else torch.zeros(len(obs))
        return tcp, cube, goal, grasped


def _towards(target: Tensor, gripper: Tensor, tcp: Tensor) -> Tensor:
    """Action (N, 4) that brings the gripper, at tcp (N, 3), as near to target (N, 3) as one step can."""
    return torch.cat([((target - tcp) / STEP_M).clamp(-1, 1), gripper[:, None]], dim=1)
