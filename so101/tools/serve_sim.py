"""Puts the simulated follower on a pseudo-terminal, in real time, so that any program can talk to it.

Prints the path of the port to open, on a line of its own, and runs until it is stopped.
`python -m so101.tools.serve_sim`
"""

import os
import select
import threading
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from so101.config import launch, option
from so101.errors import ConfigError, HardwareError
from so101.sim.servos import Faults, SimPort, SimServos
from so101.timing import SUBSTEP, Clock


@dataclass
class Config:
    """What the command line can set."""

    fault_rate: float = option(0.0, "fraction of the replies that are lost, damaged or late, 0 .. 1")

    def __post_init__(self) -> None:
        if not 0 <= self.fault_rate <= 1:
            raise ConfigError(f"fault_rate: got {self.fault_rate}, must be 0 .. 1")


def main(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises HardwareError on a system without pseudo-terminals."""
    if os.name != "posix":
        raise HardwareError("serve_sim: this system has no pseudo-terminals; Linux and macOS have them")
    import tty  # not on Windows

    ours, theirs = os.openpty()  # theirs stays open, so that a program may close the port and come back
    tty.setraw(theirs)
    os.set_blocking(ours, False)
    servos = SimServos()
    port = SimPort(servos, Faults(np.random.default_rng(0), config.fault_rate) if config.fault_rate else None)
    with suppress(KeyboardInterrupt):
        print(os.ttyname(theirs), flush=True)
        serve(ours, port, servos, Clock(), threading.Event())
    os.close(ours)
    os.close(theirs)


def serve(terminal: int, port: SimPort, servos: SimServos, clock: Clock, stop: threading.Event) -> None:
    """Pass bytes between `terminal` (a file descriptor) and `port`; move `servos` in step with `clock`."""
    moved_until = clock.now()
    while not stop.is_set():
        readable, _, _ = select.select([terminal], [], [], max(0.0, moved_until + SUBSTEP - clock.now()))
        while clock.now() >= moved_until + SUBSTEP:
            servos.step(SUBSTEP)
            moved_until += SUBSTEP
        if readable:
            port.write(os.read(terminal, 4096))
            with suppress(BlockingIOError):  # nobody reads: the bytes are lost, as on a wire
                os.write(terminal, port.read(port.in_waiting))


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
