"""A child process that cannot be lost: spawned, joined, its errors raised in the parent.

Spawned because CUDA and Vulkan do not survive a fork. The child ignores Ctrl-C (its parent asks it to stop),
ends when its parent does, and sends its traceback up before it dies.
"""

import contextlib
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import torch.multiprocessing as mp

from common.runtime import UserError, set_threads


class WorkerError(RuntimeError):
    """A child process failed; the message carries its traceback."""


class Child:
    """A spawned process running `target(connection, *args)`; `daemon=False` where it has children itself."""

    def __init__(self, name: str, target: Callable, args: tuple = (), daemon: bool = True):
        context = mp.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_run_child, args=(target, theirs, *args), name=name, daemon=daemon
        )
        with _ctrl_c_held_back():
            self.process.start()
        theirs.close()

    def send(self, message) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            while True:  # past the answers that nobody has read yet, to what the child said last
                self.receive()

    def receive(self):
        """The next message. WorkerError if the child failed or died; UserError if it raised one."""
        wait([self.connection, self.process.sentinel])
        try:
            if not self.connection.poll():
                raise EOFError
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(2)
            raise WorkerError(f"{self.name} died with exit code {self.process.exitcode}") from None
        if kind == "user error":
            raise UserError(content)
        if kind == "error":
            raise WorkerError(f"{self.name} failed:\n{content}")
        return content

    def has_message(self) -> bool:
        """True where `receive` would not wait: a message, or a child that has ended."""
        return bool(wait([self.connection, self.process.sentinel], timeout=0))

    def hang_up(self) -> None:
        """Tell the child to end, without waiting for it: its next recv ends it."""
        self.connection.close()

    def close(self) -> None:
        self.hang_up()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A process started in here never sees Ctrl-C, not even while it imports; ours waits until the end."""
    resource_tracker.ensure_running()  # it would start in here, and unblock the signal again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_child(target: Callable, connection: Connection, *args) -> None:
    set_threads(1)
    try:
        target(connection, *args)
    except Exception as error:
        user = isinstance(error, UserError)
        report = ("user error", str(error)) if user else ("error", traceback.format_exc())
        # an OSError here: the parent has closed its end or is gone, which is also what ended `target`
        with contextlib.suppress(OSError):
            connection.send(report)
