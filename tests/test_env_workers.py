"""CPU envs in worker processes: the same numbers however they are spread, and no process left behind."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.env_workers import EnvPool, WorkerEnvs, default_num_workers
from common.envs import Render, Step
from common.processes import WorkerError
from common.runtime import UserError
from common.scenes import VIEWS, CameraConfig, CamerasConfig, EnvConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = CameraConfig(width=64, height=64)
N = 3


def env_config(**changes) -> EnvConfig:
    settings = {"task": "PushCube-v1", "num_envs": N, "max_episode_steps": 3, "control_freq": 10}
    cameras = CamerasConfig(main_images=SMALL, extra_view_images=SMALL)
    return EnvConfig(cameras=cameras, sim_backend="cpu", render_backend="cpu", **{**settings, **changes})


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool(num_workers=2) as pool:
        yield pool


@pytest.fixture(scope="module")
def envs(pool: EnvPool) -> WorkerEnvs:
    """Three envs in two processes."""
    return pool.make(env_config())


def actions(num_steps: int, num_envs: int = N) -> torch.Tensor:
    return torch.rand(num_steps, num_envs, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def rollout(envs: WorkerEnvs, seed: int, modes: list[Render | torch.Tensor]) -> list:
    """The reset's observation and the steps that follow."""
    play = actions(len(modes), envs.num_envs)
    return [envs.reset(seed), *(envs.step(action, mode) for action, mode in zip(play, modes, strict=True))]


def parts(step: Step) -> dict[str, torch.Tensor]:
    groups = {"info": step.info, "frames": step.frames, "reset_frames": step.reset_frames}
    nested = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    assert step.action is None  # executed as given
    flat = {key: value for key, value in vars(step).items() if key not in (*groups, "action")}
    return {**flat, **nested}


def assert_same(ours: list, theirs: list) -> None:
    assert torch.equal(ours[0], theirs[0])
    for step, other in zip(ours[1:], theirs[1:], strict=True):
        mine, yours = parts(step), parts(other)
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            assert torch.equal(value, yours[name]), name


# Env 1 is the second process's; it draws nothing, as the first picture of each process takes seconds.
MIXED = torch.tensor([Render.RECORD, Render.NONE, Render.RECORD], dtype=torch.uint8)
RECORDED = [MIXED] * 4


@pytest.fixture(scope="module")
def expected(envs: WorkerEnvs) -> list:
    return rollout(envs, 7, RECORDED)


def test_the_same_numbers_and_pictures_in_no_one_and_two_processes(
    pool: EnvPool, expected: list, renderer: None
):
    """An episode's seed knows its env and its number, not its process; so does everything that follows."""
    alone = WorkerEnvs(pool.children[:1], 100, env_config(), VIEWS)
    assert_same(rollout(alone, 7, RECORDED), expected)
    with EnvPool(num_workers=0) as here:
        assert_same(rollout(here.make(env_config()), 7, RECORDED), expected)


def test_another_group_in_the_same_processes_changes_nothing(pool: EnvPool, envs: WorkerEnvs, expected: list):
    other = pool.make(env_config(num_envs=1, max_episode_steps=2))
    other.reset(3)
    again = [envs.reset(7)]
    for action, mode in zip(actions(4), RECORDED, strict=True):
        other.step_async(action[:1], Render.ALWAYS)
        envs.step_async(action, mode)  # both on their way at once
        other.step_wait()
        again.append(envs.step_wait())
        other.reset(4)
    assert_same(again, expected)


def test_each_env_is_rendered_as_its_own_mode_says(envs: WorkerEnvs, expected: list):
    modes = torch.tensor([Render.IF_DONE, Render.NONE, Render.RECORD], dtype=torch.uint8)
    steps = rollout(envs, 7, [modes] * 4)[1:]
    assert [step.frame_ids.tolist() for step in steps] == [[2], [2], [0, 2], [2]]
    assert [step.reset_ids.tolist() for step in steps] == [[], [], [2], []]
    for step, full in zip(steps, expected[1:], strict=True):
        assert torch.equal(step.next_obs, full.next_obs)  # looking changes nothing
        for view in VIEWS:
            assert torch.equal(step.frames[view][-1], full.frames[view][-1])
    for view in VIEWS:
        assert torch.equal(steps[2].frames[view], expected[3].frames[view])
        assert torch.equal(steps[2].reset_frames[view], expected[3].reset_frames[view][1:])


def test_what_is_handed_out_is_a_copy(envs: WorkerEnvs, expected: list):
    obs, step, *_ = steps = rollout(envs, 7, RECORDED)
    envs.reset(9)
    rollout(envs, 9, RECORDED)
    obs_again, *_ = expected
    assert torch.equal(obs, obs_again)
    assert_same(steps, expected)
    assert step.obs.data_ptr() != envs.arrays.obs.data_ptr()


def test_step_has_the_shapes_and_types_of_its_contract(envs: WorkerEnvs, expected: list):
    _, *steps = expected
    last = steps[2]
    assert last.truncated.tolist() == [True] * N
    assert last.terminated.tolist() == [False] * N
    assert last.done.tolist() == [True] * N
    assert (last.success.dtype, last.success.shape) == (torch.bool, (N,))
    assert (last.env_reward.dtype, last.env_reward.shape) == (torch.float32, (N,))
    assert (last.next_obs.dtype, last.next_obs.shape) == (torch.float32, (N, envs.spec.obs_dim))
    frames = last.frames["main_images"]
    assert (frames.dtype, frames.shape) == (torch.uint8, (2, 64, 64, 3))
    assert (last.frame_ids.tolist(), last.reset_ids.tolist()) == ([0, 2], [0, 2])
    assert set(last.info) == envs.spec.info_types.keys()
    assert not torch.equal(last.obs, last.next_obs)
    assert len({tuple(row) for row in expected[0].tolist()}) == N  # each env has an episode of its own


def test_render_gives_the_present_state_of_the_envs_asked_for(envs: WorkerEnvs, expected: list):
    rollout(envs, 7, [Render.NONE] * 2)
    frames = envs.render(torch.tensor([2, 0]))
    assert envs.render(torch.tensor([], dtype=torch.long)) == {}
    for view in VIEWS:
        assert torch.equal(frames[view], expected[2].frames[view][[1, 0]])  # rows of envs 2 and 0


def test_default_num_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [default_num_workers(n) for n in (1, 3, 100)] == [1, 3, 4]


# ----------------------------------------------------------------------------------------------------
# Failures. No pictures in here: the first one of a process takes seconds.
# ----------------------------------------------------------------------------------------------------


def test_failures_of_workers_are_raised_in_time_and_leave_no_process():
    """One worker meets a mistake of the user, the other is killed in mid-step: the parent can still close."""
    before = set(multiprocessing.active_children())
    with EnvPool(num_workers=2) as pool:
        with pytest.raises(UserError, match="did you mean 'PushCube-v1'"):
            pool.make(env_config(task="PushCub-v1", num_envs=1))
        _, second = pool.children
        envs = WorkerEnvs([second], 100, env_config(num_envs=1), VIEWS)
        envs.reset(0)
        start = time.monotonic()
        os.kill(second.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="env worker 1 died with exit code -9"):
            envs.step(torch.zeros(1, 4))
        assert time.monotonic() - start < 2
    assert set(multiprocessing.active_children()) == before


CTRL_C = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from common.env_workers import EnvPool
from common.runtime import run_script
from common.scenes import EnvConfig

def main():
    with EnvPool(1) as pool:
        envs = pool.make(EnvConfig(task="PushCube-v1", num_envs=1, sim_backend="cpu", render_backend="cpu"))
        envs.reset(0)
        print(*(child.process.pid for child in pool.children), flush=True)
        while True:
            envs.step(torch.zeros(1, 4))

if __name__ == "__main__":
    run_script(main)
"""


def test_ctrl_c_ends_the_program_and_its_workers_quietly(tmp_path: Path):
    """Ctrl-C in a terminal reaches the whole process group: the parent, and each worker in mid-step."""
    script = tmp_path / "steps.py"
    script.write_text(CTRL_C.format(root=str(ROOT)))
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        [sys.executable, script], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        workers = program.stdout.readline().split()
        time.sleep(0.3)
        os.killpg(program.pid, signal.SIGINT)
        _, stderr = program.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 130
    assert stderr.strip().endswith("stopped by Ctrl-C")
    assert "Traceback" not in stderr
    assert len(workers) == 1
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
