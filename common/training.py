"""What both training scripts need around their loop: optimizer, learning rate over time, early stopping."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class AdamWConfig:
    lr: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 1e-5
    clip_grad: float = 1.0  # norm of the whole gradient
    lr_warmup_steps: int = 100
    warmup_style: Literal["constant", "cosine"] = "constant"  # what follows; cosine: to 0 at the last step


def build_adamw(
    model: nn.Module, optim: AdamWConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer of all parameters that learn, and its schedule, which is stepped as often."""

    def lr_factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(optim.lr_warmup_steps, 1))
        if optim.warmup_style == "constant":
            return warmup
        return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))

    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)


@dataclass
class EarlyStopConfig:
    enabled: bool = True
    patience: int = 5  # validations without improvement
    min_delta: float = 0.001  # what counts as one; 1e-6 for data of a real robot
    monitor: Literal["val_loss", "val_auprc"] = "val_loss"


class EarlyStop:
    """Counts validations without improvement."""

    def __init__(self, cfg: EarlyStopConfig):
        self.cfg = cfg
        self.best = -math.inf
        self.num_without = 0

    def is_due(self, metrics: dict[str, float]) -> bool:
        """To be asked after each validation, with its `loss` and `auprc`."""
        quality = -metrics["loss"] if self.cfg.monitor == "val_loss" else metrics["auprc"]
        if quality > self.best + self.cfg.min_delta:
            self.best, self.num_without = quality, 0
        else:
            self.num_without += 1
        return self.cfg.enabled and self.num_without >= self.cfg.patience
