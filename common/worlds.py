"""What a run of RL acts in: simulations of its own, or an arm at which training and evaluation take turns."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from common.devices import DevicesConfig
from common.env_workers import EnvPool
from common.envs import EnvSpec
from common.episodes import EpisodeWriter
from common.franka_config import FrankaConfig
from common.hard_frames import HardFrames
from common.pixels import PixelObs
from common.reward_client import RewardClient, make_reward_client
from common.reward_config import RewardConfig
from common.robot_run import open_robot
from common.scenes import VIEWS, DataCollectionConfig, EnvConfig
from common.wrappers import EpisodeRecorder


class World(NamedTuple):
    eval_envs: Any
    make_train_envs: Callable[[], Any]  # called once, and not where nothing is trained
    client: RewardClient | None  # the reward model


def open_simulation(
    train: EnvConfig,
    evaluation: EnvConfig,
    reward: RewardConfig,
    pixels: int | None,
    folder: Path,
    stack: ExitStack,
) -> World:
    """folder: the run's, for `data_collection`. Closed with the stack."""
    pool = stack.enter_context(EnvPool(train.num_workers, train.num_envs))
    client = stack.enter_context(make_reward_client(reward)) if reward.use_reward_model else None
    views = client.camera_views if client is not None else ()

    def open_envs(section: EnvConfig, views: tuple[str, ...]):
        sees_all = section.data_collection.enabled or pixels is not None
        envs = pool.make(section, VIEWS if sees_all else views)
        if client is not None:
            client.check_envs(envs.spec)
        return with_pixels(record(envs, section.data_collection, folder, stack), pixels)

    return World(open_envs(evaluation, VIEWS), lambda: open_envs(train, views), client)


def open_arm(
    cfg: FrankaConfig,
    devices: DevicesConfig,
    reward: RewardConfig,
    pixels: int | None,
    folder: Path,
    seed: int,
    stack: ExitStack,
) -> World:
    """As `open_simulation`. What is recorded are the episodes of training."""
    robot = stack.enter_context(open_robot(cfg, devices, reward, seed))

    def training_envs():
        return with_pixels(record(robot.training, cfg.data_collection, folder, stack), pixels)

    return World(with_pixels(robot.evaluation, pixels), training_envs, robot.client)


def record(envs, data: DataCollectionConfig, folder: Path, stack: ExitStack):
    """The envs, with a recorder around them where `data_collection` says so."""
    if not data.enabled:
        return envs
    writer = stack.enter_context(EpisodeWriter(data.save_dir or folder / "collected_data"))
    return EpisodeRecorder(envs, data, writer)


def keep_hard(
    cfg: RewardConfig, spec: EnvSpec, client: RewardClient | None, folder: Path, stack: ExitStack
) -> HardFrames | None:
    """What keeps the frames that the reward model gets wrong, in `folder`/hard; None where nothing does."""
    if not cfg.keep_hard:
        return None
    facts = {name: vars(spec)[name] for name in ("task", "task_description", "render", "control")}
    writer = stack.enter_context(EpisodeWriter(folder / "hard"))
    label = client.meta.get("label", "success") if client is not None else "success"
    known = cfg.hard_truth == "known"
    return HardFrames(writer, cfg.keep_hard, spec.action_dim, facts, known, label)


def with_pixels(envs, pixels: int | None):
    """The envs, their observations with pictures where the policy sees (`actor.model.pixels`)."""
    return envs if pixels is None else PixelObs(envs, pixels)
