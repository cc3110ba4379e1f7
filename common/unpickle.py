"""Pickles as data: an unpickler that knows a dozen harmless instructions and refuses the rest by name.

Refusing `os.system` by name is the easy half. The other half: numpy trusts what a pickle says of memory:
`dtype.__setstate__` takes hand-made fields that turn bytes into object pointers, `ndarray.__setstate__` reads
past the end of a short list of objects, torch grows a tensor over memory that nobody wrote. So none of them
sees what the file says: `_Dtype`, `_Array` and `_Storage` stand in while the pickle runs, and check each
value; `_settle` puts the finished arrays in their places.
"""

import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:  # imported where a pickle names it: costs 0.5 GB and seconds
    import torch


class RefusedError(pickle.UnpicklingError):
    """Carries the name of what the pickle asked for."""


def unpickle(file: BinaryIO) -> Any:
    """The data in `file`. RefusedError where it names more than data; any exception where it is broken."""
    return _settle(_DataUnpickler(file).load(), seen=set())


class _Builder:
    """A function that a pickle may call and do nothing else with: no attributes to set, no state to load."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any]):
        self.name = name
        self.build = build

    def __call__(self, *args: Any) -> Any:
        return self.build(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedError(f"{self.name} with a state")


class _Dtype:
    """Stands in for a numpy dtype: a plain scalar type, no structure, no metadata."""

    __slots__ = ("dtype",)
    __hash__ = None  # no place in a set or as a key, where `_settle` could not replace it
    # bool, ints, floats, complex, object, bytes and str of a length
    _CODE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|O8?|[SU]\d{1,9}")

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not self._CODE.fullmatch(code):
            raise RefusedError(f"numpy.dtype('{code}')")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, subarray, names, fields, *_ = state
        if subarray is not None or names is not None or fields is not None:
            raise RefusedError("a structured numpy.dtype")
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
            raise RefusedError(f"a numpy array made of {type(content).__name__}")
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
        raise RefusedError("a numpy scalar of dtype object")
    return _numpy_scalar(stand_in.dtype, content)


class _Storage:
    """Stands in for a torch storage: all its numbers as one flat tensor.

    torch pickles a storage as a torch file in bytes, and would load that one without any restriction.
    """

    __slots__ = ("flat",)

    def __init__(self, content: bytes):
        import torch

        try:
            storage = torch.load(BytesIO(content), weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise RefusedError("a torch storage with more than numbers in it") from error
        if not isinstance(storage, torch.storage.TypedStorage):
            raise RefusedError(f"a torch storage that is a {type(storage).__name__}")
        empty = torch._utils._rebuild_tensor(storage, 0, (0,), (1,))
        self.flat = empty.set_(
            empty.untyped_storage(), 0, (empty.untyped_storage().nbytes() // empty.itemsize,), (1,)
        )


def _tensor(
    storage: _Storage, offset: int, size: tuple, stride: tuple, _requires_grad: bool, _hooks: dict
) -> "torch.Tensor":
    return storage.flat.as_strided(size, stride, offset)  # unlike torch's own function, it checks the bounds


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes. Other codecs are code of their own."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode to {encoding}")
    return text.encode("latin-1")


def _builders() -> dict[str, _Builder]:
    known: dict[str, Callable[..., Any]] = {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": lambda: _Array(),  # only ever named, as an argument of _reconstruct
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch.storage._load_from_bytes": _Storage,
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
            raise RefusedError(f"{module}.{name}") from None


_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor, without importing torch: where nobody did, nothing is one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


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
        if is_tensor(value):
            return value
        raise RefusedError(value.name if kind is _Builder else f"{kind.__module__}.{kind.__qualname__}")
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
