"""TensorBoard's event files, against published vectors and bytes put together by hand."""

import math
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from so101.tensorboard import EventFile, crc32c, frame, masked, varint


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4, where the bytes of each CRC are printed lowest first
        (bytes(32), "aa 36 91 8a"),
        (b"\xff" * 32, "43 ab a8 62"),
        (bytes(range(32)), "4e 79 dd 46"),
        (bytes(range(31, -1, -1)), "5c db 3f 11"),
        (
            bytes.fromhex(
                "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 "
                "00000000"
            ),
            "56 3a 96 d9",
        ),
        (b"123456789", "83 92 06 e3"),  # the check value of the CRC catalogue, 0xE3069283
    ],
)
def test_crc32c_of_the_published_vectors(data, crc):
    assert struct.pack("<I", crc32c(data)) == bytes.fromhex(crc)


def test_mask_by_hand():
    # 0x80000001 turned right by 15 bits is 0x00030000; plus 0xA282EAD8
    assert masked(0x80000001) == 0xA285EAD8
    # 0xFFFFFFFF stays itself, which is -1
    assert masked(0xFFFFFFFF) == 0xA282EAD7


@pytest.mark.parametrize(("value", "hexes"), [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (10**6, "c0843d")])
def test_varint_by_hand(value, hexes):
    # 300 = 2 * 128 + 44; 10^6 = (61 * 128 + 4) * 128 + 64
    assert varint(value) == bytes.fromhex(hexes)


def records(path):
    """The data of each record, with both of its CRCs checked by their definition, a division bit by bit."""
    content, found = path.read_bytes(), []
    while content:
        (length,), size = struct.unpack("<Q", content[:8]), content[:8]
        data = content[12 : 12 + length]
        assert len(content) >= 16 + length, "torn"
        for covered, at in ((size, 8), (data, 12 + length)):
            remainder = 0xFFFFFFFF
            for bit in (byte >> shift & 1 for byte in covered for shift in range(8)):
                remainder = remainder >> 1 ^ (0x82F63B78 if (remainder ^ bit) & 1 else 0)
            remainder ^= 0xFFFFFFFF
            turned = int(f"{remainder:032b}"[-15:] + f"{remainder:032b}"[:-15], 2)
            assert struct.unpack("<I", content[at : at + 4])[0] == (turned + 0xA282EAD8) % 2**32
        found.append(data)
        content = content[16 + length :]
    return found


def test_an_event_file_byte_by_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("so101.tensorboard.time.time", lambda: 1.5)  # the double 3f f8 00 ..
    events = EventFile(tmp_path)
    events.scalars(300, {"q": 0.5, "né": -2.0, "nan": math.nan, "inf": -math.inf, "too large": 1e39})
    events.close()
    assert records(events.path) == [
        bytes.fromhex("09 000000000000f83f" "1a 0d") + b"brain.Event:2",
        bytes.fromhex("09 000000000000f83f" "10 ac02" "2a 16")  # wall time, step 300, a summary of 22 bytes
        + bytes.fromhex("0a 08 0a01") + b"q" + bytes.fromhex("15 0000003f")  # 0.5
        + bytes.fromhex("0a 0a 0a03") + "né".encode() + bytes.fromhex("15 000000c0"),  # -2
    ]  # fmt: skip
    # The first record as a whole: 24 bytes of data; TensorFlow begins each of its files with 18 00 .. a3 7f 4b 22.
    assert events.path.read_bytes()[:12] == bytes.fromhex("1800000000000000 a37f4b22")


def test_nothing_but_numbers_is_written(tmp_path):
    events = EventFile(tmp_path)
    before = events.path.read_bytes()
    events.scalars(1, {"a": math.nan, "b": math.inf})
    events.scalars(2, {})
    assert events.path.read_bytes() == before
    with pytest.raises(ValueError):  # before a byte of it is written
        events.scalars(-1, {"a": 1.0})
    assert events.path.read_bytes() == before
    events.scalars(3, {"a": np.float32(1), "b": True, "c": 7})
    assert len(records(events.path)) == 2
    events.close()


def test_each_run_begins_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("so101.tensorboard.time.time", lambda: 1_800_000_000.9)
    files = [EventFile(tmp_path) for _ in range(3)]
    for number, events in enumerate(files):
        events.scalars(number, {"step": number})
        events.close()
    assert [events.path for events in files] == sorted(tmp_path.iterdir())  # in which order TensorBoard reads them
    assert all(path.name.startswith("events.out.tfevents.1800000000.") for path in tmp_path.iterdir())
    assert all(f".{os.getpid()}." in path.name and len(records(path)) == 2 for path in tmp_path.iterdir())


def test_a_kill_leaves_whole_records(tmp_path):
    """A record is on its way to the disk when `scalars` returns, and nothing of it waits in a buffer."""
    code = (
        "import sys, itertools; from pathlib import Path; from so101.tensorboard import EventFile\n"
        "events = EventFile(Path(sys.argv[1]))\n"
        "for step in itertools.count():\n"
        "    events.scalars(step, {f'column {n}': n + step for n in range(9)}); print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        done = len(process.stdout.read().splitlines()) + 1
    (path,) = tmp_path.iterdir()
    assert done <= len(records(path)) - 1 <= done + 1


def test_a_frame_is_length_data_and_their_crcs():
    # An empty record: eight zero bytes, whose CRC-32C is 0x8C28B28A, and no bytes, whose CRC is 0.
    assert frame(b"") == bytes(8) + struct.pack("<I", masked(0x8C28B28A)) + struct.pack("<I", 0xA282EAD8)
