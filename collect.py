"""Collect data: episodes from a mix of policies in simulation, or what an operator does at an arm.

    python collect.py configs/demo_collect.yaml [key=value ...]
    python collect.py configs/x.yaml --render-from DIR [key=value ...]    (draw recorded episodes, see below)
    python collect.py --view DIR [--model CHECKPOINT]                 (look at recorded episodes)
    python collect.py configs/realworld_collect_dataset.yaml          (label frames with keys)
    python collect.py configs/realworld_collect_fixed_pose.yaml       (episodes that end at a target pose)
    python collect.py --review RUN/hard                               (label what a reward model got wrong)

In: a task (`env.eval`), a stop rule (`runner`); in simulation a weighted mix of policies (`policies`), at an
arm the operator's devices (`devices`).
Out, in the run folder: `config.yaml`, `summary.json` and
- episodes: `collected_data/*.pkl` (format: common/episodes.py), for preprocess_*.py;
- labelled frames: `labelled_frames.bin` (format: common/labelling.py), each on the disk as soon as it is
  labelled, and from all of them `train.pt` and `val.pt` for train_resnet.py.
A second start with the same `log_path` goes on where the first one stopped.

Episodes collected with `env.eval.data_collection.frames=sim_state` have no pictures. `--render-from` draws
those in DIR by the cameras of the config and writes them anew, into another `runner.logger.log_path`: cameras
can be tried on the same episodes.

`--view` writes `DIR/traces.html`, a page for the browser: the video of each episode and, on one time line,
what was true; with `--model` also what a reward model's checkpoint says, false positives first. It shows 40
episodes at most (`--episodes N`).

`--review` shows the frames that `rl_train.py` kept (`reward.keep_hard`) one by one; keys say what is true.
Then `preprocess_resnet.py --add RUN/hard` makes training data of them.
"""

import argparse
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from common import config
from common.devices import DevicesConfig
from common.env_workers import EnvPool
from common.envs import SIM_STATE, EnvSpec
from common.episodes import EpisodeWriter, list_episodes, read_episode
from common.files import new_run_dir, save_json
from common.franka_config import FrankaConfig
from common.keyboards import Keyboard
from common.labelling import FrameFacts, FrameStore, progress_line, write_payloads
from common.log import LoggerConfig
from common.policy_mix import CheckpointPolicy, Mix, RandomPolicy, ScriptedPolicy
from common.recorded import save_recorded_page
from common.rerender import render_episodes
from common.review import review
from common.robot_envs import RobotEnvs, need_camera, render_facts
from common.runtime import UserError, run_script, seed_everything, set_threads
from common.scenes import VIEWS, EnvConfig
from common.session import KEYS_HELP, LABEL_KEYS, UNDO, SessionLog, StatusLine, open_session
from common.wrappers import EpisodeRecorder

NAMES = {1: "success", 0: "fail"}

# ----------------------------------------------------------------------------------------------------
# Settings (`policies`: common/policy_mix.py, `env.eval`: common/scenes.py, franka_config.py)
# ----------------------------------------------------------------------------------------------------


@dataclass
class RunnerConfig:
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(experiment_name="collect"))
    seed: int = 0
    num_episodes: int | None = None  # stop here; null: by the two numbers below, 200 if they are null too
    num_successes: int | None = None  # stop once so many episodes succeeded ...
    num_failures: int | None = None  # ... and so many failed

    # Labelling with keys, at an arm: on where both numbers are given.
    num_success_frames: int | None = None  # label so many frames `c` ...
    num_fail_frames: int | None = None  # ... and so many `a`
    val_split: float = 0.2  # fraction of the labelled frames, by episode or contiguous block
    fail_success_ratio: float = 2.0  # fail frames per success frame in train.pt, at most; 0: all
    random_seed: int = 42  # of the split and of the choice of fail frames

    def __post_init__(self):
        if (self.num_success_frames is None) != (self.num_fail_frames is None):
            raise ValueError("num_success_frames and num_fail_frames go together: give both or neither")
        if not 0 < self.val_split < 1:
            raise ValueError(f"val_split must lie between 0 and 1, got {self.val_split}")

    @property
    def labels_frames(self) -> bool:
        return self.num_success_frames is not None

    @property
    def episode_limit(self) -> int | None:
        """`num_episodes`, or 200 where nothing says when to stop."""
        said = self.num_episodes, self.num_successes, self.num_failures
        return 200 if said == (None, None, None) else self.num_episodes


@dataclass
class EnvSection:
    eval: EnvConfig | FrankaConfig = field(default_factory=EnvConfig)


@dataclass
class Config:
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    env: EnvSection = field(default_factory=EnvSection)
    policies: list[RandomPolicy | ScriptedPolicy | CheckpointPolicy] = field(
        default_factory=lambda: [RandomPolicy()]
    )
    devices: DevicesConfig = field(default_factory=DevicesConfig)  # of the operator at an arm

    def __post_init__(self):
        if not sum(policy.weight for policy in self.policies) > 0:
            raise ValueError("policies: name at least one with a weight above 0")
        if self.env.eval.data_collection.gae_gamma is not None:
            raise ValueError(
                "data_collection.gae_gamma scores by a critic: rl_train.py has one, this does not"
            )
        if self.runner.labels_frames and not isinstance(self.env.eval, FrankaConfig):
            raise ValueError("runner.num_success_frames is for labelling at an arm (env_type: realworld)")
        if self.runner.num_failures is not None and self.env.eval.data_collection.only_success:
            raise ValueError("runner.num_failures is never reached where only_success keeps no failures")


# ----------------------------------------------------------------------------------------------------
# Simulation
# ----------------------------------------------------------------------------------------------------


def enough(cfg: RunnerConfig, episodes: int, successes: int) -> bool:
    """The stop rule: N episodes, or N successes and M failures."""
    if cfg.episode_limit is not None and episodes >= cfg.episode_limit:
        return True
    quotas, have = [cfg.num_successes, cfg.num_failures], [successes, episodes - successes]
    return quotas != [None, None] and all(q is None or h >= q for q, h in zip(quotas, have, strict=True))


def episodes_present(folder: Path, spec: EnvSpec) -> tuple[int, int]:
    """-> episodes, successes of an earlier start. UserError if it had another task, cameras or controls."""
    paths = sorted(folder.glob("*.pkl"))
    for path in paths:
        episode = read_episode(path, views=())
        for name, theirs, ours in (
            ("cameras", episode.render, spec.render),
            ("controls", episode.control, spec.control),
        ):
            if theirs != ours:
                raise UserError(f"{path} was made with another task or other {name}; choose another log_path")
    return len(paths), sum(path.stem.endswith("_success") for path in paths)


def collect(cfg: Config, run_dir: Path, folder: Path) -> dict:
    """Fill `folder` up to the stop rule. -> the numbers of this start, for the table and summary.json."""
    env, runner = cfg.env.eval, cfg.runner
    by_policy = [{"policy": p.label, "episodes": 0, "success_once": 0} for p in cfg.policies]
    with EnvPool(env.num_workers, env.num_envs) as pool:
        envs = pool.make(env, VIEWS if env.data_collection.frames == "rendered" else (SIM_STATE,))
        before, successes_before = episodes_present(folder, envs.spec)
        config.save(cfg, run_dir / "config.yaml")  # not where the start is refused: it tells of what is there
        if before:
            print(f"{folder} holds {before} episodes ({successes_before} successes); going on from there")
        seed = runner.seed + before  # what is appended must not repeat what is there
        mix = Mix(cfg.policies, envs.spec, env, seed)
        with (
            EpisodeWriter(folder) as writer,
            tqdm(total=runner.episode_limit, initial=before, unit="ep", mininterval=0.5) as bar,
        ):
            recorder = EpisodeRecorder(envs, env.data_collection, writer)
            start = time.perf_counter()
            obs = recorder.reset(seed)
            mix.begin(torch.arange(env.num_envs))
            success_once = torch.zeros(env.num_envs, dtype=torch.bool)
            while not enough(runner, bar.n, successes_before + recorder.num_successes):
                step = recorder.step(mix.act(obs.cpu()).to(recorder.device))
                obs = step.obs
                success_once |= step.success.cpu()
                ended = step.done.cpu().nonzero().squeeze(1)
                for i in ended.tolist():
                    by_policy[mix.choice[i]]["episodes"] += 1
                    by_policy[mix.choice[i]]["success_once"] += int(success_once[i])
                mix.begin(ended)
                success_once[ended] = False
                bar.update(before + recorder.num_episodes - bar.n)
        seconds = time.perf_counter() - start
    return {
        "num_episodes": before + recorder.num_episodes,
        "num_successes": successes_before + recorder.num_successes,
        "num_frames": recorder.num_frames,
        "env_steps": recorder.num_steps,
        "seconds": round(seconds, 1),
        "env_steps_per_s": round(recorder.num_steps / seconds, 1),
        "by_policy": by_policy,
    }


# ----------------------------------------------------------------------------------------------------
# At an arm
# ----------------------------------------------------------------------------------------------------


def label_frames(cfg: Config, run_dir: Path) -> dict:
    """The operator drives, and keys label what the main camera sees. -> for summary.json."""
    runner, env = cfg.runner, cfg.env.eval
    need_camera(env, "what is labelled are pictures")
    facts = FrameFacts(env.task, render_facts(env), task_description=env.description)
    with (
        FrameStore(run_dir, facts) as store,
        closing(StatusLine()) as line,
        SessionLog(run_dir / "run_collect_process.log", line) as log,
    ):
        config.save(cfg, run_dir / "config.yaml")
        log.say(f"{KEYS_HELP}; {run_dir} holds {store.num_success} success and {store.num_fail} fail frames")
        num_steps = 0 if is_full(store, runner) else label_until_full(cfg, store, line, log)
        log.say(f"labelled: {store.num_success} success, {store.num_fail} fail, in {num_steps} steps")
        counts = {"num_success_frames": store.num_success, "num_fail_frames": store.num_fail}
    metadata = write_payloads(
        [run_dir], run_dir, runner.val_split, runner.fail_success_ratio, runner.random_seed
    )
    print(
        f"{run_dir}/train.pt: {metadata['num_train_samples']} frames, val.pt: {metadata['num_val_samples']}; "
        "next: train_resnet.py"
    )
    return {**counts, "env_steps": num_steps}


def is_full(store: FrameStore, runner: RunnerConfig, label: int | None = None) -> bool:
    """Whether there are enough frames of that label; None: of both."""
    full = {1: store.num_success >= runner.num_success_frames, 0: store.num_fail >= runner.num_fail_frames}
    return all(full.values()) if label is None else full[label]


def label_until_full(cfg: Config, store: FrameStore, line: StatusLine, log: SessionLog) -> int:
    """-> the number of steps."""
    runner, num_steps = cfg.runner, 0
    with open_session(cfg.env.eval, cfg.devices, line, seed=runner.seed) as session:
        for moment in session.moments(runner.seed + store.num_success + store.num_fail):
            num_steps += 1
            label = None
            for key in moment.keys:
                if key == UNDO and label is None:
                    what = NAMES.get(store.undo())
                    log.say("nothing to undo" if what is None else f"took back the last {what} frame")
                else:  # a frame has one label, the last one that stands
                    label = None if key == UNDO else LABEL_KEYS.get(key, label)
            if label is not None and not is_full(store, runner, label):
                store.add(moment.frames["main_images"], label, moment.episode, moment.step)
            if moment.done:
                log.write(
                    f"episode {moment.episode} ended after {moment.step} steps, reward {moment.reward:g}"
                )
            targets = runner.num_success_frames, runner.num_fail_frames
            line.show(progress_line(store.num_success, targets[0], store.num_fail, targets[1], line.width))
            if is_full(store, runner):
                break
    return num_steps


def record_operator(cfg: Config, run_dir: Path, folder: Path) -> dict:
    """The operator drives whole episodes; the target pose (or a key) ends them. -> for summary.json."""
    runner, env = cfg.runner, cfg.env.eval
    with (
        closing(StatusLine()) as line,
        open_session(env, cfg.devices, line, seed=runner.seed) as session,
        EpisodeWriter(folder) as writer,
    ):
        envs = RobotEnvs(session, env)
        before, successes_before = episodes_present(folder, envs.spec)
        config.save(cfg, run_dir / "config.yaml")
        line.say(f"{KEYS_HELP.partition('u undo, ')[2]}; {folder} holds {before} episodes")
        recorder = EpisodeRecorder(envs, env.data_collection, writer)
        idle = torch.zeros(1, envs.spec.action_dim)

        def is_done() -> bool:
            count = before + recorder.num_episodes, successes_before + recorder.num_successes
            return session.finished or enough(runner, *count)

        if not is_done():
            line.show("the arm goes to its start")
            recorder.reset(runner.seed + before)
        while not is_done():
            step = recorder.step(idle)
            hold = f"in the zone for {envs.last_info['hold_steps']} steps" if step.info["in_zone"] else ""
            line.show(
                f"episode {before + recorder.num_episodes}, {successes_before + recorder.num_successes} "
                f"succeeded so far {hold}"
            )
        return {
            "num_episodes": before + recorder.num_episodes,
            "num_successes": successes_before + recorder.num_successes,
            "num_frames": recorder.num_frames,
            "env_steps": recorder.num_steps,
        }


# ----------------------------------------------------------------------------------------------------
# One start
# ----------------------------------------------------------------------------------------------------


def render(cfg: Config, source: Path, run_dir: Path, folder: Path) -> dict:
    """The episodes of `source`, with pictures, in `folder`. -> for summary.json."""
    paths = list_episodes(source)
    if source.resolve() == folder.resolve():
        raise UserError(f"--render-from {source} would write over what it reads; choose another log_path")
    if len({path.name for path in paths}) < len(paths):
        raise UserError(f"--render-from {source}: several folders in it hold episodes of one name; name one")
    config.save(cfg, run_dir / "config.yaml")
    start = time.perf_counter()
    for _ in tqdm(render_episodes(paths, folder, cfg.env.eval), "draw", len(paths), unit="ep"):
        pass
    seconds = round(time.perf_counter() - start, 1)
    print(f"{folder}: {len(paths)} episodes with pictures, in {seconds} s")
    return {"num_episodes": len(paths), "seconds": seconds}


def view(argv: list[str]) -> None:
    """A page of recorded episodes, to look through in a browser."""
    parser = argparse.ArgumentParser(prog="collect.py", description="A page of recorded episodes.")
    parser.add_argument("--view", type=Path, required=True, metavar="DIR", help="folder with episodes")
    parser.add_argument("--model", type=Path, metavar="CHECKPOINT", help="of a reward model, to score them")
    parser.add_argument("--episodes", type=int, default=40, metavar="N", help="shown, at most (default: 40)")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: must be 1 or more")
    page = args.view / "traces.html"
    print(f"{save_recorded_page(args.view, args.model, args.episodes, page)}; open {page} in a browser")


def print_table(summary: dict, folder: Path) -> None:
    print(f"\n{'policy':<20}{'episodes':>10}{'succeeded once':>16}")
    for row in summary["by_policy"]:
        print(f"{row['policy']:<20}{row['episodes']:>10}{row['success_once']:>16}")
    print(
        f"\n{folder}: {summary['num_episodes']} episodes, {summary['num_successes']} successes; "
        f"this start wrote {summary['num_frames']} frames in {summary['seconds']} s, "
        f"{summary['env_steps_per_s']} env steps/s"
    )


def take_folder(argv: list[str], option: str) -> Path | None:
    """The folder after `option`, both taken out of argv; None where it is not there."""
    if option not in argv:
        return None
    at = argv.index(option)
    if at + 1 == len(argv):
        raise UserError(f"{option} wants a folder of episodes")
    _, folder = argv[at : at + 2]
    argv[at : at + 2] = []
    return Path(folder)


def main() -> None:
    argv = sys.argv[1:]
    if "--view" in argv:
        set_threads(1)
        return view(argv)
    if (folder := take_folder(argv, "--review")) is not None:
        with Keyboard() as keyboard:
            review(folder, keyboard)
        return
    source = take_folder(argv, "--render-from")
    cfg = config.load(Config, argv, description=__doc__)
    set_threads(1)
    seed_everything(cfg.runner.seed)
    run_dir = new_run_dir(cfg.runner.logger.log_path, cfg.runner.logger.experiment_name, may_append=True)
    folder = Path(cfg.env.eval.data_collection.save_dir or run_dir / "collected_data")
    at_an_arm = isinstance(cfg.env.eval, FrankaConfig)
    if source is not None:
        if at_an_arm:
            raise UserError("--render-from draws simulated episodes; an arm's have their pictures")
        save_json(render(cfg, source, run_dir, folder), run_dir / "summary.json")
        return
    if cfg.runner.labels_frames:
        summary = label_frames(cfg, run_dir)
    elif at_an_arm:
        summary = record_operator(cfg, run_dir, folder)
    else:
        summary = collect(cfg, run_dir, folder)
    if summary["env_steps"] or not (run_dir / "summary.json").exists():  # else it tells of an earlier start
        save_json(summary, run_dir / "summary.json")
    if not at_an_arm:
        print_table(summary, folder)


if __name__ == "__main__":
    run_script(main)
