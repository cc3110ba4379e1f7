"""How far a state is from success, by the geometry of the tasks that the scripted experts know.

Written into every episode as `success_distance`: a score for trend labels (`common.trend`) that falls all the
way, where ManiSkill's dense rewards are gated (PushCube's says nothing while the cube is pushed).
"""

from collections.abc import Callable

import torch
from torch import Tensor

CUBE_HALF = 0.02  # m
CLOSE_ENOUGH = 0.01  # m; ManiSkill's shoving rewards count a gripper this near its place as there
# The object's way counts twice: the gripper goes with it, and reaching alone must not look like half of all.
OBJECT_WEIGHT = 2.0

# Where ManiSkill's dense rewards want the gripper, in m along x from the cube's centre.
PUSH_POINT = -(CUBE_HALF + 0.005)
PULL_POINT = CUBE_HALF + 0.010


def _shove(tcp: Tensor, cube: Tensor, goal: Tensor, point_x: float) -> Tensor:
    point = cube.clone()
    point[:, 0] += point_x
    reach = ((tcp - point).norm(dim=1) - CLOSE_ENOUGH).clamp(min=0.0)
    return reach + OBJECT_WEIGHT * (cube - goal)[:, :2].norm(dim=1)


def _pick(tcp: Tensor, cube: Tensor, goal: Tensor) -> Tensor:
    return (tcp - cube).norm(dim=1) + OBJECT_WEIGHT * (cube - goal).norm(dim=1)


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "PushCube-v1": lambda tcp, cube, goal: _shove(tcp, cube, goal, PUSH_POINT),
    "PullCube-v1": lambda tcp, cube, goal: _shove(tcp, cube, goal, PULL_POINT),
    "PickCube-v1": _pick,
}


def success_distance(task: str, obs_layout: dict[str, tuple[int, int]], obs: Tensor) -> Tensor | None:
    """Metres left to success: obs (N, D), laid out as `obs_layout` says -> (N,) float32, 0 or more.

    The gripper's way to where it acts on the object, and twice the object's way to the goal's centre (so a
    success has some left). None for a task without a rule.
    """
    if task not in DISTANCES:
        return None
    columns = (obs_layout[name][0] for name in ("tcp_pose", "obj_pose", "goal_pos"))
    tcp, cube, goal = (obs[:, start : start + 3].to(torch.float32) for start in columns)
    return DISTANCES[task](tcp, cube, goal)
