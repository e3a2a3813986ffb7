"""What Linux knows of the cameras that are plugged in, without starting one: names that last, and formats."""

import glob
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from so101.robot.ports import stable_path

LINKS = Path("/dev/v4l")  # where udev keeps names that outlive a reboot

# linux/videodev2.h: VIDIOC_ENUM_FMT and VIDIOC_ENUM_FRAMESIZES, their structs' sizes, and the types asked for.
ENUM_FORMATS, FORMAT_BYTES, CAPTURE = 0xC0405602, 64, 1
ENUM_SIZES, SIZE_BYTES, DISCRETE = 0xC02C564A, 44, 1


def device_of(source: str) -> str:
    """What a source names in the end: /dev/video0 for a by-id path or, on Linux, an index; else the source itself."""
    if source.isdigit():
        return f"/dev/video{int(source)}" if sys.platform == "linux" else source
    return source if "://" in source else os.path.realpath(source)


@dataclass(frozen=True)
class Device:
    """A camera that is plugged in."""

    source: str  # the best name for a config
    device: str
    name: str  # as the maker calls it
    formats: list[str]  # "MJPG 640x480 1280x720", ...


def find_cameras() -> list[Device]:
    """The V4L2 cameras that are there, without starting them; none on systems that only tell by opening one."""
    cameras = []
    for device in sorted(glob.glob("/dev/video*"), key=lambda path: (len(path), path)):
        try:
            formats = list_formats(device)
        except OSError as error:
            formats = [f"cannot be asked: {error.strerror}"]
        if formats:  # a camera has a second node for its metadata, which has none
            label = Path("/sys/class/video4linux", Path(device).name, "name")
            name = label.read_text().strip() if label.exists() else "?"
            cameras.append(Device(lasting_name(device) or device, device, name, formats))
    return cameras


def list_formats(device: str) -> list[str]:
    """Each pixel format of a V4L2 device with its sizes: "MJPG 640x480 1280x720". Raises OSError."""
    formats = []
    with open(device, "rb", buffering=0) as node:
        for described in _entries(node, ENUM_FORMATS, FORMAT_BYTES, CAPTURE):
            (pixels,) = struct.unpack_from("=I", described, 44)
            sizes = [struct.unpack_from("=3I", entry, 8) for entry in _entries(node, ENUM_SIZES, SIZE_BYTES, pixels)]
            words = [f"{width}x{height}" for kind, width, height in sizes if kind == DISCRETE]
            formats.append(" ".join([pixels.to_bytes(4, "little").decode("ascii", "replace"), *words]))
    return formats


def _entries(node: BinaryIO, code: int, size: int, kind: int) -> Iterator[bytes]:
    """Each entry of one of the driver's lists: it fills in number 0, 1, ... until there is none."""
    import fcntl  # not on Windows

    for number in count():
        entry = bytearray(struct.pack("=2I", number, kind).ljust(size, b"\0"))
        try:
            fcntl.ioctl(node, code, entry)
        except OSError:  # EINVAL: the one before was the last
            return
        yield bytes(entry)


def lasting_name(device: str) -> str:
    """The link that stays with a camera (by-id) or else with its socket (by-path); "" where there is none."""
    return stable_path(device, True, LINKS) or ""
