"""Calibration: what a servo's ticks mean. The only place where ticks become radians and back.

Joint zero is stored (`zero_ticks`), because habits differ: the middle of the recorded range and tick 2047
are up to 17 degrees apart on a real arm.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from so101.errors import ConfigError, HardwareError
from so101.files import write_atomic
from so101.robot.feetech import MAX_ID, TICKS_PER_TURN, allowed_range
from so101.schema import JOINTS

MAX_TICKS = TICKS_PER_TURN - 1
SMALLEST_RANGE_TICKS = 200  # 18 degrees; the gripper's, the smallest real one, is about 1250


@dataclass(frozen=True)
class JointCalibration:
    """One joint. Position ticks are those after the servo's homing offset: encoder - homing_offset."""

    id: int
    drive_mode: int  # 1: the joint turns against its servo
    homing_offset: int
    range_min: int
    range_max: int
    zero_ticks: float  # where the joint's angle is 0; of no meaning for the gripper


@dataclass
class Calibration:
    """The six joints, by name, in the order of schema.JOINTS.

    A position is (6,): five angles in rad, and the gripper's opening, 0 closed .. 1 open over its range.
    """

    joints: dict[str, JointCalibration]
    _origin_ticks: np.ndarray = field(init=False, repr=False, compare=False)  # (6,), where the position is 0
    _scale: np.ndarray = field(init=False, repr=False, compare=False)  # (6,), rad or opening per tick

    def __post_init__(self) -> None:
        origin, scale = zip(*(_origin_and_scale(name, self.joints[name]) for name in JOINTS), strict=True)
        self._origin_ticks, self._scale = np.array(origin), np.array(scale)

    @property
    def ids(self) -> list[int]:
        """The six servo ids, in joint order."""
        return [self.joints[name].id for name in JOINTS]

    @property
    def names(self) -> dict[int, str]:
        """Joint name by servo id, for a bus's messages."""
        return {self.joints[name].id: name for name in JOINTS}

    def to_position(self, ticks: np.ndarray) -> np.ndarray:
        """Ticks (6,) -> position (6,), not clipped to the range."""
        return (ticks - self._origin_ticks) * self._scale

    def to_ticks(self, position: np.ndarray) -> np.ndarray:
        """Position (6,) -> nearest ticks (6,) int. Raises HardwareError outside 0 .. 4095."""
        ticks = np.rint(position / self._scale + self._origin_ticks)
        inside = (ticks >= 0) & (ticks <= MAX_TICKS)  # False for NaN too
        if not inside.all():
            joint = int(np.argmin(inside))
            raise HardwareError(
                f"{JOINTS[joint]}: position {position[joint]:.4f} is tick {ticks[joint]:.0f}, "
                f"a servo has 0 .. {MAX_TICKS}"
            )
        return ticks.astype(int)

    def velocity(self, ticks_per_s: np.ndarray) -> np.ndarray:
        """Speeds (6,) in ticks/s -> rad/s, and openings/s for the gripper."""
        return ticks_per_s * self._scale

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest position, (6,) each: the ends of the calibrated ranges."""
        ends = [
            self.to_position(np.array([getattr(self.joints[name], end) for name in JOINTS]))
            for end in ("range_min", "range_max")
        ]
        return np.minimum(*ends), np.maximum(*ends)


def _origin_and_scale(name: str, joint: JointCalibration) -> tuple[float, float]:
    """The tick at which the joint's position is 0, and position per tick."""
    if name == "gripper":
        span = joint.range_max - joint.range_min
        return (joint.range_max, -1 / span) if joint.drive_mode else (joint.range_min, 1 / span)
    rad_per_tick = 2 * math.pi / TICKS_PER_TURN
    return joint.zero_ticks, -rad_per_tick if joint.drive_mode else rad_per_tick


_LEROBOT_KEYS = {"id", "drive_mode", "homing_offset", "range_min", "range_max"}


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file: ours, or one that LeRobot wrote.

    LeRobot's has no `zero_ticks`; its zero is the middle of the recorded range, as its degrees are.
    Raises ConfigError, naming file and joint, for whatever is missing, unknown or impossible.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such calibration file; make one with so101.tools.calibrate") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as a calibration: {error}") from error
    if not isinstance(content, dict) or set(content) != set(JOINTS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: must hold exactly the joints {', '.join(JOINTS)}; got {found}")
    ours = any("zero_ticks" in entry for entry in content.values() if isinstance(entry, dict))
    joints = {name: _read_joint(f"{path}: {name}", content[name], ours) for name in JOINTS}
    _check_ids(f"{path}", joints)
    return Calibration(joints)


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Write `calibration` whole or not at all, after the checks that `load_calibration` makes."""
    content = {name: asdict(calibration.joints[name]) for name in JOINTS}
    for name, entry in content.items():
        _read_joint(f"{path}: {name}", entry, with_zero=True)
    _check_ids(f"{path}", calibration.joints)
    write_atomic(Path(path), json.dumps(content, indent=4) + "\n")


def _read_joint(where: str, entry: Any, with_zero: bool) -> JointCalibration:
    keys = _LEROBOT_KEYS | ({"zero_ticks"} if with_zero else set())
    if not isinstance(entry, dict) or set(entry) != keys:
        found = sorted(entry) if isinstance(entry, dict) else repr(entry)
        raise ConfigError(f"{where}: must have the keys {', '.join(sorted(keys))}; got {found}")
    for key in _LEROBOT_KEYS:
        if type(entry[key]) is not int:  # bool is an int, but not a number of ticks
            raise ConfigError(f"{where}: {key} must be a whole number, got {entry[key]!r}")
    low, high = entry["range_min"], entry["range_max"]
    zero = entry.get("zero_ticks", (low + high) / 2)
    if type(zero) not in (int, float):
        raise ConfigError(f"{where}: zero_ticks must be a number, got {zero!r}")
    largest = allowed_range("Homing_Offset")[1]
    checks: list[tuple[str, Callable[[Any], bool], str]] = [
        ("id", lambda value: 0 <= value <= MAX_ID, f"0 .. {MAX_ID}"),
        ("drive_mode", lambda value: value in (0, 1), "0 or 1"),
        ("homing_offset", lambda value: abs(value) <= largest, f"{-largest} .. {largest}"),
        ("range_min", lambda value: 0 <= value <= MAX_TICKS, f"0 .. {MAX_TICKS}"),
        ("range_max", lambda value: 0 <= value <= MAX_TICKS, f"0 .. {MAX_TICKS}"),
        ("zero_ticks", lambda value: 0 <= value <= MAX_TICKS, f"0 .. {MAX_TICKS}"),
    ]
    for key, allowed, said in checks:
        value = zero if key == "zero_ticks" else entry[key]
        if not allowed(value):
            raise ConfigError(f"{where}: {key} is {value}, must be {said}")
    if high - low < SMALLEST_RANGE_TICKS:
        raise ConfigError(
            f"{where}: range_min {low} .. range_max {high} is no range that a joint moves over (at least "
            f"{SMALLEST_RANGE_TICKS} ticks); calibrate again, moving the joint from stop to stop"
        )
    return JointCalibration(**{key: entry[key] for key in _LEROBOT_KEYS}, zero_ticks=float(zero))


def _check_ids(where: str, joints: dict[str, JointCalibration]) -> None:
    owners: dict[int, str] = {}
    for name, joint in joints.items():
        if joint.id in owners:
            raise ConfigError(f"{where}: {owners[joint.id]} and {name} both have id {joint.id}")
        owners[joint.id] = name
