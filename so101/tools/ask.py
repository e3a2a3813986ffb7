"""What the tools need of a person at the arm: Enter, a line of text, a hand that holds it."""

import math
import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from so101.errors import ConfigError, HardwareError
from so101.rig import ArmConfig, open_arm
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.runlog import PLAIN_LINE_EVERY, REDRAW_EVERY
from so101.tools.release import release

if sys.platform == "win32":
    from msvcrt import kbhit as _line_waits
else:

    def _line_waits() -> bool:
        return bool(select.select([sys.stdin], [], [], 0)[0])


POLL_EVERY = 0.005  # s
SILENT_FOR = 1.0  # s; a joint that a hand moves meanwhile goes by less than the half turn that can be followed
INPUT_ENDED = "the input ended, and a person has to press Enter here; run this in a terminal"


def open_limp(name: str, config: ArmConfig, stack: ExitStack) -> Arm:
    """A real arm that the person may move by hand; `stack` closes it."""
    arm = open_arm(name, config, stack)
    arm.connect()
    make_limp(arm.bus, name)
    return arm


def make_limp(bus: ServoBus, arm: str) -> None:
    """Switch off the torque of all servos that the bus has names for, once the person holds the arm."""
    ask(f"The {arm} goes limp now: hold it or lay it down, and press Enter.")
    if failures := release(bus, bus.names):
        raise HardwareError(f"{len(failures)} servos may still be stiff: {'; '.join(failures.values())}")


def until_enter(look: Callable[[], str]) -> None:
    """Call `look` until the person presses Enter, and show its text, redrawn in place on a terminal.

    A reply that is lost ends no work of minutes: the ServoError is raised once there was none for SILENT_FOR.
    """
    terminal, drawn, above = sys.stdout.isatty(), -math.inf, 0
    text, ended, heard = "", False, time.monotonic()
    while not ended:
        now = time.monotonic()
        try:
            text, heard = look(), now
        except ServoError:
            if now - heard > SILENT_FOR:
                raise
            continue
        ended = _typed_line() is not None
        if ended or now - drawn >= (REDRAW_EVERY if terminal else PLAIN_LINE_EVERY):
            up = f"\x1b[{above + ended}A\x1b[J" if terminal and above else ""  # Enter went one line down
            print(up + text, flush=True)
            drawn, above = now, text.count("\n") + 1
        time.sleep(POLL_EVERY)


def ask(question: str) -> str:
    """The line that the person types after `question`."""
    print(question, flush=True)
    while (line := _typed_line()) is None:
        time.sleep(POLL_EVERY)
    return line


def _typed_line() -> str | None:
    """A line that was ended with Enter; None while there is none. ConfigError when no person can type one."""
    if not _line_waits():
        return None
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)  # sys.stdin itself would swallow the lines after it
        if not byte:
            raise ConfigError(INPUT_ENDED)
        line += byte
    return line.decode(errors="replace").strip()
