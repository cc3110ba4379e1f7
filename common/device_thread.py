"""A thread that follows one device and, when it is lost, opens it again a bounded number of times.

Reads of cameras and mice block, stall and fail; the control loop must not. So a thread reads, and the loop
looks at what it left. Whoever uses it asks how old that is: a thread stuck in a driver cannot say so itself.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from common.runtime import UserError

HEALTHY_S = 10.0  # a device that ran for so long gets all its tries again
JOIN_S = 2.0  # how long closing waits for a thread that may be stuck in a driver


class Device(Protocol):
    def close(self) -> None: ...


AnyDevice = TypeVar("AnyDevice", bound=Device)


def say(text: str) -> None:
    """A notice on a line of its own: a progress line without an end may stand on the terminal."""
    print(f"\n{text}", file=sys.stderr, flush=True)


class DeviceThread(Generic[AnyDevice]):
    """Opens a device, calls `step(device)` without end, and reopens it where either raises.

    `error` is what went wrong, None while the device is live; `gone` is True when no more tries follow;
    `alive_s` is when the last step ended (monotonic). `open_device` and `step` run in the thread.
    """

    def __init__(
        self,
        name: str,
        open_device: Callable[[], AnyDevice],
        step: Callable[[AnyDevice], None],
        reopen_tries: int,
        reopen_every_s: float,
        start_timeout_s: float,
        notice: Callable[[str], None] = say,
    ):
        """Returns once the first step is done. UserError if opening or that step raises, without more tries,
        or if they take longer than start_timeout_s.
        """
        self.name, self.notice = name, notice
        self.reopen_tries, self.reopen_every_s = reopen_tries, reopen_every_s
        self.error: Exception | None = None
        self.gone = False
        self.alive_s = time.monotonic()
        self._open_device, self._step = open_device, step
        self._live_since_s: float | None = None
        self._started = False  # the first step is done
        self._settled, self._stop = threading.Event(), threading.Event()  # settled: started, or failed to
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        try:
            if not self._settled.wait(start_timeout_s):
                raise UserError(
                    f"{name} gave nothing within {start_timeout_s:g} s; unplug it and plug it in again"
                )
            if not self._started:
                raise UserError(f"{name}: {self.reason}") from self.error
        except BaseException:  # Ctrl-C included
            self.close()
            raise

    def close(self) -> None:
        """Ends the thread, which closes the device. One stuck in a driver is left to die with the process."""
        self._stop.set()
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        tries_left = self.reopen_tries
        while not self._stop.is_set():
            try:
                self._follow()
            # drivers document no list of what they raise, and a thread that died of it would tell nobody
            except Exception as error:
                was_live = self._live_since_s is not None
                if was_live and time.monotonic() - self._live_since_s > HEALTHY_S:
                    tries_left = self.reopen_tries
                self.error, self._live_since_s = error, None
                if tries_left == 0 or not self._started:
                    break
                if was_live:
                    self.notice(
                        f"{self.name} is lost ({self.reason}); opening it again, {tries_left} tries left"
                    )
                tries_left -= 1
                self._stop.wait(self.reopen_every_s)
        if self._stop.is_set():
            return
        self.gone = True
        if self._started:
            self.notice(
                f"{self.name} is gone ({self.reason}) after {self.reopen_tries} tries to open it again"
            )
        self._settled.set()

    def _follow(self) -> None:
        device = self._open_device()
        try:
            while not self._stop.is_set():
                self._step(device)
                self.alive_s = time.monotonic()
                if self._live_since_s is None:
                    self._live_since_s = self.alive_s
                    self.error = None
                    if self._started:
                        self.notice(f"{self.name} is back")
                    self._started = True
                    self._settled.set()
        finally:
            with contextlib.suppress(
                Exception
            ):  # closing what is unplugged may fail, and nothing is lost by it
                device.close()

    @property
    def reason(self) -> str:
        """`error` on one line, "" while the device is live."""
        if self.error is None:
            return ""
        text = str(self.error).strip().split("\n")[0]
        return text if isinstance(self.error, UserError) else f"{type(self.error).__name__}: {text}"
