"""The processes that torchrun started, or this one alone: an object that knows which of them we are."""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.runtime import UserError, pick_device

WHILE_ONE_WORKS_ALONE = timedelta(hours=24)  # the first rank validates and saves, the others wait for it


class Ranks:
    """A context manager. Rank r of torchrun uses GPU r (nccl), or the CPU (gloo)."""

    def __init__(self, device: str):
        """`device` as `pick_device` takes it."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = pick_device(device)
        if self.size > 1 and self.device.type == "cuda":
            local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= num_gpus:
                raise UserError(
                    f"torchrun starts more processes than there are GPUs ({num_gpus}); start fewer"
                )
            self.device = torch.device("cuda", local_rank)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=WHILE_ONE_WORKS_ALONE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model`, with its gradients averaged over the ranks. Call what is returned, save the original."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def exchange_gradients(self, learner: nn.Module, now: bool) -> contextlib.AbstractContextManager:
        """Around a forward and backward pass of `parallel`'s result; not `now`: gradients only pile up."""
        return contextlib.nullcontext() if now or self.size == 1 else learner.no_sync()

    def agree(self, value: bool) -> bool:
        """The first rank's `value`, on all of them. Every rank must call it, and waits for the first."""
        if self.size == 1:
            return value
        shared = torch.tensor(float(value), device=self.device)
        dist.broadcast(shared, src=0)
        return bool(shared.item())
