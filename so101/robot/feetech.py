"""The Feetech STS3215's serial protocol as bytes, and its register table. No input or output here.

A packet is `FF FF | id | length | instruction or error | parameters | checksum`; numbers are
little-endian, and signed ones are a magnitude with a sign bit (the bit differs by register).
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

from so101.errors import HardwareError

HEADER = b"\xff\xff"
BROADCAST_ID = 0xFE
MAX_ID = 253
MAX_LENGTH = 250  # of the length field; longer than anything that is sent, so it must be noise
PACKET_OVERHEAD = 6  # header (2), id, length, instruction or error, checksum

PING = 0x01
READ = 0x02
WRITE = 0x03
REG_WRITE = 0x04  # a write that waits for ACTION
ACTION = 0x05
SYNC_READ = 0x82
SYNC_WRITE = 0x83
INSTRUCTIONS = {
    PING: "PING",
    READ: "READ",
    WRITE: "WRITE",
    REG_WRITE: "REG WRITE",
    ACTION: "ACTION",
    SYNC_READ: "SYNC READ",
    SYNC_WRITE: "SYNC WRITE",
}

MODEL_STS3215 = 777
TICKS_PER_TURN = 4096

# The bits of a reply's error byte and of the Status register. They say how the servo is, not that the
# instruction was refused: the data of such a reply is valid.
STATUS_BITS = {1: "voltage", 2: "angle sensor", 4: "overheat", 8: "over-current", 32: "overload"}


class Register(NamedTuple):
    """Where a value lies in a servo. `sign_bit` None: the value is never negative."""

    address: int
    size: int  # bytes
    sign_bit: int | None = None
    eprom: bool = False  # kept without power, if Lock is 0 when it is written
    read_only: bool = False


def _eprom(address: int, size: int, sign_bit: int | None = None, read_only: bool = False) -> Register:
    return Register(address, size, sign_bit, eprom=True, read_only=read_only)


def _measured(address: int, size: int, sign_bit: int | None = None) -> Register:
    return Register(address, size, sign_bit, read_only=True)


REGISTERS = {
    "Firmware_Major_Version": _eprom(0, 1, read_only=True),
    "Firmware_Minor_Version": _eprom(1, 1, read_only=True),
    "Model_Number": _eprom(3, 2, read_only=True),
    "ID": _eprom(5, 1),
    "Baud_Rate": _eprom(6, 1),  # 0 is 1 Mbit/s; documents disagree about codes 5 to 7
    "Return_Delay_Time": _eprom(7, 1),  # 2 us
    "Response_Status_Level": _eprom(8, 1),  # 1: every instruction is answered; 0: only PING and reads
    "Min_Position_Limit": _eprom(9, 2),  # ticks
    "Max_Position_Limit": _eprom(11, 2),  # both limits 0: turns without end
    "Max_Temperature_Limit": _eprom(13, 1),  # C
    "Max_Voltage_Limit": _eprom(14, 1),  # 0.1 V
    "Min_Voltage_Limit": _eprom(15, 1),
    "Max_Torque_Limit": _eprom(16, 2),  # 0.1 %; copied to Torque_Limit at power-up only
    "Phase": _eprom(18, 1),
    "Unloading_Condition": _eprom(19, 1),
    "LED_Alarm_Condition": _eprom(20, 1),
    "P_Coefficient": _eprom(21, 1),
    "D_Coefficient": _eprom(22, 1),  # the order in the servo is P, D, I
    "I_Coefficient": _eprom(23, 1),
    "Minimum_Startup_Force": _eprom(24, 2),
    "CW_Dead_Zone": _eprom(26, 1),
    "CCW_Dead_Zone": _eprom(27, 1),
    "Protection_Current": _eprom(28, 2),  # 6.5 mA
    "Angular_Resolution": _eprom(30, 1),
    "Homing_Offset": _eprom(31, 2, sign_bit=11),  # Present_Position = encoder - Homing_Offset
    "Operating_Mode": _eprom(33, 1),  # 0 position, 1 velocity, 2 PWM, 3 step
    "Protective_Torque": _eprom(34, 1),  # %; what is left after an overload
    "Protection_Time": _eprom(35, 1),  # 10 ms
    "Overload_Torque": _eprom(36, 1),  # %; above it for Protection_Time is an overload
    "Velocity_closed_loop_P_proportional_coefficient": _eprom(37, 1),
    "Over_Current_Protection_Time": _eprom(38, 1),  # 10 ms
    "Velocity_closed_loop_I_integral_coefficient": _eprom(39, 1),
    "Torque_Enable": Register(40, 1),  # 0 off, 1 on, 2 damped, 128 makes the present position 2048
    "Acceleration": Register(41, 1),  # 100 ticks/s^2; 0 is the highest
    "Goal_Position": Register(42, 2, sign_bit=15),
    "Goal_Time": Register(44, 2),
    "Goal_Velocity": Register(46, 2, sign_bit=15),  # ticks/s; 0 is the highest
    "Torque_Limit": Register(48, 2),  # 0.1 %
    "Lock": Register(55, 1),  # 1: what is written to EPROM is lost with the power
    "Present_Position": _measured(56, 2, sign_bit=15),
    "Present_Velocity": _measured(58, 2, sign_bit=15),  # ticks/s
    "Present_Load": _measured(60, 2, sign_bit=10),  # 0.1 % of the motor's PWM
    "Present_Voltage": _measured(62, 1),  # 0.1 V
    "Present_Temperature": _measured(63, 1),  # C
    "Status": _measured(65, 1),  # STATUS_BITS
    "Moving": _measured(66, 1),
    # 6.5 mA. Documents disagree on a sign; bit 15 would be 213 A, so reading it as one can do no harm.
    "Present_Current": _measured(69, 2, sign_bit=15),
    "Goal_Position_2": _measured(71, 2, sign_bit=15),
    "Moving_Velocity": _measured(80, 1),
    "Moving_Velocity_Threshold": _measured(80, 1),
    "DTs": _measured(81, 1),
    "Velocity_Unit_factor": _measured(82, 1),
    "Hts": _measured(83, 1),
    "Maximum_Velocity_Limit": _measured(84, 1),
    "Maximum_Acceleration": Register(85, 1),  # read-only in the manual, but LeRobot writes it
    "Acceleration_Multiplier": _measured(86, 1),
}


def allowed_range(register: str) -> tuple[int, int]:
    """The smallest and largest value that the bytes of `register` can hold."""
    entry = REGISTERS[register]
    if entry.sign_bit is None:
        return 0, (1 << 8 * entry.size) - 1
    return -((1 << entry.sign_bit) - 1), (1 << entry.sign_bit) - 1


def encode_value(register: str, value: int) -> bytes:
    """The bytes of `value` as `register` holds it. Raises HardwareError when it does not fit."""
    entry = REGISTERS[register]
    low, high = allowed_range(register)
    value = operator.index(value)  # a float must not be rounded here
    if not low <= value <= high:
        raise HardwareError(f"{register}: got {value}, must be {low} .. {high}")
    if value < 0 and entry.sign_bit is not None:
        value = -value | 1 << entry.sign_bit
    return value.to_bytes(entry.size, "little")


def decode_value(register: str, data: bytes | bytearray) -> int:
    """The value that the bytes of `register` stand for."""
    sign_bit = REGISTERS[register].sign_bit
    value = int.from_bytes(data, "little")
    if sign_bit is None:
        return value
    magnitude = value & (1 << sign_bit) - 1
    return -magnitude if value >> sign_bit & 1 else magnitude


def status_names(error: int) -> list[str]:
    """The conditions that an error byte reports, all of them; an unnamed bit is given by its number."""
    return [STATUS_BITS.get(1 << bit, f"bit {bit}") for bit in range(8) if error >> bit & 1]


class Packet(NamedTuple):
    """One packet taken apart; `code` is the instruction, or in a reply the error byte."""

    servo_id: int
    code: int
    params: bytes


def checksum(body: bytes) -> int:
    """Of everything between header and checksum: the complement of the sum's low byte."""
    return ~sum(body) & 0xFF


def instruction_packet(servo_id: int, instruction: int, params: bytes = b"") -> bytes:
    """What a computer sends to servo `servo_id` (BROADCAST_ID: to all)."""
    body = bytes((servo_id, len(params) + 2, instruction)) + params
    return HEADER + body + bytes((checksum(body),))


def status_packet(servo_id: int, error: int, params: bytes = b"") -> bytes:
    """What a servo answers: laid out like an instruction, with the error byte in its place."""
    return instruction_packet(servo_id, error, params)


def _find(data: bytes, start: int, valid: Callable[[int, int], bool]) -> tuple[Packet | None, int]:
    unfinished = None  # the first header whose packet may still be on its way
    head = data.find(HEADER, start)
    while head >= 0:
        prefix = data[head + 2 : head + 5]
        if len(prefix) < 3:
            unfinished = head if unfinished is None else unfinished
        elif valid(prefix[0], prefix[2]) and 2 <= prefix[1] <= MAX_LENGTH:
            end = head + 4 + prefix[1]
            if end > len(data):
                unfinished = head if unfinished is None else unfinished
            elif checksum(data[head + 2 : end - 1]) == data[end - 1]:
                return Packet(prefix[0], prefix[2], bytes(data[head + 5 : end - 1])), end
        head = data.find(HEADER, head + 1)
    if unfinished is not None:
        return None, unfinished
    return None, max(start, len(data) - data.endswith(b"\xff"))  # a last FF may begin a header


def find_status(data: bytes, start: int = 0) -> tuple[Packet | None, int]:
    """The next whole, valid status packet in `data` from `start` on, and the position behind it.

    Bytes that belong to no valid packet are passed over. With no packet: None, and the position from
    which to look again when more bytes have come.
    """
    return _find(data, start, lambda servo_id, error: servo_id <= MAX_ID and error <= 0x7F)


def find_instruction(data: bytes, start: int = 0) -> tuple[Packet | None, int]:
    """As `find_status`, for instruction packets."""
    return _find(data, start, lambda servo_id, code: servo_id <= BROADCAST_ID and code in INSTRUCTIONS)


def explain_no_status(data: bytes) -> tuple[str, str]:
    """Why `data` holds no valid status packet: the kind of fault, and what to tell a person."""
    if not data:
        return "no reply", "no reply"
    head = data.find(HEADER)
    if head < 0:
        return "noise", "no packet header among the bytes"
    if len(data) < head + 4 or head + 4 + data[head + 3] > len(data):
        return "truncated", "the reply ends early"
    end = head + 4 + data[head + 3]
    found, expected = data[end - 1], checksum(data[head + 2 : end - 1])
    if found != expected:
        return "checksum", f"checksum {found:#04x}, expected {expected:#04x}"
    return "noise", "not a status packet"
