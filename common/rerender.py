"""Pictures for episodes recorded without any: the simulator's stored states, drawn by a config's cameras.

So cameras can be tried on the same episodes. Processes share the drawing, an episode at a time. What a
stopped run has written stays, and the next one draws the rest.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch

from common.env_workers import default_num_workers
from common.envs import SIM_STATE, ManiSkillEnvs
from common.episodes import read_episode, write_episode
from common.files import load_pickle
from common.processes import Child
from common.runtime import UserError
from common.scenes import EnvConfig


def render_episodes(paths: list[Path], folder: Path, cfg: EnvConfig) -> Iterator[Path]:
    """Write each episode of `paths` into `folder` with the pictures of `cfg`; yields each as it is there.

    UserError naming the episode that is of another task, holds no states of the simulator, or is in `folder`
    with pictures by other cameras.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.num_workers == 0:
        with closing(ManiSkillEnvs(cfg, num_envs=1)) as envs:
            yield from (render_episode(path, folder, envs) for path in paths)
        return
    left, busy = deque(paths), []
    num_workers = cfg.num_workers or default_num_workers(cfg.num_envs)
    with ExitStack() as stack:
        idle = [
            stack.enter_context(closing(Child(f"renderer {i}", _renderer, (cfg, folder))))
            for i in range(min(num_workers, len(paths)))
        ]
        while left or busy:
            while left and idle:
                busy.append(idle.pop())
                busy[-1].send(left.popleft())
            signs = {sign: child for child in busy for sign in (child.connection, child.process.sentinel)}
            for child in {signs[sign]: None for sign in wait(list(signs))}:
                busy.remove(child)
                idle.append(child)
                yield child.receive()


def _renderer(connection: Connection, cfg: EnvConfig, folder: Path) -> None:
    with closing(ManiSkillEnvs(cfg, num_envs=1)) as envs:
        while True:
            connection.send(("ok", render_episode(connection.recv(), folder, envs)))


def render_episode(path: Path, folder: Path, envs: ManiSkillEnvs) -> Path:
    """-> the path written, or found there. `envs`: one env."""
    drawn = folder / path.name
    if drawn.exists():
        if read_episode(drawn, views=()).render != envs.spec.render:
            raise UserError(f"{drawn} was drawn by other cameras; choose another log_path")
        return drawn
    task = read_episode(path, views=()).task
    if task != envs.spec.task:
        raise UserError(f"{path} was recorded in the task '{task}'; the env here is {envs.spec.task}")
    episode, size = load_pickle(path), envs.env.get_state().shape[1]
    for observation in episode["observations"]:
        state = np.asarray(observation.get(SIM_STATE, ()))
        if state.shape != (size,):
            raise UserError(
                f"{path} has {SIM_STATE} {state.shape} where the simulator's is ({size},); collect with "
                "env.eval.data_collection.frames=sim_state"
            )
        pictures = envs.render_state(torch.from_numpy(state)[None])
        observation |= {view: images[0].cpu().numpy() for view, images in pictures.items()}
        observation["extra_view_images"] = observation["extra_view_images"][None]  # (V=1, H, W, 3)
    return write_episode(folder, {**episode, "render": envs.spec.render})
