"""Record demonstrations from the leader arm, with live labels, into a dataset that is never overwritten.

    python record.py                                   the simulated arm and a scripted person
    python record.py --config configs/my_rig.json dataset=outputs/cube episodes=25
    python record.py resume=true                       go on after an interruption

The leader drives from the first tick. The success key marks where success starts and recording goes on,
so that the classifier sees many positive frames. Each finished episode is on disk before the next begins.
"""

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so101.config import launch, option, save
from so101.data.dataset import DatasetWriter, open_dataset
from so101.data.labels import EpisodeLabel, Labels, labels_path
from so101.env import Env, EnvConfig
from so101.errors import ConfigError, DataError
from so101.rig import RigConfig, describe_task, open_rig
from so101.robot.teleop import DEMONSTRATE, DEMONSTRATE_FAILURE
from so101.runlog import Progress
from so101.schema import ACTION, Preprocess, RewardSpec


@dataclass
class Config:
    """Recording demonstrations."""

    dataset: str = option("outputs/lift_demos", "folder of the dataset; must not exist unless resume=true")
    task: str = option("lift the cube", "the task in words, stored with each episode")
    episodes: int = option(50, "episodes in all, deliberate failures included")
    failures: int = option(10, "of these, deliberate failures, spread evenly; the classifier needs them")
    steps_after_success: int | None = option(12, "steps recorded after the success key; null: until time is up")
    resume: bool = option(False, "append to a dataset that is there, up to `episodes` in all")
    seed: int = option(0, "seed of the simulated world and of the random start poses")
    rig: RigConfig = option(RigConfig(), "arms, cameras, person")
    env: EnvConfig = option(EnvConfig(), "the task's geometry and timing")
    preprocess: Preprocess = option(Preprocess(), "what the networks will see of a frame; recorded frames stay native")

    def __post_init__(self) -> None:
        if not 0 <= self.failures <= self.episodes:
            raise ConfigError(f"failures: got {self.failures}, must lie within 0 .. episodes ({self.episodes})")
        if self.rig.leader is None:
            raise ConfigError("rig.leader: got null, recording needs a leader arm")


def is_failure(index: int, config: Config) -> bool:
    """Whether episode `index` is to be a deliberate failure; they are spread evenly over the recording."""
    return (index + 1) * config.failures // config.episodes > index * config.failures // config.episodes


def unfinished(config: Config) -> bool:
    """Whether the dataset is missing, or is a recording of this kind that was interrupted."""
    folder = Path(config.dataset)
    if not folder.exists():
        return True
    started = folder.with_name(f"{folder.name}.record.json")
    return started.exists() and len(open_dataset(folder).episodes) < json.loads(started.read_text())["episodes"]


def main(config: Config) -> None:
    """Record until the dataset holds `config.episodes` episodes."""
    folder = Path(config.dataset)
    had = len(open_dataset(folder).episodes) if folder.exists() else 0
    if folder.exists() and not config.resume:
        raise DataError(
            f"{folder}: exists with {had} episodes; name another with dataset=, or add to it with resume=true"
        )
    if had >= config.episodes:
        print(f"{folder}: holds {had} episodes already")
        return
    seed = config.seed + 1_000_003 * had  # a resumed recording draws fresh scenes, not its first ones again
    cameras = config.rig.frame_sizes
    schema = describe_task(config.rig, config.env, config.preprocess)
    with ExitStack() as stack:
        rig = stack.enter_context(open_rig(config.rig, seed))
        env = rig.make_env(config.env, config.preprocess, RewardSpec(), seed, success_ends=False)
        writer = DatasetWriter.open(folder, fps=config.env.fps, cameras=cameras, task=config.task, schema=schema)
        stack.enter_context(closing(writer))
        save(config, folder.with_name(f"{folder.name}.record.json"))
        labels = Labels.load(labels_path(folder)) if labels_path(folder).exists() else Labels(folder.name)
        progress = stack.enter_context(Progress("record", config.episodes, "episode"))
        while writer.episodes < config.episodes:
            rig.teleop.hear(DEMONSTRATE_FAILURE if is_failure(writer.episodes, config) else DEMONSTRATE)
            label, wants_to_quit = record_episode(env, writer, config)
            if wants_to_quit:
                break
            if label is not None:
                labels.set(writer.episodes - 1, label)
                labels.save(labels_path(folder))
            progress.update(writer.episodes, success=sum(not label.all_fail for label in labels.episodes.values()))
    print(f"{folder}: {writer.episodes} episodes; labels in {labels_path(folder)}")


def record_episode(env: Env, writer: DatasetWriter, config: Config) -> tuple[EpisodeLabel | None, bool]:
    """Record one episode; return its live label (None without a verdict) and whether the person quits."""
    observation, _ = env.reset(person_drives=True)
    started = observation.time
    success_from: int | None = None
    steps = 0
    while True:
        step = env.step(np.zeros(len(ACTION)))
        if "redo" in step.events or "quit" in step.events:
            writer.discard_episode()
            return None, "quit" in step.events
        if "success" in step.events and success_from is None:
            success_from = steps  # the observation that the person saw when pressing the key
        steps += 1
        after = None if success_from is None else steps - success_from
        ended = "end" in step.events or (after is not None and after == config.steps_after_success)
        writer.add(
            observation.state, step.action, observation.frames,
            done=step.terminated, truncated=step.truncated or (ended and not step.terminated),
            is_intervention=step.by_human, capture_time=observation.time - started,
        )  # fmt: skip
        observation = step.observation
        if ended or step.terminated or step.truncated:
            break
    # The reward of a row is the success of the observation that follows it.
    rewards = np.arange(1, steps + 1) >= (steps + 1 if success_from is None else success_from)
    writer.save_episode(observation.state, observation.frames, observation.time - started, rewards=rewards)
    if success_from is not None:
        return EpisodeLabel(success_start=success_from), False
    return EpisodeLabel(all_fail=True) if "failure" in step.events else None, False


if __name__ == "__main__":
    raise SystemExit(launch(Config, main, __doc__))
