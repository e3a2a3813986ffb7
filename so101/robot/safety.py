"""Starting, watching and stopping the arm so that nobody and nothing is hurt (DESIGN.md, section 5)."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from so101.config import option
from so101.errors import SafetyStop, UserError
from so101.robot.arm import Arm, Reading
from so101.robot.feetech import status_names
from so101.robot.kinematics import forward, solve_ik
from so101.schema import JOINTS
from so101.timing import Clock

LIFT_Z = 0.12  # m; above the cube and the clutter around it, within reach of every x in the workspace
EASE_SPEED = 1.0  # rad/s; a fifth of what the servos could do
EASE_PERIOD = 0.05  # s
AT_REST = 0.15  # rad; a sagging arm rests this near to its commanded rest pose


@dataclass
class SafetyConfig:
    """What the watchdog tolerates, per servo."""

    max_temperature: float = option(65.0, "servo temperature in deg C that stops the arm (the servo's own limit is 70)")
    min_voltage: float = option(4.5, "supply in V under which the arm is stopped")
    max_voltage: float = option(8.5, "supply in V over which the arm is stopped (7.4 V servos; 13 for 12 V ones)")
    max_current: float = option(2.5, "servo current in A that stops the arm (a stalled STS3215 draws about 2.7)")


def check(reading: Reading, config: SafetyConfig) -> None:
    """Raise SafetyStop, naming the joint, when a servo is hot, badly supplied, overdrawn or reports a fault."""
    limits = (
        (reading.temperature > config.max_temperature, "{:.0f} deg C", reading.temperature, "let it cool"),
        (reading.voltage < config.min_voltage, "{:.1f} V", reading.voltage, "check the supply and its cable"),
        (reading.voltage > config.max_voltage, "{:.1f} V", reading.voltage, "check that the supply fits the servos"),
        (reading.current > config.max_current, "{:.2f} A", reading.current, "look for what blocks the joint"),
    )
    for tripped, unit, values, advice in limits:
        if tripped.any():
            joint = int(np.argmax(tripped))
            raise SafetyStop(f"{JOINTS[joint]}: servo at {unit.format(values[joint])}; {advice} before going on")
    if reading.status.any():
        joint = int(np.argmax(reading.status != 0))
        said = ", ".join(status_names(int(reading.status[joint])))
        raise SafetyStop(f"{JOINTS[joint]}: servo reports {said}; support the arm and switch its power off and on")


def ease_to(
    arm: Arm, clock: Clock, goal: np.ndarray, each_tick: Callable[[np.ndarray], None] = lambda position: None
) -> None:
    """Move from where the goals are to `goal` (6,) in a straight joint-space line at EASE_SPEED.

    `each_tick` gets each commanded position (6,), so that a leader arm can come along.
    """
    start = arm.goals()
    steps = max(1, int(np.ceil(np.abs(goal - start).max() / (EASE_SPEED * EASE_PERIOD))))
    for step in range(1, steps + 1):
        position = np.clip(start + (goal - start) * step / steps, *arm.limits)
        arm.command(position)
        each_tick(position)
        clock.sleep_until(clock.now() + EASE_PERIOD)


def lift(arm: Arm, clock: Clock, each_tick: Callable[[np.ndarray], None] = lambda position: None) -> None:
    """Raise the tool straight up to LIFT_Z, unless it is there already."""
    goal = arm.goals()
    tool, _ = forward(goal)
    if tool[2] < LIFT_Z:
        low, high = arm.limits
        raised = solve_ik(np.array([tool[0], tool[1], LIFT_Z]), goal[:5], low=low[:5], high=high[:5], max_iterations=50)
        ease_to(arm, clock, np.append(raised, goal[5]), each_tick)


def safe_start(arm: Arm) -> None:
    """Check and configure the servos, then torque on exactly where the arm is; on a failure, none keeps torque."""
    arm.connect()
    arm.configure()
    try:
        arm.set_torque(True)
    except UserError:
        with suppress(UserError):  # the first error is the one to tell
            arm.set_torque(False)
        raise


def safe_close(arm: Arm, clock: Clock, rest: np.ndarray) -> None:
    """Lift, ease to `rest` (6,), and release the torque once the measured pose is at rest.

    Where the arm cannot be brought to rest it is held, and a sentence on stderr says that it must be
    supported; a second Ctrl-C releases it at once. Never raises a UserError, so that it cannot hide the
    error that led here.
    """
    try:
        lift(arm, clock)
        ease_to(arm, clock, np.clip(rest, *arm.limits))
        clock.sleep_until(clock.now() + 0.5)
        away = np.abs(arm.read().position - rest)[:5]
        if away.max() > AT_REST:
            joint = JOINTS[int(away.argmax())]
            print(
                f"{joint} is {away.max():.2f} rad from rest: the arm holds, support it before cutting its power",
                file=sys.stderr,
            )
            return
        arm.set_torque(False)
    except KeyboardInterrupt:
        try:
            arm.set_torque(False)
            print("interrupted again: the arm was released where it was", file=sys.stderr)
        except UserError as error:
            print(f"interrupted again: {error}", file=sys.stderr)
        raise
    except UserError as error:
        print(f"closing the arm: {error}. It may still hold: support it before cutting its power", file=sys.stderr)
