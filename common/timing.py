"""Where the time goes: seconds by name, and percentiles of latencies."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np


class Stopwatch:
    """Adds up the seconds spent in named parts: `with watch("env"): ...`. A part in a part counts in both.

    On a GPU, work is queued and not timed where it was asked for; synchronise first where that matters.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by name since the last reset, in the order of first use."""
        return dict(self._seconds)

    def share(self, name: str) -> float:
        """Part of all time since the last reset that was spent in `name`, in [0, 1]; 0 if it never ran."""
        return self._seconds.get(name, 0.0) / (time.perf_counter() - self._start)


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and max of the samples, in their unit. Raises ValueError if there are none."""
    if not len(samples):
        raise ValueError("percentiles of no samples")
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(samples))}
