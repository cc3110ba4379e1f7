"""Robots that are not there: franky-sim in a process of its own, and SERL's HTTP server in a thread.

Both listen on loopback, are context managers, can be killed in mid-motion and started again at their address.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

from common.arms import Arm

# Ends when its stdin does, and so with the process that started it, however that one ends.
FRANKA_SIM = """
import os, sys, threading
from franky_sim import SimulationServer
from franky_sim.franka_gripper_protocol import GripperCommandStatus
from franky_sim.franka_gripper_server import FrankaGripperServer
from franky_sim.franka_server import BaseCommand
from franky_sim.mujoco_simulator import MujocoSimulator

def end_with_parent():
    sys.stdin.read()
    os._exit(0)

def stop_and_say_so(self, command_id, tcp_socket, stop=FrankaGripperServer.stop):
    # what the protocol has kAborted for; franky-sim leaves the command that it stops without an answer
    if self._pending_command_id is not None:
        BaseCommand.send_response(
            self._pending_tcp_socket, self._pending_command_type, self._pending_command_id,
            GripperCommandStatus.kAborted, command_type_struct="H", status_type_struct="H",
        )
    stop(self, command_id, tcp_socket)

threading.Thread(target=end_with_parent, daemon=True).start()
says, *addresses = sys.argv[1:]
if says == "says_stopped":
    FrankaGripperServer.stop = stop_and_say_so
candidates = {"hostname_candidates": addresses} if addresses else {}
with MujocoSimulator(enable_visualization=False) as sim:
    robot = sim.add_robot()
    with SimulationServer(sim, **candidates) as server:
        print(robot.hostname, flush=True)
        server.run_forever()
"""


class FrankaSim:
    """A simulated Franka Research 3 with a hand, behind libfranka's protocol: `ip` is its address.

    says_stopped: whether a command of the hand that is stopped gets an answer.
    """

    def __init__(self, says_stopped: bool = True):
        self.says_stopped = says_stopped

    def __enter__(self) -> "FrankaSim":
        self._start([])  # it takes the first free address of 127.0.0.0/8
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def _start(self, address: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FRANKA_SIM, "says_stopped" if self.says_stopped else "", *address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ip = self.process.stdout.readline().strip()
        assert self.ip, "franky-sim did not start, see its traceback above"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def start_again(self) -> None:
        self._start([self.ip])


class SerlServer:
    """An arm behind the HTTP protocol of SERL: `url` is its address.

    make_arm is called in the server's thread, which alone touches the arm. `posts` are the names called so
    far; an `answers[name] = (status, text)` goes out in place of the true answer.
    """

    def __init__(self, make_arm: Callable[[], Arm], home_q: list[float]):
        self.make_arm, self.home_q = make_arm, home_q
        self.posts: list[str] = []
        self.answers: dict[str, tuple[int, str]] = {}
        self.stalled = threading.Event()  # set: it takes calls and never answers
        self._port = 0

    def __enter__(self) -> "SerlServer":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def start(self) -> None:
        self._listener = HTTPServer(("127.0.0.1", self._port), self._handler())
        self._port = self._listener.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        self.stalled.clear()
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    def _serve(self) -> None:
        with self.make_arm() as self.arm:
            self._listener.serve_forever(poll_interval=0.01)

    def answer(self, name: str, content: dict) -> str:
        """What SERL's server does and says."""
        if name == "getstate":
            state = self.arm.state()
            arrays = ("pose", "vel", "force", "torque", "q", "dq")
            told = {key: getattr(state, key).tolist() for key in arrays}
            return json.dumps(told | {"jacobian": [[0.0] * 7] * 6, "gripper_pos": state.gripper / 0.08})
        if name == "pose":
            self.arm.move(content["arr"])
        elif name in ("open_gripper", "close_gripper"):
            self.arm.gripper(open=name == "open_gripper")
        elif name == "jointreset":
            self.arm.joint_reset(self.home_q)
        elif name == "clearerr":
            self.arm.recover()
        elif name != "update_param":
            raise KeyError(name)
        return "done"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                name = self.path.strip("/")
                size = int(self.headers.get("Content-Length") or 0)
                content = json.loads(self.rfile.read(size)) if size else {}
                server.posts.append(name)
                while server.stalled.is_set():
                    threading.Event().wait(0.01)
                try:
                    status, text = server.answers.get(name) or (200, server.answer(name, content))
                except KeyError as error:
                    status, text = 404, f"no route {error}"
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                """Silent."""

        return Handler
