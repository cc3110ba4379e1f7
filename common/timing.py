"""A loop's rate, kept by absolute deadlines, and a clock for simulations."""

from collections.abc import Callable


class SimulatedClock:
    """Seconds that pass only in `sleep`: for a simulated arm, as fast as the computer can."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Rate:
    """Ends periods at absolute deadlines, so that what a sleep overshoots never adds up.

    What comes late (a slow policy, a person who paused) starts a new count: two steps within one period
    would rush the arm. clock() and sleep(seconds): those of `time`, or of a `SimulatedClock`.
    """

    def __init__(self, hz: float, clock: Callable[[], float], sleep: Callable[[float], None]):
        self.period_s, self.clock, self.sleep = 1 / hz, clock, sleep
        self.restart()

    def restart(self) -> None:
        """A period begins now."""
        self.deadline = self.clock() + self.period_s

    def begin(self) -> float:
        """Call before a command. -> s by which it is too late for its period, which then begins now."""
        late_s = max(0.0, self.clock() - self.deadline)
        if late_s > 0:
            self.restart()
        return late_s

    def wait(self) -> float:
        """Until the period is over; the next one begins. -> s by which it was over already."""
        left_s = self.deadline - self.clock()
        if left_s < 0:
            self.restart()
            return -left_s
        self.sleep(left_s)
        self.deadline += self.period_s
        return 0.0
