"""What acts, beside its loop in train_sac.py: the policy's copy, the recorded episodes, what is told to the learner."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.data.dataset import Episode, open_dataset
from so101.data.labels import EpisodeLabel, Labels, label_episode, load_labels
from so101.data.lint import START_TOLERANCE
from so101.data.writer import DatasetWriter
from so101.env import Env, Observation, Step
from so101.episodes import observed_success, trajectories
from so101.errors import ConfigError, DataError, tell
from so101.learn.eyes import Eyes
from so101.learn.link import Corrected, Discarded, Evaluated, Link, Moved, Recorded, Started, Weights
from so101.learn.networks import Policy
from so101.learn.wire import ActorEnd
from so101.runlog import Progress, ProgressScreen, RunLog
from so101.schema import ACTION, TOOL_XYZ, Preprocess, RewardSpec

SAME_ACTION = 1e-3  # largest difference on the fixed observation; two devices round differently, by about 1e-5
LOOK_AGAIN = 0.02  # s of real time between two looks at a learner that is waited for
LEAD, PATIENCE = 20, 10.0  # steps that a simulated arm may be ahead; s without a sign after which it is so anyway


class Actor:
    """Policy, writer of the online episodes, and what the console shows. Made new, or with the episodes there are."""

    def __init__(
        self,
        link: Link | ActorEnd,
        episodes: DatasetWriter,
        log: RunLog,
        policy: Policy,
        eyes: Eyes,
        reward: RewardSpec,
        starts: np.ndarray,
        steps: int,
        seed: int,
        watch: Callable[[], None] | None = None,
        screen: ProgressScreen | None = None,
    ) -> None:
        """`starts` (n, 3) m are where the demonstrations' tool was first, `steps` those of the whole run.

        `watch` sees to the learner's process, where it is ours; `screen` shows what the console does.
        """
        self.link, self.episodes, self.log, self.policy, self.eyes = link, episodes, log, policy.eval(), eyes
        self.reward, self.starts, self._watch = reward, starts, watch
        self.recent: deque[bool] = deque(maxlen=20)  # success of the last episodes
        self.alone: deque[bool] = deque(maxlen=20)  # the same, without help
        recorded = open_dataset(episodes.folder).episodes
        self.steps = sum(episode.length for episode in recorded)
        for episode in recorded[-20:]:
            columns = episode.columns()
            success, helped = columns["next.reward"].max() > 0.5, columns["complementary_info.is_intervention"].any()
            self.recent.append(success)
            self.alone.append(success and not helped)
        self.progress = Progress("train", steps, "step", screen)
        self.rng = np.random.default_rng([seed, self.steps])  # a resumed run explores afresh
        self.noise = torch.Generator().manual_seed(seed + self.steps)
        self.version, self._since, self._began = -1, 0.0, 0.0  # of the weights, when they came, when the episode began
        self._clock = 0.0  # s, real time, when the episode began
        self._alarms = 0  # said so far
        self._ended = False  # whether an episode ended in this process, for a late verdict to correct
        self._taken: list[Step] = []

    def close(self) -> None:
        """Tell the learner, and let go of the files."""
        if self._taken:  # with the updates that the last steps were followed by
            self._show()
        self.progress.close()
        self.link.close()
        self.episodes.close()

    def act(self, observation: Observation) -> np.ndarray:
        """The policy's action (4,), with the newest weights there are; before the first, a random one."""
        if (weights := self.link.take_weights()) is not None:
            self._swap(weights)
        if self.version < 0:
            action = self.rng.uniform(-1, 1, len(ACTION))
            if self.policy.gripper is not None:
                action[-1] = np.round(action[-1])
            return action
        return self.policy.act(self.eyes.look(observation), observation.state, 1.0, self.noise)

    def _swap(self, weights: Weights) -> None:
        """Take over all weights at once. Raises DataError where the policy then acts otherwise than the learner's."""
        self.eyes.require_trunk(weights.trunk_hash)
        self.policy.load_state_dict(weights.tensors)
        self.version, self._since = weights.version, time.monotonic()
        off = float(np.abs(self.policy.probe() - weights.action).max())
        if not off <= SAME_ACTION:
            raise DataError(
                f"weights {weights.version}: on the fixed observation the policy's action is {off:.3g} off the "
                f"learner's; both must run this version of the program: start them again"
            )

    def begin(self, observation: Observation) -> None:
        """An episode begins. Refuses one from where no demonstration did: hours went into a reset at another height."""
        tool = observation.state[TOOL_XYZ]
        outside = np.maximum(self.starts.min(axis=0) - tool, tool - self.starts.max(axis=0))
        if outside.max() > START_TOLERANCE:
            raise ConfigError(
                f"env.home: the episode starts with the tool at {tool.round(3).tolist()} m, the demonstrations at "
                f"{self.starts.mean(axis=0).round(3).tolist()}; more than {START_TOLERANCE} m off. Use their home"
            )
        self._began, self._clock, self._taken = observation.time, time.monotonic(), []
        self.link.send(Started(self.episodes.episodes, self.eyes.see(observation)))

    def record(self, observation: Observation, step: Step, truncated: bool) -> None:
        """Keep one step, on disk first where it ends the episode; then tell the learner."""
        self.episodes.add(
            observation.state, step.action, observation.frames,
            reward=float(step.success), done=step.terminated, truncated=truncated,
            is_intervention=step.by_human, capture_time=observation.time - self._began,
        )  # fmt: skip
        if step.terminated or truncated:
            after = step.observation
            self.episodes.save_episode(after.state, after.frames, after.time - self._began)
        now, seen = time.monotonic(), self.eyes.see(step.observation)
        self.link.send(
            Moved(
                step.action, step.reward, step.success, step.terminated, truncated, step.by_human, seen,
                now - self._clock, self.version, now - self._since, step.lag, step.late,
            )
        )  # fmt: skip
        self._taken.append(step)
        self.steps += 1
        if step.terminated or truncated:
            self._ended = True
            self.recent.append(step.success)
            self.alone.append(step.success and not any(step.by_human for step in self._taken))
        self._show()

    def drop(self) -> None:
        """The episode in progress never was: not on disk, not in replay, and not for a late verdict to correct."""
        self.episodes.discard_episode()
        self.link.send(Discarded())
        self.steps -= len(self._taken)
        self._ended, self._taken = False, []

    def take_verdict(self, pressed: frozenset[str]) -> None:
        """A key pressed while the arm reset corrects the episode just ended, here and in its labels."""
        if "redo" in pressed and self._ended:
            self.progress.say("too late to drop the episode, it has been learned from; s or f say how it ended")
        if not pressed & {"success", "failure"} or not self._ended:
            return
        success, number = "failure" not in pressed, self.episodes.episodes - 1
        self.recent[-1] = success
        length = open_dataset(self.episodes.folder).episodes[number].length
        label = EpisodeLabel(success_start=length) if success else EpisodeLabel(all_fail=True)
        label_episode(self.episodes.folder, number, label)
        self.link.send(Corrected(number, self.reward.of(success), success))
        self.log.event("corrected", episode=number, success=success)

    def evaluated(self, checkpoint: str, results: list[dict[str, Any]]) -> None:
        """Tell how a checkpoint's policy did."""
        successes = sum(result["success"] for result in results)
        steps = float(np.mean([result["steps"] for result in results]))
        self.link.send(Evaluated(checkpoint, successes, len(results), steps))
        self.progress.say(f"checkpoint {checkpoint}: {successes} of {len(results)}, {steps:.1f} steps an episode")

    def find_learner(self) -> None:
        """Return once the learner is there; before anything moves."""
        if not self.link.heard:
            print("waiting for the learner", flush=True)
        while not self.link.heard:
            self._look()

    def wait_for_learner(self, env: Env) -> frozenset[str]:
        """Hold the arm until the learner is heard again, or the person quits; the keys pressed."""
        tell(
            f"the learner has been silent for {self.link.silent:.0f} s; the arm holds until it is back, q ends the run"
        )
        return env.hold(lambda: self._look() < LOOK_AGAIN + 1)

    def keep_pace(self, utd_ratio: float, learning_starts: int) -> None:
        """A simulated arm has time: it waits for a learner that is more than LEAD steps behind."""
        while isinstance(self.link, ActorEnd) and self.steps > learning_starts and self._look(0) < PATIENCE:
            if self.link.status.updates >= utd_ratio * (max(self.steps, self.link.status.steps) - LEAD):
                break
            time.sleep(LOOK_AGAIN)

    def let_catch_up(self) -> None:
        """At the end: give a learner in another process the time to take in the last steps, and say what it made."""
        until = time.monotonic() + PATIENCE
        while isinstance(self.link, ActorEnd) and self.link.status.steps < self.steps and time.monotonic() < until:
            self._look()

    def _look(self, pause: float = LOOK_AGAIN) -> float:
        """See to the learner's process, after a pause of real time; the seconds since it was heard."""
        time.sleep(pause)
        if self._watch is not None:
            self._watch()
        return self.link.silent

    def _show(self) -> None:
        status = self.link.status
        for alarm in status.alarms[self._alarms :]:
            self.progress.say(alarm)
        self._alarms = len(status.alarms)
        self.progress.update(
            self.steps, episode=self.episodes.episodes,
            success=f"{sum(self.recent)}/{len(self.recent)}",
            alone=f"{sum(self.alone)}/{len(self.alone)}", updates=status.updates,
            replay=f"{status.online}+{status.demonstrations}",
        )  # fmt: skip


def recorded_episodes(folder: Path, first: int, spec: Preprocess, reward: RewardSpec) -> Iterator[Recorded]:
    """The online episodes on disk from number `first` on, as the learner is told of them, with a person's verdicts."""
    recorded = open_dataset(folder)
    corrections = load_labels(recorded.folder, recorded.observations) or Labels(recorded.folder.name)
    for episode in recorded.episodes[first:]:
        yield _recorded(episode, corrections if episode.index in corrections.episodes else None, spec, reward)


def _recorded(episode: Episode, corrections: Labels | None, spec: Preprocess, reward: RewardSpec) -> Recorded:
    success = observed_success(episode, corrections)
    if success is None:
        raise DataError(f"{episode.data}: episode {episode.index} is labelled skip; unlabel it")
    path = trajectories([(episode, success)], spec, reward, consecutive=1)[0]
    if corrections is not None:  # a person's verdict is an end, also where time had run out
        path.terminated[-1], path.truncated[-1] = True, False
    return Recorded(episode.index, *path, success=bool(success.any()))
