"""Build an agent from its settings, or from a checkpoint folder of rl_train.py."""

from pathlib import Path

import torch

from common.checkpoint import load_checkpoint
from common.config import from_dict, to_dict
from common.envs import EnvSpec
from common.nets import ActorModelConfig, OptimConfig
from common.pixels import state_dim
from common.ppo import PPO, PPOConfig
from common.runtime import UserError
from common.sac import SAC, SACConfig

AlgorithmConfig = PPOConfig | SACConfig


def build_agent(
    algorithm: AlgorithmConfig,
    model: ActorModelConfig,
    optim: OptimConfig,
    spec: EnvSpec,
    device: torch.device,
) -> PPO | SAC:
    """UserError where PPO is to see pixels, which it cannot."""
    if algorithm.name == "sac":
        width = state_dim(spec)
        return SAC(spec.obs_dim, spec.action_dim, algorithm, model, optim, device, state_dim=width)
    if model.pixels is not None:
        raise UserError("actor.model.pixels is for SAC; PPO sees the state alone: set it to null")
    return PPO(spec.obs_dim, spec.action_dim, algorithm, model, optim, device)


def agent_meta(
    algorithm: AlgorithmConfig, model: ActorModelConfig, optim: OptimConfig, spec: EnvSpec
) -> dict:
    """What a checkpoint must say so that `load_agent` can rebuild its agent."""
    return {
        "task": spec.task,
        "obs_dim": spec.obs_dim,
        "action_dim": spec.action_dim,
        "algorithm": to_dict(algorithm),
        "model": to_dict(model),
        "optim": to_dict(optim),
    }


def check_task(meta: dict, spec: EnvSpec, folder: Path) -> None:
    """UserError where a checkpoint belongs to another task."""
    theirs = (meta["task"], meta["obs_dim"], meta["action_dim"])
    ours = (spec.task, spec.obs_dim, spec.action_dim)
    if theirs != ours:
        raise UserError(
            f"{folder} was trained on (task, state size, action size) {theirs}; the env here is {ours}"
        )


# Settings of `algorithm` that decide which tensors an agent has; all of `actor.model` does.
SHAPING = ("name", "num_critics", "critic_layer_norm", "auto_alpha")


def check_same_agent(meta: dict, ours: dict, folder: Path) -> None:
    """UserError where a checkpoint's agent (its `agent_meta`) cannot go on as the one of the config."""
    pairs = {f"algorithm.{key}": (meta["algorithm"].get(key), ours["algorithm"].get(key)) for key in SHAPING}
    pairs |= {f"actor.model.{key}": (meta["model"].get(key), value) for key, value in ours["model"].items()}
    for key, (theirs, here) in pairs.items():
        if theirs != here:
            raise UserError(f"{folder} was trained with {key} {theirs}, but the config says {here}")


def load_agent(folder: Path, spec: EnvSpec, device: torch.device) -> PPO | SAC:
    """The agent of a checkpoint, for acting. UserError if it belongs to another task."""
    state, meta = load_checkpoint(folder, device)
    check_task(meta, spec, folder)
    algorithm_type = {"ppo": PPOConfig, "sac": SACConfig}[meta["algorithm"]["name"]]
    agent = build_agent(
        from_dict(algorithm_type, meta["algorithm"], str(folder)),
        from_dict(ActorModelConfig, meta["model"], str(folder)),
        from_dict(OptimConfig, meta["optim"], str(folder)),
        spec,
        device,
    )
    agent.load_state_dict(state["agent"])
    return agent
