"""An operator's session at the arm: episodes without end, driven by hand, until the operator has had enough.

Keys: `c` success and `a` fail (what that means is the caller's), `u` undo, space pause and go on, `q` finish.
"""

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from common.devices import AnyKeyboard, DevicesConfig, make_keyboard, make_mouse
from common.franka_config import FrankaConfig
from common.franka_wrappers import open_franka
from common.robot_envs import view_frames
from common.scripted_operator import ScriptedOperator

PAUSE, FINISH, UNDO = " ", "q", "u"
LABEL_KEYS = {"c": 1, "a": 0}
KEYS_HELP = "keys: c success, a fail, u undo, space pause, q finish"
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


class Session:
    """Steps an env with a zero action, which the SpaceMouse replaces, and hands out every step."""

    def __init__(self, env: gymnasium.Env, cfg: FrankaConfig, keyboard: AnyKeyboard, line: "StatusLine"):
        self.env, self.cfg, self.keyboard, self.line = env, cfg, keyboard, line
        self.finished = False  # by the operator

    def moments(self, seed: int, max_steps: int | None = None) -> Iterator[Moment]:
        """Until `q`, or `max_steps` in all. Between two episodes the arm goes back to its start."""
        idle = np.zeros(self.env.action_space.shape, np.float32)
        episode, total = 0, 0
        while True:
            self.line.show("the arm goes to its start")
            _, info = self.env.reset(seed=seed if episode == 0 else None)
            keys = self.attend(info.get("keys", []))
            step, done = 0, self.finished
            while not done:
                obs, reward, terminated, truncated, info = self.env.step(idle)
                step, total = step + 1, total + 1
                keys = self.attend(info["keys"] if "keys" in info else self.keyboard.read())
                done = terminated or truncated
                yield Moment(episode, step, view_frames(self.cfg, obs["frames"]), reward, info, keys, done)
                if self.finished or (max_steps is not None and total >= max_steps):
                    return
            if self.finished:
                return
            episode += 1

    def attend(self, keys: list[str]) -> list[str]:
        """Pause and finish where the keys say so. -> the keys, with those of a pause."""
        while keys.count(PAUSE) % 2 and FINISH not in keys:
            self.line.show("paused; space goes on, q finishes")
            time.sleep(PAUSE_LOOK_S)
            keys = keys + self.keyboard.read()
        self.finished = self.finished or FINISH in keys
        return keys


@contextlib.contextmanager
def open_session(
    cfg: FrankaConfig, devices: DevicesConfig, line: "StatusLine", verdict=None, seed: int = 0
) -> Iterator[Session]:
    """Devices, arm, cameras and env. However the block ends, the arm stops, the devices are closed and the
    terminal is as it was. verdict: see `franka_wrappers.wrap_franka`. Raises UserError."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        if devices.operator == "scripted":
            operator = ScriptedOperator(seed)
            mouse = stack.enter_context(operator.mouse)
            keyboard = stack.enter_context(operator)
        else:
            operator = None
            mouse = stack.enter_context(make_mouse(devices.mouse)) if cfg.use_spacemouse else None
            keyboard = stack.enter_context(make_keyboard(devices.keyboard))
        env = stack.enter_context(open_franka(cfg, mouse, keyboard, verdict))
        if operator is not None:
            operator.watch(env.unwrapped)
        yield Session(env, cfg, keyboard, line)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
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
