"""Settings and fixtures that hold for all tests."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch

from so101.sim.servos import SimPort, SimServos
from so101.timing import Clock
from so101.tools.serve_sim import serve

# Two OpenMP threads that wait for each other on a busy machine are slower than one: 98 s against 22 s measured.
torch.set_num_threads(1)


class LiveArm:
    """A simulated arm on a pseudo-terminal, in real time: `path` is what serial.Serial opens.

    The test is the hand and the world: it sets `servos` (angles, voltage, conditions) and `port.fault`.
    """

    def __init__(self, servos: SimServos) -> None:
        import tty  # not on Windows

        self.servos, self.port = servos, SimPort(servos)
        self._ours, self._theirs = os.openpty()
        tty.setraw(self._theirs)
        os.set_blocking(self._ours, False)
        self.path = os.ttyname(self._theirs)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            serve(self._ours, self.port, self.servos, Clock(), self._stop)

    def close(self) -> None:
        """Unplug it."""
        self._stop.set()
        self._thread.join(2)
        for end in (self._ours, self._theirs):
            with suppress(OSError):
                os.close(end)


@pytest.fixture
def live_arm() -> Iterator[LiveArm]:
    """A follower at rest, fresh from the factory but calibrated as SIM_CALIBRATION says."""
    if os.name != "posix":
        pytest.skip("this system has no pseudo-terminals")
    servos = SimServos()
    servos.angle[:5] = np.array([0.0, -1.80, 1.66, 0.73, 1.571])
    arm = LiveArm(servos)
    yield arm
    arm.close()
