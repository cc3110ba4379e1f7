"""Files that appear whole or not at all, and files from elsewhere that are read without running their code.

Three doors: torch files (`weights_only`), JSON, and pickles of episodes. A pickle is a program; it is run by
an unpickler that knows a dozen harmless instructions and refuses the rest by name (`load_pickle`).
"""

import contextlib
import json
import math
import os
import pickle
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from common.runtime import UserError

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
    if isinstance(obj, torch.Tensor | np.ndarray):
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


def new_run_dir(log_path: str | None, experiment_name: str) -> Path:
    """Make and return this run's folder: `log_path`, or `logs/<date>-<time>-<experiment_name>` if None.

    An unfinished run's folder may be used again. UserError if it holds a finished run (`summary.json`).
    """
    if log_path is not None:
        folder = Path(log_path)
        if (folder / "summary.json").exists():
            raise UserError(
                f"{folder} holds a finished run (summary.json); choose another log_path, or move it away"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"{folder} cannot become a run folder: a file of that name is in the way"
            ) from error
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


# ----------------------------------------------------------------------------------------------------
# Reading


def load_torch(path: str | Path, mmap: bool = False, map_location: str | torch.device = "cpu") -> Any:
    """`torch.load` of tensors and plain containers. Raises UserError if `path` is missing or cannot be read.

    `mmap` leaves the tensors on the disk until they are touched.
    """
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
        return _settle(_DataUnpickler(source).load(), seen=set())
    except _RefusedError as error:
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


# ----------------------------------------------------------------------------------------------------
# The restricted unpickler
#
# Refusing `os.system` by name is the easy half. The other half: numpy trusts what a pickle says about memory.
# `dtype.__setstate__` takes hand-made fields that turn bytes into object pointers, `ndarray.__setstate__` runs
# past the end of a short list of objects. So neither sees what the file says: `_Dtype` and `_Array` stand in
# while the pickle runs and check each value, and `_settle` puts the finished arrays in their places.


class _RefusedError(pickle.UnpicklingError):
    """Carries the name of what the pickle asked for."""


class _Builder:
    """A function that a pickle may call and do nothing else with: no attributes to set, no state to load."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any]):
        self.name = name
        self.build = build

    def __call__(self, *args: Any) -> Any:
        return self.build(*args)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"{self.name} with a state")


class _Dtype:
    """Stands in for a numpy dtype: a plain scalar type, no structure, no metadata."""

    __slots__ = ("dtype",)
    __hash__ = None  # no place in a set or as a key, where `_settle` could not replace it
    # bool, ints, floats, complex, object, bytes and str of a length
    _CODE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|O8?|[SU]\d{1,9}")

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not self._CODE.fullmatch(code):
            raise _RefusedError(f"numpy.dtype('{code}')")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, subarray, names, fields, *_ = state
        if subarray is not None or names is not None or fields is not None:
            raise _RefusedError("a structured numpy.dtype")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands in for a numpy array between its creation and its content (`ndarray.__setstate__`)."""

    __slots__ = ("array",)
    __hash__ = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, stand_in, is_fortran, content = state
        if stand_in.dtype.kind == "O":
            flat = np.empty(len(content), dtype=object)
            for index, item in enumerate(content):  # not flat[:] = content: that would unpack nested lists
                flat[index] = item
            self.array = flat.reshape(shape, order="F" if is_fortran else "C")
            return
        if not isinstance(content, bytes):
            raise _RefusedError(f"a numpy array made of {type(content).__name__}")
        array = np.empty(0, dtype=np.uint8)
        array.__setstate__((1, shape, stand_in.dtype, bool(is_fortran), content))  # shares the bytes, no copy
        self.array = array


def _array_from_buffer(
    buffer: bytes | bytearray, stand_in: _Dtype, shape: tuple, order: str, axis_order: tuple | None = None
) -> np.ndarray:
    """Protocol 5. `axis_order` came with numpy 2.3: C-ordered memory seen through transposed axes."""
    array = np.frombuffer(buffer, dtype=stand_in.dtype)
    if order == "K" and axis_order is not None:
        return array.reshape(shape).transpose(axis_order)
    return array.reshape(shape, order=order)


_numpy_scalar = np.float64(0).__reduce__()[0]  # its module is private and was renamed in numpy 2


def _scalar(stand_in: _Dtype, content: bytes) -> np.generic:
    if stand_in.dtype.kind == "O":
        raise _RefusedError("a numpy scalar of dtype object")
    return _numpy_scalar(stand_in.dtype, content)


def _storage(content: bytes) -> torch.storage.TypedStorage:
    """torch pickles a storage as a torch file in bytes, and would load that without restriction. Not here."""
    try:
        storage = torch.load(BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _RefusedError("a torch storage with more than numbers in it") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _RefusedError(f"a torch storage that is a {type(storage).__name__}")
    return storage


def _tensor(
    storage: torch.storage.TypedStorage,
    offset: int,
    size: tuple,
    stride: tuple,
    _requires_grad: bool,
    _hooks: dict,
) -> torch.Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)  # checks the bounds


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes. Other codecs are code of their own."""
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"_codecs.encode to {encoding}")
    return text.encode("latin-1")


def _builders() -> dict[str, _Builder]:
    known: dict[str, Callable[..., Any]] = {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": lambda: _Array(),  # only ever named, as an argument of _reconstruct
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch.storage._load_from_bytes": _storage,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": _latin1,
    }
    for numpy in ("numpy.core", "numpy._core"):  # numpy 1.x, 2.x
        known[f"{numpy}.multiarray._reconstruct"] = lambda array_type, shape, dtype: _Array()
        known[f"{numpy}.multiarray.scalar"] = _scalar
        known[f"{numpy}.numeric._frombuffer"] = _array_from_buffer
    for builtins in ("builtins", "__builtin__"):  # protocol 2 writes Python 2's name
        for kind in (set, frozenset, complex, bytearray, bytes):
            known[f"{builtins}.{kind.__name__}"] = kind
    return {name: _Builder(name, build) for name, build in known.items()}


_BUILDERS = _builders()


class _DataUnpickler(pickle.Unpickler):
    """Finds the names of `_BUILDERS` and no others; imports nothing."""

    def find_class(self, module: str, name: str) -> _Builder:
        try:
            return _BUILDERS[f"{module}.{name}"]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, torch.Tensor})


def _settle(value: Any, seen: set[int]) -> Any:
    """`value` with each `_Array` replaced by its array; refuses what is not data. `seen` ids stop cycles."""
    kind = type(value)
    if kind in _LEAVES or isinstance(value, np.generic):
        return value
    if kind is _Dtype:
        return value.dtype
    if kind is _Array:
        return _settle(value.array, seen)
    if kind is tuple:
        settled = tuple(_settle(item, seen) for item in value)
        return settled if any(new is not old for new, old in zip(settled, value, strict=True)) else value
    if kind not in (dict, OrderedDict, list, set, frozenset, np.ndarray):
        raise _RefusedError(value.name if kind is _Builder else f"{kind.__module__}.{kind.__qualname__}")
    if id(value) in seen:
        return value
    seen.add(id(value))
    if kind is list:
        value[:] = [_settle(item, seen) for item in value]
    elif kind is np.ndarray:
        if value.dtype.kind == "O":
            for index, item in enumerate(value.flat):
                value.flat[index] = _settle(item, seen)
    else:
        for key in value:  # keys and members are hashable, so no stand-in is among them; a _Builder may be
            _settle(key, seen)
        if kind in (dict, OrderedDict):
            for key in value:
                value[key] = _settle(value[key], seen)
    return value
