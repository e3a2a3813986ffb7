"""Time: one clock for the program, real or simulated, and the fixed rate at which the control loop runs."""

import time
from collections.abc import Callable

SUBSTEP = 0.02  # s; the simulated servos' time constant is 0.09 s, so 0.02 s resolves it


class Clock:
    """The machine's monotonic clock, starting at 0."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def now(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._start

    def sleep_until(self, deadline: float) -> None:
        """Return at `deadline` (s on this clock), or at once when it has passed."""
        time.sleep(max(0.0, deadline - self.now()))


class SimClock(Clock):
    """A clock that only moves when somebody waits, and moves the simulated world with it.

    Each function in `on_substep` is called with every step of `SUBSTEP` seconds. `pace` 1.0 makes a
    simulated second last a real one, for a person who drives; None runs as fast as the machine can.
    """

    def __init__(self, pace: float | None = None) -> None:
        super().__init__()
        self.pace = pace
        self.on_substep: list[Callable[[float], None]] = []
        self._substeps = 0

    def now(self) -> float:
        """Simulated seconds since the clock was made."""
        return self._substeps * SUBSTEP

    def sleep_until(self, deadline: float) -> None:
        """Advance the world to `deadline` in whole substeps (to within half of one).

        Halfway between two it is the earlier, however the times have been rounded: a reset moves in such periods, and
        where it ends must not depend on when it began.
        """
        while deadline - self.now() > SUBSTEP / 2 + 1e-9:
            self._substeps += 1
            for step in self.on_substep:
                step(SUBSTEP)
            if self.pace is not None:
                time.sleep(SUBSTEP / self.pace)


class Rate:
    """A fixed period on an absolute schedule, so that lateness does not add up; misses are counted."""

    def __init__(self, clock: Clock, period: float) -> None:
        self.clock, self.period = clock, period
        self.overruns = 0
        self.busy = 0.0  # s of the last period that were not waited
        self.restart()

    def restart(self) -> None:
        """Start the schedule anew from now (after a reset, say)."""
        self._deadline = self.clock.now() + self.period

    def wait(self) -> float:
        """Wait for the end of this period; return how late (s) it was, 0 when on time.

        A period that was missed altogether is counted and dropped: the schedule goes on from now
        instead of running a burst of short periods after a stall.
        """
        late = self.clock.now() - self._deadline
        self.busy = self.period + late
        if late > 0:
            self.overruns += 1
            self._deadline = self.clock.now()
        else:
            self.clock.sleep_until(self._deadline)
        self._deadline += self.period
        return max(0.0, late)

    def drop_short(self) -> None:
        """After work that left less than a quarter of the period under way: count it as missed, start anew from now.

        Nothing moves in a tick that short, and a velocity measured over it is noise, or 0 / 0.
        """
        if self._deadline - self.clock.now() < self.period / 4:
            self.overruns += 1
            self.restart()
