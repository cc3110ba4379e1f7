"""Whether the frames that a reward model judges still look like those it was trained on.

Two numbers of a frame: the mean brightness of each view, and how far its features (what goes into the
network's head) lie from those of the data, as the Mahalanobis distance with a diagonal covariance, per
feature: sqrt(mean_j ((f_j - mean_j) / std_j)^2), about 1 for a frame like the others.

**The rule.** A frame lies outside where its distance is larger than that of 99 % of the validation frames, or
a view is darker or brighter than 99 % of theirs. Once more than half of the last 200 judged frames lie
outside, that is said, once per loaded model: another light, other colours, another scene, or a policy that
has gone where no data were collected. Of frames like the data's about one in fifty lies outside. What does
not show in the features is not noticed: frames of the demo moved by 8 of 64 pixels pass, 10 % less light does
not.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INSIDE_SHARE = 0.99  # of the validation frames, by either number
NUM_FRAMES = 200  # judged last,
OUTSIDE_SHARE = 0.5  # and so many of them outside are worth a warning
MIN_STD = 0.1  # of the mean std: a feature that was all but constant is no ruler


@dataclass
class FrameStatistics:
    """What frames looked like to one model."""

    mean: Tensor  # (F,) float32 of the features
    std: Tensor  # (F,) float32, above 0
    max_distance: float
    brightness: list[list[float]]  # of each view: [lowest, highest] in [0, 1]

    @classmethod
    def of(cls, features: Tensor, brightness: Tensor) -> "FrameStatistics":
        """features (M, F), brightness (M, V) in [0, 1] of M >= 1 frames, best of ones not trained on."""
        std, mean = torch.std_mean(features, dim=0, correction=0)
        std = std.clamp(min=max(MIN_STD * float(std.mean()), 1e-6))
        edges = torch.tensor([(1 - INSIDE_SHARE) / 2, (1 + INSIDE_SHARE) / 2])
        statistics = cls(mean, std, 0.0, brightness.quantile(edges, dim=0).T.tolist())
        statistics.max_distance = float(statistics.distance(features).quantile(INSIDE_SHARE))
        return statistics

    def distance(self, features: Tensor) -> Tensor:
        """(M,) float32 of features (M, F)."""
        return ((features - self.mean) / self.std).square().mean(1).sqrt()

    def outside(self, distance: Tensor, brightness: Tensor) -> Tensor:
        """(M,) bool of distance (M,) and brightness (M, V)."""
        low, high = torch.tensor(self.brightness).T
        return (distance > self.max_distance) | ((brightness < low) | (brightness > high)).any(1)


def complain(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class DriftWatch:
    """Looks on while a model judges, and says once where its frames are none that it knows."""

    def __init__(
        self,
        statistics: FrameStatistics,
        name: str,
        views: tuple[str, ...],
        notice: Callable[[str], None] = complain,
    ):
        """name: what the warning calls the model."""
        self.statistics, self.name, self.views, self.notice = statistics, name, views, notice
        self.told = False
        self._last: deque[tuple[bool, float, list[float]]] = deque(maxlen=NUM_FRAMES)

    def __call__(self, features: Tensor, brightness: Tensor) -> None:
        """features (M, F), brightness (M, V) of the next frames, on any device."""
        if self.told:
            return
        features, brightness = (x[-NUM_FRAMES:].float().cpu() for x in (features, brightness))
        distance = self.statistics.distance(features)
        outside = self.statistics.outside(distance, brightness)
        self._last.extend(zip(outside.tolist(), distance.tolist(), brightness.tolist(), strict=True))
        if len(self._last) == NUM_FRAMES and self.num_outside > OUTSIDE_SHARE * NUM_FRAMES:
            self.told = True
            self.notice(self.text())

    @property
    def num_outside(self) -> int:
        """Of the last frames."""
        return sum(outside for outside, _, _ in self._last)

    def text(self) -> str:
        """The warning, with the medians of the frames outside."""
        outside = [row for row in self._last if row[0]]
        distance = torch.tensor([row[1] for row in outside]).median()
        brightness = torch.tensor([row[2] for row in outside]).median(0).values.tolist()
        known = self.statistics
        shades = ", ".join(
            f"brightness of {view} {shade:.3f} (known: {low:.3f} to {high:.3f})"
            for view, shade, (low, high) in zip(self.views, brightness, known.brightness, strict=True)
        )
        return (
            f"{self.num_outside} of the last {len(self._last)} frames that {self.name} judged look unlike "
            f"those it was trained on: feature distance {distance:.2f} (known: up to "
            f"{known.max_distance:.2f}), {shades}. Look at a few (light, camera, scene), or collect such "
            "frames and train on them too"
        )
