"""Build an agent from its settings, or from a checkpoint."""

from pathlib import Path

import torch

from common.checkpoint import load_checkpoint
from common.config import from_dict
from common.nets import ActorModelConfig, OptimConfig
from common.ppo import PPO, PPOConfig
from common.sac import SAC, SACConfig
