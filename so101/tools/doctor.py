"""Check this machine and the arms, cameras and data that it is to work with; change nothing, move nothing.

    python -m so101.tools.doctor rig=configs/rig.json dataset=outputs/demos
    python -m so101.tools.doctor --json                          for a program to read

Each line is good, warning or bad, and says which command comes next. With no arguments the rig is the simulated one.
"""

import json
import os
import platform
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import serial
import torch

from so101.config import launch, load, option
from so101.data.dataset import open_dataset
from so101.env import Camera as AnyCamera
from so101.errors import EXIT_DONE, ConfigError, HardwareError, UserError
from so101.rig import ArmConfig, RigConfig
from so101.robot.bus import ServoBus, ServoError
from so101.robot.calibration import explain_differences, load_calibration
from so101.robot.camera import ENOUGH_FPS, Camera, CameraConfig, require_lasting_names
from so101.robot.ports import (
    BAUD,
    OTHER_PROGRAM,
    PORTS_COMMAND,
    PortBusy,
    command,
    holders,
    list_ports,
    open_port,
    permission_advice,
    sweep_command,
)
from so101.robot.probe import (
    BAUDS,
    ServoState,
    Wired,
    damaged_replies,
    explain_gap,
    firmware_mix,
    hear,
    inspect,
    swapped,
)
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION, SimPort, SimServos
from so101.timing import Clock

HARDWARE = HardwareError.exit_code
AGAIN = "mend that, then run this again"
LITTLE_SPACE, NO_SPACE = 5e9, 5e8  # bytes; 25 recorded episodes are about 0.1 GB, a training run's features some GB
JITTER_PERIOD, JITTER_TICKS = 0.005, 100  # s
LATE_S = 0.005  # a twentieth of a 10 Hz tick
WATCH_CAMERA_S, LOOK_EVERY_S = 2.0, 0.005


@dataclass
class Config:
    """What the command line can set."""

    rig: str | None = option(None, "JSON file of the rig (configs/rig.json); null: the simulated one")
    dataset: str | None = option(None, "folder of a dataset to open; null: none")
    json: bool = option(False, "print one JSON object instead of lines")

    def __post_init__(self) -> None:
        if self.dataset == "":
            raise ConfigError("dataset: got no name; give the folder that holds meta/info.json, or null for none")


@dataclass
class Check:
    """One line of the report."""

    level: str  # good, warning or bad
    what: str
    found: str
    then: str = ""  # the command to run next, or what to do before that
    exit_code: int = 1  # 0 where it is not bad

    def __post_init__(self) -> None:
        if self.level != "bad":
            self.exit_code = EXIT_DONE


def main(config: Config) -> int:
    """Print the findings; 0 when none is bad, 3 when hardware is, else the exit code of the first that is."""
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not config.json:
            then = f"\n{'':9}next: {finding.then}" if finding.then else ""
            print(f"{finding.level:8} {finding.what}: {finding.found}{then}", flush=True)
    if not config.json and all(finding.level == "good" for finding in findings):
        where = f" rig={config.rig}" if config.rig else ""
        print(f"all is well; next: python -m so101.tools.goto{where}, which moves the arm slowly home and back")
    bad = [finding.exit_code for finding in findings if finding.level == "bad"]
    code = HARDWARE if HARDWARE in bad else next(iter(bad), EXIT_DONE)
    if config.json:
        print(json.dumps({"exit_code": code, "findings": [asdict(finding) for finding in findings]}, indent=2))
    return code


def examine(config: Config) -> Iterator[Check]:
    """Everything, one finding after the other."""
    yield from machine(["outputs"] if config.dataset is None else ["outputs", config.dataset])
    try:
        rig = RigConfig() if config.rig is None else load(RigConfig, config.rig)
        yield Check("good", "config", f"{config.rig or 'the simulated rig'} loads")
    except ConfigError as error:
        yield Check("bad", "config", str(error), AGAIN, error.exit_code)
    else:
        yield from arms(rig)
        if not rig.simulated:
            try:
                require_lasting_names(rig.cameras)
            except ConfigError as error:
                yield Check("bad", "cameras", str(error), "python -m so101.tools.camera", error.exit_code)
        for name, camera in rig.cameras.items():
            yield check_camera(name, camera, rig.simulated)
    if config.dataset is not None:
        yield from check_dataset(config.dataset)


def machine(folders: Iterable[str]) -> Iterator[Check]:
    """Processors, the disks of the folders that data goes to (there or not), clock and serial ports."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    about = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    for device in devices:
        try:
            name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
            worked = torch.ones(8, device=device).sum().item() == 8
        except RuntimeError as error:
            name, worked = str(error).splitlines()[0], False
        then = "" if worked else "install the torch that fits this machine's driver (pytorch.org), or use device=cpu"
        yield Check("good" if worked else "bad", f"torch device {device}", f"{name}; {about}", then)
    for folder in folders:
        path = Path(folder).absolute()
        free = shutil.disk_usage(next(there for there in (path, *path.parents) if there.exists())).free
        level = "good" if free > LITTLE_SPACE else "warning" if free > NO_SPACE else "bad"
        then = "" if level == "good" else "make room, or give a folder on another disk"
        yield Check(level, f"disk of {folder}", f"{free / 1e9:.1f} GB free", then)
    late = jitter(Clock())
    level = "good" if late < LATE_S else "warning"
    then = "" if level == "good" else "close other programs, then run this again"
    yield Check(level, "clock", f"a sleeping loop wakes up {late * 1e3:.1f} ms late (99th percentile)", then)
    for port in list_ports():
        if os.name == "posix" and not os.access(port.device, os.R_OK | os.W_OK):
            yield Check("warning", "serial port", f"{port} {permission_advice(port.device)}", AGAIN)
        else:
            yield Check("good", "serial port", str(port))


def jitter(clock: Clock) -> float:
    """How late (s) a loop that only sleeps wakes up, 99th percentile."""
    late, due = [], clock.now()
    for _ in range(JITTER_TICKS):
        due += JITTER_PERIOD
        clock.sleep_until(due)
        late.append(clock.now() - due)
    return float(np.percentile(late, 99))


def arms(rig: RigConfig) -> Iterator[Check]:
    """Ports, servos and calibrations of follower and leader, and whether the two are swapped."""
    whole: dict[str, Wired] = {}
    with ExitStack() as stack:
        for name, config in {"follower": rig.follower, "leader": rig.leader}.items():
            if config is not None:
                try:
                    yield from check_arm(name, config, rig.simulated, whole, stack)
                except HardwareError as error:
                    then = _free(config.port) if isinstance(error, PortBusy) else PORTS_COMMAND
                    yield Check("bad", f"{name} port", str(error), then, HARDWARE)
        if len(whole) == 2 and (said := swapped(**whole)):
            yield Check("bad", "arms", said, f"{PORTS_COMMAND} wiggle=true", HARDWARE)


def _free(port: str) -> str:
    """What to do about a port that is in use."""
    users = holders(port)
    others = [name for pid, name in users.items() if pid != os.getpid()]
    if users and not others:
        return "give each arm its own port in the config"
    return f"end {', '.join(others) or OTHER_PROGRAM}, then run this again"


def check_arm(
    name: str, config: ArmConfig, simulated: bool, whole: dict[str, Wired], stack: ExitStack
) -> Iterator[Check]:
    """One arm; it joins `whole` when all its servos answer and its calibration can be read.

    Raises HardwareError when its port cannot be opened, or fails.
    """
    port = SimPort(SimServos()) if simulated else open_port(config.port, f"{name}.port")
    stack.callback(port.close)
    stable = next((info.stable for info in list_ports() if info.device == config.port), None)
    if stable is None:
        yield Check("good", f"{name} port", f"{config.port} opens")
    else:
        found = f"{config.port} opens, but may be another arm's after a reboot"
        yield Check("warning", f"{name} port", found, f"write {stable} into the config")
    bus = ServoBus(port)
    answering = yield from check_servos(name, bus)
    if gap := explain_gap(answering, config.port):
        yield Check("bad", f"{name} chain", gap, command("setup", config.port, f"arm={name}"), HARDWARE)
        if isinstance(port, serial.Serial):
            yield from strangers(name, port)
    states = [state for state in answering.values() if state is not None]
    if len(states) < len(JOINTS):
        return
    what, then = f"{name} calibration", sweep_command(config.port, name, config.calibration)
    try:
        if config.calibration is None and not simulated:
            raise ConfigError(f"{name}.calibration: a real arm needs its calibration file")
        calibration = SIM_CALIBRATION if simulated else load_calibration(Path(config.calibration or ""))
    except ConfigError as error:
        yield Check("bad", what, str(error), then, error.exit_code)
        return
    whole[name] = bus, calibration
    if foreign := explain_differences(calibration, {state.id: state.stored for state in states}):
        yield Check("bad", what, f"{config.calibration}: {foreign}", then, HARDWARE)
    else:
        yield Check("good", what, f"{config.calibration or 'the simulated one'} is the one in the servos")


def check_servos(name: str, bus: ServoBus) -> Generator[Check, None, dict[str, ServoState | None]]:
    """A finding for each servo that answers and for all of them together.

    Returns the joints that answer with their states, None where two motors do.
    """
    answering: dict[str, ServoState | None] = {}
    setup = command("setup", bus.port.name, f"arm={name}")
    for servo_id, joint in enumerate(JOINTS, start=1):
        try:
            if (state := inspect(bus, servo_id)) is not None:
                answering[joint] = state
                yield servo_finding(f"{name} {joint}", state, bus.port.name)
        except ServoError as error:
            answering[joint] = None
            yield Check("bad", f"{name} {joint}", str(error), setup, HARDWARE)
    if mix := firmware_mix(filter(None, answering.values())):
        yield Check("warning", f"{name} firmware", mix, "nothing, while no replies are lost")
    if (damaged := damaged_replies(bus)) and None not in answering.values():
        found = f"{damaged} replies came damaged: a loose plug, a worn cable, or another program on the port"
        yield Check("warning", f"{name} line", found, "push all plugs in, then run this again")
    return answering


def servo_finding(what: str, state: ServoState, port: str | None) -> Check:
    """One servo on `port` that answers."""
    found = "; ".join([str(state), *state.complaints])
    if state.status or not state.supplied:
        return Check("bad", what, found, AGAIN, HARDWARE)
    if state.complaints:
        return Check("warning", what, found, AGAIN)
    if state.torque:
        return Check("warning", what, found, f"support the arm, then {command('release', port)}")
    return Check("good", what, found)


def strangers(name: str, port: serial.Serial) -> Iterator[Check]:
    """Motors that answer at another speed or to an id that no joint has: why a joint may be silent."""
    setup = command("setup", port.port, f"arm={name}")
    for baud in BAUDS:
        for servo_id in hear(port, baud)[0]:
            if baud != BAUD or not 1 <= servo_id <= len(JOINTS):
                found = f"answers as id {servo_id} at {baud} baud; joints have ids 1 .. {len(JOINTS)} at {BAUD}"
                yield Check("bad", f"{name} motor {servo_id}", found, setup, HARDWARE)


def check_camera(name: str, config: CameraConfig, simulated: bool) -> Check:
    """Whether a camera opens and gives frames, how many, and how old they are when they are used."""
    what, clock = f"camera {name}", Clock()
    if simulated:
        return Check("good", what, "rendered by the simulation")
    try:
        with closing(Camera(name, config, clock)) as camera:
            fps, age = watch(camera, clock, WATCH_CAMERA_S)
    except HardwareError as error:
        return Check("bad", what, str(error), "python -m so101.tools.camera", HARDWARE)
    found = f"{config.source}: {fps:.1f} of {config.fps} frames per second, {age * 1e3:.0f} ms old when they are used"
    if fps < ENOUGH_FPS * config.fps:
        return Check(
            "warning", what, found, "add light, and give the camera a USB port of its own; then run this again"
        )
    return Check("good", what, found)


def watch(camera: AnyCamera, clock: Clock, seconds: float) -> tuple[float, float]:
    """Frames per second, and the mean age (s) of the newest frame when it is asked for."""
    camera.latest()  # the first takes seconds
    taken, ages, end = [], [], clock.now() + seconds
    while clock.now() < end:
        clock.sleep_until(clock.now() + LOOK_EVERY_S)
        taken.append(camera.latest()[1])
        ages.append(clock.now() - taken[-1])
    return (len(set(taken)) - 1) / (taken[-1] - taken[0] or seconds), float(np.mean(ages))


def check_dataset(folder: str) -> Iterator[Check]:
    """Whether a dataset opens, and where its parts disagree."""
    try:
        dataset = open_dataset(folder)
    except UserError as error:
        yield Check("bad", "dataset", str(error), "give the folder that holds meta/info.json", error.exit_code)
        return
    frames = sum(dataset.observations)
    yield Check("good", "dataset", f"{folder}: {len(dataset.episodes)} episodes, {frames} frames at {dataset.fps} fps")
    for note in dataset.notes:
        yield Check("warning", "dataset", note, "nothing: the rows are believed")


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
