"""Policies that see: an observation as one vector of the state and, after it, small pictures of all views.

`PixelObs` around any envs gives such observations; the picture of a view is its frame, averaged down to
`side` x `side`, floats in [0, 1], row by row, RGB last. Whatever only carries observations on (rollout,
replay, evaluation) sees longer vectors and nothing else. `common.nets.PixelEncoder` reads them.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.envs import EnvSpec, Render, Step
from common.runtime import UserError
from common.scenes import VIEWS
from common.wrappers import only_asked


def seen_views(spec: EnvSpec) -> list[str]:
    """The views whose pictures are part of the observations, in their order there."""
    return [view for view in VIEWS if view in spec.obs_layout]


def state_dim(spec: EnvSpec) -> int:
    """How many numbers of an observation, the first ones, are the state."""
    views = seen_views(spec)
    return spec.obs_layout[views[0]][0] if views else spec.obs_dim


def to_pixels(frames: dict[str, Tensor], views: list[str], side: int) -> Tensor:
    """view -> (M, H, W, 3) uint8 -> (M, V * side * side * 3) float32 in [0, 1]."""
    pictures = []
    for view in views:
        images = frames[view].permute(0, 3, 1, 2).float() / 255
        pictures.append(F.interpolate(images, (side, side), mode="area").permute(0, 2, 3, 1).flatten(1))
    return torch.cat(pictures, dim=1)


class PixelObs:
    """Envs whose observations go on with pictures of all their views; driven like the envs inside.

    Every step is rendered; frames are passed on to who asked for them, as `Step` says.
    """

    def __init__(self, envs, side: int):
        """UserError where the envs have no camera, or one with smaller frames."""
        self.envs, self.side = envs, side
        self.num_envs, self.device = envs.num_envs, envs.device
        spec: EnvSpec = envs.spec
        self.views = [view for view in VIEWS if view in spec.frame_shape]
        if not self.views:
            raise UserError(f"actor.model.pixels is {side}, but {spec.task} has no camera; set it to null")
        layout, column, width = dict(spec.obs_layout), spec.obs_dim, 3 * side * side
        for view in self.views:
            if min(spec.frame_shape[view][:2]) < side:
                raise UserError(f"actor.model.pixels is {side}, but {view} has {spec.frame_shape[view]}")
            layout[view] = (column, column + width)
            column += width
        self.spec = replace(spec, obs_dim=column, obs_layout=layout)

    def reset(self, seed: int | None) -> Tensor:
        """-> obs (N, D) float32."""
        obs = self.envs.reset(seed)
        frames = self.envs.render(torch.arange(self.num_envs, device=self.device))
        return self._beside(obs, to_pixels(frames, self.views, self.side))

    def step_async(self, action: Tensor, render: Render | Tensor = Render.NONE) -> None:
        self._asked = torch.as_tensor(int(render)) if isinstance(render, Render) else render.cpu()
        self.envs.step_async(action, Render.RECORD)

    def step_wait(self) -> Step:
        step = self.envs.step_wait()
        pixels = to_pixels(step.frames, self.views, self.side)
        step.next_obs = self._beside(step.next_obs, pixels)
        if len(step.reset_ids):
            pixels[step.reset_ids] = to_pixels(step.reset_frames, self.views, self.side)
        step.obs = self._beside(step.obs, pixels)
        return only_asked(step, self._asked)

    def step(self, action: Tensor, render: Render | Tensor = Render.NONE) -> Step:
        self.step_async(action, render)
        return self.step_wait()

    def render(self, env_ids: Tensor) -> dict[str, Tensor]:
        return self.envs.render(env_ids)

    @staticmethod
    def _beside(obs: Tensor, pixels: Tensor) -> Tensor:
        return torch.cat([obs, pixels.to(obs.device)], dim=1)
