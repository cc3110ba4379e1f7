"""Wrappers around `common.franka.FrankaEnv`, and the one place that puts them on in the right order.

    FrankaEnv -> GripperClose -> SpacemouseIntervention -> keys or reward model -> RelativeFrame -> Quat2Euler

Everything up to the reward acts in the axes of the robot's base; a policy on top acts and sees in the axes of
the gripper. Orders, keys and numbers follow RLinf's wrappers, what differs is said at the class.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from scipy.spatial.transform import Rotation

from common.arms import make_arm
from common.cameras import open_cameras
from common.devices import AnyKeyboard, Mouse
from common.franka import FrankaEnv
from common.franka_config import FrankaConfig
from common.poses import to_euler_pose, turn_twist
from common.rewards import Decision
from common.runtime import UserError

Frames = dict[str, np.ndarray]  # camera -> (128, 128, 3) uint8
Judge = Callable[[Frames], float | None]  # -> success_prob; None: the verdict is late

STAGE_REWARD = {"a": 0.0, "b": 0.1, "c": 1.0}  # of KeyboardRewardMultiStage
INTERVENTION_S = 0.5  # the operator keeps the arm for so long after the last input
MIN_MOTION = 1e-3  # norm of the mouse's axes that counts as input


# ----------------------------------------------------------------------------------------------------
# Who acts


class GripperClose(gymnasium.Wrapper):
    """Actions without the gripper, (6,): it stays as the reset has left it."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.action_space = Box(-1.0, 1.0, (6,), np.float32)

    def step(self, action: np.ndarray):
        return self.env.step(np.append(action, 0.0))


class SpacemouseIntervention(gymnasium.Wrapper):
    """The operator's action instead of the caller's, from any input until 0.5 s after the last one (after a
    button, 0.5 s from when the fingers are done).

    The left button closes the gripper and the right one opens it (left wins). The command is repeated as long
    as the operator has the arm; who takes over begins with the gripper as it is (0 where nobody has commanded
    it yet), so that nothing is dropped that the policy holds. Under `GripperClose` the buttons take the arm
    over and move nothing.
    A stale mouse (unplugged, say) moves nothing, at once and until it is back: no policy drives an arm
    that nobody can stop.

    info: intervene_flag (bool), intervene_action (the executed action, only where it replaced the caller's),
    left, right, mouse_stale (bool).
    """

    def __init__(self, env: gymnasium.Env, mouse: Mouse, clock: Callable[[], float]):
        super().__init__(env)
        self.mouse, self.clock = mouse, clock
        self._last_input_s = -np.inf
        self._gripper_action: float | None = None  # None: the operator does not have the arm

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self._last_input_s, self._gripper_action = -np.inf, None
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        reading = self.mouse.read()
        pressed = reading.left or reading.right
        if pressed or np.linalg.norm(reading.axes) > MIN_MOTION:
            self._last_input_s = self.clock()
        replaced = reading.stale or self.clock() - self._last_input_s < INTERVENTION_S
        if pressed:
            self._gripper_action = self._draw(opened=not reading.left)
        elif not replaced:
            self._gripper_action = None
        elif self._gripper_action is None:
            opened = self.unwrapped.gripper_open
            self._gripper_action = 0.0 if opened is None else self._draw(opened)
        if replaced:
            action = np.append(reading.axes, self._gripper_action)[: self.action_space.shape[0]]
            action = action.astype(np.float32)
        obs, reward, terminated, truncated, info = self.env.step(action)
        if pressed:
            self._last_input_s = self.clock()
        info |= {"intervene_flag": replaced, "mouse_stale": reading.stale}
        info |= {"left": reading.left, "right": reading.right}
        if replaced:
            info["intervene_action"] = action
        return obs, reward, terminated, truncated, info

    def _draw(self, opened: bool) -> float:
        """A command near the end of its range; at the end itself a squashed Gaussian has no density."""
        size = float(self.np_random.uniform(0.9, 1.0))
        return size if opened else -size


# ----------------------------------------------------------------------------------------------------
# Who pays


class KeyboardReward(gymnasium.Wrapper):
    """Keys pay and end episodes, in place of the target pose: the last a, b, c or q pressed in a step counts.

    A terminal tells no key's release, so one press labels one step; holding a key repeats it.

    info: label_key (str or None), keys (all keys since the last step or reset, for who else wants them; those
    of a reset label nothing), success (bool: c).
    """

    def __init__(self, env: gymnasium.Env, keyboard: AnyKeyboard):
        super().__init__(env)
        self.keyboard = keyboard

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, info | {"keys": self.keyboard.read()}

    def step(self, action: np.ndarray):
        obs, _, _, truncated, info = self.env.step(action)
        keys = self.keyboard.read()
        key = next((key for key in reversed(keys) if key in ("a", "b", "c", "q")), None)
        reward, terminated = self.judge(key)
        info |= {"label_key": key, "keys": keys, "success": key == "c"}
        return obs, reward, terminated, truncated, info

    def judge(self, key: str | None) -> tuple[float, bool]:
        """-> reward, terminated."""
        raise NotImplementedError


class KeyboardRewardSingleStage(KeyboardReward):
    """a: -1 and the end; c: +1 and the end; b, q or nothing: 0, the episode goes on."""

    def judge(self, key: str | None) -> tuple[float, bool]:
        return {"a": -1.0, "c": 1.0}.get(key, 0.0), key in ("a", "c")


class KeyboardRewardMultiStage(KeyboardReward):
    """a, b, c set the stage, which pays 0, 0.1 and 1 at every step until the next one; c ends the episode.

    q: -1 for this step alone; the stage stays. A reset begins with stage a.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self._stage = "a"
        return super().reset(seed=seed, options=options)

    def judge(self, key: str | None) -> tuple[float, bool]:
        if key in STAGE_REWARD:
            self._stage = key
        return -1.0 if key == "q" else STAGE_REWARD[self._stage], self._stage == "c"


class RewardModelVerdict(gymnasium.Wrapper):
    """The reward model looks on: info gets success_prob (float, or None where it is late) and verdict (bool).

    judge(frames) -> success_prob, or None; a late verdict is no success. decision, of one env, says what a
    score comes to with those before it.
    """

    def __init__(self, env: gymnasium.Env, judge: Judge, decision: Decision):
        super().__init__(env)
        self.judge, self.decision = judge, decision

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.decision.reset()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        prob = self.judge(obs["frames"])
        score = torch.tensor([[torch.nan if prob is None else prob]])
        said = self.decision(score, torch.tensor([[False]]), torch.tensor([[self._may_succeed(info)]]))
        info |= {"success_prob": prob, "verdict": bool(said)}
        return obs, reward, terminated, truncated, info

    def _may_succeed(self, info: dict[str, Any]) -> bool:
        """Whether the step may be a success at all."""
        return True


class RewardModelSuccess(RewardModelVerdict):
    """The reward model pays and ends episodes, in place of the target pose (`standalone_realworld`).

    A verdict of success (with require_in_zone only scores with the gripper at the target pose vote for one)
    pays 1, less what the step cost for the gripper, and ends the episode.

    info, besides: success (bool: the verdict), true_success (bool: at the target pose now).
    """

    def __init__(self, env: gymnasium.Env, judge: Judge, decision: Decision, require_in_zone: bool = False):
        super().__init__(env, judge, decision)
        self.require_in_zone = require_in_zone

    def step(self, action: np.ndarray):
        obs, _, _, truncated, info = super().step(action)
        success = info["verdict"]
        info |= {"success": success, "true_success": info["in_zone"]}
        return obs, float(success) - info["gripper_penalty"], success, truncated, info

    def _may_succeed(self, info: dict[str, Any]) -> bool:
        return info["in_zone"] or not self.require_in_zone


# ----------------------------------------------------------------------------------------------------
# In whose axes


class RelativeFrame(gymnasium.Wrapper):
    """Actions and velocities in the gripper's own axes, tcp_pose as seen from where the episode began.

    Both halves of an action (displacement, turn) and of tcp_vel are turned alike, see `poses.turn_twist`:
    RLinf's matrix mixes displacements into turns. info["intervene_action"] comes back in the gripper's axes
    too; a diagonal one may then exceed 1 in an entry.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        obs, info = self.env.reset(seed=seed, options=options)
        self._start = obs["state"]["tcp_pose"].astype(np.float64)
        return self._relative(obs), info

    def step(self, action: np.ndarray):
        to_base = self._axes
        action = np.concatenate([turn_twist(to_base, np.asarray(action[:6])), action[6:]])
        obs, reward, terminated, truncated, info = self.env.step(action.astype(np.float32))
        if "intervene_action" in info:  # it was chosen with the axes that this step began with
            mine = info["intervene_action"]
            turned = np.concatenate([turn_twist(to_base.inv(), mine[:6]), mine[6:]])
            info["intervene_action"] = turned.astype(np.float32)
        return self._relative(obs), reward, terminated, truncated, info

    def _relative(self, obs: dict) -> dict:
        """obs in new arrays; keeps the axes of the gripper for the next action."""
        pose = obs["state"]["tcp_pose"].astype(np.float64)
        self._axes, start = Rotation.from_quat(pose[3:]), Rotation.from_quat(self._start[3:])
        xyz = start.inv().apply(pose[:3] - self._start[:3])
        turn = (start.inv() * self._axes).as_quat(canonical=True)
        state = obs["state"] | {
            "tcp_pose": np.concatenate([xyz, turn]).astype(np.float32),
            "tcp_vel": turn_twist(self._axes.inv(), obs["state"]["tcp_vel"]).astype(np.float32),
        }
        return obs | {"state": state}


class Quat2Euler(gymnasium.ObservationWrapper):
    """tcp_pose (6,): xyz and Euler "xyz" in place of the quaternion.

    Above `RelativeFrame` the angles are near 0; without it a gripper that looks down has a roll that jumps
    between pi and -pi.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        state = dict(env.observation_space["state"].spaces)
        state["tcp_pose"] = Box(-np.inf, np.inf, (6,), np.float32)
        self.observation_space = Dict(dict(env.observation_space.spaces) | {"state": Dict(state)})

    def observation(self, obs: dict) -> dict:
        pose = to_euler_pose(obs["state"]["tcp_pose"]).astype(np.float32)
        return obs | {"state": obs["state"] | {"tcp_pose": pose}}


# ----------------------------------------------------------------------------------------------------
# Together


def wrap_franka(
    env: FrankaEnv,
    cfg: FrankaConfig,
    mouse: Mouse | None = None,
    keyboard: AnyKeyboard | None = None,
    verdict: Callable[[gymnasium.Env], gymnasium.Env] | None = None,
) -> gymnasium.Env:
    """The env wrapped as `cfg` says. verdict: partial(RewardModelSuccess, judge=..., decision=...).

    UserError where keys and reward model both want to end episodes, or a device that `cfg` wants is missing.
    """
    if verdict is not None and cfg.keyboard_reward_wrapper is not None:
        raise UserError(
            "with reward.standalone_realworld the reward model ends episodes, with "
            "env.keyboard_reward_wrapper the keys do; set one of them to false or null"
        )
    if cfg.use_spacemouse and mouse is None:
        raise UserError("env.use_spacemouse is on, but no mouse is there; set it to false")
    if cfg.keyboard_reward_wrapper is not None and keyboard is None:
        raise UserError("env.keyboard_reward_wrapper is set, but no keyboard is there; set it to null")
    wrapped: gymnasium.Env = env
    if cfg.no_gripper:
        wrapped = GripperClose(wrapped)
    if cfg.use_spacemouse:
        wrapped = SpacemouseIntervention(wrapped, mouse, env.now)
    if cfg.keyboard_reward_wrapper is not None:
        by_keys = {"single_stage": KeyboardRewardSingleStage, "multi_stage": KeyboardRewardMultiStage}
        wrapped = by_keys[cfg.keyboard_reward_wrapper](wrapped, keyboard)
    if verdict is not None:
        wrapped = verdict(wrapped)
    if cfg.use_relative_frame:
        wrapped = RelativeFrame(wrapped)
    return Quat2Euler(wrapped)


@contextlib.contextmanager
def open_franka(
    cfg: FrankaConfig,
    mouse: Mouse | None = None,
    keyboard: AnyKeyboard | None = None,
    verdict: Callable[[gymnasium.Env], gymnasium.Env] | None = None,
) -> Iterator[gymnasium.Env]:
    """Arm, cameras and env of `cfg`, wrapped (see `wrap_franka`); however the block ends, the arm stops and
    all that was opened here is closed. UserError where hardware is missing.
    """
    with (
        make_arm(cfg.arm, cfg.override_cfg.step_hz) as arm,
        open_cameras(cfg.all_cameras, arm) as cameras,
    ):
        new_scene = arm.reset_scene if cfg.arm.backend == "maniskill" else None
        with contextlib.closing(FrankaEnv(cfg, arm, cameras, new_scene)) as env:
            yield wrap_franka(env, cfg, mouse, keyboard, verdict)
