"""Give the motors of a new arm their ids, one at a time, and then check the whole chain.

    python -m so101.tools.setup port=/dev/serial/by-id/... arm=follower

It asks for one motor after the other, from the gripper's to the shoulder's: connect each alone to the board, with its
power on, and press Enter.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import serial

from so101.config import launch, option
from so101.errors import ConfigError, HardwareError, UserError
from so101.robot.bus import ServoBus, ServoError
from so101.robot.ports import BAUD, open_port, sweep_command
from so101.robot.probe import (
    BAUDS,
    SILENT,
    explain_collision,
    firmware_mix,
    hear,
    inspect,
    read_chain,
    shared_complaints,
)
from so101.schema import JOINTS
from so101.tools.ask import INPUT_ENDED

GEARS = {"follower": ["1/345"] * 6, "leader": ["1/191", "1/345", "1/191", "1/147", "1/147", "1/147"]}


@dataclass
class Config:
    """What the command line can set."""

    port: str = option(help="serial port of the arm; python -m so101.tools.ports lists them")
    arm: Literal["follower", "leader"] = option("follower", "which arm is built; the leader's motors have three gears")
    joint: str | None = option(None, "set up this joint's motor only (a replacement, say); null: all six")

    def __post_init__(self) -> None:
        if self.joint not in (None, *JOINTS):
            raise ConfigError(f"joint: got {self.joint!r}, must be one of {', '.join(JOINTS)}")


def main(config: Config) -> None:
    """Set up one motor or all six. Raises HardwareError when the input ends before what is wrong is mended."""
    open_port(config.port, "port").close()  # a wrong port is told before anybody pulls cables
    done: dict[int, str] = {}
    for joint in JOINTS[::-1] if config.joint is None else [config.joint]:
        servo_id = JOINTS.index(joint) + 1
        gear = GEARS[config.arm][servo_id - 1]
        prompt = f"Connect only the motor for the {config.arm}'s {joint} (gear {gear}) to the board, and press Enter."
        _until_good(config.port, prompt, joint, partial(_set_up, servo_id=servo_id, done=done))
        done[servo_id] = joint
    prompt = f"Connect all six motors in a chain, {JOINTS[0]} first on the board, and press Enter for the check."
    _until_good(config.port, prompt, "chain", _check_chain)
    print(f"The {config.arm}'s motors are set up. Next: {sweep_command(config.port, config.arm)}")


def _until_good(device: str, prompt: str, what: str, do: Callable[[serial.Serial], str]) -> None:
    """Ask, and do it; where the hardware is not as it should be, say why and ask again."""
    problem: UserError = ConfigError(INPUT_ENDED)
    while True:
        print(f"\n{prompt}", flush=True)
        if not sys.stdin.readline():
            raise problem
        try:
            with open_port(device, "port") as port:  # anew each time: its cable may have been pulled, too
                print(f"{what}: {do(port)}")
            return
        except HardwareError as error:
            problem = error
            print(f"{what}: {error}")


def _set_up(port: serial.Serial, servo_id: int, done: dict[int, str]) -> str:
    """Give the one motor on the line its id and 1 Mbaud, where it has others; what was done, in words."""
    baud, found = _only_motor(port)
    if found != servo_id and found in done:
        raise HardwareError(f"this is still {done[found]}'s motor (id {found}): unplug it and connect the next one")
    bus = ServoBus(port)
    state = inspect(bus, found)
    if state is None:
        raise HardwareError(f"id {found} was heard once, and then no more: push both plugs of its cable in firmly")
    for complaint in state.complaints:
        print(f"warning: this motor {complaint}")
    if (found, baud) == (servo_id, BAUD):
        return f"{state}; left as it is"
    bus.write_eprom(found, "ID", servo_id)
    if baud != BAUD:
        _to_full_speed(port, bus, servo_id)
    return f"{state}, at {baud} baud; now id {bus.read(servo_id, 'ID')} at {BAUD} baud"


def _only_motor(port: serial.Serial) -> tuple[int, int]:
    """Baud and id of the one motor that answers; leaves the port at that baud. HardwareError for none or several."""
    for patient in (False, True):
        if patient:
            print("no clear answer yet; listening on for motors with high ids, which takes 10 seconds", flush=True)
            hear(port, BAUD, patient)  # what answers late to the first round has come when this ends
        for baud in BAUDS:
            ids, noise = hear(port, baud, patient)
            if len(set(ids)) > 1:
                listed = ", ".join(str(servo_id) for servo_id in sorted(set(ids)))
                raise HardwareError(f"{len(set(ids))} motors answer, with ids {listed}: leave only one connected")
            # Noise may be a high id's reply that comes when another speed is listened to already.
            if len(ids) > 1 or (noise and not ids and patient):
                raise HardwareError(explain_collision(port.port))
            if ids:
                return baud, ids[0]
    raise HardwareError(SILENT)


def _to_full_speed(port: serial.Serial, bus: ServoBus, servo_id: int) -> None:
    """Set Baud_Rate to 0; no other code is ever written, as documents disagree on what they mean."""
    bus.write(servo_id, "Torque_Enable", 0)
    baud = port.baudrate
    try:
        with bus.unlocked(servo_id, servo_id):
            with suppress(ServoError):  # the servo changes over at once, and acknowledges at either speed
                ServoBus(port, retries=0).write(servo_id, "Baud_Rate", 0)
            port.baudrate = BAUD
            if (code := bus.read(servo_id, "Baud_Rate")) != 0:
                raise HardwareError(
                    f"id {servo_id}: Baud_Rate reads {code} after 0 was written; switch its power off and on"
                )
    except BaseException:
        port.baudrate = baud  # it may not have changed over, and then it did not hear the lock
        with suppress(ServoError):
            bus.write(servo_id, "Lock", 1)
        raise


def _check_chain(port: serial.Serial) -> str:
    """Look at all six in their places. Raises HardwareError naming the first gap."""
    chain = read_chain(ServoBus(port), range(1, len(JOINTS) + 1))
    for joint, state in chain.items():
        print(f"{joint}: {state}")
    for said in shared_complaints(chain, port.name):
        print(f"warning: {said}")
    if mix := firmware_mix(chain.values()):
        print(f"warning: {mix}")
    return "all six motors answer"


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
