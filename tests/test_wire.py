"""Messages of the reward link: what is written comes back, and what is forged is refused with its reason."""

import json
import struct

import numpy as np
import pytest

from common import wire
from common.wire import MAGIC, MAX_BYTES, WireError, decode, encode

FRAMES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def forged(header: dict | list | bytes, body: bytes = b"", id: int = 7, magic: bytes = MAGIC) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return magic + struct.pack("<QI", id, len(text)) + text + body


def score(*arrays, **fields) -> dict:
    return {"kind": "score", "arrays": list(arrays), **fields}


def test_arrays_come_back_as_they_were():
    views = {"main_images": FRAMES, "extra_view_images": FRAMES[:, ::2]}  # the second is not contiguous
    message = decode(encode("score", 2**40 + 1, views, task="Push the cube.", more=None), "uint8")
    assert (message.kind, message.id) == ("score", 2**40 + 1)
    assert message.fields == {"task": "Push the cube.", "more": None}
    assert list(message.arrays) == list(views)
    for view, frames in views.items():
        assert message.arrays[view].dtype == np.uint8
        assert (message.arrays[view] == frames).all()


def test_scores_come_back_bit_by_bit():
    scores = np.array([0.1, 1 / 3, np.nan, 1e-30], dtype=np.float32)
    answer = decode(encode("scores", 3, {"scores": scores}), "float32")
    assert answer.arrays["scores"].tobytes() == scores.tobytes()


def test_the_bytes_are_these():
    """A client in another language has to write the same."""
    header = b'{"kind": "score", "arrays": [["a", "uint8", [2, 1]]], "task": null}'
    expected = b"rewardlink 1 " + bytes([5, 0, 0, 0, 0, 0, 0, 0, len(header), 0, 0, 0]) + header + b"\x03\x04"
    assert encode("score", 5, {"a": np.array([[3], [4]], dtype=np.uint8)}, task=None) == expected


@pytest.mark.parametrize(
    ("message", "reason", "id"),
    [
        (b"", "no message of this protocol", 0),
        (b"GET / HTTP/1.1\r\n\r\n" + 40 * b"x", "no message of this protocol", 0),
        (b"\x80\x04\x95" + 60 * b"c", "no message of this protocol", 0),  # a pickle
        (MAGIC + b"\x07", "no message of this protocol", 0),
        (forged(score(), magic=b"rewardlink 2 "), "another version of the protocol", 0),
        (MAGIC + struct.pack("<QI", 7, 2**32 - 1) + b"{}", "header of 4294967295 bytes", 7),
        (MAGIC + struct.pack("<QI", 7, 3) + b"{}", "header of 3 bytes", 7),
        (forged(b"{'kind'"), "header is no JSON", 7),
        (forged(b"\xff\xfe{}"), "header is no JSON", 7),
        (forged(100_000 * b"["), "header is no JSON", 7),  # nested without end
        (forged([]), "no JSON object", 7),
        (forged({"arrays": []}), "no kind", 7),
        (forged({"kind": 65 * "k", "arrays": []}), "no kind", 7),
        (forged({"kind": "score"}), "arrays must be a list", 7),
        (forged(score(*17 * [["a", "uint8", [1]]])), "at most 16", 7),
        (forged(score({"name": "a"})), "name, dtype and shape", 7),
        (forged(score(["", "uint8", [1]])), "an array has no name", 7),
        (forged(score([65 * "a", "uint8", [1]])), "an array has no name", 7),
        (forged(score(["a", "float64", [1]]), bytes(8)), "'a' must be uint8, got 'float64'", 7),
        (forged(score(["a", "|O", [1]]), bytes(8)), r"'a' must be uint8, got '\|O'", 7),
        (forged(score(["a", "uint8", []])), "no shape of 1 to 5", 7),
        (forged(score(["a", "uint8", 6 * [1]]), b"x"), "no shape of 1 to 5", 7),
        (forged(score(["a", "uint8", [0]])), "whole numbers from 1", 7),
        (forged(score(["a", "uint8", [-1, -1]]), b"x"), "whole numbers from 1", 7),
        (forged(score(["a", "uint8", [True]]), b"x"), "whole numbers from 1", 7),
        (forged(score(["a", "uint8", [1.0]]), b"x"), "whole numbers from 1", 7),
        # 2^64 + 1 bytes are 1 byte where the product is kept in 64 bits
        (forged(score(["a", "uint8", [274177, 67280421310721]]), b"x"), "whole numbers from 1", 7),
        (forged(score(["a", "uint8", 4 * [2**16]]), b""), "MB of arrays, of at most 64 MB", 7),  # 2^64: 0
        (forged(score(["a", "uint8", [MAX_BYTES]], ["b", "uint8", [1]])), "of at most 64 MB", 7),
        (forged(score(["a", "uint8", [2]], ["a", "uint8", [1]]), b"xyz"), "two arrays have one name", 7),
        (forged(score(["a", "uint8", [2, 2]]), b"xyz"), "4 bytes of arrays announced, 3 sent", 7),
        (forged(score(["a", "uint8", [2]]), b"xyz"), "2 bytes of arrays announced, 3 sent", 7),
        (forged(score(), b"x"), "0 bytes of arrays announced, 1 sent", 7),
    ],
)
def test_what_is_forged_is_refused_with_its_reason(message, reason, id):
    for _ in range(2):  # a header that was refused is not remembered as a good one
        with pytest.raises(WireError, match=reason) as error:
            decode(message, "uint8")
        assert error.value.id == id


def test_scores_where_frames_are_due():
    with pytest.raises(WireError, match="must be uint8, got 'float32'"):
        decode(encode("score", 1, {"a": np.zeros(2, np.float32)}), "uint8")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"a": np.zeros(2)}, "a is float64; only uint8 and float32 travel"),
        ({"a": np.array(["x"], dtype=object)}, "a is object"),
        ({"a": np.zeros((0, 4), np.uint8)}, "whole numbers from 1"),
        ({"a": np.broadcast_to(np.uint8(0), (65, 1 << 20))}, "65 MB of arrays, of at most 64 MB"),
    ],
)
def test_what_would_be_refused_is_not_sent(arrays, reason):
    with pytest.raises(WireError, match=reason):
        encode("score", 1, arrays)


def test_a_header_that_would_be_refused_is_not_sent():
    with pytest.raises(WireError, match="a header of"):
        encode("hello", 1, served="x" * wire.MAX_HEADER_BYTES)
