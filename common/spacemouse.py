"""The SpaceMouse: a puck with six axes and two buttons that moves the arm.

pyspacemouse parses the reports. A thread drains them: the device queues what nobody reads, and the arm would
follow motions of seconds ago. What a lost device said last is never repeated: it would drive the arm on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from common.device_thread import DeviceThread, say
from common.runtime import UserError

if TYPE_CHECKING:  # imported where needed: only teleoperation wants it
    from pyspacemouse import DeviceInfo, SpaceMouseDevice, SpaceMouseState

# From the ROS convention, in which the operator's forward is +x, to the base frame of an arm that faces the
# operator: there forward is -x, and left is -y. Equal to RLinf's map from a convention now deprecated.
AXES = {"x": -1, "y": -1, "z": 1, "roll": -1, "pitch": -1, "yaw": 1}
# Models differ in names and number of buttons. The two of a small mouse on a universal receiver show as MENU
# and FIT. RIGHT alone is a view key of the SpaceMouse Enterprise, so only whole pairs count.
BUTTON_PAIRS = (("LEFT", "RIGHT"), ("MENU", "FIT"), ("BTN_1", "BTN_2"))

POLL_S = 0.002  # a report comes every 8-16 ms while the puck is deflected
MAX_REPORTS = 64  # per drain, so that a device which never stops talking cannot hold the thread

NO_PERMISSION = (
    "found, but it cannot be opened; write the line  "
    'SUBSYSTEM=="hidraw", ATTRS{{idVendor}}=="{vendor:04x}", MODE="0664", GROUP="input", TAG+="uaccess"'
    "  to /etc/udev/rules.d/99-spacemouse.rules, run `sudo udevadm control --reload-rules` "
    "and plug the SpaceMouse in again"
)
NO_HIDAPI = "the SpaceMouse needs the library hidapi; install it: `sudo apt install libhidapi-hidraw0`"


@dataclass
class MouseConfig:
    backend: Literal["spacemouse", "scripted"] = "spacemouse"
    device: str | None = (
        None  # model or /dev/hidraw*, as `teleop_eval.py --check` lists them; null: the first
    )
    deadzone: float = 0.02  # axes up to this are 0, or a worn puck would never let go of the arm
    stale_after_s: float = 0.2  # silence of a deflected puck after which its motion counts as 0
    reopen_tries: int = 30
    reopen_every_s: float = 1.0
    script: str | None = (
        None  # backend scripted: text file, a line per step: HID reports in hex, spaces between
    )

    def __post_init__(self):
        if not 0 <= self.deadzone < 1:
            raise ValueError(f"deadzone must be in [0, 1), got {self.deadzone}")
        if (self.backend == "scripted") != (self.script is not None):
            raise ValueError("`script` goes with `backend: scripted`, and only with it")


@dataclass
class MouseReading:
    """axes (6,) float32 in [-1, 1]: dx dy dz droll dpitch dyaw in the robot's base frame.

    stale: no live device (unplugged, or silent while deflected); then axes are zero and buttons False.
    """

    axes: np.ndarray = field(default_factory=lambda: np.zeros(6, np.float32))
    left: bool = False
    right: bool = False
    stale: bool = False


class Mouse(Protocol):
    num_reports: int  # so far

    def read(self) -> MouseReading: ...
    def close(self) -> None: ...


# ----------------------------------------------------------------------------------------------------
# The device


def find_spacemice() -> dict[str, str]:
    """Path -> model of what is plugged in; a receiver may have several paths. UserError without hidapi."""
    import pyspacemouse

    try:
        return pyspacemouse.get_connected_devices_by_path()
    except (RuntimeError, AttributeError) as error:  # its way to say so
        raise UserError(NO_HIDAPI) from error


def open_spacemouse(device: str | None) -> "SpaceMouseDevice":
    """The device of that model or path (None: the first found), in the ROS convention. Raises UserError."""
    import pyspacemouse

    found = find_spacemice()
    if not found:
        raise UserError(
            "no SpaceMouse found; plug it in (`lsusb` shows 256f: or 046d:), check cable and receiver"
        )
    wanted = str(Path(device).resolve()) if device and device.startswith("/") else device
    paths = [path for path, model in found.items() if wanted in (None, path, model)]
    if not paths:
        listed = ", ".join(f"{model} at {path}" for path, model in found.items())
        raise UserError(f"no SpaceMouse '{device}' found; there is {listed}")
    try:
        return pyspacemouse.open_by_path(paths[0], axis_convention=pyspacemouse.AxisConvention.ROS)
    except (RuntimeError, OSError) as error:
        model = found[paths[0]]
        remedy = NO_PERMISSION.format(vendor=pyspacemouse.get_device_specs()[model].vendor_id)
        raise UserError(f"{model} at {paths[0]}: {remedy}") from error


class _Seen(NamedTuple):
    """What the last report left. Replaced as a whole, so that a reader never sees half of a report."""

    reading: MouseReading
    time_s: float  # monotonic


class SpaceMouse:
    """A SpaceMouse in a context manager; `read` never waits.

    A puck at rest says nothing and that is fine; a deflected one repeats itself until it is let go. So a
    reading is stale where reading failed, where the thread hangs, or where a deflected puck fell silent. Once
    it is not looked for any more (`reopen_tries`), `read` raises UserError.
    """

    def __init__(
        self,
        cfg: MouseConfig,
        open_device: "Callable[[], SpaceMouseDevice] | None" = None,
        notice: Callable[[str], None] = say,
    ):
        """open_device: instead of `open_spacemouse`, gives a device in the ROS convention."""
        self.cfg = cfg
        self.num_reports = 0
        self._open_device = open_device or (lambda: open_spacemouse(cfg.device))
        self._seen = _Seen(MouseReading(), time.monotonic())
        self._thread = DeviceThread(
            "SpaceMouse",
            self._open,
            self._drain,
            reopen_tries=cfg.reopen_tries,
            reopen_every_s=cfg.reopen_every_s,
            start_timeout_s=10.0,
            notice=notice,
        )

    def read(self) -> MouseReading:
        if self._thread.gone:
            raise UserError(f"the SpaceMouse is gone ({self._thread.reason}); plug it in and start again")
        reading, time_s = self._seen
        now, limit = time.monotonic(), self.cfg.stale_after_s
        silent = reading.axes.any() and now - time_s > limit
        if self._thread.error is not None or now - self._thread.alive_s > limit or silent:
            return MouseReading(stale=True)
        return MouseReading(reading.axes.copy(), reading.left, reading.right)

    def close(self) -> None:
        self._thread.close()

    def __enter__(self) -> "SpaceMouse":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self) -> "SpaceMouseDevice":
        device = self._open_device()
        buttons = left_and_right(device.info)

        def on_report(state: "SpaceMouseState") -> None:
            self._seen = _Seen(to_reading(state, buttons, self.cfg.deadzone), time.monotonic())
            self.num_reports += 1

        device.configure(callback=on_report)
        self._seen = _Seen(MouseReading(), time.monotonic())
        return device

    def _drain(self, device: "SpaceMouseDevice") -> None:
        for _ in range(MAX_REPORTS):
            before = self.num_reports
            device.read()
            if self.num_reports == before:
                break
        time.sleep(POLL_S)


# ----------------------------------------------------------------------------------------------------
# Reports


def left_and_right(info: "DeviceInfo") -> tuple[int, int] | None:
    """Places of the two buttons in the state's list, None if the model has none."""
    for left, right in BUTTON_PAIRS:
        if left in info.button_names and right in info.button_names:
            return info.button_names.index(left), info.button_names.index(right)
    return None


def to_reading(state: "SpaceMouseState", buttons: tuple[int, int] | None, deadzone: float) -> MouseReading:
    """state: of a device in the ROS convention, buttons: `left_and_right` of it."""
    axes = np.array([sign * getattr(state, name) for name, sign in AXES.items()], np.float32)
    axes = np.where(np.abs(axes) <= deadzone, 0, axes).clip(-1, 1)  # a hard push goes beyond 1
    left, right = (bool(state.buttons[place]) for place in buttons) if buttons else (False, False)
    return MouseReading(axes.astype(np.float32), left, right)


def ros_spec(model: str) -> "DeviceInfo":
    """How that model's reports are laid out, in the ROS convention."""
    import pyspacemouse

    specs = pyspacemouse.get_device_specs()
    if model not in specs:
        raise UserError(f"pyspacemouse knows no model '{model}'; it knows {', '.join(specs)}")
    return pyspacemouse.apply_axis_convention(specs[model], pyspacemouse.AxisConvention.ROS)


def hid_reports(
    axes: Sequence[float], left: bool = False, right: bool = False, model: str = "SpaceMouseCompact"
) -> list[bytes]:
    """The reports with which that model says it is so deflected: `to_reading` the other way round.

    axes (6,) in [-1, 1] in the robot's base frame; kept to 1/350, the device's own step.
    """
    spec = ros_spec(model)
    reports: dict[int, bytearray] = {}

    def report(channel: int) -> bytearray:
        return reports.setdefault(channel, bytearray([channel] + [0] * (spec.bytes_to_read - 1)))

    for (name, sign), value in zip(AXES.items(), axes, strict=True):
        axis = spec.mappings[name]
        raw = round(sign * value * spec.axis_scale / axis.scale)
        low, high = raw.to_bytes(2, "little", signed=True)
        report(axis.channel)[axis.byte1], report(axis.channel)[axis.byte2] = low, high
    for place, pressed in zip(left_and_right(spec) or (), (left, right), strict=False):
        button = spec.button_specs[place]
        report(button.channel)[button.byte] |= pressed << button.bit
    return [bytes(reports[channel]) for channel in sorted(reports)]


# ----------------------------------------------------------------------------------------------------
# Without a hand


class _ReportQueue:
    """What pyspacemouse takes for an open HID device: hands out reports until there are none."""

    def __init__(self):
        self.waiting: list[bytes] = []

    def read(self, size: int) -> bytes:
        return self.waiting.pop(0)[:size] if self.waiting else b""

    def close(self) -> None:
        self.waiting.clear()


class ScriptedMouse:
    """A script instead of a hand: an entry per `read`, a MouseReading or raw reports for the real parser.

    script: a sequence, after whose end the mouse is at rest, or a function of the step number. A raw entry is
    one report, a list of them, or None (nothing new: the puck stays where the last report put it).
    """

    def __init__(self, script: Sequence | Callable[[int], object], model: str = "SpaceMouseCompact"):
        from pyspacemouse import SpaceMouseDevice

        self.num_reports = 0
        self._script, self._step = script, 0
        self._queue = _ReportQueue()
        self._device = SpaceMouseDevice(info=ros_spec(model), device=self._queue)

    def read(self) -> MouseReading:
        entry = self._entry(self._step)
        self._step += 1
        if isinstance(entry, MouseReading):
            return entry
        reports = [entry] if isinstance(entry, bytes) else entry or []
        for report in reports:
            self._queue.waiting.append(report)
            self._device.read()
        self.num_reports += len(reports)
        return to_reading(self._device.read(), left_and_right(self._device.info), deadzone=0.0)

    def _entry(self, step: int) -> object:
        if callable(self._script):
            return self._script(step)
        return self._script[step] if step < len(self._script) else MouseReading()

    def close(self) -> None:
        self._device.close()

    def __enter__(self) -> "ScriptedMouse":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_script(path: str) -> list[list[bytes]]:
    """The reports of each step, from a text file as `MouseConfig.script` says. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [[bytes.fromhex(report) for report in line.split()] for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no script of HID reports, hex with spaces between ({error})") from error


def make_mouse(cfg: MouseConfig) -> SpaceMouse | ScriptedMouse:
    return SpaceMouse(cfg) if cfg.script is None else ScriptedMouse(read_script(cfg.script))
