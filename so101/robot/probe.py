"""What answers on a port: which servos, at which speed, in which state, and what their silence means.

Reads only: nothing here moves a joint or changes a servo.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

import serial

from so101.errors import HardwareError
from so101.robot import feetech
from so101.robot.arm import NO_MOTOR_POWER, SUPPLY_MARGIN, Arm
from so101.robot.bus import ServoBus, ServoError
from so101.robot.calibration import Calibration
from so101.robot.feetech import MODEL_STS3215, status_names
from so101.robot.ports import BAUD
from so101.schema import JOINTS

# Codes 0 to 4 of Baud_Rate. Documents give two values each for 5 to 7, so all of those are listened to.
BAUDS = (BAUD, 500_000, 250_000, 128_000, 115_200, 76_800, 57_600, 38_400, 19_200)
FIRST_REPLY_S = 0.2  # LeRobot allows a broadcast 3 ms for each id: enough up to id 60; new motors have 1
SILENCE_S = 0.1  # after the last reply
MOST_BYTES = 2048  # all 254 ids answer with 1524; more is a line that never falls silent
COLLISION_READS = 8  # of a position: two motors of one id differ in it, and spoil each other's replies
COLLISIONS = 4  # damaged replies of those that are no bad luck; a sound line has none
TWELVE_VOLT_SUPPLY = 9.0  # V; above what 7.4 V motors bear, below what a 12 V supply sags to
CALIBRATED = {"Homing_Offset": "homing_offset", "Min_Position_Limit": "range_min", "Max_Position_Limit": "range_max"}
SETUP_COMMAND = "python -m so101.tools.setup"
SILENT = (
    "no motor answers, though the USB adapter is there. Plug in the arm's power supply (USB does not feed the "
    "motors), check the cable from the board to the first motor, and on a Waveshare board set both jumpers to B (USB)"
)
COLLISION = (
    "replies collide, so two motors have the same id (or a cable is damaged). Leave one motor connected, and give "
    f"each its id with {SETUP_COMMAND}"
)


@dataclass(frozen=True)
class ServoState:
    """What one servo says of itself."""

    id: int
    model: int
    firmware: str
    voltage: float  # V
    min_voltage: float  # V; its own setting, as is max_voltage
    max_voltage: float
    temperature: int  # C
    max_temperature: int
    status: int  # feetech.STATUS_BITS
    torque: bool

    def __str__(self) -> str:
        torque = "on" if self.torque else "off"
        return (
            f"id {self.id}, model {self.model}, firmware {self.firmware}, {self.voltage:.1f} V, "
            f"{self.temperature} C, torque {torque}"
        )

    @property
    def supplied(self) -> bool:
        """Whether the supply is on, and one for this kind of motor."""
        return max(self.min_voltage, NO_MOTOR_POWER) <= self.voltage <= self.max_voltage * SUPPLY_MARGIN

    @property
    def complaints(self) -> list[str]:
        """What is not as it should be, in words."""
        found = []
        if self.model != MODEL_STS3215:
            found.append(f"is model {self.model}, not an STS3215 ({MODEL_STS3215}): settings may mean other things")
        made_for = f"gets {self.voltage:.1f} V, and is made for {self.min_voltage:.1f} .. {self.max_voltage:.1f}"
        if not self.supplied and self.voltage > self.max_voltage:
            found.append(
                f"{made_for}: unplug the power now; 7.4 V motors take a 5 V supply, only the 12 V kind takes 12"
            )
        elif not self.supplied:
            found.append(f"{made_for}: switch the arm's supply on (5 V, 5 A for 7.4 V motors), and check its plug")
        elif self.status & 1:
            found.append(f"{made_for}: check the supply and its plug")
        if self.temperature >= self.max_temperature - 10:
            found.append(f"is at {self.temperature} C and stops at {self.max_temperature}: let it cool")
        if other := status_names(self.status & ~1):
            found.append(f"reports {', '.join(other)}: support the arm, and switch its power off and on")
        return found


def hear(port: serial.Serial, baud: int) -> tuple[list[int], bool]:
    """The ids that answer a PING to all at `baud`, one for each reply, and whether anything else was heard.

    Motors with the same id speak at once, which comes out as that id twice, or as bytes that are no reply.
    Leaves the port at `baud`. Raises HardwareError when the port fails.
    """
    request = feetech.instruction_packet(feetech.BROADCAST_ID, feetech.PING)
    patience = port.timeout
    try:
        port.baudrate = baud
        port.read(port.in_waiting)
        port.write(request)
        port.timeout = FIRST_REPLY_S
        received = port.read(1)
        port.timeout = SILENCE_S
        while len(received) < MOST_BYTES and (more := port.read(MOST_BYTES)):
            received += more
        port.timeout = patience
    except ValueError:
        return [], False  # a speed that this adapter does not have
    except OSError as error:
        raise HardwareError(f"{port.port}: the port failed ({error}); plug its USB cable in again") from error
    received = received.replace(request, b"", 1)  # an adapter on one data wire hears itself
    ids: list[int] = []
    packet, end = feetech.find_status(received)
    while packet is not None:
        ids.append(packet.servo_id)
        packet, end = feetech.find_status(received, end)
    return ids, len(received) > len(ids) * feetech.PACKET_OVERHEAD


def inspect(bus: ServoBus, servo_id: int) -> ServoState | None:
    """The state of one servo; None when it is silent. Raises ServoError when two motors answer to its id."""
    damaged, state = damaged_replies(bus), None
    with suppress(ServoError):  # silent, or worse: the count tells
        state = _read_state(bus, servo_id)
    if damaged_replies(bus) - damaged >= COLLISIONS:
        raise ServoError(f"id {servo_id}: {COLLISION}")
    return state


def _read_state(bus: ServoBus, servo_id: int) -> ServoState:
    def read(register: str) -> int:
        return bus.read(servo_id, register)

    for _ in range(COLLISION_READS):
        read("Present_Position")
    return ServoState(
        id=servo_id,
        model=read("Model_Number"),
        firmware=f"{read('Firmware_Major_Version')}.{read('Firmware_Minor_Version')}",
        voltage=read("Present_Voltage") / 10,
        min_voltage=read("Min_Voltage_Limit") / 10,
        max_voltage=read("Max_Voltage_Limit") / 10,
        temperature=read("Present_Temperature"),
        max_temperature=read("Max_Temperature_Limit"),
        status=read("Status"),
        torque=read("Torque_Enable") != 0,
    )


def damaged_replies(bus: ServoBus) -> int:
    """How many replies came so far that were not valid; silence is not counted."""
    return sum(bus.faults.values()) - bus.faults["no reply"]


def explain_gap(answering: Collection[str]) -> str | None:
    """What is wrong with the chain of motors where only the joints in `answering` answer; None: nothing."""
    missing = [name for name in JOINTS if name not in answering]
    if not missing:
        return None
    if len(missing) == len(JOINTS):
        return SILENT
    first, servo_id = missing[0], JOINTS.index(missing[0]) + 1
    behind = [name for name in JOINTS[servo_id:] if name in answering]
    if behind:
        return (
            f"{first} (id {servo_id}) does not answer, and {behind[0]} behind it does, so the cables are good: its "
            f"motor has another id or speed, or is broken. Connect it alone and run {SETUP_COMMAND} joint={first}"
        )
    before = JOINTS[servo_id - 2] if servo_id > 1 else "the board"
    also = f", nor does anything behind it ({', '.join(missing[1:])})" if missing[1:] else ""
    return (
        f"{first} (id {servo_id}) does not answer{also}: check the cable from {before} to {first}; if it is "
        f"good, connect {first}'s motor alone and run {SETUP_COMMAND} joint={first}"
    )


def firmware_mix(states: Iterable[ServoState]) -> str | None:
    """A sentence for servos of different firmware; None where it is all the same."""
    owners: dict[str, list[str]] = {}
    for state in states:
        owners.setdefault(state.firmware, []).append(str(state.id))
    if len(owners) < 2:
        return None
    said = "; ".join(f"{version} in id {', '.join(ids)}" for version, ids in sorted(owners.items()))
    return f"firmware differs: {said}. That works; should replies be lost, update all with Feetech's FD program"


def differing_joints(bus: ServoBus, calibration: Calibration) -> list[str]:
    """The joints whose servos do not hold what `calibration` says. Raises ServoError when a servo is silent."""
    held = {register: bus.sync_read(register, calibration.ids) for register in CALIBRATED}
    return [
        name
        for name, joint in calibration.joints.items()
        if any(held[register][joint.id] != getattr(joint, field) for register, field in CALIBRATED.items())
    ]


def swapped(follower: Arm, leader: Arm) -> str | None:
    """A sentence when each port seems to lead to the other arm; None when not, or when a servo is silent.

    Told by what calibration wrote into the servos, and by the supply: a leader is never fed 12 V.
    """
    advice = "exchange the two ports in the config (python -m so101.tools.ports wiggle=true tells which is which)"
    with (
        follower.bus.impatient(),
        leader.bus.impatient(),
        suppress(ServoError),
    ):  # Arm.connect names every servo that is silent
        for arm, other, name in ((follower, leader, "follower"), (leader, follower, "leader")):
            if differing_joints(arm.bus, arm.calibration) and not differing_joints(arm.bus, other.calibration):
                return f"leader and follower seem swapped: the {name}'s port leads to the other's servos; {advice}"
        volts = [
            max(arm.bus.sync_read("Present_Voltage", arm.calibration.ids).values()) / 10 for arm in (follower, leader)
        ]
        if volts[0] < TWELVE_VOLT_SUPPLY < volts[1]:
            return (
                f"leader and follower seem swapped: the follower's port leads to an arm with {volts[0]:.1f} V, the "
                f"leader's to one with {volts[1]:.1f} V, which is a follower's supply; {advice}"
            )
    return None
