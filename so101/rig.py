"""One arm, its leader, cameras and person, real or simulated. The only file that knows which."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from so101.config import option, require_within
from so101.env import Camera as AnyCamera
from so101.env import Detector, Env, EnvConfig, Observation, Screen
from so101.errors import ConfigError, HardwareError, SafetyStop, hearers, tell, tell_at_last
from so101.robot import safety
from so101.robot.arm import POSE_TOLERANCE, Arm
from so101.robot.bus import ServoBus
from so101.robot.calibration import load_calibration, unlike_ranges
from so101.robot.camera import Camera, CameraConfig, require_lasting_names
from so101.robot.diagnosis import diagnosis
from so101.robot.flight import FlightRecorder
from so101.robot.kinematics import jaw_angle
from so101.robot.ports import open_port, sweep_command
from so101.robot.probe import swapped
from so101.robot.safety import SafetyConfig, Watchdog
from so101.robot.sound import Cue, Sound
from so101.robot.teleop import PLACE_CUBE, STOPPED, Leader, Pendant, Teleop, TeleopConfig, TerminalKeys
from so101.runlog import ProgressScreen
from so101.schema import JOINTS, Preprocess, RewardSpec, describe
from so101.signals import signals_held
from so101.sim.camera import CameraConfig as SimCameraConfig
from so101.sim.camera import SimCamera, scene_of
from so101.sim.operator import Operator, OperatorConfig
from so101.sim.servos import SIM_CALIBRATION, SimPort, SimServos
from so101.sim.world import World, WorldConfig
from so101.timing import SUBSTEP, Clock, SimClock


@dataclass
class ArmConfig:
    """One arm on its serial port."""

    port: str = option("sim", "serial port (best a path under /dev/serial/by-id), or sim")
    calibration: str | None = option(None, "calibration JSON, ours or LeRobot's; the simulated arm has its own")
    rest: list[float] = option(
        [0.0, -1.80, 1.66, 0.73, 1.571, 0.05], "pose in which torque is released: five joints in rad, opening"
    )

    def __post_init__(self) -> None:
        if len(self.rest) != len(JOINTS):
            raise ConfigError(f"rest: got {len(self.rest)} values, needs one for each of {', '.join(JOINTS)}")


@dataclass
class RigConfig:
    """The hardware of one workplace, or its simulation."""

    follower: ArmConfig = option(ArmConfig(), "the arm that acts")
    leader: ArmConfig | None = option(ArmConfig(), "the arm in the person's hand; null for keys only")
    cameras: dict[str, CameraConfig] = option({"wrist": CameraConfig(source="sim")}, "cameras by name")
    teleop: TeleopConfig = option(TeleopConfig(), "how the person takes over, and which cues are heard")
    safety: SafetyConfig = option(SafetyConfig(), "what the watchdog tolerates")
    world: WorldConfig = option(WorldConfig(), "the simulated world")
    sim_camera: SimCameraConfig = option(SimCameraConfig(), "the simulated camera")
    operator: OperatorConfig | None = option(
        OperatorConfig(), "the simulated person; null: nobody but you, at the keys or on the page"
    )
    pace: float | None = option(
        None, "simulated seconds per real one; null: as fast as it goes, or 1 where nobody is simulated"
    )

    @property
    def frame_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width in pixels of each camera's frames."""
        return {name: (camera.height, camera.width) for name, camera in self.cameras.items()}

    @property
    def simulated(self) -> bool:
        """Whether the arm that acts is a simulated one."""
        return self.follower.port == "sim"

    def __post_init__(self) -> None:
        parts = {"leader": self.leader.port} if self.leader is not None else {}
        parts |= {f"cameras.{name}": camera.source for name, camera in self.cameras.items()}
        mixed = [name for name, source in parts.items() if (source == "sim") != self.simulated]
        if mixed:
            raise ConfigError(f"{', '.join(mixed)}: follower.port is {self.follower.port!r}; all are sim, or none is")
        if not self.cameras:
            raise ConfigError("cameras: got none, the policy needs at least one")
        for name in self.cameras:
            if not re.fullmatch("[A-Za-z0-9_-]+", name):
                raise ConfigError(
                    f"cameras: got the name {name!r}, which becomes part of files and columns; use letters, digits, _ "
                    f"and - only, as in wrist"
                )
        if self.operator is None and self.pace is None:
            self.pace = 1.0  # a person cannot drive faster
        if self.pace is not None:
            require_within(self, pace=(1e-3, 1e3))
        if self.simulated:
            size = (self.sim_camera.width, self.sim_camera.height)
            for name, camera in self.cameras.items():
                if (camera.width, camera.height) != size:
                    raise ConfigError(f"cameras.{name}: got {camera.width}x{camera.height}, sim_camera renders {size}")


TOOL_FLIGHTS = Path("outputs/flight")  # where the tools leave their flight records
VERDICT_TICKS = 3  # the cube must be held up this long, so that a toss is no lift


class WorldVerdict:
    """The simulated world's own judgement of success: a Detector that only evaluation may use."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self._ticks = 0

    def update(self, observation: Observation) -> bool:
        """True when the cube has been held up for VERDICT_TICKS observations in a row."""
        self._ticks = self._ticks + 1 if self.world.lifted else 0
        return self._ticks >= VERDICT_TICKS


def describe_task(rig: RigConfig, env: EnvConfig, preprocess: Preprocess) -> dict[str, Any]:
    """The schema of what is recorded and trained on this rig; see schema.describe.

    Raises ConfigError where the parts do not fit: a crop outside a camera's frame, a rate that the simulated
    clock cannot keep.
    """
    for name, (height, width) in rig.frame_sizes.items():
        top, left, high, wide = preprocess.crop or (0, 0, height, width)
        if top + high > height or left + wide > width or high != wide:
            raise ConfigError(
                f"preprocess.crop: got {preprocess.crop}, must be a square inside {name}'s {width}x{height} frame"
            )
    substeps = 1 / env.fps / SUBSTEP
    if rig.simulated and abs(substeps - round(substeps)) > 1e-6:
        raise ConfigError(f"env.fps: got {env.fps:g}, in the simulation it must divide 50: 5, 10 or 25 say")
    return describe(preprocess, list(rig.cameras), env.fps, env.action_scale, env.gripper_step)


class Page(Pendant, Screen, ProgressScreen, Protocol):
    """The page in a browser: it shows, and a person acts from there."""

    def connect(self, cameras: Mapping[str, AnyCamera], teleop: Teleop | None = None) -> None:
        """Show the newest frames of real cameras too, between the ticks, and a pause before the first of them."""


class _Alone(TerminalKeys):
    """The keys of somebody who has the simulated world to himself: the cube is placed for him."""

    def __init__(self, sound: Sound, world: World) -> None:
        super().__init__(sound)
        self.world = world

    def hear(self, cue: Cue) -> None:
        super().hear(cue)
        if cue.kind == PLACE_CUBE.kind:
            self.world.reset()


@dataclass
class Rig:
    """What the scripts drive."""

    clock: Clock
    arm: Arm
    cameras: Mapping[str, AnyCamera]
    teleop: Teleop
    verdict: WorldVerdict | None  # a real world has none
    limits: SafetyConfig
    page: Page | None = None
    begin_anew: Callable[[int], None] | None = None  # of a simulated rig, see start_over
    flight: FlightRecorder | None = None

    @property
    def arms(self) -> dict[str, Arm]:
        """The follower, and the leader where there is one."""
        hand = self.teleop.leader
        return {"follower": self.arm} | ({"leader": hand.arm} if hand is not None else {})

    def start_over(self, seed: int) -> None:
        """Put the simulated arms, world and cameras where a seed has them, whatever happened before; nothing real."""
        if self.begin_anew is not None:
            self.begin_anew(seed)

    def make_env(
        self,
        config: EnvConfig,
        preprocess: Preprocess,
        reward: RewardSpec,
        seed: int,
        detector: Detector | None = None,
        success_ends: bool = True,
    ) -> Env:
        """The environment on this rig; see Env. `seed` draws the start poses."""
        return Env(
            config, self.arm, self.cameras, self.teleop, self.clock, np.random.default_rng(seed),
            preprocess=preprocess, reward=reward, detector=detector, success_ends=success_ends, limits=self.limits,
            screen=self.page, flight=self.flight,
        )  # fmt: skip


@contextmanager
def open_rig(config: RigConfig, seed: int, page: Page | None = None, flights: Path | None = None) -> Iterator[Rig]:
    """Connect everything, start the arm safely, and leave it safe on every way out; who looks on does it on `page`.

    A fault leaves a flight record (so101/robot/flight.py) in `flights`; None: nowhere. Raises HardwareError for a port,
    servo or camera that is not there.
    """
    with ExitStack() as stack:
        rig = _simulated(config, seed, page) if config.simulated else _real(config, stack, page)
        if flights is not None:
            rig.flight = FlightRecorder(rig.clock, rig.arms, config.safety)
            rig.teleop.note = rig.flight.note
            hearers.append(rig.flight.told)
            stack.callback(hearers.remove, rig.flight.told)
            stack.callback(_leave_record, rig.flight, flights)  # when all else is done: no arm waits for a disk
        stack.callback(_report_faults, rig)  # last: the way to rest is on the same lines
        stack.callback(rig.teleop.keys.close)
        if rig.teleop.leader is not None:
            leader = rig.teleop.leader.arm
            if said := swapped((rig.arm.bus, rig.arm.calibration), (leader.bus, leader.calibration)):
                raise HardwareError(said)
            if said := unlike_ranges(rig.arm.calibration, leader.calibration):
                tell(f"leader and follower were not swept alike, so one does not mirror the other: {said}")
            safety.connect(leader, "leader")
            leader.configure()
            stack.callback(rig.teleop.release)  # not before: a start that is refused lets nothing fall
        rest = np.array(config.follower.rest)
        require_reachable("rig.follower.rest", rest, rig.arm)
        stack.callback(safety.safe_close, rig.arm, rig.clock, rest, rig.teleop.come_along)
        safety.safe_start(rig.arm)
        try:
            yield rig
        except Exception as error:
            if rig.flight is not None:
                rig.flight.failed(error)
            if isinstance(error, HardwareError | SafetyStop):
                with suppress(OSError):  # nobody hears it; the error itself is what counts
                    rig.teleop.hear(STOPPED)
            raise


def require_reachable(what: str, pose: np.ndarray, arm: Arm) -> None:
    """ConfigError, naming the joint, where a pose (6,) is outside the arm's calibrated range."""
    for name, value, low, high in zip(JOINTS, pose, *arm.limits, strict=True):
        if not low - POSE_TOLERANCE <= value <= high + POSE_TOLERANCE:
            raise ConfigError(f"{what}: {name} is {value:.3f}, calibrated for {low:.3f} .. {high:.3f}")


def _report_faults(rig: Rig) -> None:
    """What the lines were like, once, at the end of a run."""
    for name, arm in rig.arms.items():
        if said := arm.bus.report():
            tell(f"{name}: {said}")
    for camera in rig.cameras.values():
        if isinstance(camera, Camera) and (said := camera.report()):
            tell(said)


def _leave_record(flight: FlightRecorder, place: Path) -> None:
    """Write what led to the fault, where there was one, and name it at the end. What fails here is only told."""
    if flight.error is None:
        return
    with signals_held() as came:
        try:
            tell_at_last(f"flight record: {flight.dump(place, diagnosis(flight))} (diagnosis.txt says what it was)")
        except Exception as error:  # a full disk, or a bug of its own, which must not hide the one that it is about
            tell(f"flight record: could not be written in {place}: {type(error).__name__}: {error}")
        came.clear()  # the program ends already


def _real(config: RigConfig, stack: ExitStack, page: Page | None) -> Rig:
    require_lasting_names(config.cameras)
    clock = Clock()
    leader = None if config.leader is None else _hand(open_arm("leader", config.leader, stack), config, clock)
    arm = open_arm("follower", config.follower, stack)
    cameras = {}
    for name, camera in config.cameras.items():
        cameras[name] = Camera(name, camera, clock)
        stack.callback(cameras[name].close)
    teleop = Teleop(leader, TerminalKeys(Sound(config.teleop.sounds)), config.teleop, page)
    if page is not None:
        page.connect(cameras, teleop)
        stack.callback(page.connect, {})
    return Rig(clock, arm, cameras, teleop, None, config.safety, page)


def open_arm(name: str, config: ArmConfig, stack: ExitStack) -> Arm:
    """A real arm: its port open, its calibration read, nothing sent yet; `stack` closes it."""
    if config.calibration is None or not Path(config.calibration).exists():
        said = "a real arm needs its file" if config.calibration is None else f"{config.calibration} is not there"
        sweep = sweep_command(config.port, name, config.calibration)
        raise ConfigError(f"{name}.calibration: {said}; `{sweep}` makes it")
    calibration = load_calibration(Path(config.calibration))
    open_it = functools.partial(open_port, config.port, f"{name}.port")
    bus = ServoBus(open_it(), names={i: f"{name} {joint}" for i, joint in calibration.names.items()}, reopen=open_it)
    stack.callback(bus.close)
    return Arm(bus, calibration)


def _simulated(config: RigConfig, seed: int, page: Page | None) -> Rig:
    clock = SimClock(config.pace)
    world_rng, camera_rng, person_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    follower, leader = SimServos(), SimServos()
    for servos in (follower, leader):
        servos.angle[:] = [*config.follower.rest[:5], jaw_angle(config.follower.rest[5])]
    world = World(config.world, follower, world_rng)
    clock.on_substep += [follower.step, leader.step, world.step]

    scene = functools.partial(scene_of, world)
    cameras = {name: SimCamera(config.sim_camera, scene, clock, camera_rng) for name in config.cameras}
    person: Operator | _Alone
    if config.operator is None:
        person = _Alone(Sound(config.teleop.sounds), world)
    else:
        person = Operator(config.operator, world, follower, leader, person_rng)
    hand = None if config.leader is None else _hand(_sim_arm(leader, clock), config, clock)
    teleop = Teleop(hand, person, config.teleop, page)
    arm = _sim_arm(follower, clock)

    def begin_anew(seed: int) -> None:
        world.reset()  # the cube is let go of
        for servos, driven in ((follower, arm), (leader, None if hand is None else hand.arm)):
            servos.angle[:] = [*config.follower.rest[:5], jaw_angle(config.follower.rest[5])]
            servos.power_cycle()
            if driven is not None:
                safety.safe_start(driven)
        clock.sleep_until(clock.now() + safety.LONGEST_TICK + 0.1)  # after which watchdogs, too, begin anew
        for mine, fresh in zip((world_rng, camera_rng, person_rng), np.random.SeedSequence(seed).spawn(3), strict=True):
            mine.bit_generator.state = np.random.default_rng(fresh).bit_generator.state
        world.reset()

    verdict = WorldVerdict(world)
    return Rig(clock, arm, cameras, teleop, verdict, config.safety, page, begin_anew)


def _hand(arm: Arm, config: RigConfig, clock: Clock) -> Leader:
    return Leader(arm, Watchdog(config.safety, clock, "leader ", stalls=False))


def _sim_arm(servos: SimServos, clock: SimClock) -> Arm:
    port = SimPort(servos)
    return Arm(ServoBus(port, names=SIM_CALIBRATION.names, reopen=port.open, clock=clock), SIM_CALIBRATION)
