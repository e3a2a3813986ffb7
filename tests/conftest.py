"""Settings and fixtures that hold for all tests."""

import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so101 import signals
from so101.sim.script import Event, play
from so101.sim.servos import SimPort, SimServos
from so101.timing import Clock
from so101.tools.serve_sim import Terminal, serve

# Two OpenMP threads that wait for each other on a busy machine are slower than one: 98 s against 22 s measured.
torch.set_num_threads(1)
# A run under nohup, or in a shell's background, would hand its ignored signals on to the programs under test.
for _number in signals.ENDING:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def signals_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signals come as in a program that `launch` started, and none of an earlier test is in the air."""
    handlers = {number: signal.getsignal(number) for number in signals.ENDING}
    monkeypatch.setattr(signals, "_came_at", -math.inf)
    signals.take_signals()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class LiveArm:
    """A simulated arm on a pseudo-terminal, in real time: `path` is what serial.Serial opens.

    The test is the hand and the world: it sets `servos` (angles, voltage, conditions) and `port.fault`, and plays
    what sim/script.py knows.
    """

    def __init__(self, servos: SimServos, link: Path) -> None:
        self.servos, self.port, self.path = servos, SimPort(servos), str(link)
        self._terminal, self._stop = Terminal(link), threading.Event()
        self._thread = threading.Thread(
            target=serve, args=(self._terminal, self.port, servos, Clock(), self._stop), daemon=True
        )
        self._thread.start()

    def play(self, **event: Any) -> None:
        """Let something happen: play(after=1.0, fault="vanish", ids=[4], seconds=0.5)."""
        play(Event(**event), self.port)

    def close(self) -> None:
        """Unplug it."""
        self._stop.set()
        self._thread.join(2)
        if self._terminal.plugged:
            self._terminal.unplug()


@pytest.fixture
def live_arm(tmp_path: Path) -> Iterator[LiveArm]:
    """A follower at rest, fresh from the factory but calibrated as SIM_CALIBRATION says."""
    if os.name != "posix":
        pytest.skip("this system has no pseudo-terminals")
    servos = SimServos()
    servos.angle[:5] = np.array([0.0, -1.80, 1.66, 0.73, 1.571])
    arm = LiveArm(servos, tmp_path / "follower")
    yield arm
    arm.close()
