"""Settings of every test process, and of the processes that tests start. Tests run on the CPU."""

import os

# Set before torch, Mesa or matplotlib look at them. One thread each: tests start processes of their own, and
# threads that fight for cores cost more than they bring. 0: Mesa's CPU renderer draws in the calling thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LP_NUM_THREADS"] = "0"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory: what a test writes to `logs/` stays out of the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
