"""Record demonstrations from the leader arm, with live labels, into a dataset that is never overwritten.

    python record.py                                   the simulated arm and a scripted person
    python record.py --config configs/record_positive.json episodes=30 resume=true
    python record.py resume=true                       go on after an interruption

The leader drives from the first tick. The success key marks where success starts and recording goes on,
so that the classifier sees many positive frames. Each finished episode is on disk before the next begins, and what
is wrong with it (so101/data/lint.py) is said then.
To keep it, do nothing; r drops the take in progress, or during the reset leaves the one before out, and it is
recorded again; p makes the next episode wait.
"""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from so101.config import launch, load, option, require_within, save
from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels, beside, label_episode, labels_path, load_labels
from so101.data.lint import Finding, Linter, Pictures, unmoved
from so101.data.video import CODEC_HELP, Codec, require_codec
from so101.data.writer import DatasetWriter
from so101.env import Env, EnvConfig, Observation
from so101.errors import ConfigError, DataError, EpisodeAborted
from so101.reports.dataset import write_dataset_report
from so101.rig import RigConfig, describe_task, open_rig
from so101.robot.sound import Cue
from so101.robot.teleop import DEMONSTRATE, DEMONSTRATE_FAILURE, NOTHING_HELD, RECORDING
from so101.runlog import Progress
from so101.schema import ACTION, Preprocess, RewardSpec
from so101.tools.lint import ROBOT, shortened
from so101.web.live_page import live_page

# Nothing that is on the disk is taken back: the label leaves it out.
FAULTY = Cue("fault", "episode {} is faulty: press r in the reset to leave it out, or skip it in label.py", (880, 220))


@dataclass
class Config:
    """Recording demonstrations."""

    dataset: str = option("outputs/lift_demos", "folder of the dataset; must not exist unless resume=true")
    task: str = option("lift the cube", "the task in words, stored with each episode")
    episodes: int = option(70, "episodes in all, deliberate failures included")
    failures: int | None = option(
        None, "of these, deliberate failures, spread evenly; the classifier needs them; null: 12 in 70"
    )
    steps_after_success: int | None = option(12, "steps recorded after the success key; null: until time is up")
    resume: bool = option(False, "append to a dataset that is there, up to `episodes` in all")
    seed: int = option(0, "seed of the simulated world and of the random start poses")
    page: bool = option(False, "show it live in the browser, on this machine alone, and act from there")
    page_port: int = option(0, "port of the page; 0: any that is free")
    codec: Codec = option("h264", CODEC_HELP)
    rig: RigConfig = option(RigConfig(), "arms, cameras, person")
    env: EnvConfig = option(EnvConfig(), "the task's geometry and timing")
    preprocess: Preprocess = option(Preprocess(), "what the networks will see of a frame; recorded frames stay native")

    def __post_init__(self) -> None:
        if self.failures is None:
            self.failures = self.episodes * 12 // 70
        require_codec(self.codec)
        require_within(self, episodes=(1, 1_000_000), failures=(0, self.episodes), seed=(0, 2**31))
        if self.steps_after_success is not None:
            require_within(self, steps_after_success=(1, 1_000_000))
        if self.rig.leader is None and not self.page:
            raise ConfigError("rig.leader: got null; recording needs a leader arm, or page=true to drive from there")


def is_failure(index: int, config: Config) -> bool:
    """Whether episode `index` is to be a deliberate failure; they are spread evenly over the recording."""
    return (index + 1) * config.failures // config.episodes > index * config.failures // config.episodes


def unfinished(folder: Path) -> "Config | None":
    """The config of a recording of `folder` that was begun and not ended; None where there is no such thing."""
    begun = config_path(folder)
    if not begun.exists():
        return None
    config = load(Config, begun)
    had = len(open_dataset(folder).episodes) if folder.exists() else 0
    return replace(config, resume=folder.exists()) if had < config.episodes else None


def config_path(folder: Path) -> Path:
    """Where the config of a recording lies."""
    return beside(folder, "record.json")


def main(config: Config) -> None:
    """Record until the dataset holds `config.episodes` episodes."""
    began, folder = time.time(), Path(config.dataset)
    had, labels = what_is_there(folder, config.resume)
    left_out = sum(label.skip for label in labels.episodes.values())
    if had - left_out >= config.episodes:
        print(f"{folder}: holds {had - left_out} episodes already")
        return
    seed = config.seed + 1_000_003 * had  # a resumed recording draws fresh scenes, not its first ones again
    schema = describe_task(config.rig, config.env, config.preprocess)
    with ExitStack() as stack:
        page = stack.enter_context(live_page(config.page, config.page_port, "record"))
        rig = stack.enter_context(open_rig(config.rig, seed, page, beside(folder, "flight")))
        env = rig.make_env(config.env, config.preprocess, RewardSpec(), seed, success_ends=False)
        folder.parent.mkdir(parents=True, exist_ok=True)
        writer = DatasetWriter(
            folder, fps=config.env.fps, cameras=config.rig.frame_sizes, task=config.task, schema=schema,
            codec=config.codec, may_wait=config.rig.simulated,
        )  # fmt: skip
        stack.enter_context(closing(writer))
        save(config, config_path(folder))  # not before the writer has agreed to it
        labels = label_the_last(folder, labels)
        linter = Linter(open_dataset(folder), replace(ROBOT, locked=tuple(config.env.locked_joints)))
        progress = stack.enter_context(Progress("record", config.episodes, "episode", page))
        findings: list[Finding] = []
        kept, aborts = False, 0  # whether the last episode is on disk; how many failed since one was
        while (number := writer.episodes - left_out) < config.episodes:
            failing = is_failure(number, config)
            rig.teleop.hear(DEMONSTRATE_FAILURE if failing else DEMONSTRATE)
            try:
                observation, pressed = env.reset(person_drives=True)
                dropped = kept and judge_the_last(pressed, folder, writer.episodes - 1)
                kept = False
                if "quit" in pressed:
                    break
                if dropped:  # what comes next may be another kind of episode
                    left_out += 1
                    continue
                rig.teleop.hear(RECORDING.about(f"{writer.episodes}{', a failure' * failing}"))
                pictures = {camera: Pictures() for camera in config.rig.cameras}
                label, kept, quits = record_episode(env, writer, config, observation, pictures)
            except EpisodeAborted as error:
                writer.discard_episode()
                aborts = rig.teleop.drop(error, aborts)
                continue
            aborts = 0
            if kept:
                label = label or (EpisodeLabel(all_fail=True) if failing else None)
                labels = label_episode(folder, writer.episodes - 1, label)
                findings += (new := lint_the_last(linter, folder, label, pictures))
                if any(found.severity == "error" for found in new):
                    rig.teleop.hear(FAULTY.about(writer.episodes - 1))
            if quits:
                break
            successes = sum(not (label.all_fail or label.skip) for label in labels.episodes.values())
            progress.update(writer.episodes - left_out, success=successes)
    if writer.episodes:
        write_dataset_report(folder, "record.py", began, config, findings)
    print(f"{folder}: {writer.episodes} episodes" + (f"; labels in {labels_path(folder)}" if writer.episodes else ""))
    if env.rate.overruns:
        print(f"{env.rate.overruns} ticks came late; `python -m so101.tools.doctor` looks for the cause")


def what_is_there(folder: Path, resume: bool) -> tuple[int, Labels]:
    """How many episodes a dataset has, and its labels. DataError where `resume` is not what it asks for."""
    if resume and not folder.exists():
        said = "is not there, so there is nothing to resume"
        raise DataError(f"{folder}: {said}; name the dataset that is meant, or begin this one with resume=false")
    there = open_dataset(folder).observations if folder.exists() else []
    if there and not resume:
        raise DataError(f"{folder}: exists with {len(there)} episodes; name another, or add to it with resume=true")
    return len(there), load_labels(folder, there) or Labels(folder.name)


def label_the_last(folder: Path, labels: Labels) -> Labels:
    """A kill may have come between the last episode and its label; its own rows hold the verdict."""
    episodes = open_dataset(folder).episodes
    if not episodes or episodes[-1].index in labels.episodes:
        return labels
    last, columns, label = episodes[-1].index, episodes[-1].columns(), None
    if columns["next.reward"].any():
        label = EpisodeLabel(success_start=int(columns["next.reward"].argmax()) + 1)
    elif columns["next.done"][-1]:
        label = EpisodeLabel(all_fail=True)
    if label is not None:
        print(f"episode {last}: had no label; {label}, as it was recorded")
    return label_episode(folder, last, label)


def lint_the_last(
    linter: Linter, folder: Path, label: EpisodeLabel | None, pictures: dict[str, Pictures]
) -> list[Finding]:
    """Say what is wrong with the episode just saved, while the person still knows why. No frame is read again."""
    episode = open_dataset(folder).episodes[-1]
    findings = linter.episode(episode, label, pictures)
    findings += [found for found in linter.compared() if found.episode == episode.index]
    for line in shortened(findings):
        print(line)
    return findings


def judge_the_last(pressed: frozenset[str], folder: Path, last: int) -> bool:
    """Keys pressed while the arm resets speak of the episode before: how it ended, or that it is left out (True)."""
    if not pressed & {"success", "failure", "redo"}:
        return False
    dataset = open_dataset(folder)
    labels = load_labels(folder, dataset.observations)
    label = labels.episodes.get(last) if labels else None
    if "failure" in pressed:
        label = EpisodeLabel(all_fail=True)
    elif "success" in pressed and (label is None or label.success_start is None):
        label = EpisodeLabel(success_start=dataset.episodes[last].length)  # its closing observation shows it
    if "redo" in pressed:
        label = replace(label or EpisodeLabel(skip=True), skip=True)
    label_episode(folder, last, label)
    print(f"episode {last}: {'left out' if 'redo' in pressed else label}, in {labels_path(folder)}")
    return "redo" in pressed


def record_episode(
    env: Env, writer: DatasetWriter, config: Config, observation: Observation, pictures: dict[str, Pictures]
) -> tuple[EpisodeLabel | None, bool, bool]:
    """Record one episode: its live label (None without a verdict), whether it was kept, whether the person quits.

    `pictures` of each camera see every observation. Raises EpisodeAborted where nobody moved the leader: such actions
    teach to do nothing.
    """
    started = observation.time
    success_from: int | None = None
    steps = 0
    actions = []
    while True:
        step = env.step(np.zeros(len(ACTION)))
        quits = "quit" in step.events
        if "redo" in step.events or (quits and success_from is None):
            writer.discard_episode()
            return None, False, quits
        if "success" in step.events and success_from is None:
            success_from = steps  # the observation that the person saw when pressing the key
        steps += 1
        actions.append(step.action)
        after = None if success_from is None else steps - success_from
        ended = quits or "end" in step.events or (after is not None and after == config.steps_after_success)
        writer.add(
            observation.state, step.action, observation.frames,
            done=step.terminated, truncated=step.truncated or (ended and not step.terminated),
            is_intervention=step.by_human, capture_time=observation.time - started,
        )  # fmt: skip
        see(pictures, observation)
        observation = step.observation
        if ended or step.terminated or step.truncated:
            break
    if unmoved(np.array(actions)):
        if env.teleop.driver == "page":  # who looks away comes back; a leader that says nothing may be broken
            writer.discard_episode()
            env.teleop.pause(NOTHING_HELD)
            return None, False, quits
        raise EpisodeAborted(
            f"its {steps} actions never move the tool; move the leader, and if you did, see with "
            f"`python -m so101.tools.teleoperate` whether it answers"
        )
    if "failure" in step.events:
        success_from = None  # the last word
    see(pictures, observation)
    # The reward of a row is the success of the observation that follows it.
    rewards = np.arange(1, steps + 1) >= (steps + 1 if success_from is None else success_from)
    writer.save_episode(observation.state, observation.frames, observation.time - started, rewards=rewards)
    if success_from is not None:
        return EpisodeLabel(success_start=success_from), True, quits
    return (EpisodeLabel(all_fail=True) if "failure" in step.events else None), True, quits


def see(pictures: dict[str, Pictures], observation: Observation) -> None:
    """Let lint look at an observation's frames as they pass by: 0.3 ms each, reading them again 2 ms."""
    for camera, frame in observation.frames.items():
        pictures[camera].add(frame)


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
