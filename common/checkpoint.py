"""Checkpoints: a folder with `state.pt` (tensors and plain containers) beside a readable `meta.json`.

A checkpoint is there whole or not at all. It is written into a folder beside its place, which then takes that
place; an older checkpoint of that name steps aside first, and is found there if the run is killed in between.
"""

import random
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import fsync, load_json, load_torch, save_json, save_torch
from common.runtime import UserError


def save_checkpoint(folder: str | Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write or replace the checkpoint `folder`.

    state: tensors, plain containers and numbers, what `torch.load(weights_only=True)` takes; anything else is
    a TypeError, before an older checkpoint is touched. meta: what `common.files.to_json` takes.
    """
    folder = Path(folder)
    _check_plain(state, "state")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        fresh.mkdir()
        save_torch(state, fresh / "state.pt")
        save_json(meta, fresh / "meta.json")
        aside = _aside(folder)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        fresh.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def load_checkpoint(
    folder: str | Path, map_location: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> state, meta. Raises UserError if there is no checkpoint at `folder` or it cannot be read."""
    folder = _found(folder)
    return load_torch(folder / "state.pt", map_location=map_location), load_json(folder / "meta.json")


def load_meta(folder: str | Path) -> dict[str, Any]:
    """`load_checkpoint`'s meta alone."""
    return load_json(_found(folder) / "meta.json")


def _found(folder: str | Path) -> Path:
    """Where the checkpoint lies; a killed run may have left it aside."""
    folder = Path(folder)
    if not folder.exists() and _aside(folder).exists():
        folder = _aside(folder)
    if not (folder / "state.pt").is_file() or not (folder / "meta.json").is_file():
        near = sorted(path.parent.name for path in folder.parent.glob("[!.]*/state.pt"))
        hint = f"; {folder.parent} has: {', '.join(near)}" if near else ""
        raise UserError(f"{folder} is not a checkpoint folder (state.pt and meta.json){hint}")
    return folder


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not (
        value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, bytes)
    ):
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors, containers and numbers"
        )


# ----------------------------------------------------------------------------------------------------
# Random numbers


def rng_state() -> dict[str, Any]:
    """State of the global generators of Python, numpy and torch (CPU, every GPU), as tensors and numbers."""
    version, python_words, next_gauss = random.getstate()
    _, numpy_words, position, has_gauss, cached_gauss = np.random.get_state()  # noqa: NPY002  the global one
    return {
        "python": [version, torch.tensor(python_words), next_gauss],
        "numpy": [torch.from_numpy(numpy_words.astype(np.int64)), position, has_gauss, cached_gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers from where `rng_state` was taken.

    GPUs go on only where there are as many as then; otherwise they keep the seed they have.
    """
    version, python_words, next_gauss = state["python"]
    random.setstate((version, tuple(python_words.tolist()), next_gauss))
    numpy_words, *rest = state["numpy"]
    words = numpy_words.cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, *rest))  # noqa: NPY002  the global one
    torch.set_rng_state(state["torch"].cpu())  # a checkpoint loaded onto a GPU brought it there
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([words.cpu() for words in state["cuda"]])
