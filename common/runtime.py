"""What every script does around its work: errors for the user, Ctrl-C, device, threads, seeds."""

import platform
import random
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """Something the user can mend. The message is one line: the thing, what was met, the remedy."""


def run_script(main: Callable[[], None]) -> None:
    """Run `main` as a script: a UserError becomes one line and exit code 2, Ctrl-C becomes exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def pick_device(name: str) -> "torch.device":
    """`auto` -> the first GPU if there is one, else the CPU; else as torch spells it (`cpu`, `cuda:1`)."""
    import torch  # late: costs 0.5 GB and seconds, and not every script needs it

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' asked for, but torch sees no GPU; use 'auto' or 'cpu'")
    return device


def set_threads(num_threads: int) -> None:
    """Threads of torch in this process. 1 by default: threads that fight for cores cost up to 10x."""
    import torch

    torch.set_num_threads(num_threads)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries below us read numpy's global generator
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on, for summaries."""
    packages = ("torch", "torchvision", "numpy", "gymnasium", "mani_skill", "sapien")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
