"""What a flight record says in plain words: what ended the program, what it most likely was, and what to do next.

The error says where to look, and the readings what was there.
"""

import re
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from so101.errors import EpisodeAborted, HardwareError, SafetyStop, UserError
from so101.robot.arm import Reading
from so101.robot.feetech import status_names
from so101.robot.flight import SECONDS, FlightRecorder, Track
from so101.robot.ports import PORTS_COMMAND, command
from so101.robot.safety import EASE_LAG, GRIPPER, VOLTAGE_BIT, SafetyConfig
from so101.runlog import table
from so101.schema import JOINTS

JUMP = 5.0  # deg C from one reading to the next; a motor that gives all its torque warms by 0.2 in a second
LAST_SAID = 12  # lines
WIDTH = 110
PACKAGE = Path(__file__).parents[1]


class Cause(NamedTuple):
    """What it most likely was, with the numbers that say so, and what to do next."""

    what: str
    then: str


class LastReadings(NamedTuple):
    """What an arm said before the fault, n times."""

    times: np.ndarray  # (n,) s from the fault on
    said: Reading  # each field (n, 6)
    behind: np.ndarray  # (n, 6) how far each joint was from its goal, rad and opening; 0 while the arm is limp

    @classmethod
    def of(cls, track: Track, failed_at: float) -> "LastReadings | None":
        """None where the arm was not read."""
        rows = [row for row in track.readings.rows if row[0] <= failed_at]
        if not rows:
            return None
        times, readings, goals = zip(*rows, strict=True)
        said = Reading(*(np.array(column) for column in zip(*readings, strict=True)))
        return cls(np.array(times) - failed_at, said, np.nan_to_num(np.abs(np.array(goals) - said.position)))


def diagnosis(flight: FlightRecorder) -> str:
    """The text of diagnosis.txt, of a flight that has failed."""
    error, when = flight.error, time.strftime("%Y-%m-%d at %H:%M:%S", flight.failed_on)
    kinds = {
        SafetyStop: "a safety stop", EpisodeAborted: "episodes in a row that came to nothing",
        HardwareError: "a fault of the hardware",
    }  # fmt: skip
    kind = next((words for what, words in kinds.items() if isinstance(error, what)), "a bug")
    arms = {name: LastReadings.of(track, flight.failed_at) for name, track in flight.tracks.items()}
    seen = {name: saw for name, saw in arms.items() if saw is not None}
    cause = _cause(flight, seen)
    said = [f"{at:+7.1f} s  {what}" for at, _, what in flight.happened("told", "cue")]
    parts = {
        "what ended the program": [f"{kind}, {when}", f"{type(error).__name__}: {error}"],
        "most likely": [cause.what],
        "next": [cause.then],
        "also found": _also(cause, seen, flight.limits),
        "before it": [*_loop(flight, seen), *_cameras(flight), _person(flight)],
        "after it": _rest(flight),
        "said last": said[-LAST_SAID:],
    }
    lines = []
    for title, sentences in parts.items():
        lines += [title, *map(_wrapped, sentences), ""] if sentences else []
    for name, saw in seen.items():
        lines += [f"the {name}'s servos, read {len(saw.times)} times from {saw.times[0]:.1f} s on"]
        lines += [_table(saw, flight.limits), ""]
    return "\n".join(lines)


def _wrapped(words: str) -> str:
    """As lines; a command among backticks stays whole, so that it can be pasted."""
    whole = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), words)
    lines = textwrap.fill(
        whole, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return lines.replace("\0", " ")


def _cause(flight: FlightRecorder, seen: Mapping[str, LastReadings]) -> Cause:
    error, said = flight.error, str(flight.error)
    if not isinstance(error, UserError):
        return _bug(error)
    if said.startswith("camera "):
        return _lost_camera(flight, said.removeprefix("camera ").partition(":")[0])
    arm = _arm_of(flight)
    saw, named = seen.get(arm), [joint for joint, name in enumerate(JOINTS) if name in said]
    if "the port failed" in said:
        return Cause(
            f"the {arm}'s USB adapter was pulled out or failed: its port was gone, and did not come back. "
            f"{_last_words(saw, range(6))}",
            f"support the arm, for it may still hold; plug the adapter in, straight into the computer, then "
            f"{_lets_go(flight.tracks[arm])}; `{PORTS_COMMAND}` shows whether it is there",
        )
    if "no valid reply" in said and named:
        return _silent(arm, named, saw)
    if "limp though" in said and named:
        return Cause(
            f"the {arm}'s {_names(named)} lost power for a moment, and came back limp. {_last_words(saw, named)}",
            "support the arm; push in the plugs of that motor and of the one before it, look for a worn cable, and "
            "where its voltage dipped, for a stronger supply",
        )
    for joint in named:
        if saw is not None and (cause := _servo_cause(arm, joint, saw, flight.limits)) is not None:
            return cause
    return Cause("what the error says; the readings show nothing that would explain it otherwise", "do as it says")


def _also(cause: Cause, seen: Mapping[str, LastReadings], limits: SafetyConfig) -> list[str]:
    """What else was wrong with a servo, and no moment's peak."""
    found = [
        other.what
        for arm, saw in seen.items()
        for joint in range(len(JOINTS))
        if (other := _servo_cause(arm, joint, saw, limits, limits.peak_s)) is not None
    ]
    return [what for what in dict.fromkeys(found) if what != cause.what]


def _arm_of(flight: FlightRecorder) -> str:
    """The arm that the innermost function with an arm worked on when the error was raised."""
    found = next(iter(flight.tracks))
    for frame, _ in traceback.walk_tb(flight.error.__traceback__ if flight.error is not None else None):
        for name, track in flight.tracks.items():
            if any(frame.f_locals.get(own) is track.arm for own in ("self", "arm")):
                found = name
    return found


def _bug(error: Exception | None) -> Cause:
    if isinstance(error, OSError):
        return Cause(
            f"not the arm: the system refused a file or a connection ({error})",
            "make room on the disk, or mend what it names, and start again",
        )
    entries = traceback.extract_tb(error.__traceback__ if error is not None else None)
    ours = [at for at in entries if _is_ours(Path(at.filename)) and at.name != "open_rig"] or list(entries)
    where = "".join(f": {Path(at.filename).name}, line {at.lineno}, in {at.name}: {at.line}" for at in ours[-1:])
    return Cause(  # of open_rig there is the line that waits for the program's body
        f"a mistake in the program, not in the arm{where}",
        "report it with this folder; below is what the servos read, should it have met something unusual",
    )


def _is_ours(path: Path) -> bool:
    """A file of the package, or a script beside it."""
    return PACKAGE in path.parents or path.parent == PACKAGE.parent


def _lost_camera(flight: FlightRecorder, name: str) -> Cause:
    used = "no frame of it was ever used"
    if name in flight.frames:
        age = flight.failed_at - flight.frames[name][1]
        used = f"the newest frame used was taken {age:.2f} s before the fault"
    return Cause(
        f"camera {name} gave no good frames any more; {used}. The arm had no part in it",
        f"look at the camera's cable and lens (its last picture is {name}.png), and for another program that uses it; "
        f"give it a USB port of its own; `python -m so101.tools.camera` shows what it sees",
    )


def _silent(arm: str, joints: list[int], saw: LastReadings | None) -> Cause:
    first, then = JOINTS[joints[0]], "support the arm and switch its power off; "
    before = JOINTS[joints[0] - 1] if joints[0] else "the board"
    if len(joints) == len(JOINTS):
        what = f"all six motors of the {arm} fell silent at once, though its adapter is there"
        then += "look at the supply, and at the first cable"
    elif len(joints) > 1 and joints == list(range(joints[0], len(JOINTS))):
        what = f"the {arm}'s {_names(joints)}, all that is behind {before}, fell silent"
        then += f"push in the cable from {before} to {first}"
    else:
        what = f"the {arm}'s {_names(joints)} fell silent while the others answered, so adapter and line are good"
        then += f"push in the plugs of {_names(joints)}; a motor that stays silent is broken"
    return Cause(f"{what}. {_last_words(saw, joints)}", then)


def _last_words(saw: LastReadings | None, joints: Sequence[int]) -> str:
    """What motors read when they were last heard, and the lowest voltage until then."""
    if saw is None:
        return "It was not read before"
    own, said = list(joints), saw.said
    status = sorted({word for bits in said.status[-1, own].tolist() for word in status_names(bits)})
    return (
        f"Last read {abs(saw.times[-1]):.1f} s before the fault, at {_span(said.voltage[-1, own], '.1f')} V (lowest in "
        f"all: {said.voltage[:, own].min():.1f}) and {_span(said.temperature[-1, own], '.0f')} deg C; "
        f"reported: {', '.join(status) or 'no fault'}"
    )


def _servo_cause(arm: str, joint: int, saw: LastReadings, limits: SafetyConfig, seconds: float = 0.0) -> Cause | None:
    """What was wrong with a joint at last, for `seconds` at least where a peak may pass; None: nothing."""
    who, times, status = f"the {arm}'s {JOINTS[joint]}", saw.times, int(saw.said.status[-1, joint]) & ~VOLTAGE_BIT
    volts, current, behind = saw.said.voltage[:, joint], saw.said.current[:, joint], saw.behind[:, joint]
    hot = saw.said.temperature[-1, joint] > limits.max_temperature or "overheat" in status_names(status)
    unfit = (volts < limits.min_voltage) | (volts > limits.max_voltage)
    hard = _pushes(saw, limits)[:, joint] | (current > limits.max_current) | (behind > EASE_LAG)
    if hot:
        return _too_hot(who, times, saw.said.temperature[:, joint], np.abs(saw.said.load[:, joint]), limits)
    if status:
        return Cause(
            f"{who} reports {', '.join(status_names(status))}; {_strain(joint, saw, limits)}",
            "support the arm, free the joint and switch the power off and on: until then an overloaded servo gives a "
            "fifth of its torque. A fault that comes back at once is the motor's own",
        )
    if unfit[-1] and _lasting(times, unfit)[-1] >= seconds:
        return _wrong_voltage(arm, saw, limits)
    # A gripper that grips pushes for as long as it likes.
    if hard[-1] and _lasting(times, hard)[-1] >= seconds and not (GRIPPER[joint] and seconds):
        return Cause(
            f"something held {who}; {_strain(joint, saw, limits)}",
            "look for what is in its way: the table, a cable, the cube under the gripper; with the power off it must "
            "turn freely by hand through its whole range",
        )
    return None


def _too_hot(who: str, times: np.ndarray, heat: np.ndarray, load: np.ndarray, limits: SafetyConfig) -> Cause:
    step = float(np.diff(heat, prepend=heat[0]).max())
    sensor = (
        f". It rose by {step:.0f} from one reading to the next, faster than a motor can warm: if it feels cool, its "
        f"sensor is broken"
    )
    return Cause(
        f"{who} was too hot: it read {heat[-1]:.0f} deg C, allowed is {limits.max_temperature:.0f}; {-times[0]:.0f} s "
        f"before it was {heat[0]:.0f}, and gave {load.mean():.0%} of its torque on average since"
        f"{sensor if step >= JUMP else ''}",
        f"let it cool below {limits.warn_temperature:.0f} deg C, then look for what it works against: a joint that "
        f"binds, a pose that is held for long, a grip that never lets go",
    )


def _strain(joint: int, saw: LastReadings, limits: SafetyConfig) -> str:
    """How hard a joint pushed, and what came of it."""
    load, current = np.abs(saw.said.load[:, joint]), saw.said.current[:, joint]
    asked = limits.grip_load if GRIPPER[joint] else limits.stall_load
    recent = saw.said.position[saw.times >= saw.times[-1] - limits.stall_s, joint]
    return (
        f"it gave up to {load.max():.0%} of its torque and {current.max():.2f} A, {asked:.0%} and more for "
        f"{_lasting(saw.times, load >= asked).max():.1f} s without a break; at last it was {saw.behind[-1, joint]:.2f} "
        f"from its goal, and moved by {np.ptp(recent):.3f} in its last {limits.stall_s:g} s (rad; gripper: opening)"
    )


def _wrong_voltage(arm: str, saw: LastReadings, limits: SafetyConfig) -> Cause:
    """Of all joints whose supply was wrong at last."""
    volts = saw.said.voltage
    wrong = (volts < limits.min_voltage) | (volts > limits.max_voltage)
    joints = np.flatnonzero(wrong[-1]).tolist()
    lasted = max(_lasting(saw.times, wrong[:, joint])[-1] for joint in joints)
    what = (
        f"the {arm}'s {'six motors' if len(joints) == len(JOINTS) else _names(joints)} got "
        f"{_span(volts[-1, joints], '.1f')} V for {lasted:.1f} s, allowed is {limits.min_voltage:g} .. "
        f"{limits.max_voltage:g}; usual was {np.median(volts[:, joints]):.1f}"
    )
    if volts[-1, joints].max() > limits.max_voltage:
        return Cause(f"{what}: this supply is none for these motors", "unplug it now; 7.4 V motors take a 5 V supply")
    if len(joints) == len(JOINTS):
        return Cause(f"{what}: the supply gave in", "look at the supply (5 V, 5 A or more), its plug and its cable")
    there = f"push in the plugs of {_names(joints)} and of the motor before, and look for a worn cable"
    return Cause(f"{what}. The others got more, so it is lost on the way there", there)


def _loop(flight: FlightRecorder, seen: Mapping[str, LastReadings]) -> list[str]:
    """How regular the ticks were."""
    late = [what["late"] for _, _, what in flight.happened("step")]
    lines = [f"{len(late)} steps, {sum(s > 0 for s in late)} late, by {max(late):.3f} s at most"] if late else []
    for name, saw in seen.items():
        gaps = np.diff(saw.times)
        if len(gaps):
            end = abs(saw.times[gaps.argmax() + 1])
            lines.append(
                f"the {name} was read every {np.median(gaps):.3f} s (median); the longest gap, {gaps.max():.2f} s, "
                f"ended {end:.1f} s before the fault; the last reading came {abs(saw.times[-1]):.2f} s before it"
            )
    return lines


def _cameras(flight: FlightRecorder) -> list[str]:
    lines, observed = [], flight.happened("observed")
    for name, (_, taken) in flight.frames.items():
        ages = [what["ages"][name] for _, _, what in observed if name in what["ages"]]
        used = f"; {len(ages)} were, {np.mean(ages):.3f} s old, {max(ages):.3f} at most" if ages else ""
        age = flight.failed_at - taken
        lines.append(f"camera {name}: the newest frame used was taken {age:.2f} s before the fault{used}")
    return lines


def _person(flight: FlightRecorder) -> str:
    keys = flight.happened("key")
    return (
        f"the last key was {keys[-1][2]}, {abs(keys[-1][0]):.1f} s before the fault"
        if keys
        else f"no key was pressed in {SECONDS:.0f} s"
    )


def _rest(flight: FlightRecorder) -> list[str]:
    """How the arms were left."""
    lines = []
    for name, track in flight.tracks.items():
        holding = ", ".join(joint for joint in JOINTS if joint in track.arm.driven)
        left = f"may still hold ({holding}): support it; {_lets_go(track)}" if holding else "was let go"
        lines.append(f"the {name} {left}")
    return [*lines, f"that took {flight.clock.now() - flight.failed_at:.1f} s"]


def _lets_go(track: Track) -> str:
    return f"`{command('release', track.arm.bus.port.name)}` lets it go"


def _table(saw: LastReadings, limits: SafetyConfig) -> str:
    said, pushes, rows = saw.said, _pushes(saw, limits), []
    for joint, name in enumerate(JOINTS):
        words = {word for bits in set(said.status[:, joint].tolist()) for word in status_names(bits)}
        volts = said.voltage[:, joint]
        rows.append(
            [
                name,
                f"{said.position[-1, joint]:.3f}",
                f"{saw.behind[:, joint].max():.2f}",
                f"{said.temperature[:, joint].max():.0f}",
                f"{said.current[:, joint].max():.2f}",
                f"{np.abs(said.load[:, joint]).max():.0%}",
                f"{_lasting(saw.times, pushes[:, joint]).max():.1f}",
                f"{volts.min():.1f} .. {volts.max():.1f}",
                ", ".join(sorted(words)) or "-",
            ]
        )
    return table(
        ["joint", "at last", "farthest behind", "deg C", "most A", "most torque", "pushing s", "V", "reported"], rows
    )


def _pushes(saw: LastReadings, limits: SafetyConfig) -> np.ndarray:
    """Whether (n, 6) a joint pushes as hard as one that is stalled."""
    return np.abs(saw.said.load) >= np.where(GRIPPER, limits.grip_load, limits.stall_load)


def _lasting(times: np.ndarray, so: np.ndarray) -> np.ndarray:
    """For how long (n,) s it had been so at each time, 0 where it was not."""
    index = np.arange(len(times))
    began = np.maximum.accumulate(np.where(so, -1, index)) + 1
    return np.where(so, times - times[np.minimum(began, index)], 0.0)


def _names(joints: Sequence[int]) -> str:
    return ", ".join(JOINTS[joint] for joint in joints)


def _span(values: np.ndarray, form: str) -> str:
    """One number, or the lowest and the highest."""
    return " .. ".join(dict.fromkeys((format(values.min(), form), format(values.max(), form))))
