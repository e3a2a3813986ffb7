"""What learns, beside its loop in train_sac.py: networks, replay, counters, log, checkpoints.

Fed by any number of actors. Experience belongs to them: what a learner knows of it after a restart is what they send
again from their disks, so that a kill loses nothing but the updates since the last checkpoint.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.data.lock import FolderLock
from so101.episodes import Trajectory
from so101.errors import DataError
from so101.learn.checkpoint import load_checkpoint, mark_best, save_checkpoint
from so101.learn.link import (
    Corrected,
    Discarded,
    Evaluated,
    Experience,
    Joined,
    Left,
    Moved,
    Recorded,
    Seen,
    Started,
    Status,
    Weights,
)
from so101.learn.replay import Replay, ViewEncoder
from so101.learn.resnet10 import STRIDE, trunk_hash
from so101.learn.sac import Sac, SacConfig
from so101.monitor import Monitor, brightness_of, largest_return
from so101.runlog import RunLog, read_events, read_rows
from so101.schema import RewardSpec, schema_hash
from so101.tensorboard import EventFile


class _Feed:
    """One actor's part in the replay: how many whole episodes it gave, and the one it is in."""

    def __init__(self) -> None:
        self.known = 0  # whole episodes
        self.slots: list[int] = []  # of the running episode's observations
        self.last = -1  # slot of the newest transition
        self.moved = 0  # transitions of the running episode
        self.lag, self.overruns = 0.0, 0  # of the running episode: largest m behind the target, ticks too late


class Learner:
    """Networks, replay, log and counters of a run. Made new, or taken up again from the last checkpoint."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        sac: SacConfig,
        reward: RewardSpec,
        schema: dict[str, Any],
        encoder: ViewEncoder,
        demonstrations: list[Trajectory],
        seed: int,
        device: str,
        patience: float = 0.0,
    ) -> None:
        """`config` is the run's whole, for its checkpoints.

        Raises DataError where another learner is at work in the folder for over `patience` seconds, or its last
        checkpoint was made under another schema or for another trunk.
        """
        self.folder, self.config, self.schema, self.reward = folder, config, schema, reward
        self._lock = FolderLock(folder, patience)
        self.trunk_hash = trunk_hash(encoder.trunk)
        cameras, size = len(schema["cameras"]), schema["image"]["image_size"]
        torch.manual_seed(seed)
        self.sac = Sac(sac, cameras, device, size // STRIDE, encoder.trunk)
        self.sac.generator.manual_seed(seed)
        self.sac.policy.normalizer.fit(np.concatenate([d.states for d in demonstrations]))
        self.replay = Replay(
            encoder, folder, {"trunk": self.trunk_hash, "schema": schema_hash(schema)}, cameras, size,
            sum(len(d.states) for d in demonstrations), sac.buffer_size, seed, sac.n_obs_steps, sac.features,
        )  # fmt: skip
        for path in demonstrations:
            self._add(path, demonstration=True)
        self.steps = self.updates = 0  # environment steps taken in, critic updates made
        self.best: tuple[float, float] | None = None  # success rate and -steps of the best checkpoint
        self.monitor = Monitor(
            sac.utd_ratio, largest_return(reward, sac.discount), sac.target_entropy,
            brightness_of(d.images for d in demonstrations), min(len(d.actions) for d in demonstrations),
            sac.discount / (1 - sac.discount) if sac.backup_entropy and sac.discount < 1 else 0.0,
        )  # fmt: skip
        self.alarms: list[str] = []
        self.log = RunLog(folder)
        self._actors: dict[str, _Feed] = {}
        self._tried: set[str] = set()  # checkpoints whose evaluation is known
        for event in read_events(folder):  # not from the checkpoint, which was saved before its evaluation
            if event.get("kind") == "evaluated":
                self._tried.add(event["checkpoint"])
                score = (event["successes"] / event["episodes"], -event["steps"])
                self.best = score if self.best is None else max(self.best, score)
        self._saved = 0, 0  # steps and updates of the last checkpoint
        if (folder / "checkpoints" / "last").exists():  # else killed before the first: the episodes are all there is
            try:
                self._load_checkpoint()
            except DataError:
                self._lock.release()
                raise
        if lost := self.log.forget("updates", self.updates):
            self.log.event("forgot_lost_updates", rows=lost, updates=self.updates)
        self.board = EventFile(folder)
        self._logged = {(row.get("actor", ""), row.get("episode", "")) for row in read_rows(folder)}

    def close(self) -> None:
        """Let go of the files."""
        self.board.close()
        self._lock.release()

    @property
    def acting(self) -> bool:
        """Whether an episode is going on."""
        return any(actor.moved for actor in self._actors.values())

    def take(self, name: str, message: Experience) -> None:
        """Take in what an actor sent."""
        actor = self._actors.setdefault(name, _Feed())
        match message:
            case Joined() | Left() | Discarded():
                self._drop(name, actor)
            case Recorded() if message.number == actor.known:
                self._drop(name, actor)
                self._take_recorded(name, actor, message)
            case Started() if message.number == actor.known:
                self._drop(name, actor)
                actor.slots = [self._observe(message.seen)]
            case Moved() if actor.slots:
                self._take_move(name, actor, message)
            case Corrected() if message.number == actor.known - 1:
                self.replay.correct(actor.last, message.reward, terminated=True)
                self.monitor.corrected(message.success, name)
            case Evaluated() if message.checkpoint not in self._tried:
                self._take_evaluation(message)
            # What is left is of an episode that is known already: it came again from the actor's disk.

    def known(self, name: str) -> int:
        """How many whole episodes of an actor are in replay."""
        return self._actors[name].known if name in self._actors else 0

    def _observe(self, seen: Seen) -> int:
        return self.replay.add_observation(*seen)

    def _take_move(self, name: str, actor: _Feed, message: Moved) -> None:
        slot, now = actor.slots[-1], self._observe(message.seen)
        self.replay.add_transition(
            slot, now, message.action, message.reward, message.terminated, message.truncated, message.by_human
        )
        actor.last, actor.moved = slot, actor.moved + 1
        actor.slots.append(now)
        self.steps += 1
        self.monitor.moved(
            name, message.time, message.action, message.reward, message.by_human, message.seen.images,
            message.version, message.age,
        )  # fmt: skip
        actor.lag, actor.overruns = max(actor.lag, message.lag), actor.overruns + (message.late > 0)
        if message.terminated or message.truncated:
            columns = self.monitor.ended(name, message.time, message.success)
            self._log(name, actor, columns | {"largest_lag_m": actor.lag, "overruns": actor.overruns})
            actor.known, actor.slots, actor.moved, actor.lag, actor.overruns = actor.known + 1, [], 0, 0.0, 0

    def _take_recorded(self, name: str, actor: _Feed, path: Recorded) -> None:
        """An episode that an earlier life of this learner knew; or nobody did, then it is logged as well."""
        actor.last = self._add(Trajectory(*path[1:-1]))
        count = len(path.actions)
        self.steps += count
        if (name, str(actor.known)) not in self._logged:  # killed between the episode and its row
            for action, paid, by_human, images in zip(
                path.actions, path.rewards, path.by_human, path.images[1:], strict=True
            ):
                self.monitor.moved(name, 0.0, action, float(paid), bool(by_human), images, -1, 0.0)
            self._log(name, actor, self.monitor.ended(name, 0.0, path.success))
        actor.known += 1

    def _drop(self, name: str, actor: _Feed) -> None:
        """The running episode never was."""
        if actor.slots:
            self.replay.discard(actor.slots)
            self.monitor.discarded(name)
            self.steps -= actor.moved
        actor.slots, actor.moved, actor.lag, actor.overruns = [], 0, 0.0, 0

    def _add(self, path: Trajectory, demonstration: bool = False) -> int:
        """Put a whole episode into replay; the slot of its last transition."""
        add = self.replay.add_observation
        slots = [
            add(images, state, None, demonstration) for images, state in zip(path.images, path.states, strict=True)
        ]
        for t, action in enumerate(path.actions):
            self.replay.add_transition(
                slots[t], slots[t + 1], action, path.rewards[t], path.terminated[t], path.truncated[t], path.by_human[t]
            )
        return slots[-2]

    def _log(self, name: str, actor: _Feed, columns: dict[str, float]) -> None:
        """One row for an episode that has ended."""
        columns |= self.monitor.updated(time.monotonic(), self.steps, self.updates, {})  # also where nothing is updated
        self.log.metrics(step=self.steps, actor=name, episode=actor.known, **columns)
        self.board.scalars(self.steps, columns)
        self._sound()

    def log_update(self, metrics: dict[str, float]) -> None:
        """One row for what an update measured."""
        columns = self.monitor.updated(time.monotonic(), self.steps, self.updates, metrics)
        self.log.metrics(step=self.steps, updates=self.updates, **columns)
        self.board.scalars(self.steps, columns)
        self._sound()

    def _sound(self) -> None:
        for alarm in self.monitor.alarms():
            self.log.event("alarm", step=self.steps, said=alarm)
            self.alarms.append(alarm)

    def status(self) -> Status:
        """How far it is, for the actors."""
        replay = self.replay
        online = min(replay.online_count, replay.online_capacity)
        return Status(self.steps, self.updates, tuple(self.alarms), replay.demo_count, online)

    def weights(self, checkpoint: str = "") -> Weights:
        """The policy as it is now: to act with, or to evaluate as a checkpoint."""
        policy = self.sac.policy
        return Weights(self.updates, self.sac.policy_tensors(), self.trunk_hash, policy.probe(), checkpoint)

    def save_last(self) -> None:
        """A checkpoint of the end, where there is more to save than in the last one."""
        if self.steps > self._saved[0] or self.updates > self._saved[1]:
            self.save_checkpoint()

    def save_checkpoint(self) -> str:
        """Everything that a resume cannot rebuild from demonstrations and episodes; returns its name."""
        state = {
            "sac": self.sac.training_state(), "updates": self.updates, "replay": self.replay.rng_state(),
            "monitor": self.monitor.state(),
        }  # fmt: skip
        folder = save_checkpoint(
            self.folder, self.steps, self.sac.tensors(), state, self.config, self.schema, self.trunk_hash
        )
        self._saved = self.steps, self.updates
        return folder.name

    def due(self, every: int) -> bool:
        """Whether the steps have passed a multiple of `every` since the last checkpoint."""
        return every > 0 and self.steps // every > self._saved[0] // every

    def _take_evaluation(self, done: Evaluated) -> None:
        """Log what a checkpoint's policy did, and call it the best if it is."""
        columns = {"evaluated_success": done.successes / done.episodes, "evaluated_steps": done.steps}
        self.log.metrics(step=int(done.checkpoint[:6]), **columns)
        self.board.scalars(int(done.checkpoint[:6]), columns)
        self.log.event("evaluated", **done._asdict())
        self._tried.add(done.checkpoint)
        score = (done.successes / done.episodes, -done.steps)
        if self.best is None or score > self.best:
            self.best = score
            mark_best(self.folder, done.checkpoint)

    def _load_checkpoint(self) -> None:
        checkpoint = load_checkpoint(self.folder, self.schema, self.trunk_hash)
        state = checkpoint.training_state
        self.sac.load_tensors(checkpoint.tensors)
        self.sac.load_training_state(state["sac"])
        self.replay.load_rng_state(state["replay"])
        self.monitor.load_state(state["monitor"])
        self.updates = state["updates"]
        self._saved = checkpoint.step, self.updates
