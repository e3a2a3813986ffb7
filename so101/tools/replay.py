"""Replay a recorded episode: its stored actions, one a tick, through the control step and limits of every script.

    python -m so101.tools.replay outputs/lift_demos 3                      the simulated arm
    python -m so101.tools.replay DATASET EPISODE rig=configs/rig.json env=configs/grasp_only.json

The arm lifts, goes slowly to where the recording starts, and then does what was commanded; the leader is not used.
At the end it says how far the tool was from the recorded one. q or Ctrl-C ends it and leaves the arm safe.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from so101.config import launch, option, require_within
from so101.data.dataset import Dataset, open_dataset
from so101.data.lint import START_TOLERANCE
from so101.env import HOME_TILT, Env, EnvConfig
from so101.errors import ConfigError, DataError
from so101.rig import TOOL_FLIGHTS, RigConfig, describe_task, open_rig
from so101.robot.kinematics import TIP_BELOW_TOOL
from so101.runlog import Progress
from so101.schema import ACTION, OPENING, STATE, TOOL_XYZ, Preprocess, RewardSpec, require_same

OPENING_TOLERANCE = 0.1
TURNED = slice(STATE.index("tool.roll"), STATE.index("tool.yaw") + 1)
MEANING = ("state", "action", "units")  # cameras and crop move nothing
SCALES = ("action_scale_m", "gripper_step", "fps")  # of the config; `convert` changes none of them


@dataclass
class Config:
    """What the command line can set."""

    dataset: str = option(help="folder of the dataset", positional=True)
    episode: int = option(help="the episode's number, from 0", positional=True)
    seed: int = option(0, "seed of the simulated world; with the recording's own, episode 0 meets its own cube")
    rig: RigConfig = option(RigConfig(), "the arm and its cameras; the leader stays where it is")
    env: EnvConfig = option(EnvConfig(), "the limits; scales and fps must be the recording's")
    preprocess: Preprocess = option(Preprocess(), "as in a recording, so that a tick is as long as one of its own")

    def __post_init__(self) -> None:
        require_within(self, episode=(0, 1_000_000), seed=(0, 2**31))


class Recording(NamedTuple):
    """What is replayed, and what it is compared with."""

    name: str
    states: np.ndarray  # (T + 1, 18), or (T, 18) without a closing observation
    actions: np.ndarray  # (T, 4) in [-1, 1]


def main(config: Config) -> None:
    """Check the recording, go to its start, replay it, and say how well it was met."""
    dataset = open_dataset(config.dataset)
    schema = describe_task(config.rig, config.env, config.preprocess)
    recording = read_recording(dataset, config.episode, schema)
    geometry = begin_at(config.env, recording)
    with open_rig(replace(config.rig, leader=None), config.seed, flights=TOOL_FLIGHTS) as rig:
        env = rig.make_env(geometry, config.preprocess, RewardSpec(), config.seed, success_ends=False)
        print(f"{recording.name}: {len(recording.actions)} actions at {geometry.fps:g} Hz; to its start", flush=True)
        observation, pressed = env.reset()
        if "quit" in pressed:
            return
        require_start(observation.state, recording)
        tools, cuts = [observation.state[TOOL_XYZ]], Counter[str]()
        try:
            print("at the start; replaying", flush=True)
            replay(env, recording, tools, cuts)
        finally:
            print(summary(np.array(tools), recording, cuts))


def read_recording(dataset: Dataset, number: int, schema: dict) -> Recording:
    """The episode's states and actions; DataError where this arm cannot do the same with them."""
    name = f"{dataset.folder} episode {number}"
    convert = "`python -m so101.tools.edit convert` makes a copy under this schema"
    if dataset.schema is None:
        raise DataError(f"{dataset.folder}: does not say what its actions mean, so none is replayed; {convert}")
    for keys, todo in ((MEANING, f" {convert}"), (SCALES, "")):
        stored = {key: dataset.schema.get(key) for key in keys}
        try:
            require_same(stored, {key: schema[key] for key in keys}, str(dataset.folder))
        except DataError as error:
            raise DataError(f"{error}{todo}") from None
    found = next((episode for episode in dataset.episodes if episode.index == number), None)
    if found is None:
        raise DataError(f"{name}: is not there; it has {len(dataset.episodes)} episodes, counted from 0")
    columns = found.columns()
    for key, names in (("action", ACTION), ("observation.state", STATE)):
        shape, wanted = np.shape(columns.get(key, ())), (found.length, len(names))
        if shape != wanted or not np.isfinite(columns[key]).all():
            raise DataError(f"{name}: {key} has shape {shape}, must be {wanted}, all finite; {convert}")
    actions, states = columns["action"], columns["observation.state"]
    if (wrong := np.abs(actions).max(axis=1) > 1).any():
        row = int(wrong.argmax())
        raise DataError(f"{name}: action of step {row}: got {actions[row].tolist()}, must be in [-1, 1]; {convert}")
    closing = found.closing()
    return Recording(name, states if closing is None else np.vstack([states, closing.state]), actions)


def begin_at(config: EnvConfig, recording: Recording) -> EnvConfig:
    """The geometry with the recording's start for its home, and its length; DataError where that is out of bounds."""
    tool = recording.states[0, TOOL_XYZ].astype(float).round(4)  # 0.1 mm, to be read in a sentence
    said = f"{recording.name}: starts with the tool at {tool.tolist()} m"
    if tool[2] < config.table_z + TIP_BELOW_TOOL:
        raise DataError(f"{said}, its fingertips in the table (env.table_z {config.table_z:g}); replay another episode")
    seconds = (len(recording.actions) + 1) / config.fps  # the actions end first: time never runs out
    try:
        return replace(config, home=tool.tolist(), random_ee_reset=False, control_time_s=seconds)
    except ConfigError as error:
        raise DataError(f"{said}, which is refused as a start. {error}") from None


def require_start(state: np.ndarray, recording: Recording) -> None:
    """DataError where the arm (18,) does not stand as it did when the recording began."""
    first = recording.states[0]
    away = float(np.linalg.norm(state[TOOL_XYZ] - first[TOOL_XYZ]))
    turned = float(np.abs(np.angle(np.exp(1j * (state[TURNED] - first[TURNED])))).max())
    if away > START_TOLERANCE or turned > HOME_TILT:
        raise DataError(
            f"{recording.name}: the tool is {1000 * away:.0f} mm and {turned:.2f} rad from its start, at most "
            f"{1000 * START_TOLERANCE:.0f} mm and {HOME_TILT} rad are allowed; look for what holds the arm, "
            f"or replay an episode that starts straight down"
        )
    if abs(state[OPENING] - first[OPENING]) > OPENING_TOLERANCE:
        raise DataError(
            f"{recording.name}: starts with the gripper at {first[OPENING]:.2f}, here it is at {state[OPENING]:.2f}; "
            f"use the env.gripper_range it was recorded with, {OPENING_TOLERANCE} off is allowed"
        )


def replay(env: Env, recording: Recording, tools: list[np.ndarray], cuts: "Counter[str]") -> None:
    """Step through the actions; adds the measured tool (3,) after each to `tools`, and to `cuts` what limited it."""
    with Progress("replay", len(recording.actions), "step") as progress:
        for index, action in enumerate(recording.actions, 1):
            before = env.target
            step = env.step(action)
            cuts.update(limited_by(env, before + env.config.action_scale * step.action[:3], tools[-1]))
            tools.append(step.observation.state[TOOL_XYZ])
            off = deviations(np.array(tools), recording)[-1]
            progress.update(index, off_mm=float(off), lag_mm=1000 * step.lag, late=env.rate.overruns)
            if step.terminated or step.events & {"quit", "end"}:
                return


def limited_by(env: Env, wanted: np.ndarray, tool: np.ndarray) -> list[str]:
    """Which limits kept the target from `wanted` (3,), the tool having been measured at `tool` (3,).

    The gripper's range is none of them: a hand that holds it open or shut asks for more at every step.
    """
    low, high = env.config.box
    limits = {
        "leash": np.linalg.norm(wanted - tool) > env.config.leash,
        "workspace": np.any((wanted < low) | (wanted > high)),
    }
    named = [name for name, cuts in limits.items() if cuts]
    return named or ["joints"] * bool(np.abs(env.target - wanted).max() > 1e-6)


def deviations(tools: np.ndarray, recording: Recording) -> np.ndarray:
    """Distance in mm between each measured tool (n, 3) and the recorded one, as far as that was recorded."""
    recorded = recording.states[: len(tools), TOOL_XYZ]
    return 1000 * np.linalg.norm(tools[: len(recorded)] - recorded, axis=1)


def summary(tools: np.ndarray, recording: Recording, cuts: "Counter[str]") -> str:
    """What came of it, in two lines; `tools` (n + 1, 3) after n actions."""
    off = deviations(tools, recording)
    limits = ", ".join(f"{name} {count}" for name, count in sorted(cuts.items()))
    return (
        f"{len(tools) - 1} of {len(recording.actions)} actions replayed; the tool was {off.mean():.1f} mm from the "
        f"recorded one on average, {off.max():.1f} mm at most, at step {off.argmax()}\n"
        f"steps that a limit cut: {limits or 'none'}"
    )


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
