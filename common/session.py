"""An operator's session at the arm: episodes without end, driven by hand, until the operator has had enough.

Keys: `c` success and `a` fail (what that means is the caller's), `u` undo, space pause and go on, `q` finish.
They are looked at after each step and each reset; within a reset only Ctrl-C is.
"""

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from common.arms import ArmError, ManiSkillArmConfig
from common.devices import AnyKeyboard, DevicesConfig, make_keyboard, make_mouse
from common.franka_config import FrankaConfig
from common.franka_wrappers import open_franka
from common.robot_envs import view_frames
from common.runtime import UserError
from common.scripted_operator import ScriptedOperator

PAUSE, FINISH, UNDO = " ", "q", "u"
LABEL_KEYS = {"c": 1, "a": 0}
KEYS_HELP = "keys: c success, a fail, u undo, space pause, q finish; only Ctrl-C stops a reset"
PAUSE_LOOK_S = 0.05


class Moment(NamedTuple):
    """One step of the session."""

    episode: int  # from 0
    step: int  # of the episode, from 1
    frames: dict[str, np.ndarray]  # view -> (H, W, 3) uint8, after the step
    reward: float
    info: dict[str, Any]
    keys: list[str]  # pressed since the step before
    done: bool

    @property
    def label(self) -> int | None:
        """1 or 0 by the last label key pressed; None without one."""
        return label_of(self.keys)


def label_of(keys: list[str]) -> int | None:
    return next((LABEL_KEYS[key] for key in reversed(keys) if key in LABEL_KEYS), None)


class Session(gymnasium.Wrapper):
    """An env with an operator beside it. `env`: see `common.franka_wrappers`.

    After each step and each reset their keys are heeded: space stops the arm until the next one, `q` sets
    `finished`. Where control of the arm is lost, they are asked: space goes on with a new episode, whose
    reset recovers the arm, `q` lets the ArmError end the run, and so does a keyboard at which nobody is
    (answers=False).

    info of a step: keys (those pressed since the step before, of a pause too; what is pressed during a reset
    labels nothing), arm_lost (True where control was lost: the episode is cut, the obs is the one before).
    """

    def __init__(
        self,
        env: gymnasium.Env,
        cfg: FrankaConfig,
        keyboard: AnyKeyboard,
        line: "StatusLine",
        answers: bool = False,
    ):
        super().__init__(env)
        self.cfg, self.keyboard, self.line, self.answers = cfg, keyboard, line, answers
        self.finished = False  # by the operator

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        while True:
            try:
                obs, info = self.env.reset(seed=seed, options=options)
                self._attend(info)
            except ArmError as error:
                self._ask_to_recover(error)
            else:
                self._last = obs, info["in_zone"]
                return obs, info

    def step(self, action: np.ndarray):
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            info["keys"] = self._attend(info)
        except ArmError as error:
            self._ask_to_recover(error)
            obs, in_zone = self._last
            info = {"in_zone": in_zone, "hold_steps": 0, "success": False, "keys": [], "arm_lost": True}
            return obs, 0.0, False, True, info
        self._last = obs, info["in_zone"]
        return obs, reward, terminated, truncated, info

    def moments(self, seed: int, max_steps: int | None = None) -> Iterator[Moment]:
        """Until `q`, or `max_steps` in all, with a zero action, which the SpaceMouse replaces. Between two
        episodes the arm goes back to its start."""
        idle = np.zeros(self.action_space.shape, np.float32)
        episode, total = 0, 0
        while not self.finished:
            self.line.show("the arm goes to its start")
            self.reset(seed=seed if episode == 0 else None)
            step, done = 0, self.finished
            while not done:
                obs, reward, terminated, truncated, info = self.step(idle)
                if "arm_lost" in info:
                    break
                step, total = step + 1, total + 1
                done, frames = terminated or truncated, view_frames(self.cfg, obs["frames"])
                yield Moment(episode, step, frames, reward, info, info["keys"], done)
                if self.finished or (max_steps is not None and total >= max_steps):
                    return
            episode += 1

    # -- parts ---------------------------------------------------------------------------------------

    def _attend(self, info: dict[str, Any]) -> list[str]:
        """Pause and finish where the keys say so. -> the keys, with those of a pause."""
        keys = info["keys"] if "keys" in info else self.keyboard.read()
        if PAUSE in keys and FINISH not in keys:
            self.unwrapped.pause()
            keys = keys + self._keys_until_answer("paused; space goes on, q finishes")
            if FINISH not in keys:
                self.unwrapped.go_on()
        self.finished = self.finished or FINISH in keys
        return keys

    def _ask_to_recover(self, error: ArmError) -> None:
        if not self.answers:
            raise error
        self.line.say(str(error))
        keys = self.keyboard.read()  # a space pressed before the question was meant to stop the arm
        if FINISH not in keys:
            keys = self._keys_until_answer("the arm is lost; space recovers it and begins anew, q ends")
        if FINISH in keys:
            raise error

    def _keys_until_answer(self, question: str) -> list[str]:
        """Those pressed from now on, up to the look that has a space or `q`."""
        keys: list[str] = []
        while PAUSE not in keys and FINISH not in keys:
            self.line.show(question)
            time.sleep(PAUSE_LOOK_S)
            keys += self.keyboard.read()
        return keys


@contextlib.contextmanager
def open_session(
    cfg: FrankaConfig,
    devices: DevicesConfig,
    line: "StatusLine",
    verdict=None,
    seed: int = 0,
    make_operator: Callable[[int], ScriptedOperator] = ScriptedOperator,
) -> Iterator[Session]:
    """Devices, arm, cameras and env. However the block ends, the arm stops, the devices are closed and the
    terminal is as it was. verdict: see `franka_wrappers.wrap_franka`; make_operator(seed): the one of code,
    where `devices` wants one. Raises UserError."""
    check_operator(cfg, devices)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        if devices.operator == "scripted":
            operator = make_operator(seed)
            mouse = stack.enter_context(operator.mouse)
            keyboard = stack.enter_context(operator)
        else:
            operator = None
            mouse = stack.enter_context(make_mouse(devices.mouse)) if cfg.use_spacemouse else None
            keyboard = stack.enter_context(make_keyboard(devices.keyboard))
        env = stack.enter_context(open_franka(cfg, mouse, keyboard, verdict))
        if operator is not None:
            operator.watch(env.unwrapped)
        answers = operator is None and devices.keyboard.backend != "scripted"
        yield Session(env, cfg, keyboard, line, answers)


def check_operator(cfg: FrankaConfig, devices: DevicesConfig) -> None:
    """UserError where code would drive a real arm: it looks out for nobody."""
    if devices.operator == "scripted" and not isinstance(cfg.arm, ManiSkillArmConfig):
        raise UserError(
            f"devices.operator scripted drives a simulated arm alone, and arm.backend is {cfg.arm.backend}: "
            "set devices.operator to human"
        )


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of an SSH connection that drops, end the block like an exception: the arm stops."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StatusLine:
    """One line that is written over again and again; where output is no terminal, a plain one at times."""

    def __init__(self, every_s: float = 10.0):
        self.live = sys.stdout.isatty()
        self.every_s, self._said_s = every_s, -np.inf

    @property
    def width(self) -> int:
        return shutil.get_terminal_size((80, 24)).columns - 1  # some terminals wrap on the last column

    def show(self, text: str) -> None:
        """Instead of what it shows."""
        if self.live:
            print(f"\r\x1b[2K{text[: self.width]}", end="", flush=True)
        elif time.monotonic() - self._said_s >= self.every_s:
            self._said_s = time.monotonic()
            print(text, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\x1b[2K{text}" if self.live else text, flush=True)

    def close(self) -> None:
        if self.live:
            print("\r\x1b[2K", end="", flush=True)


class SessionLog:
    """A text file of what happened and when, beside what the operator sees; goes on where it ended."""

    def __init__(self, path: Path, line: StatusLine):
        self.file, self.line = path.open("a", encoding="utf-8"), line

    def write(self, text: str) -> None:
        """To the file alone."""
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.file, flush=True)

    def say(self, text: str) -> None:
        """To both."""
        self.write(text)
        self.line.say(text)

    def __enter__(self) -> "SessionLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None:
            self.write(f"ended by {kind.__name__}: {error}")
        self.file.close()
