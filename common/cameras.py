"""Cameras on the robot: the newest picture of each, cropped and scaled, or an error that names the camera.

`read_latest` never waits for hardware. A thread per camera reads as fast as the camera gives, so that a slow
one does not slow the control loop, and no queue hands out pictures of the past.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from common.device_thread import DeviceThread, say
from common.runtime import UserError

FRAME_SIZE = 128  # pixels, the side of what the policy and the reward model see
ARM_VIEWS = ("main_images", "extra_view_images")  # of the simulated arm
RATE_FRAMES = 30  # the measured rate is over so many
READ_TIMEOUT_S = 2.0  # of one read, where the camera's library has one


@dataclass
class RealCameraConfig:
    backend: Literal["realsense", "opencv", "maniskill"] = "realsense"
    serial: str = ""  # realsense: the number on it; opencv: /dev/v4l/by-id/* or 0, 1, ..; maniskill: the view
    width: int = 640
    height: int = 480
    fps: int = 15
    crop: tuple[float, float, float, float] | None = (
        None  # top, left, bottom, right in 0..1; null: centre square
    )
    warm_up_s: float = 1.0  # pictures thrown away after opening, while the exposure settles
    start_timeout_s: float = 10.0  # to the first picture
    reopen_tries: int = 5
    reopen_every_s: float = 1.0

    def __post_init__(self):
        if not self.serial:
            raise ValueError(
                "`serial` is missing: which camera? `python teleop_eval.py --check` helps to tell"
            )
        if self.backend == "maniskill" and self.serial not in ARM_VIEWS:
            raise ValueError(f"a simulated arm has the views {' and '.join(ARM_VIEWS)}, not '{self.serial}'")
        if self.crop is not None:
            top, left, bottom, right = self.crop
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise ValueError(
                    f"crop must be [top, left, bottom, right] with 0 <= top < bottom <= 1 and "
                    f"0 <= left < right <= 1, got {list(self.crop)}"
                )
        if min(self.width, self.height, self.fps) < 1:
            raise ValueError("width, height and fps must be at least 1")


class CameraError(UserError):
    """A camera has no fresh picture; the message names it. `gone`: it will not be opened again either."""

    def __init__(self, message: str, gone: bool = False):
        super().__init__(message)
        self.gone = gone


class Camera(Protocol):
    def read_latest(self, max_age_s: float) -> tuple[np.ndarray, float]:
        """-> (rgb (FRAME_SIZE, FRAME_SIZE, 3) uint8, its time.monotonic()). CameraError if it is older."""
        ...

    def describe(self) -> str:
        """What it is, and how fast, on one line."""
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """A camera as its library shows it: `read` waits for the next picture, and raises where none comes."""

    def read(self) -> np.ndarray: ...  # (H, W, 3) uint8 RGB, owned by the caller
    def close(self) -> None: ...


def crop_and_scale(
    rgb: np.ndarray, crop: tuple[float, float, float, float] | None, image_size: int
) -> np.ndarray:
    """(H, W, 3) uint8 -> (image_size, image_size, 3): the part between fractions of height and width (None:
    the centre square), scaled bilinearly. Bytes as in RLinf, whose models then see what they were trained on.
    """
    height, width = rgb.shape[:2]
    if crop is None:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        bottom, right = top + side, left + side
    else:
        top, left, bottom, right = (int(n * part) for n, part in zip((height, width) * 2, crop, strict=True))
    part = rgb[top:bottom, left:right]
    if part.shape[:2] == (image_size, image_size):
        return np.ascontiguousarray(part)
    return _cv2().resize(part, (image_size, image_size))


# ----------------------------------------------------------------------------------------------------
# Cameras


class _Newest(NamedTuple):
    rgb: np.ndarray  # as the source gave it
    time_s: float  # monotonic


class LatestFrame:
    """The newest picture of a source that a thread reads; reopens the source when it fails.

    The constructor returns with the first picture. CameraError if opening or reading it failed.
    """

    def __init__(
        self,
        name: str,
        cfg: RealCameraConfig,
        open_source: Callable[[RealCameraConfig], Source],
        notice: Callable[[str], None] = say,
    ):
        self.cfg = cfg
        self.title = f"camera {name} ({cfg.backend} {cfg.serial})"
        self._open_source = open_source
        self._newest = _Newest(np.empty((0, 0, 3), np.uint8), -np.inf)
        self._times_s: deque[float] = deque(maxlen=RATE_FRAMES)
        try:
            self._thread = DeviceThread(
                self.title,
                self._open,
                self._grab,
                reopen_tries=cfg.reopen_tries,
                reopen_every_s=cfg.reopen_every_s,
                start_timeout_s=cfg.warm_up_s + cfg.start_timeout_s,
                notice=notice,
            )
        except UserError as error:
            raise CameraError(str(error), gone=True) from error

    def read_latest(self, max_age_s: float) -> tuple[np.ndarray, float]:
        thread = self._thread
        if thread.gone:
            raise CameraError(
                f"{self.title} is gone ({thread.reason}); check its cable, start again", gone=True
            )
        rgb, time_s = self._newest
        age_s = time.monotonic() - time_s
        if age_s > max_age_s:
            why = f" ({thread.reason}; it is being opened again)" if thread.reason else ""
            raise CameraError(
                f"{self.title} has given no picture for {age_s:.1f} s{why}, {max_age_s:g} s are allowed; "
                "check its cable and the load of its USB bus"
            )
        return crop_and_scale(rgb, self.cfg.crop, FRAME_SIZE), time_s

    @property
    def rate_hz(self) -> float:
        """Pictures per second, measured over the last ones; 0 before the second."""
        times_s = list(self._times_s)
        return (len(times_s) - 1) / (times_s[-1] - times_s[0]) if len(times_s) > 1 else 0.0

    def describe(self) -> str:
        height, width = self._newest.rgb.shape[:2]
        return f"{self.title}: {width}x{height}, {self.rate_hz:.1f} pictures/s ({self.cfg.fps} asked for)"

    def close(self) -> None:
        self._thread.close()

    def _open(self) -> Source:
        source = self._open_source(self.cfg)
        try:
            end_s = time.monotonic() + self.cfg.warm_up_s
            while time.monotonic() < end_s:
                source.read()
        except BaseException:
            source.close()
            raise
        self._times_s.clear()
        return source

    def _grab(self, source: Source) -> None:
        rgb = source.read()
        self._newest = _Newest(rgb, time.monotonic())
        self._times_s.append(self._newest.time_s)


class ArmCamera:
    """A view of the simulated arm, drawn when asked for, in the caller's thread: simulation has only one."""

    def __init__(self, name: str, cfg: RealCameraConfig, arm):
        """arm: one with `render(view)`, the `maniskill` backend. UserError if it has none."""
        if not hasattr(arm, "render"):
            raise UserError(
                f"camera {name}: backend maniskill shows the simulated arm, but the arm is a real one"
            )
        self.cfg, self.arm = cfg, arm
        self.title = f"camera {name} (maniskill {cfg.serial})"

    def read_latest(self, max_age_s: float) -> tuple[np.ndarray, float]:
        """Never stale: the picture is of now."""
        rgb = self.arm.render(self.cfg.serial)
        return crop_and_scale(rgb, self.cfg.crop, FRAME_SIZE), time.monotonic()

    def describe(self) -> str:
        start_s = time.monotonic()
        height, width = self.arm.render(self.cfg.serial).shape[:2]
        return f"{self.title}: {width}x{height}, drawn in {(time.monotonic() - start_s) * 1000:.0f} ms"

    def close(self) -> None:
        """The arm belongs to somebody else."""


# ----------------------------------------------------------------------------------------------------
# Sources


class OpenCVSource:
    """A webcam through OpenCV. Its reads may wait without end; the age of the newest picture tells."""

    def __init__(self, cfg: RealCameraConfig):
        cv2 = _cv2()
        self.cfg = cfg
        self._to_rgb = lambda bgr: cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        self._capture = cv2.VideoCapture(int(cfg.serial) if cfg.serial.isdigit() else cfg.serial)
        if not self._capture.isOpened():
            self._capture.release()
            found = sorted(map(str, [*Path("/dev/v4l/by-id").glob("*"), *Path("/dev").glob("video*")]))
            raise UserError(
                f"cannot be opened; there is {', '.join(found) or 'no camera in /dev'}"
                " (and this user must be in the group `video`)"
            )
        self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, cfg.width)
        self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, cfg.height)
        self._capture.set(cv2.CAP_PROP_FPS, cfg.fps)
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # else it hands out the oldest of four

    def read(self) -> np.ndarray:
        is_there, bgr = self._capture.read()
        if not is_there:
            raise CameraError("no picture came")
        height, width = bgr.shape[:2]
        if (width, height) != (self.cfg.width, self.cfg.height):
            raise UserError(
                f"gives {width}x{height} pictures, not {self.cfg.width}x{self.cfg.height}; "
                "set width and height to what it can give"
            )
        return self._to_rgb(bgr)

    def close(self) -> None:
        self._capture.release()


class RealSenseSource:
    """The colour stream of the RealSense with exactly that serial number."""

    def __init__(self, cfg: RealCameraConfig):
        try:
            import pyrealsense2 as rs
        except ImportError as error:
            raise UserError(
                f"the backend realsense needs pyrealsense2 ({error}); install it and its library: "
                "`pip install pyrealsense2`, `sudo apt install libusb-1.0-0`"
            ) from error
        serial_number = rs.camera_info.serial_number
        found = [device.get_info(serial_number) for device in rs.context().query_devices()]
        if cfg.serial not in found:
            raise UserError(
                f"no RealSense has this serial number; plugged in: {', '.join(found) or 'none'}; "
                "one that is missing here lacks its udev rules or hangs on a USB 2 cable"
            )
        settings = rs.config()
        settings.enable_device(cfg.serial)
        settings.enable_stream(rs.stream.color, cfg.width, cfg.height, rs.format.rgb8, cfg.fps)
        self._pipeline = rs.pipeline()
        self._pipeline.start(settings)

    def read(self) -> np.ndarray:
        picture = self._pipeline.wait_for_frames(int(READ_TIMEOUT_S * 1000)).get_color_frame()
        if not picture:
            raise CameraError("a set of pictures came without the colour one")
        return np.array(picture.get_data())  # a copy: the camera writes its next picture into the same memory

    def close(self) -> None:
        self._pipeline.stop()


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise UserError("cameras need OpenCV; install it: `pip install opencv-python-headless`") from error
    return cv2


# ----------------------------------------------------------------------------------------------------
# Sets of cameras

SOURCES: dict[str, Callable[[RealCameraConfig], Source]] = {
    "opencv": OpenCVSource,
    "realsense": RealSenseSource,
}


def make_camera(name: str, cfg: RealCameraConfig, arm=None, notice: Callable[[str], None] = say) -> Camera:
    """The camera, with its first picture taken. arm: the simulated one, for backend maniskill."""
    if cfg.backend == "maniskill":
        return ArmCamera(name, cfg, arm)
    return LatestFrame(name, cfg, SOURCES[cfg.backend], notice)


@contextlib.contextmanager
def open_cameras(
    cfgs: dict[str, RealCameraConfig], arm=None, notice: Callable[[str], None] = say
) -> Iterator[dict[str, Camera]]:
    """Name -> camera, all closed at the end of the block, also where a later one cannot be opened."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(contextlib.closing(make_camera(name, cfg, arm, notice)))
            for name, cfg in cfgs.items()
        }


def describe_cameras(
    cfgs: dict[str, RealCameraConfig], seconds: float = 3.0, arm=None, folder: Path | None = None
) -> Iterator[str]:
    """A line per camera: its rate measured over `seconds`, or what is wrong with it. One after the other.

    folder: where a picture of each goes, as policy and reward model see it.
    """
    for name, cfg in cfgs.items():
        try:
            with contextlib.closing(make_camera(name, cfg, arm)) as camera:
                if cfg.backend != "maniskill":
                    time.sleep(seconds)
                rgb, _ = camera.read_latest(max_age_s=1.0)
                picture = "" if folder is None else f", see {_save_picture(rgb, folder / f'{name}.png')}"
                yield camera.describe() + picture
        except UserError as error:
            yield str(error)


def _save_picture(rgb: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _cv2().imwrite(str(path), rgb[..., ::-1])
    return path
