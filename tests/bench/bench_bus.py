"""Bus round trips over a pseudo-terminal, in microseconds, beside the wire's own time.

`python tests/bench/bench_bus.py`. The simulated servos run in a process of their own, and take no time to travel:
on a real arm the wire adds 10 us a byte at 1 Mbaud, and the USB adapter its latency.
"""

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import serial

from so101.robot.arm import Arm
from so101.robot.bus import ServoBus
from so101.sim.servos import SIM_CALIBRATION

TIMES = 2000
IDS = SIM_CALIBRATION.ids


class CountingPort(serial.Serial):
    """Counts the bytes that pass."""

    passed = 0

    def write(self, data: bytes) -> int | None:
        self.passed += len(data)
        return super().write(data)

    def read(self, size: int = 1) -> bytes:
        data = super().read(size)
        self.passed += len(data)
        return data


def main() -> None:
    """Print the table."""
    command = [sys.executable, "-m", "so101.tools.serve_sim"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        with CountingPort(server.stdout.readline().strip(), 1_000_000, timeout=0.05) as port:
            bus = ServoBus(port)
            arm = Arm(bus, SIM_CALIBRATION)
            arm.configure()
            position = arm.read().position
            transactions: dict[str, Callable[[], object]] = {
                "sync read of everything, six servos": lambda: bus.sync_read_span(
                    "Present_Position", "Present_Current", IDS
                ),
                "the same as Arm.read, in rad": arm.read,
                "sync read of positions, six servos": lambda: bus.sync_read("Present_Position", IDS),
                "sync write of goals, six servos": lambda: bus.sync_write("Goal_Position", dict.fromkeys(IDS, 2048)),
                "the same as Arm.command, in rad": lambda: arm.command(position),
                "sync write and sync read, one tick": lambda: (arm.command(position), arm.read()),
                "read of one register": lambda: bus.read(1, "Present_Position"),
                "write of one register": lambda: bus.write(1, "Acceleration", 254),
            }
            print(f"{'':38}{'median us':>10}{'p99 us':>9}{'bytes':>7}{'wire us':>9}")
            for name, do in transactions.items():
                port.passed, taken = 0, np.empty(TIMES)
                for index in range(TIMES):
                    start = time.perf_counter()
                    do()
                    taken[index] = time.perf_counter() - start
                size = port.passed // TIMES
                median, late = np.percentile(taken * 1e6, [50, 99])
                print(f"{name:38}{median:10.0f}{late:9.0f}{size:7d}{10 * size:9d}")
            assert not bus.faults, bus.report()
        server.terminate()


if __name__ == "__main__":
    main()
