"""Packets against published byte strings, and a parser against damaged lines."""

import random

import pytest

from so101.errors import HardwareError
from so101.robot.feetech import (
    ACTION,
    BROADCAST_ID,
    PING,
    READ,
    REG_WRITE,
    REGISTERS,
    SYNC_READ,
    SYNC_WRITE,
    WRITE,
    Packet,
    allowed_range,
    decode_value,
    encode_value,
    explain_no_status,
    find_instruction,
    find_status,
    instruction_packet,
    status_names,
    status_packet,
)

MOVE = "00 08 00 00 e8 03"  # position 2048, time 0, speed 1000

# The examples of the vendor's manual, and the sync reads whose bytes other programs were seen to send.
INSTRUCTION_VECTORS = [
    ("ff ff 01 02 01 fb", 1, PING, ""),
    ("ff ff 01 04 02 38 02 be", 1, READ, "38 02"),
    ("ff ff 01 09 03 2a 00 08 00 00 e8 03 d5", 1, WRITE, f"2a {MOVE}"),
    ("ff ff 01 09 04 2a 00 08 00 00 e8 03 d4", 1, REG_WRITE, f"2a {MOVE}"),
    ("ff ff fe 02 05 fa", BROADCAST_ID, ACTION, ""),
    ("ff ff fe 0a 82 38 02 01 02 03 04 05 06 26", BROADCAST_ID, SYNC_READ, "38 02 01 02 03 04 05 06"),
    ("ff ff fe 0a 82 38 0f 01 02 03 04 05 06 19", BROADCAST_ID, SYNC_READ, "38 0f 01 02 03 04 05 06"),
    (
        f"ff ff fe 20 83 2a 06 01 {MOVE} 02 {MOVE} 03 {MOVE} 04 {MOVE} 58",
        BROADCAST_ID,
        SYNC_WRITE,
        f"2a 06 01 {MOVE} 02 {MOVE} 03 {MOVE} 04 {MOVE}",
    ),
]
STATUS_VECTORS = [("ff ff 01 02 00 fc", 1, 0, ""), ("ff ff 01 04 00 18 05 dd", 1, 0, "18 05")]


@pytest.mark.parametrize(("wire", "servo_id", "code", "params"), INSTRUCTION_VECTORS)
def test_instruction_vectors(wire: str, servo_id: int, code: int, params: str) -> None:
    data, fields = bytes.fromhex(wire), (servo_id, code, bytes.fromhex(params))
    assert instruction_packet(*fields) == data
    assert find_instruction(data) == (Packet(*fields), len(data))


@pytest.mark.parametrize(("wire", "servo_id", "error", "params"), STATUS_VECTORS)
def test_status_vectors(wire: str, servo_id: int, error: int, params: str) -> None:
    data, fields = bytes.fromhex(wire), (servo_id, error, bytes.fromhex(params))
    assert status_packet(*fields) == data
    assert find_status(data) == (Packet(*fields), len(data))


def test_values_by_hand() -> None:
    assert decode_value("Present_Position", bytes.fromhex("18 05")) == 1304
    assert encode_value("Goal_Position", 2048) == bytes.fromhex("00 08")
    assert encode_value("Homing_Offset", -1321) == bytes.fromhex("29 0d")  # 1321 = 0x529, | 1 << 11 = 0xd29
    assert decode_value("Present_Load", bytes.fromhex("f4 05")) == -500  # 0x5f4 = 1 << 10 | 500
    assert decode_value("Present_Position", bytes.fromhex("05 80")) == -5
    assert decode_value("Torque_Limit", bytes.fromhex("f4 01")) == 500


def test_every_value_of_every_register_survives() -> None:
    for name in REGISTERS:
        low, high = allowed_range(name)
        for value in {*range(low, high + 1, 97), low, -1 if low else 0, 0, 1, high}:
            assert decode_value(name, encode_value(name, value)) == value


def test_addresses_sizes_and_sign_bits_of_the_vendor_s_table() -> None:
    table = {
        "Model_Number": (3, 2, None),
        "ID": (5, 1, None),
        "Baud_Rate": (6, 1, None),
        "Min_Position_Limit": (9, 2, None),
        "Max_Position_Limit": (11, 2, None),
        "Max_Torque_Limit": (16, 2, None),
        "Phase": (18, 1, None),
        "P_Coefficient": (21, 1, None),
        "D_Coefficient": (22, 1, None),
        "I_Coefficient": (23, 1, None),
        "Protection_Current": (28, 2, None),
        "Homing_Offset": (31, 2, 11),
        "Operating_Mode": (33, 1, None),
        "Overload_Torque": (36, 1, None),
        "Torque_Enable": (40, 1, None),
        "Acceleration": (41, 1, None),
        "Goal_Position": (42, 2, 15),
        "Goal_Velocity": (46, 2, 15),
        "Torque_Limit": (48, 2, None),
        "Lock": (55, 1, None),
        "Present_Position": (56, 2, 15),
        "Present_Velocity": (58, 2, 15),
        "Present_Load": (60, 2, 10),
        "Present_Voltage": (62, 1, None),
        "Present_Temperature": (63, 1, None),
        "Status": (65, 1, None),
        "Moving": (66, 1, None),
        "Present_Current": (69, 2, 15),
        "Maximum_Acceleration": (85, 1, None),
    }
    assert {name: tuple(REGISTERS[name][:3]) for name in table} == table


def test_no_two_registers_share_a_byte() -> None:
    owner: dict[int, str] = {}
    for name, entry in REGISTERS.items():
        if name == "Moving_Velocity_Threshold":  # LeRobot has two names for address 80
            continue
        for address in range(entry.address, entry.address + entry.size):
            assert address not in owner, f"{name} and {owner.get(address)} at {address}"
            owner[address] = name
        assert entry.eprom == (entry.address < 40)


def test_a_value_that_does_not_fit_names_register_and_range() -> None:
    # What LeRobot calls "Magnitude 2114 exceeds 2047".
    with pytest.raises(HardwareError, match=r"Homing_Offset: got 2114, must be -2047 \.\. 2047"):
        encode_value("Homing_Offset", 2114)
    with pytest.raises(HardwareError, match=r"ID: got -1, must be 0 \.\. 255"):
        encode_value("ID", -1)
    with pytest.raises(TypeError):
        encode_value("Goal_Position", 2047.5)  # type: ignore[arg-type]


def test_all_status_bits_are_named() -> None:
    assert status_names(0) == []
    assert status_names(0b100101) == ["voltage", "overheat", "overload"]
    assert status_names(0b1010000) == ["bit 4", "bit 6"]


REPLY = bytes.fromhex("ff ff 01 04 00 18 05 dd")


@pytest.mark.parametrize(
    "noise",
    ["00", "ff", "ff ff", "ff ff ff", "ff ff 01", "ff ff 01 04 00", "ff ff 01 fa 00 00", "ff ff 01 02 00 00"],
)
def test_a_reply_is_found_behind_noise(noise: str) -> None:
    data = bytes.fromhex(noise) + REPLY
    packet, end = find_status(data)
    assert packet == Packet(1, 0, b"\x18\x05")
    assert end == len(data)


def test_a_reply_is_found_behind_any_noise() -> None:
    random.seed(0)
    for _ in range(2000):  # bytes that look like headers, ids and lengths come often
        noise = bytes(random.choices([0xFF, 0xFF, 1, 2, 4, 0x80, 0], k=random.randrange(12)))
        packets, at = [], 0
        while (found := find_status(noise + REPLY, at))[0] is not None:
            packets.append(found[0])
            at = found[1]
        assert Packet(1, 0, b"\x18\x05") in packets


def test_a_packet_in_pieces_is_found_from_the_position_given() -> None:
    data = b"\x07\xff" + REPLY
    for cut in range(len(data)):
        packet, resume = find_status(data[:cut])
        assert packet is None
        assert find_status(data[resume:])[0] == Packet(1, 0, b"\x18\x05")


def test_no_single_flipped_bit_gets_through() -> None:
    for byte in range(len(REPLY)):
        for bit in range(8):
            damaged = bytearray(REPLY)
            damaged[byte] ^= 1 << bit
            assert find_status(bytes(damaged))[0] is None


def test_what_cannot_be_a_reply_is_none() -> None:
    assert find_status(bytes.fromhex("ff ff fe 02 05 fa"))[0] is None  # ACTION: nobody has id 254
    assert find_status(status_packet(1, 0x80))[0] is None  # no servo sets bit 7
    assert find_instruction(REPLY)[0] is None  # 0 is no instruction


@pytest.mark.parametrize(
    ("received", "kind", "said"),
    [
        ("", "no reply", "no reply"),
        ("12 34", "noise", "no packet header"),
        ("ff ff 01 04 00 18", "truncated", "ends early"),
        ("ff ff 04 04 02 38 02 bf", "checksum", "checksum 0xbf, expected 0xbb"),
        ("ff ff fe 02 05 fa", "noise", "not a status packet"),
    ],
)
def test_why_there_is_no_reply(received: str, kind: str, said: str) -> None:
    found_kind, sentence = explain_no_status(bytes.fromhex(received))
    assert found_kind == kind
    assert said in sentence
