"""The comparison of rewards: what differs between its runs, its numbers by hand, and a tiny one as run."""

import csv
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import rl_train
from benchmarks import compare_rewards
from benchmarks.compare_rewards import REWARDS, pooled, pooled_gap, rl_command, time_share
from common import config
from common.episodes import list_episodes, read_episode
from common.files import save_json

ROOT = Path(__file__).resolve().parents[1]
ARGS = {"steps": 100, "episodes": 8, "resnet": "its/resnet", "trend": "trend-{seed}", "set": []}


def settings(name: str) -> dict[str, object]:
    """Key -> value of the run of this reward, as rl_train.py reads its command."""
    _, path, *changes = rl_command(name, "logs/x", 3, Namespace(**ARGS))
    return dict(flat(asdict(config.from_yaml(rl_train.Config, ROOT / path, changes))))


def flat(tree: dict, above: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def test_the_runs_differ_in_who_pays_and_in_nothing_else():
    dense = settings("env dense")
    assert dense["runner.seed"] == 3 and dense["algorithm.imitation_coef"] == 0
    for name in REWARDS:
        mine = settings(name)
        different = {key for key in dense | mine if dense.get(key) != mine.get(key)}
        not_reward = {key for key in different if not key.startswith("reward.")} - {"runner.logger.log_path"}
        if name == "env sparse":
            where = {"env.train.reward_mode", "env.eval.reward_mode", "algorithm.prior_data"}
            assert not_reward == where
            assert [mine[key] for key in sorted(where)] == [
                "logs/x/sparse/collected_data",
                "sparse",
                "sparse",
            ]
        else:
            assert not not_reward
        learned = not name.startswith("env")
        assert (mine["reward.use_reward_model"], mine["reward.env_reward_weight"]) == (learned, 1 - learned)
    assert settings("ResNet per_step")["reward.model.model_path"] == "its/resnet"
    assert settings("trend history_buffer")["reward.model.model_path"] == "trend-3"


def test_the_models_are_made_where_none_are_named():
    both = Namespace(**ARGS)
    neither = Namespace(**ARGS | {"trend": None, "resnet": None})
    needed = [set(compare_rewards.stages("logs/x", 0, args)) for args in (both, neither)]
    assert needed[0] == {"collect", "collect, paid sparsely"}
    trained = {"trend: make the model", "trend: windows", "trend: train", "ResNet: frames", "ResNet: train"}
    assert needed[1] - needed[0] == trained


def test_the_share_of_time_counts_each_line_since_the_one_before():
    """A tenth of 10 s, then half of 30 s, the second line's own time being 20 s later than an evaluation."""
    lines = [
        {"step": 1, "time/wall_s": 10.0, "reward/share_of_time": 0.1},
        {"step": 1, "time/wall_s": 20.0, "eval/true_success_once": 1.0},
        {"step": 2, "time/wall_s": 40.0, "reward/share_of_time": 0.5},
    ]
    assert time_share(lines) == pytest.approx((1 + 15) / 40)
    assert time_share(lines[1:2]) == 0


def test_episodes_of_all_seeds_count_alike():
    """Wilson's interval of 3 in 10 is (0.1078, 0.6032); of 2 fooled and 1 missed in 10 Agresti and Min's."""
    rows = [
        {"num_episodes": 4, "true_success_once": 0.5, "fooled": 0.5, "missed": 0.0},
        {"num_episodes": 6, "true_success_once": 1 / 6, "fooled": 0.0, "missed": 1 / 6},
    ]
    assert pooled(rows, "true_success_once") == (3, 10, *map(pytest.approx, (0.10779, 0.60322), (1e-3,) * 2))
    half = 1.959964 * np.sqrt((4 / 12 - (1 / 12) ** 2) / 12)
    expected = (10.0, 100 * (1 / 12 - half), 100 * (1 / 12 + half))
    assert pooled_gap(rows) == pytest.approx(expected, rel=1e-4)


def fake_run(command: list[str], ran: list[str]) -> None:
    """Leaves behind what the command's script would, of one seed: once 0.5 of 4, fooled in 1 of 4."""
    to = next(part.partition("log_path=")[2] for part in reversed(command) if "log_path=" in part)
    ran.append(Path(to).name)
    folder = compare_rewards.ROOT / to
    folder.mkdir(parents=True)
    result = {"num_episodes": 4, "true_success_once": 0.5, "true_success_at_end": 0.25}
    if "resnet" in str(command):
        result |= {"learned_success": 0.75, "fooled": 0.25, "missed": 0.0}
    if "history_vlm" in str(command):
        result |= {"false_positive_share": 0.125}
    save_json({**result, "seconds": {"training": 61.2}, "env_steps": 100}, folder / "summary.json")
    evaluation = {f"eval/{name}": float(value) for name, value in result.items()}  # as the log writes them
    lines = [{"step": step, "time/wall_s": step / 2, **evaluation} for step in (50, 100)]
    lines.insert(1, {"step": 50, "time/wall_s": 30, "reward/share_of_time": 0.25})
    (folder / "metrics.jsonl").write_text("\n".join(str(line).replace("'", '"') for line in lines))


def test_table_csv_and_picture_and_what_is_there_is_kept(tmp_path, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(compare_rewards, "ROOT", tmp_path)
    monkeypatch.setattr(compare_rewards, "run_stage", lambda command: fake_run(command, ran))
    monkeypatch.setattr(compare_rewards, "children_cpu_s", lambda: 20.0 * len(ran))
    out = [f"--results={tmp_path}/out.csv", f"--picture={tmp_path}/out.png"]
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "0", "1", "--resnet=r", "--trend=t", *out])
    compare_rewards.main()
    assert len(ran) == len(set(ran)) * 2 == 2 * (2 + len(REWARDS))  # both recordings, five runs
    table = capsys.readouterr().out.strip().splitlines()
    assert table[-3] == (
        "| ResNet per_step | 0.50 (0.22 to 0.78, n = 8) | 0.25 (0.07 to 0.59, n = 8) "
        "| +25.0 (-11.6 to +51.6) | 25% | 61 | 20 |"
    )
    assert "| 12% of positives wrong |" in table[-1] and "| - |" in table[-4]
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(REWARDS) * 3
    assert rows[0]["wall_s"] == "25.0" and rows[2]["what"] == "final" and rows[2]["cpu_s"] == "20.0"
    assert (tmp_path / "out.png").stat().st_size > 10_000
    (tmp_path / "logs" / "compare-seed1" / "rl_env_dense" / "cpu_s.json").unlink()  # cut short
    before = list(ran)
    compare_rewards.main()
    assert ran == [*before, "rl_env_dense"]


@pytest.mark.slow
def test_the_sparse_prior_data_are_the_same_episodes(tmp_path):
    """A tiny comparison of the env's two rewards, run as a user runs it."""
    small = ["runner.num_eval_episodes=2", "runner.num_final_episodes=2", "algorithm.offline_updates=2"]
    done = subprocess.run(
        [
            *[sys.executable, str(ROOT / "benchmarks" / "compare_rewards.py"), "--only", "env dense"],
            *["env sparse", "--steps", "80", "--episodes", "6", "--resnet", "r", "--trend", "t"],
            *["--folder", f"{tmp_path}/x", "--results", f"{tmp_path}/x.csv"],
            *["--picture", f"{tmp_path}/x.png", "--set", *small],
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| env sparse | " in done.stdout and (tmp_path / "x.png").is_file()
    dense, sparse = (
        [read_episode(path, views=()) for path in list_episodes(tmp_path / "x-seed0" / which)]
        for which in ("collect", "sparse")
    )
    assert len(dense) == len(sparse) == 6
    for one, other in zip(dense, sparse, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_allclose(one.states, other.states, atol=1e-6)
        np.testing.assert_array_equal(other.rewards[1:], other.success[1:].astype(np.float32))
