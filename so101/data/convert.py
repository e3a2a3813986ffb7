"""What old recordings hold, mapped to this program's schema. Each habit of the recorder is said, and none is guessed.

The same numbers mean different things: 0.87 is a gripper's opening, or 50 of 100 taken for degrees and turned into
radians. What the numbers cannot be is refused; which of the rest they are, only who recorded them knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import numpy as np

from so101.config import option
from so101.data.dataset import Closing, Dataset, Episode
from so101.data.edit import Columns
from so101.data.lint import ANGLE_LIMIT, OPENING_SLACK
from so101.errors import ConfigError, DataError
from so101.schema import ARM_JOINTS, JOINTS, STATE

SPAN = {"0..1": 1.0, "0..100": 100.0, "0..1.7453": np.deg2rad(100)}  # of the gripper's position: what 1.0 open is
FEW = 5  # different values of a column are listed, more are told as a range
ROUNDING = 1e-6  # that float32 may be beyond an action's bound; cut off
GRIPPER = len(JOINTS) - 1
INTERVENTION = "complementary_info.is_intervention"

# Joints (5,) in rad and the pose as it was recorded, (6,), or None -> tool x y z in m, and roll, pitch, yaw in rad.
ToolPose = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass
class Habits:
    """How a recorder wrote its rows, and what the numbers in them mean."""

    rows: Literal["before", "after"] | None = option(
        None,
        "a row holds the observation before its action, as here, or the one after it, as the original project wrote; "
        "the last row becomes the closing observation, and what followed it is not known",
    )
    reward: Literal["frame", "next", "none"] | None = option(
        None,
        "next.reward is of the frame of its own row, or of the one after it, as here; with rows=after, whose frame is "
        "the one after, both are the same; none: it is missing, or not believed",
    )
    ends: Literal["terminal", "timeout"] | None = option(
        None,
        "an episode ended for good (no value beyond), or its time was up, as where a recording goes on after success",
    )
    gripper_action: Literal["-1..1", "0..2", "0,1,2", "none"] | None = option(
        None, "-1 closes and 1 opens; 0 closes, 1 stays, 2 opens, with values between or without; none: 3 entries only"
    )
    gripper_position: Literal["0..1", "0..100", "0..1.7453"] | None = option(
        None, "the gripper's position in the state; 0..1.7453 is 0..100 taken for degrees and turned into radians"
    )
    joints: Literal["rad", "deg"] | None = option(None, "unit of the other five positions")
    velocities: Literal["kept", "recomputed"] | None = option(
        None, "recomputed from the positions, as must be where they are missing or their unit changes"
    )
    tool_pose: Literal["kept", "gripperframe", "recomputed"] | None = option(
        None,
        "kept; given in the axes of the original project's gripperframe; or recomputed from the joints, whose zeros "
        "must then be those of so101/robot/kinematics.py",
    )
    intervention: Literal["given", "all", "none"] | None = option(
        None, "rows commanded by a person: by a column, or so"
    )
    action_scale: float | None = option(None, "m that an action of 1 moved the tool; 0.02 in the original project")
    gripper_step: float | None = option(None, "opening that an action of 1 moved the gripper; 0.5 in the original")


def require_said(dataset: Dataset, habits: Habits) -> None:
    """Raise ConfigError where a habit is not said, with the choices and what the data shows, or cannot be."""
    columns = [episode.columns() for episode in dataset.episodes]
    for name in ("action", "observation.state"):
        if any(name not in found for found in columns):
            raise DataError(f"{dataset.folder}: has no column {name}, so it cannot be converted")
        if len({found[name].shape[1:] for found in columns}) > 1:
            raise DataError(f"{dataset.folder}: {name} has more entries in some episodes than in others")
    states = np.concatenate([found["observation.state"] for found in columns])
    actions = np.concatenate([found["action"] for found in columns])
    if states.ndim != 2 or states.shape[1] not in (6, 12, 18):
        raise DataError(
            f"{dataset.folder}: observation.state has shape {states.shape}, must have 6 entries a row (positions), 12 "
            f"(velocities too) or 18 (the tool's pose too)"
        )
    if actions.ndim != 2 or actions.shape[1] not in (3, 4):
        raise DataError(f"{dataset.folder}: action has shape {actions.shape}, must have 3 or 4 entries a row")
    given, paid = (sum(name in found for found in columns) for name in (INTERVENTION, "next.reward"))
    arm = states[:, : len(ARM_JOINTS)]
    seen = {
        "reward": f"{paid} of {len(columns)} episodes have the column next.reward",
        "gripper_action": shown("action[3]", actions[:, 3]) if actions.shape[1] == 4 else "action has 3 entries",
        "gripper_position": shown("observation.state[5]", states[:, GRIPPER]),
        "joints": f"they range from {arm.min():.4g} to {arm.max():.4g}",
        "velocities": f"observation.state has {states.shape[1]} entries",
        "tool_pose": f"observation.state has {states.shape[1]} entries",
        "intervention": f"{given} of {len(columns)} episodes have the column {INTERVENTION}",
    }
    missing = [
        f"  {name}= {_choices(name)}{'; ' * (name in seen)}{seen.get(name, '')}"
        for name in Habits.__dataclass_fields__
        if getattr(habits, name) is None
    ]
    if missing:
        raise ConfigError(
            f"{dataset.folder}: say how it was recorded, none of it is guessed (--help explains each):\n"
            + "\n".join(missing)
        )
    xyz = np.abs(actions[:, :3]).max()
    if not (np.isfinite(states).all() and xyz <= 1 + ROUNDING):  # NaN compares as false
        raise DataError(
            f"{dataset.folder}: states must be finite, and the first three of action in [-1, 1]; they reach {xyz:.4g}"
        )
    wrong = _contradictions(habits, arm, states, actions)
    wrong["intervention"] = habits.intervention == "given" and given < len(columns)
    wrong["reward"] = habits.reward != "none" and paid < len(columns)
    for name in wrong:
        if wrong[name]:
            raise ConfigError(f"{dataset.folder}: {name}={getattr(habits, name)} cannot be: {seen[name]}")
    _require_own(dataset, habits)


def _require_own(dataset: Dataset, habits: Habits) -> None:
    """Raise ConfigError where a recording of this program says of itself that its habits are others."""
    own = dataset.schema or {}
    for name, key, said in (
        ("action_scale", "action_scale_m", habits.action_scale),
        ("gripper_step", "gripper_step", habits.gripper_step),
        ("fps", "fps", dataset.fps),
    ):
        if own.get(key, said) != said:
            raise ConfigError(
                f"{dataset.folder}: {name}={said} cannot be: it was recorded with {own[key]}, and is not scaled anew"
            )
    for name, value in (("rows", "after"), ("reward", "frame")):
        if getattr(habits, name) == value and any(episode.closing_path for episode in dataset.episodes):
            raise ConfigError(f"{dataset.folder}: {name}={value} cannot be: this program recorded it")


def _choices(name: str) -> str:
    choices = get_args(get_args(get_type_hints(Habits)[name])[0])
    return " | ".join(choices) or "a number"


def _contradictions(habits: Habits, arm: np.ndarray, states: np.ndarray, actions: np.ndarray) -> dict[str, bool]:
    """For each habit whether the data, (n, d) states and actions, says that it is another."""
    opening = states[:, GRIPPER] / SPAN[habits.gripper_position or ""]
    in_rad = bool(np.abs(arm).max() <= ANGLE_LIMIT)  # an arm in degrees, at work, has some joint beyond 6
    kept_unit = (habits.joints, habits.gripper_position) == ("rad", "0..1")
    return {
        "gripper_action": not _is_gripper_action(habits.gripper_action or "", actions),
        "gripper_position": not bool(np.all((opening >= -OPENING_SLACK) & (opening <= 1 + OPENING_SLACK))),
        "joints": in_rad != (habits.joints == "rad"),
        "velocities": habits.velocities == "kept" and (states.shape[1] < 12 or not kept_unit),
        "tool_pose": habits.tool_pose != "recomputed" and states.shape[1] < len(STATE),
    }


def _is_gripper_action(habit: str, actions: np.ndarray) -> bool:
    if habit == "none" or actions.shape[1] == 3:
        return habit == "none" and actions.shape[1] == 3
    values = actions[:, 3]
    if habit == "0,1,2":
        return bool(np.isin(values, (0, 1, 2)).all())
    low, high = (-1, 1) if habit == "-1..1" else (0, 2)
    return bool(np.all((values >= low - ROUNDING) & (values <= high + ROUNDING)))


def shown(name: str, values: np.ndarray) -> str:
    """A column in words: its values where they are few, else their range."""
    distinct = np.unique(values)
    if len(distinct) <= FEW:
        return f"{name} takes the values {', '.join(f'{value:.4g}' for value in distinct)}"
    return f"{name} ranges from {distinct[0]:.4g} to {distinct[-1]:.4g}"


def transitions(episode: Episode) -> int:
    """How many rows an episode has here: without a closing observation, its last row becomes that one.

    Raises DataError where none is left.
    """
    if episode.observations < 2:
        raise DataError(f"{episode.data}: episode {episode.index} has one row only, which is no transition")
    return episode.observations - 1


def convert(episode: Episode, habits: Habits, tool_pose: ToolPose) -> tuple[Columns, Closing]:
    """An episode's rows and closing observation in this schema, of habits that `require_said` has found possible."""
    columns, closing, count = episode.columns(), episode.closing(), transitions(episode)
    times = np.asarray(columns.get("capture_time", np.arange(episode.length) / episode.fps), float)
    states = columns["observation.state"]
    if closing is not None:
        states, times = np.vstack([states, closing.state]), np.append(times, closing.capture_time)
    if not (np.diff(times) > 0).all():
        raise DataError(f"{episode.data}: capture_time of episode {episode.index} does not grow from row to row")
    states = convert_states(states, times, habits, tool_pose)
    first = int(habits.rows == "after")  # the row that holds the action taken at observation 0
    rows = slice(first, first + count)
    later = first or int(habits.reward == "frame")
    reward = np.zeros(episode.length, np.float32) if habits.reward == "none" else columns["next.reward"]
    last = np.arange(count) == count - 1
    by_human = (
        columns[INTERVENTION]
        if habits.intervention == "given"
        else np.full(episode.length, habits.intervention == "all")
    )
    frames = {camera: episode.frame(camera, count) for camera in (*episode.videos, *episode.stills)}
    return {
        "observation.state": states[:-1],
        "action": convert_actions(columns["action"][rows], habits),
        "next.reward": reward[later : later + count],
        "next.done": last & (habits.ends == "terminal"),
        "next.truncated": last & (habits.ends == "timeout"),
        INTERVENTION: np.asarray(by_human, bool)[rows],
        "capture_time": times[:-1],
    }, Closing(states[-1], frames, float(times[-1]))


def convert_actions(actions: np.ndarray, habits: Habits) -> np.ndarray:
    """(T, 3 or 4) -> (T, 4) float32 in [-1, 1]."""
    gripper = np.zeros(len(actions)) if habits.gripper_action == "none" else actions[:, 3].astype(float)
    if habits.gripper_action in ("0..2", "0,1,2"):
        gripper = gripper - 1
    return np.column_stack([actions[:, :3], gripper]).clip(-1, 1).astype(np.float32)


def convert_states(states: np.ndarray, times: np.ndarray, habits: Habits, tool_pose: ToolPose) -> np.ndarray:
    """(n, 6, 12 or 18) taken at `times` (n,) s -> (n, 18) float32."""
    positions = states[:, : len(JOINTS)].astype(float)
    if habits.joints == "deg":
        positions[:, :GRIPPER] = np.deg2rad(positions[:, :GRIPPER])
    positions[:, GRIPPER] /= SPAN[habits.gripper_position or ""]
    if habits.velocities == "kept":
        velocities = states[:, 6:12].astype(float)
    else:  # zero at reset, as the environment has it
        velocities = np.zeros_like(positions)
        velocities[1:] = np.diff(positions, axis=0) / np.diff(times)[:, None]
    given = [row.astype(float) for row in states[:, 12:]] if states.shape[1] == len(STATE) else [None] * len(states)
    poses = [tool_pose(joints, pose) for joints, pose in zip(positions[:, :GRIPPER], given, strict=True)]
    return np.column_stack([positions, velocities, np.array(poses)]).astype(np.float32)
