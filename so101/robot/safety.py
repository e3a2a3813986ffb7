"""Starting, watching and stopping the arm so that nobody and nothing is hurt (DESIGN.md, section 5)."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from so101.config import option, require_within
from so101.errors import SafetyStop, UserError, tell
from so101.robot.arm import Arm, Reading
from so101.robot.feetech import status_names
from so101.robot.kinematics import forward, solve_ik
from so101.robot.ports import command
from so101.schema import JOINTS
from so101.signals import signals_held
from so101.timing import Clock

LIFT_Z = 0.12  # m; above the cube and the clutter around it, within reach of every x in the workspace
EASE_SPEED = 1.0  # rad/s; a fifth of what the servos could do
EASE_PERIOD = 0.04  # s; two of the simulation's substeps
EASE_LAG = 0.3  # rad; a free joint is 0.15 behind, and at 0.37 its servo gives all that it has
AT_REST = 0.15  # rad; a sagging arm rests this near to its commanded rest pose
SUPPORT_S = 30.0  # for somebody to take hold of an arm that could not be brought to rest
AGAIN_SPEED = 0.5  # rad/s; at the half torque that a held arm has
TRIES = 3  # to bring an arm to rest whose blocked joint came free
# A blocked joint is led on by LEAN, for LEAN_S of each LOOK_S: with a hold's 0.05 that is 45 % of its PWM, and takes a
# free joint past FREED though gravity costs it up to 0.11 (rad, all).
LEAN, FREED = 0.12, 0.03
LEAN_S, LOOK_S = 0.3, 0.5
SPARE_S = 0.5  # s of reduced torque; any pause resets the servo's own count
STALL_MOTION = 0.02  # rad or opening; less than this is no motion
LONGEST_TICK = 1.0  # s; after a longer pause between checks (a reset) durations are counted anew
GRIPPER = np.array([name == "gripper" for name in JOINTS])
VOLTAGE_BIT = 1  # of a servo's status; the voltage has its own limits here

Act = Literal["warn", "hold", "stop"]


@dataclass
class SafetyConfig:
    """What the watchdog tolerates of each servo, and what it does beyond that.

    warn: a sentence, once. hold: the joint pushes no further until it is led back. stop: exit code 5.
    """

    warn_temperature: float = option(55.0, "servo temperature in deg C that is warned of, once")
    max_temperature: float = option(65.0, "servo temperature in deg C that is too hot (the servo's own limit is 70)")
    temperature_action: Act = option("stop", "what to do about a servo that is too hot")
    min_voltage: float = option(4.5, "lowest supply in V")
    max_voltage: float = option(8.8, "highest supply in V (for 7.4 V servos, as at the start; 13 for 12 V ones)")
    voltage_action: Act = option("stop", "what to do about a supply outside of that")
    max_current: float = option(2.5, "highest servo current in A (a stalled STS3215 draws about 2.7)")
    current_action: Act = option("stop", "what to do about a higher current")
    peak_s: float = option(0.5, "seconds that voltage and current may be outside: every fast start is a peak")
    stall_load: float = option(0.7, "fraction of full PWM with which a joint that does not move is stalled")
    stall_action: Act = option("stop", "what to do about a stalled joint of the arm; a stalled gripper always holds")
    grip_load: float = option(0.2, "stall_load of the gripper; its servo calls 0.25 for 2 s an overload")
    stall_s: float = option(1.0, "seconds of pushing without motion that make a stall")

    def __post_init__(self) -> None:
        require_within(self, stall_load=(0.05, 1), grip_load=(0.05, 1), peak_s=(0, 10), stall_s=(0, 10))
        require_within(self, max_current=(0.1, 4), min_voltage=(3, 20), warn_temperature=(20, 80))
        require_within(self, max_voltage=(self.min_voltage, 20), max_temperature=(self.warn_temperature, 80))


class Watchdog:
    """Judges the reading of each tick. One peak is no fault: voltage, current and stalls must last.

    `who` begins its messages. Without `stalls` a joint may push as long as it likes: a hand may hold the leader.
    """

    def __init__(self, config: SafetyConfig, clock: Clock, who: str = "", stalls: bool = True) -> None:
        self.config, self.clock, self.who, self.stalls = config, clock, who, stalls
        self._checked = -np.inf
        self._since: dict[str, np.ndarray] = {}  # by advice: (6,) s at which each joint's trouble began, inf for none
        self._stood = np.zeros(6)  # (6,) where each joint was when it last moved on
        self._told: set[tuple[str, str]] = set()
        self.newest: Reading | None = None  # what was judged last
        self._weak_until: float | None = None  # s; for as long the gripper is spared

    def check(self, reading: Reading, commanded: np.ndarray) -> list[str]:
        """The joints that are to hold where they are (Arm.hold does it); `commanded` (6,) is where they should be.

        Warns on stderr, once for each joint and cause. Raises SafetyStop, naming joint, value and what to do.
        """
        config = self.config
        if self.clock.now() - self._checked > LONGEST_TICK:
            self._since.clear()
            self._stood = reading.position
        self._checked = self.clock.now()
        if (faults := reading.status & ~VOLTAGE_BIT).any():
            joint = int(np.argmax(faults != 0))
            said = ", ".join(status_names(int(faults[joint])))
            raise SafetyStop(
                f"{self.who}{JOINTS[joint]}: servo reports {said}; support the arm and switch its power off and on"
            )
        heat, volts, current, load = reading.temperature, reading.voltage, reading.current, np.abs(reading.load)
        stalled = self._stalled(reading, commanded)
        troubles: list[tuple[np.ndarray, float, Act, np.ndarray, str, str]] = [
            (heat > config.warn_temperature, 0, "warn", heat, "{:.0f} deg C", "let it rest soon"),
            (heat > config.max_temperature, 0, config.temperature_action, heat, "{:.0f} deg C", "let it cool"),
            (volts < config.min_voltage, config.peak_s, config.voltage_action, volts, "{:.1f} V",
             "check the supply and its cable"),
            (volts > config.max_voltage, config.peak_s, config.voltage_action, volts, "{:.1f} V",
             "check that the supply fits the servos"),
            (current > config.max_current, config.peak_s, config.current_action, current, "{:.2f} A",
             "look for what blocks the joint"),
            (stalled & ~GRIPPER, config.stall_s, config.stall_action, load, "{:.0%} of its torque without moving",
             "free the joint"),
        ]  # fmt: skip
        to_hold = []
        for tripped, seconds, action, values, unit, advice in troubles:
            for joint in np.flatnonzero(self._lasts(advice, tripped, seconds)).tolist():
                name, said = JOINTS[joint], unit.format(values[joint])
                if action == "stop":
                    raise SafetyStop(f"{self.who}{name}: servo at {said}; {advice} before going on")
                if action == "hold":
                    to_hold.append(name)
                if (name, advice) not in self._told:
                    self._told.add((name, advice))
                    tell(f"{self.who}{name}: servo at {said}; {advice}")
        if self._lasts("grip", stalled & GRIPPER, config.stall_s).any():  # each grasp is one, and nothing to tell
            to_hold.append("gripper")
        return to_hold

    def guard(self, arm: Arm) -> Reading:
        """What the servos say now, once it is judged; joints that are to hold do so. SafetyStop as in `check`.

        After a pause between two looks also for a servo that lost its power meanwhile, and is limp since.
        """
        if self.clock.now() - self._checked > LONGEST_TICK:
            arm.require_torque()
        self.newest = reading = arm.read()
        if to_hold := self.check(reading, arm.commanded):
            arm.hold(to_hold)
        self._spare_gripper(arm, reading)
        return reading

    def _spare_gripper(self, arm: Arm, reading: Reading) -> None:
        """Give a gripper that strains without a pause a weak moment, or its servo calls it an overload.

        It need not stand still for that: a policy that had learned half opened and closed it in turns for 2 s.
        """
        free = "gripper" not in arm.held  # on what it has grasped it is weak already
        hard = GRIPPER & (np.abs(reading.load) >= self.config.grip_load) & free
        if self._lasts("strain", hard, self.config.stall_s).any() and self._weak_until is None:
            self._weak_until = self.clock.now() + SPARE_S
            arm.spare("gripper", True)
        elif self._weak_until is not None and self.clock.now() >= self._weak_until:
            self._weak_until = None
            self._since.pop("strain")
            if free:
                arm.spare("gripper", False)

    def _stalled(self, reading: Reading, commanded: np.ndarray) -> np.ndarray:
        """Which joints (6,) push hard, and come no nearer to where they should be."""
        hard = np.abs(reading.load) >= np.where(GRIPPER, self.config.grip_load, self.config.stall_load)
        came_on = (reading.position - self._stood) * np.sign(commanded - reading.position) > STALL_MOTION
        stalled = hard & ~came_on & self.stalls
        self._stood = np.where(stalled, self._stood, reading.position)
        return stalled

    def _lasts(self, trouble: str, tripped: np.ndarray, seconds: float) -> np.ndarray:
        """Which joints (6,) have been in trouble for `seconds`."""
        now = self.clock.now()
        began = np.minimum(self._since.get(trouble, np.full(6, np.inf)), now)
        self._since[trouble] = np.where(tripped, began, np.inf)
        return tripped & (now - began >= seconds)


class Blocked(SafetyStop):
    """A joint of the arm (`joint`, its index) that stood at `position` (rad) and did not go `way` (+1, -1)."""

    def __init__(self, message: str, joint: int, reading: Reading, goal: float) -> None:
        super().__init__(message)
        self.joint, self.position, self.faulty = joint, float(reading.position[joint]), faulty(reading)
        self.way = float(np.sign(goal - self.position))


def faulty(reading: Reading) -> bool:
    """Whether a servo reports a fault, an overload say, with which it gives a fifth of its torque."""
    return bool((reading.status & ~VOLTAGE_BIT).any())


def ease_to(
    arm: Arm,
    clock: Clock,
    goal: np.ndarray,
    each_tick: Callable[[np.ndarray], None] = lambda position: None,
    read: Callable[[], Reading] | None = None,
    speed: float = EASE_SPEED,
) -> None:
    """Move from where the goals are to `goal` (6,) in a straight joint-space line at `speed` (rad/s).

    `each_tick` gets each commanded position (6,), so that a leader arm can come along; `read`, a watchdog's guard,
    reads the servos. Raises Blocked, naming the joint, when one falls behind by EASE_LAG: it pushes at something.
    """
    start = arm.goals()
    steps = max(1, int(np.ceil(np.abs(goal - start).max() / (speed * EASE_PERIOD))))
    for step in range(1, steps + 1):
        position = np.clip(start + (goal - start) * step / steps, *arm.limits)
        arm.command(position)
        each_tick(position)
        clock.sleep_until(clock.now() + EASE_PERIOD)
        reading = arm.read() if read is None else read()
        behind = np.abs(reading.position - position)[:5]
        if behind.max() > EASE_LAG:
            joint = int(behind.argmax())
            said = f"{JOINTS[joint]}: {behind[joint]:.2f} rad behind its command; free what blocks the arm"
            raise Blocked(said, joint, reading, float(position[joint]))


def lift(
    arm: Arm,
    clock: Clock,
    each_tick: Callable[[np.ndarray], None] = lambda position: None,
    read: Callable[[], Reading] | None = None,
    speed: float = EASE_SPEED,
) -> None:
    """Raise the tool straight up to LIFT_Z, unless it is there already; the rest is as in `ease_to`."""
    goal = arm.goals()
    tool, _ = forward(goal)
    if tool[2] < LIFT_Z:
        low, high = arm.limits
        raised = solve_ik(np.array([tool[0], tool[1], LIFT_Z]), goal[:5], low=low[:5], high=high[:5], max_iterations=50)
        ease_to(arm, clock, np.append(raised, goal[5]), each_tick, read, speed)


def connect(arm: Arm, who: str) -> list[str]:
    """Check the servos; the joints that still hold from an earlier program, which is told."""
    arm.connect()
    held = arm.holding()
    if held:
        tell(
            f"the {who} still holds, from a program that was killed or lost its power ({', '.join(held)}); "
            f"it goes on from where it is"
        )
    return held


def safe_start(arm: Arm) -> None:
    """Check and configure the servos, then torque on exactly where the arm is.

    On a failure none keeps its torque, except in an arm that was found holding: that goes on holding.
    """
    held = connect(arm, "arm")
    try:
        arm.configure()
        arm.set_torque(True)
    except BaseException:
        if not held:
            with suppress(UserError):  # the first error is the one to tell
                arm.set_torque(False)
        raise


def safe_close(
    arm: Arm, clock: Clock, rest: np.ndarray, each_tick: Callable[[np.ndarray], None] = lambda position: None
) -> None:
    """Lift, ease to `rest` (6,), and release the torque once the measured pose is at rest; `each_tick` as in ease_to.

    An arm that cannot be brought to rest is held with reduced torque for somebody to support it, and a Ctrl-C
    then releases it; where a blocked joint comes free meanwhile, it is brought to rest after all. On the way to rest
    it takes two Ctrl-C, the one that led here included. Does nothing to an arm that was not given torque. What fails
    here is told and not raised, so that it cannot hide what led here.
    """
    if not arm.driven:
        return
    cause = sys.exc_info()[1]
    patience = 1 if isinstance(cause, KeyboardInterrupt) else 2
    if patience == 1:
        tell("bringing the arm to rest; another Ctrl-C would release it where it is")
    with signals_held() as came:

        def heed() -> None:
            if len(came) >= patience:
                raise KeyboardInterrupt

        def heed_and_tick(position: np.ndarray) -> None:
            heed()
            each_tick(position)

        try:
            trouble = _come_to_rest(arm, clock, rest, heed_and_tick)
            for tries in range(TRIES, -1, -1):
                if trouble is None:
                    arm.set_torque(False)
                    break
                blocked = trouble if isinstance(trouble, Blocked) and not trouble.faulty and tries else None
                holds, sentence = _hold(arm, trouble, blocked)
                patience = len(came) + 1  # who reads the sentence may be quick
                tell(sentence)
                if not holds or not _comes_free(arm, clock, blocked, heed):
                    break
                trouble = _come_to_rest(arm, clock, rest, heed_and_tick, again=True)
        except KeyboardInterrupt:
            try:
                arm.set_torque(False)
                tell("interrupted again: the arm was released where it was")
            except Exception as error:
                tell(f"interrupted again: {_said(error)}")
        except Exception as error:
            tell(f"closing the arm: {_said(error)}")
        if cause is not None:
            came.clear()  # it ends the program already


def _said(error: Exception) -> str:
    """In words; a bug with its kind, on the one path that nothing may cut short."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _come_to_rest(
    arm: Arm, clock: Clock, rest: np.ndarray, heed: Callable[[np.ndarray], None], again: bool = False
) -> Exception | None:
    """Why the arm could not be brought to rest; None when it lies there. `again`: slowly, from a hold."""
    try:
        limp = arm.driven - set(arm.holding())
        if limp == arm.driven:
            return None
        if limp:
            return SafetyStop(f"{', '.join(sorted(limp))} lost its torque")
        if again:
            arm.loosen()
        speed = AGAIN_SPEED if again else EASE_SPEED
        lift(arm, clock, heed, speed=speed)
        ease_to(arm, clock, np.clip(rest, *arm.limits), heed, speed=speed)
        clock.sleep_until(clock.now() + 0.5)
        reading = arm.read()
        away = np.abs(reading.position - rest)[:5]
        if away.max() <= AT_REST:
            return None
        joint = int(away.argmax())
        said = f"{JOINTS[joint]} is {away[joint]:.2f} rad from rest"
        return Blocked(said, joint, reading, float(rest[joint]))
    except Exception as error:
        return error


def _hold(arm: Arm, trouble: Exception, blocked: Blocked | None) -> tuple[bool, str]:
    """Hold where the arm is; whether that is to be waited on, and what to say. False where nothing answers."""
    held, why, how = set(arm.held), _said(trouble), "It holds with reduced torque"
    try:
        arm.hold()
    except Exception as error:
        if held == set(arm.held):  # a gripper, on what it has grasped, at most
            if isinstance(error, UserError):
                return False, f"closing the arm. It may still hold: support it, and cut its power. {why}"
            how = "It may hold with all its torque"
        why += f"; {_said(error)}"
    sentence = (
        f"closing the arm: {why}. {how}: support it, then press Ctrl-C to release it. In {SUPPORT_S:.0f} s this "
        f"program leaves it holding; `{command('release', arm.bus.port.name)}` frees it then"
    )
    if blocked is not None and JOINTS[blocked.joint] in arm.held:
        sentence += ". Once the joint is free it goes on to rest by itself, slowly"
    return True, sentence


def _comes_free(arm: Arm, clock: Clock, blocked: Blocked | None, heed: Callable[[], None]) -> bool:
    """Wait for SUPPORT_S, or until the blocked joint can go on; whether it can.

    `heed` raises KeyboardInterrupt when a signal comes. What fails is told once, and nothing ends the wait.
    """
    until, told = clock.now() + SUPPORT_S, ""

    def wait(seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            heed()
            clock.sleep_until(clock.now() + 0.1)

    while clock.now() < until:
        wait(LOOK_S - LEAN_S)
        try:
            if blocked is not None and (held := arm.held.get(JOINTS[blocked.joint])):
                name, hold_at = JOINTS[blocked.joint], held[0]
                arm.lean(name, hold_at + blocked.way * LEAN)
                wait(LEAN_S)
                reading = arm.read()
                arm.lean(name, hold_at)
                gone = (reading.position[blocked.joint] - blocked.position) * blocked.way
                if gone > FREED and not faulty(reading):
                    tell(f"{name} has come free: once more to rest, slowly")
                    return True
        except Exception as error:
            if _said(error) != told:
                told = _said(error)
                tell(f"closing the arm: {told}. It holds on")
    return False
