"""Puts a simulated arm on a pseudo-terminal, in real time, so that any program can talk to it.

Prints the path of the follower's port, then with leader=true that of the leader's, each on a line of its own, and
runs until it is stopped. The calibration that both arms hold lies beside the ports, as calibration.json.
`python -m so101.tools.serve_sim leader=true`

Each line of JSON on stdin is something that happens, at once or `after` some seconds (so101/sim/script.py lists
all there is):

  {"after": 1.0, "fault": "vanish", "ids": [4], "seconds": 0.5}    motor 4 loses its power for half a second
  {"fault": "unplug", "seconds": 2}                                the adapter is pulled out and put back
  {"fault": "replies", "value": 0.02, "kinds": ["drop", "late"]}   1 reply in 50 is lost or late from now on
  {"arm": "leader", "move": {"shoulder_pan": 0.5}, "seconds": 1}   a hand turns the leader, which is limp

factory=true serves motors as they come in the box, all with id 1 and never calibrated; only the gripper's is
connected, and the person exchanges it with a line such as {"plug": ["wrist_roll"]}, or connects several.
"""

import os
import select
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so101.config import launch, option, require_within
from so101.errors import ConfigError, HardwareError
from so101.rig import ArmConfig
from so101.robot.calibration import save_calibration
from so101.robot.kinematics import jaw_angle
from so101.schema import JOINTS
from so101.sim.script import play, read_event
from so101.sim.servos import BAUDS, SIM_CALIBRATION, Faults, SimPort, SimServos
from so101.timing import SUBSTEP, Clock

if os.name == "posix":
    import termios
    import tty


@dataclass
class Config:
    """What the command line can set."""

    leader: bool = option(False, "serve a leader too")
    factory: bool = option(False, "motors as they come in the box, only the gripper's connected")
    fault_rate: float = option(0.0, "fraction of the replies that are lost, damaged or late, 0 .. 1")

    def __post_init__(self) -> None:
        require_within(self, fault_rate=(0, 1))


def main(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM. HardwareError without pseudo-terminals, ConfigError for a line not understood."""
    if os.name != "posix":
        raise HardwareError("serve_sim: this system has no pseudo-terminals; Linux and macOS have them")
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # in the background of a shell there is no stdin to read
    clock, stop = Clock(), threading.Event()
    ports: dict[str, SimPort] = {}
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="so101-") as folder:
        if not config.factory:
            save_calibration(Path(folder, "calibration.json"), SIM_CALIBRATION)
        for seed, name in enumerate(("follower", "leader") if config.leader else ("follower",)):
            ports[name] = port = _new_arm(config, seed)
            terminal = Terminal(Path(folder, name))
            print(terminal.path, flush=True)
            threading.Thread(target=serve, args=(terminal, port, port.servos, clock, stop), daemon=True).start()
        with suppress(OSError):
            for line in sys.stdin or ():
                event = read_event(line)
                if event.arm not in ports:
                    raise ConfigError("script: there is no leader; start with leader=true")
                play(event, ports[event.arm])
        stop.wait()


def _new_arm(config: Config, seed: int) -> SimPort:
    servos, rest = SimServos(factory=config.factory), ArmConfig().rest
    servos.angle[:] = [*rest[:5], jaw_angle(rest[5])]
    if config.factory:
        servos.present[:] = [name == "gripper" for name in JOINTS]
    return SimPort(servos, Faults(np.random.default_rng(seed), config.fault_rate) if config.fault_rate else None)


class Terminal:
    """A pseudo-terminal that can be unplugged; its path is a link that stays, as under /dev/serial/by-id."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plug_in()

    def plug_in(self) -> None:
        """Appear, as another device than before."""
        self.fd, self._theirs = os.openpty()  # theirs stays open, so that a program may close the port and come back
        self.plugged = True
        tty.setraw(self._theirs)
        os.set_blocking(self.fd, False)
        self.path.symlink_to(os.ttyname(self._theirs))

    def unplug(self) -> None:
        """Disappear; who has it open gets OSError."""
        self.plugged = False
        self.path.unlink()
        os.close(self.fd)
        os.close(self._theirs)

    @property
    def baudrate(self) -> int:
        """What the program at the other end has set; 0 for a speed that has no name in this system."""
        speed = termios.tcgetattr(self._theirs)[4]
        return next((baud for baud in BAUDS if getattr(termios, f"B{baud}", baud) == speed), 0)


def serve(terminal: Terminal, port: SimPort, servos: SimServos, clock: Clock, stop: threading.Event) -> None:
    """Pass bytes between `terminal` and `port`, plugged in or not; move `servos` in step with `clock`."""
    moved_until = clock.now()
    while not stop.is_set():
        wires = [terminal.fd] if terminal.plugged else []
        readable, _, _ = select.select(wires, [], [], max(0.0, moved_until + SUBSTEP - clock.now()))
        while clock.now() >= moved_until + SUBSTEP:
            servos.step(SUBSTEP)
            moved_until += SUBSTEP
        if terminal.plugged and not port.plugged:
            terminal.unplug()
        elif port.plugged and not terminal.plugged:
            port.open()
            terminal.plug_in()
        elif readable:
            with suppress(OSError):  # nobody reads: the bytes are lost, as on a wire; or it was just unplugged
                port.baudrate = terminal.baudrate
                port.write(os.read(terminal.fd, 4096))
                time.sleep(port.delay)
                os.write(terminal.fd, port.read(port.in_waiting))


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
