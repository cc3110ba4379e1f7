"""rl_train.py as a user runs it, small: what a run leaves behind, going on, stopping, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rl_train
from common import config
from common.checkpoint import load_checkpoint
from common.env_workers import EnvPool
from common.episodes import EpisodeWriter, list_episodes, read_episode
from common.payload import RewardDatasetPayload
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel
from common.runtime import UserError
from common.scenes import DataCollectionConfig
from common.wrappers import EpisodeRecorder

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "demo_rl.yaml"
IN_THIS_PROCESS = "env.train.num_workers=0"


class Made(NamedTuple):
    prior: Path  # folder of random episodes in the demo's envs
    reward_model: Path  # checkpoint folder for the demo's frames, random weights
    bare_weights: Path  # a state dict as RLinf saves it, for the configs of the guide


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The envs stay open: while one lives that has rendered, further runs in this process need not compile
    the renderer's pipelines anew, which takes 5 s of CPU."""
    folder = tmp_path_factory.mktemp("made")
    cfg = config.from_yaml(rl_train.Config, DEMO)
    generator = torch.Generator().manual_seed(0)
    with EnvPool(0) as pool:
        with EpisodeWriter(folder / "prior") as writer:
            envs = EpisodeRecorder(pool.make(cfg.env.train), DataCollectionConfig(enabled=True), writer)
            envs.reset(0)
            for _ in range(24):
                envs.step(torch.rand(2, envs.spec.action_dim, generator=generator) * 2 - 1)
        paths = list_episodes(folder / "prior")
        frames = torch.cat([torch.from_numpy(read_episode(path).images["main_images"][1:]) for path in paths])

        torch.manual_seed(0)
        model = ResNetRewardModel(ResNetRewardConfig(arch="resnet10", image_size=[3, 64, 64])).eval()
        # both verdicts happen, and no score lies so close to the threshold that rounding decides
        low, high = model.score({"main_images": frames}).sort().values[len(frames) // 2 :][:2].tolist()
        threshold = (low + high) / 2
        meta = {"threshold": threshold, "frame_size": [64, 64], "render": envs.spec.render}
        model.save(folder / "reward_model", meta, frames[:4])
        guide = ResNetRewardModel(ResNetRewardConfig(arch="resnet18", hidden_dim=256))
        torch.save(guide.state_dict(), folder / "resnet18.pt")
        yield Made(folder / "prior", folder / "reward_model", folder / "resnet18.pt")


SMALL = (
    "runner.max_steps=48",
    "runner.log_interval=12",
    "runner.num_eval_episodes=2",
    "runner.num_final_episodes=2",
    "runner.num_video_episodes=0",
    "runner.logger.logger_backends=[]",
    "env.train.num_envs=2",
    "env.eval.num_envs=2",
)
ONE_ENV = ("env.train.num_envs=1", "env.eval.num_envs=1")
SMALL_SAC = ("algorithm.batch_size=16", "algorithm.buffer_size=1000", "actor.model.hidden_dims=[16]")


def demo(made: Made, folder: Path, *changes: str) -> list[str]:
    """The command line of a tiny demo run into `folder`."""
    return [
        str(DEMO),
        *SMALL,
        *SMALL_SAC,
        IN_THIS_PROCESS,
        "algorithm.offline_updates=2",
        f"algorithm.prior_data={made.prior}",
        f"reward.model.model_path={made.reward_model}",
        f"runner.logger.log_path={folder}",
        *changes,
    ]


def guide(name: str, made: Made, folder: Path, *changes: str) -> list[str]:
    """The command line of a tiny run of a config of the guide."""
    small_envs = [f"env.{which}.max_episode_steps=6" for which in ("train", "eval")]
    return [
        str(ROOT / "configs" / f"{name}.yaml"),
        *SMALL,
        *small_envs,
        f"runner.logger.log_path={folder}",
        *changes,
    ]


def start(argv: list[str], cwd: Path, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "rl_train.py"), *argv]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run_script(argv: list[str], cwd: Path) -> str:
    """What a run printed; it must end well."""
    process = start(argv, cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def run_here(monkeypatch, tmp_cwd):
    """Call main in this process, which has paid for the simulator's start already."""

    def run(argv: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["rl_train.py", *argv])
        rl_train.main()

    return run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def numbers(folder: Path) -> list[dict]:
    """The metrics without those that a clock made."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "reward/share_of_time"}
        for row in rows(folder)
    ]


# ----------------------------------------------------------------------------------------------------
# Every config of the guide and the demo, run for a few steps


@pytest.mark.slow
def test_demo(made, tmp_path):
    folder = tmp_path / "run"
    changes = ("runner.val_check_interval=24", "runner.num_video_episodes=1", "runner.save_interval=24")
    out = run_script(
        demo(made, folder, "runner.logger.logger_backends=[tensorboard]", *changes), cwd=tmp_path
    )
    assert "of 2 fresh episodes" in out
    assert re.search(r"^reward threshold 0\.\d{3}, stored with the model$", out, re.MULTILINE)
    made_files = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "summary.json"}
    files |= {"curves.png", "traces.html", "scores.png", "eval.mp4"}
    assert made_files - {"first_false_positive.mp4"} == files | {"checkpoints", "tensorboard"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing anywhere else

    log = rows(folder)
    tags = set().union(*log)
    for group in ("eval", "final"):
        for name in ("true_success_once", "learned_success", "hack_gap", "false_positives_per_1000_steps"):
            assert f"{group}/{name}" in tags
    for tag in ("rollout/true_success_once", "rollout/learned_success", "train/q", "time/env_steps_per_s"):
        assert tag in tags
    assert {"rollout/fooled", "eval/missed", "reward/share_of_time", "time/verdict_p99_ms"} <= tags
    assert [row["step"] for row in log if "eval/learned_success" in row] == [24, 48]
    assert [row["step"] for row in log if "train/q" in row] == [12, 24, 36, 48]

    result = summary(folder)
    assert (result["num_episodes"], result["env_steps"]) == (2, 48)
    assert result["best_step"] in (24, 48)
    state, meta = load_checkpoint(folder / "checkpoints" / "last")
    assert len(state["replay"]["online"]["reward"]) == meta["step"] == 48
    # of 4 episodes each, the last step alone may be paid
    assert (state["replay"]["online"]["reward"] != 0).sum() <= 4
    assert load_checkpoint(folder / "checkpoints" / "best")[1]["step"] == result["best_step"]
    cfg = config.from_yaml(rl_train.Config, folder / "config.yaml")
    assert cfg.runner.max_steps == 48


@pytest.mark.slow
def test_ppo_that_collects(made, tmp_path):
    folder = tmp_path / "run"
    changes = ("algorithm.num_steps=6", "algorithm.minibatch_size=12", "runner.save_interval=24")
    cameras = [
        f"env.{w}.cameras.{v}.{side}=32"
        for w in ("train", "eval")
        for v in ("main_images", "extra_view_images")
        for side in ("width", "height")
    ]
    run_script(guide("maniskill_ppo_mlp_qwentrend_collect", made, folder, *changes, *cameras), cwd=tmp_path)
    episodes = [read_episode(path, views=None) for path in list_episodes(folder / "collected_data")]
    assert len(episodes) >= 4  # an evaluation of two and a final one of two
    for episode in episodes:
        assert episode.length == 6
        assert episode.images["main_images"].shape == (7, 32, 32, 3)
        assert episode.images["extra_view_images"].shape == (7, 32, 32, 3)
        assert episode.task == "PickCube-v1"
        assert episode.gae.shape == (7,)
    result = summary(folder)
    assert "learned_success" not in result
    assert result["env_steps"] == 48


@pytest.mark.slow
def test_ppo_on_a_terminal_resnet(made, tmp_path):
    folder = tmp_path / "run"
    changes = ("algorithm.num_steps=6", "algorithm.minibatch_size=12", "reward.reward_threshold=0.0")
    argv = guide("maniskill_ppo_mlp_resnet_reward", made, folder, *changes)
    out = run_script([*argv, f"reward.model.model_path={made.bare_weights}"], cwd=tmp_path)
    assert summary(folder)["learned_success"] == 1.0  # a threshold of 0 likes everything
    assert summary(folder)["reward_threshold"] == 0.0
    assert "reward threshold 0.000, set by hand; the model stores none" in out
    assert summary(folder)["false_positives_per_1000_steps"] == pytest.approx(1000 / 6, abs=1000 / 12)
    assert all(
        row["rollout/learned_success"] == 1.0 for row in rows(folder) if "rollout/learned_success" in row
    )


@pytest.mark.slow
def test_sac_with_an_asynchronous_rollout(made, tmp_path):
    folder = tmp_path / "run"
    argv = guide("maniskill_sac_mlp_resnet_reward_async", made, folder, *SMALL_SAC)
    changes = ("algorithm.learning_starts=16", "runner.max_steps=160", "env.train.num_workers=1")
    run_script([*argv, *changes, f"reward.model.model_path={made.bare_weights}"], cwd=tmp_path)
    log = rows(folder)
    assert summary(folder)["env_steps"] >= 160
    assert max(row.get("train/updates", 0) for row in log) > 0
    assert any("rollout/learned_success" in row for row in log)
    state, meta = load_checkpoint(folder / "checkpoints" / "last")
    # the last step before each message may still be with the reward model
    assert 0 <= meta["step"] - len(state["replay"]["online"]["reward"]) <= 2


# ----------------------------------------------------------------------------------------------------
# The same numbers, going on, evaluating alone


@pytest.mark.slow
def test_inline_and_worker_give_the_same_sac(made, run_here, tmp_path):
    for placement in ("inline", "worker"):
        changes = ("reward.reward_mode=per_step", "reward.reward_threshold=0", "runner.val_check_interval=24")
        run_here(demo(made, tmp_path / placement, *changes, f"reward.placement={placement}"))
    assert numbers(tmp_path / "inline") == numbers(tmp_path / "worker")
    assert any("reward/precision" in row for row in numbers(tmp_path / "inline"))


@pytest.mark.slow
def test_inline_and_worker_give_the_same_ppo(made, run_here, tmp_path):
    for placement, workers in (("inline", 0), ("worker", 1)):
        changes = ("algorithm.num_steps=6", "algorithm.minibatch_size=12", "reward.reward_mode=per_step")
        argv = guide("maniskill_ppo_mlp_resnet_reward", made, tmp_path / placement, *changes)
        places = (f"reward.placement={placement}", f"env.train.num_workers={workers}")
        run_here([*argv, *places, f"reward.model.model_path={made.bare_weights}"])
    assert numbers(tmp_path / "inline") == numbers(tmp_path / "worker")


@pytest.mark.slow
def test_a_reward_model_is_refreshed_and_stays_so_in_a_run_that_goes_on(made, run_here, tmp_path, capsys):
    """The reward model's weights are random, so that it has everything to learn: successes are white."""
    episodes = [read_episode(path) for path in list_episodes(made.prior)]
    frames = [torch.from_numpy(frame) for e in episodes for frame in e.images["main_images"][1:]]
    images, labels = frames + [torch.full_like(frames[0], 255)] * 20, [0] * len(frames) + [1] * 20
    for split in ("train", "val"):
        metadata = {"render": episodes[0].render, "views": ["main_images"]}
        RewardDatasetPayload(images, labels, metadata).save(tmp_path / "data" / f"{split}.pt")
    refresh = ("reward.keep_hard=20", "reward.refresh_every=24", "reward.refresh_steps=20")
    small = tmp_path / "refresh.yaml"
    small.write_text("actor: {micro_batch_size: 8, global_batch_size: 8}")
    where = (f"reward.refresh_data={tmp_path / 'data'}", f"reward.refresh_config={small}")
    per_step = ("reward.reward_mode=per_step", "reward.reward_threshold=auto")
    run = tmp_path / "run"
    run_here(demo(made, run, *refresh, *where, *per_step))
    out = capsys.readouterr().out
    assert "the reward model has learned from" in out
    assert re.search(r"AUPRC +0\.\d+ .* 1\.000", out)
    assert re.search(r"step \d+: [1-9]\d* judged frames of the replay buffer are paid anew", out)
    last = run / "checkpoints" / "last"
    refreshed = load_checkpoint(last)[1]["refreshed_reward_model"]
    assert Path(refreshed).parent.parent == run / "refresh"
    run_here(demo(made, tmp_path / "again", f"runner.resume_dir={last}", "runner.max_steps=60", *per_step))
    assert f"the reward model is the refreshed one, {refreshed}" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "again/checkpoints/last")[1]["refreshed_reward_model"] == refreshed
    other = (f"reward.model.model_path={Path(refreshed)}", "runner.only_eval=true")
    run_here(demo(made, tmp_path / "other", f"runner.resume_dir={last}", *per_step, *other))
    assert "as the config says, and not the refreshed" in capsys.readouterr().out


def test_a_run_goes_on_from_last_and_best_can_be_evaluated_alone(made, run_here, tmp_path):
    first, second, alone = (tmp_path / name for name in ("first", "second", "alone"))
    run_here(demo(made, first, "runner.max_steps=24"))
    last = first / "checkpoints" / "last"
    run_here(demo(made, second, f"runner.resume_dir={last}"))
    assert [row["step"] for row in rows(second) if "train/q" in row] == [36, 48]
    before, after = (
        load_checkpoint(folder / "checkpoints" / "last")[0]["replay"]["online"] for folder in (first, second)
    )
    assert len(before["obs"]) == 24
    # nor do they begin where those that were collected with the same seed did
    with EnvPool(0) as pool:
        collected = pool.make(config.from_yaml(rl_train.Config, DEMO).env.train).reset(0)
    assert not before["obs"][:2].isclose(collected).all(1).any()
    assert len(after["obs"]) == 48
    assert after["obs"][:24].equal(before["obs"])
    # what follows are other episodes, not the first ones once more
    assert not after["obs"][24:26].equal(before["obs"][:2])
    # the best of both is kept: a worse policy never takes the place of a better one
    merits = [load_checkpoint(folder / "checkpoints" / "best")[1]["merit"] for folder in (first, second)]
    assert merits[1] >= merits[0]

    run_here(
        demo(made, alone, "runner.only_eval=true", f"runner.resume_dir={first / 'checkpoints' / 'best'}")
    )
    assert summary(alone)["env_steps"] == 24
    assert [row for row in rows(alone) if "train/q" in row] == []
    # the final evaluation of the same agent, on the same fresh episodes
    measured = ("true_success_once", "learned_success", "score", "return")
    assert {k: summary(alone)[k] for k in measured} == {k: summary(first)[k] for k in measured}
    assert not (alone / "checkpoints").exists()


# ----------------------------------------------------------------------------------------------------
# The alarm


def fooled(made: Made, folder: Path, *changes: str) -> list[str]:
    """A run whose reward model likes everything, while nothing succeeds."""
    audit = "reward.audit={max_hack_gap: 5, min_episodes: 4}"
    return demo(made, folder, "reward.reward_threshold=0.0", "runner.max_steps=96", audit, *changes)


def test_an_alarm_that_stops_saves_last_and_says_why(made, run_here, tmp_path, capsys):
    """The model is asked in another process, and owes verdicts when the alarm goes off."""
    message = r"is fooled: of the last \d+ episodes of training it calls \d+ a success that are none"
    asked = ("reward.reward_mode=per_step", "reward.placement=worker", "runner.num_video_episodes=1")
    with pytest.raises(UserError, match=message):
        run_here(fooled(made, tmp_path / "run", "reward.audit.action=stop", *asked))
    step = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")[1]["step"]
    assert 48 <= step < 96
    assert f"stopped at step {step}; go on with runner.resume_dir=" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists() and (tmp_path / "run" / "traces.html").exists()


def test_an_alarm_that_lowers_pays_less_of_the_learned_reward(made, run_here, tmp_path, capsys):
    changes = ("reward.audit.action=lower", "reward.env_reward_weight=1e-9", "runner.num_video_episodes=1")
    run_here(fooled(made, tmp_path / "run", *changes, "reward.audit.lower_by=0"))
    out = capsys.readouterr().out
    assert "reward.reward_weight is multiplied by 0 from here on" in out
    assert out.count("an evaluation is fooled for the first time, at step 12 of an episode") == 1
    assert (tmp_path / "run" / "first_false_positive.mp4").stat().st_size > 1000
    assert {"eval/precision_high", "reward/num_called"} <= set().union(*rows(tmp_path / "run"))
    weights = [row["reward/weight"] for row in rows(tmp_path / "run") if "reward/weight" in row]
    assert weights
    assert set(weights) == {0.0}
    paid = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")[0]["replay"]["online"]["reward"] > 1e-6
    assert paid[:48].sum() == 4
    assert paid[-24:].sum() == 0  # two more episodes ended there


# ----------------------------------------------------------------------------------------------------
# Ctrl-C


def members(session: int) -> list[str]:
    """Names of the processes that live in a session."""
    names = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
        except OSError:  # it has just ended
            continue
        if int(fields.split()[3]) == session and fields.split()[0] != "Z":
            names.append(name)
    return names


def interrupt(argv: list[str], folder: Path) -> tuple[str, str]:
    """Press Ctrl-C once the run has logged. -> stdout, stderr; exit code 130 and nobody left behind."""
    process = start(argv, folder.parent, start_new_session=True)
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and '"train/q"' in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the run
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    deadline = time.monotonic() + 5
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(process.pid) == []
    assert "Traceback" not in err
    return out, err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["one process", "many processes"])
def test_ctrl_c_saves_last(made, tmp_path, where):
    folder = tmp_path / "run"
    changes = ["runner.max_steps=100000"]
    if where == "many processes":
        changes += ["env.train.num_workers=2", "reward.placement=worker"]
    out, _ = interrupt(demo(made, folder, *changes), folder)
    state, meta = load_checkpoint(folder / "checkpoints" / "last")
    assert f"go on with runner.resume_dir={folder}/checkpoints/last" in out
    assert f"stopped at step {meta['step']};" in out
    # the transitions of the last step may have been on their way to the buffer or the model
    assert 0 <= meta["step"] + 2 - len(state["replay"]["online"]["reward"]) <= 6
    assert not (folder / "summary.json").exists()
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints"}


@pytest.mark.slow
def test_ctrl_c_ends_an_asynchronous_rollout(made, tmp_path):
    folder = tmp_path / "run"
    argv = guide("maniskill_sac_mlp_resnet_reward_async", made, folder, *SMALL_SAC)
    changes = ("algorithm.learning_starts=16", "runner.max_steps=100000", "env.train.num_workers=1")
    interrupt([*argv, *changes, f"reward.model.model_path={made.bare_weights}"], folder)
    assert load_checkpoint(folder / "checkpoints" / "last")[1]["step"] > 0


# ----------------------------------------------------------------------------------------------------
# What does not fit


def test_a_mistake_is_one_line_and_exit_code_2(made, tmp_path):
    process = start([*demo(made, tmp_path / "run"), "algorithm.lerning_starts=4"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: command line: unknown key 'algorithm.lerning_starts', did you mean")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["env.eval.cameras.main_images.fov=0.9"], r"main_images.fov: trained on 0.8\d*, here 0.9"),
        (["env.train.cameras.main_images.fov=0.9"], r"main_images.fov: trained on 0.8\d*, here 0.9"),
        (["env.train.cameras.shader=default"], r"shader: trained on minimal, here default"),
        (["reward.model.arch=resnet18"], r"trained with arch resnet10, but the config says resnet18"),
        (["reward.model.model_path={bare_weights}"], "does not fit resnet18, hidden_dim None"),
        (
            ["reward.model.model_path={bare_weights}", "reward.model.hidden_dim=256"],
            "resnet18.pt stores no threshold; set reward.reward_threshold to a number",
        ),
        (["reward.model.model_path=nowhere"], "nowhere"),
        (["algorithm.prior_data=nowhere"], "algorithm.prior_data: nowhere does not exist"),
        (["algorithm.prior_data=['.', nowhere]"], "algorithm.prior_data: nowhere does not exist"),
        (["runner.resume_dir=nowhere"], ": nowhere does not exist"),
        (["env.train.task=PullCube-v1"], "env.train.task is PullCube-v1, but env.eval.task PushCube-v1"),
        (["reward.use_reward_model=false"], "nobody pays"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_trained(made, run_here, tmp_path, changes, message):
    changes = [change.format(bare_weights=made.bare_weights) for change in (*ONE_ENV, *changes)]
    with pytest.raises(UserError, match=message) as error:
        run_here(demo(made, tmp_path / "run", *changes))
    assert "\n" not in str(error.value)
    left = {path.name for path in (tmp_path / "run").glob("*")}
    assert left in (
        set(),
        {"config.yaml", "metrics.jsonl"},
    )  # the latter where prior data were judged already


def test_a_refusal_leaves_no_run_folder(run_here, tmp_path, monkeypatch):
    """It held the config alone, and looked like a run."""

    def refuse(*_):
        assert (tmp_path / "run" / "config.yaml").is_file()
        raise UserError("the model does not fit")

    monkeypatch.setattr(rl_train, "open_simulation", refuse)
    with pytest.raises(UserError, match="does not fit"):
        run_here(demo(Made(tmp_path, tmp_path, tmp_path), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("actor.model.hidden_dims=[32]", r"actor.model.hidden_dims \[16\], but the config says \[32\]"),
        ("algorithm.num_critics=3", "algorithm.num_critics 4, but the config says 3"),
        ("algorithm.auto_alpha=false", "algorithm.auto_alpha True, but the config says False"),
    ],
)
def test_another_agent_cannot_go_on(made, run_here, tmp_path, finished, change, message):
    with pytest.raises(UserError, match=message):
        resume = f"runner.resume_dir={finished / 'checkpoints' / 'last'}"
        run_here(demo(made, tmp_path / "run", *ONE_ENV, resume, change))


def test_a_finished_run_is_never_overwritten(made, run_here, finished):
    before = (finished / "summary.json").read_bytes()
    with pytest.raises(UserError, match="holds a finished run"):
        run_here(demo(made, finished))
    assert (finished / "summary.json").read_bytes() == before


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rl_train.py", *demo(made, folder, *ONE_ENV, "runner.max_steps=12")])
        rl_train.main()
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["runner.async_rollout=true", "algorithm.name=ppo"], "is for SAC"),
        (["runner.only_eval=true"], "only_eval needs resume_dir"),
        (["env.train.data_collection.enabled=true", "env.eval.data_collection.enabled=true"], "record one"),
        (["env.train.data_collection.enabled=true", "runner.async_rollout=true"], "asynchronous rollout"),
    ],
)
def test_settings_that_contradict_each_other(changes, message, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("reward: {env_reward_weight: 1.0}\nalgorithm: {name: sac}\n")
    with pytest.raises(UserError, match=message):
        config.from_yaml(rl_train.Config, plain, changes)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (["env.train.max_episode_steps=4", "env.eval.max_episode_steps=4"], 4),
        (["env.eval.max_episode_steps=4"], 4),
        (["reward.model.history_buffers.history_window.input_interval=60"], 50),
    ],
)
def test_episodes_without_a_window_are_refused(changes, steps):
    """They trained on zero reward to the end, with exit code 0."""
    path = ROOT / "configs" / "maniskill_ppo_mlp_qwentrend_reward.yaml"
    message = f"no window of reward.model.history_buffers.history_window ends within {steps} steps"
    with pytest.raises(UserError, match=message):
        config.from_yaml(rl_train.Config, path, changes)
