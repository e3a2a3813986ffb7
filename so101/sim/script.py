"""What goes wrong with a simulated arm, and what a hand does to it and to the cube, as events at given times.

An event is a line of JSON such as {"after": 1.0, "fault": "vanish", "ids": [4], "seconds": 0.5}. The time is that
of the servos: simulated where a simulated clock moves them, real where so101.tools.serve_sim does.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from so101.config import from_dict, option, require_within
from so101.errors import ConfigError
from so101.robot.feetech import REGISTERS, allowed_range, decode_value
from so101.robot.kinematics import jaw_angle
from so101.schema import JOINTS
from so101.sim.servos import FAULTS, Faults, SimPort, SimServos
from so101.sim.table import TABLE_X, TABLE_Y
from so101.sim.world import World
from so101.timing import SUBSTEP

Fault = Literal[
    "vanish",  # without power: silent, and back with its SRAM reset and its torque off
    "mute",  # silent, but holding: its data wire alone is loose
    "unplug",  # the adapter leaves the computer
    "block",  # something holds the joint where it is
    "overload",  # latched, until the torque is switched off and on
    "voltage",  # `value` V
    "temperature",  # `value` C
    "register",  # `register` holds `value`: ID for two servos of one id, Baud_Rate for a wrong baud, ...
    "replies",  # a fraction `value` of all replies is damaged, by `kinds` of sim.servos.FAULTS
    "echo",  # the adapter hears its own bytes
    "slow",  # replies come `value` s later, in real time only
]
NEEDS_VALUE = ("voltage", "temperature", "register", "replies", "slow")


@dataclass
class Event:
    """One thing that happens: a fault, a movement by hand, motors plugged into the chain, or a cube put down."""

    after: float = option(0.0, "seconds from now")
    seconds: float | None = option(None, "how long a fault lasts (null: for good), or a movement takes (null: none)")
    arm: Literal["follower", "leader"] = option("follower", "which arm, for who serves two")
    fault: Fault | None = option(None, "what goes wrong")
    ids: list[int] = option([1, 2, 3, 4, 5, 6], "the motors it happens to, counted from the base")
    value: float | None = option(None, "new value of what the fault changes")
    register: str | None = option(None, "for the fault register: which")
    kinds: list[str] = option(list(FAULTS), "for the fault replies: what happens to them")
    move: dict[str, float] | None = option(None, "joints without torque go to these angles in rad (gripper: opening)")
    plug: list[str] | None = option(None, "only the motors of these joints are in the chain and have power")
    cube: list[float] | None = option(
        [], "put the cube down at x y in m, turned by so many rad; null: somewhere in its field; []: let it be"
    )

    def __post_init__(self) -> None:
        most = float("inf")
        require_within(self, after=(0, most))
        if self.seconds is not None:
            require_within(self, seconds=(0, most))
        if sum([*(what is not None for what in (self.fault, self.move, self.plug)), self.cube != []]) != 1:
            raise ConfigError("an event is one fault, one move, one plug or one cube")
        if self.cube:
            (nearest, farthest), (right, left) = TABLE_X, TABLE_Y
            x, y, _ = self.cube if len(self.cube) == 3 else (most, most, most)
            if not (nearest <= x <= farthest and right <= y <= left):
                where = f"on the table, x {nearest} .. {farthest} and y {right} .. {left}"
                raise ConfigError(f"cube: got {self.cube}, must be x y in m {where}, and rad; or null")
        if self.fault in NEEDS_VALUE and self.value is None:
            raise ConfigError(f"value: the fault {self.fault!r} needs one")
        if (self.fault == "register") != (self.register in REGISTERS):
            raise ConfigError(f"register: got {self.register!r}, and the fault register needs the name of one")
        if self.register is not None:
            require_within(self, value=allowed_range(self.register))
        for joint in (*(self.move or ()), *(self.plug or ())):
            if joint not in JOINTS:
                raise ConfigError(f"joint {joint!r}: must be one of {', '.join(JOINTS)}")
        for motor in self.ids:
            if not 1 <= motor <= len(JOINTS):
                raise ConfigError(f"ids: got {motor}, the motors are 1 .. {len(JOINTS)}")
        for kind in self.kinds:
            if kind not in FAULTS:
                raise ConfigError(f"kinds: got {kind!r}, must be of {', '.join(FAULTS)}")


def read_event(line: str) -> Event:
    """The event that a line of JSON describes. ConfigError says what is wrong with it."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"script: not JSON ({error}): {line.strip()}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"script: must be one JSON object a line: {line.strip()}")
    return from_dict(Event, values, "script")


def play(event: Event, port: SimPort, world: World | None = None) -> None:
    """Let `event` happen to `port` and the servos behind it, `event.after` seconds of their time from now.

    Raises ConfigError where it is about a cube and there is no `world`.
    """
    servos = port.servos
    if event.cube != [] and world is None:
        raise ConfigError("script: there is no cube; start with camera=true")

    def begin() -> None:
        end = _begin(event, port)
        if event.cube != [] and world is not None:
            world.reset()
            if event.cube is not None:
                world.place_cube(*event.cube)
        if event.fault is not None and event.seconds is not None:
            servos.after(event.seconds, end)

    servos.after(event.after, begin)


def _begin(event: Event, port: SimPort) -> Callable[[], object]:
    """Do it; returns what undoes it."""
    servos, motors, value = port.servos, [motor - 1 for motor in event.ids], event.value or 0.0
    if event.move is not None:
        _move(servos, event.move, event.seconds or 0.0)
    elif event.plug is not None:
        chain = {JOINTS.index(name) for name in event.plug}
        servos.power_cycle(index for index in chain if not servos.present[index])
        servos.present[:] = [index in chain for index in range(len(JOINTS))]
    match event.fault:
        case "vanish":
            servos.power_cycle(motors)
            return _replace(servos.present, motors, [False] * 6)
        case "mute":
            return _replace(servos.present, motors, [False] * 6)
        case "unplug":
            port.unplug()
            return port.plug_in
        case "block":
            servos.block(motors)
            return lambda: servos.block([])
        case "overload":
            for motor in motors:
                servos.overload(motor)
        case "voltage":
            return _replace(servos.voltage, motors, [value] * 6)
        case "temperature":
            return _replace(servos.temperature, motors, [value] * 6)
        case "register":
            return _store(servos, motors, event.register or "", [round(value)] * 6)
        case "replies":
            return _assign(port, "fault", Faults(np.random.default_rng(0), value, event.kinds))
        case "echo":
            return _assign(port, "echo", True)
        case "slow":
            return _assign(port, "delay", value)
    return lambda: None


def _replace(values: Any, indices: Sequence[int], new: Sequence[Any]) -> Callable[[], object]:
    """Set values[index] to new[index]; returns what sets them back."""
    before = list(values)
    for index in indices:
        values[index] = new[index]
    return lambda: _replace(values, indices, before)


def _assign(port: SimPort, name: str, value: Any) -> Callable[[], object]:
    before = getattr(port, name)
    setattr(port, name, value)
    return lambda: setattr(port, name, before)


def _store(servos: SimServos, indices: Sequence[int], register: str, new: Sequence[int]) -> Callable[[], object]:
    """Let servos[index] hold new[index]; returns what restores them."""
    entry = REGISTERS[register]
    before = [decode_value(register, servos.read_memory(index, entry.address, entry.size)) for index in range(6)]
    for index in indices:
        servos.store(index, register, new[index])
    return lambda: _store(servos, indices, register, before)


def _move(servos: SimServos, move: Mapping[str, float], seconds: float) -> None:
    """Lead the joints to where they are to be, on a straight line."""
    joints = [JOINTS.index(name) for name in move]
    start = servos.angle[joints]
    end = np.array([jaw_angle(to) if name == "gripper" else to for name, to in move.items()])
    steps = max(1, round(seconds / SUBSTEP))

    def lead(done: float) -> None:
        angle = servos.angle.copy()
        angle[joints] = start + (end - start) * done
        servos.move_by_hand(angle)

    for step in range(1, steps + 1):
        servos.after((step - 1) * SUBSTEP, functools.partial(lead, step / steps))
