"""Episodes to be looked at: what the policy did, what the reward model said, what was true.

A `Trace` is one episode, whoever made it; `save_video` shows traces one after the other, with the verdict
under each frame. `common.trace_page` makes a page of them to scrub through.
Blue is success and orange is failure, in Okabe and Ito's shades, which colour-blind readers tell apart.
"""

import contextlib
import itertools
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.files import atomic_write
from common.rewards import reaches
from common.runtime import UserError

ON_DARK = {True: "#56B4E9", False: "#E69F00", None: "#8A8A8A"}  # verdict or truth -> colour; None: not scored
MIN_WIDTH = 384  # pixels; smaller frames are enlarged by a whole number, so that pixels stay squares
STRIP_HEIGHT = 84
OPPOSITE = {"success": "failure", "positive": "not positive"}


@dataclass
class Trace:
    """One episode, or its end. Entry t is about the observation after first_step + t steps, the reset's
    being the one after 0."""

    frames: np.ndarray  # (T, H, W, 3) uint8 RGB
    score: np.ndarray  # (T,) float32 in [0, 1], nan where the reward model was not asked
    truth: np.ndarray  # (T,) bool
    title: str
    question: str = "success"  # what score is the probability of; of windows: that the trend is positive
    truth_of: str = "success"  # what truth is about
    said: np.ndarray | None = None  # (T,) bool: the verdict; None: wherever score reaches the threshold
    known: np.ndarray | None = None  # (T,) bool: where somebody knows the truth; None, made True: everywhere
    extra_frames: np.ndarray | None = None  # (T, H', W', 3) uint8 RGB of a second camera
    first_step: int = 0
    # Of windows, each entry about the window that ends there:
    labels: tuple[str, ...] = ()  # what the model may call it
    label_prob: np.ndarray | None = None  # (T, L) float32, nan where it was not asked
    true_label: np.ndarray | None = None  # (T,) int index into labels, -1 where nobody knows

    def __post_init__(self):
        if self.known is None:
            self.known = np.ones(len(self.frames), dtype=bool)
        cameras = {"frames": self.frames, "extra_frames": self.extra_frames}
        for name, frames in cameras.items():
            if frames is not None and (frames.dtype != np.uint8 or frames.shape[3:] != (3,)):
                raise ValueError(f"{name} must be (T, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
        length = (len(self.frames),)
        if length == (0,) or self.score.shape != length or self.truth.shape != length:
            raise ValueError(
                f"frames, score and truth must share T >= 1, got {len(self.frames)}, "
                f"{self.score.shape}, {self.truth.shape}"
            )
        for name in ("said", "known", "extra_frames", "label_prob", "true_label"):
            if (given := vars(self)[name]) is not None and given.shape[:1] != length:
                raise ValueError(f"{name} must have T = {length[0]} entries, got {given.shape}")
        for name in ("truth", "known"):
            if (given := vars(self)[name]).dtype != bool:
                raise ValueError(f"{name} must be bool, got {given.dtype}")

    @property
    def steps(self) -> np.ndarray:
        """(T,) int."""
        return self.first_step + np.arange(len(self.frames))

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold is drawn: what a window is called is its likeliest label."""
        return self.question == "success"

    @property
    def scored(self) -> np.ndarray:
        """(T,) bool."""
        return ~np.isnan(self.score)

    def verdict(self, threshold: float) -> np.ndarray:
        """(T,) bool; False where not scored."""
        if self.said is not None:
            return self.said
        return reaches(torch.from_numpy(self.score), threshold).numpy()

    def wrong(self, threshold: float) -> np.ndarray:
        """(T,) bool: the verdict is not the truth, where that is known and both are about one question."""
        comparable = self.scored & self.known & (self.question == self.truth_of)
        return comparable & (self.verdict(threshold) != self.truth)


def save_video(traces: list[Trace], threshold: float, path: Path, fps: int) -> None:
    """Write an mp4 (H.264) of the episodes one after the other, the last frame of each held for 0.5 s.

    Under each frame: the episode and step, the score as a bar with a tick at the threshold, the verdict
    and the truth. ValueError if the frames of the traces are not of one size, UserError if ffmpeg fails.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    sizes = {trace.frames.shape[1:3] for trace in traces}
    if len(sizes) != 1:
        raise ValueError(f"a video needs frames of one size, got {sorted(sizes)}")
    pictures = video_pictures(traces, threshold, num_held=round(0.5 * fps))
    first = next(pictures)
    # not imageio's own writer: it goes by the suffix, which a temporary file lacks, and takes a video that
    # ffmpeg gave up on for a whole one
    command = [get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{first.shape[1]}x{first.shape[0]}", "-r", str(fps), "-i", "-"]
    command += ["-c:v", "libx264", "-preset", "veryfast", "-crf", "25", "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart", "-f", "mp4"]  # faststart: a browser plays it while it loads
    with atomic_write(path) as temporary:
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, temporary], stdin=pipe, stderr=pipe) as ffmpeg:
            with contextlib.suppress(BrokenPipeError):  # then it ended early and says why
                for picture in itertools.chain([first], pictures):
                    ffmpeg.stdin.write(picture.data)
            with contextlib.suppress(BrokenPipeError):
                ffmpeg.stdin.close()
            message = ffmpeg.stderr.read().decode(errors="replace").strip()
        if ffmpeg.returncode != 0:
            raise UserError(f"{path}: ffmpeg stopped with code {ffmpeg.returncode}: {message}")


def video_pictures(traces: list[Trace], threshold: float, num_held: int) -> Iterator[np.ndarray]:
    """Yield (H', W', 3) uint8, C order, sides even as H.264 wants them; `num_held` more of each last one."""
    width = traces[0].frames.shape[2]
    scale = math.ceil(MIN_WIDTH / width)
    strip = _Strip(width * scale, threshold if traces[0].by_threshold else None)
    for number, trace in enumerate(traces, start=1):
        name = f"{number}/{len(traces)}  {trace.title}"
        verdict, wrong = trace.verdict(threshold), trace.wrong(threshold)
        for t, frame in enumerate(trace.frames):
            large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            below = strip.draw(
                name if len(name) <= 34 else name[:33] + "…",
                f"step {trace.steps[t]}/{trace.steps[-1]}",
                float(trace.score[t]),
                {
                    "model": (bool(verdict[t]), trace.question),
                    "truth": (bool(trace.truth[t]) if trace.known[t] else None, trace.truth_of),
                },
                bool(wrong[t]),
            )
            picture = np.concatenate([large, below])
            picture = np.ascontiguousarray(picture[: len(picture) // 2 * 2, : width * scale // 2 * 2])
            yield picture
        for _ in range(num_held):
            yield picture


class _Strip:
    """The strip under a frame: one figure, whose parts are moved and drawn again in a few milliseconds."""

    def __init__(self, width: int, threshold: float | None):
        """width in pixels; threshold: None draws none. Coordinates are pixels from the top left."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        self.threshold = threshold
        figure = Figure(figsize=(width / 100, STRIP_HEIGHT / 100), dpi=100, facecolor="#1E1E1E")
        self.canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(STRIP_HEIGHT, 0))
        axes.set_axis_off()

        def text(x: float, y: float, align: str):
            return axes.text(x, y, "", color="white", fontsize=9.5, ha=align, va="center")

        def square(x: float):
            return axes.add_patch(Rectangle((x, 62), 12, 12, linewidth=2))

        self.name, self.step = text(10, 15, "left"), text(width - 10, 15, "right")
        bar_left, self.bar_width = 10, width - 165
        axes.add_patch(Rectangle((bar_left, 31), self.bar_width, 16, color="#4A4A4A", linewidth=0))
        self.bar = axes.add_patch(Rectangle((bar_left, 31), 0, 16, linewidth=0))
        if threshold is not None:
            axes.vlines(bar_left + threshold * self.bar_width, 27, 51, color="white", linewidth=1.5)
        self.comparison = text(width - 10, 39, "right")
        self.verdict_square, self.verdict_text = square(12), text(32, 68, "left")
        self.truth_square, self.truth_text = square(150), text(170, 68, "left")
        self.error = text(width - 10, 68, "right")
        self.error.set_weight("bold")

    def draw(
        self, name: str, step: str, score: float, says: dict[str, tuple[bool | None, str]], wrong: bool
    ) -> np.ndarray:
        """(STRIP_HEIGHT, width, 3) uint8. says: what "model" and "truth" answer to which question. A square
        is filled for yes and hollow for no, grey where nobody knows."""
        scored = not math.isnan(score)
        verdict = says["model"][0]
        self.name.set_text(name)
        self.step.set_text(step)
        self.bar.set_width(score * self.bar_width if scored else 0)
        self.bar.set_color(ON_DARK[verdict])
        compared = ""
        if self.threshold is not None:
            compared = f" {'≥' if reaches(torch.tensor(score), self.threshold) else '<'} {self.threshold:.3f}"
        self.comparison.set_text(f"score {score:.3f}{compared}" if scored else "not scored")
        for square, text, who in (
            (self.verdict_square, self.verdict_text, "model"),
            (self.truth_square, self.truth_text, "truth"),
        ):
            answer, question = says[who]
            answer = answer if scored or who == "truth" else None
            square.set_edgecolor(ON_DARK[answer])
            square.set_facecolor(ON_DARK[answer] if answer else "none")
            text.set_text(f"{who}: {({True: question, False: OPPOSITE[question], None: '-'})[answer]}")
        self.error.set_text(("false positive" if verdict else "missed") if wrong else "")
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()
