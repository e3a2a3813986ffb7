"""The control step and the reset: what happens, in which order, between an action and its observation.

One plain class instead of a stack of wrappers, because the order is the point: person, clip, target,
leash, box, IK, limits, write, leader, wait, read, safety, reward (DESIGN.md, section 5).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from so101.config import option, require_within
from so101.errors import ConfigError, EpisodeAborted
from so101.images import preprocess
from so101.robot import safety
from so101.robot.arm import Arm, Reading
from so101.robot.flight import FlightRecorder
from so101.robot.kinematics import TIP_BELOW_TOOL, URDF_LIMITS, forward, rpy, solve_ik
from so101.robot.teleop import FAILURE, NOBODY_DRIVES, SUCCESS, TIME_OUT, Teleop
from so101.schema import ARM_JOINTS, Preprocess, RewardSpec
from so101.timing import Clock, Rate

HOME_TOLERANCE, HOME_TILT = 0.01, 0.35  # m, rad
IK_TOLERANCE = 1e-3  # m; a target missed by more than this is out of reach
HOME_SEED = np.array([0.0, 0.156, -0.161, 1.571, np.pi / 2])  # rad; straight down over [0.25, 0, 0.07]


def straight_down_at(tool: np.ndarray, limits: Sequence[np.ndarray]) -> np.ndarray:
    """Joint angles (5,) with the tool at (3,) m and the gripper straight down, as near as `limits`, (6,) each, let."""
    low, high = limits
    return solve_ik(tool, HOME_SEED, low=low[:5], high=high[:5], max_iterations=50)


@dataclass
class EnvConfig:
    """The task's geometry and timing; recording, training and evaluation must share it."""

    fps: float = option(10.0, "control steps per second")
    control_time_s: float = option(10.0, "seconds after which an episode is truncated")
    action_scale: float = option(0.02, "metres that a full action moves the target, per axis and step")
    gripper_step: float = option(0.5, "opening that a full gripper action adds per step")
    gripper_range: list[float] = option([0.05, 0.5], "smallest and largest opening commanded, 0 closed .. 1 open")
    leash: float = option(0.05, "metres that the target may be ahead of the measured tool")
    workspace_low: list[float] = option([0.10, -0.15, -0.02], "lower corner of the target's box, x y z in metres")
    workspace_high: list[float] = option([0.35, 0.15, 0.25], "upper corner of the target's box, x y z in metres")
    table_z: float = option(0.0, "height of the table in metres; the fingertips' target stays above it")
    home: list[float] = option([0.25, 0.0, 0.07], "tool position at the start of an episode, x y z in metres")
    random_ee_reset: bool = option(True, "add a random offset to home at each reset")
    random_ee_range_xy: float = option(0.01, "largest offset of home in x and y, metres")
    random_ee_range_z: float = option(0.01, "largest offset of home in z, metres")
    reset_time_s: float = option(2.0, "seconds given to place the object during a reset")
    max_joint_step: float = option(0.4, "largest joint motion commanded in one step, rad (the servo can do 0.45)")
    locked_joints: list[str] = option([], "joints held where they stand after the reset, by name")

    def __post_init__(self) -> None:
        low, high = self.workspace_low, self.workspace_high
        if len(low) != 3 or len(high) != 3 or any(a >= b for a, b in zip(low, high, strict=True)):
            raise ConfigError(f"workspace: got {low} .. {high}, needs x y z with each lower below its upper")
        low, high = (corner.tolist() for corner in self.box)
        if len(self.home) != 3 or any(not a <= x <= b for a, x, b in zip(low, self.home, high, strict=True)):
            raise ConfigError(f"home: got {self.home}, must lie inside the workspace {low} .. {high}")
        tool, rotation = forward(straight_down_at(np.array(self.home), URDF_LIMITS.T))
        if np.linalg.norm(tool - self.home) > HOME_TOLERANCE or rotation[2, 2] < np.cos(HOME_TILT):
            raise ConfigError(f"home: got {self.home}, must be reached with the gripper down; [0.25, 0, 0.07] is")
        tiny, most = 1e-6, float("inf")
        require_within(self, fps=(1, 1000))
        require_within(
            self, control_time_s=(1 / self.fps, most), action_scale=(tiny, 0.1), leash=(tiny, most),
            gripper_step=(tiny, 1), max_joint_step=(tiny, 1), reset_time_s=(0, most),
            random_ee_range_xy=(0, 0.1), random_ee_range_z=(0, 0.1),
        )  # fmt: skip
        unknown = [name for name in self.locked_joints if name not in ARM_JOINTS]
        if unknown:
            raise ConfigError(f"locked_joints: got {unknown[0]!r}, the joints are {', '.join(ARM_JOINTS)}")
        if len(self.gripper_range) != 2 or not 0 <= self.gripper_range[0] < self.gripper_range[1] <= 1:
            raise ConfigError(f"gripper_range: got {self.gripper_range}, needs two rising openings within 0 .. 1")

    @property
    def max_steps(self) -> int:
        """Steps of an episode that nothing ends earlier."""
        return round(self.control_time_s * self.fps)

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (3,) m of where the tool is let: the workspace, fingertips above the table."""
        low = np.array(self.workspace_low)
        low[2] = max(low[2], self.table_z + TIP_BELOW_TOOL)
        return low, np.array(self.workspace_high)

    def start_at(self, share: np.ndarray) -> np.ndarray:
        """Home (3,) m, moved by a `share` (3,) in -1 .. 1 of the random range, as far as the box lets it."""
        reach = np.array([self.random_ee_range_xy] * 2 + [self.random_ee_range_z])
        return np.clip(np.array(self.home) + share * reach, *self.box)


class Observation(NamedTuple):
    """Servos and newest frames, read together at the end of a tick."""

    state: np.ndarray  # (18,) float32, schema.STATE
    frames: dict[str, np.ndarray]  # per camera (H, W, 3) uint8 RGB at native resolution, for recording
    images: np.ndarray  # (cameras, S, S, 3) uint8 RGB, preprocessed, for the networks
    time: float  # s on the rig's clock


class Step(NamedTuple):
    """What one control step did and led to."""

    observation: Observation
    action: np.ndarray  # (4,) float32, the clipped command, whoever gave it
    by_human: bool
    reward: float
    success: bool
    terminated: bool  # success or failure: no value beyond
    truncated: bool  # time ran out: bootstrap as usual
    events: frozenset[str]  # the person's keys
    lag: float  # m between the target and the measured tool
    late: float  # s that the tick overran


class Camera(Protocol):
    """What the environment needs of a camera."""

    def latest(self) -> tuple[np.ndarray, float]:
        """Newest frame (H, W, 3) uint8 RGB and its time on the clock."""

    def wait_ready(self) -> None:
        """Return when there is a good frame; one that was lost may be on its way back."""


class Detector(Protocol):
    """Something that sees success: the learned classifier with its vote, say."""

    def reset(self) -> None:
        """An episode begins."""

    def update(self, observation: Observation) -> bool:
        """True when the task has succeeded at this observation."""


class Screen(Protocol):
    """Somebody who looks on, from the page say."""

    def show(self, env: "Env", observation: Observation, step: Step | None) -> None:
        """What was just observed, and the step that led there; None at the start of an episode. Never waits."""


class _Quits(Exception):
    """The person quits while the arm resets."""


class Env:
    """One arm, its cameras and its person, at a fixed rate."""

    def __init__(
        self,
        config: EnvConfig,
        arm: Arm,
        cameras: Mapping[str, Camera],
        teleop: Teleop,
        clock: Clock,
        rng: np.random.Generator,
        *,
        preprocess: Preprocess,
        reward: RewardSpec,
        detector: Detector | None = None,
        success_ends: bool = True,
        limits: safety.SafetyConfig,
        screen: Screen | None = None,
        flight: FlightRecorder | None = None,
    ) -> None:
        """`success_ends` False lets a recording go on after success; `detector` None leaves it to the keys."""
        self.config, self.arm, self.cameras, self.teleop = config, arm, cameras, teleop
        self.clock, self.rng = clock, rng
        self.preprocess, self.reward, self.detector = preprocess, reward, detector
        self.success_ends, self.watchdog = success_ends, safety.Watchdog(limits, clock)
        self.screen, self.flight = screen, flight
        self.rate = Rate(clock, 1 / config.fps)
        self._low, self._high = config.box
        self._locked = [ARM_JOINTS.index(name) for name in config.locked_joints]
        # A hand that holds the leader fully open or shut asks for a step more than the gripper's range, so that
        # its action keeps saying "open" or "shut". At 0 a policy learns that nothing need hold the gripper, and
        # its noise closes it on the way to the cube: 38 of 50 evaluation episodes succeeded then.
        low, high = config.gripper_range
        self._gripper_reach = (low - config.gripper_step, high + config.gripper_step)
        self.target = np.array(config.home)  # (3,) m, where the tool is commanded to be
        self.opening = config.gripper_range[1]  # commanded
        self.joints = HOME_SEED  # (5,) rad, commanded
        self._tool = self.target  # (3,) m, measured
        self._position = np.zeros(6)  # measured
        self._time: float | None = None  # of that measurement; None at the start of an episode
        self._steps = 0

    def reset(
        self, person_drives: bool = False, start: np.ndarray | None = None, place: str | None = None
    ) -> tuple[Observation, frozenset[str]]:
        """Lift, go to the start pose, wait while the object is placed; return the first observation.

        `start` (3,) m is that pose; None: home, with its random offset. `place` says in words where the object has to
        be, if that matters. The second value holds the keys pressed meanwhile: a verdict there corrects the episode
        just ended. The key to quit ends the reset where it is; what is observed there begins no episode.
        """
        self.teleop.keep(self.teleop.still_there(self.clock, self._read))  # record.py ends episodes by itself, too
        if self.teleop.stranded:  # who drove is gone: nothing moves by itself until somebody is there
            self.teleop.keep(self.hold(lambda: not self.teleop.paused))
        self.teleop.hand_back()
        if start is None:
            random = self.config.random_ee_reset
            start = self.config.start_at(self.rng.uniform(-1, 1, 3) if random else np.zeros(3))
        with suppress(_Quits):  # from any point of it the arm can be brought to rest
            if not self.teleop.quits():
                safety.lift(self.arm, self.clock, self._bring_along, self._read)
                self._go_home(start)
        events = self.teleop.place_object(self.clock, self.config.reset_time_s, self._read, place)
        if self.detector is not None:
            self.detector.reset()
        self._steps, self._time, quits = 0, None, "quit" in events
        try:
            for camera in () if quits else self.cameras.values():
                camera.wait_ready()
            self.rate.restart()
            observation = self._observe()
            if person_drives and not quits and not self.teleop.manned:
                observation, pressed = self._wait_for_driver(observation)
                events, quits = events | pressed, "quit" in pressed
        except EpisodeAborted:
            self.teleop.keep(events)
            raise
        if person_drives and not quits:
            self.teleop.take_over(self.target, self.opening, self._gripper_reach)
        if self.screen is not None:
            self.screen.show(self, observation, None)
        return observation, events

    def _wait_for_driver(self, observation: Observation) -> tuple[Observation, frozenset[str]]:
        """Hold until somebody takes the wheel; what is seen then, and the keys pressed meanwhile."""
        if self.screen is not None:
            self.screen.show(self, observation, None)
        self.teleop.hear(NOBODY_DRIVES)
        events = self.hold(lambda: self.teleop.manned)
        self._time = None
        self.rate.restart()
        return self._observe(), events

    def hold(self, until: Callable[[], bool]) -> frozenset[str]:
        """Stay where the arm is, watched, until something is so or the person quits; the keys pressed meanwhile."""
        return self.teleop.wait(self.clock, until, self._read)

    def step(self, action: np.ndarray) -> Step:
        """Carry out one action (4,), or the person's instead of it, and return what came of it.

        Raises SafetyStop or HardwareError when the arm or a camera fails; the step is then not a transition.
        """
        human = self.teleop.poll(self.target, self.opening, self._gripper_reach, self._to_action)
        by_human = human.action is not None
        action = np.clip(action if human.action is None else human.action, -1, 1).astype(np.float32)
        self._move_target(action)
        self._command(self._limit(self._solve()))
        self.teleop.follow(self._position)
        late = self.rate.wait()
        observation = self._observe()
        self.rate.drop_short()  # the read may have outlasted it, in an outage say
        success, failure = self._verdict(human.events, observation)
        self._steps += 1
        terminated = (success and self.success_ends) or failure
        truncated = not terminated and self._steps >= self.config.max_steps
        events = human.events
        if terminated or truncated:
            events |= self.teleop.still_there(self.clock, self._read)
        for ended, cue in ((success, SUCCESS), (failure, FAILURE), (truncated, TIME_OUT)):
            if ended and (terminated or truncated) and "redo" not in events:
                self.teleop.hear(cue)
        lag = float(np.linalg.norm(self.target - self._tool))
        reward = self.reward.of(success)
        step = Step(observation, action, by_human, reward, success, terminated, truncated, events, lag, late)
        if self.flight is not None:
            result = {"success": success, "terminated": terminated, "truncated": truncated}
            self.flight.note("step", {"action": action, "by_human": by_human, **result, "lag": lag, "late": late})
        if self.screen is not None:
            self.screen.show(self, observation, step)
        return step

    @property
    def edge(self) -> np.ndarray:
        """At which edge of its box the target is, (3,) of x, y, z: 1 the upper, -1 the lower, 0 neither."""
        return (self.target >= self._high) * 1.0 - (self.target <= self._low)

    @property
    def left(self) -> float:
        """Seconds until time is up."""
        return (self.config.max_steps - self._steps) / self.config.fps

    def _to_action(self, displacement: np.ndarray, opening: float) -> np.ndarray:
        """The action (4,), clipped, that moves the target by (3,) m and the gripper by an opening."""
        scaled = np.append(displacement / self.config.action_scale, opening / self.config.gripper_step)
        return np.clip(scaled, -1, 1).astype(np.float32)

    def _move_target(self, action: np.ndarray) -> None:
        """Integrate the action, then hold the target to the leash and inside the box."""
        self.target = self.target + self.config.action_scale * action[:3]
        ahead = self.target - self._tool
        distance = float(np.linalg.norm(ahead))
        if distance > self.config.leash:
            self.target = self._tool + ahead * self.config.leash / distance
        self.target = np.clip(self.target, self._low, self._high)
        low, high = self.config.gripper_range
        self.opening = float(np.clip(self.opening + self.config.gripper_step * float(action[3]), low, high))

    def _solve(self) -> np.ndarray:
        """Joint angles (5,) for the target, from the present command."""
        low, high = self.arm.limits
        return solve_ik(self.target, self.joints, low=low[:5], high=high[:5], locked=self.config.locked_joints)

    def _limit(self, joints: np.ndarray) -> np.ndarray:
        """Scale the whole joint step back to the largest allowed one, so that the path does not bend.

        Where the target was out of reach, it comes back to what is commanded instead of winding up.
        """
        step = joints - self.joints
        step[self._locked] = 0.0  # the last layer before the bus: 18 episodes were lost to a way around the lock
        step *= min(1.0, self.config.max_joint_step / max(float(np.abs(step).max()), 1e-9))
        joints = self.joints + step
        reached, _ = forward(joints)
        if np.linalg.norm(reached - self.target) > IK_TOLERANCE:
            self.target = reached
        return joints

    def _command(self, joints: np.ndarray) -> None:
        self.arm.command(np.append(joints, self.opening))
        self.joints = joints

    def _observe(self) -> Observation:
        """Read all servos once and take each camera's newest frame."""
        position = self._read().position
        now = self.clock.now()
        velocity = np.zeros(6) if self._time is None else (position - self._position) / (now - self._time)
        self._position, self._time = position, now
        self._tool, rotation = forward(position)
        state = np.concatenate([position, velocity, self._tool, rpy(rotation)]).astype(np.float32)
        taken = {name: camera.latest() for name, camera in self.cameras.items()}
        if self.flight is not None:
            self.flight.observed(taken, self.target)
        frames = {name: frame for name, (frame, _) in taken.items()}
        images = np.stack([preprocess(frame, self.preprocess) for frame in frames.values()])
        return Observation(state, frames, images, now)

    def _read(self) -> Reading:
        return self.watchdog.guard(self.arm)

    def _bring_along(self, position: np.ndarray) -> None:
        """On the way home (6,) the leader comes too, until the person quits."""
        self.teleop.follow(position)
        if self.teleop.quits():
            raise _Quits

    def _verdict(self, events: frozenset[str], observation: Observation) -> tuple[bool, bool]:
        """(success, failure); the person's key overrules the detector both ways."""
        detected = self.detector is not None and self.detector.update(observation)
        failure = "failure" in events
        return (detected or "success" in events) and not failure, failure

    def _go_home(self, home: np.ndarray) -> None:
        """Ease to `home` (3,) straight down with the gripper open, then correct the sag of the servos.

        A P-controlled arm hangs 1-2 cm low; the target is moved until the measured tool is at home, and
        stays there, so that a zero action holds the arm where it is.
        """
        low, high = self.arm.limits
        self.opening = self.config.gripper_range[1]
        self.target = home
        self.joints = straight_down_at(home, self.arm.limits)
        safety.ease_to(self.arm, self.clock, np.append(self.joints, self.opening), self._bring_along, self._read)
        for _ in range(20):
            self.clock.sleep_until(self.clock.now() + 1 / self.config.fps)
            position = self._read().position
            self._bring_along(position)
            self._tool, _ = forward(position)
            error = home - self._tool
            if np.linalg.norm(error) < 1e-3:
                return
            self.target = np.clip(self.target + 0.5 * error, home - self.config.leash, home + self.config.leash)
            self._command(solve_ik(self.target, self.joints, low=low[:5], high=high[:5]))
        if np.linalg.norm(error) > HOME_TOLERANCE:
            raise ConfigError(
                f"home: the tool stops at {self._tool.round(3).tolist()} m on its way to {home.round(3).tolist()}; "
                f"look for what holds the arm, or choose another home"
            )
