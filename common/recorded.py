"""Recorded episodes to be looked at, judged by a reward model where there is one."""

import heapq
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.episodes import Episode, list_episodes, read_episode
from common.evaluation import judge_trace
from common.files import load_json
from common.history import HistoryBufferConfig
from common.qwen_reward import HistoryVLMRewardConfig
from common.resnet_reward import ResNetRewardConfig
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.runtime import UserError
from common.trace_page import errors, save_trace_page
from common.trend import episode_score, evenly_spaced
from common.video import Trace

FPS = 10.0  # at which episodes are played that do not say their rate


def open_checkpoint(folder: Path) -> RewardClient:
    """The reward model of a checkpoint of train_resnet.py or train_vlm.py, as its `reward.json` describes it:
    its own threshold, and of windows one at every step. UserError where it is none."""
    meta = load_json(folder / "reward.json")
    kind = meta.get("model_type")
    if kind == "resnet":
        mode, model = "per_step", ResNetRewardConfig(model_path=str(folder))
    elif kind == "history_vlm":
        paths = {"model_path": str(folder)}
        if (adapter := folder / "adapter_config.json").exists():  # it says of which model
            paths = {"lora_path": str(folder), "model_path": load_json(adapter)["base_model_name_or_path"]}
        buffer = HistoryBufferConfig(history_size=meta["window"], history_keys=meta["views"])
        asked = {name: meta[name] for name in ("input_builder_name", "use_chat_template")}
        mode = "history_buffer"
        model = HistoryVLMRewardConfig(**paths, **asked, history_buffers={"history_window": buffer})
    else:
        raise UserError(f"{folder}/reward.json names the model_type '{kind}', not resnet or history_vlm")
    return RewardClient(RewardConfig(use_reward_model=True, reward_mode=mode, model=model))


def read_trace(path: Path, client: RewardClient | None) -> Trace:
    """One episode, with each frame's own truth. UserError naming it where it has no pictures, or pictures
    that the reward model does not know."""
    episode = read_episode(path, views=None)
    if "main_images" not in episode.images:
        raise UserError(f"{path} holds no pictures; draw them first: collect.py CONFIG --render-from FOLDER")
    frames = episode.images
    trace = Trace(
        frames["main_images"],
        np.full(len(episode.success), np.nan, np.float32),
        episode.success,
        path.stem,
        extra_frames=frames.get("extra_view_images"),
    )
    if client is not None:
        _check(episode, client)
        client.set_task(episode.task_description or episode.task or "")
        pictures = {view: torch.from_numpy(images) for view, images in frames.items()}
        judge_trace(trace, client, pictures, _distance(episode))
    return trace


def _check(episode: Episode, client: RewardClient) -> None:
    if episode.render is None:  # RLinf's files do not say
        return
    try:
        client.check_envs(episode)
    except UserError as error:
        raise UserError(f"{episode.path}: {error}") from error


def _distance(episode: Episode) -> torch.Tensor | None:
    """(T,) m after each step, where the episode says it: the true trend of a window is judged by it."""
    if any(info.get("success_distance") is None for info in episode.infos[1:]):
        return None
    return -torch.from_numpy(episode_score(episode, "success_distance")[0][1:]).float()


def save_recorded_page(folder: Path, checkpoint: Path | None, num_episodes: int, path: Path) -> str:
    """A page (`common.trace_page`) of the episodes under `folder`, with the scores of a reward model's
    checkpoint. -> what it shows, in words.

    Of more than num_episodes, those with most false positives; without a model evenly spaced ones. UserError
    as `list_episodes`, `open_checkpoint`, `read_trace`.
    """
    paths = list_episodes(folder)
    freq_hz = (read_episode(paths[0], views=()).control or {}).get("freq_hz", FPS)
    if checkpoint is None:
        chosen = [paths[i] for i in evenly_spaced(len(paths), num_episodes)]
        traces, threshold = [read_trace(chosen_one, None) for chosen_one in _counted(chosen)], 1.0
        how, by = "evenly spaced", ""
    else:
        with open_checkpoint(checkpoint) as client:
            threshold = client.threshold
            # no list of all: of thousands of episodes only the worst few are kept in memory
            traces = heapq.nsmallest(
                num_episodes,
                (read_trace(judged, client) for judged in _counted(paths)),
                key=lambda trace: [-number for number in errors(trace, threshold)],
            )
        how, by = "those with most false positives", f", scored by {checkpoint}"
    some = f"{len(traces)} of {len(paths):,} episodes, {how}" if len(traces) < len(paths) else "All episodes"
    save_trace_page(traces, threshold, path, str(folder), freq_hz, f"{some}{by}.")
    return f"{some}{by}"


def _counted(paths: list[Path]) -> tqdm:
    return tqdm(paths, "read", unit="ep", leave=False)
