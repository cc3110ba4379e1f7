"""Stand-ins for a simulator and a reward model in which every number can be worked out by hand."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from common import reward_client
from common.envs import EnvSpec, Render, Step
from common.history import HistoryBufferConfig
from common.resnet_reward import ResNetRewardConfig
from common.reward_config import RewardConfig
from common.reward_models import HistoryOracleConfig

RENDER = {"task": "Count", "views": {"main_images": {"fov": 1.0}, "extra_view_images": {"fov": 2.0}}}

# Pixels that make `FakeModel` fail in the ways a real one may.
CRASHES, SLEEPS = 251, 252


def pixel_of(env: int, episode: int, t: int) -> int:
    """What the frames of `CountingEnvs` show unless a test says otherwise: below 100 for 4 envs."""
    return 20 * env + 10 * (episode % 2) + t


class CountingEnvs:
    """N envs driven like `common.envs.ManiSkillEnvs`, with auto-reset. Env i is in its episode k at step t:

    state (3,) = (i, k, t); env_reward of the step that leads to t = 100 i + 10 k + t; every pixel of a frame
    = pixel(i, k, t); success = (i, k, t) in `successes`. Episode k of env i takes lengths[i][k] steps (the
    last number goes on for ever), and is cut by the time limit unless (i, k) is in `terminates`.
    """

    def __init__(
        self,
        lengths: list[list[int]],
        successes: frozenset[tuple[int, int, int]] = frozenset(),
        terminates: frozenset[tuple[int, int]] = frozenset(),
        pixel: Callable[[int, int, int], int] = pixel_of,
    ):
        self.lengths, self.successes, self.terminates, self.pixel = lengths, successes, terminates, pixel
        self.num_envs, self.device = len(lengths), torch.device("cpu")
        shape = {view: (8, 8, 3) for view in RENDER["views"]}
        self.spec = EnvSpec(
            3, 2, {"count": (0, 3)}, {"success": torch.bool}, shape, "Count", "Count.", {}, RENDER
        )
        self.seeds: list[int] = []
        self.rendered = 0  # frames
        self.actions: list[Tensor] = []

    def reset(self, seed: int) -> Tensor:
        self.seeds.append(seed)
        self.at = [(env, 0, 0) for env in range(self.num_envs)]
        return self._obs(self.at)

    @staticmethod
    def _obs(at: list[tuple[int, int, int]]) -> Tensor:
        return torch.tensor(at, dtype=torch.float32)

    def _frames(self, at: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        self.rendered += len(at)
        pixels = torch.tensor([self.pixel(*where) for where in at], dtype=torch.uint8)
        main = pixels[:, None, None, None].expand(-1, 8, 8, 3)
        return {"main_images": main, "extra_view_images": 255 - main} if at else {}

    def render(self, env_ids: Tensor) -> dict[str, Tensor]:
        return self._frames([self.at[env] for env in env_ids])

    def step_async(self, action: Tensor, render: Render | Tensor = Render.NONE) -> None:
        self.actions.append(action)
        self._render = torch.as_tensor(render).expand(self.num_envs).tolist()

    def step_wait(self) -> Step:
        after = [(env, episode, t + 1) for env, episode, t in self.at]
        ended = [t == self._length(env, episode) for env, episode, t in after]
        terminated = [
            end and (env, k) in self.terminates for end, (env, k, _) in zip(ended, after, strict=True)
        ]
        self.at = [(e, k + 1, 0) if end else (e, k, t) for end, (e, k, t) in zip(ended, after, strict=True)]
        shown = [i for i, mode in enumerate(self._render) if mode >= Render.ALWAYS or (mode and ended[i])]
        begun = [i for i, mode in enumerate(self._render) if mode == Render.RECORD and ended[i]]
        terminated, ended = torch.tensor(terminated), torch.tensor(ended)
        return Step(
            obs=self._obs(self.at),
            next_obs=self._obs(after),
            env_reward=torch.tensor([100.0 * env + 10 * k + t for env, k, t in after]),
            terminated=terminated,
            truncated=ended & ~terminated,
            info={"success": torch.tensor([where in self.successes for where in after])},
            frames=self._frames([after[i] for i in shown]),
            frame_ids=torch.tensor(shown, dtype=torch.long),
            reset_frames=self._frames([self.at[i] for i in begun]),
            reset_ids=torch.tensor(begun, dtype=torch.long),
        )

    def step(self, action: Tensor, render: Render | Tensor = Render.NONE) -> Step:
        self.step_async(action, render)
        return self.step_wait()

    def _length(self, env: int, episode: int) -> int:
        lengths = self.lengths[env]
        return lengths[min(episode, len(lengths) - 1)]


class StillAgent:
    """Always the same action, and V(obs) = episode number + t / 10 of `CountingEnvs`."""

    device = torch.device("cpu")

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        return torch.zeros(len(obs), 2)

    def act_with_value(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.act(obs), torch.zeros(len(obs)), self.value(obs)

    def value(self, obs: Tensor) -> Tensor:
        return obs[:, 1] + obs[:, 2] / 10


@dataclass
class FakeModel:
    """success_prob = a hundredth of the first pixel; keeps the size of each batch it was asked."""

    views: tuple[str, ...] = ("main_images",)
    window: int = 1
    meta: dict = field(default_factory=lambda: {"threshold": 0.5, "render": RENDER})
    batches: list[int] = field(default_factory=list)

    def score(self, frames: dict[str, Tensor]) -> Tensor:
        assert set(frames) == set(self.views)
        pixels = frames["main_images"][:, 0, 0, 0]
        self.batches.append(len(pixels))
        if CRASHES in pixels:
            raise ValueError("a model bug")
        if SLEEPS in pixels:
            time.sleep(60)
        return pixels.float() / 100


@dataclass
class FakeTrendModel:
    """A window is positive where its last pixel lies above its first, negative below, invalid where one is
    99; sure of it, and wrong in no case."""

    views: tuple[str, ...] = ("main_images",)
    window: int | None = None
    meta: dict = field(default_factory=dict)
    task: str = ""

    def score(self, frames: dict[str, Tensor]) -> Tensor:
        assert set(frames) >= set(self.views)
        pixels = frames["main_images"][:, :, 0, 0, 0].int()
        rise = pixels[:, -1] - pixels[:, 0]
        said = torch.stack([rise > 0, rise < 0, rise == 0], dim=1).float()
        said[(pixels == 99).any(1)] = 0.0
        return said


def window_config(
    size: int = 2, model: dict | None = None, buffer: dict | None = None, **changes
) -> RewardConfig:
    """Settings that pay +1 / -1 / 0 for windows of `size` frames, judged by a `FakeTrendModel`."""
    buffer = HistoryBufferConfig(size, history_keys=["main_images"], **(buffer or {}))
    worth = {"positive_reward": 1.0, "negative_reward": -1.0, "invalid_reward": -5.0}
    section = HistoryOracleConfig(
        history_buffers={"window": buffer},
        reward_parser_params=worth,
        infer_micro_batch_size=3,
        **(model or {}),
    )
    changes = {"use_reward_model": True, "placement": "inline", **changes}
    return RewardConfig(reward_mode="history_buffer", model=section, **changes)


def use_fake_trend_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reward client that is made in this process from now on asks a `FakeTrendModel`."""
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: FakeTrendModel())


def reward_config(**changes) -> RewardConfig:
    """Settings whose model is a `FakeModel`, asked for 3 frames at a time."""
    model = ResNetRewardConfig(model_path="fake", infer_micro_batch_size=3)
    return RewardConfig(**{"use_reward_model": True, "model": model, "placement": "inline", **changes})


REAL_WORKER = reward_client._reward_worker


def fake_reward_worker(connection, model_cfg, api) -> None:
    """What the spawned worker runs: the real loop around a `FakeModel`."""
    reward_client.load_reward_model = lambda *_: FakeModel()
    REAL_WORKER(connection, model_cfg, api)


def use_fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reward client that is made from now on asks a `FakeModel`, in this process or in a worker."""
    monkeypatch.setattr(reward_client, "load_reward_model", lambda *_: FakeModel())
    monkeypatch.setattr(reward_client, "_reward_worker", fake_reward_worker)
