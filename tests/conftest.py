"""Settings of every test process, and of the processes that tests start. Tests run on the CPU."""

import os
import signal

# Set before torch, Mesa or matplotlib look at them. One thread each: tests start processes of their own, and
# threads that fight for cores cost more than they bring. 0: Mesa's CPU renderer draws in the calling thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LP_NUM_THREADS"] = "0"
os.environ["MPLBACKEND"] = "Agg"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory: what a test writes to `logs/` stays out of the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen3-VL with random weights. Shared: copy it before changing it."""
    from benchmarks.tiny_qwen import make_tiny_qwen

    return make_tiny_qwen(tmp_path_factory.mktemp("tiny") / "Qwen3-VL-tiny")


@pytest.fixture(scope="session")
def renderer() -> Iterator[None]:
    """A warm renderer: for tests that make simulations in this process and look at their pictures.

    Its first picture takes seconds, and it ends with the last simulation: so this one lives on.
    """
    from common.envs import ManiSkillEnvs
    from common.scenes import EnvConfig

    envs = ManiSkillEnvs(EnvConfig(sim_backend="cpu", render_backend="cpu"), num_envs=1)
    envs.render(torch.zeros(1, dtype=torch.long))
    yield
    envs.close()
