"""Serial ports: which there are, and how to open one; every way that fails is said in words."""

import errno
import glob
import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import serial
from serial.tools.list_ports import comports

from so101.errors import HardwareError

if os.name == "posix":
    import grp

BAUD = 1_000_000
REPLY_TIMEOUT_S = 0.05  # six servos answer in 1.4 ms; USB adapters add up to 16
WRITE_TIMEOUT_S = 0.5  # an adapter that hangs must not hang the program with it
USUAL_VENDOR = 0x1A86  # of the USB chip on nearly all boards for these servos (WCH's CH343)
PORTS_COMMAND = "python -m so101.tools.ports"
OTHER_PROGRAM = "another program (one of this project's in another terminal, LeRobot, a serial monitor)"


def command(tool: str, port: str | None, *words: str) -> str:
    """What to paste into a shell to let a tool work on an arm's port."""
    return shlex.join(["python", "-m", f"so101.tools.{tool}", f"port={port}", *words])


def sweep_command(port: str | None, arm: str, output: str | None = None) -> str:
    """What to paste to calibrate the follower or the leader; `output` None: into the file that configs/ names."""
    return command("calibrate", port, f"arm={arm}", f"output={output or f'calibrations/{arm}.json'}")


class PortBusy(HardwareError):
    """Another program has the port."""


class PortInfo(NamedTuple):
    """One serial port of this machine."""

    device: str  # /dev/ttyACM0, COM3
    stable: str | None  # the link that leads to the same adapter after a reboot, where the system makes one
    vendor: str
    product: str
    serial_number: str
    vendor_id: int | None

    @property
    def path(self) -> str:
        """What to write into a config."""
        return self.stable or self.device

    def __str__(self) -> str:
        about = " ".join(word for word in (self.vendor, self.product) if word)
        numbered = f"serial number {self.serial_number}" if self.serial_number else ""
        return self.device + "".join(f", {part}" for part in (about, numbered) if part)


def list_ports() -> list[PortInfo]:
    """The serial ports that are there now, by device name."""
    found = [
        PortInfo(
            port.device,
            stable_path(port.device, bool(port.serial_number)),
            port.manufacturer or ("" if port.vid is None else f"vendor {port.vid:04x}"),
            port.product or "",
            port.serial_number or "",
            port.vid,
        )
        for port in comports()
    ]
    return sorted(found)


def stable_path(device: str, numbered: bool, root: Path = Path("/dev/serial")) -> str | None:
    """The link under `root` to this very device; None where there is none (Windows, macOS, no USB).

    Two adapters of a kind that are not `numbered` share one link by-id, which leads to either: theirs is the link
    by-path, of the USB socket.
    """
    for folder in ("by-id", "by-path") if numbered else ("by-path",):
        for link in sorted((root / folder).glob("*")):
            if link.resolve() == Path(device).resolve():
                return str(link)
    return None


def open_port(device: str, who: str) -> serial.Serial:
    """Open an arm's port for this program alone. HardwareError (PortBusy) says why it cannot be, and what to do.

    `who` begins the message: the config's key, as in "follower.port".
    """
    try:
        return serial.Serial(device, BAUD, timeout=REPLY_TIMEOUT_S, write_timeout=WRITE_TIMEOUT_S, exclusive=True)
    except (OSError, ValueError) as error:  # pyserial's own error is an OSError
        kind = PortBusy if _is_busy(error) else HardwareError
        raise kind(f"{who}: {device!r} {_why(device, error)}") from error


def _is_busy(error: OSError | ValueError) -> bool:
    code = getattr(error, "errno", None)
    return code in (errno.EBUSY, errno.EAGAIN, errno.EWOULDBLOCK) or "PermissionError" in str(error)  # as Windows says


def _why(device: str, error: OSError | ValueError) -> str:
    there = list_ports()
    exists = os.path.exists(device) if os.name == "posix" else device.upper() in {port.device for port in there}
    if not exists:
        listed = "; ".join(str(port) for port in there)
        return "is not there. " + (
            f"This machine has: {listed}. {PORTS_COMMAND} wiggle=true tells which of them is which arm"
            if there
            else "This machine has no serial port: plug in the arm's USB cable (one that carries data)"
        )
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM):
        return permission_advice(device)
    if _is_busy(error):
        return f"is in use by {', '.join(holders(device).values()) or OTHER_PROGRAM}; close that first"
    if os.name == "posix" and (not stat.S_ISCHR(os.stat(device).st_mode) or "configure" in str(error)):
        return f"is not a serial port; {PORTS_COMMAND} lists those that are"
    return f"cannot be opened ({error}); pull out its USB cable, plug it in again, and try once more"


def permission_advice(device: str) -> str:
    """Why this user may not open `device`, and the two ways to be allowed to."""
    status = os.stat(device)
    with suppress(KeyError):  # a group without a name helps nobody
        group = grp.getgrgid(status.st_gid).gr_name
        vendor = (
            next((port.vendor_id for port in list_ports() if port.device == os.path.realpath(device)), None)
            or USUAL_VENDOR
        )
        rule = f'SUBSYSTEM=="tty", ATTRS{{idVendor}}=="{vendor:04x}", MODE="0666"'
        return (
            f"may not be opened by this user. It belongs to the group {group}: run 'sudo usermod -aG {group} $USER', "
            f"log out and in again; or write the udev rule '{rule}' into /etc/udev/rules.d/99-so101.rules, and replug "
            f"the arm"
        )
    return f"may not be opened by this user (group {status.st_gid}, mode {stat.filemode(status.st_mode)})"


def holders(device: str) -> dict[int, str]:
    """The programs that have `device` open, by process, as `'python record.py' (pid 12)`.

    Only Linux tells, and not of other users'. A simulated arm is behind its port, and does not use it.
    """
    target, found = os.path.realpath(device), set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # the program ends as we look, or is another user's
            if os.readlink(link) == target:
                found.add(int(link.split("/")[2]))
    programs = {pid: _program(pid) for pid in sorted(found)}
    return {pid: program for pid, program in programs.items() if "so101.tools.serve_sim" not in program}


def _program(pid: int) -> str:
    if pid == os.getpid():
        return "this very program (is the same port given twice?)"
    name = "a program"
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").strip("\0").split("\0")
        name = " ".join([os.path.basename(words[0]), *words[1:3]])[:60]  # python -m so101.tools.teleoperate
    return f"{name!r} (pid {pid})"
