"""An arm behind the HTTP server of SERL / HIL-SERL (https://github.com/rail-berkeley/hil-serl).

Every call is a POST to the server's own names, JSON both ways; a state is one `getstate`. The protocol knows
no authentication: use it on loopback or a cable of its own.
"""

import http.client
import json
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import numpy as np

from common.arm_protocol import ArmError, RobotState, check_joints, check_pose
from common.runtime import UserError

RESET_TOLERANCE_RAD = 0.1  # SERL's own joint controller stops within about 0.05
STATE_SIZES = {"pose": 7, "vel": 6, "force": 3, "torque": 3, "q": 7, "dq": 7}


@dataclass
class SerlHttpArmConfig:
    backend: Literal["serl_http"] = "serl_http"
    url: str = "http://127.0.0.1:5000"
    timeout_s: float = 1.0  # of one call
    reset_timeout_s: float = 60.0  # of a joint reset, which the server answers when it is done
    gripper_scale_m: float = 0.08  # opening where `gripper_pos` is 1; a first SERL server tells metres: 1.0
    # Sent to `update_param`, as in SERL: translational_stiffness, translational_clip_x, ...; {}: the server's
    compliance: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url must look like http://127.0.0.1:5000, got '{self.url}'")
        if min(self.timeout_s, self.reset_timeout_s, self.gripper_scale_m) <= 0:
            raise ValueError("timeout_s, reset_timeout_s and gripper_scale_m must be positive")


class SerlHttpArm:
    """See common/arm_protocol.py. UserError if nothing answers at `url`."""

    simulated = False

    def __init__(self, cfg: SerlHttpArmConfig, take_control: bool = True):
        """take_control: False leaves the arm and its errors as they are, to read its state."""
        self.cfg = cfg
        parts = urlsplit(cfg.url)
        self.address, self.path = (parts.hostname, parts.port or 80), parts.path.rstrip("/")
        if not take_control:
            return
        try:
            self._begin()
        except ArmError as error:
            raise UserError(str(error)) from error

    def state(self) -> RobotState:
        url, answer = f"{self.cfg.url}/getstate", self._post("getstate")
        try:
            told = json.loads(answer)
            arrays = {name: np.array(told[name], dtype=np.float64) for name in STATE_SIZES}
            gripper_pos = float(told["gripper_pos"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArmError(f"{url} answers {answer[:80]!r}, no state of a SERL server ({error!r})") from error
        for name, size in STATE_SIZES.items():
            if arrays[name].shape != (size,) or not np.isfinite(arrays[name]).all():
                raise ArmError(f"{url}: '{name}' must be {size} finite numbers, got {told[name]}")
        return RobotState(**arrays, gripper=gripper_pos * self.cfg.gripper_scale_m)

    def move(self, pose: np.ndarray) -> None:
        self._post("pose", {"arr": check_pose(pose).tolist()})

    def gripper(self, open: bool) -> None:
        self._post("open_gripper" if open else "close_gripper")

    def joint_reset(self, q: np.ndarray) -> None:
        """The server goes where it was told at its start; ArmError if that is not q."""
        q = check_joints(q)
        self._post("jointreset", timeout_s=self.cfg.reset_timeout_s)
        reached = self.state().q
        if np.abs(reached - q).max() > RESET_TOLERANCE_RAD:
            raise ArmError(
                f"{self.cfg.url}/jointreset brought the joints to {reached.round(2).tolist()}, not to "
                f"{q.round(2).tolist()}: start the server with these as --reset_joint_target, or run it "
                "again if the arm was held up"
            )

    def stop(self) -> None:
        """The protocol knows no stop of the fingers: they go on."""
        self.move(self.state().pose)

    def recover(self) -> None:
        self._begin()

    def close(self) -> None:
        """Nothing stays open between two calls; the server holds the arm at its last target."""

    def __enter__(self) -> "SerlHttpArm":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _begin(self) -> None:
        self._post("clearerr")
        if self.cfg.compliance:
            self._post("update_param", self.cfg.compliance)
        self.stop()  # where the arm was pushed to meanwhile, not at the target of before

    def _post(self, name: str, content: dict | None = None, timeout_s: float | None = None) -> str:
        """The answer's text. ArmError for silence, and for any answer but 200."""
        url = f"{self.cfg.url}/{name}"
        # not urllib: it would send calls to the robot through the proxy of the environment
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s or self.cfg.timeout_s)
        try:
            body = None if content is None else json.dumps(content)
            headers = {"Content-Type": "application/json"} if body else {"Content-Length": "0"}
            connection.request("POST", f"{self.path}/{name}", body, headers)
            response = connection.getresponse()
            answer = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ArmError(
                f"{url} does not answer ({error or type(error).__name__}): see whether the arm server runs "
                "and the cable is in, then recover"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            raise ArmError(
                f"{url} answers {response.status} ({answer[:80]!r}): see what the arm server prints; right "
                "after its start it has no state yet"
            )
        return answer
