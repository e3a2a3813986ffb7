"""Switch the torque of an arm off, servo by servo, whatever state a program left it in.

    python -m so101.tools.release /dev/serial/by-id/...

It needs no calibration. Support the arm: it goes limp.
"""

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

from so101.config import launch, option, require_within
from so101.errors import ConfigError, HardwareError
from so101.robot.bus import ServoBus, ServoError, together
from so101.robot.feetech import MAX_ID
from so101.robot.ports import open_port
from so101.schema import JOINTS
from so101.signals import signals_held


@dataclass
class Config:
    """What the command line can set."""

    port: str = option(help="serial port of the arm; python -m so101.tools.ports lists them", positional=True)
    ids: list[int] = option([1, 2, 3, 4, 5, 6], "servos to release")
    wait_s: float = option(3.0, "seconds to take hold of the arm before it goes limp")

    def __post_init__(self) -> None:
        require_within(self, wait_s=(0, 60))
        if not self.ids or any(not 0 <= servo_id <= MAX_ID for servo_id in self.ids):
            raise ConfigError(f"ids: got {self.ids}, needs one or more of 0 .. {MAX_ID}")


def main(config: Config) -> None:
    """Release every servo that answers. Raises HardwareError, naming them, when some did not."""
    names = {servo_id: name for servo_id, name in enumerate(JOINTS, start=1) if servo_id in config.ids}
    with closing(ServoBus(open_port(config.port, "port"), names=names)) as bus:
        print(f"support the arm: it goes limp in {config.wait_s:g} s", flush=True)
        time.sleep(config.wait_s)
        with signals_held():
            failures = release(bus, config.ids)
    for servo_id in config.ids:
        print(f"{servo_id} {names.get(servo_id, 'servo')}: {'failed' if servo_id in failures else 'released'}")
    if failures:
        raise HardwareError(
            f"{len(failures)} of {len(config.ids)} servos were not released; cut the arm's power. "
            + together(failures.values())
        )


def release(bus: ServoBus, ids: Iterable[int]) -> dict[int, str]:
    """Switch the torque of each servo off and look whether it is; what failed, {servo id: in words}."""
    failures = {}
    for servo_id in ids:
        try:
            bus.write(servo_id, "Torque_Enable", 0)
            if torque := bus.read(servo_id, "Torque_Enable"):
                failures[servo_id] = f"servo {servo_id}: Torque_Enable is still {torque}"
        except ServoError as error:
            failures[servo_id] = str(error)
    return failures


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
