"""List the serial ports of this machine, and tell which arm is on which.

    python -m so101.tools.ports                  what is there
    python -m so101.tools.ports wiggle=true      move a joint of one arm by hand: its line for the config
    python -m so101.tools.ports sim_arm/follower sim_arm/leader wiggle=true      look at these alone

It only reads.
"""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass

from so101.config import launch, option, require_within
from so101.errors import HardwareError
from so101.robot.bus import ServoBus, ServoError
from so101.robot.feetech import TICKS_PER_TURN
from so101.robot.ports import PORTS_COMMAND, PortInfo, command, list_ports, open_port
from so101.schema import JOINTS

MOVED_TICKS = 60  # 5 degrees: a hand's doing, many times the encoder's own unrest
LOOK_EVERY_S = 0.05


@dataclass
class Config:
    """What the command line can set."""

    wiggle: bool = option(False, "find out which port an arm is on by moving one of its joints")
    ports: list[str] = option([], "look at these ports only; none: at all of this machine", positional=True)
    seconds: float = option(30.0, "how long to wait for the joint to be moved")

    def __post_init__(self) -> None:
        require_within(self, seconds=(1, 3600))


def main(config: Config) -> None:
    """List the ports, or wait for a moved joint. Raises HardwareError when no arm could be watched, or none moved."""
    known = {port.device: port for port in list_ports()}
    ports = [known.get(device, PortInfo(device, None, "", "", "", None)) for device in config.ports or known]
    if not ports:
        print("This machine has no serial port. Plug in the arm's USB cable (one that carries data, too).")
    for port in ports:
        print(f"{port}\n    in a config: {port.path}" if port.stable else port)
    if config.wiggle:
        _wiggle(ports, config.seconds)
    elif ports:
        print(f"{PORTS_COMMAND} wiggle=true tells which of them is which arm")


def _wiggle(ports: list[PortInfo], seconds: float) -> None:
    with ExitStack() as stack:
        watched = []
        for port in ports:
            try:
                bus = ServoBus(open_port(port.device, "port"), retries=1)
                stack.callback(bus.close)
                watched.append((port, bus, _limp_positions(port, bus)))
            except HardwareError as error:
                print(error)
        if not watched:
            raise HardwareError("none of these ports leads to an arm that can be moved by hand: see above")
        print(f"Now move any joint of one arm by hand ({seconds:.0f} s) ...", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for port, bus, start in watched:
                if (servo_id := _moved(bus, start)) is not None:
                    joint = JOINTS[servo_id - 1]
                    print(f'{joint} moved: it is the arm on {port}\nin its config: "port": {json.dumps(port.path)}')
                    return
            time.sleep(LOOK_EVERY_S)
    raise HardwareError(f"no joint moved by {MOVED_TICKS * 360 / TICKS_PER_TURN:.0f} degrees in {seconds:.0f} s")


def _limp_positions(port: PortInfo, bus: ServoBus) -> dict[int, int]:
    """Ticks of the servos that answer, by id. Raises HardwareError for none, and for one that is held stiff."""
    positions = {}
    for servo_id in range(1, len(JOINTS) + 1):
        try:
            positions[servo_id] = bus.read(servo_id, "Present_Position")
            stiff = bus.read(servo_id, "Torque_Enable")
        except ServoError:
            continue  # an arm with a missing servo can still be told by the others
        if stiff:
            raise HardwareError(
                f"{port.device}: {JOINTS[servo_id - 1]}'s torque is on, so it must not be moved by hand; free the "
                f"arm with {command('release', port.path)} first"
            )
    if not positions:
        raise HardwareError(f"{port.device}: no servo answers, so it is no arm, or one without power")
    return positions


def _moved(bus: ServoBus, start: dict[int, int]) -> int | None:
    """The servo farthest from where it was at the start, when that is far enough."""
    try:
        now = bus.sync_read("Present_Position", list(start))
    except ServoError:
        return None  # a reply was lost; the next look will do
    half = TICKS_PER_TURN // 2  # a joint may pass the encoder's end on its way
    farthest = max(start, key=lambda servo_id: abs((now[servo_id] - start[servo_id] + half) % TICKS_PER_TURN - half))
    distance = abs((now[farthest] - start[farthest] + half) % TICKS_PER_TURN - half)
    return farthest if distance >= MOVED_TICKS else None


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
