"""Messages of the reward link: a JSON header and the raw bytes of arrays, and nothing that could run code.

A message is one string of bytes:

    b"rewardlink 1 ", the message's id (8 bytes, little endian), the header's length (4 bytes),
    the header, a JSON object: {"kind": ..., "arrays": [[name, dtype, shape], ...], ...},
    the bytes of each array, in that order: C order, little endian

| kind     | from   | arrays                                        | further fields                        |
|----------|--------|-----------------------------------------------|---------------------------------------|
| `hello`  | client | none                                          |                                       |
| `score`  | client | view -> (B, H, W, 3) or (B, K, H, W, 3) uint8 | `task`: a text or null                |
| `judge`  | client | the same; the sender's next one makes it void | `task`                                |
| `hello`  | server | none                                          | `served`: a JSON text (`link.Served`) |
| `scores` | server | `scores`: (B,) or (B, L) float32              | `model`: which one (`Served.model`)   |
| `error`  | server | none                                          | `message`: one line                   |

An answer bears its question's id, 0 where that could not be read. `decode` believes nothing: sizes, names,
dtype and shapes are checked before any bytes become an array. The id stands apart so that the header of one
sender's messages is always the same: it is made once and read once.
"""

import functools
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

PROTOCOL = b"rewardlink "
MAGIC = PROTOCOL + b"1 "
_FIXED = struct.Struct(f"<{len(MAGIC)}sQI")  # magic, id, length of the header
MAX_HEADER_BYTES = 256 << 10  # what a reward model says of itself takes some kilobytes
MAX_BYTES = 64 << 20  # of the arrays of a message together
MAX_MESSAGE_BYTES = MAX_BYTES + MAX_HEADER_BYTES + _FIXED.size
MAX_ARRAYS = 16
MAX_NAME = 64  # characters
MAX_DIMS = 5

Dtype = Literal["uint8", "float32"]
_NUMPY = {"uint8": np.dtype("uint8"), "float32": np.dtype("<f4")}
_NAMES = {dtype: name for name, dtype in _NUMPY.items()}


class WireError(ValueError):
    """What came is no message. Says why in one line; `id` is the message's, 0 where it could not be read."""

    def __init__(self, reason: str, id: int = 0):
        super().__init__(reason)
        self.id = id


@dataclass
class Message:
    kind: str
    id: int
    arrays: dict[str, np.ndarray]
    fields: dict[str, Any]  # the rest of the header, unchecked; shared with others of its kind


def encode(kind: str, id: int, arrays: Mapping[str, np.ndarray] | None = None, **fields: str | None) -> bytes:
    """A message. Raises WireError where `decode` would refuse it."""
    arrays = arrays or {}
    layout = tuple((name, array.dtype, array.shape) for name, array in arrays.items())
    header = _made_header(kind, layout, tuple(fields.items()))
    bodies = [np.ascontiguousarray(array).data.cast("B") for array in arrays.values()]
    return b"".join([_FIXED.pack(MAGIC, id, len(header)), header, *bodies])


def decode(message: bytes | memoryview, dtype: Dtype) -> Message:
    """What a message says; its arrays, which must all be `dtype`, look at its memory. Raises WireError."""
    magic, id, header_bytes = _FIXED.unpack_from(message) if len(message) >= _FIXED.size else (b"", 0, 0)
    if magic != MAGIC:
        if magic.startswith(PROTOCOL):
            raise WireError("another version of the protocol; use the same checkout on both machines")
        raise WireError("no message of this protocol")
    start = _FIXED.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > len(message):
        raise WireError(f"a header of {header_bytes} bytes, of at most {MAX_HEADER_BYTES}", id)
    try:
        kind, layout, num_bytes, fields = _read_header(bytes(message[_FIXED.size : start]), dtype)
    except WireError as error:
        raise WireError(str(error), id) from None
    if num_bytes != len(message) - start:
        raise WireError(f"{num_bytes} bytes of arrays announced, {len(message) - start} sent", id)
    arrays, kind_of_number = {}, _NUMPY[dtype]
    for name, shape, count in layout:
        arrays[name] = np.frombuffer(message, kind_of_number, count, start).reshape(shape)
        start += count * kind_of_number.itemsize
    return Message(kind, id, arrays, fields)


@functools.lru_cache(maxsize=32)
def _made_header(kind: str, layout: tuple, fields: tuple) -> bytes:
    for name, dtype, _ in layout:
        if dtype not in _NAMES:
            raise WireError(f"{name} is {dtype}; only {' and '.join(_NUMPY)} travel")
    described = [(name, _NAMES[dtype], shape) for name, dtype, shape in layout]
    header = json.dumps({"kind": kind, "arrays": described, **dict(fields)}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes, of at most {MAX_HEADER_BYTES}")
    _read_header(header, described[0][1] if described else "uint8")
    return header


@functools.lru_cache(maxsize=32)  # a forged header raises, and takes no place
def _read_header(header: bytes, dtype: Dtype) -> tuple[str, list[tuple[str, list, int]], int, dict[str, Any]]:
    """-> kind; name, shape and number of values of each array; bytes of all; the other fields."""
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
        raise WireError("the header is no JSON") from None
    if not isinstance(fields, dict):
        raise WireError("the header is no JSON object")
    kind, described = fields.pop("kind", None), fields.pop("arrays", None)
    if not isinstance(kind, str) or len(kind) > MAX_NAME:
        raise WireError("the header has no kind")
    if not isinstance(described, list) or len(described) > MAX_ARRAYS:
        raise WireError(f"arrays must be a list of at most {MAX_ARRAYS}")
    layout = [_read_array(entry, dtype) for entry in described]
    if len({name for name, _, _ in layout}) < len(layout):
        raise WireError("two arrays have one name")
    num_bytes = _NUMPY[dtype].itemsize * sum(count for _, _, count in layout)
    if num_bytes > MAX_BYTES:
        raise WireError(f"{num_bytes / 2**20:.3g} MB of arrays, of at most {MAX_BYTES >> 20} MB")
    return kind, layout, num_bytes, fields


def _read_array(entry: Any, dtype: Dtype) -> tuple[str, list[int], int]:
    if not isinstance(entry, list) or len(entry) != 3:
        raise WireError("an array is not described by name, dtype and shape")
    name, said_dtype, shape = entry
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise WireError("an array has no name")
    if said_dtype != dtype:
        raise WireError(f"{name!r} must be {dtype}, got {str(said_dtype)[:20]!r}")
    if not isinstance(shape, list) or not 0 < len(shape) <= MAX_DIMS:
        raise WireError(f"{name!r} has no shape of 1 to {MAX_DIMS} numbers")
    count = 1
    for length in shape:
        if type(length) is not int or not 0 < length <= MAX_BYTES:  # a bool is no number here
            raise WireError(f"the shape of {name!r} is not of whole numbers from 1 to {MAX_BYTES}")
        count *= length  # Python's whole numbers do not overflow
    return name, shape, count
