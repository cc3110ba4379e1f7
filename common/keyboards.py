"""Keys of the operator: from the terminal (over SSH too), from a pedal, or from a script.

A terminal knows no key-up: what is read are the presses since the last read, and a held key repeats itself.
"""

import contextlib
import os
import sys
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol

from common.runtime import UserError

if TYPE_CHECKING:  # imported where needed: only teleoperation wants it
    from prompt_toolkit.input import Input

CTRL_C = "c-c"
EVDEV_NAMES = {"space": " ", "esc": "escape"}
EVDEV_KEY, EVDEV_DOWN = 1, (1, 2)  # the kernel's event type of keys; its values 1: pressed, 2: repeated

NO_TERMINAL = (
    "keys are read from the terminal, but standard input is none (a pipe, cron, nohup?); "
    "start it in a terminal, with `ssh -t` from afar, or choose another `backend` of the keyboard"
)
IN_BACKGROUND = (
    "keys are read from the terminal, but this process runs in its background; "
    "start it without `&`, or type `fg`"
)


@dataclass
class KeyboardConfig:
    backend: Literal["terminal", "evdev", "scripted"] = "terminal"
    device: str | None = (
        None  # evdev: /dev/input/event* or /dev/input/by-id/*; null: the only keyboard there is
    )
    keys: list[str] | None = None  # scripted: the keys of each reset and each step, "" for none

    def __post_init__(self):
        if (self.backend == "scripted") != (self.keys is not None):
            raise ValueError("`keys` goes with `backend: scripted`, and only with it")
        if self.device is not None and self.backend != "evdev":
            raise ValueError(f"`device` goes with `backend: evdev`, not with '{self.backend}'")


class AnyKeyboard(Protocol):
    def read(self) -> list[str]: ...
    def __enter__(self) -> "AnyKeyboard": ...
    def __exit__(self, *_) -> None: ...


class Keyboard:
    """The terminal's keys, within a `with` block, which restores the terminal however it ends.

    `read()` -> the keys pressed since the last read, in order, in prompt_toolkit's names ("c", " ", "escape",
    "c-m" for Enter); it never waits. Output keeps its line ends: raw input leaves the way out alone.

    Ctrl-C raises KeyboardInterrupt: at once, as usual, also in the middle of a long reset; in `read`, where
    the terminal cannot signal this process (torchrun starts its children in sessions of their own).
    """

    def __init__(self, terminal: "Input | None" = None):
        """terminal: prompt_toolkit's, instead of standard input. UserError if that is not a terminal."""
        if terminal is None:
            terminal = _standard_input()
        self._input = terminal
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Keyboard":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._input.raw_mode())
            fileno = self._input.fileno()
            if os.isatty(fileno):
                stack.callback(_forget_keys, fileno)
                if _foreground(fileno):
                    _let_ctrl_c_through(fileno)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def read(self) -> list[str]:
        # An escape alone may be the start of an arrow key, so it waits inside until the next read.
        presses = self._input.flush_keys() + self._input.read_keys()
        if self._input.closed:
            raise UserError("the terminal with the keyboard is gone")
        keys = [press.key for press in presses]
        return interrupted([key.value if isinstance(key, Enum) else key for key in keys])


def _standard_input() -> "Input":
    from prompt_toolkit.input import create_input

    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        raise UserError(NO_TERMINAL)
    if _foreground(sys.stdin.fileno()) is False:
        raise UserError(IN_BACKGROUND)  # else the system would stop the whole process without a word
    return create_input()


def _foreground(fileno: int) -> bool | None:
    """Whether the terminal sends its signals to this process; None if it controls no process group here."""
    try:
        return os.tcgetpgrp(fileno) == os.getpgrp()
    except OSError:
        return None


def _forget_keys(fileno: int) -> None:
    """Drop what was typed and not read: a held key would go on in the user's shell."""
    with contextlib.suppress(termios.error):  # the terminal may be gone
        termios.tcflush(fileno, termios.TCIFLUSH)


def _let_ctrl_c_through(fileno: int) -> None:
    """Of the terminal's signal keys only Ctrl-C: Ctrl-Z would leave an arm alone with its last command."""
    attributes = termios.tcgetattr(fileno)
    attributes[3] |= termios.ISIG
    disabled = os.fpathconf(fileno, "PC_VDISABLE")
    for key in (termios.VSUSP, termios.VQUIT):
        attributes[6][key] = bytes([disabled])
    termios.tcsetattr(fileno, termios.TCSANOW, attributes)


def interrupted(keys: list[str]) -> list[str]:
    """The same keys; KeyboardInterrupt if Ctrl-C is among them."""
    if CTRL_C in keys:
        raise KeyboardInterrupt
    return keys


class EvdevKeyboard:
    """The keys of one input device of the machine itself, read past terminal and window system: for pedals.

    Names as of the terminal: letters and digits as such, " ", else lower case ("enter", "f1"). A held key
    repeats. Ctrl-C stays with the terminal. UserError if the device cannot be opened or is unplugged.
    """

    def __init__(self, path: str | None = None):
        try:
            import evdev
        except ImportError as error:
            raise UserError("this keyboard needs evdev; install it: `pip install evdev`") from error
        self._names = evdev.ecodes.KEY  # code -> name, or a list of names
        path = path or _only_keyboard(evdev)
        try:
            self._device = evdev.InputDevice(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened ({error.strerror}); `sudo usermod -aG input $USER` and log in again"
            ) from error

    def read(self) -> list[str]:
        keys = []
        try:
            while (event := self._device.read_one()) is not None:
                if event.type == EVDEV_KEY and event.value in EVDEV_DOWN:
                    keys.append(self._name(event.code))
        except OSError as error:
            raise UserError(
                f"keyboard {self._device.path} is gone ({error.strerror}); plug it in again"
            ) from error
        return keys

    def _name(self, code: int) -> str:
        names = self._names.get(code, f"KEY_{code}")
        name = (names if isinstance(names, str) else names[0]).removeprefix("KEY_").lower()
        return EVDEV_NAMES.get(name, name)

    def __enter__(self) -> "EvdevKeyboard":
        return self

    def __exit__(self, *_) -> None:
        self._device.close()


def _only_keyboard(evdev) -> str:
    """The path of the one device with the keys A and C; UserError unless there is exactly one."""
    found = {}
    for path in evdev.list_devices():  # lists only what this user may open
        device = evdev.InputDevice(path)
        keys = device.capabilities().get(evdev.ecodes.EV_KEY, [])
        if {evdev.ecodes.KEY_A, evdev.ecodes.KEY_C} <= set(keys):
            found[path] = device.name
        device.close()
    if len(found) == 1:
        return next(iter(found))
    listed = ", ".join(f"{path} ({name})" for path, name in found.items())
    if found:
        raise UserError(f"several keyboards: {listed}; name one as `device` of the keyboard")
    raise UserError(
        "no keyboard found in /dev/input; plug it in, and let this user read it: "
        "`sudo usermod -aG input $USER` and log in again; a pedal without letters must be named as `device`"
    )


class ScriptedKeyboard:
    """Keys from a script, an entry per `read`: a list of names, or a text of single-character keys.

    script: a sequence, after whose end no key is pressed, or a function of the step number.
    """

    def __init__(self, script: Sequence[Sequence[str]] | Callable[[int], Sequence[str]]):
        self._script, self._step = script, 0

    def read(self) -> list[str]:
        step = self._step
        self._step += 1
        if callable(self._script):
            return interrupted(list(self._script(step)))
        return interrupted(list(self._script[step]) if step < len(self._script) else [])

    def __enter__(self) -> "ScriptedKeyboard":
        return self

    def __exit__(self, *_) -> None:
        pass


def make_keyboard(cfg: KeyboardConfig) -> AnyKeyboard:
    """The keyboard of that backend. UserError if there is none."""
    if cfg.backend == "terminal":
        return Keyboard()
    if cfg.backend == "evdev":
        return EvdevKeyboard(cfg.device)
    return ScriptedKeyboard(cfg.keys)
