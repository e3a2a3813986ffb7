"""What answers on a port: which servos, at which speed, in which state, and what their silence means.

Reads only: nothing here moves a joint or changes a servo.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import serial

from so101.errors import HardwareError
from so101.robot import feetech
from so101.robot.bus import ServoBus, ServoError
from so101.robot.calibration import Calibration, differences
from so101.robot.feetech import MODEL_STS3215, status_names
from so101.robot.ports import BAUD, PORTS_COMMAND, command
from so101.schema import JOINTS

# Codes 0 to 4 of Baud_Rate. Documents give two values each for 5 to 7, so all of those are listened to.
BAUDS = (BAUD, 500_000, 250_000, 128_000, 115_200, 76_800, 57_600, 38_400, 19_200)
FIRST_REPLY_S = 0.2  # LeRobot allows a broadcast 3 ms for each id: enough up to id 60; new motors have 1
LAST_REPLY_S = 0.8  # enough up to id 253
SILENCE_S = 0.1  # after the last reply
MOST_BYTES = 2048  # all 254 ids answer with 1524; more is a line that never falls silent
COLLISION_READS = 8  # of a position: two motors of one id differ in it, and spoil each other's replies
COLLISIONS = 4  # damaged replies of those that are no bad luck; a sound line has none
SUPPLY_MARGIN = 1.1  # a 7.4 V servo allows 8.0 V, and a full 8.4 V battery does it no harm; 12 V does
NO_MOTOR_POWER = 4.5  # V; a 5 V supply reads 4.8 and more at the servos
TWELVE_VOLT_SUPPLY = 9.0  # V; above what 7.4 V motors bear, below what a 12 V supply sags to
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SILENT = (
    "no motor answers, though the USB adapter is there. Plug in the arm's power supply (USB does not feed the "
    "motors), check the cable from the board to the first motor, and on a Waveshare board set both jumpers to B (USB)"
)
Wired = tuple[ServoBus, Calibration]  # an arm's line, and what the servos on it should hold


def explain_collision(port: str | None) -> str:
    """What damaged replies mean."""
    return (
        f"replies collide: two motors have the same id, a cable is damaged, or this is another device's port. Leave "
        f"one motor connected, and give each its id with {command('setup', port)}"
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
    stored: Mapping[str, int]  # what it keeps without power, by register

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
        supply = f"gets {self.voltage:.1f} V, and is made for {self.min_voltage:.1f} .. {self.max_voltage:.1f}"
        if not self.supplied and self.voltage > self.max_voltage:
            found.append(f"{supply}: unplug the power now; 7.4 V motors take a 5 V supply, only the 12 V kind takes 12")
        elif not self.supplied:
            found.append(
                f"gets {self.voltage:.1f} V, so it answers, but its motor has no power: switch the arm's supply on "
                f"(5 V, 5 A for 7.4 V motors), and check its plug"
            )
        elif self.status & 1:
            found.append(f"{supply}: check the supply and its plug")
        if self.temperature >= self.max_temperature - 10:
            found.append(f"is at {self.temperature} C and stops at {self.max_temperature}: let it cool")
        if other := status_names(self.status & ~1):
            found.append(f"reports {', '.join(other)}: support the arm, and switch its power off and on")
        return found


def hear(port: serial.Serial, baud: int, patient: bool = False) -> tuple[list[int], bool]:
    """The ids that answer a PING to all at `baud`, one for each reply, and whether anything else was heard.

    Motors with the same id speak at once, which comes out as that id twice, or as bytes that are no reply. The reply
    of an id above 60 may need a `patient` listener; others hear it as noise at a later speed. Leaves the
    port at `baud`. Raises HardwareError when the port fails.
    """
    request = feetech.instruction_packet(feetech.BROADCAST_ID, feetech.PING)
    patience = port.timeout
    try:
        port.baudrate = baud
        port.read(port.in_waiting)
        port.write(request)
        port.timeout = LAST_REPLY_S if patient else FIRST_REPLY_S
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
    """The state of one servo; None when it is silent.

    Raises ServoError when two motors answer to its id, HardwareError when the port fails.
    """
    faults, damaged, state = bus.faults.total(), damaged_replies(bus), None
    try:
        with bus.impatient():
            for _ in range(COLLISION_READS):
                bus.read(servo_id, "Present_Position")
        state = read_states(bus, [servo_id])[servo_id]
    except ServoError as error:
        if bus.faults.total() == faults:  # neither silence nor damage was met: nothing could be sent
            raise HardwareError(str(error)) from error
    if damaged_replies(bus) - damaged >= COLLISIONS:
        raise ServoError(f"{bus.names.get(servo_id, f'id {servo_id}')}: {explain_collision(bus.port.name)}")
    return state


def read_states(bus: ServoBus, ids: Sequence[int]) -> dict[int, ServoState]:
    """The states of several servos, by id, in two transactions. ServoError at once when one is silent."""
    with bus.impatient():
        stored = bus.sync_read_span("Firmware_Major_Version", "Homing_Offset", ids)
        now = bus.sync_read_span("Torque_Enable", "Status", ids)
    return {
        servo_id: ServoState(
            id=servo_id,
            model=kept["Model_Number"],
            firmware=f"{kept['Firmware_Major_Version']}.{kept['Firmware_Minor_Version']}",
            voltage=now[servo_id]["Present_Voltage"] / 10,
            min_voltage=kept["Min_Voltage_Limit"] / 10,
            max_voltage=kept["Max_Voltage_Limit"] / 10,
            temperature=now[servo_id]["Present_Temperature"],
            max_temperature=kept["Max_Temperature_Limit"],
            status=now[servo_id]["Status"],
            torque=now[servo_id]["Torque_Enable"] != 0,
            stored=kept,
        )
        for servo_id, kept in stored.items()
    }


def read_chain(bus: ServoBus, ids: Sequence[int]) -> dict[str, ServoState]:
    """The states of all six servos, by joint; `ids` in joint order. Two transactions where all is well.

    Raises HardwareError, which names the gap in the chain or the motors with one id, and what to do.
    """
    try:
        states = read_states(bus, ids)
    except ServoError:  # asked one by one they tell who is silent, and who speaks at the same time
        states = {servo_id: state for servo_id in ids if (state := inspect(bus, servo_id)) is not None}
    chain = {name: states[servo_id] for name, servo_id in zip(JOINTS, ids, strict=True) if servo_id in states}
    if gap := explain_gap(chain, bus.port.name):
        elsewhere = (
            f". If all that is well, this is another device's port ({PORTS_COMMAND} lists them), or the motors have "
            f"another speed than {BAUD} baud ({command('setup', bus.port.name)} finds and changes it, motor by motor)"
        )
        raise HardwareError(f"{bus.port.name}: {gap}{'' if chain else elsewhere}")
    return chain


def damaged_replies(bus: ServoBus) -> int:
    """How many replies came so far that were not valid; silence is not counted."""
    return sum(bus.faults.values()) - bus.faults["no reply"]


def explain_gap(answering: Collection[str], port: str | None) -> str | None:
    """What is wrong with the chain of motors on `port` where only the joints in `answering` answer; None: nothing."""
    missing = [name for name in JOINTS if name not in answering]
    if not missing:
        return None
    if len(missing) == len(JOINTS):
        return SILENT
    first, servo_id = missing[0], JOINTS.index(missing[0]) + 1
    alone = command("setup", port, f"joint={first}")
    behind = [name for name in JOINTS[servo_id:] if name in answering]
    if behind:
        return (
            f"{first} (id {servo_id}) does not answer, and {behind[0]} behind it does, so the cables are good: its "
            f"motor has another id or speed, or is broken. Connect it alone and run {alone}"
        )
    before = JOINTS[servo_id - 2] if servo_id > 1 else "the board"
    also = f", nor does anything behind it ({', '.join(missing[1:])})" if missing[1:] else ""
    return (
        f"{first} (id {servo_id}) does not answer{also}: check the cable from {before} to {first}; if it is "
        f"good, connect {first}'s motor alone and run {alone}"
    )


def shared_complaints(states: Mapping[str, ServoState], port: str | None) -> list[str]:
    """The complaints of the servos on a port, by name; those that differ in their figures only are one."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, state in states.items():
        for complaint in state.complaints:
            found.setdefault(NUMBER.sub("", complaint), []).append((name, complaint))
    lines = []
    for sharing in found.values():
        names = [name for name, _ in sharing]
        who = f"the six servos on {port}" if len(names) == len(JOINTS) else ", ".join(names)
        figures = zip(*(NUMBER.findall(complaint) for _, complaint in sharing), strict=True)
        spans = [sorted(set(values), key=float) for values in figures]
        shown = [" .. ".join(dict.fromkeys((values[0], values[-1]))) for values in spans]
        words = NUMBER.split(sharing[0][1])
        said = "".join(word + figure for word, figure in zip_longest(words, shown, fillvalue=""))
        lines.append(f"{'each of ' * (len(names) > 1)}{who} {said}")
    return lines


def firmware_mix(states: Iterable[ServoState]) -> str | None:
    """A sentence for servos of different firmware; None where it is all the same."""
    owners: dict[str, list[str]] = {}
    for state in states:
        owners.setdefault(state.firmware, []).append(str(state.id))
    if len(owners) < 2:
        return None
    said = "; ".join(f"{version} in id {', '.join(ids)}" for version, ids in sorted(owners.items()))
    return f"firmware differs: {said}. That works; should replies be lost, update all with Feetech's FD program"


def swapped(follower: Wired, leader: Wired) -> str | None:
    """A sentence when each port seems to lead to the other arm; None when not, or when a servo is silent.

    Told by what calibration wrote into the servos, and by the supply: a leader is never fed 12 V.
    """
    advice = f"exchange the two ports in the config ({PORTS_COMMAND} wiggle=true tells which is which)"
    try:
        states = [read_states(bus, calibration.ids) for bus, calibration in (follower, leader)]
    except ServoError:  # Arm.connect says which servo is silent, and why
        return None
    of_follower, of_leader = ({servo_id: state.stored for servo_id, state in found.items()} for found in states)
    own = bool(differences(follower[1], of_follower)), bool(differences(leader[1], of_leader))
    fits = not differences(leader[1], of_follower), not differences(follower[1], of_leader)
    if all(own) and any(fits):  # where one arm has its own file's values, the other's file alone is wrong
        name = "follower" if fits[0] else "leader"
        return f"leader and follower seem swapped: the {name}'s port leads to the other's servos; {advice}"
    volts = [max(state.voltage for state in found.values()) for found in states]
    if volts[0] < TWELVE_VOLT_SUPPLY < volts[1]:
        return (
            f"leader and follower seem swapped: the follower's port leads to an arm with {volts[0]:.1f} V, the "
            f"leader's to one with {volts[1]:.1f} V, which is a follower's supply; {advice}"
        )
    return None
