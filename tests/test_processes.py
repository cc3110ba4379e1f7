"""Child processes: what they say reaches the parent, and nothing of them is left behind.

The children are spawned together at the start: each pays for importing torch, and they do so side by side.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest

from common.processes import Child, WorkerError, _run_child
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("echo", "failing", "mistaken", "killed")


def serve(connection: Connection) -> None:
    """Answers `(what, value)`, or does what it is told to."""
    while True:
        what, value = connection.recv()
        if what == "raise":
            raise ZeroDivisionError(f"told to: {value}")
        if what == "user error":
            raise UserError(value)
        if what == "end of file":
            raise EOFError(value)
        if what == "sleep":
            time.sleep(value)
        connection.send(("ok", (what, value)))


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, Child]]:
    children = {name: Child(name, serve) for name in NAMES}
    for child in children.values():
        child.send(("hello", child.name))
    for child in children.values():
        assert child.receive() == ("hello", child.name)
    yield children
    for child in children.values():
        child.close()


def test_messages_go_both_ways_in_order(children: dict[str, Child]):
    child = children["echo"]
    assert not child.has_message()
    for value in range(3):
        child.send(("number", value))
    assert [child.receive() for _ in range(3)] == [("number", 0), ("number", 1), ("number", 2)]
    assert not child.has_message()


def test_an_error_of_the_child_is_raised_in_the_parent_with_its_traceback(children: dict[str, Child]):
    """By `send` too, which once took an answer that nobody had read yet for the child's last words."""
    child = children["failing"]
    for value in range(2):
        child.send(("number", value))
    child.send(("raise", 7))
    child.process.join(10)
    with pytest.raises(WorkerError, match="ZeroDivisionError: told to: 7") as caught:
        child.send(("number", 2))
    message = str(caught.value)
    assert message.startswith("failing failed:\nTraceback")
    assert "in serve" in message


def test_a_user_error_of_the_child_stays_one(children: dict[str, Child]):
    child = children["mistaken"]
    child.send(("user error", "no such thing; choose another"))
    with pytest.raises(UserError, match=r"^no such thing; choose another$"):
        child.receive()


def test_a_killed_child_is_noticed_within_two_seconds(children: dict[str, Child]):
    child = children["killed"]
    child.send(("sleep", 60))
    start = time.monotonic()
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"^killed died with exit code -9$"):
        child.receive()
    assert time.monotonic() - start < 2
    assert child.has_message()  # whoever asks before it waits is told not to wait


def test_closing_a_busy_child_leaves_no_process_and_no_noise(children: dict[str, Child], capfd):
    child = children["echo"]
    child.send(("sleep", 0.3))  # its answer will find the pipe closed
    child.close()
    assert child.process.exitcode == 0
    assert not Path(f"/proc/{child.process.pid}").exists()
    assert capfd.readouterr().err == ""


def test_an_end_of_file_met_by_the_child_is_its_error():
    """A truncated file raises EOFError as a closed pipe does; it was taken for the parent's farewell."""
    ours, theirs = Pipe()
    ours.send(("end of file", "truncated.pt"))
    _run_child(serve, theirs)
    kind, message = ours.recv()
    assert kind == "error"
    assert message.endswith("EOFError: truncated.pt\n")


# ----------------------------------------------------------------------------------------------------
# What happens to the children when something happens to the parent
# ----------------------------------------------------------------------------------------------------

PARENT = """
import sys, time
sys.path[:0] = {path!r}
from common.processes import Child
from test_processes import serve

if __name__ == "__main__":
    child = Child("child", serve)
    print(child.process.pid, flush=True)
    try:
        if {wait_for_it}:
            child.send(("hello", 0))
            print(child.receive(), flush=True)
        time.sleep(60)
    finally:
        child.close()
"""


def start_parent(tmp_path: Path, wait_for_it: bool) -> tuple[subprocess.Popen, int]:
    """A program with a child, in a process group of its own. -> it, the child's process id."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=[str(ROOT), str(ROOT / "tests")], wait_for_it=wait_for_it))
    pipe = subprocess.PIPE
    parent = subprocess.Popen(
        [sys.executable, script], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    return parent, int(parent.stdout.readline())


def is_gone_within(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def test_ctrl_c_while_the_child_still_imports_ends_it_quietly(tmp_path: Path):
    """Ctrl-C reaches the whole process group; children that were importing printed a traceback each."""
    parent, child = start_parent(tmp_path, wait_for_it=False)
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)
    _, stderr = parent.communicate(timeout=30)
    assert is_gone_within(child, 2)
    assert stderr.count("Traceback") == 1, stderr  # the parent's own
    assert stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path):
    parent, child = start_parent(tmp_path, wait_for_it=True)
    assert parent.stdout.readline() == "('hello', 0)\n"
    os.kill(parent.pid, signal.SIGKILL)
    assert is_gone_within(child, 5)
    assert parent.communicate(timeout=5) == ("", "")
