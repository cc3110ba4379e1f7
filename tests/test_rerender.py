"""collect.py --render-from: pictures drawn afterwards are those that would have been taken on the spot."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import collect
from common.episodes import list_episodes, read_episode
from common.files import load_json
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
CAMERAS = [f"env.eval.cameras.{view}" for view in ("main_images", "extra_view_images")]
SIZES = [f"{camera}.{side}=32" for camera in CAMERAS for side in ("width", "height")]
TINY = [*SIZES, "env.eval.max_episode_steps=4", "env.eval.sim_backend=cpu", "env.eval.render_backend=cpu"]
TINY += ["env.eval.num_envs=2", "env.eval.num_workers=0", "runner.num_episodes=2"]
LATER = "env.eval.data_collection.frames=sim_state"


@pytest.fixture(scope="module")
def start(renderer, tmp_path_factory):
    """`start(folder, "key=value", ...)` runs collect.py in this process, in a folder of this module's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("rerender"))

        def start(folder: str, *changes: str) -> Path:
            argv = ["collect.py", str(ROOT / "configs/demo_collect.yaml"), *TINY]
            patch.setattr(sys, "argv", [*argv, f"runner.logger.log_path={folder}", *changes])
            collect.main()
            return Path(folder) / "collected_data"

        yield start


@pytest.fixture(scope="module")
def states(start) -> Path:
    return start("states", LATER)


@pytest.fixture(scope="module")
def drawn(start, states) -> Path:
    return start("drawn", "--render-from", str(states))


def check_alike(now: Path, drawn: Path) -> None:
    """The same episodes, and pictures so alike that only rounding of the poses can be between them."""
    paths = [list_episodes(folder) for folder in (now, drawn)]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]]
    for path_now, path_drawn in zip(*paths, strict=True):
        now, drawn = read_episode(path_now, views=None), read_episode(path_drawn, views=None)
        assert drawn.render == now.render and drawn.image_shapes == now.image_shapes
        assert (drawn.states == now.states).all() and (drawn.actions == now.actions).all()
        for view, images in now.images.items():
            assert np.abs(images.astype(int) - drawn.images[view]).mean() < 0.1, view
            assert np.abs(images[-1].astype(int) - images[0]).mean() > 0.5, "nothing moved: nothing compared"


def test_drawn_afterwards_as_on_the_spot(start, states, drawn):
    bare = read_episode(list_episodes(states)[0], views=())
    assert bare.image_shapes == {} and bare.render is None
    check_alike(start("now"), drawn)


@pytest.mark.slow
def test_processes_share_the_drawing(start, drawn):
    pick = "env.eval.task=PickCube-v1"
    states = start("pick_states", LATER, pick)
    drawn = start("pick_drawn", pick, "--render-from", str(states), "env.eval.num_workers=2")
    check_alike(start("pick_now", pick), drawn)


def test_other_cameras_on_the_same_episodes(start, states, drawn):
    far = [f"{CAMERAS[0]}.eye=[1.0, 0.0, 0.9]", f"{CAMERAS[0]}.target=[0, 0, 0]"]
    folders = drawn, start("far", *far, "--render-from", str(drawn))  # what is drawn keeps its states
    near, far_ = (read_episode(list_episodes(folder)[0]).images["main_images"] for folder in folders)
    assert np.abs(near.astype(int) - far_).mean() > 5
    with pytest.raises(UserError, match="was drawn by other cameras"):
        start("drawn", *far, "--render-from", str(states))


def test_what_is_there_stays_and_the_rest_is_drawn(start, states, drawn):
    first, second = list_episodes(drawn)
    kept, before = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    start("drawn", "--render-from", str(states))
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == before
    assert load_json("drawn/summary.json")["num_episodes"] == 2


def test_what_cannot_be_drawn(start, states, drawn):
    plain = start("plain")
    for changes, message in (
        (["--render-from"], "--render-from wants a folder of episodes"),
        (["--render-from", "nowhere"], "does not exist"),
        (["--render-from", str(plain)], r"has sim_state \(0,\)"),
        (["--render-from", str(states), "env.eval.task=PullCube-v1"], "in the task 'PushCube-v1'"),
    ):
        with pytest.raises(UserError, match=message):
            start("bad", *changes)
        assert not list(Path("bad").rglob("*.pkl"))
    for name in ("one", "two"):
        shutil.copytree(states, Path("both") / name)
    with pytest.raises(UserError, match="hold episodes of one name"):
        start("bad", "--render-from", "both")
    with pytest.raises(UserError, match="would write over"):
        start("states", "--render-from", str(states))


def test_a_task_whose_objects_differ_is_refused(start):
    with pytest.raises(UserError, match="builds other objects for each episode"):
        start("peg", LATER, "env.eval.task=PegInsertionSide-v1", "policies=[{name: random}]")
