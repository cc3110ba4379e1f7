"""The operator's devices: real HID bytes through pyspacemouse's own parser, keys through pseudo-terminals."""

import contextlib
import fcntl
import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyspacemouse
import pytest
from prompt_toolkit.input import create_pipe_input
from pyspacemouse import AxisConvention, SpaceMouseDevice

from common import devices
from common.config import from_dict
from common.device_thread import DeviceThread
from common.devices import (
    DevicesConfig,
    EvdevKeyboard,
    Keyboard,
    KeyboardConfig,
    MouseConfig,
    MouseReading,
    ScriptedKeyboard,
    ScriptedMouse,
    SpaceMouse,
    describe_devices,
    hid_reports,
    make_keyboard,
    make_mouse,
    watch_keyboard,
    watch_mouse,
)
from common.runtime import UserError
from common.spacemouse import open_spacemouse, ros_spec, to_reading

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted(pyspacemouse.get_device_specs())
PATIENCE_S = 10.0

# What a SpaceMouse Compact sends when pushed to the right, forward and down, and turned about all axes.
PUSH = bytes([1]) + b"".join(n.to_bytes(2, "little", signed=True) for n in (350, -175, 35))
TURN = bytes([2]) + b"".join(n.to_bytes(2, "little", signed=True) for n in (70, -70, 350))
LEFT, RIGHT, RELEASED = (bytes([3, bits, 0, 0, 0, 0, 0]) for bits in (1, 2, 0))
LET_GO = [bytes([1] + [0] * 6), bytes([2] + [0] * 6)]
PUSHED_AXES = [-0.5, 1.0, -0.1, 0, 0, 0]  # RLinf's [-y, x, z, -roll, -pitch, -yaw] of its own convention
TURNED_AXES = [0, 0, 0, -0.2, 0.2, -1.0]


class FakeHID:
    """An open HID device: `waiting` reports, then `repeated` ones, until it is `unplugged` or `blocked`."""

    def __init__(self, *repeated: bytes):
        self.waiting: list[bytes] = []
        self.repeated = list(repeated)
        self.unplugged = self.closed = False
        self.blocked = threading.Event()
        self.blocked.set()
        self._next_s = 0.0

    def read(self, size: int) -> bytes:
        self.blocked.wait()
        if self.unplugged:
            raise OSError("No such device")
        if not self.waiting and self.repeated and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 0.005
            self.waiting += self.repeated
        return self.waiting.pop(0)[:size] if self.waiting else b""

    def close(self) -> None:
        self.closed = True


def device_of(hid: FakeHID, model: str = "SpaceMouseCompact") -> SpaceMouseDevice:
    return SpaceMouseDevice(info=ros_spec(model), device=hid)


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.002)


@contextlib.contextmanager
def mouse_on(*hids: FakeHID, **cfg) -> Iterator[tuple[SpaceMouse, list[str]]]:
    """A SpaceMouse that finds these devices, one per opening, then none; and what it says."""
    left, notices = list(hids), []

    def open_device() -> SpaceMouseDevice:
        if not left:
            raise UserError("no SpaceMouse found")
        return device_of(left.pop(0))

    settings = {"stale_after_s": 60.0, "reopen_every_s": 0.01} | cfg
    with SpaceMouse(MouseConfig(**settings), open_device, notices.append) as mouse:
        yield mouse, notices


# ----------------------------------------------------------------------------------------------------
# SpaceMouse: what it reads


def test_axes_and_buttons_are_those_of_the_base_frame():
    hid = FakeHID()
    with mouse_on(hid) as (mouse, _):
        assert mouse.read().axes.tolist() == [0] * 6
        hid.waiting += [PUSH, LEFT]
        wait_until(lambda: mouse.num_reports == 2)
        reading = mouse.read()
        assert reading.axes.dtype == np.float32
        np.testing.assert_allclose(reading.axes, PUSHED_AXES, atol=1e-6)
        assert (reading.left, reading.right, reading.stale) == (True, False, False)
        hid.waiting += [*LET_GO, TURN, RIGHT]
        wait_until(lambda: mouse.num_reports == 6)
        np.testing.assert_allclose(mouse.read().axes, TURNED_AXES, atol=1e-6)
        assert (mouse.read().left, mouse.read().right) == (False, True)
    assert hid.closed


@pytest.mark.parametrize("model", MODELS)
def test_axes_are_the_references_on_every_model(model: str):
    spec, rng = pyspacemouse.get_device_specs()[model], random.Random(0)
    for _ in range(20):
        report = [bytes([channel]) + rng.randbytes(spec.bytes_to_read - 1) for channel in (1, 2)]
        states = []
        for info in (pyspacemouse.apply_axis_convention(spec, AxisConvention.LEGACY), ros_spec(model)):
            hid = FakeHID()
            hid.waiting += report
            device = SpaceMouseDevice(info=info, device=hid)
            device.read()
            states.append(device.read())
        old = states[0]
        expected = np.clip([-old.y, old.x, old.z, -old.roll, -old.pitch, -old.yaw], -1, 1)
        np.testing.assert_allclose(to_reading(states[1], None, deadzone=0.0).axes, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "left", "right"),
    [
        ("SpaceMouseCompact", "LEFT", "RIGHT"),
        ("UniversalReceiver", "MENU", "FIT"),
        ("SpaceMouseEnterprise", "MENU", "FIT"),  # its RIGHT is the key of the right view
        ("SpaceExplorer", "BTN_1", "BTN_2"),
    ],
)
def test_buttons_are_found_by_name_however_many_there_are(model: str, left: str, right: str):
    names = ros_spec(model).button_names
    for report, pressed in ((LEFT, left), (RIGHT, right)):
        hid = FakeHID()
        hid.waiting.append(report)
        device = device_of(hid, model)
        assert [name for name, is_down in zip(names, device.read().buttons, strict=True) if is_down] == [
            pressed
        ]
        mouse = ScriptedMouse([report], model)
        reading = mouse.read()
        assert (reading.left, reading.right) == (pressed == left, pressed == right)


def test_a_model_without_buttons_has_none_pressed():
    reading = ScriptedMouse([[PUSH, LEFT]], "SpaceMouseUSB").read()
    assert (reading.left, reading.right) == (False, False)
    np.testing.assert_allclose(reading.axes, PUSHED_AXES, atol=1e-6)


def test_small_deflections_are_none_and_a_hard_push_is_one():
    report = bytes([1]) + b"".join(n.to_bytes(2, "little", signed=True) for n in (35, 36, 500))
    hid = FakeHID()
    hid.waiting.append(report)
    with mouse_on(hid, deadzone=0.1) as (mouse, _):
        wait_until(lambda: mouse.num_reports == 1)
        np.testing.assert_allclose(mouse.read().axes, [36 / 350, 0, -1, 0, 0, 0], atol=1e-6)


def test_what_a_reader_was_given_does_not_change():
    hid = FakeHID(PUSH)
    with mouse_on(hid) as (mouse, _):
        wait_until(lambda: mouse.num_reports > 0)
        reading = mouse.read()
        reading.axes[:] = 7
        np.testing.assert_allclose(mouse.read().axes, PUSHED_AXES, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# SpaceMouse: when it is lost


def test_unplugged_while_deflected_moves_nothing_from_then_on():
    hid = FakeHID(PUSH, LEFT)
    with mouse_on(hid, reopen_tries=2, reopen_every_s=0.5) as (mouse, notices):
        wait_until(lambda: mouse.read().left and mouse.read().axes.any())
        hid.unplugged = True
        wait_until(lambda: mouse.read().stale)  # at once, not after the 60 s of silence set here
        reading = mouse.read()
        assert reading.stale
        assert not reading.axes.any()
        assert not reading.left
        wait_until(lambda: len(notices) == 2)
        with pytest.raises(UserError, match=r"the SpaceMouse is gone \(no SpaceMouse found\); plug it in"):
            mouse.read()
    assert hid.closed
    assert notices == [
        "SpaceMouse is lost (OSError: No such device); opening it again, 2 tries left",
        "SpaceMouse is gone (no SpaceMouse found) after 2 tries to open it again",
    ]


def test_plugged_in_again_it_is_at_rest_and_then_moves_on():
    first, second = FakeHID(PUSH), FakeHID()
    with mouse_on(first, second) as (mouse, notices):
        wait_until(lambda: mouse.read().axes.any())
        first.unplugged = True
        wait_until(lambda: notices[-1:] == ["SpaceMouse is back"])
        wait_until(lambda: not mouse.read().stale)
        assert not mouse.read().axes.any()
        second.waiting.append(TURN)
        wait_until(lambda: bool(mouse.read().axes.any()))
        np.testing.assert_allclose(mouse.read().axes, TURNED_AXES, atol=1e-6)


def test_a_deflected_mouse_that_falls_silent_is_stale_and_lives_again_with_its_next_report():
    hid = FakeHID(PUSH)
    with mouse_on(hid, stale_after_s=0.2) as (mouse, notices):
        wait_until(lambda: bool(mouse.read().axes.any()))
        hid.repeated = []
        wait_until(lambda: mouse.read().stale)
        assert not mouse.read().axes.any()
        hid.waiting += LET_GO
        wait_until(lambda: not mouse.read().stale)
    assert notices == []


def test_a_mouse_at_rest_says_nothing_and_is_not_stale():
    hid = FakeHID()
    with mouse_on(hid, stale_after_s=0.2) as (mouse, _):
        hid.waiting += [PUSH, RIGHT, *LET_GO]  # the button is held: no more reports of that either
        wait_until(lambda: mouse.num_reports == 4)
        time.sleep(0.4)
        wait_until(lambda: not mouse.read().stale)
        assert mouse.read().right


def test_a_driver_that_hangs_is_stale():
    hid = FakeHID()
    with mouse_on(hid, stale_after_s=0.2) as (mouse, _):
        hid.waiting.append(RIGHT)
        wait_until(lambda: mouse.read().right)
        hid.blocked.clear()
        wait_until(lambda: mouse.read().stale)
        assert not mouse.read().right
        hid.blocked.set()
        wait_until(lambda: mouse.read().right)


def test_a_device_that_never_stops_talking_is_followed():
    class Chatterbox(FakeHID):
        def read(self, size: int) -> bytes:
            return PUSH

    with mouse_on(Chatterbox(), stale_after_s=5.0) as (mouse, _):
        wait_until(lambda: mouse.num_reports > 200)
        assert not mouse.read().stale


def test_closing_ends_the_thread():
    with mouse_on(FakeHID()):
        assert "SpaceMouse" in [thread.name for thread in threading.enumerate()]
    assert "SpaceMouse" not in [thread.name for thread in threading.enumerate()]


# ----------------------------------------------------------------------------------------------------
# SpaceMouse: what opening says


@pytest.fixture
def plugged_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Path -> model of what the system shows; opening hands out a FakeHID."""
    found = {"/dev/hidraw3": "UniversalReceiver", "/dev/hidraw5": "SpaceMouseCompact"}

    def open_by_path(path: str, axis_convention: AxisConvention) -> SpaceMouseDevice:
        assert axis_convention is AxisConvention.ROS
        return device_of(FakeHID(), found[path])

    monkeypatch.setattr(pyspacemouse, "get_connected_devices_by_path", lambda: found)
    monkeypatch.setattr(pyspacemouse, "open_by_path", open_by_path)
    return found


@pytest.mark.parametrize(
    ("device", "model"),
    [
        (None, "UniversalReceiver"),
        ("SpaceMouseCompact", "SpaceMouseCompact"),
        ("/dev/hidraw5", "SpaceMouseCompact"),
    ],
)
def test_opens_the_model_or_path_asked_for(plugged_in: dict[str, str], device: str | None, model: str):
    assert open_spacemouse(device).name == model


def test_one_that_is_not_there_is_an_error_that_lists_what_is(plugged_in: dict[str, str]):
    with pytest.raises(
        UserError, match="no SpaceMouse 'SpacePilot' found; there is UniversalReceiver at /dev/hidraw3, Space"
    ):
        open_spacemouse("SpacePilot")
    plugged_in.clear()
    with pytest.raises(UserError, match="SpaceMouse: no SpaceMouse found; plug it in"):
        make_mouse(MouseConfig())


def test_no_permission_prints_the_udev_rule(plugged_in: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, axis_convention: AxisConvention):
        raise RuntimeError("Failed to open device")

    monkeypatch.setattr(pyspacemouse, "open_by_path", refuse)
    rule = 'SUBSYSTEM=="hidraw", ATTRS{idVendor}=="256f", MODE="0664", GROUP="input", TAG+="uaccess"'
    with pytest.raises(UserError) as error:
        open_spacemouse(None)
    assert rule in str(error.value)
    assert str(error.value).startswith("UniversalReceiver at /dev/hidraw3: found, but it cannot be opened")


def test_a_missing_hidapi_names_the_package(monkeypatch: pytest.MonkeyPatch):
    def no_library():
        raise RuntimeError("HID API is probably not installed.")

    monkeypatch.setattr(pyspacemouse, "get_connected_devices_by_path", no_library)
    with pytest.raises(UserError, match="sudo apt install libhidapi-hidraw0"):
        open_spacemouse(None)


# ----------------------------------------------------------------------------------------------------
# Scripts


@pytest.mark.parametrize("model", [model for model in MODELS if model != "SpaceMouseUSB"])
def test_reports_made_for_a_motion_are_read_back_as_it(model: str):
    axes = np.array([-350, 175, 35, 1, -70, 0]) / 350
    reading = ScriptedMouse([hid_reports(axes, left=True, model=model)], model).read()
    np.testing.assert_allclose(reading.axes, axes, atol=1e-6)
    assert (reading.left, reading.right, reading.stale) == (True, False, False)


def test_reports_made_are_those_of_the_real_thing():
    axes = [a + b for a, b in zip(PUSHED_AXES, TURNED_AXES, strict=True)]
    assert hid_reports(axes, right=True) == [PUSH, TURN, RIGHT]


def test_a_scripted_mouse_reads_an_entry_per_step_and_then_rests():
    given = MouseReading(np.ones(6, np.float32), left=True)
    mouse = ScriptedMouse([PUSH, None, [*LET_GO, LEFT], given])
    for axes, left in (
        (PUSHED_AXES, False),
        (PUSHED_AXES, False),
        ([0] * 6, True),
        ([1] * 6, True),
        ([0] * 6, False),
    ):
        reading = mouse.read()
        np.testing.assert_allclose(reading.axes, axes, atol=1e-6)
        assert reading.left == left
    assert mouse.num_reports == 4


def test_a_scripted_mouse_may_be_a_function_of_the_step():
    with ScriptedMouse(lambda step: hid_reports([step / 2, 0, 0, 0, 0, 0])) as mouse:
        assert [mouse.read().axes[0] for _ in range(3)] == [0, 0.5, 1]


def test_a_script_is_read_from_a_text_file(tmp_path: Path):
    script = tmp_path / "push.txt"
    script.write_text(f"{PUSH.hex()} {LEFT.hex()}\n\n{LET_GO[0].hex()}\n")
    mouse = make_mouse(MouseConfig(backend="scripted", script=str(script)))
    readings = [mouse.read() for _ in range(3)]
    np.testing.assert_allclose([r.axes for r in readings], [PUSHED_AXES, PUSHED_AXES, [0] * 6], atol=1e-6)
    script.write_text("push left\n")
    with pytest.raises(UserError, match=r"push.txt is no script of HID reports, hex with spaces between"):
        make_mouse(MouseConfig(backend="scripted", script=str(script)))


def test_a_scripted_keyboard_reads_an_entry_per_step_and_then_nothing():
    with make_keyboard(KeyboardConfig(backend="scripted", keys=["", "ca", " "])) as keyboard:
        assert [keyboard.read() for _ in range(4)] == [[], ["c", "a"], [" "], []]
    keyboard = ScriptedKeyboard(lambda step: ["c-c"] if step == 1 else ["c"])
    assert keyboard.read() == ["c"]
    with pytest.raises(KeyboardInterrupt):
        keyboard.read()


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"mouse": {"script": "x.txt"}}, "section 'mouse': `script` goes with `backend: scripted`"),
        ({"mouse": {"deadzone": 1}}, r"deadzone must be in \[0, 1\), got 1.0"),
        ({"keyboard": {"backend": "scripted"}}, "section 'keyboard': `keys` goes with `backend: scripted`"),
        (
            {"keyboard": {"device": "/dev/input/event1"}},
            "`device` goes with `backend: evdev`, not with 'terminal'",
        ),
    ],
)
def test_settings_check_themselves(section: dict, fault: str):
    with pytest.raises(UserError, match=fault):
        from_dict(DevicesConfig, section, "x.yaml")


# ----------------------------------------------------------------------------------------------------
# Keyboard


def test_keys_come_in_order_and_once():
    with create_pipe_input() as terminal, Keyboard(terminal) as keyboard:
        assert keyboard.read() == []
        terminal.send_text("c c\r\x1b[A")
        assert keyboard.read() == ["c", " ", "c", "c-m", "up"]
        assert keyboard.read() == []
        terminal.send_text("\x1b")
        assert keyboard.read() + keyboard.read() == ["escape"]


def test_ctrl_c_in_the_stream_stops():
    with create_pipe_input() as terminal, Keyboard(terminal) as keyboard:
        terminal.send_text("c\x03")
        with pytest.raises(KeyboardInterrupt):
            keyboard.read()


def test_a_terminal_that_went_away_is_an_error():
    with create_pipe_input() as terminal, Keyboard(terminal) as keyboard:
        terminal.close()
        with pytest.raises(UserError, match="the terminal with the keyboard is gone"):
            keyboard.read()


def test_no_terminal_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with Path("/dev/null").open() as null:
        monkeypatch.setattr(sys, "stdin", null)
        with pytest.raises(UserError, match="standard input is none"):
            make_keyboard(KeyboardConfig())
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is none"):
        make_keyboard(KeyboardConfig())


def test_a_process_in_the_background_is_told_so(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp() + 1)
        with pytest.raises(UserError, match="runs in its background"):
            Keyboard()


class Terminal:
    """A pseudo-terminal with a Python program in it, as in a terminal window or over SSH."""

    PRELUDE = "import sys, time\nfrom common.devices import Keyboard\nprint('start')\n"

    def __init__(self, program: str, controlling: bool = True):
        self.ours, theirs = pty.openpty()
        self.theirs = theirs
        self.before = termios.tcgetattr(theirs)
        self.output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", self.PRELUDE + program],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if controlling else None,
        )

    def wait_for(self, text: bytes) -> None:
        end_s = time.monotonic() + 3 * PATIENCE_S
        while text not in self.output:
            assert time.monotonic() < end_s, f"waited in vain for {text!r}, got {self.output!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                self.output += os.read(self.ours, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def exit_code(self) -> int:
        return self.process.wait(3 * PATIENCE_S)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


ECHO_KEYS = """
with Keyboard() as keyboard:
    print('ready')
    while True:
        for key in keyboard.read():
            print('key', repr(key))
        time.sleep(0.01)
"""


def test_a_real_terminal_gives_keys_without_echo_keeps_line_ends_and_is_restored_by_ctrl_c():
    with Terminal(ECHO_KEYS) as terminal:
        terminal.wait_for(b"ready\r\n")
        during = termios.tcgetattr(terminal.theirs)
        assert not during[3] & (termios.ICANON | termios.ECHO)
        terminal.type(b"c a\x1a")  # the last one is Ctrl-Z, which must not stop the loop of an arm
        terminal.wait_for(b"key 'c-z'\r\n")
        lines = [b"start", b"ready", b"key 'c'", b"key ' '", b"key 'a'", b"key 'c-z'", b""]
        assert terminal.output.split(b"\r\n") == lines
        assert b"\n" not in terminal.output.replace(b"\r\n", b"")
        terminal.type(b"\x03")
        assert terminal.exit_code() == -signal.SIGINT
        assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_ctrl_c_ends_a_long_wait_between_two_reads():
    # many short waits: a signal that comes just before one begins is only seen when it ends
    program = "with Keyboard() as keyboard:\n    print('ready')\n    while True:\n        time.sleep(0.01)\n"
    with Terminal(program) as terminal:
        terminal.wait_for(b"ready\r\n")
        terminal.type(b"\x03")
        assert terminal.exit_code() == -signal.SIGINT
        assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_ctrl_c_arrives_where_the_terminal_cannot_signal_the_process():
    with Terminal(ECHO_KEYS, controlling=False) as terminal:
        terminal.wait_for(b"ready\r\n")
        terminal.type(b"c\x03")
        assert terminal.exit_code() == -signal.SIGINT
        assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_an_exception_restores_the_terminal_and_drops_keys_nobody_read():
    program = """
with Keyboard() as keyboard:
    print('ready')
    while not keyboard.read():
        time.sleep(0.01)
    print('typing')
    sys.stdout.flush()
    time.sleep(1)
    1 / 0
"""
    with Terminal(program) as terminal:
        terminal.wait_for(b"ready\r\n")
        terminal.type(b"c")
        terminal.wait_for(b"typing\r\n")
        terminal.type(b"ccc\n")
        assert terminal.exit_code() == 1
        terminal.wait_for(b"ZeroDivisionError")
        assert termios.tcgetattr(terminal.theirs) == terminal.before
        assert select.select([terminal.theirs], [], [], 0)[0] == []


# ----------------------------------------------------------------------------------------------------
# Pedals


class FakeEvdev(types.ModuleType):
    """evdev with input devices path -> (name, its keys); `events` are handed out to whoever reads."""

    ecodes = types.SimpleNamespace(
        EV_KEY=1,
        KEY_A=30,
        KEY_C=46,
        KEY={30: "KEY_A", 46: "KEY_C", 57: "KEY_SPACE", 113: ("KEY_MUTE", "KEY_MIN")},
    )

    def __init__(self, **found: list[int]):
        super().__init__("evdev")
        self.found = {f"/dev/input/{name}": keys for name, keys in found.items()}
        self.events: list[tuple[int, int, int]] = []
        self.unplugged = False

    def list_devices(self) -> list[str]:
        return list(self.found)

    def InputDevice(self, path: str):
        if path not in self.found:
            raise FileNotFoundError(2, "No such file or directory")

        def read_one():
            if self.unplugged:
                raise OSError(19, "No such device")
            if not self.events:
                return None
            kind, code, value = self.events.pop(0)
            return types.SimpleNamespace(type=kind, code=code, value=value)

        return types.SimpleNamespace(
            path=path,
            name=f"Pedal {path[-1]}",
            capabilities=lambda: {1: self.found[path]},
            read_one=read_one,
            close=lambda: None,
        )


def test_a_pedal_gives_presses_and_repeats_by_the_terminals_names(monkeypatch: pytest.MonkeyPatch):
    evdev = FakeEvdev(event0=[113], event1=[30, 46, 57])
    monkeypatch.setitem(sys.modules, "evdev", evdev)
    with make_keyboard(KeyboardConfig(backend="evdev")) as keyboard:
        assert keyboard.read() == []
        # press c, repeat, release; a synchronisation event; space; a key of two names; one without
        evdev.events += [(1, 46, 1), (1, 46, 2), (1, 46, 0), (0, 0, 0), (1, 57, 1), (1, 113, 1), (1, 999, 1)]
        assert keyboard.read() == ["c", "c", " ", "mute", "999"]
        evdev.unplugged = True
        with pytest.raises(UserError, match="keyboard /dev/input/event1 is gone"):
            keyboard.read()


@pytest.mark.parametrize(
    ("found", "path", "fault"),
    [
        ({}, None, "no keyboard found in /dev/input"),
        ({"event0": [113]}, None, "no keyboard found in /dev/input"),
        (
            {"event1": [30, 46], "event2": [30, 46]},
            None,
            r"several keyboards: /dev/input/event1 \(Pedal 1\), /dev/input/event2 \(Pedal 2\); name one",
        ),
        ({}, "/dev/input/event7", r"/dev/input/event7 cannot be opened \(No such file or directory\)"),
    ],
)
def test_which_pedal_is_never_guessed(
    monkeypatch: pytest.MonkeyPatch, found: dict, path: str | None, fault: str
):
    monkeypatch.setitem(sys.modules, "evdev", FakeEvdev(**found))
    with pytest.raises(UserError, match=fault):
        EvdevKeyboard(path)


def test_evdev_missing_names_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "evdev", None)
    with pytest.raises(UserError, match="`pip install evdev`"):
        EvdevKeyboard()


# ----------------------------------------------------------------------------------------------------
# What --check says


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only moves when somebody sleeps."""
    now_s = [0.0]
    clock = types.SimpleNamespace(
        monotonic=lambda: now_s[0], sleep=lambda seconds: now_s.__setitem__(0, now_s[0] + seconds)
    )
    monkeypatch.setattr(devices, "time", clock)


def test_watching_a_mouse_shows_changes_and_what_never_moved(no_waiting: None):
    mouse = ScriptedMouse([[], [PUSH, TURN], [PUSH, TURN], LET_GO, LEFT, MouseReading(stale=True)])
    assert list(watch_mouse(mouse, seconds=0.55)) == [
        "x +0.0  y +0.0  z +0.0  roll +0.0  pitch +0.0  yaw +0.0",
        "x -0.5  y +1.0  z -0.1  roll -0.2  pitch +0.2  yaw -1.0",
        "x +0.0  y +0.0  z +0.0  roll +0.0  pitch +0.0  yaw +0.0",
        "x +0.0  y +0.0  z +0.0  roll +0.0  pitch +0.0  yaw +0.0  left",
        "lost: no live device",
        "SpaceMouse: 7 reports, about 35 reports/s while deflected",
        "SpaceMouse: never moved: right button",
    ]


def test_watching_a_keyboard_shows_keys(no_waiting: None):
    lines = list(watch_keyboard(ScriptedKeyboard(["c", "", " a"]), seconds=0.5))
    assert lines == ["key 'c'", "key ' '", "key 'a'", "keyboard: 3 keys"]


def test_a_check_goes_on_past_what_is_missing(no_waiting: None, plugged_in: dict[str, str]):
    keyboard = KeyboardConfig(backend="scripted", keys=["q"])
    lines = list(describe_devices(DevicesConfig(keyboard=keyboard), seconds=0.25))
    assert lines == [
        "SpaceMouse: UniversalReceiver at /dev/hidraw3",
        "SpaceMouse: SpaceMouseCompact at /dev/hidraw5",
        "SpaceMouse: move all six axes and press both buttons (0.25 s)",
        "x +0.0  y +0.0  z +0.0  roll +0.0  pitch +0.0  yaw +0.0",
        "SpaceMouse: 0 reports",
        "SpaceMouse: never moved: x, y, z, roll, pitch, yaw, left button, right button",
        "keyboard (scripted): press some keys (0.25 s)",
        "key 'q'",
        "keyboard: 1 keys",
    ]
    plugged_in.clear()
    lines = list(describe_devices(DevicesConfig(keyboard=keyboard), seconds=0.25))
    assert lines[0].startswith("SpaceMouse: no SpaceMouse found; plug it in")
    assert lines[1:] == ["keyboard (scripted): press some keys (0.25 s)", "key 'q'", "keyboard: 1 keys"]


# ----------------------------------------------------------------------------------------------------
# The thread under mice and cameras


class Closable:
    closed = False

    def close(self) -> None:
        self.closed = True
        raise OSError("already unplugged")


def test_a_device_that_always_fails_after_opening_is_given_up_too():
    opened, notices = [], []

    def open_device() -> Closable:
        opened.append(Closable())
        return opened[-1]

    def step(device: Closable) -> None:
        if len(device.__dict__) > 0:
            raise OSError("unplugged")
        device.seen = True

    thread = DeviceThread("toy", open_device, step, 3, 0.0, PATIENCE_S, notices.append)
    wait_until(lambda: thread.gone)
    assert len(opened) == 4
    assert all(device.closed for device in opened)
    assert notices == [
        "toy is lost (OSError: unplugged); opening it again, 3 tries left",
        "toy is back",
        "toy is lost (OSError: unplugged); opening it again, 2 tries left",
        "toy is back",
        "toy is lost (OSError: unplugged); opening it again, 1 tries left",
        "toy is back",
        "toy is gone (OSError: unplugged) after 3 tries to open it again",
    ]
    thread.close()


def test_tries_are_for_one_loss_where_the_device_ran_well_in_between(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.device_thread.HEALTHY_S", 0.0)
    opened, notices = [], []

    def open_device() -> Closable:
        opened.append(Closable())
        if len(opened) == 6:
            raise OSError("for good")
        return opened[-1]

    def step(device: Closable) -> None:
        if len(device.__dict__) > 0:
            time.sleep(0.001)
            raise OSError("unplugged")
        device.seen = True

    thread = DeviceThread("toy", open_device, step, 1, 0.0, PATIENCE_S, notices.append)
    wait_until(lambda: thread.gone)
    assert len(opened) == 6
    thread.close()


def test_a_first_opening_that_fails_or_hangs_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.device_thread.JOIN_S", 0.05)

    def refuse() -> Closable:
        raise OSError("no such device\nand more about it")

    with pytest.raises(UserError, match=r"^toy: OSError: no such device$"):
        DeviceThread("toy", refuse, lambda device: None, 3, 0.0, PATIENCE_S)
    release = threading.Event()

    def hang() -> Closable:
        release.wait(PATIENCE_S)
        return Closable()

    with pytest.raises(UserError, match=r"toy gave nothing within 0\.05 s"):
        DeviceThread("toy", hang, lambda device: None, 3, 0.0, 0.05)
    release.set()
