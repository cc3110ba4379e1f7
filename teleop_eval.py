"""Drive the arm and watch the reward model judge, live; mark the truth with keys and get its precision.

    python teleop_eval.py configs/realworld_teleop.yaml [key=value ...]
    python teleop_eval.py --check configs/realworld_teleop.yaml     devices, cameras and the arm's pose, live
    python teleop_eval.py --serve configs/realworld_teleop.yaml      on the GPU machine: answer the robot
    python teleop_eval.py --make-keys FOLDER [CLIENT ...]            keys for a link between two machines

A line per step: `Step 123 | prob 0.93 | rm_reward: 1 | success: True`. Where the verdict is late it says
`rm_reward: -`, and driving goes on: the arm waits for no model.

In: an arm (`env.eval`), the operator's devices (`devices`), a reward model of frames (`reward`).
Keys: `c` from now on it is a success, `a` from now on it is none, `u` nobody knows; space pause, `q` finish.
Out, in the run folder: `config.yaml`, `summary.json` (precision, recall, lag, flicker of the verdicts against
the marks), `trace.npz`, `traces.html` (to look through in a browser), `scores.png`, `trace.mp4`, and the
marked frames as `labelled_frames.bin`, from which `collect.py` and `common.labelling.write_payloads` make
training data.
"""

import gc
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common import config
from common.arms import FrankyArmConfig, ManiSkillArmConfig, make_arm
from common.cameras import describe_cameras
from common.devices import DevicesConfig, describe_devices
from common.files import new_run_dir, save_json
from common.franka_config import FrankaConfig
from common.franka_wrappers import RewardModelVerdict
from common.franky_arm import read_pose
from common.labelling import FrameFacts, FrameStore
from common.link_keys import make_keys
from common.live_trace import REPORTED, UNKNOWN, LiveTrace, live_metrics
from common.log import LoggerConfig
from common.poses import to_euler_pose
from common.reward_config import RewardConfig
from common.reward_link import LiveJudge, make_judge, serve_reward_model
from common.robot_envs import Asker, RobotEnvs, check_pictures, need_camera, render_facts, rewarded_by
from common.runtime import UserError, run_script, seed_everything, set_threads
from common.serl_arm import SerlHttpArm
from common.session import KEYS_HELP, LABEL_KEYS, UNDO, Moment, SessionLog, StatusLine, open_session

CHECK_FOLDER = Path("logs/check")  # where --check puts a picture of each camera

# ----------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------


@dataclass
class EnvSection:
    eval: FrankaConfig


@dataclass
class RunnerConfig:
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(experiment_name="teleop"))
    seed: int = 0
    max_steps: int | None = None  # of the whole session; null: until `q`
    # keys: what the operator marks; pose: whether the gripper is at the target pose
    truth: Literal["keys", "pose"] = "keys"
    save_labelled: bool = True  # keep the marked frames
    max_video_steps: int = 600  # the last so many steps are kept as a video
    serve_address: str = "tcp://127.0.0.1:5555"  # of --serve
    serve_keys: str | None = None  # folder of --make-keys, needed for any other address


@dataclass
class Config:
    env: EnvSection
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)

    def __post_init__(self):
        if self.reward.use_reward_model and self.reward.reward_mode == "history_buffer":
            raise ValueError("live verdicts are about single frames: reward.reward_mode must be per_step")


# ----------------------------------------------------------------------------------------------------
# The session
# ----------------------------------------------------------------------------------------------------


def line_of(number: int, info: dict[str, Any], cfg: RewardConfig) -> str:
    """What the operator sees of a step."""
    if "success_prob" not in info:
        return f"Step {number}"
    prob, verdict = info["success_prob"], info["verdict"]
    shown = f" | prob {'--' if prob is None else format(prob, '.2f')}" if cfg.use_reward_prob else ""
    return f"Step {number}{shown} | rm_reward: {'-' if prob is None else int(verdict)} | success: {verdict}"


class Marks:
    """The truth as the operator marks it: a key holds until the next one, or the episode's end."""

    def __init__(self):
        self.truth = UNKNOWN
        self._episode = 0

    def take(self, moment: Moment) -> int:
        """-> 1 success, 0 none, UNKNOWN; from this step on."""
        if moment.episode != self._episode:
            self._episode, self.truth = moment.episode, UNKNOWN
        for key in moment.keys:
            self.truth = UNKNOWN if key == UNDO else LABEL_KEYS.get(key, self.truth)
        return self.truth


def evaluate(cfg: Config, folder: Path) -> None:
    """Drive, then report: after Ctrl-C and errors too, once arm and terminal have been let go."""
    env, trace, judge = cfg.env.eval, LiveTrace(cfg.runner.max_video_steps), None
    try:
        with ExitStack() as stack:
            line = stack.enter_context(closing(StatusLine()))
            if cfg.reward.use_reward_model:
                judge = stack.enter_context(make_judge(cfg.reward))
                judge.client.set_task(env.description)
            drive(cfg, folder, line, judge, trace)
    finally:
        report(trace, judge, folder, env.override_cfg.step_hz)


def drive(cfg: Config, folder: Path, line: StatusLine, judge: LiveJudge | None, trace: LiveTrace) -> None:
    """One session; what happens goes into the trace."""
    env, runner, verdict = cfg.env.eval, cfg.runner, None
    if runner.save_labelled:
        need_camera(env, "what is marked is kept as pictures (runner.save_labelled)")
    if judge is None:
        line.say("warning: reward.use_reward_model is off, nobody judges")
    elif cfg.reward.standalone_realworld:
        verdict = rewarded_by(judge, env, cfg.reward)
    else:
        verdict = partial(RewardModelVerdict, judge=Asker(judge, env), decision=judge.client.decision(1))
    with ExitStack() as stack:
        session = stack.enter_context(open_session(env, cfg.devices, line, verdict, runner.seed))
        if judge is not None:
            check_pictures(judge.client, RobotEnvs(session, env).spec)
        config.save(cfg, folder / "config.yaml")
        log = stack.enter_context(SessionLog(folder / "teleop.log", line))
        log.say(f"{KEYS_HELP}; c and a mark the truth from here on, u unmarks")
        if judge is not None and not cfg.reward.of_windows:
            log.say(judge.client.threshold_is)
        store = None
        if runner.save_labelled:
            facts = FrameFacts(env.task, render_facts(env), task_description=env.description)
            store = stack.enter_context(FrameStore(folder, facts))
        marks = Marks()
        gc.freeze()  # else collecting torch's objects stops the loop for 0.2 s now and then
        for number, moment in enumerate(session.moments(runner.seed, runner.max_steps), start=1):
            marked = marks.take(moment)
            truth = int(moment.info["in_zone"]) if runner.truth == "pose" else marked
            trace.add(moment, truth, session.unwrapped.now())
            if store is not None and truth != UNKNOWN:
                store.add(moment.frames["main_images"], truth, moment.episode, moment.step)
            text = line_of(number, moment.info, cfg.reward)
            if moment.done:
                log.say(f"{text} | episode {moment.episode} ended")
            else:
                log.write(text)
                line.show(text)


def report(trace: LiveTrace, judge: LiveJudge | None, folder: Path, rate_hz: float) -> None:
    """summary.json, trace.npz, and pictures; nothing where no step was made."""
    if not len(trace):
        return
    threshold = 1.0 if judge is None else judge.client.threshold
    summary = live_metrics(trace.arrays())
    if judge is not None:
        summary |= {name: vars(judge)[name] for name in ("asked", "answered", "late", "overtaken")}
        summary["threshold"] = threshold
    save_json(summary, folder / "summary.json")
    trace.save(folder / "trace.npz")
    print_summary(summary)
    try:
        trace.draw(folder, threshold, rate_hz)
    except Exception as error:  # whatever it is: why the session ended must not be hidden behind it
        print(f"no pictures: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        print(f"look at {folder}/traces.html (in a browser), {folder}/trace.mp4 and {folder}/scores.png")


def print_summary(summary: dict[str, Any]) -> None:
    print(f"\n{summary['num_steps']} steps, {summary['num_marked']} of them marked")
    for name, unit in REPORTED.items():
        if summary.get(name) is not None:
            print(f"{name.replace('_', ' '):<28}{summary[name]:>10.3g} {unit}")


# ----------------------------------------------------------------------------------------------------
# Before the session, and on the other machine
# ----------------------------------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """Devices, live; where the arm stands; a picture and the measured rate of each camera. No arm moves, and
    a real one is read without taking control of it."""
    for text in describe_devices(cfg.devices):
        print(text, flush=True)
    env, arm = cfg.env.eval, None
    with ExitStack() as stack:
        try:
            if isinstance(env.arm, ManiSkillArmConfig):
                arm = stack.enter_context(make_arm(env.arm, env.override_cfg.step_hz))
                pose = arm.state().pose
            elif isinstance(env.arm, FrankyArmConfig):
                pose = read_pose(env.arm)
            else:
                pose = SerlHttpArm(env.arm, take_control=False).state().pose
            stands = f"stands at {to_euler_pose(pose).round(4).tolist()}, in the order of target_ee_pose"
        except UserError as error:
            stands = str(error)
        print(f"arm ({env.arm.backend}): {stands}", flush=True)
        cameras = {n: c for n, c in env.all_cameras.items() if arm is not None or c.backend != "maniskill"}
        for text in describe_cameras(cameras, arm=arm, folder=CHECK_FOLDER):
            print(text, flush=True)


def main() -> None:
    mode, argv = None, sys.argv[1:]
    if argv and argv[0] in ("--check", "--serve", "--make-keys"):
        mode, *argv = argv
    if mode == "--make-keys":
        if not argv:
            raise UserError(
                "--make-keys wants a folder: python teleop_eval.py --make-keys FOLDER [CLIENT ...]"
            )
        for client in argv[1:] or ["robot"]:
            print(f"copy {make_keys(argv[0], client)} to the machine of '{client}', as its reward.link.keys")
        return
    cfg = config.load(Config, argv, description=__doc__)
    set_threads(1)
    seed_everything(cfg.runner.seed)
    if mode == "--check":
        check(cfg)
    elif mode == "--serve":
        serve_reward_model(cfg.reward, cfg.runner.serve_address, cfg.runner.serve_keys)
    else:
        logger = cfg.runner.logger
        evaluate(cfg, new_run_dir(logger.log_path, logger.experiment_name))


if __name__ == "__main__":
    run_script(main)
