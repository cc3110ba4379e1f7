"""Cameras: the newest picture or an error that names the camera, with doubles of the hardware below."""

import re
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import cameras
from common.cameras import (
    ArmCamera,
    CameraError,
    LatestFrame,
    OpenCVSource,
    RealCameraConfig,
    RealSenseSource,
    crop_and_scale,
    describe_cameras,
    make_camera,
    open_cameras,
)
from common.config import from_dict
from common.runtime import UserError

PATIENCE_S = 10.0
RED = (250, 0, 10)


def picture(value: int, width: int = 8, height: int = 6) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.002)


def camera_config(**settings) -> RealCameraConfig:
    given = {
        "backend": "opencv",
        "serial": "0",
        "width": 8,
        "height": 6,
        "warm_up_s": 0.0,
        "reopen_every_s": 0.01,
    }
    return RealCameraConfig(**given | settings)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cameras, "FRAME_SIZE", 6)


class FakeSource:
    """Pictures of a value that counts up, one per 5 ms; `stalled` it waits, `broken` it raises."""

    def __init__(self, first: int = 0):
        self.value = first
        self.broken = self.closed = False
        self.flowing = threading.Event()
        self.flowing.set()

    def read(self) -> np.ndarray:
        time.sleep(0.005)
        self.flowing.wait()
        if self.broken:
            raise OSError("cable pulled")
        self.value = min(self.value + 1, 255)
        return picture(self.value)

    def close(self) -> None:
        self.closed = True


class Shelf:
    """Opens one source after the other; an error where none is left."""

    def __init__(self, *sources: FakeSource):
        self.sources = list(sources)
        self.notices: list[str] = []

    def open(self, cfg: RealCameraConfig) -> FakeSource:
        if not self.sources:
            raise UserError("cannot be opened")
        return self.sources.pop(0)

    def camera(self, **settings) -> LatestFrame:
        return LatestFrame("wrist_1", camera_config(**settings), self.open, self.notices.append)


# ----------------------------------------------------------------------------------------------------
# The newest picture


def test_the_newest_picture_and_its_time():
    source = FakeSource()
    camera = Shelf(source).camera()
    before_s = time.monotonic()
    wait_until(lambda: camera.read_latest(PATIENCE_S)[0][0, 0, 0] >= 5)
    rgb, time_s = camera.read_latest(PATIENCE_S)
    assert (rgb.shape, rgb.dtype) == ((6, 6, 3), np.uint8)
    assert before_s <= time_s <= time.monotonic()
    again, again_s = camera.read_latest(PATIENCE_S)
    assert again[0, 0, 0] >= rgb[0, 0, 0]
    assert again_s >= time_s
    assert 0 < camera.rate_hz < 1000
    assert re.fullmatch(
        r"camera wrist_1 \(opencv 0\): 8x6, \d+\.\d pictures/s \(15 asked for\)", camera.describe()
    )
    camera.close()
    assert source.closed


def test_pictures_of_the_warm_up_are_thrown_away():
    class Warming(FakeSource):
        opened_s = time.monotonic()
        warm = False

        def read(self) -> np.ndarray:
            super().read()
            self.warm = self.warm or time.monotonic() - self.opened_s > 0.1
            return picture(200 if self.warm else 1)

    camera = LatestFrame("wrist_1", camera_config(warm_up_s=0.3), lambda cfg: Warming())
    assert camera.read_latest(PATIENCE_S)[0][0, 0, 0] == 200
    camera.close()


def test_a_first_opening_that_fails_names_the_camera():
    with pytest.raises(CameraError, match=r"^camera wrist_1 \(opencv 0\): cannot be opened$") as error:
        Shelf().camera()
    assert error.value.gone
    broken = FakeSource()
    broken.broken = True
    with pytest.raises(CameraError, match=r"^camera wrist_1 \(opencv 0\): OSError: cable pulled$"):
        Shelf(broken).camera()
    assert broken.closed
    broken.closed = False
    with pytest.raises(CameraError, match="cable pulled"):
        Shelf(broken).camera(warm_up_s=5.0)
    assert broken.closed


def test_a_camera_without_a_first_picture_names_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.device_thread.JOIN_S", 0.05)
    silent = FakeSource()
    silent.flowing.clear()
    with pytest.raises(CameraError, match=r"camera wrist_1 \(opencv 0\) gave nothing within 0\.05 s"):
        Shelf(silent).camera(start_timeout_s=0.05)
    silent.flowing.set()
    wait_until(lambda: silent.closed)


# ----------------------------------------------------------------------------------------------------
# When it is lost


def test_a_stalled_camera_is_an_error_by_name_until_it_goes_on():
    source = FakeSource()
    shelf = Shelf(source)
    camera = shelf.camera()
    camera.read_latest(PATIENCE_S)
    source.flowing.clear()
    time.sleep(0.1)
    with pytest.raises(
        CameraError,
        match=r"camera wrist_1 \(opencv 0\) has given no picture for \d+\.\d s, 0\.02 s are allowed",
    ) as error:
        camera.read_latest(0.02)
    assert not error.value.gone
    source.flowing.set()
    wait_until(lambda: camera.read_latest(PATIENCE_S)[1] > time.monotonic() - 0.02)
    camera.close()
    assert shelf.notices == []


def test_a_camera_that_dies_comes_back_within_its_tries():
    first, second = FakeSource(), FakeSource(first=100)
    shelf = Shelf(first, second)
    camera = shelf.camera(reopen_tries=2)
    first.broken = True
    wait_until(lambda: camera.read_latest(PATIENCE_S)[0][0, 0, 0] > 100)
    assert first.closed
    assert shelf.notices == [
        "camera wrist_1 (opencv 0) is lost (OSError: cable pulled); opening it again, 2 tries left",
        "camera wrist_1 (opencv 0) is back",
    ]
    camera.close()


def test_while_it_is_being_reopened_the_error_says_so():
    source, reopened = FakeSource(), FakeSource()
    reopened.flowing.clear()
    shelf = Shelf(source, reopened)
    camera = shelf.camera()
    source.broken = True
    wait_until(lambda: len(shelf.notices) == 1)
    time.sleep(0.05)
    with pytest.raises(CameraError, match=r"\(OSError: cable pulled; it is being opened again\)"):
        camera.read_latest(0.02)
    reopened.flowing.set()
    wait_until(lambda: camera.read_latest(PATIENCE_S)[1] > time.monotonic() - 0.02)
    camera.close()


def test_after_its_tries_a_camera_is_gone_however_fresh_its_last_picture():
    source = FakeSource()
    shelf = Shelf(source)
    camera = shelf.camera(reopen_tries=3)
    source.broken = True
    wait_until(lambda: len(shelf.notices) == 2)
    with pytest.raises(
        CameraError, match=r"^camera wrist_1 \(opencv 0\) is gone \(cannot be opened\)"
    ) as error:
        camera.read_latest(PATIENCE_S)
    assert error.value.gone
    assert (
        shelf.notices[1]
        == "camera wrist_1 (opencv 0) is gone (cannot be opened) after 3 tries to open it again"
    )
    camera.close()


def test_closing_does_not_wait_for_a_read_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.device_thread.JOIN_S", 0.05)
    source = FakeSource()
    camera = Shelf(source).camera()
    source.flowing.clear()
    start_s = time.monotonic()
    camera.close()
    assert time.monotonic() - start_s < PATIENCE_S / 2
    assert not source.closed  # the stuck thread still holds it
    source.flowing.set()
    wait_until(lambda: source.closed)


def test_closing_ends_the_thread():
    camera = Shelf(FakeSource()).camera()
    assert camera.title in [thread.name for thread in threading.enumerate()]
    camera.close()
    assert camera.title not in [thread.name for thread in threading.enumerate()]


# ----------------------------------------------------------------------------------------------------
# Crop and scale


def test_crop_takes_the_centre_square_or_fractions():
    rgb = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    assert np.array_equal(crop_and_scale(rgb, None, 6), rgb[:, 2:8])
    assert np.array_equal(crop_and_scale(rgb, (0.5, 0.0, 1.0, 0.39), 3), rgb[3:6, 0:3])  # 3.9 columns: 3
    high = rgb.transpose(1, 0, 2)
    assert np.array_equal(crop_and_scale(high, None, 6), high[2:8])


def test_scaling_is_the_references():
    """RLinf crops and scales the camera's BGR, then turns the channels round."""
    bgr = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    expected = cv2.resize(bgr[:, 80:560], (128, 128))[..., ::-1]
    assert np.array_equal(crop_and_scale(bgr[..., ::-1], None, 128), expected)
    expected = cv2.resize(bgr[48:384, 64:576], (128, 128))[..., ::-1]
    assert np.array_equal(crop_and_scale(bgr[..., ::-1], (0.1, 0.1, 0.8, 0.9), 128), expected)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({}, "`serial` is missing"),
        (
            {"serial": "1", "crop": [0, 0, 0, 1]},
            r"crop must be \[top, left, bottom, right\].*got \[0.0, 0.0, 0.0, 1.0\]",
        ),
        ({"serial": "1", "crop": [0, 0.5, 1, 1.5]}, "crop must be"),
        ({"serial": "1", "fps": 0}, "must be at least 1"),
        (
            {"serial": "wrist", "backend": "maniskill"},
            "has the views main_images and extra_view_images, not 'wrist'",
        ),
        ({"serial": 12345}, "'serial' must be a text.*quote it"),
    ],
)
def test_settings_check_themselves(settings: dict, fault: str):
    with pytest.raises(UserError, match=fault):
        from_dict(RealCameraConfig, settings, "x.yaml")


# ----------------------------------------------------------------------------------------------------
# OpenCV


def write_video(path: Path, colour: tuple[int, int, int], count: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 15, (64, 48))
    for _ in range(count):
        writer.write(np.full((48, 64, 3), colour[::-1], np.uint8))
    writer.release()


def test_opencv_gives_rgb_and_says_when_nothing_comes(tmp_path: Path):
    write_video(tmp_path / "red.avi", RED, count=3)
    source = OpenCVSource(camera_config(serial=str(tmp_path / "red.avi"), width=64, height=48))
    for _ in range(3):
        rgb = source.read()
        assert (rgb.shape, rgb.dtype) == ((48, 64, 3), np.uint8)
        assert np.abs(rgb.astype(int) - RED).max() < 10  # JPEG
    with pytest.raises(CameraError, match="no picture came"):
        source.read()
    source.close()


def test_opencv_asks_for_the_size_rate_and_a_buffer_of_one(monkeypatch: pytest.MonkeyPatch):
    captures = []

    class Capture:
        def __init__(self, what):
            self.what, self.settings, self.released = what, {}, False
            captures.append(self)

        def isOpened(self) -> bool:
            return self.what != 7

        def set(self, key: int, value: float) -> None:
            self.settings[key] = value

        def read(self):
            return True, picture(3, width=640, height=480)

        def release(self) -> None:
            self.released = True

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    source = OpenCVSource(camera_config(serial="2", width=640, height=480))
    assert captures[0].what == 2
    assert captures[0].settings == {
        cv2.CAP_PROP_FRAME_WIDTH: 640,
        cv2.CAP_PROP_FRAME_HEIGHT: 480,
        cv2.CAP_PROP_FPS: 15,
        cv2.CAP_PROP_BUFFERSIZE: 1,
    }
    assert source.read().shape == (480, 640, 3)
    source.close()
    assert captures[0].released
    with pytest.raises(
        CameraError, match=r"\(opencv /dev/v4l/by-id/x\): gives 640x480 pictures, not 320x240; set width"
    ):
        make_camera("wrist_1", camera_config(serial="/dev/v4l/by-id/x", width=320, height=240))
    assert captures[1].what == "/dev/v4l/by-id/x"
    with pytest.raises(CameraError, match=r"camera wrist_1 \(opencv 7\): cannot be opened; there is "):
        make_camera("wrist_1", camera_config(serial="7"))
    assert captures[2].released


# ----------------------------------------------------------------------------------------------------
# RealSense


class FakeRealSense(types.ModuleType):
    """pyrealsense2, cameras of these serial numbers plugged in; each has one buffer for all its pictures."""

    camera_info = types.SimpleNamespace(serial_number="serial")
    stream = types.SimpleNamespace(color="color")
    format = types.SimpleNamespace(rgb8="rgb8")

    def __init__(self, *plugged_in: str):
        super().__init__("pyrealsense2")
        self.plugged_in = list(plugged_in)
        self.started: list[list] = []
        self.stopped = self.without_colour = 0
        self.value = 0

    def context(self):
        devices = [
            types.SimpleNamespace(get_info=lambda _, serial=serial: serial) for serial in self.plugged_in
        ]
        return types.SimpleNamespace(query_devices=lambda: devices)

    def config(self):
        asked: list = []
        return types.SimpleNamespace(
            asked=asked, enable_device=asked.append, enable_stream=lambda *stream: asked.append(stream)
        )

    def pipeline(self):
        buffer = np.zeros((6, 8, 3), np.uint8)

        def wait_for_frames(timeout_ms: int):
            assert timeout_ms == 2000
            time.sleep(0.005)
            if not self.plugged_in:
                raise RuntimeError("Frame didn't arrive within 2000")
            self.value = min(self.value + 1, 255)
            buffer[:] = self.value
            picture = None if self.without_colour else types.SimpleNamespace(get_data=lambda: buffer)
            return types.SimpleNamespace(get_color_frame=lambda: picture)

        def stop():
            self.stopped += 1

        return types.SimpleNamespace(
            start=lambda settings: self.started.append(settings.asked),
            wait_for_frames=wait_for_frames,
            stop=stop,
        )


@pytest.fixture
def realsense(monkeypatch: pytest.MonkeyPatch) -> FakeRealSense:
    fake = FakeRealSense("111", "222")
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake)
    return fake


def test_realsense_opens_the_exact_serial_and_copies_its_pictures(realsense: FakeRealSense):
    source = RealSenseSource(camera_config(backend="realsense", serial="222"))
    assert realsense.started == [["222", ("color", 8, 6, "rgb8", 15)]]
    first, second = source.read(), source.read()
    assert np.array_equal(first, picture(1))
    assert np.array_equal(second, picture(2))
    source.close()
    assert realsense.stopped == 1


def test_realsense_with_another_serial_lists_what_is_there(realsense: FakeRealSense):
    with pytest.raises(
        CameraError, match=r"camera wrist_1 \(realsense 22\): no RealSense .* plugged in: 111, 222;"
    ):
        make_camera("wrist_1", camera_config(backend="realsense", serial="22"))


def test_realsense_pulled_and_plugged_in_again(realsense: FakeRealSense):
    notices: list[str] = []
    cfg = camera_config(backend="realsense", serial="222", reopen_tries=1000)
    camera = make_camera("wrist_1", cfg, notice=notices.append)
    realsense.plugged_in.clear()
    wait_until(lambda: len(notices) == 1)
    assert notices[0].startswith("camera wrist_1 (realsense 222) is lost (RuntimeError: Frame didn't arrive")
    realsense.plugged_in.append("222")
    wait_until(lambda: notices[1:] == ["camera wrist_1 (realsense 222) is back"])
    camera.close()


def test_realsense_without_a_colour_picture_is_an_error(realsense: FakeRealSense):
    realsense.without_colour = 1
    with pytest.raises(CameraError, match="a set of pictures came without the colour one"):
        make_camera("wrist_1", camera_config(backend="realsense", serial="111"))


def test_realsense_missing_names_the_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(CameraError, match=r"`pip install pyrealsense2`, `sudo apt install libusb-1\.0-0`"):
        make_camera("wrist_1", camera_config(backend="realsense", serial="111"))


# ----------------------------------------------------------------------------------------------------
# The simulated arm, and sets of cameras


class FakeArm:
    def __init__(self):
        self.drawn: list[str] = []

    def render(self, view: str) -> np.ndarray:
        self.drawn.append(view)
        return picture(len(self.drawn), width=8, height=8)


def test_an_arms_camera_draws_when_asked():
    arm = FakeArm()
    camera = make_camera("side", camera_config(backend="maniskill", serial="extra_view_images"), arm)
    assert arm.drawn == []
    before_s = time.monotonic()
    rgb, time_s = camera.read_latest(0.0)
    assert np.array_equal(rgb, picture(1, 6, 6))
    assert before_s <= time_s <= time.monotonic()
    assert camera.read_latest(0.0)[0][0, 0, 0] == 2
    assert re.fullmatch(
        r"camera side \(maniskill extra_view_images\): 8x8, drawn in \d+ ms", camera.describe()
    )
    assert arm.drawn == ["extra_view_images"] * 3
    camera.close()


def test_a_real_arm_draws_nothing():
    with pytest.raises(
        UserError, match="camera side: backend maniskill shows the simulated arm, but the arm is"
    ):
        ArmCamera("side", camera_config(backend="maniskill", serial="main_images"), object())


def test_all_cameras_of_a_set_are_closed(monkeypatch: pytest.MonkeyPatch):
    made: list[FakeSource] = []

    def open_source(cfg: RealCameraConfig) -> FakeSource:
        if cfg.serial == "9":
            raise UserError("cannot be opened")
        made.append(FakeSource())
        return made[-1]

    monkeypatch.setitem(cameras.SOURCES, "opencv", open_source)
    cfgs = {"wrist_1": camera_config(), "wrist_2": camera_config(serial="1")}
    with open_cameras(cfgs) as opened:
        assert list(opened) == ["wrist_1", "wrist_2"]
        assert [camera.read_latest(PATIENCE_S)[0].shape for camera in opened.values()] == [(6, 6, 3)] * 2
    assert [source.closed for source in made] == [True, True]
    with (
        pytest.raises(CameraError, match=r"camera wrist_3 \(opencv 9\)"),
        open_cameras(cfgs | {"wrist_3": camera_config(serial="9")}),
    ):
        pass
    assert [source.closed for source in made] == [True] * 4


def test_a_check_describes_each_camera_or_what_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cameras.SOURCES, "opencv", lambda cfg: FakeSource())
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    cfgs = {
        "wrist_1": camera_config(),
        "wrist_2": camera_config(backend="realsense", serial="111"),
        "side": camera_config(backend="maniskill", serial="main_images"),
    }
    good, missing, drawn = describe_cameras(cfgs, seconds=0.1, arm=FakeArm())
    assert re.fullmatch(r"camera wrist_1 \(opencv 0\): 8x6, \d+\.\d pictures/s \(15 asked for\)", good)
    assert missing.startswith("camera wrist_2 (realsense 111): the backend realsense needs pyrealsense2")
    assert drawn.startswith("camera side (maniskill main_images): 8x8, drawn in")
