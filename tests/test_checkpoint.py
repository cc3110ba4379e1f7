"""common/checkpoint.py: whole or not at all, never the last good one lost, random numbers that go on."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint
from common.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from common.runtime import UserError, seed_everything


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.randn(), float(torch.rand(()))]  # noqa: NPY002


def test_a_checkpoint_comes_back(tmp_path):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "buffer": None, "sizes": (1, 2.5)}
    save_checkpoint(
        tmp_path / "checkpoints" / "best", state, {"step": 7, "path": tmp_path, "merit": (0.5, 1)}
    )
    loaded, meta = load_checkpoint(tmp_path / "checkpoints" / "best")
    assert meta == {"step": 7, "path": str(tmp_path), "merit": [0.5, 1]}
    assert torch.equal(loaded["net"]["weight"], net.weight)
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state[net.weight]["exp_avg"])
    assert (loaded["buffer"], loaded["sizes"]) == (None, (1, 2.5))
    assert sorted(path.name for path in (tmp_path / "checkpoints").rglob("*")) == [
        "best",
        "meta.json",
        "state.pt",
    ]


def test_a_checkpoint_replaces_an_older_one(tmp_path):
    for step in range(3):
        save_checkpoint(tmp_path / "last", {"w": torch.tensor(step)}, {"step": step})
    state, meta = load_checkpoint(tmp_path / "last")
    assert (int(state["w"]), meta["step"]) == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("broken", ["save_torch", "save_json"])
def test_a_save_that_fails_leaves_the_older_one(tmp_path, monkeypatch, broken):
    save_checkpoint(tmp_path / "last", {"w": torch.tensor(1)}, {"step": 1})

    def disk_full(obj, path):
        Path(path).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, broken, disk_full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last", {"w": torch.tensor(2)}, {"step": 2})
    state, meta = load_checkpoint(tmp_path / "last")
    assert (int(state["w"]), meta["step"]) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_killed_between_the_two_renames_the_older_one_is_found(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last", {"w": torch.tensor(1)}, {"step": 1})
    rename = Path.rename

    def killed(self, target):
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last", {"w": torch.tensor(2)}, {"step": 2})
    assert not (tmp_path / "last").exists()
    assert load_checkpoint(tmp_path / "last")[1]["step"] == 1

    monkeypatch.undo()
    save_checkpoint(tmp_path / "last", {"w": torch.tensor(3)}, {"step": 3})
    assert load_checkpoint(tmp_path / "last")[1]["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"mean": np.ones(2)}, r"state\['mean'\] is a ndarray"),
        ({"a": [1, {"lr": np.float64(0.1)}]}, r"state\['a'\]\[1\]\['lr'\] is a float64"),
        ({"net": nn.Linear(1, 1)}, r"state\['net'\] is a Linear"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, state, where):
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "last", state, {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_named(tmp_path):
    save_checkpoint(tmp_path / "best", {}, {})
    with pytest.raises(UserError, match=r"bset is not a checkpoint folder .*; .* has: best$"):
        load_checkpoint(tmp_path / "bset")
    (tmp_path / "best" / "state.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"best/state\.pt is not a readable torch file"):
        load_checkpoint(tmp_path / "best")


def test_random_numbers_go_on_where_they_were(tmp_path):
    seed_everything(3)
    random.gauss(0, 1)  # leaves a second number waiting, in numpy too
    np.random.randn()  # noqa: NPY002
    save_checkpoint(tmp_path / "last", {"rng": rng_state()}, {})
    expected = draw()
    assert draw() != expected
    set_rng_state(load_checkpoint(tmp_path / "last")[0]["rng"])
    assert draw() == expected
