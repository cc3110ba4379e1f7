"""Wrappers around batched envs; each is driven like the envs it wraps."""

from collections.abc import Callable

import numpy as np
import torch

from common.envs import EnvSpec, Render, Step
from common.episodes import EpisodeWriter
from common.geometry import success_distance
from common.ppo import gae
from common.scenes import DataCollectionConfig


class EpisodeRecorder:
    """Hands every finished episode to an `EpisodeWriter`, in RLinf's format (see `common.episodes`).

    Records the frames of all views at every step and passes on those alone that its caller asked for. An
    episode cut short by `reset` is dropped: it has no last frame and no outcome. `data_collection.gae_gamma`:
    set `value` before the first episode ends.
    """

    def __init__(self, envs, cfg: DataCollectionConfig, writer: EpisodeWriter):
        self.envs, self.cfg, self.writer = envs, cfg, writer
        self.spec: EnvSpec = envs.spec
        self.num_envs, self.device = envs.num_envs, envs.device
        self.value: Callable[[torch.Tensor], torch.Tensor] | None = None  # a critic: obs (M, D) -> (M,)
        self.num_episodes = self.num_successes = self.num_steps = self.num_frames = 0

    def reset(self, seed: int) -> torch.Tensor:
        """-> obs (N, D) float32."""
        obs = self.envs.reset(seed)
        everyone = torch.arange(self.num_envs, device=self.device)
        frames = {view: images.cpu() for view, images in self.envs.render(everyone).items()}
        infos, obs_cpu = self._geometry(obs), obs.cpu()
        self._episodes = [self._begin(i, obs_cpu[i], frames, i, infos) for i in range(self.num_envs)]
        return obs

    def step_async(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> None:
        self._action = action.detach().cpu().numpy().copy()
        self._asked = torch.as_tensor(int(render)) if isinstance(render, Render) else render.cpu()
        self.envs.step_async(action, Render.RECORD)

    def step_wait(self) -> Step:
        step = self.envs.step_wait()
        self.num_steps += self.num_envs
        env_reward, done = step.env_reward.tolist(), step.done.tolist()
        terminated, truncated = step.terminated.tolist(), step.truncated.tolist()
        info = {key: value.tolist() for key, value in step.info.items()} | self._geometry(step.next_obs)
        first_info = self._geometry(step.obs) if any(done) else {}
        next_obs, obs = step.next_obs.cpu(), step.obs.cpu()
        executed = self._action if step.action is None else step.action.cpu().numpy()
        frames = {view: images.cpu() for view, images in step.frames.items()}
        reset_frames = {view: images.cpu() for view, images in step.reset_frames.items()}
        first_frame = {env: row for row, env in enumerate(step.reset_ids.tolist())}
        for i in range(self.num_envs):
            episode = self._episodes[i]
            episode["observations"].append(self._observation(next_obs[i], frames, i))
            episode["actions"].append(executed[i].copy())
            episode["rewards"].append(env_reward[i])
            episode["terminated"].append(terminated[i])
            episode["truncated"].append(truncated[i])
            episode["infos"].append({key: value[i] for key, value in info.items()})
            if done[i]:
                self._finish(episode)
                self._episodes[i] = self._begin(i, obs[i], reset_frames, first_frame[i], first_info)
        return only_asked(step, self._asked)

    def step(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> Step:
        self.step_async(action, render)
        return self.step_wait()

    def render(self, env_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.envs.render(env_ids)

    # -- parts ---------------------------------------------------------------------------------------

    def _geometry(self, obs: torch.Tensor) -> dict[str, list[float]]:
        """What the task's geometry says of obs (N, D), per env: nothing where the task has no rule."""
        distance = success_distance(self.spec.task, self.spec.obs_layout, obs)
        return {} if distance is None else {"success_distance": distance.tolist()}

    def _begin(
        self, env_idx: int, obs: torch.Tensor, frames: dict[str, torch.Tensor], row: int, infos: dict
    ) -> dict:
        return {
            "rank": 0,
            "env_idx": env_idx,
            "observations": [self._observation(obs, frames, row)],
            "actions": [],
            "rewards": [0.0],
            "terminated": [False],
            "truncated": [False],
            "infos": [{key: value[env_idx] for key, value in infos.items()}],
            "task": self.spec.task,
            "task_description": self.spec.task_description,
            "render": self.spec.render,
            "control": self.spec.control,
        }

    @staticmethod
    def _observation(obs: torch.Tensor, frames: dict[str, torch.Tensor], row: int) -> dict:
        # copies: a view would keep the pictures of all envs for as long as this episode waits
        observation = {view: images[row].numpy().copy() for view, images in frames.items()}
        if "extra_view_images" in observation:
            observation["extra_view_images"] = observation["extra_view_images"][None]  # (V=1, H, W, 3)
        return {**observation, "states": obs.numpy().copy()}

    def _finish(self, episode: dict) -> None:
        success = any(info.get("success", False) for info in episode["infos"])
        if self.cfg.only_success and not (success and episode["terminated"][-1]):
            return
        if self.cfg.gae_gamma is not None:
            states = torch.from_numpy(np.stack([entry["states"] for entry in episode["observations"]]))
            env_reward = torch.tensor(episode["rewards"][1:])
            gamma, gae_lambda = self.cfg.gae_gamma, self.cfg.gae_lambda
            episode["gae"] = critic_score(self.value(states).cpu(), env_reward, gamma, gae_lambda).tolist()
        self.num_episodes += 1
        self.num_successes += success
        self.num_frames += len(episode["observations"]) * len(self.spec.frame_shape)
        self.writer.put({**episode, "success": success, "step": self.num_steps})


def only_asked(step: Step, asked: torch.Tensor) -> Step:
    """A step that shows all frames, with those alone that its caller asked for, `asked` () or (N,)."""
    done = step.done.cpu()
    rows = ((asked >= Render.ALWAYS) | ((asked == Render.IF_DONE) & done)).expand(len(done))
    rows = rows.nonzero().squeeze(1)
    kept = [row for row, env in enumerate(step.reset_ids.tolist()) if asked_reset(asked, env)]
    step.frames = {view: images[rows] for view, images in step.frames.items()} if len(rows) else {}
    step.frame_ids = rows
    step.reset_frames = {view: images[kept] for view, images in step.reset_frames.items()} if kept else {}
    step.reset_ids = step.reset_ids[kept]
    return step


def asked_reset(asked: torch.Tensor, env: int) -> bool:
    """Whether the caller asked for the first frame of the episode that env has just begun."""
    return bool((asked if asked.ndim == 0 else asked[env]) == Render.RECORD)


def critic_score(
    value: torch.Tensor, env_reward: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """(1 - gamma) times the lambda-return of each observation of one episode: (T+1,), in env reward per step.

    value (T+1,) of its observations, env_reward (T,). The last return is the last value, for a terminated
    episode too: a score must not fall at success for the rewards that an ended episode no longer pays.
    """
    never = torch.zeros(len(env_reward), 1, dtype=torch.bool)
    _, returns = gae(env_reward[:, None], value[:-1, None], value[-1:], never, gamma, gae_lambda)
    return (1 - gamma) * torch.cat([returns[:, 0], value[-1:]])
