"""Put a simulated workplace on this machine, in real time, so that any program can work at it.

    python -m so101.tools.serve_sim leader=true camera=true folder=sim_arm
    python record.py rig=sim_arm/rig.json page=true              in another terminal; and so every other script

Prints the path of the follower's port, then with leader=true that of the leader's, and with camera=true the address
of the wrist camera's stream, each on a line of its own, and runs until it is stopped. In the folder lie the ports, the
calibration that both arms hold, as calibration.json, and with camera=true rig.json, which names all of it.

The camera sees a table with a cube, which the follower can push, grasp and lift. Somebody puts the cube back: whenever
the arm has been at work and then waits over the table with an open gripper, as a reset does, it is put down anew and
the light changes a little; place=false leaves that to a line on stdin.

Each line of JSON on stdin is something that happens, at once or `after` some seconds (so101/sim/script.py lists
all there is):

  {"after": 1.0, "fault": "vanish", "ids": [4], "seconds": 0.5}    motor 4 loses its power for half a second
  {"fault": "unplug", "seconds": 2}                                the adapter is pulled out and put back
  {"fault": "replies", "value": 0.02, "kinds": ["drop", "late"]}   1 reply in 50 is lost or late from now on
  {"arm": "leader", "move": {"shoulder_pan": 0.5}, "seconds": 1}   a hand turns the leader, which is limp
  {"cube": null}                                                   the cube is put down anew, and the light changes
  {"cube": [0.25, 0.01, 0.3]}                                      the same at x y in m, turned by 0.3 rad

factory=true serves motors as they come in the box, all with id 1 and never calibrated; only the gripper's is
connected, and the person exchanges it with a line such as {"plug": ["wrist_roll"]}, or connects several. Then
rig.json names the calibrations that are still to be made, follower.json and leader.json beside it.
"""

import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from so101.config import launch, option, require_within
from so101.errors import ConfigError, DataError, HardwareError, tell
from so101.files import write_atomic
from so101.rig import ArmConfig
from so101.robot.calibration import save_calibration
from so101.robot.kinematics import forward, jaw_angle
from so101.schema import JOINTS
from so101.sim.camera import CameraConfig, SimCamera, scene_of
from so101.sim.script import play, read_event
from so101.sim.servos import BAUDS, SIM_CALIBRATION, Faults, SimPort, SimServos
from so101.sim.world import CLEAR_HEIGHT, World, WorldConfig
from so101.timing import SUBSTEP, Clock, Rate
from so101.tools.calibration_checks import PAN_AXIS_CM
from so101.web.server import Request, Server, Stream, as_jpeg

if os.name == "posix":
    import termios
    import tty


CAMERA, STREAM, BOUNDARY = "wrist", "wrist.mjpg", "frame"
CAMERA_FPS = 30
JPEG_QUALITY = 90
LEFT_ALONE_S = 0.5  # s without a goal: an episode sends one every 0.1 s, a reset none while the cube is placed
MOVED = 0.1  # s after the end of a movement, so that it is over
OPEN = 0.3  # of the gripper's opening, from where on nothing is held


@dataclass
class Config:
    """What the command line can set."""

    leader: bool = option(False, "serve a leader too")
    camera: bool = option(False, "serve the wrist camera too, and put the table with the cube under the follower")
    folder: str | None = option(None, "new folder for ports and files, removed at the end; null: one in the system's")
    factory: bool = option(False, "motors as they come in the box, only the gripper's connected")
    fault_rate: float = option(0.0, "fraction of the replies that are lost, damaged or late, 0 .. 1")
    place: bool = option(True, "put the cube down anew whenever the arm waits over the table with an open gripper")
    port: int = option(0, "port of the camera's stream on 127.0.0.1; 0: a free one")
    seed: int = option(0, "of the cube's places, the light and the faults")
    world: WorldConfig = option(WorldConfig(), "the table and its cube")
    sim_camera: CameraConfig = option(CameraConfig(), "the camera")

    def __post_init__(self) -> None:
        require_within(self, fault_rate=(0, 1), port=(0, 65_535), seed=(0, 2**31))


def main(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises HardwareError without pseudo-terminals, DataError where the folder is there already.
    """
    if os.name != "posix":
        raise HardwareError("serve_sim: this system has no pseudo-terminals; Linux and macOS have them")
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # in the background of a shell there is no stdin to read
    clock, stop = Clock(), threading.Event()
    names = ("follower", "leader") if config.leader else ("follower",)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        folder = stack.enter_context(_own_folder(config.folder))
        if not config.factory:
            save_calibration(folder / "calibration.json", SIM_CALIBRATION)
        ports = {name: _new_arm(config, seed) for seed, name in enumerate(names, config.seed)}
        table = Table(config, ports["follower"].servos) if config.camera else None
        for name, port in ports.items():
            terminal = Terminal(folder / name)
            print(terminal.path, flush=True)
            under = table if name == "follower" else None
            arguments = (terminal, port, port.servos, clock, stop, under)
            threading.Thread(target=serve, args=arguments, daemon=True).start()
        if table is not None:
            film = CameraStream(config, table, clock)
            server = stack.enter_context(Server({f"GET {STREAM}": film.stream}, config.port))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            drawing = threading.Thread(target=film.run, daemon=True)
            drawing.start()
            stack.callback(drawing.join, 5.0)  # OpenCV aborts a program that ends while one of its threads draws
            stack.callback(film.close)
            stream = server.address + STREAM
            write_atomic(folder / "rig.json", json.dumps(_rig(config, folder, stream), indent=2) + "\n")
            print(stream, flush=True)
        if sys.stdin is not None and sys.stdin.isatty():
            tell('Type what happens, {"plug": ["wrist_roll"]} say (--help lists it all); Ctrl-C ends this.')
        with suppress(OSError):
            for line in sys.stdin or ():
                try:
                    event = read_event(line)
                    if event.arm not in ports:
                        raise ConfigError("script: there is no leader; start with leader=true")
                    play(event, ports[event.arm], table.world if table is not None else None)
                    if event.move is not None:
                        servos = ports[event.arm].servos
                        servos.after(
                            event.after + (event.seconds or 0.0) + MOVED, partial(_tell_tape, event.arm, servos)
                        )
                except ConfigError as error:  # a slip of who types must not take the arms from who works with them
                    tell(f"{error}. Nothing was done; --help tells what a line may say")
        stop.wait()


def _tell_tape(arm: str, servos: SimServos) -> None:
    """Where a tape measure would find the fingertips, as tools.calibrate's test=ruler asks for it."""
    x, y, z = 100 * forward(servos.angle)[0] - [PAN_AXIS_CM, 0, 0]
    tell(f"{arm}: between its fingertips a tape measures x {x:.1f}, y {abs(y):.1f}, z {z:.1f} cm")


@contextmanager
def _own_folder(wanted: str | None) -> Iterator[Path]:
    """The folder of the ports, gone with what it holds at the end."""
    if wanted is not None and os.path.lexists(wanted):
        raise DataError(f"{wanted}: exists already; name another with folder=, or remove what an earlier one left")
    with tempfile.TemporaryDirectory(prefix="so101-") as own:
        if wanted is None:
            yield Path(own)
            return
        folder = Path(wanted).absolute()
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(own)
        try:
            yield folder
        finally:
            folder.unlink(missing_ok=True)


def _rig(config: Config, folder: Path, stream: str) -> dict[str, object]:
    """A script's `rig`: what is served here, by the fields of RigConfig."""

    def arm(name: str) -> dict[str, str]:
        calibration = f"{name}.json" if config.factory else "calibration.json"
        return {"port": str(folder / name), "calibration": str(folder / calibration)}

    camera = {"source": stream, "width": config.sim_camera.width, "height": config.sim_camera.height}
    return {
        "follower": arm("follower"),
        "leader": arm("leader") if config.leader else None,
        "cameras": {CAMERA: {**camera, "fps": CAMERA_FPS}},
    }


def _new_arm(config: Config, seed: int) -> SimPort:
    servos, rest = SimServos(factory=config.factory), ArmConfig().rest
    servos.angle[:] = [*rest[:5], jaw_angle(rest[5])]
    if config.factory:
        servos.present[:] = [name == "gripper" for name in JOINTS]
    return SimPort(servos, Faults(np.random.default_rng(seed), config.fault_rate) if config.fault_rate else None)


class Table:
    """The world under the follower. The thread that moves the follower calls `step`; any other may draw `scene`."""

    def __init__(self, config: Config, servos: SimServos) -> None:
        self.world = World(config.world, servos, np.random.default_rng(config.seed))
        self.scene = scene_of(self.world)
        self._servos, self._places, self._placed_at = servos, config.place, 0.0

    def step(self, dt: float) -> None:
        """Carry on from the servos' new angles, and put the cube back when the arm waits for that."""
        self.world.step(dt)
        if self._places and self._servos.ordered_at > self._placed_at and self._waits():
            self._placed_at = self._servos.now
            self.world.reset()
        self.scene = scene_of(self.world)

    def _waits(self) -> bool:
        """Whether the arm holds still over the table with an open gripper, and was given no goal for a while."""
        world, servos = self.world, self._servos
        return bool(
            servos.now - servos.ordered_at > LEFT_ALONE_S
            and servos.torque_on.all()
            and world.gripper_position[2] > CLEAR_HEIGHT + world.config.cube_size
            and world.jaw_angle > jaw_angle(OPEN)
        )


class CameraStream:
    """The wrist camera's frames as JPEG, drawn while somebody watches, once for all who do."""

    def __init__(self, config: Config, table: Table, clock: Clock) -> None:
        rng = np.random.default_rng(config.seed)
        self._camera = SimCamera(config.sim_camera, lambda: table.scene, clock, rng)
        self._clock, self._changed = clock, threading.Condition()
        self._frame, self._number, self._watchers, self._closed = b"", 0, 0, False

    def run(self) -> None:
        """The camera's thread."""
        rate = Rate(self._clock, 1 / CAMERA_FPS)
        while not self._closed:
            with self._changed:
                if not self._watchers:
                    self._changed.wait_for(lambda: self._watchers or self._closed)
                    rate.restart()
            frame = as_jpeg(self._camera.latest()[0], JPEG_QUALITY).content
            with self._changed:
                self._frame, self._number = frame, self._number + 1
                self._changed.notify_all()
            rate.wait()

    def close(self) -> None:
        """Let `run` end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stream(self, request: Request) -> Stream:
        """What a network camera sends: one JPEG after the other, until the other end goes away."""
        return Stream(self._parts(), f"multipart/x-mixed-replace; boundary={BOUNDARY}")

    def _parts(self) -> Iterator[bytes]:
        seen = self._number
        with self._changed:
            self._watchers += 1
            self._changed.notify_all()
        try:
            while True:
                with self._changed:
                    while self._number == seen:
                        self._changed.wait()
                    frame, seen = self._frame, self._number
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(frame)}\r\n\r\n"
                yield head.encode() + frame + b"\r\n"
        finally:
            with self._changed:
                self._watchers -= 1


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


def serve(
    terminal: Terminal,
    port: SimPort,
    servos: SimServos,
    clock: Clock,
    stop: threading.Event,
    table: Table | None = None,
) -> None:
    """Pass bytes between `terminal` and `port`, plugged in or not; move `servos`, and `table`, in step with `clock`."""
    moved_until = clock.now()
    while not stop.is_set():
        wires = [terminal.fd] if terminal.plugged else []
        readable, _, _ = select.select(wires, [], [], max(0.0, moved_until + SUBSTEP - clock.now()))
        while clock.now() >= moved_until + SUBSTEP:
            servos.step(SUBSTEP)
            if table is not None:
                table.step(SUBSTEP)
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
