"""ManiSkill tasks as batched envs with auto-reset, a state for the policy and camera frames on demand.

`ManiSkillEnvs` is one simulation in this process: any number of envs on a GPU, one on the CPU (PhysX's CPU
backend holds one env per scene). Many CPU envs are many processes: see `env_workers`. Both are driven alike:

    obs = envs.reset(seed)                       # (N, D) float32
    envs.step_async(action, Render.IF_DONE)      # action (N, A) float32 in [-1, 1]
    step = envs.step_wait()                      # a Step; finished envs have been reset already

Nothing is rendered that was not asked for. A `Step` keeps the true next observation of a finished episode
(`next_obs`) apart from what the policy acts on next (`obs`); no other module knows where an auto-reset env
hides it.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from common.runtime import UserError
from common.scenes import VIEWS, EnvConfig, camera_facts, make_base_env

SIM_STATE = "sim_state"  # a "view" that looks at the simulator's whole state, to be drawn later: (S,) float32


class Render(IntEnum):
    """What to render after a step, per env."""

    NONE = 0
    IF_DONE = 1  # the last frame of an episode only
    ALWAYS = 2  # the frame of every step
    RECORD = 3  # every step, and the first frame of the episode that follows an auto-reset


@dataclass
class EnvSpec:
    obs_dim: int
    action_dim: int
    obs_layout: dict[str, tuple[int, int]]  # name of each part of the state -> its columns [start, stop)
    info_types: dict[str, torch.dtype]  # per-env scalars of ManiSkill's info, "success" among them
    frame_shape: dict[str, tuple[int, ...]]  # view -> (H, W, 3); of SIM_STATE (S,)
    task: str
    task_description: str
    control: dict[str, Any]  # what an action means; kept in episodes, compared before they are mixed
    # what made the pictures, None where there are none; kept in episodes and reward models, compared before
    # scoring
    render: dict[str, Any] | None


@dataclass
class Step:
    obs: (
        torch.Tensor
    )  # (N, D) float32: act on this next (a first observation where an episode has just ended)
    next_obs: torch.Tensor  # (N, D) float32: what the action led to, the true last observation included
    env_reward: torch.Tensor  # (N,) float32
    terminated: torch.Tensor  # (N,) bool
    truncated: torch.Tensor  # (N,) bool
    info: dict[str, torch.Tensor]  # name -> (N,) float32 or bool, of next_obs
    frames: dict[str, torch.Tensor]  # view -> (M, H, W, 3) uint8 of next_obs, for the M envs in frame_ids
    frame_ids: torch.Tensor  # (M,) int64
    reset_frames: dict[str, torch.Tensor]  # view -> (R, H, W, 3) uint8 of obs, for the R envs in reset_ids
    reset_ids: torch.Tensor  # (R,) int64: finished envs under Render.RECORD
    action: torch.Tensor | None = None  # (N, A) executed, where somebody may have taken over; None: as given

    @property
    def done(self) -> torch.Tensor:
        return self.terminated | self.truncated

    @property
    def success(self) -> torch.Tensor:
        """(N,) bool: the simulator's verdict on next_obs, the truth."""
        return self.info["success"]

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """What a rollout keeps of a step, by name."""
        names = ("next_obs", "env_reward", "terminated", "truncated", "success")
        return {name: getattr(self, name) for name in names}


def episode_seed(seed: int, env_idx: int, episode: int) -> int:
    """The simulator seed of one episode: the same whichever process runs it and whatever ran before.

    On a GPU only a whole reset is seeded; auto-resets go on from one generator for all envs.
    """
    return int(np.random.SeedSequence([seed, env_idx, episode]).generate_state(1)[0] >> 1)


# ----------------------------------------------------------------------------------------------------
# The simulation
# ----------------------------------------------------------------------------------------------------


class ManiSkillEnvs:
    """One ManiSkill simulation: `num_envs` envs on a GPU, or one on the CPU, number `first_env` of many.

    Tensors stay on the device of the simulation. UserError where the task is unknown or wants a download.
    """

    def __init__(self, cfg: EnvConfig, num_envs: int, first_env: int = 0, views: tuple[str, ...] = VIEWS):
        self.cfg, self.num_envs, self.first_env, self.views = cfg, num_envs, first_env, views
        self.env = make_base_env(cfg, num_envs)
        self.device = self.env.device
        self.on_gpu = self.env.gpu_sim_enabled
        self.seed, self.episode = 0, 0
        self.env.reset(seed=0)
        self.spec = self._describe()
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None

    # -- driving --------------------------------------------------------------------------------

    def reset(self, seed: int) -> torch.Tensor:
        """Start all envs anew. -> obs (N, D)."""
        self.seed, self.episode = seed, 0
        if self.on_gpu:
            # one generator serves all envs of a GPU scene; auto-resets go on from it
            return self._observe(self.env.reset(seed=episode_seed(seed, self.first_env, 0))[0])
        return self._reset_done(None)

    def step_async(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> None:
        """Begin a step. action (N, A) float32 in [-1, 1]; render: one mode for all envs or (N,) of them."""
        if not isinstance(render, torch.Tensor):
            render = torch.full((self.num_envs,), int(render), dtype=torch.uint8)
        self._pending = (action, render)

    def step_wait(self) -> Step:
        action, render = self._pending
        if self.cfg.binary_gripper:
            gripper = torch.where(action[:, -1:] >= 0, 1.0, -1.0)
            action = torch.cat([action[:, :-1], gripper], dim=1)
        state, env_reward, terminated, _, info = self.env.step(action)
        obs = self._observe(state)
        truncated = self.env.elapsed_steps >= self.cfg.max_episode_steps
        if self.cfg.ignore_terminations:
            terminated = torch.zeros_like(terminated)
        truncated = truncated & ~terminated
        done = terminated | truncated

        frame_ids, frames = torch.zeros(0, dtype=torch.long, device=self.device), {}
        if render.any():
            render = render.to(self.device)
            wanted = (render >= Render.ALWAYS) | ((render == Render.IF_DONE) & done)
            frame_ids = wanted.nonzero().squeeze(1)
            frames = self.render(frame_ids)
        info = {key: info[key].clone() for key in self.spec.info_types}
        next_obs, reset_ids, reset_frames = obs, frame_ids[:0], {}
        if done.any():
            next_obs = obs.clone()
            obs = self._reset_done(done)
            if render.any():
                reset_ids = (done & (render == Render.RECORD)).nonzero().squeeze(1)
                reset_frames = self.render(reset_ids)
        return Step(
            obs, next_obs, env_reward.float(), terminated, truncated, info,
            frames, frame_ids, reset_frames, reset_ids,
        )  # fmt: skip

    def step(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> Step:
        self.step_async(action, render)
        return self.step_wait()

    def render(self, env_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures of the present state: view -> (M, H, W, 3) uint8 for the M envs asked for."""
        if len(env_ids) == 0:
            return {}
        if self.views == (SIM_STATE,):
            return {SIM_STATE: self.env.get_state()[env_ids].float()}
        scene = self.env.scene
        for marker in self.env._hidden_objects:  # goal sites, unless they are to be seen
            marker.hide_visual()
        scene.update_render(update_sensors=True, update_human_render_cameras=False)
        cameras = {view: scene.sensors[view] for view in self.views}
        for camera in cameras.values():
            camera.capture()
        frames = {}
        for view, camera in cameras.items():
            rgb = camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"]
            frames[view] = rgb[env_ids]  # a copy: the renderer fills the same buffer again
        for marker in self.env._hidden_objects:
            marker.show_visual()
        return frames

    def render_state(self, sim_state: torch.Tensor) -> dict[str, torch.Tensor]:
        """`render` of all envs as they were when SIM_STATE looked at them: sim_state (N, S)."""
        self.env.set_state(sim_state.to(self.device))
        return self.render(torch.arange(self.num_envs, device=self.device))

    def close(self) -> None:
        self.env.close()

    # -- parts --------------------------------------------------------------------------------

    def _reset_done(self, done: torch.Tensor | None) -> torch.Tensor:
        if self.on_gpu:
            return self._observe(self.env.reset(options={"env_idx": done.nonzero().squeeze(1)})[0])
        seed = episode_seed(self.seed, self.first_env, self.episode)
        self.episode += 1
        return self._observe(self.env.reset(seed=seed)[0])

    def _observe(self, state: torch.Tensor) -> torch.Tensor:
        """ManiSkill's state (N, D), and what else is asked for."""
        parts = [state]
        for name, scales in self.cfg.observe_fine.items():
            if scales:
                start, stop = self.spec.obs_layout[name]
                parts += [torch.tanh(state[:, start:stop] / scale) for scale in scales]
        if self.cfg.observe_time:
            parts.append((self.env.elapsed_steps / self.cfg.max_episode_steps)[:, None].to(state))
        return torch.cat(parts, dim=1)

    def _layout(self) -> dict[str, tuple[int, int]]:
        """Name of each part of the state, and of what `_observe` appends, -> its columns [start, stop)."""
        state = self.env._get_obs_state_dict(self.env.get_info())
        widths = {  # "agent" and "extra", flattened in this order
            name: value[0].numel() for part in state.values() for name, value in part.items()
        }
        for name, scales in self.cfg.observe_fine.items():
            if scales and name not in widths:
                raise UserError(
                    f"env.observe_fine: {self.cfg.task} has no {name} in its state, only {', '.join(widths)}"
                )
            widths |= {f"{name}/{scale:g}": widths[name] for scale in scales}
        if self.cfg.observe_time:
            widths["time"] = 1
        stops = np.cumsum(list(widths.values())).tolist()
        return {name: (stop - widths[name], stop) for name, stop in zip(widths, stops, strict=True)}

    def _describe(self) -> EnvSpec:
        info, layout = self.env.get_info(), self._layout()
        action_space = self.env.single_action_space
        if not isinstance(action_space, Box) or action_space.low.min() < -1 or action_space.high.max() > 1:
            raise UserError(
                f"env.control_mode {self.cfg.control_mode} of {self.cfg.task} takes actions beyond [-1, 1], "
                "or of several robots; choose a delta mode, of a task with one robot"
            )
        parts = getattr(self.env.agent.controller, "action_mapping", {})  # name -> its columns of an action
        last = action_space.shape[0]
        if self.cfg.binary_gripper and tuple(parts.get("gripper", ())) != (last - 1, last):
            raise UserError(
                f"env.binary_gripper: the last action of {self.cfg.task} under {self.cfg.control_mode} "
                "moves no gripper; set it to false"
            )
        if "success" not in info:
            raise UserError(f"task {self.cfg.task} does not say whether it succeeded; choose another")
        scalars = {
            k: v for k, v in info.items() if isinstance(v, torch.Tensor) and v.shape == (self.num_envs,)
        }
        cameras = {view: self.env._sensor_configs[view] for view in VIEWS}
        if SIM_STATE in self.views and self.env.reconfiguration_freq:
            raise UserError(
                f"{self.cfg.task} builds other objects for each episode, and a state does not tell them: "
                "render while collecting (data_collection.frames: rendered)"
            )
        shapes = {view: (camera.height, camera.width, 3) for view, camera in cameras.items()}
        shapes[SIM_STATE] = (self.env.get_state().shape[1],)
        return EnvSpec(
            obs_dim=max(stop for _, stop in layout.values()),
            action_dim=action_space.shape[0],
            obs_layout=layout,
            info_types={k: scalars[k].dtype for k in sorted(scalars) if k != "elapsed_steps"},
            frame_shape={view: shapes[view] for view in self.views},
            task=self.cfg.task,
            task_description=self.cfg.description,
            control={
                "mode": self.cfg.control_mode,
                "freq_hz": self.env.control_freq,
                "max_episode_steps": self.cfg.max_episode_steps,
                "observe_time": self.cfg.observe_time,
                "observe_fine": {name: list(scales) for name, scales in self.cfg.observe_fine.items()},
                **({"binary_gripper": True} if self.cfg.binary_gripper else {}),  # older episodes do not say
            },
            render=None
            if self.views == (SIM_STATE,)
            else {
                "task": self.cfg.task,
                "shader": self.cfg.cameras.shader,
                "low_poly": self.cfg.low_poly,
                "show_goal_site": self.cfg.cameras.show_goal_site,
                "views": {view: camera_facts(camera) for view, camera in cameras.items()},
            },
        )
