"""Find out what an arm's ticks mean: move every joint from stop to stop, and it is written down.

    python -m so101.tools.calibrate port=/dev/ttyACM0 output=calibrations/follower.json      sweep the joints
    python -m so101.tools.calibrate file=calibrations/follower.json port=/dev/ttyACM0        do the servos agree?
    python -m so101.tools.calibrate file=calibrations/follower.json port=/dev/ttyACM0 test=ruler

file= takes a calibration, ours or LeRobot's: alone it is shown; it is compared with the servos (port=), written to them
(write=true) or converted (output=, export=); test=ruler and test=mirror test it.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from so101.config import launch, option
from so101.errors import ConfigError, DataError, HardwareError
from so101.files import write_atomic
from so101.rig import ArmConfig
from so101.robot.arm import MULTI_TURN
from so101.robot.bus import ServoBus
from so101.robot.calibration import (
    CALIBRATED,
    MAX_TICKS,
    SMALLEST_RANGE_TICKS,
    UNSWEPT,
    Calibration,
    Stored,
    Sweep,
    Zero,
    differences,
    lerobot_text,
    load_calibration,
    numbered,
    save_calibration,
    to_half_turn,
    unlike_ranges,
)
from so101.robot.feetech import TICKS_PER_TURN
from so101.robot.kinematics import URDF_LIMITS
from so101.robot.ports import command, open_port, sweep_command
from so101.robot.probe import read_chain
from so101.runlog import table
from so101.schema import ARM_JOINTS, JOINTS
from so101.signals import signals_held
from so101.tools.ask import ask, make_limp, open_limp, until_enter
from so101.tools.calibration_checks import mirror_test, ruler_test

MIDDLE_POSE = (
    "shoulder straight ahead, upper arm upright, forearm and gripper level and straight ahead, moving jaw on top, "
    "gripper half open"
)
USUAL_DEG = np.degrees(URDF_LIMITS[:, 1] - URDF_LIMITS[:, 0])
USUAL_SHARE = 0.9  # of that; a sweep that covers less missed a stop
HELD_TOLERANCE_DEG = 15.0  # a pose held by eye is up to 10 degrees off
ZERO_TOLERANCE_DEG = 2.0
SINKS_TICKS = 100  # 9 degrees; as much as a limp arm may move while its servos are written
DEG_PER_TICK = 360 / TICKS_PER_TURN

# Where LeRobot keeps an arm's file; version 0.4.3 renamed the folders.
LEROBOT_FOLDERS = {
    "follower": ("robots/so101_follower", "robots/so_follower"),
    "leader": ("teleoperators/so101_leader", "teleoperators/so_leader"),
}


@dataclass
class Config:
    """What the command line can set."""

    port: str = option("", "the arm's serial port, best a path under /dev/serial/by-id")
    output: str = option("", "calibration file to write; one that is there is kept beside it, with a number")
    arm: Literal["follower", "leader"] = option("follower", "which of the two arms this is")
    file: str = option("", "instead of a sweep: a calibration file, or an arm's id in LeRobot's folders")
    zero: Zero | None = option(
        None,
        "where a joint's angle is 0: middle_of_range (of its stops; default) or held_pose (where it was held before "
        "the sweep, tick 2047 in LeRobot's files); asked for where these differ in a LeRobot file",
    )
    export: str = option("", "also write LeRobot's format here: a file, or an arm's id in LeRobot's folders")
    write: bool = option(False, "write `file` to the servos")
    compare: str = option("", "the other arm's calibration file; ranges that differ by more than 5 % are refused")
    compare_port: str = option("", "the other arm's serial port, for test=mirror")
    test: Literal["ruler", "mirror"] | None = option(
        None, "test `file` against a tape measure, or against the other arm held in the same pose"
    )

    def __post_init__(self) -> None:
        needed = [] if self.file and not self.write else ["port"]
        if self.test is not None:
            needed = ["port", "file", *(["compare", "compare_port"] if self.test == "mirror" else [])]
        elif not self.file:
            needed.append("output")
        for name in needed:
            if not getattr(self, name):
                sweep = sweep_command(self.port or "/dev/ttyACM0", self.arm, self.output)
                raise ConfigError(f"{name}: is missing; as in `{sweep}`, or for a test port= file= test=ruler (--help)")


def main(config: Config) -> int:
    """Sweep, take a file, or test; 1 for a failed test, and for a file that is not the servos'."""
    with ExitStack() as stack:
        if config.test is None:
            return take_file(config, stack) if config.file else calibrate(config, stack)
        _other(config)  # read before an arm goes limp
        arm = open_limp(config.arm, ArmConfig(config.port, str(_find(config))), stack)
        if config.test == "ruler":
            return int(not ruler_test(arm))
        name = "leader" if config.arm == "follower" else "follower"
        other = open_limp(name, ArmConfig(config.compare_port, config.compare), stack)
        return int(not mirror_test(config.arm, arm, name, other))


def calibrate(config: Config, stack: ExitStack) -> int:
    """Sweep the joints by hand; store the result in a file and in the servos.

    Angles are 0 at the middle of a joint's stops, as in the kinematics' own model: stops are metal, and found
    again to a degree, while a pose held by eye is up to ten off. It is asked for all the same, as a check.
    """
    other = _other(config)  # read before the work, not after it
    bus = _open_bus(config, range(1, len(JOINTS) + 1), stack)
    make_limp(bus, config.arm)
    sweep, stored = _sweep(bus), _read_stored(bus)
    offsets = np.array([registers["Homing_Offset"] for registers in stored.values()])
    calibration = sweep.calibration(offsets, config.zero or "middle_of_range")
    for doubt in _doubts(sweep):
        print(f"warning: {doubt}")
    _require_alike(calibration, other, config.compare)
    differing = _table_of_differences(calibration, stored)
    print(differing or "the servos hold all this already")
    ask(f"Press Enter to keep this (in {config.output} and the servos); Ctrl-C leaves all as it was.")
    _save(calibration, config)
    if differing:
        _write_servos(bus, calibration, stored, Path(config.output))
    test = command("calibrate", config.port, f"arm={config.arm}", f"file={config.output}", "test=ruler")
    print(f"next: {test}; with both arms calibrated also test=mirror, with compare= and compare_port= of the other")
    return 0


def take_file(config: Config, stack: ExitStack) -> int:
    """Convert a calibration file, and compare it with the servos or write it to them; 1 if it differs.

    With nothing else to do, show it.
    """
    path = _find(config)
    calibration = _load(path, config)
    _require_alike(calibration, _other(config), config.compare)
    _save(calibration, config)
    if not config.port:
        if not config.output and not config.export:
            print(_table_of_ranges(calibration))
            print("port= of the arm compares this with its servos; output= or export= converts it")
        return 0
    bus = _open_bus(config, calibration.ids, stack)
    stored = _read_stored(bus)
    differing = _table_of_differences(calibration, stored)
    print(differing or f"the servos hold the ranges and offsets of {path}; test=ruler tests its zero")
    if differing and config.write:
        make_limp(bus, config.arm)
        _write_servos(bus, calibration, stored, Path(config.output or path))
    elif differing:
        print("write=true writes the file to the servos; do that only with the file made for this very arm")
    return int(bool(differing) and not config.write)


def _open_bus(config: Config, ids: Iterable[int], stack: ExitStack) -> ServoBus:
    """The bus to six servos, all of which answer; HardwareError says what is wrong with the chain."""
    names = {servo_id: f"{config.arm} {joint}" for servo_id, joint in zip(ids, JOINTS, strict=True)}
    bus = ServoBus(open_port(config.port, "port"), names=names)
    stack.callback(bus.close)
    read_chain(bus, list(names))
    return bus


def _read_ticks(bus: ServoBus) -> np.ndarray:
    ticks = bus.sync_read("Present_Position", list(bus.names))
    return np.array([ticks[servo_id] for servo_id in bus.names])


def _read_stored(bus: ServoBus) -> Stored:
    return bus.sync_read_span("Min_Position_Limit", "Homing_Offset", list(bus.names))


def _sweep(bus: ServoBus) -> Sweep:
    """Follow the joints until each has moved and the person presses Enter."""
    ask(f"Hold the arm in its middle pose ({MIDDLE_POSE}), and press Enter.")
    sweep = Sweep(_read_ticks(bus))

    def look() -> str:
        sweep.follow(_read_ticks(bus))
        degrees = ((sweep.high - sweep.low) * DEG_PER_TICK).round()
        columns = sweep.low, sweep.here, sweep.high, degrees, USUAL_DEG.round()
        return table(["joint", "min", "position", "max", "degrees", "usual"], list(zip(JOINTS, *columns, strict=True)))

    print("Move every joint from one stop to the other, wrist_roll and the gripper too; then press Enter.")
    while True:
        until_enter(look)
        spans = dict(zip(JOINTS, sweep.high - sweep.low, strict=True))
        still = [name for name, span in spans.items() if span < SMALLEST_RANGE_TICKS]
        if not still:
            return sweep
        print(f"{', '.join(still)}: hardly moved; move it from stop to stop too, and press Enter again.")


def _doubts(sweep: Sweep) -> list[str]:
    """What looks like a stop that was not reached, which moves the zero by half of what is missing."""
    doubts, away = [], ((sweep.low + sweep.high) / 2 - sweep.held) * DEG_PER_TICK
    shares = (sweep.high - sweep.low) * DEG_PER_TICK / USUAL_DEG
    for name, share, degrees in zip(JOINTS, shares, away, strict=True):
        if share < USUAL_SHARE:
            doubts.append(f"{name}: swept {share:.0%} of the usual range; was it moved to both stops?")
        elif abs(degrees) > HELD_TOLERANCE_DEG and name in ARM_JOINTS:
            doubts.append(f"{name}: the middle of its range is {degrees:+.0f} degrees from where it was held")
    return doubts


def _other(config: Config) -> Calibration | None:
    return load_calibration(Path(config.compare)) if config.compare else None


def _require_alike(calibration: Calibration, other: Calibration | None, source: str) -> None:
    """DataError for a joint whose range is not the other arm's."""
    if other is None:
        return
    if unlike := unlike_ranges(calibration, other):
        raise DataError(f"{source}: {unlike}; without compare= it is taken as it is")
    print(f"the ranges are those of {source}")


def _table_of_ranges(calibration: Calibration) -> str:
    """The file in ticks, and each joint's range beside the usual one."""
    rows = []
    for (name, joint), usual in zip(calibration.joints.items(), USUAL_DEG, strict=True):
        degrees = (joint.range_max - joint.range_min) * DEG_PER_TICK
        ticks = joint.homing_offset, joint.range_min, joint.zero_ticks, joint.range_max
        rows.append([name, joint.id, *ticks, round(degrees), round(usual)])
    return table(["joint", "id", "offset", "min", "zero", "max", "degrees", "usual"], rows)


def _table_of_differences(calibration: Calibration, stored: Stored) -> str:
    """What the servos hold otherwise; empty when nothing."""
    rows = differences(calibration, stored)
    return table(["joint", "register", "servo", "calibration"], rows) if rows else ""


def _write_servos(bus: ServoBus, calibration: Calibration, stored: Stored, beside: Path) -> None:
    """Write what differs, after keeping the old values in a file, and see that the servos then read as they should.

    Raises HardwareError for a calibration that puts a joint outside its range: it is another arm's.
    """
    joints = calibration.joints
    moved = [stored[joint.id]["Homing_Offset"] - joint.homing_offset for joint in joints.values()]
    expected = _read_ticks(bus) + np.array(moved)
    low, high = np.array([(joint.range_min, joint.range_max) for joint in joints.values()]).T
    outside = np.abs(to_half_turn(expected - (low + high) // 2)) > (high - low) / 2 + SINKS_TICKS
    if outside.any():
        names = ", ".join(name for name, out in zip(JOINTS, outside, strict=True) if out)
        raise HardwareError(
            f"{names}: stands outside its range in this calibration, which is another arm's, or missed a stop; the "
            f"servos were not written. Sweep this arm from stop to stop"
        )
    old = {
        name: replace(joint, **{field: stored[joint.id][register] for register, field in CALIBRATED.items()})
        for name, joint in joints.items()
    }
    kept = numbered(beside.with_stem(f"{beside.stem}.servos"))
    write_atomic(kept, lerobot_text(old))
    print(f"what the servos hold is in {kept}")
    written = 0
    with signals_held():
        for joint in joints.values():
            wanted = joint.registers | {"Phase": stored[joint.id]["Phase"] & ~MULTI_TURN}
            written += sum(bus.write_eprom(joint.id, register, value) for register, value in wanted.items())
    print(f"{written} settings written to the servos and read back")
    off = np.abs(to_half_turn(_read_ticks(bus) - expected))
    if (worst := int(off.max())) > SINKS_TICKS:
        raise HardwareError(
            f"{JOINTS[int(np.argmax(off))]}: reads {worst} ticks off what its new offset should make it read; switch "
            f"the power off and on, hold the arm still, and calibrate again"
        )


def _save(calibration: Calibration, config: Config) -> None:
    """Write the files that were asked for."""
    targets = [(Path(config.output), False)] if config.output else []
    if config.export:
        targets += [(path, True) for path in _paths(config.export, config.arm)]
        if apart := _off_middle(calibration):
            print(f"note: LeRobot's 0 is the middle of the range, not this calibration's: {apart}")
    for path, lerobot in targets:
        kept = save_calibration(path, calibration, lerobot)
        print(f"{path}: written" + (f"; what was there is now {kept}" if kept else ""))


def _find(config: Config) -> Path:
    """Where the calibration `file` is. ConfigError when two versions of LeRobot left two that differ."""
    paths = _paths(config.file, config.arm)
    there = [path for path in paths if path.exists()] or paths[:1]
    if len(there) > 1 and there[0].read_bytes() != there[1].read_bytes():
        raise ConfigError(f"file: {there[0]} and {there[1]} differ (LeRobot 0.4.3 renamed the folder); give one's path")
    return there[0]


def _load(path: Path, config: Config) -> Calibration:
    """Read `file`, and tell of an unswept roll; ConfigError where a conversion leaves open where the angles are 0."""
    middle, held = load_calibration(path), load_calibration(path, "held_pose")
    if (roll := middle.joints["wrist_roll"]).range_max - roll.range_min == MAX_TICKS:
        print(
            f"note: {path}: wrist_roll has no range of its own ({UNSWEPT}): its 0 is where it was held by eye, and its "
            f"stops are unknown, so that it can be driven into them; sweep this arm for both"
        )
    if config.output and config.zero is None and middle != held and (apart := _off_middle(held)):
        raise ConfigError(
            f"zero: {path} is LeRobot's, and does not say where 0 is: give zero=middle_of_range (as LeRobot's own "
            f"degrees have it) or zero=held_pose (tick 2047). The second is off the first by {apart}"
        )
    return held if config.zero == "held_pose" else middle


def _off_middle(calibration: Calibration) -> str:
    """The joints whose zero is not the middle of their range, with degrees; empty where all are."""
    apart = {
        name: (joint.zero_ticks - (joint.range_min + joint.range_max) / 2) * DEG_PER_TICK
        for name, joint in calibration.joints.items()
    }
    return ", ".join(
        f"{name} {apart[name]:+.1f} degrees" for name in ARM_JOINTS if abs(apart[name]) > ZERO_TOLERANCE_DEG
    )


def _paths(file: str, arm: str) -> list[Path]:
    """The file itself, or where the versions of LeRobot keep that of an arm with this id."""
    if file.endswith(".json"):
        return [Path(file)]
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    home = os.environ.get("HF_LEROBOT_HOME", f"{cache}/lerobot")
    root = Path(os.environ.get("HF_LEROBOT_CALIBRATION", f"{home}/calibration")).expanduser()
    return [root / folder / f"{file}.json" for folder in LEROBOT_FOLDERS[arm]]


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
