"""What the operator drives and labels with: a SpaceMouse and a keyboard, chosen by the section `devices`.

Both are context managers; `read()` of both returns at once. `describe_devices` is for the eyes, before
anything moves.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from common.keyboards import (
    AnyKeyboard,
    EvdevKeyboard,
    Keyboard,
    KeyboardConfig,
    ScriptedKeyboard,
    make_keyboard,
)
from common.runtime import UserError
from common.spacemouse import (
    AXES,
    Mouse,
    MouseConfig,
    MouseReading,
    ScriptedMouse,
    SpaceMouse,
    find_spacemice,
    hid_reports,
    make_mouse,
)

__all__ = [
    "AnyKeyboard",
    "DevicesConfig",
    "EvdevKeyboard",
    "Keyboard",
    "KeyboardConfig",
    "Mouse",
    "MouseConfig",
    "MouseReading",
    "ScriptedKeyboard",
    "ScriptedMouse",
    "SpaceMouse",
    "describe_devices",
    "find_spacemice",
    "hid_reports",
    "make_keyboard",
    "make_mouse",
    "watch_keyboard",
    "watch_mouse",
]

LOOK_EVERY_S = 0.1
MOVED = 0.1  # an axis deflected so far in the test counts as alive


@dataclass
class DevicesConfig:
    operator: Literal["human", "scripted"] = "human"  # scripted: common/scripted_operator.py, for demos
    mouse: MouseConfig = field(default_factory=MouseConfig)
    keyboard: KeyboardConfig = field(default_factory=KeyboardConfig)


def describe_devices(cfg: DevicesConfig, seconds: float = 5.0) -> Iterator[str]:
    """Lines for the operator, as things happen: mice found, then `seconds` each of mouse and keyboard.

    A device that cannot be used is a line too, so that one check shows all that is missing.
    """
    try:
        if cfg.mouse.backend == "spacemouse":
            yield from (f"SpaceMouse: {model} at {path}" for path, model in find_spacemice().items())
        with make_mouse(cfg.mouse) as mouse:
            yield f"SpaceMouse: move all six axes and press both buttons ({seconds:g} s)"
            yield from watch_mouse(mouse, seconds)
    except UserError as error:
        yield str(error)
    try:
        with make_keyboard(cfg.keyboard) as keyboard:
            yield f"keyboard ({cfg.keyboard.backend}): press some keys ({seconds:g} s)"
            yield from watch_keyboard(keyboard, seconds)
    except UserError as error:
        yield f"keyboard: {error}"


def watch_mouse(mouse: Mouse, seconds: float) -> Iterator[str]:
    """A line per change of what the mouse reads; last the report rate and what has never moved."""
    start_s, start_reports = time.monotonic(), mouse.num_reports
    parts, moved = [*AXES, "left button", "right button"], set()
    shown, busy_s = "", 0.0
    while time.monotonic() - start_s < seconds:
        reading = mouse.read()
        live = [*(np.abs(reading.axes) >= MOVED), reading.left, reading.right]
        moved |= {name for name, is_live in zip(parts, live, strict=True) if is_live}
        busy_s += LOOK_EVERY_S if reading.axes.any() else 0.0
        line = "lost: no live device" if reading.stale else _mouse_line(reading)
        if line != shown:
            yield line
            shown = line
        time.sleep(LOOK_EVERY_S)
    reports = mouse.num_reports - start_reports
    rate = f", about {reports / busy_s:.0f} reports/s while deflected" if busy_s else ""
    yield f"SpaceMouse: {reports} reports{rate}"
    if len(moved) < len(parts):
        yield f"SpaceMouse: never moved: {', '.join(name for name in parts if name not in moved)}"


def _mouse_line(reading: MouseReading) -> str:
    axes = "  ".join(f"{name} {value:+.1f}" for name, value in zip(AXES, reading.axes, strict=True))
    return f"{axes}{'  left' * reading.left}{'  right' * reading.right}"


def watch_keyboard(keyboard: AnyKeyboard, seconds: float) -> Iterator[str]:
    """A line per key; last how many there were. KeyboardInterrupt at Ctrl-C."""
    start_s, number = time.monotonic(), 0
    while time.monotonic() - start_s < seconds:
        for key in keyboard.read():
            number += 1
            yield f"key {key!r}"
        time.sleep(LOOK_EVERY_S)
    yield f"keyboard: {number} keys"
