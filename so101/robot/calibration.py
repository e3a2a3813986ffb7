"""Calibration: what a servo's ticks mean. The only place where ticks become radians and back.

Joint zero is stored (`zero_ticks`), because habits differ: the middle of the recorded range and tick 2047
are up to 17 degrees apart on a real arm.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from so101.errors import ConfigError, DataError, HardwareError
from so101.files import read_json, write_atomic
from so101.robot.feetech import MAX_ID, TICKS_PER_TURN, allowed_range
from so101.schema import ARM_JOINTS, JOINTS

MAX_TICKS = TICKS_PER_TURN - 1
RANGE_TOLERANCE = 0.05  # of a joint's range: both arms have the same stops
SMALLEST_RANGE_TICKS = 200  # 18 degrees; the gripper's, the smallest real one, is about 1250
SEAM_MARGIN_TICKS = 100  # 9 degrees; nearer to 0 or 4095, a joint pressed on its stop could read from the other end
HELD_TICK = TICKS_PER_TURN // 2 - 1  # what LeRobot makes a joint read in the pose that was held
UNSWEPT = f"LeRobot from 0.4.3 on writes 0 .. {MAX_TICKS} for it, without a sweep"

# What the servos keep, and the field that it is here.
CALIBRATED = {
    "Homing_Offset": "homing_offset",
    "Min_Position_Limit": "range_min",
    "Max_Position_Limit": "range_max",
}

# Where a joint's angle is 0: at the middle between its stops, or where the person held it.
Zero = Literal["middle_of_range", "held_pose"]

Stored = Mapping[int, Mapping[str, int]]  # what servos keep: {servo id: {register: value}}


@dataclass(frozen=True)
class JointCalibration:
    """One joint. Position ticks are those after the servo's homing offset: encoder - homing_offset."""

    id: int
    drive_mode: int  # 1: the joint turns against its servo
    homing_offset: int
    range_min: int
    range_max: int
    zero_ticks: float  # where the joint's angle is 0; of no meaning for the gripper

    @property
    def registers(self) -> dict[str, int]:
        """What of this the servo keeps, by register."""
        return {register: getattr(self, field) for register, field in CALIBRATED.items()}


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


def to_half_turn(ticks: np.ndarray) -> np.ndarray:
    """Differences in ticks, whole turns taken off: -2048 .. 2047."""
    half = TICKS_PER_TURN // 2
    return (ticks + half) % TICKS_PER_TURN - half


class Sweep:
    """Follows the six joints while a hand moves them from stop to stop, also through the seam 4095 | 0.

    The readings (6,) are Present_Position. `here`, `low` and `high` (6,) begin within 0 .. 4095 and count on
    beyond it; `held` is the first reading, taken in the middle pose.
    """

    def __init__(self, ticks: np.ndarray) -> None:
        self.held = self.here = self.low = self.high = ticks % TICKS_PER_TURN

    def follow(self, ticks: np.ndarray) -> None:
        """Take in the next reading. HardwareError when a joint went so far that its way is in doubt."""
        step = to_half_turn(ticks - self.here)
        joint = int(np.argmax(np.abs(step)))
        if abs(step[joint]) > TICKS_PER_TURN // 4:
            raise HardwareError(
                f"{JOINTS[joint]}: {abs(step[joint]) * 360 // TICKS_PER_TURN} degrees between two readings, too "
                f"far to tell which way; check the cable if the display had stopped, and sweep again, slower"
            )
        self.here = self.here + step
        self.low, self.high = np.minimum(self.low, self.here), np.maximum(self.high, self.here)

    def calibration(self, homing_offsets: np.ndarray, zero: Zero) -> Calibration:
        """What was swept, for servos that read with `homing_offsets` (6,) so far.

        Servos keep their offset where it leaves the range clear of the seam. DataError, naming the joint, for
        a range that is none, or that is a whole turn.
        """
        joints = {}
        for index, name in enumerate(JOINTS):
            low, high, held = (int(ticks[index]) for ticks in (self.low, self.high, self.held))
            if high - low < SMALLEST_RANGE_TICKS:
                raise DataError(
                    f"{name}: moved over {high - low} ticks only, a joint's range has at least "
                    f"{SMALLEST_RANGE_TICKS}; sweep again, and move it from stop to stop"
                )
            if high - low >= MAX_TICKS:
                raise DataError(
                    f"{name}: turned over {high - low} ticks, a whole turn ({TICKS_PER_TURN}) or more, so that its "
                    f"ends read the same; mend its stops, or the cable that keeps it from turning on, and sweep again"
                )
            offset, shift = _recentred(int(homing_offsets[index]), low, high)
            middle = (low + high) / 2 if zero == "middle_of_range" else held
            joints[name] = JointCalibration(index + 1, 0, offset, low + shift, high + shift, float(middle + shift))
        return Calibration(joints)


def _recentred(homing_offset: int, low: int, high: int) -> tuple[int, int]:
    """The homing offset under which low .. high lies within 0 .. 4095, and what it adds to their ticks.

    A servo reads (encoder - offset) modulo 4096. Offsets that are a turn apart read the same, so that each
    has one within -2047 .. 2047, except 2048: there 2047 puts the range one tick off the centre.
    """
    if low >= SEAM_MARGIN_TICKS and high <= MAX_TICKS - SEAM_MARGIN_TICKS:
        return homing_offset, 0
    middle, largest = (low + high) // 2, allowed_range("Homing_Offset")[1]
    wanted = (homing_offset + middle - HELD_TICK + largest) % TICKS_PER_TURN - largest
    offset = min(wanted, largest)
    return offset, HELD_TICK - middle + wanted - offset


_LEROBOT_KEYS = ("id", "drive_mode", "homing_offset", "range_min", "range_max")


def differences(calibration: Calibration, stored: Stored) -> list[tuple[str, str, int | None, int]]:
    """Joint, register, value in the servo, value in the calibration: wherever these two values differ."""
    found = [
        (name, register, stored.get(joint.id, {}).get(register), value)
        for name, joint in calibration.joints.items()
        for register, value in joint.registers.items()
    ]
    return [row for row in found if row[2] != row[3]]


def explain_differences(calibration: Calibration, stored: Stored) -> str | None:
    """What is to be said when the servos do not hold `calibration`; None when they do."""
    found = differences(calibration, stored)
    if not found:
        return None
    if all([held[register] for register in CALIBRATED] == [0, 0, MAX_TICKS] for held in stored.values()):
        return "this arm has never been calibrated; run `python -m so101.tools.calibrate` first"
    joint, register, held, value = found[0]
    return (
        f"this calibration is not the one in the servos of {', '.join(dict.fromkeys(row[0] for row in found))}: "
        f"{joint}'s {register} is {held} in the servo, {value} in the calibration. Give the file that was made for "
        f"this arm, or calibrate it again with python -m so101.tools.calibrate"
    )


def unlike_ranges(calibration: Calibration, other: Calibration) -> str:
    """The joints whose range is not the other arm's, in words: one was not swept to both stops. Empty: all alike.

    Grippers are left out: the leader's is a trigger, and an opening is a fraction of its range.
    """
    unlike = []
    for name in ARM_JOINTS:
        here, there = ((each.joints[name].range_max - each.joints[name].range_min) for each in (calibration, other))
        if abs(here - there) > RANGE_TOLERANCE * max(here, there):
            unswept = f" ({UNSWEPT})" if MAX_TICKS in (here, there) else ""
            degrees = 360 / TICKS_PER_TURN
            unlike.append(f"{name} {here * degrees:.0f} degrees here, {there * degrees:.0f} there{unswept}")
    if not unlike:
        return ""
    return (
        f"ranges differ by more than {RANGE_TOLERANCE:.0%}: {'; '.join(unlike)}. Sweep the arm with the smaller range "
        f"again, from stop to stop"
    )


def load_calibration(path: Path, lerobot_zero: Zero = "middle_of_range") -> Calibration:
    """Read a calibration file: ours, or one that LeRobot wrote.

    LeRobot's has no `zero_ticks`; its zero is the middle of the recorded range, as its degrees are, or by
    `lerobot_zero` the pose that was held when it was made.
    Raises ConfigError, naming file and joint, for whatever is missing, unknown or impossible.
    """
    content = read_json(Path(path), ConfigError, "; python -m so101.tools.calibrate makes one")
    if set(content) != set(JOINTS):
        raise ConfigError(f"{path}: must hold exactly the joints {', '.join(JOINTS)}; got {sorted(content)}")
    ours = any("zero_ticks" in entry for entry in content.values() if isinstance(entry, dict))
    joints = {name: _read_joint(f"{path}: {name}", content[name], ours) for name in JOINTS}
    _check_ids(f"{path}", joints)
    if not ours and lerobot_zero == "held_pose":
        joints = {name: replace(joint, zero_ticks=float(HELD_TICK)) for name, joint in joints.items()}
    return Calibration(joints)


def save_calibration(path: Path, calibration: Calibration, lerobot: bool = False) -> Path | None:
    """Write `calibration` whole or not at all, after the checks that `load_calibration` makes.

    `lerobot`: in LeRobot's format. A file that was there and differs is kept beside the new one, and its new
    name returned.
    """
    content = {name: asdict(calibration.joints[name]) for name in JOINTS}
    for name, entry in content.items():
        _read_joint(f"{path}: {name}", entry, with_zero=True)
    _check_ids(f"{path}", calibration.joints)
    text = lerobot_text(calibration.joints) if lerobot else json.dumps(content, indent=4) + "\n"
    kept = None
    if path.exists():
        if path.read_text() == text:
            return None
        kept = numbered(path)
        shutil.copy2(path, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return kept


def lerobot_text(joints: Mapping[str, JointCalibration]) -> str:
    """The joints as LeRobot's calibration file has them, without `zero_ticks`, which it would refuse."""
    content = {name: {key: getattr(joints[name], key) for key in _LEROBOT_KEYS} for name in JOINTS}
    return json.dumps(content, indent=4) + "\n"


def numbered(path: Path) -> Path:
    """The first of arm.1.json, arm.2.json, ... beside arm.json that is not there yet."""
    return next(free for number in count(1) if not (free := path.with_stem(f"{path.stem}.{number}")).exists())


def _read_joint(where: str, entry: Any, with_zero: bool) -> JointCalibration:
    keys = {*_LEROBOT_KEYS, *(["zero_ticks"] if with_zero else [])}
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
