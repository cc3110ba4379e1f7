"""collect.py as a user runs it: once as a program, then within this process, whose renderer is warm."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import collect
from collect import CheckpointPolicy, Mix, RandomPolicy, RunnerConfig, ScriptedPolicy, enough
from common.envs import EnvSpec
from common.episodes import list_episodes, read_episode
from common.files import load_json
from common.policy_mix import NOISE_MEMORY
from common.runtime import run_script
from common.scenes import EnvConfig

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs/demo_collect.yaml")
TINY = ["env.eval.num_envs=1", "env.eval.max_episode_steps=2", "env.eval.sim_backend=cpu"]
TINY += ["env.eval.render_backend=cpu", "runner.num_episodes=3"]


@pytest.fixture(scope="module")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("collect") / "run"
    command = [sys.executable, str(ROOT / "collect.py"), DEMO, *TINY, f"runner.logger.log_path={folder}"]
    return folder, subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(first_start: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> Path:
    """A copy of what the first start left, to go on in."""
    shutil.copytree(first_start[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, renderer: None):
    """`start(folder, "key=value", ...)` runs collect.py in this process."""

    def start(folder: Path, *overrides: str) -> None:
        here = ["env.eval.num_workers=0", f"runner.logger.log_path={folder}"]
        monkeypatch.setattr(sys, "argv", ["collect.py", DEMO, *TINY, *here, *overrides])
        run_script(collect.main)

    return start


def test_episodes_config_summary_and_table(first_start: tuple[Path, subprocess.CompletedProcess]):
    folder, done = first_start
    assert done.returncode == 0, done.stderr
    episodes = [read_episode(path, views=None) for path in list_episodes(folder / "collected_data")]
    assert [episode.episode_id for episode in episodes] == [0, 1, 2]
    for episode in episodes:
        assert (episode.length, episode.layout, episode.task) == (2, "T+1", "PushCube-v1")
        assert {view: images.shape for view, images in episode.images.items()} == {
            "main_images": (3, 64, 64, 3),
            "extra_view_images": (3, 64, 64, 3),
        }
        assert episode.render["low_poly"] is True
        assert episode.actions.shape == (2, 4)

    summary = load_json(folder / "summary.json")
    assert summary["num_episodes"] == 3
    assert (summary["num_frames"], summary["env_steps"]) == (18, 6)
    assert sum(row["episodes"] for row in summary["by_policy"]) == 3
    assert yaml.safe_load((folder / "config.yaml").read_text())["env"]["eval"]["max_episode_steps"] == 2
    header, *rows = [line.split() for line in done.stdout.strip().splitlines() if line][:6]
    assert header == ["policy", "episodes", "succeeded", "once"]
    assert [row[0] for row in rows] == ["scripted"] * 4 + ["random"]
    assert f"{folder}/collected_data: 3 episodes, 0 successes; this start wrote 18 frames" in done.stdout


def test_a_second_start_appends_other_episodes(folder: Path, start, capsys):
    before = {path.name: path.read_bytes() for path in list_episodes(folder / "collected_data")}
    start(folder, "runner.num_episodes=5")
    assert "holds 3 episodes (0 successes); going on from there" in capsys.readouterr().out
    after = list_episodes(folder / "collected_data")
    assert len(after) == 5
    assert {path.name: path.read_bytes() for path in after if path.name in before} == before
    firsts = {read_episode(path, views=()).states[0].tobytes() for path in after}
    assert len(firsts) == 5  # no episode begins as another does
    assert load_json(folder / "summary.json")["num_episodes"] == 5
    start(folder)  # for three, and more are there
    assert list_episodes(folder / "collected_data") == after


@pytest.mark.parametrize(
    "override",
    [
        "env.eval.cameras.main_images.fov=1.1",
        "env.eval.cameras.low_poly=false",
        "env.eval.task=PullCube-v1",
        "env.eval.control_freq=20",
    ],
)
def test_other_cameras_controls_or_task_are_refused_and_change_nothing(
    folder: Path, start, capsys, override: str
):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        start(folder, "runner.num_episodes=5", override)
    assert caught.value.code == 2
    *_, error = capsys.readouterr().err.splitlines()  # ManiSkill may have warned before
    other = "controls" if "control" in override else "cameras"
    assert error.startswith(f"error: {folder}/collected_data/rank_0_env_0_")
    assert f"was made with another task or other {other}" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_it_stops_by_successes_and_failures(tmp_path: Path, start):
    """One success and two failures: failures go on being written until the success is there."""
    mix = "policies=[{name: scripted}, {name: random, weight: 1, noise: [0, 0.1]}]"
    stop = ["runner.num_episodes=null", "runner.num_successes=1", "runner.num_failures=2"]
    start(tmp_path, *stop, mix, "env.eval.max_episode_steps=12")
    summary = load_json(tmp_path / "summary.json")
    names = [path.stem for path in list_episodes(tmp_path / "collected_data")]
    successes = sum(name.endswith("_success") for name in names)
    assert (summary["num_episodes"], summary["num_successes"]) == (len(names), successes)
    assert successes >= 1
    assert len(names) - successes >= 2
    assert successes == 1 or len(names) - successes == 2  # and not one more than needed
    scripted, random = summary["by_policy"]
    assert scripted["success_once"] == successes
    assert random["success_once"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policies=[]", "at least one with a weight above 0"),
        ("policies=[{name: random, weight: -1}]", "weight must be 0 or more"),
        ("policies=[{name: random, noise: [0.5, 0.1]}]", "noise is a range [low, high] from 0 up"),
        ("policies=[{name: random, to_object: 2}]", "to_object is a share from 0 to 1"),
        ("policies=[{name: scripted, speed: [-1, 1]}]", "speed is a range [low, high] from 0 up"),
        ("policies=[{name: scripted, motion: sideways}]", "wrong_way"),
        ("policies=[{name: checkpoint}]", "needs the path of a checkpoint folder"),
        ("policies=[{name: scriptd}]", "scripted"),
        ("env.eval.data_collection={gae_gamma: 0.8, gae_lambda: 0.9}", "scores by a critic"),
        ("env.eval.data_collection.only_success=true", "only_success keeps episodes that terminated"),
        ("runner.num_episode=3", "num_episodes"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(tmp_path, start, capsys, override, message):
    with pytest.raises(SystemExit) as caught:
        start(tmp_path / "run", override)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "stops_at"),
    [
        ({"num_episodes": 4}, {(4, 0), (4, 4), (5, 2)}),
        ({"num_episodes": None, "num_successes": 2}, {(4, 4), (5, 2)}),
        ({"num_episodes": None, "num_failures": 3}, {(4, 0), (5, 2), (3, 0)}),
        ({"num_episodes": None, "num_successes": 2, "num_failures": 3}, {(5, 2)}),
        ({"num_episodes": 3, "num_successes": 2, "num_failures": 3}, {(3, 0), (4, 0), (4, 4), (5, 2)}),
    ],
)
def test_stop_rule(rule: dict, stops_at: set):
    """(episodes, successes) at which it is enough."""
    counts = [(0, 0), (2, 1), (3, 0), (4, 0), (4, 4), (5, 2)]
    assert {count for count in counts if enough(RunnerConfig(**rule), *count)} == stops_at


LAYOUT = {"tcp_pose": (0, 7), "goal_pos": (7, 10), "obj_pose": (10, 17)}
SPEC = EnvSpec(17, 4, LAYOUT, {"success": torch.bool}, {}, "PushCube-v1", "Push it.", {}, {})


def make_mix(*policies, num_envs: int = 4, seed: int = 0) -> Mix:
    mix = Mix(
        list(policies), SPEC, EnvConfig(task="PushCube-v1", num_envs=num_envs, max_episode_steps=4), seed
    )
    mix.begin(torch.arange(num_envs))
    return mix


def test_policies_are_drawn_by_weight():
    quiet, loud = RandomPolicy(weight=3, noise=(0.0, 0.0)), RandomPolicy(weight=1, noise=(1.0, 1.0))
    mix = make_mix(quiet, loud, RandomPolicy(weight=0), num_envs=400)
    counts = torch.bincount(mix.choice, minlength=3).tolist()
    assert 60 < counts[1] < 140
    assert counts[2] == 0
    action = mix.act(torch.zeros(400, 17))
    assert action.abs().max() <= 1
    moves = action.abs().sum(1) > 0
    assert torch.equal(moves, mix.choice == 1)


def test_a_policy_stops_after_its_share_of_the_episode_and_starts_anew_with_the_next():
    obs = torch.zeros(2, 17)
    mix = make_mix(ScriptedPolicy(stop_after=(0.5, 0.5)), num_envs=2)
    moving = []
    for t in range(4):
        if t == 3:
            mix.begin(torch.tensor([1]))  # env 1 begins another episode, env 0 goes on
        moving.append((mix.act(obs).abs().sum(1) > 0).tolist())
    assert moving == [[True, True], [True, True], [False, False], [False, True]]


def test_noise_keeps_its_size_from_step_to_step():
    mix = make_mix(RandomPolicy(noise=(0.2, 0.2)), num_envs=500)
    noise = torch.stack([mix.act(torch.zeros(500, 17)) for _ in range(20)])
    assert noise.std(dim=(1, 2)).sub(0.2).abs().max() < 0.02
    along = (noise[1:] * noise[:-1]).mean() / noise.pow(2).mean()
    assert abs(along - NOISE_MEMORY) < 0.03


def scene(tcp_x: float = 0.0) -> torch.Tensor:
    """Two envs as LAYOUT says: the gripper at (tcp_x, 0, 0.2), the object at (0.3, 0, 0.2), then the goal."""
    obs = torch.zeros(2, 17)
    obs[:, [0, 2]] = torch.tensor([tcp_x, 0.2])
    obs[:, 7] = 0.5
    obs[:, [10, 12]] = torch.tensor([0.3, 0.2])
    return obs


@pytest.mark.parametrize(
    ("motion", "expected"),
    [
        # the gripper is at x = 0.05 from the second step on: back is -0.5, in units of 0.1 m
        ("forward", [1.0, 1.0, 1.0, 1.0]),
        ("retreat", [1.0, -0.5, -0.5, -0.5]),
        ("oscillate", [1.0, -0.5, 1.0, -0.5]),
    ],
)
def test_motions_turn_back_to_where_the_gripper_began(motion: str, expected: list):
    mix = make_mix(ScriptedPolicy(motion=motion, turn_after=(0.25, 0.25)), num_envs=2)
    moves = [mix.act(scene(0.0 if t == 0 else 0.05))[:, 0].tolist() for t in range(4)]
    assert moves == [[pytest.approx(x)] * 2 for x in expected]
    mix.begin(torch.tensor([1]))
    assert mix.act(scene(0.05))[1, 0] == 1  # another episode: forward again


def test_an_expert_aims_anew_within_an_episode():
    offset = {"goal_offset_m": (0.01, 0.07)}
    once = make_mix(ScriptedPolicy(**offset), num_envs=2)
    again = make_mix(ScriptedPolicy(**offset, aim_again_after=(0.5, 0.5)), num_envs=2)
    assert again.goal_offset.equal(once.goal_offset)  # the same first aim
    aims = {"once": [], "again": []}
    for _ in range(4):  # make_mix's episodes have 4 steps
        once.act(scene()), again.act(scene())
        aims["once"].append(once.goal_offset[0].clone())
        aims["again"].append(again.goal_offset[0].clone())
    assert all(aim.equal(aims["once"][0]) for aim in aims["once"])
    first, second, third, fourth = aims["again"]
    assert first.equal(second) and third.equal(fourth) and not second.equal(third)
    assert all(0.01 <= float(aim.norm()) <= 0.07 for aim in aims["again"])


def test_speed_scales_the_way_and_not_the_gripper():
    half = make_mix(ScriptedPolicy(speed=(0.5, 0.5)), num_envs=2).act(scene())
    full = make_mix(ScriptedPolicy(), num_envs=2).act(scene())
    assert torch.equal(half[:, :3], 0.5 * full[:, :3])
    assert torch.equal(half[:, 3], full[:, 3])


def test_a_drift_keeps_its_direction_and_size_for_an_episode():
    mix = make_mix(RandomPolicy(noise=(0.0, 0.0), drift=(0.3, 0.3)), num_envs=2)
    first, second = mix.act(scene()), mix.act(scene(0.1))
    assert torch.equal(first, second)
    assert first.norm(dim=1).tolist() == pytest.approx([0.3, 0.3])
    assert not torch.equal(first[0], first[1])
    mix.begin(torch.tensor([1]))
    assert torch.equal(mix.act(scene()), first) is False


def test_a_drift_to_the_object_follows_it_and_stops_there():
    mix = make_mix(RandomPolicy(noise=(0.0, 0.0), drift=(0.4, 0.4), to_object=1.0), num_envs=2)
    for tcp_x, move in ((0.0, 0.4), (0.28, 0.2), (0.3, 0.0), (0.4, -0.4)):  # 0.2 is the 2 cm that are left
        assert mix.act(scene(tcp_x))[:, :3].tolist() == [pytest.approx([move, 0.0, 0.0], abs=1e-6)] * 2
    shares = make_mix(RandomPolicy(drift=(0.4, 0.4), to_object=0.5), num_envs=400).to_object
    assert 160 < int(shares.sum()) < 240


def test_a_seed_fixes_the_mix():
    obs = torch.zeros(4, 17)
    policies = RandomPolicy(drift=(0.1, 0.5)), ScriptedPolicy(noise=(0.1, 0.5), goal_offset_m=(0.0, 0.1))
    first, same, other = (make_mix(*policies, seed=seed).act(obs) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_checkpoint_policy_wants_a_path():
    with pytest.raises(ValueError, match="needs the path of a checkpoint folder"):
        CheckpointPolicy()
