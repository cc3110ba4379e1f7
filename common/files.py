"""Files that appear whole or not at all, and files from elsewhere that are read without running their code.

Three doors: torch files (`weights_only`), JSON, and pickles of episodes. A pickle is a program; it is run by
an unpickler that knows a dozen harmless instructions and refuses the rest by name (`load_pickle`).
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from common.runtime import UserError
from common.unpickle import RefusedError, is_tensor, unpickle

if TYPE_CHECKING:  # imported where needed: costs 0.5 GB and seconds
    import torch

# ----------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; what the block leaves there becomes `path` in one step.

    If the block raises (Ctrl-C included), the temporary file goes and an older `path` stays as it was.
    Missing parent folders are made. The temporary name ends in `.tmp`, so that no `*.pkl` or `*.pt` pattern
    finds it; a writer that picks its format by suffix has to be told the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)  # the new name is on the disk only when the folder is


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` (replacing an older one) if the block ends well."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    older = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if folder.exists():
            folder.rename(older)
        temporary.rename(folder)
    finally:
        if older.exists() and not folder.exists():  # interrupted between the two renames
            older.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def fsync(path: Path) -> None:
    """Return when the file's (or folder's) content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_torch(obj: Any, path: str | Path) -> None:
    """`torch.save`, whole or not at all."""
    with atomic_write(path) as temporary:
        import torch

        torch.save(obj, temporary)


def save_json(obj: Any, path: str | Path) -> None:
    """Write `to_json(obj)`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(obj, indent=2) + "\n", encoding="utf-8")


def to_json(obj: Any, indent: int | None = None) -> str:
    """Strict JSON of plain values, numpy and torch values (as numbers and lists) and paths.

    NaN and infinities, which JSON does not have, become null. Raises TypeError for anything else.
    """
    return json.dumps(_plain(obj), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(obj: Any) -> Any:
    if isinstance(obj, np.ndarray) or is_tensor(obj):
        return _plain(obj.tolist())
    if isinstance(obj, np.generic):
        return _plain(obj.item())
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, dict):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    return obj


def new_run_dir(log_path: str | None, experiment_name: str, may_append: bool = False) -> Path:
    """Make and return this run's folder: `log_path`, or `logs/<date>-<time>-<experiment_name>` if None.

    An unfinished run's folder may be used again. UserError if it holds a finished run (`summary.json`),
    unless the caller adds to what is there and says so (`may_append`).
    """
    if log_path is not None:
        folder = Path(log_path)
        if (folder / "summary.json").exists() and not may_append:
            raise UserError(
                f"{folder} holds a finished run (summary.json); choose another log_path, or move it away"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder} cannot become a run folder: a file is in the way") from error
        return folder
    if not experiment_name or "/" in experiment_name:
        raise UserError(
            f"experiment_name '{experiment_name}' cannot be a folder name; use letters, digits, - and _"
        )
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{experiment_name}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):  # runs started within the same second
        folder = Path("logs") / (stem + suffix)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"logs/{stem} and 98 neighbours exist already; start fewer runs per second")


@contextlib.contextmanager
def gone_if_refused(folder: Path) -> Iterator[None]:
    """Around a run: a UserError while its folder holds a config and an empty log at most removes it."""
    try:
        yield
    except UserError:
        log = folder / "metrics.jsonl"
        has_begun = log.exists() and log.stat().st_size > 0
        if not has_begun and {p.name for p in folder.iterdir()} <= {"config.yaml", log.name, "tensorboard"}:
            shutil.rmtree(folder)
        raise


# ----------------------------------------------------------------------------------------------------
# Reading


def load_torch(path: str | Path, mmap: bool = False, map_location: "str | torch.device" = "cpu") -> Any:
    """`torch.load` of tensors and plain containers. Raises UserError if `path` is missing or cannot be read.

    `mmap` leaves the tensors on the disk until they are touched.
    """
    import torch

    _check_is_file(path)
    try:
        return torch.load(path, weights_only=True, mmap=mmap, map_location=map_location)
    # torch documents no list of what a broken file may raise; its messages run over many lines
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a readable torch file ({type(error).__name__}: {reason})") from error


def load_json(path: str | Path) -> Any:
    """Parsed JSON. Raises UserError if `path` is missing or is not JSON."""
    _check_is_file(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error})") from error


def load_pickle(source: str | Path | BinaryIO, name: str | None = None) -> Any:
    """Unpickle data from a path or an open binary file, and only data.

    Built are: numpy arrays (numbers, bool, str, bytes, objects of this list; any byte order), numpy scalars,
    torch tensors (on the CPU, without gradient), dict, OrderedDict, list, tuple, set, frozenset, str, bytes,
    bytearray and numbers, from pickle protocols 2-5 and numpy 1.x or 2.x. Any other name in the file ends the
    reading there. Raises UserError with the file (`name` where `source` is not a path) and the reason.
    """
    if isinstance(source, str | Path):
        _check_is_file(source)
        with Path(source).open("rb") as file:
            return load_pickle(file, name=str(source))
    name = name or "pickle"
    try:
        return unpickle(source)
    except RefusedError as error:
        raise UserError(
            f"{name} holds '{error}'; only arrays, tensors and plain containers are read from a pickle, "
            "so write the file again without it"
        ) from error
    # a broken pickle may raise anything, says the documentation of pickle.UnpicklingError
    except Exception as error:
        raise UserError(f"{name} is not a readable pickle ({type(error).__name__}: {error})") from error


def _check_is_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise UserError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
