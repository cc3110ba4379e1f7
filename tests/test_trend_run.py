"""QwenTrend from episodes to RL, every script as a user runs it; and what a perfect trend model can teach."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL_CAMERAS = [
    f"env.{{}}.cameras.{view}.{side}=32"
    for view in ("main_images", "extra_view_images")
    for side in ("width", "height")
]


def small_cameras(*sections: str) -> list[str]:
    return [change.format(section) for section in sections for change in SMALL_CAMERAS]


def run(script: str, *argv: str, cwd: Path, code: int = 0) -> str:
    """What the script printed, errors included."""
    command = [sys.executable, str(ROOT / script), *argv]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def collect(folder: Path, num_episodes: int) -> Path:
    config = str(ROOT / "configs" / "demo_trend_collect.yaml")
    changes = [f"runner.logger.log_path={folder}", f"runner.num_episodes={num_episodes}"]
    run("collect.py", config, *changes, *small_cameras("eval"), cwd=folder.parent)
    return folder / "collected_data"


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# -- the whole way ---------------------------------------------------------------------------------------


class Made(NamedTuple):
    episodes: Path
    windows: Path
    base: Path
    trained: Path  # the run folder of train_vlm.py


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_qwen) -> Made:
    """12 episodes, their windows, and an adapter trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("trend")
    episodes = collect(folder / "collect", 12)
    windows = folder / "windows"
    options = ["--delta-threshold", "0.02", "--val-split", "0.3", "--prompt-template", "{task}?"]
    run(
        "preprocess_qwentrend.py", "--raw-data-path", str(episodes), "--output-dir", str(windows), *options,
        cwd=folder,
    )  # fmt: skip
    run(
        "train_vlm.py",
        str(ROOT / "configs" / "demo_trend_vlm.yaml"),
        f"data.train_data_paths={windows}/train/segments.jsonl",
        f"data.val_data_paths={windows}/eval/segments.jsonl",
        f"actor.model.model_path={tiny_qwen}",
        "actor.model.is_lora=true",
        f"runner.logger.log_path={folder}/vlm",
        "runner.max_steps=4",
        "runner.val_check_interval=2",
        cwd=folder,
    )
    return Made(episodes, windows, tiny_qwen, folder / "vlm")


RL = (
    "runner.num_eval_episodes=2",
    "runner.num_final_episodes=2",
    "runner.num_video_episodes=1",
    "runner.logger.logger_backends=[]",
)


def sac(made: Made, folder: Path, *changes: str) -> list[str]:
    return [
        str(ROOT / "configs" / "demo_trend_rl.yaml"),
        *RL,
        *small_cameras("train", "eval"),
        "runner.max_steps=80",
        "runner.log_interval=40",
        "runner.val_check_interval=40",
        "algorithm.offline_updates=2",
        f"algorithm.prior_data={made.episodes}",
        f"reward.model.model_path={made.base}",
        f"reward.model.lora_path={made.trained}/checkpoint",
        f"runner.logger.log_path={folder}",
        *changes,
    ]


@pytest.mark.slow
def test_from_episodes_to_sac(made, tmp_path):
    assert {"report_card", "confusion", "best_step"} <= set(summary(made.trained))
    pictures = {"controls.png", "confusion.png", "examples.png"}
    assert {path.name for path in (made.trained / "report").iterdir()} == pictures | {"report.json"}
    out = run("rl_train.py", *sac(made, tmp_path / "rl", "reward.placement=worker"), cwd=tmp_path)
    assert "true success" in out
    final = summary(tmp_path / "rl")
    assert {"true_success_once", "model_return", "positive_share", "label_mass"} <= set(final)
    assert {path.name for path in (tmp_path / "rl").iterdir()} >= {"traces.html", "scores.png", "eval.mp4"}


@pytest.mark.slow
def test_collected_episodes_are_looked_at_with_an_adapters_labels(made, tmp_path):
    shutil.copytree(made.episodes, tmp_path / "episodes")
    options = [
        "--view",
        str(tmp_path / "episodes"),
        "--model",
        f"{made.trained}/checkpoint",
        "--episodes",
        "5",
    ]
    out = run("collect.py", *options, cwd=tmp_path)
    assert f"open {tmp_path}/episodes/traces.html in a browser" in out
    page = (tmp_path / "episodes" / "traces.html").read_text()
    assert "5 of 12 episodes, those with most false positives" in page
    assert '"labels": ["positive", "negative", "unclear"]' in page


@pytest.mark.slow
def test_from_episodes_to_ppo_with_the_guides_config(made, tmp_path):
    """The guide's YAML, its sizes overridden and its cube pushed instead of picked."""
    small = [f"env.{w}.{c}" for w in ("train", "eval") for c in ("task=PushCube-v1", "max_episode_steps=8")]
    few = [f"env.{which}.num_envs=2" for which in ("train", "eval")]
    control = [f"env.{w}.{c}" for w in ("train", "eval") for c in ("control_mode=pd_ee_delta_pos",)]
    cameras = _cameras_of_the_demo()
    out = run(
        "rl_train.py",
        str(ROOT / "configs" / "maniskill_ppo_mlp_qwentrend_reward.yaml"),
        *RL, *small, *few, *control, *cameras,
        "runner.max_steps=32", "runner.log_interval=16", "runner.val_check_interval=32",
        "algorithm.num_steps=8", "algorithm.minibatch_size=16",
        f"reward.model.model_path={made.base}", f"reward.model.lora_path={made.trained}/checkpoint",
        "reward.model.precision=auto",
        f"runner.logger.log_path={tmp_path}/ppo",
        cwd=tmp_path,
    )  # fmt: skip
    assert "true success" in out
    assert (tmp_path / "ppo" / "checkpoints" / "last").is_dir()


def _cameras_of_the_demo() -> list[str]:
    import yaml

    settings = yaml.safe_load((ROOT / "configs" / "demo_trend_collect.yaml").read_text())["env"]["eval"]
    changes = [f"env.{which}.control_freq={settings['control_freq']}" for which in ("train", "eval")]
    for which in ("train", "eval"):
        for view, camera in settings["cameras"].items():
            changes += [f"env.{which}.cameras.{view}.{key}={camera[key]}" for key in ("eye", "target", "fov")]
    return changes + small_cameras("train", "eval")


@pytest.mark.slow
def test_a_model_of_other_pictures_or_windows_is_refused(made, tmp_path):
    """One line, before anything is trained."""
    for changes, complaint in (
        (["env.train.cameras.main_images.width=64"], "32"),
        (["reward.model.input_builder_params.template=So {task}?"], "trained for another question"),
        ([f"reward.model.lora_path={made.base}"], "is no adapter"),
    ):
        out = run("rl_train.py", *sac(made, tmp_path / "refused", *changes), cwd=tmp_path, code=2)
        assert out.startswith("error: ") and complaint in out and out.count("\n") <= 2, out


# -- what a perfect trend model can teach ----------------------------------------------------------------


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    episodes = collect(folder / "collect", 400)

    return episodes


def oracle(prior: Path, folder: Path, *changes: str) -> dict:
    run(
        "rl_train.py",
        str(ROOT / "configs" / "demo_trend_oracle.yaml"),
        *small_cameras("train", "eval"),
        "runner.num_video_episodes=0",
        "runner.num_eval_episodes=40",
        "runner.num_final_episodes=60",
        f"algorithm.prior_data={prior}",
        f"runner.logger.log_path={folder}",
        *changes,
        cwd=folder.parent,
    )
    return summary(folder)


@pytest.mark.slow
def test_the_label_rule_teaches_to_push(prior, tmp_path):
    """Paid by true trends alone: measured 0.89 to 0.96 over three seeds."""
    assert oracle(prior, tmp_path / "rl", "runner.max_steps=4000")["true_success_once"] >= 0.5


@pytest.mark.slow
def test_the_same_run_paid_nothing_learns_nothing(prior, tmp_path):
    changes = ["runner.max_steps=1500", "reward.reward_weight=0"]
    assert oracle(prior, tmp_path / "rl", *changes)["true_success_once"] < 0.1
