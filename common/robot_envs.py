"""One robot driven like a batch of envs, so that recording, evaluation and learning take it as they are.

`RobotEnvs` wraps the env of `common.franka_wrappers.open_franka`: one env, resets by itself, gives frames to
who asks for them. Of its cameras the main one gives `main_images` and the next one `extra_view_images`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch

from common.arms import ManiSkillArmConfig
from common.cameras import FRAME_SIZE
from common.device_thread import say
from common.envs import EnvSpec, Render, Step
from common.files import to_json
from common.franka import state_vector
from common.franka_config import FrankaConfig
from common.franka_wrappers import RewardModelSuccess
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.reward_link import LiveJudge
from common.runtime import UserError
from common.scenes import VIEWS

SILENT_S = 5.0  # so long without any verdict is said


def view_cameras(cfg: FrankaConfig) -> dict[str, str]:
    """View -> name of the camera that gives it, at most two; nothing where there is no camera."""
    others = [name for name in cfg.all_cameras if name != cfg.main_camera]
    names = [cfg.main_camera, *others] if cfg.main_camera else []
    return dict(zip(VIEWS, names, strict=False))


def view_frames(cfg: FrankaConfig, frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """View -> (H, W, 3) uint8, of obs["frames"]."""
    return {view: frames[name] for view, name in view_cameras(cfg).items()}


def render_facts(cfg: FrankaConfig) -> dict[str, Any]:
    """What made the pictures, as `EnvSpec.render`: kept with frames, compared before they are scored."""
    facts: dict[str, Any] = {"task": cfg.task, "views": {}}
    drawn = cfg.arm.cameras if isinstance(cfg.arm, ManiSkillArmConfig) else None
    for view, name in view_cameras(cfg).items():
        camera = cfg.all_cameras[name]
        facts["views"][view] = {"backend": camera.backend, "crop": camera.crop, "image_size": FRAME_SIZE}
        if camera.backend == "maniskill":
            facts["views"][view] |= asdict(getattr(drawn, camera.serial))
    if drawn is not None:
        facts |= {"scene": cfg.arm.task, "shader": drawn.shader, "show_goal_site": drawn.show_goal_site}
    return json.loads(to_json(facts))  # as a reward model's file gives it back: lists for tuples


def need_camera(cfg: FrankaConfig, why: str) -> None:
    """UserError where there is none."""
    if cfg.main_camera is None:
        raise UserError(f"{why}, and there is no camera: name some in override_cfg.camera_serials or cameras")


def check_pictures(client: RewardClient, spec: EnvSpec) -> None:
    """UserError where the reward model knows other pictures, or looks at a camera that is not there."""
    if missing := [view for view in client.views if view not in spec.frame_shape]:
        raise UserError(f"the reward model looks at {missing[0]}, and the arm's env has no camera for it")
    client.check_envs(spec)


class Asker:
    """Shows the frames of each step to the judge -> success_prob.

    Waits for half a period at most: a person's arm waits for no model. As long as the judge allows where the
    verdict is worth it (learns: nothing is learned without any), and where time stands still meanwhile, in a
    simulation that keeps no clock. 5 s of steps without any verdict are told once; with `learns` they are a
    UserError.
    """

    def __init__(
        self, judge: LiveJudge, cfg: FrankaConfig, learns: bool = False, notice: Callable[[str], None] = say
    ):
        self.judge, self.cfg, self.learns, self.notice = judge, cfg, learns, notice
        self.num_asked = self.num_silent = 0  # steps; those since the last verdict
        self._told = False
        stands_still = isinstance(cfg.arm, ManiSkillArmConfig) and not cfg.override_cfg.realtime
        half_s = 0.5 / cfg.override_cfg.step_hz
        self.wait_s = judge.timeout_s if learns or stands_still else half_s

    def __call__(self, frames: dict[str, np.ndarray]) -> float | None:
        """frames: camera -> (H, W, 3) uint8. None: the verdict is late."""
        self.num_asked += 1
        self.judge.ask(view_frames(self.cfg, frames), self.num_asked)
        verdict = self.judge.wait(self.wait_s)
        if verdict is not None:
            self.num_silent = 0
            return verdict.success_prob
        self.num_silent += 1
        if self.num_silent >= SILENT_S * self.cfg.override_cfg.step_hz:
            self._complain()
        return None

    def _complain(self) -> None:
        text = (
            f"no verdict for {self.num_silent} steps: the reward model needs more than the {self.wait_s:g} s "
            "it is given for a frame, or its server is away; take a smaller model or a GPU, lower "
            "override_cfg.step_hz"
        )
        if self.learns:
            raise UserError(f"{text}, or raise reward.link.live_timeout_s")
        if not self._told:
            self._told = True
            self.notice(text)


def rewarded_by(
    judge: LiveJudge, cfg: FrankaConfig, reward: RewardConfig, learns: bool = False
) -> Callable[[gymnasium.Env], gymnasium.Env]:
    """The wrapper with which the judge pays and ends episodes (`reward.standalone_realworld`)."""
    return partial(
        RewardModelSuccess,
        judge=Asker(judge, cfg, learns),
        decision=judge.client.decision(1),
        require_in_zone=reward.require_in_zone,
    )


class RobotEnvs:
    """A Franka as one of `common.envs`: see there for `reset`, `step_async`, `step_wait` and `Step`.

    The state is `state_vector`. `Step.action` is what was executed: the operator may have taken over.
    `Step.success` is the truth that is known (the target pose, or the operator's key); a reward model's
    verdict inside the env is `info["learned_success"]`. Errors of the env are raised on, the arm has stopped.
    """

    num_envs = 1

    def __init__(self, env: gymnasium.Env, cfg: FrankaConfig):
        self.env, self.cfg = env, cfg
        self.device = torch.device("cpu")
        state = env.observation_space["state"]
        layout, column = {}, 0
        for name in sorted(state.spaces):
            width = state[name].shape[0]
            layout[name] = (column, column + width)
            column += width
        views = view_cameras(cfg)
        names = ("success", "in_zone", "learned_success")
        self.spec = EnvSpec(
            obs_dim=column,
            action_dim=env.action_space.shape[0],
            obs_layout=layout,
            info_types=dict.fromkeys(names, torch.bool),
            frame_shape={view: env.observation_space["frames"][name].shape for view, name in views.items()},
            task=cfg.task,
            task_description=cfg.description,
            control={
                "arm": cfg.arm.backend,
                "freq_hz": cfg.override_cfg.step_hz,
                "action_scale": list(cfg.override_cfg.action_scale),
                "relative_frame": cfg.use_relative_frame,
                "no_gripper": cfg.no_gripper,
                "max_episode_steps": cfg.max_episode_steps,
            },
            render=render_facts(cfg),
        )
        self.last_info: dict[str, Any] = {}  # of the last step, as the env gave it
        self._frames: dict[str, np.ndarray] = {}
        self._pending: tuple[torch.Tensor, int] | None = None

    def reset(self, seed: int | None) -> torch.Tensor:
        """-> obs (1, D) float32; seed None: go on from the one before."""
        obs, _ = self.env.reset(seed=seed)
        return self._observe(obs)

    def step_async(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> None:
        """action (1, A) in [-1, 1]. Nothing moves before `step_wait`: one thread drives the arm."""
        self._pending = action, int(render) if isinstance(render, Render) else int(render[0])

    def step_wait(self) -> Step:
        action, render = self._pending
        obs, reward, terminated, truncated, info = self.env.step(action[0].cpu().numpy())
        self.last_info, done = info, terminated or truncated
        next_obs = self._observe(obs)
        frames = self._shown(render >= Render.ALWAYS or (render == Render.IF_DONE and done))
        if "intervene_action" in info:
            action = torch.from_numpy(np.asarray(info["intervene_action"], np.float32)).clamp(-1, 1)[None]
        truth = info.get("true_success", info["success"])
        said = {"success": truth, "in_zone": info["in_zone"], "learned_success": info["success"]}
        after = self.reset(None) if done else next_obs
        begins = done and render == Render.RECORD
        reset_frames = self._shown(begins)
        return Step(
            obs=after,
            next_obs=next_obs,
            env_reward=torch.tensor([reward], dtype=torch.float32),
            terminated=torch.tensor([bool(terminated)]),
            truncated=torch.tensor([bool(truncated and not terminated)]),
            info={name: torch.tensor([bool(value)]) for name, value in said.items()},
            frames=frames,
            frame_ids=torch.arange(int(bool(frames))),
            reset_frames=reset_frames,
            reset_ids=torch.arange(int(begins)),
            action=action.float().cpu(),
        )

    def step(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> Step:
        self.step_async(action, render)
        return self.step_wait()

    def render(self, env_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The frames of the last observation: view -> (M, H, W, 3) uint8."""
        return self._shown(len(env_ids) > 0)

    def close(self) -> None:
        """The arm is closed by who opened it."""

    # -- parts --------------------------------------------------------------------------------

    def _observe(self, obs: dict) -> torch.Tensor:
        self._frames = view_frames(self.cfg, obs["frames"])
        return torch.from_numpy(state_vector(obs["state"]))[None]

    def _shown(self, wanted: bool) -> dict[str, torch.Tensor]:
        return {view: torch.from_numpy(f.copy())[None] for view, f in self._frames.items()} if wanted else {}
