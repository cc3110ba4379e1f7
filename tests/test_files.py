"""common/files.py and common/unpickle.py: whole files or none, and pickles that are data or refused."""

import functools
import io
import json
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import (
    atomic_write,
    gone_if_refused,
    load_json,
    load_pickle,
    load_torch,
    new_run_dir,
    save_json,
    save_torch,
    to_json,
)
from common.runtime import UserError


def unpickled(data: bytes):
    return load_pickle(io.BytesIO(data), name="episode.pkl")


# ----------------------------------------------------------------------------------------------------
# Whole or not at all


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_shows_only_when_it_is_done(tmp_path):
    path = tmp_path / "new_folder" / "episode.pkl"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert list(path.parent.glob("*.pkl")) == []
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_json_is_strict_and_takes_what_metrics_are_made_of(tmp_path):
    values = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "numpy": np.int64(3),
        "array": np.array([1.5, np.nan]),
        "tensor": torch.tensor([[1, 2]]),
        "path": Path("a/b"),
        "text": "0.5 µm",
        "tuple": (True, None),
    }
    save_json(values, tmp_path / "summary.json")
    assert load_json(tmp_path / "summary.json") == {
        "nan": None,
        "inf": None,
        "numpy": 3,
        "array": [1.5, None],
        "tensor": [[1, 2]],
        "path": "a/b",
        "text": "0.5 µm",
        "tuple": [True, None],
    }
    assert to_json({"a": [1]}) == '{"a": [1]}'
    with pytest.raises(TypeError, match="complex"):
        save_json({"a": 1j}, tmp_path / "never.json")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_files_come_back(tmp_path, mmap):
    save_torch(
        {"images": torch.arange(6, dtype=torch.uint8).view(2, 3), "labels": [0, 1]}, tmp_path / "train.pt"
    )
    loaded = load_torch(tmp_path / "train.pt", mmap=mmap)
    assert loaded["labels"] == [0, 1]
    assert torch.equal(loaded["images"], torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.uint8))


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"this is nothing")
    code = tmp_path / "code.pt"
    torch.save({"model": functools.partial(print)}, code)
    for load in (load_torch, load_json, load_pickle):
        for path, reason in [(tmp_path / "none", "no such file"), (tmp_path, "not a file"), (garbage, "not")]:
            with pytest.raises(UserError, match=reason) as caught:
                load(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"code\.pt is not a readable torch file"):
        load_torch(code)


# ----------------------------------------------------------------------------------------------------
# Run folders


def test_a_finished_run_is_not_overwritten(tmp_path):
    folder = new_run_dir(str(tmp_path / "run"), "x")
    assert folder.is_dir()
    assert new_run_dir(str(folder), "x") == folder  # unfinished: go on
    save_json({}, folder / "summary.json")
    with pytest.raises(UserError, match="finished run"):
        new_run_dir(str(folder), "x")
    assert new_run_dir(str(folder), "x", may_append=True) == folder
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        new_run_dir(str(tmp_path / "file"), "x")


@pytest.mark.parametrize(
    ("files", "log", "error", "stays"),
    [
        ([], None, UserError, False),
        (["tensorboard/events"], "", UserError, False),
        ([], "{}\n", UserError, True),  # it has begun
        (["collected_data/0.pkl"], "", UserError, True),
        ([], None, KeyboardInterrupt, True),
    ],
)
def test_a_refused_run_takes_its_folder_along(tmp_path, files, log, error, stays):
    with pytest.raises(error), gone_if_refused(tmp_path / "run"):
        for name in ("config.yaml", *files):
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).touch()
        if log is not None:
            (tmp_path / "run" / "metrics.jsonl").write_text(log)
        raise error("no")
    assert (tmp_path / "run").exists() == stays


def test_runs_without_a_path_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_run_dir(None, "push") for _ in range(3)]  # within one second
    assert len(set(folders)) == 3
    assert all(folder.match("logs/????????-??????-push*") and folder.is_dir() for folder in folders)
    with pytest.raises(UserError, match="'a/b' cannot be a folder name"):
        new_run_dir(None, "a/b")


# ----------------------------------------------------------------------------------------------------
# Pickles that are data

ARRAYS = {
    "uint8 frame": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(10)[::2],
    "big endian": np.arange(3, dtype=">f4"),
    "empty": np.zeros((0, 3), np.float32),
    "no axes": np.array(2.5),
    "half": np.ones(2, np.float16),
    "bool": np.array([True, False]),
    "text": np.array(["push", "the cube"]),
    "bytes": np.array([b"ab", b"c"]),
}
VALUES = {
    "scalar": np.float32(0.1),
    "bool scalar": np.bool_(True),
    "text scalar": np.str_("push"),
    "ordered": OrderedDict(b=1, a=2),
    "set": {1, "two"},
    "frozenset": frozenset({1, (2, 3)}),
    "complex": 1 + 2j,
    "bytearray": bytearray(b"\x00\xff"),
    "bytes": b"\x80abc",
    "no bytes": b"",
    "dtype": np.dtype("float32"),
    "nested": {"infos": [{}, {"success": True, "episode": {"length": 50, "return": None}}], 3: (1, (2, []))},
}
TENSORS = {
    "float": torch.linspace(0, 1, 6).view(2, 3),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "no axes": torch.tensor(True),
    "view": torch.arange(12).view(3, 4).T[1:3],
    "empty": torch.zeros(0, 4),
}
PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


@PROTOCOLS
def test_arrays_come_back_as_plain_pickle_gives_them(protocol):
    data = pickle.dumps(ARRAYS, protocol=protocol)
    for (name, loaded), expected in zip(unpickled(data).items(), pickle.loads(data).values(), strict=True):
        assert type(loaded) is np.ndarray
        assert np.array_equal(loaded, ARRAYS[name]), name
        assert (loaded.dtype, loaded.strides) == (expected.dtype, expected.strides), name
        assert loaded.flags.writeable, name


@PROTOCOLS
def test_values_come_back(protocol):
    for name, loaded in unpickled(pickle.dumps(VALUES, protocol=protocol)).items():
        assert loaded == VALUES[name]
        assert type(loaded) is type(VALUES[name])


@PROTOCOLS
def test_tensors_come_back(protocol):
    for name, loaded in unpickled(pickle.dumps(TENSORS, protocol=protocol)).items():
        assert loaded.dtype == TENSORS[name].dtype
        assert torch.equal(loaded, TENSORS[name])


@PROTOCOLS
def test_arrays_are_found_wherever_they_are(protocol):
    """Arrays are put in their places after the pickle ran; none is forgotten, shared ones stay shared."""
    array = np.arange(3)
    objects = np.array([None, {"a": [array]}, "text", (array, 1)], dtype=object)
    value = {"objects": objects, "tuple": ((array,), [array]), "ordered": OrderedDict(a=array)}
    value["self"] = value
    loaded = unpickled(pickle.dumps(value, protocol=protocol))
    first = loaded["tuple"][0][0]
    assert first.tolist() == [0, 1, 2]
    assert loaded["tuple"][1][0] is first
    assert loaded["ordered"]["a"] is first
    assert loaded["objects"].dtype == object
    assert loaded["objects"][1]["a"][0] is first
    assert loaded["objects"][3][0] is first
    assert loaded["self"] is loaded


def test_pickles_of_numpy_1_are_read():
    """numpy 2 moved its internals from numpy.core to numpy._core; files of both are about."""
    for protocol in (2, 4, 5):
        value = {
            "states": np.arange(3, dtype=np.float32),
            "reward": np.float64(0.5),
            "list": np.arange(6)[::2],
        }
        data = renamed(pickle.dumps(value, protocol=protocol), "numpy._core", "numpy.core")
        assert b"_core" not in data
        loaded = unpickled(data)
        assert loaded["states"].tolist() == [0, 1, 2]
        assert loaded["list"].tolist() == [0, 2, 4]
        assert loaded["reward"] == 0.5


def renamed(data: bytes, old: str, new: str) -> bytes:
    """A pickle with another module prefix: protocol 2 ends names by newlines, 4 and 5 count the bytes."""
    for module in ("multiarray", "numeric"):
        before, after = f"{old}.{module}".encode(), f"{new}.{module}".encode()
        data = data.replace(b"\x8c" + bytes([len(before)]) + before, b"\x8c" + bytes([len(after)]) + after)
        data = data.replace(b"c" + before + b"\n", b"c" + after + b"\n")
    if data[1] >= 4:  # one frame around everything after PROTO and FRAME
        data = data[:2] + b"\x95" + struct.pack("<Q", len(data) - 11) + data[11:]
    return data


# ----------------------------------------------------------------------------------------------------
# Pickles that are more than data


class Calls:
    """Pickles to a call of `function(*args)`, and perhaps of `__setstate__` on the result."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def storage_of(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    return tensor.__reduce_ex__(2)[1][0]  # tensor.storage() warns of its deprecation


def array_of(dtype: np.dtype, shape: tuple, content: object) -> Calls:
    """What numpy's arrays pickle to, with any content."""
    return Calls(
        np.arange(2).__reduce__()[0], np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content)
    )


FIELDS = {"a": (np.dtype("O"), 0)}


def named(module: str, name: str, *args) -> bytes:
    """A pickle that calls `module.name`, also one that this machine lacks."""
    return (
        pickle.dumps(None)[:2]
        + f"c{module}\n{name}\n".encode()
        + pickle.dumps(args, protocol=2)[2:-1]
        + b"R."
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("importlib", "import_module"),
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy.f2py", "run_main"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy.core.multiarray", "_reconstruct.__class__"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("torch.storage", "os.system"),
        ("torch._utils", "_rebuild_parameter"),
        ("_pickle", "loads"),
        ("copyreg", "_reconstructor"),
        ("collections", "defaultdict"),
    ],
)
def test_other_names_are_refused_by_name(module, name):
    with pytest.raises(UserError) as caught:
        unpickled(named(module, name, "touch pwned"))
    assert str(caught.value).startswith(f"episode.pkl holds '{module}.{name}'; only arrays")


def test_code_in_a_pickle_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    path = tmp_path / "episode.pkl"
    path.write_bytes(pickle.dumps([np.arange(3), Calls(os.mkdir, str(trace))]))
    with pytest.raises(UserError, match=r"episode\.pkl holds '(posix|nt)\.mkdir'"):
        load_pickle(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # the bait was good


def test_code_inside_a_tensor_does_not_run(tmp_path):
    """A tensor's numbers are pickled as a torch file of its own, which torch loads without any limit."""
    trace = tmp_path / "ran"
    inner = io.BytesIO()
    torch.save(Calls(os.mkdir, str(trace)), inner)
    with pytest.raises(UserError, match="more than numbers"):
        unpickled(pickle.dumps(Calls(torch.storage._load_from_bytes, inner.getvalue())))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("what", "bait"),
    [
        ("_codecs.encode to zlib", named("_codecs", "encode", "x", "zlib")),
        (r"numpy.dtype\('V8'\)", pickle.dumps(np.zeros(2, dtype=[("a", "f8")]))),
        (r"numpy.dtype\('M8'\)", pickle.dumps(np.datetime64("2020-01-01"))),
        # fields that would make object pointers out of eight bytes of the file
        ("structured", pickle.dumps(Calls(np.dtype, "f8", state=(3, "<", None, ("a",), FIELDS, 8, 8, 63)))),
        ("object", pickle.dumps(Calls(np.float64(0).__reduce__()[0], np.dtype("O"), b"12345678"))),
        ("numpy array made of list", pickle.dumps(array_of(np.dtype("f8"), (2,), [0.0, 1.0]))),
        ("collections.OrderedDict with a state", pickle.dumps(OrderedDict)[:-1] + b"}b."),
        ("collections.OrderedDict", pickle.dumps([OrderedDict])),  # the function itself is no data
        ("_Storage", pickle.dumps([storage_of(torch.ones(2))])),
    ],
)
def test_data_that_is_none_is_refused(what, bait):
    with pytest.raises(UserError, match=what):
        unpickled(bait)


def test_broken_pickles_are_named():
    """An object array whose list is too short made numpy read past its end."""
    short = array_of(np.dtype("O"), (9,), [1])
    out_of_bounds = Calls(
        torch._utils._rebuild_tensor_v2, storage_of(torch.ones(2)), 0, (99,), (1,), False, {}
    )
    whole = pickle.dumps({"states": np.arange(1000)})
    for data in (b"", whole[:-1], whole[:500], pickle.dumps(short), pickle.dumps(out_of_bounds)):
        with pytest.raises(UserError, match=r"^episode\.pkl is not a readable pickle"):
            unpickled(data)


def test_a_deep_pickle_is_an_error_and_no_crash():
    with pytest.raises(UserError, match="RecursionError"):
        unpickled(b"(" + b"]" + b"]" * 5000 + b"a" * 5000 + b".")


def test_metrics_lines_are_json():
    assert json.loads(to_json({"loss": np.float32(0.5)})) == {"loss": 0.5}
