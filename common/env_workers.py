"""CPU simulation in worker processes.

Bulk data lies in shared memory; a step costs each worker one short message in and one out. A frame is
rendered by the worker that holds the env, and only where it was asked for.
"""

import os
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from common.envs import SIM_STATE, EnvSpec, ManiSkillEnvs, Render, Step
from common.processes import Child
from common.scenes import VIEWS, EnvConfig


@dataclass
class EnvArrays:
    """What passes between the parent and the env workers at a step, in shared memory; row i is env i's."""

    action: torch.Tensor  # (N, A) float32
    render: torch.Tensor  # (N,) uint8, a Render
    obs: torch.Tensor  # (N, D) float32
    next_obs: torch.Tensor  # (N, D) float32
    env_reward: torch.Tensor  # (N,) float32
    flags: torch.Tensor  # (N, 4) bool: terminated, truncated, frame rendered, reset frame rendered
    info: torch.Tensor  # (N, I) float32
    frames: dict[str, torch.Tensor]  # view -> (N, H, W, 3) uint8; SIM_STATE: (N, S) float32
    reset_frames: dict[str, torch.Tensor]  # the same

    @classmethod
    def allocate(cls, spec: EnvSpec, n: int) -> "EnvArrays":
        def shared(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype).share_memory_()

        def pictures():
            kinds = {view: torch.float32 if view == SIM_STATE else torch.uint8 for view in spec.frame_shape}
            return {view: shared(n, *shape, dtype=kinds[view]) for view, shape in spec.frame_shape.items()}

        return cls(
            action=shared(n, spec.action_dim),
            render=shared(n, dtype=torch.uint8),
            obs=shared(n, spec.obs_dim),
            next_obs=shared(n, spec.obs_dim),
            env_reward=shared(n),
            flags=shared(n, 4, dtype=torch.bool),
            info=shared(n, len(spec.info_types)),
            frames=pictures(),
            reset_frames=pictures(),
        )


class _EnvGroup:
    """A worker's share of one group: its envs, each at its own row of the shared arrays."""

    def __init__(self, cfg: EnvConfig, rows: list[int], views: tuple[str, ...]):
        self.envs = {row: ManiSkillEnvs(cfg, 1, row, views) for row in rows}
        self.spec = next(iter(self.envs.values())).spec
        self.arrays: EnvArrays | None = None

    def attach(self, arrays: EnvArrays) -> None:
        self.arrays = arrays

    def reset(self, seed: int) -> None:
        for row, env in self.envs.items():
            self.arrays.obs[row] = env.reset(seed)[0]

    def render(self, rows: list[int]) -> None:
        for row in set(rows) & self.envs.keys():
            for view, frame in self.envs[row].render(torch.zeros(1, dtype=torch.long)).items():
                self.arrays.frames[view][row] = frame[0]

    def step(self) -> None:
        a = self.arrays
        for row, env in self.envs.items():
            step = env.step(a.action[row : row + 1], a.render[row : row + 1])
            a.obs[row], a.next_obs[row], a.env_reward[row] = step.obs[0], step.next_obs[0], step.env_reward[0]
            frame, reset_frame = len(step.frame_ids) > 0, len(step.reset_ids) > 0
            a.flags[row] = torch.tensor([step.terminated[0], step.truncated[0], frame, reset_frame])
            for i, key in enumerate(self.spec.info_types):
                a.info[row, i] = step.info[key][0]
            for view in step.frames:
                a.frames[view][row] = step.frames[view][0]
            for view in step.reset_frames:
                a.reset_frames[view][row] = step.reset_frames[view][0]

    def close(self) -> None:
        for env in self.envs.values():
            env.close()


class _Host:
    """The groups of envs that live in one process, and the commands that reach them."""

    def __init__(self):
        self.groups: dict[int, _EnvGroup] = {}

    def do(self, command: str, group: int, *args):
        if command == "make":
            self.groups[group] = _EnvGroup(*args)
            return self.groups[group].spec
        return getattr(self.groups[group], command)(*args)

    def close(self) -> None:
        for group in self.groups.values():
            group.close()


def _env_worker(connection: Connection) -> None:
    host = _Host()
    while True:
        connection.send(("ok", host.do(*connection.recv())))


class LocalChild:
    """Stands in for a `Child` where the envs live in this process."""

    def __init__(self):
        self.host, self.replies = _Host(), deque()

    def send(self, message: tuple) -> None:
        self.replies.append(self.host.do(*message))

    def receive(self):
        return self.replies.popleft()

    def hang_up(self) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        self.host.close()


class WorkerEnvs:
    """A group of CPU envs, env i in worker i mod W, driven like `ManiSkillEnvs`.

    The same numbers for any W: each episode has a simulator seed of its own. Tensors handed out are copies.
    """

    def __init__(
        self, children: list[Child | LocalChild], group: int, cfg: EnvConfig, views: tuple[str, ...]
    ):
        self.children = children[: cfg.num_envs]
        self.group, self.cfg, self.num_envs = group, cfg, cfg.num_envs
        self.device = torch.device("cpu")
        for w, child in enumerate(self.children):
            child.send(("make", group, cfg, list(range(w, cfg.num_envs, len(self.children))), views))
        self.spec: EnvSpec = [child.receive() for child in self.children][-1]
        self.arrays = EnvArrays.allocate(self.spec, cfg.num_envs)
        self._ask("attach", self.arrays)
        self._wait()

    def _ask(self, command: str, *args) -> None:
        for child in self.children:
            child.send((command, self.group, *args))

    def _wait(self) -> None:
        for child in self.children:
            child.receive()

    def reset(self, seed: int) -> torch.Tensor:
        """Start all envs anew. -> obs (N, D) float32."""
        self._ask("reset", seed)
        self._wait()
        return self.arrays.obs.clone()

    def render(self, env_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures of the present state: view -> (M, H, W, 3) uint8 for the M envs asked for."""
        if len(env_ids) == 0:
            return {}
        self._ask("render", env_ids.tolist())
        self._wait()
        return {view: frames[env_ids] for view, frames in self.arrays.frames.items()}

    def step_async(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> None:
        """Begin a step. action (N, A) float32 in [-1, 1]; render: one mode for all envs or (N,) of them."""
        self.arrays.action.copy_(action)
        self.arrays.render.copy_(torch.as_tensor(int(render) if isinstance(render, Render) else render))
        self._ask("step")

    def step_wait(self) -> Step:
        self._wait()
        a = self.arrays
        terminated, truncated, rendered, reset_rendered = a.flags.T.clone()
        frame_ids, reset_ids = rendered.nonzero().squeeze(1), reset_rendered.nonzero().squeeze(1)
        info = {
            key: a.info[:, i].to(kind, copy=True)
            for i, (key, kind) in enumerate(self.spec.info_types.items())
        }
        return Step(
            obs=a.obs.clone(),
            next_obs=a.next_obs.clone(),
            env_reward=a.env_reward.clone(),
            terminated=terminated,
            truncated=truncated,
            info=info,
            frames={v: f[frame_ids] for v, f in a.frames.items()} if len(frame_ids) else {},
            frame_ids=frame_ids,
            reset_frames={v: f[reset_ids] for v, f in a.reset_frames.items()} if len(reset_ids) else {},
            reset_ids=reset_ids,
        )

    def step(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> Step:
        self.step_async(action, render)
        return self.step_wait()


class EnvPool:
    """Makes groups of envs (train, eval) and closes them. A context manager.

    On a GPU a group is one batched simulation in this process. On the CPU all groups share `num_workers`
    processes, so that imports and renderers are paid for once; 0 keeps the envs in this process.
    """

    def __init__(self, num_workers: int | None = None, num_envs: int = 1):
        self.num_workers = default_num_workers(num_envs) if num_workers is None else num_workers
        self.children: list[Child | LocalChild] = []
        self.groups: list[ManiSkillEnvs | WorkerEnvs] = []

    def make(self, cfg: EnvConfig, views: tuple[str, ...] = VIEWS) -> "ManiSkillEnvs | WorkerEnvs":
        if cfg.backend == "gpu":
            self.groups.append(ManiSkillEnvs(cfg, cfg.num_envs, 0, views))
            return self.groups[-1]
        if not self.children and self.num_workers == 0:
            self.children = [LocalChild()]
        while len(self.children) < self.num_workers:
            self.children.append(Child(f"env worker {len(self.children)}", _env_worker))
        self.groups.append(WorkerEnvs(self.children, len(self.groups), cfg, views))
        return self.groups[-1]

    def close(self) -> None:
        for child in self.children:
            child.hang_up()  # all at once: each takes a second to go
        for child in self.children:
            child.close()
        for group in self.groups:
            if isinstance(group, ManiSkillEnvs):
                group.close()
        self.children, self.groups = [], []

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def default_num_workers(num_envs: int) -> int:
    """One process per env, at most one per core."""
    return max(1, min(num_envs, len(os.sched_getaffinity(0))))
