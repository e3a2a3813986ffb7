"""TensorBoard's event files, written by hand: TFRecord frames around protobuf messages of a few fields.

A record is its length (u64), the masked CRC-32C of those 8 bytes (u32), the data, and the data's masked CRC-32C (u32),
all little-endian. The data is one Event: tensorflow/core/util/event.proto and framework/summary.proto.
"""

import os
import platform
import struct
import time
from itertools import count
from pathlib import Path

FLOAT32_MAX = 3.4028234663852886e38
# Tags of the fields used, field number * 8 + wire type (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes).
WALL_TIME, STEP, FILE_VERSION, SUMMARY = 1 << 3 | 1, 2 << 3 | 0, 3 << 3 | 2, 5 << 3 | 2  # Event
VALUE = 1 << 3 | 2  # Summary
TAG, SIMPLE_VALUE = 1 << 3 | 2, 2 << 3 | 5  # Summary.Value


class EventFile:
    """Appends scalars to a file of its own in a folder; TensorBoard reads all of a folder, in the order of their names.

    A record reaches the disk whole, in one write: a kill leaves at most the last one torn, which the reader skips.
    """

    def __init__(self, folder: Path | str) -> None:
        """Begin a new file, never an old one anew: a resumed run, and another process, add theirs beside it."""
        stem = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        for number in count():  # of the files that this process began in this second
            self.path = Path(folder) / f"{stem}.{number}"
            try:
                self._file = open(self.path, "xb", buffering=1 << 16)  # noqa: SIM115 (closed by close)
                break
            except FileExistsError:
                continue
        self._write(_bytes(FILE_VERSION, b"brain.Event:2"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append one record of all `values` at `step` (0 or more). What float32 cannot hold as a number is left out."""
        summary = b"".join(
            _bytes(VALUE, _bytes(TAG, name.encode()) + struct.pack("<Bf", SIMPLE_VALUE, value))
            for name, value in values.items()
            if abs(value) <= FLOAT32_MAX  # not for NaN either
        )
        if summary:
            self._write(bytes([STEP]) + varint(step) + _bytes(SUMMARY, summary))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        self._file.write(frame(struct.pack("<Bd", WALL_TIME, time.time()) + fields))
        self._file.flush()


def frame(data: bytes) -> bytes:
    """One TFRecord around `data`."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


def varint(value: int) -> bytes:
    """An integer of 0 or more in protobuf's form: seven bits a byte, lowest first, the top bit set but on the last."""
    low = []
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4); zlib's crc32 has another polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """TFRecord's own disguise: a CRC over data that holds CRCs of itself would be weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _bytes(tag: int, content: bytes) -> bytes:
    return bytes([tag]) + varint(len(content)) + content


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # the polynomial, lowest bit first
    return crc


CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]
