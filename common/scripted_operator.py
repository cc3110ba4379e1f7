"""An operator made of code, for demos and tests without hands: drives to the target, stays, wanders off.

What it does goes the way of the real thing: the motion as raw HID reports through pyspacemouse's parser, the
keys as bytes through a pseudo-terminal. It knows what a person at the arm sees: where the gripper is.
"""

import contextlib
import os
import pty
import tty

import numpy as np

from common.devices import Keyboard, ScriptedMouse, hid_reports
from common.franka import FrankaEnv
from common.poses import pose_error

PULL = 1.0  # share of the way that a step tries to make up
TREMBLE = 0.25  # sd of what it adds while it stays
SURE_FAR = 1.5  # in thresholds: beyond this it calls a frame a fail, between 1 and this it says nothing


class ScriptedOperator:
    """A `mouse` and, itself, a keyboard (`read`, a context manager). `watch` the env before the first step.

    Legs of an episode, drawn anew each time: off to somewhere in the box, to the target, trembling there.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.mouse = ScriptedMouse(self._reports)
        self._stack = contextlib.ExitStack()
        self._env: FrankaEnv | None = None
        self._leg, self._left = "go", 0
        self._place = np.zeros(3)
        self._said: int | None = None

    def watch(self, env: FrankaEnv) -> None:
        self._env = env
        self._begin("wander")

    # -- the hand ------------------------------------------------------------------------------------

    def _begin(self, leg: str) -> None:
        low, high = self._env.box.low[:3], self._env.box.high[:3]
        self._leg = leg
        if leg == "wander":
            self._place, self._left = self.rng.uniform(low, high), int(self.rng.integers(6, 14))
        else:
            self._place, self._left = self._env.target[:3], int(self.rng.integers(12, 24))

    def _reports(self, step: int) -> list[bytes]:
        if self._left == 0:
            self._begin({"wander": "stay", "stay": "wander"}[self._leg])
        self._left -= 1
        scale_m = self._env.task.action_scale[0]
        axes = np.zeros(6)
        axes[:3] = PULL * (self._place - self._env.pose[:3]) / scale_m
        size = np.abs(axes[:3]).max()
        axes[:3] = axes[:3] / max(size, 1.0) + TREMBLE * self.rng.standard_normal(3)
        return hid_reports(axes.clip(-1, 1))

    # -- the keys ------------------------------------------------------------------------------------

    def __enter__(self) -> "ScriptedOperator":
        from prompt_toolkit.input import create_input

        with contextlib.ExitStack() as stack:
            self._finger, terminal = pty.openpty()
            tty.setraw(terminal)
            stack.callback(os.close, self._finger)
            file = stack.enter_context(os.fdopen(terminal))
            self._keyboard = stack.enter_context(Keyboard(create_input(file)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def read(self) -> list[str]:
        """As `Keyboard.read`: looks where the gripper is and presses `c`, `a`, or nothing where not sure."""
        if self._env is not None and self._env.pose is not None:
            error = np.abs(pose_error(self._env.pose, self._env.target))
            share = float((error / self._env.threshold).max())
            if share <= 1 or share > SURE_FAR:
                os.write(self._finger, b"c" if share <= 1 else b"a")
        return self._keyboard.read()
