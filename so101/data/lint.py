"""What is wrong with a dataset, found before a training is spent on it: where it is, and what to do about it.

Errors are what no training may start on, warnings what a person should look at. An episode labelled skip is left
out here as it is there. The figures beside the thresholds are of 30 simulated demonstrations, 729 rows.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from so101.data.corrections import CORRECTION
from so101.data.dataset import Closing, Dataset, Episode, episode_rows
from so101.data.labels import WANTED_POSITIVE, EpisodeLabel, Labels, load_labels
from so101.data.layout import IMAGES
from so101.data.video import count_frames
from so101.errors import DataError
from so101.schema import ACTION, ARM_JOINTS, JOINTS, OPENING, STATE, STATE_FLOOR, TOOL_XYZ

LEAST_MOTION = 0.05  # of a full action; a leader that lies still gives its encoder's jitter, 0.02
START_TOLERANCE = 0.02  # m per axis; the starts are drawn within 0.01 of home
START_SPREAD = 2.0  # times as far away as half of the starts are; of those drawn evenly the furthest is 1.4
AT_BOUND = 0.999  # of a full action
CLIPPED_SHARE = 0.9  # of an episode's rows with one axis at its bound; the simulated hand's most is 0.57
LATE = 1.5  # periods; a tick that took longer missed its turn
SLOW = 1.1  # times as long as its rows should take; velocities and reach of an action are then others
ANGLE_LIMIT = 2 * np.pi  # rad; no joint turns further from its zero
FOREIGN_LIMIT = 10.0  # of a state whose entries are not known: radians, metres and rad/s stay below, degrees do not
TICKS_FROM = 400.0  # degrees end before it
OPENING_SLACK = 0.1  # beyond 0 .. 1, where the calibration's sweep did not quite reach the ends
POSE_OFF_M, POSE_OFF_RAD = 0.01, np.deg2rad(5)
SERVO_SPEED = 6.0  # rad/s; the servos' best is 4.5, the simulated hand's 2.5
TOOL_SPEED = 1.5 * np.sqrt(3)  # full actions a tick; an arm that catches up stays under it (0.8)
LEASH = 0.03  # m that a tool may be from where its actions would have it (0.023)
DRAGGED = 0.03  # m beyond the leash, in one go, that no action asked for (0.004)
ASKED_M, FOLLOWED_M = 0.06, 0.01  # actions that ask for as much, and a tool that moves less than that
# Of the way that actions ask for, half of the episodes' tools go more: 0.79 to 0.84 in five simulated recordings, 0.40
# to 0.42 were the scale half of what it says. Of all episodes together it was 0.54 to 0.75: a few push at an edge.
REACHED = 0.55
OPENING_STEP = 0.05  # of the gripper in a tick that counts as opening or closing (61 of 61 as its action says)
OPENING_MOVED = 0.1  # of the gripper in an episode, which takes an action
LOCKED_STD = np.deg2rad(1)
SAME_GREY, SAME_PART = 24, 1e-3  # of 255; an encoder changes no pixel of a still by more than 15, a moving arm by 111
STILL_ARM = 0.05  # rad; an arm that moves less may well see the same
LOOKED_AT = 60  # pixels of a frame's shorter side
LIGHT_OFF = 0.25  # of the usual light; the simulation varies it by 0.2 from episode to episode
LIGHT_CHANGE = 0.4  # of an episode's first frames' light; as the view changes, so does it (0.1)
MEAN_OFF = 5.0  # of 255, a video's mean from the one kept of it: other pixels, and an encoder (1.8)
LIGHT_TREND, LIGHT_RANGE, LIGHT_EPISODES = 0.8, 0.1, 10  # correlation with the order, change in all, from so many on
SHARED_ROWS, SHARED_PART = 5, 0.2  # rows that two episodes may have in common are fewer
LAG_ROWS = 50  # of motion, to tell which came first, action or motion
CONVERT = "`python -m so101.tools.edit convert` maps it, once it is said how they count"
LEAVE_OUT = "leave it out with `python label.py DATASET --set EPISODE=skip`"

POSITIONS, VELOCITIES, TOOL_POSE = slice(0, 6), slice(6, 12), slice(12, 18)
ARM = slice(0, 5)
# Entries that any task moves by more than their floor. The wrist may be locked, and straight down has one attitude.
MOVING = [*range(3), OPENING, *range(TOOL_XYZ.start, TOOL_XYZ.stop)]
NEED_SCHEMA = "units by joint, tool pose, start pose, reset motion, jumps, gripper, locked joints, order of rows"


@dataclass(frozen=True)
class Finding:
    """Something found. `episode` and `frame` are None where it is of the whole dataset or episode."""

    severity: Literal["error", "warning"]
    check: str
    episode: int | None
    frame: int | None
    message: str

    def __str__(self) -> str:
        place = "" if self.episode is None else f"episode {self.episode}: "
        place = place if self.frame is None else f"episode {self.episode}, frame {self.frame}: "
        return f"{self.severity}: {place}{self.message} [{self.check}]"


class Found(NamedTuple):
    """A finding of an episode, before it says which."""

    severity: Literal["error", "warning"]
    check: str
    frame: int | None
    message: str


@dataclass(frozen=True)
class Robot:
    """What only the robot's side knows."""

    tool_pose: Callable[[np.ndarray], np.ndarray]  # five joints in rad -> x y z in m, roll pitch yaw in rad
    flat_std: float  # grey levels; a picture with less in every colour is black or flat
    max_age: float  # s without a new picture that a recording puts up with
    locked: Sequence[str] = ()  # joints that were to stand still, by name


class Pictures:
    """What the checks need of one camera's frames, taken as they pass by."""

    def __init__(self) -> None:
        self.spread: list[float] = []  # the largest standard deviation of the three colours
        self.light: list[np.ndarray] = []  # (3,) mean of each colour
        self.since: list[int] = []  # the first of the frames, up to this one, that look the same
        self.prints: list[int] = []  # equal for equal pictures
        self._first = np.zeros((0, 3), np.int16)

    def add(self, frame: np.ndarray) -> None:
        """Look at the next frame, (H, W, 3) uint8 RGB, thinned to LOOKED_AT pixels on its shorter side."""
        step = max(1, min(frame.shape[:2]) // LOOKED_AT)
        sample = np.ascontiguousarray(frame[::step, ::step]).reshape(-1, 3)
        mean = sample.mean(axis=0)
        square = np.einsum("ij,ij->j", sample, sample, dtype=np.float64) / len(sample)
        self.spread.append(float(np.sqrt(np.maximum(square - mean**2, 0)).max()))
        self.light.append(mean)
        self.prints.append(zlib.crc32(sample.tobytes()))
        if sample.shape == self._first.shape and (np.abs(sample - self._first) > SAME_GREY).mean() <= SAME_PART:
            self.since.append(self.since[-1])
        else:
            self.since.append(len(self.since))
            self._first = sample.astype(np.int16)


@dataclass
class Rows:
    """One episode's numbers: `states` (n, d) and `times` (n,) have the closing observation too, where it was kept."""

    columns: dict[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray  # (T, d)
    closing: Closing | None
    times: np.ndarray | None  # s
    period: float  # s

    @property
    def steps(self) -> np.ndarray:
        """Seconds from each observation to the next, (n - 1,); as counted where no clock says it, or a wrong one."""
        steps = np.zeros(0) if self.times is None else np.diff(self.times)
        return steps if steps.size and steps.min() > 0 else np.full(len(self.states) - 1, self.period)


@dataclass
class Compared:
    """What an episode is compared with others by."""

    episode: int
    rows: dict[bytes, int]  # each row's state and action, and where it is
    low: np.ndarray  # of state and action together
    high: np.ndarray
    start: np.ndarray  # (3,) m, where the tool was
    order: np.ndarray  # (3, 3): products of action with the motion before, with and after it; both squared
    way: np.ndarray  # (2,): products of the way that actions ask for with the tool's, and with itself
    light: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (3,) of its first frames
    prints: dict[str, dict[int, int]] = field(default_factory=dict)  # camera -> pictures, and where they are


class Linter:
    """Looks at a dataset's episodes one by one, and then at what they are beside each other."""

    def __init__(self, dataset: Dataset, robot: Robot) -> None:
        self.fps, self.cameras, self.robot = dataset.fps, list(dataset.cameras), robot
        said = dataset.schema or {}
        self.known = [said.get("state"), said.get("action")] == [list(STATE), list(ACTION)]
        self.scale = float(said.get("action_scale_m", np.nan))
        self.kept: dict[int, dict[str, Any]] = {}  # what meta/episodes says of the episodes, where it is to be checked
        self.seen: list[Compared] = []

    def episode(
        self, episode: Episode, label: EpisodeLabel | None = None, pictures: Mapping[str, Pictures] | None = None
    ) -> list[Finding]:
        """What is wrong with one episode; `pictures` of its cameras where its frames have been looked at already."""
        found = []
        try:
            for one in self._episode(episode, label, pictures):
                found.append(one)
        except DataError as error:
            found.append(Found("error", "unreadable", None, f"{error}; restore it, or {LEAVE_OUT}"))
        return [Finding(f.severity, f.check, episode.index, f.frame, f.message) for f in found]

    def _episode(
        self, episode: Episode, label: EpisodeLabel | None, pictures: Mapping[str, Pictures] | None
    ) -> Iterator[Found]:
        rows = read_rows(episode)
        yield from check_times(rows)
        still = episode.task == CORRECTION and episode.length == 1  # a picture and its label: there is no motion in it
        sound = [f for f in check_numbers(rows, self.known) if not (still and f.check == "constant actions")]
        yield from sound
        if not still and not any(f.check in ("not finite", "width") for f in sound):
            if self.known:
                yield from self._robot_checks(rows, label)
            self.seen.append(compared_by(episode.index, rows, self.known))
        if pictures is None:
            pictures = look(episode, rows.closing, self.cameras)
            if not self.known:  # ours may well be a part of its video
                yield from check_lengths(episode)
        for camera, seen in pictures.items():
            faults = list(check_pictures(camera, seen, rows, self.robot, self.known))
            yield from faults
            if not any(found.check in ("flat frames", "light") for found in faults):  # which say it better
                yield from check_mean(camera, seen, len(rows.actions), self.kept.get(episode.index, {}))
            if self.seen and self.seen[-1].episode == episode.index:
                good = [i for i, spread in enumerate(seen.spread) if spread > self.robot.flat_std]
                if good[:1] == [0]:
                    self.seen[-1].light[camera] = np.mean([seen.light[i] for i in good[:3]], axis=0)
                self.seen[-1].prints[camera] = {seen.prints[i]: i for i in reversed(good)}

    def _robot_checks(self, rows: Rows, label: EpisodeLabel | None) -> Iterator[Found]:
        units = list(check_units(rows))
        yield from units
        yield from check_gripper(rows, fails=label is not None and label.all_fail)
        if not units:
            yield from check_pose(rows, self.robot.tool_pose)
            yield from check_motion(rows, self.scale)
            yield from check_locked(rows, self.robot.locked)

    def compared(self) -> list[Finding]:
        """What is wrong with the episodes looked at so far, beside each other."""
        found = [*self._lights(), *twins(self.seen)]
        if self.known:
            found += [*self._starts(), *never_changing(self.seen), *what_follows_actions(self.seen, self.scale)]
        return found

    def _starts(self) -> Iterator[Finding]:
        if len(self.seen) < 3:
            return
        usual = np.median([seen.start for seen in self.seen], axis=0)
        away = [float(np.abs(seen.start - usual).max()) for seen in self.seen]
        spread = float(np.median(away))
        if spread > START_TOLERANCE:
            said = f"half of the episodes start {spread:.3f} m or more from the usual place, {usual.round(3).tolist()}"
            todo = "right where env.random_ee_range_xy or _z is as wide; if not, their homes differ: keep those of one"
            yield Finding("warning", "start pose", None, None, f"{said}; {todo}")
        for seen, off in zip(self.seen, away, strict=True):
            if off > max(START_TOLERANCE, START_SPREAD * spread):
                at = f"starts with the tool at {seen.start.round(3).tolist()} m, {off:.3f} m from where most do"
                said = f"{at}, {usual.round(3).tolist()}; record it again from the same home, or {LEAVE_OUT}"
                yield Finding("warning", "start pose", seen.episode, 0, said)

    def _lights(self) -> Iterator[Finding]:
        for camera in self.cameras:
            lit = [seen for seen in self.seen if camera in seen.light]
            if len(lit) < 3:
                continue
            light = np.array([seen.light[camera] for seen in lit])  # (episodes, 3)
            usual = np.maximum(np.median(light, axis=0), 1.0)
            for seen, off in zip(lit, np.abs(light / usual - 1).max(axis=1), strict=True):
                if off > LIGHT_OFF:
                    said = f"camera {camera}: its light is {off:.0%} off the usual; keep lamp and blinds as they were"
                    yield Finding("warning", "light", seen.episode, 0, f"{said}, or {LEAVE_OUT}")
            yield from self._drift(camera, lit, light / usual)

    def _drift(self, camera: str, lit: list[Compared], light: np.ndarray) -> Iterator[Finding]:
        """Light that goes one way over the recording: the policy learned in the morning meets the afternoon."""
        if len(lit) < LIGHT_EPISODES:
            return
        place = np.linspace(-0.5, 0.5, len(lit))
        for colour, values in zip(("red", "green", "blue"), light.T, strict=True):
            change = float(place @ values / (place @ place))  # of a fitted line, from the first to the last
            if abs(change) > LIGHT_RANGE and abs(np.corrcoef(place, values)[0, 1]) > LIGHT_TREND:
                said = f"camera {camera}: {colour} changes by {change:+.0%} from the first episode to this last one"
                todo = "record under one light, or as much under each"
                yield Finding("warning", "light drift", lit[-1].episode, 0, f"{said}; {todo}")
                return


def lint(
    dataset: Dataset,
    robot: Robot,
    split: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Finding]:
    """Everything found in a dataset and its label file; `split`: a classifier's "train" and "held_out" episodes."""
    findings = [Finding("warning", "repaired", None, None, note) for note in dataset.notes]
    labels: Labels | None = None
    try:
        labels = load_labels(dataset.folder, dataset.observations)
    except DataError as error:
        return [*findings, Finding("error", "labels", None, None, f"{error}; correct the file, or label anew")]
    linter = Linter(dataset, robot)
    if linter.known and dataset.version.startswith("v3."):
        linter.kept = {row["episode_index"]: row for row in episode_rows(dataset.folder, with_stats=True)}
    counts, said_otherwise = Counter[bool](), []
    for done, episode in enumerate(dataset.episodes, 1):
        label = labels.episodes.get(episode.index) if labels is not None else None
        if label is None or not label.skip:
            findings += linter.episode(episode, label)
        if label is not None and not label.skip:
            success = label.success(episode.observations)
            counts.update(success.tolist())
            said_otherwise += reward_says_otherwise(episode, success, ours=dataset.schema is not None)
        progress(done)
    findings += linter.compared()
    findings += check_labels(dataset, labels, counts, said_otherwise)
    for both in sorted(set((split or {}).get("train", [])) & set((split or {}).get("held_out", []))):
        said = "the classifier was trained on it and judged on it; train the classifier again"
        findings.append(Finding("error", "split", both, None, said))
    return findings + list(not_checked(dataset, linter.known))


def unmoved(actions: np.ndarray) -> bool:
    """Whether actions (T, 3 or more), zero or otherwise all alike, move the tool nowhere."""
    return bool(np.ptp(actions, axis=0)[:3].max() < LEAST_MOTION)


def read_rows(episode: Episode) -> Rows:
    """An episode's numbers. Raises DataError where they are damaged, or no state or action is among them."""
    columns, closing = episode.columns(), episode.closing()
    vectors = []
    for name in ("observation.state", "action"):
        if name not in columns:
            raise DataError(f"{episode.data}: has no column {name}")
        vectors.append(columns[name].reshape(episode.length, -1).astype(float))
    states, actions = vectors
    times = columns.get("capture_time")
    if closing is not None:
        if closing.state.shape != states.shape[1:]:
            entries = f"a state of {closing.state.size} entries, {states.shape[1]} in the rows"
            raise DataError(f"{episode.closing_path}: {entries}")
        states = np.vstack([states, closing.state])
        times = None if times is None else np.append(times, closing.capture_time)
    return Rows(columns, states, actions, closing, times, 1 / episode.fps)


def look(episode: Episode, closing: Closing | None, cameras: Sequence[str]) -> dict[str, Pictures]:
    """Read each of an episode's frames once. Raises DataError where one cannot be read."""
    seen = {camera: Pictures() for camera in cameras}
    for camera in cameras:
        for frame in episode.frames(camera):
            seen[camera].add(frame)
        if closing is not None:
            seen[camera].add(closing.frames[camera])
    return seen


def check_times(rows: Rows) -> Iterator[Found]:
    """Rows in order, one a period."""
    number, stamps = rows.columns.get("frame_index"), rows.columns.get("timestamp")
    if number is not None and (wrong := np.flatnonzero(number != np.arange(len(number)))).size:
        said = f"row {wrong[0]} has frame_index {number[wrong[0]]}; rows were lost or moved"
        yield Found("error", "time", int(wrong[0]), f"{said}; {LEAVE_OUT}")
    for name, values in (("timestamp", stamps), ("capture_time", rows.times)):
        if values is not None and (back := np.flatnonzero(~(np.diff(values) > 0))).size:
            said = f"{name} goes from {values[back[0]]:.3f} to {values[back[0] + 1]:.3f} s"
            yield Found("error", "time", int(back[0]) + 1, f"{said}; rows are out of order: {LEAVE_OUT}")
            return
    if rows.times is None or len(rows.times) < 2:
        return
    steps = rows.steps / rows.period
    late = np.flatnonzero(steps > LATE)
    slow = steps.mean()
    if late.size or slow > SLOW:
        worst = int(steps.argmax())
        ticks = f"{late.size} of {len(steps)} ticks took more than {LATE} periods, {slow:.2f} periods each on average"
        said = f"{ticks}, the longest {steps[worst]:.1f}, {steps[worst] * rows.period:.2f} s"
        todo = "look for the cause with `python -m so101.tools.doctor`, or lower env.fps"
        yield Found("warning", "dropped ticks", worst, f"{said}; {todo}")


def check_numbers(rows: Rows, known: bool) -> Iterator[Found]:
    """Values that no state and no action may have."""
    for name, values, names in (("observation.state", rows.states, STATE), ("action", rows.actions, ACTION)):
        if (bad := np.argwhere(~np.isfinite(values))).size:
            frame, entry = map(int, bad[0])
            what = names[entry] if values.shape[1] == len(names) else f"entry {entry}"
            said = f"{name}: {what} is {values[frame, entry]}, no number"
            yield Found("error", "not finite", frame, f"{said}; {LEAVE_OUT}")
            return
    if known and rows.states.shape[1] != len(STATE):
        said = f"a state has {rows.states.shape[1]} entries, its schema names {len(STATE)}"
        yield Found("error", "width", 0, f"{said}; restore meta/info.json or the data file")
        return
    if not known and (high := np.abs(rows.states).max(axis=1)).max() > FOREIGN_LIMIT:
        said = f"a state holds {high.max():.4g}; radians and metres stay small, so these are degrees, percent or ticks"
        yield Found("error", "units", int((high > FOREIGN_LIMIT).argmax()), f"{said}; {CONVERT}")
    yield from check_actions(rows.actions)


def check_actions(actions: np.ndarray) -> Iterator[Found]:
    """Actions of this program: four, in [-1, 1], of a leader that somebody moved."""
    if actions.shape[1] != len(ACTION):
        said = f"an action has {actions.shape[1]} entries, needed are {len(ACTION)}: {', '.join(ACTION)}"
        yield Found("error", "width", 0, f"{said}; record it anew with this program, which has them all")
        return
    if unmoved(actions):
        said = f"its {len(actions)} actions never move the tool: the first is {actions[0].round(3).tolist()}"
        yield Found("error", "constant actions", 0, f"{said}, and all are like it; {LEAVE_OUT}, and record it again")
    beyond = np.abs(actions) > 1 + 1e-6
    if beyond.any():
        frame, entry = map(int, np.argwhere(beyond)[0])
        said = f"{ACTION[entry]} is {actions[frame, entry]:.4g}, outside [-1, 1]"
        if not beyond[:, :3].any() and actions[:, 3].min() >= 0 and actions[:, 3].max() <= 2:
            said += ", as where the gripper was recorded in [0, 2]"
        yield Found("error", "action range", frame, f"{said}; {CONVERT}")
    at_bound = np.abs(actions[:, :3]) >= AT_BOUND
    axis = int(at_bound.mean(axis=0).argmax())
    share = at_bound[:, axis].mean()
    if share > CLIPPED_SHARE and not unmoved(actions):
        said = f"{ACTION[axis]} is at its bound in {share:.0%} of the rows, so how far the hand went is lost"
        frame = int(at_bound[:, axis].argmax())
        yield Found("warning", "clipped actions", frame, f"{said}; move the leader more slowly, and in all directions")


def check_units(rows: Rows) -> Iterator[Found]:
    """Joints in radians, the gripper as an opening."""
    arm, opening = np.abs(rows.states[:, ARM]), rows.states[:, OPENING]
    if arm.max() > ANGLE_LIMIT:
        frame, joint = map(int, np.argwhere(arm > ANGLE_LIMIT)[0])
        unit = "ticks" if arm.max() > TICKS_FROM else "degrees"
        said = f"{ARM_JOINTS[joint]} is at {rows.states[frame, joint]:.4g}, in {unit}, not in radians"
        yield Found("error", "units", frame, f"{said}; {CONVERT}")
    wrong = (opening < -OPENING_SLACK) | (opening > 1 + OPENING_SLACK)
    if wrong.any():
        frame = int(wrong.argmax())
        said = f"the gripper's opening is {opening[frame]:.4g}, must be 0 closed .. 1 open"
        yield Found("error", "units", frame, f"{said}; {CONVERT}")


def check_pose(rows: Rows, tool_pose: Callable[[np.ndarray], np.ndarray]) -> Iterator[Found]:
    """The stored tool pose is that of the stored joints."""
    ought = np.array([tool_pose(joints) for joints in rows.states[:, ARM]])  # (n, 6)
    off = rows.states[:, TOOL_POSE] - ought
    away = np.linalg.norm(off[:, :3], axis=1)
    turned = np.abs((off[:, 3:] + np.pi) % (2 * np.pi) - np.pi).max(axis=1)
    wrong = (away > POSE_OFF_M) | (turned > POSE_OFF_RAD)
    if wrong.any():
        said = (
            f"the tool is said to be up to {away.max():.3f} m and {np.rad2deg(turned.max()):.0f} degrees from where "
            f"its own joints put it, in {wrong.sum()} of {len(wrong)} observations: another zero of the joints, or "
            "another frame of the tool"
        )
        yield Found("error", "tool pose", int(wrong.argmax()), f"{said}; {CONVERT}")


def check_gripper(rows: Rows, fails: bool) -> Iterator[Found]:
    """The gripper moves, and as its action says. In a failure it need not move."""
    opening, action = rows.states[:, OPENING], rows.actions[:, 3]
    if not fails and np.ptp(opening) < STATE_FLOOR[OPENING]:
        said = f"the gripper stays at {opening[0]:.2f}, its action is from {action.min():.2f} to {action.max():.2f}"
        yield Found("warning", "gripper", 0, f"{said}; if the task needs it, {LEAVE_OUT}, and record it again")
    if np.ptp(opening) > OPENING_MOVED and np.abs(action).max() < LEAST_MOTION:
        said = f"the gripper moves by {np.ptp(opening):.2f}, and no action asks for it, so nobody learns to"
        frame = int(np.abs(np.diff(opening)).argmax())
        yield Found("error", "gripper", frame, f"{said}; {LEAVE_OUT}, and look at what the leader's gripper gives")
    change = np.diff(opening)[: len(action)]
    moved = np.abs(change) > OPENING_STEP
    against = moved & (change * action[: len(change)] < 0)
    if against.sum() > max(1, moved.sum() / 2):
        said = f"in {against.sum()} of {moved.sum()} ticks in which the gripper moves, its action says the other way"
        yield Found("error", "gripper", int(against.argmax()), f"{said}; {CONVERT}")


def check_motion(rows: Rows, scale: float) -> Iterator[Found]:
    """The tool goes where the actions take it, and nowhere by itself, as in a reset's motion at an episode's end.

    `scale`: metres of a full action. Actions are added up as env.py does, on a leash to the measured tool, so that
    a target that ran into the table or the workspace's wall counts for nothing.
    """
    if len(rows.states) < 2:
        return
    ticks = rows.steps
    speed = np.abs(np.diff(rows.states[:, ARM], axis=0)) / ticks[:, None]
    if speed.max() > SERVO_SPEED:
        frame, joint = map(int, np.unravel_index(speed.argmax(), speed.shape))
        said = f"{ARM_JOINTS[joint]} goes at {speed.max():.1f} rad/s to the next row, which no servo does"
        yield Found("error", "jump", frame, f"{said}: two takes in one, or a turn counted twice; {LEAVE_OUT}")
        return
    tool, actions = rows.states[:, TOOL_XYZ], rows.actions[:, :3] * scale
    asked, went = np.ptp(np.cumsum(actions, axis=0), axis=0).max(), np.ptp(tool, axis=0).max()
    if asked > ASKED_M and went < FOLLOWED_M:
        said = f"the actions ask for {asked:.2f} m, and the tool moves {went:.3f} m: its servos did not answer or move"
        yield Found("error", "not followed", 0, f"{said}; {LEAVE_OUT}")
        return
    motion = np.linalg.norm(np.diff(tool, axis=0), axis=1) / (ticks / rows.period)
    begun, dragged, way = _dragged(tool, actions)
    if dragged > DRAGGED:
        said = f"from here on the tool moves {way:.2f} m that no action asks for, as in a reset"
        todo = "cut it off with `python -m so101.tools.edit trim`; if all are so, action_scale or frame is wrong"
        yield Found("error", "reset motion", begun, f"{said}; {todo}")
    elif motion.max() > TOOL_SPEED * scale:
        said = f"the tool moves {motion.max():.3f} m in a tick, more than actions can ask for, as in a reset"
        yield Found("error", "reset motion", int(motion.argmax()), f"{said}; {LEAVE_OUT}")


def _dragged(tool: np.ndarray, actions: np.ndarray) -> tuple[int, float, float]:
    """Where the tool (n, 3) begins to go furthest by itself, how far beyond the leash, and how far in all, in m."""
    target, worst, run, begun = tool[0], (0, 0.0, 0.0), 0.0, 0
    for t in range(1, len(tool)):
        target = _leashed(target + actions[t - 1], tool[t - 1]) if t <= len(actions) else target
        pulled = _leashed(target, tool[t])
        beyond = float(np.linalg.norm(target - pulled))
        if beyond == 0:
            run = 0.0
        else:
            if run == 0:  # it began where the tool was last at the target or on its way there
                begun = t - 1
                while begun > 0 and np.linalg.norm(tool[begun - 1] - target) < np.linalg.norm(tool[begun] - target):
                    begun -= 1
            run += beyond
            if run > worst[1]:
                worst = (begun, run, float(np.linalg.norm(tool[t] - tool[begun])))
        target = pulled
    return worst


def _leashed(target: np.ndarray, tool: np.ndarray) -> np.ndarray:
    ahead = target - tool
    distance = float(np.linalg.norm(ahead))
    return target if distance <= LEASH else tool + ahead * (LEASH / distance)


def check_locked(rows: Rows, locked: Sequence[str]) -> Iterator[Found]:
    """Joints that were to stand still do."""
    for name in locked:
        values = rows.states[:, JOINTS.index(name)]
        if values.std() > LOCKED_STD:
            said = f"{name} was locked, and moves by {np.rad2deg(np.ptp(values)):.1f} degrees"
            frame = int(np.abs(values - values[0]).argmax())
            yield Found("error", "locked joints", frame, f"{said}; {LEAVE_OUT}, and record it again with the lock on")


def check_pictures(camera: str, seen: Pictures, rows: Rows, robot: Robot, known: bool) -> Iterator[Found]:
    """A picture shows something, and another while the arm moves."""
    flat = np.array(seen.spread) <= robot.flat_std
    if flat.any():
        frame = int(flat.argmax())
        said = f"camera {camera}: {flat.sum()} of {len(flat)} frames are black or flat"
        light = f"mean {np.mean(seen.light[frame]):.0f} of 255 here"
        yield Found("error", "flat frames", frame, f"{said}, {light}; look at lens and light, and {LEAVE_OUT}")
    light, lit = np.mean(seen.light, axis=1), np.flatnonzero(~flat)
    off = np.abs(light[lit] / max(light[lit[:3]].mean(), 1.0) - 1) if lit.size else light[lit]
    if (off > LIGHT_CHANGE).any():
        said = f"camera {camera}: from here on its light is up to {off.max():.0%} off that of the first frames"
        todo = f"keep lamp, blinds and exposure as they are, or {LEAVE_OUT}"
        yield Found("warning", "light", int(lit[(off > LIGHT_CHANGE).argmax()]), f"{said}; {todo}")
    since = np.array(seen.since)
    ends = np.append(np.flatnonzero(np.diff(since)), len(since) - 1)
    moves = rows.states[:, ARM] if known else rows.states
    much = np.full(moves.shape[1], STILL_ARM) if known else np.maximum(0.1 * np.ptp(moves, axis=0), 1e-6)
    runs = [(end - since[end], since[end]) for end in ends if not flat[end]]
    runs = [(n, first) for n, first in runs if (np.ptp(moves[first : first + n + 1], axis=0) > much).any()]
    if runs:
        longest, first = max(runs)
        seconds = longest * rows.period
        severity: Literal["error", "warning"] = "error" if seconds >= robot.max_age else "warning"
        said = f"camera {camera}: the picture stands still for {seconds:.1f} s from here, while the arm moves"
        times = f" ({len(runs)} such places)" if len(runs) > 1 else ""
        yield Found(severity, "frozen frames", int(first), f"{said}{times}; look at its cable, and {LEAVE_OUT}")


def check_mean(camera: str, seen: Pictures, rows: int, kept: Mapping[str, Any]) -> Iterator[Found]:
    """A video is the one that was recorded: its mean is what meta/episodes kept of it."""
    mean, stored = np.mean(seen.light[:rows], axis=0), np.array(kept.get(f"stats/{IMAGES}{camera}/mean"), float) * 255
    if stored.size == 3 and (off := float(np.abs(mean - stored.ravel()).max())) > MEAN_OFF:
        said = f"camera {camera}: its frames' mean is {off:.0f} of 255 off the one that was recorded with them"
        yield Found("error", "other frames", 0, f"{said}: the video is another's; put its own back, or {LEAVE_OUT}")


def check_lengths(episode: Episode) -> Iterator[Found]:
    """A video of this episode alone has a frame for each row; one that has fewer cannot be read to its end."""
    for camera, (path, first) in episode.videos.items():
        count = count_frames(path) if episode.alone and first == 0 else episode.length
        if count > episode.length:
            said = f"camera {camera}: the video has {count} frames for {episode.length} rows; the first ones are taken"
            yield Found("warning", "frame count", episode.length, f"{said}: see whether they fit, or {LEAVE_OUT}")


def compared_by(index: int, rows: Rows, known: bool) -> Compared:
    """What other episodes are held against."""
    both = np.hstack([rows.states[: len(rows.actions)], rows.actions])
    places = {row.tobytes(): place for place, row in reversed(list(enumerate(both)))}
    order, way = np.zeros((3, 3)), np.zeros(2)
    if known:
        motion = np.diff(rows.states[:, TOOL_XYZ], axis=0)
        for which, shift in enumerate((-1, 0, 1)):
            t = np.arange(max(0, -shift), min(len(rows.actions), len(motion) - shift))
            action, moved = rows.actions[t, :3], motion[t + shift]
            order[which] = (action * moved).sum(), (action**2).sum(), (moved**2).sum()
        asked, went = np.cumsum(rows.actions[: len(motion), :3], axis=0), np.cumsum(motion, axis=0)
        way[:] = [((asked - asked.mean(axis=0)) * other).sum() for other in (went, asked)]
    start = rows.states[0, TOOL_XYZ] if known else np.full(3, np.nan)
    return Compared(index, places, both.min(axis=0), both.max(axis=0), start, order, way)


def twins(episodes: Sequence[Compared]) -> Iterator[Finding]:
    """Episodes that share rows or pictures: one of them in training gives the other, held out, away."""
    kinds: list[tuple[str, list[Mapping[bytes, int] | Mapping[int, int]]]]
    kinds = [("rows", [seen.rows for seen in episodes])]
    for camera in dict.fromkeys(camera for seen in episodes for camera in seen.prints):
        kinds.append((f"pictures of camera {camera}", [seen.prints.get(camera, {}) for seen in episodes]))
    told = set()
    for kind, held in kinds:
        first: dict[bytes | int, int] = {}  # where each was met first
        for seen, places in zip(episodes, held, strict=True):
            others = Counter(first[key] for key in places if key in first)
            other, shared = others.most_common(1)[0] if others else (0, 0)
            if shared >= max(min(SHARED_ROWS, len(places)), SHARED_PART * len(places)) and shared:
                frame = min(place for key, place in places.items() if first.get(key) == other)
                said = f"{shared} of its {len(places)} {kind} are those of episode {other}"
                if seen.episode not in told:
                    todo = f"what one is trained on gives the other away: {LEAVE_OUT}"
                    yield Finding("error", "twins", seen.episode, frame, f"{said}; {todo}")
                told.add(seen.episode)
            for key in places:
                first.setdefault(key, seen.episode)


def never_changing(episodes: Sequence[Compared]) -> Iterator[Finding]:
    """Entries of state and action that say nothing: the same in all rows, or within what normalisation blanks out."""
    if not episodes:
        return
    spans = np.max([seen.high for seen in episodes], axis=0) - np.min([seen.low for seen in episodes], axis=0)
    state, action = spans[: len(STATE)], spans[len(STATE) :]
    still = [i for i in MOVING if state[i] < STATE_FLOOR[i]]
    moved = np.max([(seen.high - seen.low)[POSITIONS] for seen in episodes], axis=0) > STATE_FLOOR[POSITIONS]
    still += [i for i in range(VELOCITIES.start, VELOCITIES.stop) if state[i] == 0 and moved[i - VELOCITIES.start]]
    still += [i for i in range(TOOL_XYZ.stop, len(STATE)) if state[i] == 0 and moved[ARM].any()]
    names = [STATE[i] for i in still] + [f"action {ACTION[i]}" for i in range(len(ACTION)) if action[i] == 0]
    if names:
        said = f"{', '.join(names)}: never changes in the whole dataset"
        todo = "a task that does not need it may leave it so; if not, look for a servo that says nothing"
        yield Finding("warning", "min equals max", None, None, f"{said}; {todo}")


def what_follows_actions(episodes: Sequence[Compared], scale: float) -> Iterator[Finding]:
    """An action comes before its motion: a recorder that keeps the observation after it tells of the past.

    And the tool goes about as far as actions of `scale` m ask for.
    """
    rows = sum(len(seen.rows) for seen in episodes)
    if rows < LAG_ROWS:
        return
    product, actions, motions = np.sum([seen.order for seen in episodes], axis=0).T
    before, during, after = product / np.maximum(np.sqrt(actions * motions), 1e-12)
    if before > max(during, after) + 0.05:
        said = f"actions go with the motion before their row ({before:.2f}), not with the one after ({during:.2f})"
        todo = "each row holds the observation after its action; shift the actions by a row, or record anew"
        yield Finding("error", "order of rows", None, None, f"{said}: {todo}")
    reached = float(np.median([went / max(scale * asked, 1e-12) for went, asked in (seen.way for seen in episodes)]))
    if reached < REACHED:
        said = f"the tool goes {reached:.0%} of the way that actions of {scale:g} m ask for"
        held = "if not, something held the arm, or the edge of the workspace did"
        todo = f"if an old recording was converted, say its recorder's action_scale; {held}"
        yield Finding("warning", "action scale", None, None, f"{said}; {todo}")


class Otherwise(NamedTuple):
    """An episode whose next.reward and label do not agree."""

    episode: int
    frame: int  # the first observation of which they say different things
    shift: int | None  # frames by which the label's success begins later; None where one of them has none


def reward_says_otherwise(episode: Episode, success: np.ndarray, ours: bool) -> list[Otherwise]:
    """Hold an episode's next.reward against its label, `success` of each observation; [] where they agree.

    Here a row's reward is of the observation after it. Other programs also wrote it to the row of the frame itself.
    """
    try:
        reward = episode.columns().get("next.reward")
    except DataError:  # told already
        return []
    paid = np.zeros(0, bool) if reward is None else reward > 0.5
    n = min(len(paid), len(success) - 1)
    differ = np.flatnonzero(paid[:n] != success[1 : n + 1])
    if not differ.size or (not ours and np.array_equal(paid, success[: len(paid)])):
        return []
    shift = int(success.argmax()) - int(paid.argmax()) - ours if paid.any() and success.any() else None
    return [Otherwise(episode.index, int(differ[0]) + 1, shift)]


def check_labels(
    dataset: Dataset, labels: Labels | None, counts: Mapping[bool, int], otherwise: Sequence[Otherwise]
) -> Iterator[Finding]:
    """Every episode labelled, enough success, and next.reward no other truth beside the labels."""
    if labels is None:
        said = "there is no label file, so next.reward is believed where it is there; label with label.py"
        yield Finding("warning", "unlabelled", None, None, said)
        return
    for episode in dataset.episodes:
        if episode.index not in labels.episodes:
            said = "has no label, so nothing learns from it; label it with label.py"
            yield Finding("warning", "unlabelled", episode.index, None, said)
    if counts[True] < WANTED_POSITIVE:
        said = f"{counts[True]} frames of success and {counts[False]} of failure are labelled"
        todo = f"a classifier wants {WANTED_POSITIVE} and two to three times as many: record more"
        yield Finding("warning", "few labels", None, None, f"{said}; {todo}")
    if otherwise:
        first = otherwise[0]
        said = f"next.reward says otherwise than the label from here on, in {len(otherwise)} episodes in all"
        shifts = {each.shift for each in otherwise}
        if len(otherwise) >= 3 and len(shifts) == 1 and (shift := shifts.pop()):
            when = f"{abs(shift)} frame{'s' * (abs(shift) > 1)} {'later' if shift > 0 else 'earlier'}"
            said += f"; each label begins {when}, as where frames counted from 1 are taken for frames from 0"
        todo = "the labels are believed; `python -m so101.tools.edit export` writes them into a copy"
        yield Finding("warning", "reward", first.episode, first.frame, f"{said}; {todo}")


def not_checked(dataset: Dataset, known: bool) -> Iterator[Finding]:
    """What could not be looked at, and why."""
    if not known:
        said = f"this program did not record it, so what its state means is not known; not checked: {NEED_SCHEMA}"
        yield Finding("warning", "not checked", None, None, f"{said}. Convert it with `python -m so101.tools.edit`")
    if "capture_time" not in dataset.features:
        said = "there is no column capture_time, and timestamp is only counted; not checked: dropped ticks"
        yield Finding("warning", "not checked", None, None, said)
    if not dataset.cameras:
        said = f"{Path(dataset.folder).name} has no camera; not checked: frozen and flat frames, light"
        yield Finding("warning", "not checked", None, None, said)
