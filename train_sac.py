"""Train a policy with SAC on the robot while a person steps in (HIL-SERL, Luo et al. 2024).

    python train_sac.py                                in the simulation, from nothing to a policy
    python train_sac.py rig.operator.interventions=false output=outputs/lift_demos_only
    python train_sac.py resume=true                    go on after an interruption

What is missing is made first: demonstrations and labels (record.py), the reward classifier
(train_reward.py). At the end the policy is evaluated (infer.py). The run folder holds config.json,
metrics.csv, events.jsonl, episodes/ (a dataset of every online episode), features.f16, checkpoints/,
eval.json and report.html.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import infer
import record
import train_reward
from so101 import config as configs
from so101.config import launch, option, require_within
from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels, label_episode, load_labels
from so101.data.lint import START_TOLERANCE
from so101.data.video import CODEC_HELP, Codec, require_codec
from so101.data.writer import DatasetWriter
from so101.env import Env, EnvConfig, Observation, Step
from so101.episodes import Trajectory, first_success, labelled, observed_success, trajectories
from so101.errors import ConfigError, DataError, EpisodeAborted, UserError
from so101.files import new_folder
from so101.learn.checkpoint import load_checkpoint, save_checkpoint
from so101.learn.eyes import Eyes
from so101.learn.link import Corrected, Discarded, Link, Moved, Started, Weights
from so101.learn.replay import Replay
from so101.learn.resnet10 import STRIDE
from so101.learn.sac import Sac, SacConfig, make_policy
from so101.plots import curve, html_table, write_report
from so101.rig import Rig, RigConfig, describe_task, open_rig
from so101.robot.teleop import POLICY_STARTS, TRAINING
from so101.runlog import Progress, RunLog, read_metrics
from so101.schema import ACTION, TOOL_XYZ, Preprocess, RewardSpec, require_same, schema_hash
from so101.tools.lint import require_clean

CUT_AFTER = 3  # labelled successes in a row at which a demonstration ends for SAC, as online
LOG_EVERY = 50  # updates; reading the numbers makes the learner wait for its device


@dataclass
class Config:
    """Training a policy."""

    output: str = option("outputs/lift_sac", "run folder; must not exist unless resume=true")
    demonstrations: str = option("outputs/lift_demos", "dataset of demonstrations; recorded first if missing")
    reward_model: str = option("outputs/lift_reward", "folder of the reward classifier; trained first if missing")
    encoder: str | None = option(None, "ResNet10 weight file (.safetensors); null: a seeded random start")
    mode: Literal["alternate"] = option("alternate", "actor and learner take turns in one process")
    steps: int = option(3000, "environment steps of training")
    learning_starts: int = option(100, "environment steps with random actions before learning starts")
    checkpoint_every: int = option(500, "environment steps between checkpoints")
    evaluation_episodes: int = option(50, "episodes of the evaluation at the end; 0: none")
    resume: bool = option(False, "go on with a run that is there, from its last checkpoint and its episodes")
    seed: int = option(0, "seed of everything random")
    device: str = option("cpu", "cpu, cuda or mps")
    codec: Codec = option("h264", CODEC_HELP)
    rig: RigConfig = option(RigConfig(), "arms, cameras, person")
    env: EnvConfig = option(EnvConfig(), "the task's geometry and timing")
    preprocess: Preprocess = option(Preprocess(), "how a frame becomes the network's image")
    reward: RewardSpec = option(RewardSpec(), "what a transition pays")
    sac: SacConfig = option(
        SacConfig(batch_size=64, utd_ratio=5, temperature_init=0.001),
        # The number of updates is what counts here: at 64 one costs 0.62 of one at 128, and seed 1 succeeds alone
        # in 9 of 10 episodes after 1,700 steps of five instead of 2,900 steps of three. From 0.01 the temperature
        # takes longer to fall to what the target entropy needs than this run lasts.
        "the algorithm",
    )

    def __post_init__(self) -> None:
        require_codec(self.codec)
        many = 1_000_000_000
        require_within(
            self, steps=(1, many), learning_starts=(0, many), checkpoint_every=(1, many),
            evaluation_episodes=(0, many), seed=(0, 2**31),
        )  # fmt: skip
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(self.device.split(":")[0], False):
            usable = ", ".join(name for name, found in there.items() if found)
            raise ConfigError(f"device: got {self.device!r}, this machine has {usable}")

    def schema(self) -> dict:
        """What data and weights of this run agree on."""
        return describe_task(self.rig, self.env, self.preprocess)


def main(config: Config) -> None:
    """Make what is missing, train, evaluate, report."""
    started = time.monotonic()
    folder = Path(config.output)
    check_run(folder, config)
    make_missing(config)
    sac = config.sac
    # A run keeps the classifier that it began with: what was trained is what runs.
    reward_model = folder / "reward" if (folder / "reward").exists() else Path(config.reward_model)
    eyes = Eyes(
        config.encoder, reward_model, config.schema(), sac.views, sac.pad, config.seed, config.device,
        sac.n_obs_steps, sac.features,
    )  # fmt: skip
    demonstrations = load_demonstrations(config)
    with ExitStack() as stack:
        seed = config.seed + 1 + recorded_steps(folder)  # a resumed run draws fresh scenes
        rig = stack.enter_context(open_rig(config.rig, seed))
        env = rig.make_env(config.env, config.preprocess, config.reward, seed, eyes)
        run = stack.enter_context(closing(Run(folder, config, eyes, demonstrations)))
        learner = run_learner(config, run)
        for _ in run_actor(config, run, env, rig, eyes):
            next(learner)
        run.save_checkpoint()
    run_report(folder)
    if run.steps < config.steps:
        print(f"ended by the person at step {run.steps}; resume=true goes on")
    elif config.evaluation_episodes:
        infer.main(infer.Config(run=config.output, episodes=config.evaluation_episodes, seed=config.seed + 10_000))
    run_report(folder)
    print(f"{time.monotonic() - started:.0f} s in all; report: {folder / 'report.html'}")


def run_actor(config: Config, run: "Run", env: Env, rig: Rig, eyes: Eyes) -> Iterator[None]:
    """Act, step, send: one environment step at each `next`, until the run has its steps."""
    policy = make_policy(config.sac, len(config.rig.cameras), config.preprocess.image_size // STRIDE).eval()
    rng = np.random.default_rng([config.seed, run.steps])
    noise = torch.Generator().manual_seed(config.seed + run.steps)
    version, steps, quits, aborts = -1, run.steps, False, 0
    while steps < config.steps and not quits:
        rig.teleop.hear(TRAINING)
        try:
            observation, pressed = env.reset()
        except EpisodeAborted as error:
            aborts = rig.teleop.drop(error, aborts)
            continue
        run.take_verdict(pressed)
        if "quit" in pressed:
            break
        run.check_start(observation)
        rig.teleop.hear(POLICY_STARTS)
        run.link.send(Started(eyes.see(observation)))
        started, taken, ended = observation.time, [], False
        while not ended:
            if (weights := run.link.newest(version)) is not None:
                eyes.require_trunk(weights.trunk_hash)
                policy.load_state_dict(weights.tensors)
                version = weights.version
            if version < 0:  # nothing learned yet
                action = rng.uniform(-1, 1, len(ACTION))
                if config.sac.gripper == "discrete":
                    action[-1] = np.round(action[-1])
            else:
                action = policy.act(eyes.look(observation), observation.state, 1.0, noise)
            try:
                step = env.step(action)
                dropped, quits = "redo" in step.events, "quit" in step.events
                truncated = step.truncated or (bool(step.events & {"quit", "end"}) and not step.terminated)
                ended = step.terminated or truncated
                if not dropped:
                    run.episodes.add(
                        observation.state, step.action, observation.frames,
                        reward=float(step.success), done=step.terminated, truncated=truncated,
                        is_intervention=step.by_human, capture_time=observation.time - started,
                    )  # fmt: skip
                if ended and not dropped:  # on disk before the learner goes on from it
                    run.episodes.save_episode(
                        step.observation.state, step.observation.frames, step.observation.time - started
                    )
            except EpisodeAborted as error:
                dropped, aborts = True, rig.teleop.drop(error, aborts)
            if dropped:
                run.drop_episode()
                steps -= len(taken)
                yield
                break
            observation = step.observation
            seen = eyes.see(observation)
            run.link.send(Moved(step.action, step.reward, step.terminated, truncated, step.by_human, seen))
            taken.append(step)
            steps += 1
            if ended:
                run.log_episode(steps, taken)
                aborts = 0
            yield


def run_learner(config: Config, run: "Run") -> Iterator[None]:
    """Take in experience, make the updates that it allows, offer the weights: once at each `next`."""
    sac, replay = run.sac, run.replay
    slot = last = first = -1  # of the newest observation, the newest transition, the episode's first observation
    moved = 0  # transitions of this episode
    acting = False  # whether an episode is going on
    while True:
        for message in run.link.receive():
            if isinstance(message, Corrected):
                replay.correct(last, message.reward, message.terminated)
                continue
            if isinstance(message, Discarded):
                replay.discard(first)
                run.steps -= moved
                acting = False
                continue
            now = replay.add_observation(*message.seen)
            if isinstance(message, Moved):
                replay.add_transition(
                    slot, now, message.action, message.reward, message.terminated, message.truncated, message.by_human
                )
                last, moved, acting = slot, moved + 1, not (message.terminated or message.truncated)
                run.steps += 1
            else:
                first, moved, acting = now, 0, True
            slot = now
        # A real arm's next tick does not wait for updates: they are made up for when the episode is over.
        if run.steps >= config.learning_starts and (config.rig.simulated or not acting):
            while run.updates + 1 <= run.steps * config.sac.utd_ratio:  # what was missed is made up
                run.updates += 1
                batch = replay.sample(config.sac.batch_size).to(config.device)
                metrics = sac.update_critic(batch)
                if run.updates % config.sac.actor_every == 0:
                    metrics |= sac.update_actor(batch)
                    metrics |= sac.update_temperature(metrics.pop("log_prob"))
                sac.update_targets()
                if run.updates % LOG_EVERY == 0:
                    run.log_update(metrics)
            run.publish()
        if run.steps % config.checkpoint_every == 0:
            run.save_checkpoint()
        yield


class Run:
    """What a run holds beside its loops: networks, replay, episodes, log, counters. Made new or taken up again."""

    def __init__(self, folder: Path, config: Config, eyes: Eyes, demonstrations: list[Trajectory]) -> None:
        begin_run(folder, config)
        self.folder, self.config, self.trunk_hash = folder, config, eyes.trunk_hash
        self.log, self.link = RunLog(folder), Link()
        self.progress = Progress("train", config.steps, "step")
        self.recent: deque[bool] = deque(maxlen=20)  # success of the last episodes
        self.alone: deque[bool] = deque(maxlen=20)  # the same, without help
        self.episodes = DatasetWriter(
            folder / "episodes",
            fps=config.env.fps, cameras=config.rig.frame_sizes, task="online", schema=config.schema(),
            codec=config.codec, may_wait=config.rig.simulated,
        )  # fmt: skip
        self.starts = np.stack([d.states[0][TOOL_XYZ] for d in demonstrations])
        cameras, size = len(config.rig.cameras), config.preprocess.image_size
        torch.manual_seed(config.seed)
        self.sac = Sac(config.sac, cameras, config.device, size // STRIDE, eyes.encoder.trunk)
        self.sac.generator.manual_seed(config.seed)
        self.sac.policy.normalizer.fit(np.concatenate([d.states for d in demonstrations]))
        key = {"trunk": eyes.trunk_hash, "schema": schema_hash(config.schema())}
        frames = sum(len(d.states) for d in demonstrations)
        self.replay = Replay(
            eyes.encoder, folder, key, cameras, size, frames, config.sac.buffer_size, config.seed,
            config.sac.n_obs_steps, config.sac.features,
        )  # fmt: skip
        for demonstration in demonstrations:
            self._add(demonstration, demonstration=True)
        self.ended = False  # whether an episode ended in this process, for a late verdict to correct
        self.steps = self._add_recorded()
        self.updates = 0
        self.log.event("started", steps=self.steps, demonstrations=len(demonstrations))
        if self.steps:
            self._load_checkpoint()

    def close(self) -> None:
        """Let go of the files."""
        self.progress.close()
        self.episodes.close()

    def take_verdict(self, pressed: frozenset[str]) -> None:
        """A key pressed while the arm reset corrects the episode just ended, here and in its labels."""
        if not pressed & {"success", "failure"} or not self.ended:
            return
        success = "failure" not in pressed
        self.recent[-1] = success
        self.link.send(Corrected(self.config.reward.of(success), terminated=True))
        index = self.episodes.episodes - 1
        length = open_dataset(self.episodes.folder).episodes[index].length
        label = EpisodeLabel(success_start=length) if success else EpisodeLabel(all_fail=True)
        label_episode(self.episodes.folder, index, label)
        self.log.event("corrected", episode=index, success=success)

    def drop_episode(self) -> None:
        """The episode in progress never was: not on disk, not in replay, and not for a late verdict to correct."""
        self.episodes.discard_episode()
        self.link.send(Discarded())
        self.ended = False

    def check_start(self, observation: Observation) -> None:
        """Refuse to train from where no demonstration started: hours went into a reset at another height."""
        tool = observation.state[TOOL_XYZ]
        outside = np.maximum(self.starts.min(axis=0) - tool, tool - self.starts.max(axis=0))
        if outside.max() > START_TOLERANCE:
            raise ConfigError(
                f"env.home: the episode starts with the tool at {tool.round(3).tolist()} m, the demonstrations at "
                f"{self.starts.mean(axis=0).round(3).tolist()}; more than {START_TOLERANCE} m off. Use their home"
            )

    def log_episode(self, steps: int, taken: list[Step]) -> None:
        """One row of metrics and one line of progress for a finished episode."""
        by_human = sum(step.by_human for step in taken)
        self.ended = True
        self.recent.append(taken[-1].success)
        self.alone.append(taken[-1].success and not by_human)
        self.log.metrics(
            step=steps, episode=self.episodes.episodes - 1, episode_steps=len(taken),
            episode_return=sum(step.reward for step in taken), success=taken[-1].success,
            success_last_20=sum(self.recent) / len(self.recent),
            success_alone_last_20=sum(self.alone) / len(self.alone),
            intervention_share=by_human / len(taken),
            largest_lag_m=max(step.lag for step in taken), overruns=sum(step.late > 0 for step in taken),
        )  # fmt: skip
        self.progress.update(
            steps, episode=self.episodes.episodes, success=f"{sum(self.recent)}/{len(self.recent)}",
            alone=f"{sum(self.alone)}/{len(self.alone)}", updates=self.updates,
        )  # fmt: skip

    def log_update(self, metrics: dict[str, torch.Tensor]) -> None:
        """One row of metrics for the learner."""
        self.log.metrics(step=self.steps, updates=self.updates, **{name: float(m) for name, m in metrics.items()})

    def publish(self) -> None:
        """Offer the policy's weights to the actor."""
        self.link.publish(Weights(self.updates, self.sac.policy_tensors(), self.trunk_hash))

    def save_checkpoint(self) -> None:
        """Everything that a resume cannot rebuild from demonstrations and episodes."""
        state = {
            "sac": self.sac.training_state(), "updates": self.updates, "steps": self.steps,
            "replay": self.replay.rng_state(), "recent": list(self.recent), "alone": list(self.alone),
        }  # fmt: skip
        save_checkpoint(
            self.folder, self.steps, self.sac.tensors(), state,
            configs.to_dict(self.config), self.config.schema(), self.trunk_hash,
        )  # fmt: skip

    def _load_checkpoint(self) -> None:
        if not (self.folder / "checkpoints" / "last").exists():
            return  # killed before the first: the recorded episodes are all there is, and learning starts from them
        checkpoint = load_checkpoint(self.folder, self.config.schema(), self.trunk_hash)
        if checkpoint.step > self.steps + self.config.env.max_steps:
            held = f"{self.episodes.folder}: holds {self.steps} steps, the checkpoint is of {checkpoint.step}"
            raise DataError(f"{held}; restore the episodes, or begin a new run")
        self.sac.load_tensors(checkpoint.tensors)
        self.sac.load_training_state(checkpoint.training_state["sac"])
        self.replay.load_rng_state(checkpoint.training_state["replay"])
        self.updates = checkpoint.training_state["updates"]
        self.publish()
        self.recent.extend(checkpoint.training_state["recent"])
        self.alone.extend(checkpoint.training_state["alone"])
        print(f"{self.folder}: goes on from step {self.steps}, update {self.updates}")

    def _add_recorded(self) -> int:
        """Put the recorded online episodes back into replay; returns their steps."""
        recorded = open_dataset(self.episodes.folder)
        corrections = load_labels(recorded.folder, recorded.observations) or Labels(recorded.folder.name)
        steps = 0
        for episode in recorded.episodes:
            corrected = episode.index in corrections.episodes
            success = observed_success(episode, corrections if corrected else None)
            if success is None:
                raise DataError(f"{self.episodes.folder}: episode {episode.index} is labelled skip; unlabel it")
            path = trajectories([(episode, success)], self.config.preprocess, self.config.reward, consecutive=1)[0]
            if corrected:  # a person's verdict is an end, also where time had run out
                path.terminated[-1], path.truncated[-1] = True, False
            self._add(path)
            steps += episode.length
        return steps

    def _add(self, path: Trajectory, demonstration: bool = False) -> None:
        add = self.replay.add_observation
        slots = [
            add(images, state, None, demonstration) for images, state in zip(path.images, path.states, strict=True)
        ]
        for t, action in enumerate(path.actions):
            self.replay.add_transition(
                slots[t], slots[t + 1], action, path.rewards[t], path.terminated[t], path.truncated[t], path.by_human[t]
            )


def check_run(folder: Path, config: Config) -> None:
    """Refuse a run folder that exists, or with resume=true one that was started with another config."""
    if not folder.exists() or ((folder / "config.json").exists() and not recorded_steps(folder)):
        return  # new, or begun and stopped before its first episode was on disk
    if not config.resume:
        raise DataError(f"{folder}: exists and is never overwritten; name another with output=, or resume=true")
    before, now = (configs.to_dict(c) for c in (configs.load(Config, folder / "config.json"), config))
    free = ("output", "resume", "steps", "evaluation_episodes")  # moved, or changed by a person on the way
    differing = [key for key in now if key not in free and now[key] != before[key]]
    if differing:
        raise ConfigError(
            f"{folder}: was started with another {', '.join(differing)}; a resume keeps its config: "
            f"python train_sac.py --config {folder / 'config.json'} output={folder} resume=true"
        )


def begin_run(folder: Path, config: Config) -> None:
    """Make the run folder with its config and its classifier, whole or not at all; on a resume, note the new steps."""
    if folder.exists():
        configs.save(config, folder / "config.json")
        return
    with new_folder(folder) as aside:
        configs.save(config, aside / "config.json")
        shutil.copytree(config.reward_model, aside / "reward")


def recorded_steps(folder: Path) -> int:
    """Environment steps of a run's recorded episodes."""
    episodes = folder / "episodes"
    return sum(episode.length for episode in open_dataset(episodes).episodes) if episodes.exists() else 0


def load_demonstrations(config: Config) -> list[Trajectory]:
    """The demonstrations that succeed, cut at their success."""
    folder = Path(config.demonstrations)
    dataset = open_dataset(folder)
    if dataset.schema is None:
        raise DataError(f"{folder}: says nothing of its actions and states; convert it first")
    require_same(dataset.schema, config.schema(), str(folder))
    require_clean(dataset, config.env.locked_joints)
    labels = load_labels(folder, dataset.observations)
    known = [(episode, success) for episode, success in labelled(dataset, labels) if first_success(success, CUT_AFTER)]
    if not known:
        raise DataError(f"{folder}: has no demonstration that succeeds; label one, or record more")
    return trajectories(known, config.preprocess, config.reward, CUT_AFTER)


def make_missing(config: Config) -> None:
    """Record demonstrations and train the classifier where they are not there yet, saying so."""
    demonstrations, reward_model = Path(config.demonstrations), Path(config.reward_model)
    if begun := record.unfinished(demonstrations):
        print(f"{demonstrations} was not finished: recording up to {begun.episodes} episodes first (record.py)")
        record.main(begun)
    elif not demonstrations.exists():
        wanted = record.Config(
            dataset=config.demonstrations, seed=config.seed,
            rig=config.rig, env=config.env, preprocess=config.preprocess,
        )  # fmt: skip
        print(f"no demonstrations in {demonstrations}: recording {wanted.episodes} episodes first (record.py)")
        record.main(wanted)
    if record.unfinished(demonstrations):  # nobody who ended the recording wants the arm to move on
        raise UserError(f"{demonstrations}: the recording was ended before its last episode; start again to go on")
    if not reward_model.exists():
        print(f"no reward classifier in {reward_model}: training it first (train_reward.py)")
        train_reward.main(
            train_reward.Config(
                dataset=config.demonstrations,
                output=config.reward_model,
                encoder=config.encoder,
                seed=config.seed,
                preprocess=config.preprocess,
            )  # fmt: skip
        )


def run_report(folder: Path) -> None:
    """report.html: the curves of metrics.csv, and the evaluation where there is one."""
    metrics = read_metrics(folder)
    steps = metrics.get("step", [])
    sections = []
    for title, names in (
        ("success", ("success_last_20", "success_alone_last_20", "intervention_share")),
        ("episode length", ("episode_steps",)),
        ("value", ("q", "td_target")),
        ("losses", ("critic_loss", "actor_loss")),
        ("entropy", ("entropy",)),
        ("temperature", ("temperature",)),
    ):
        series = {name: (steps, metrics[name]) for name in names if name in metrics}
        if series:
            sections.append((title, curve(title, "environment step", "", series)))
    evaluation = folder / "eval.json"
    if evaluation.exists():
        result = json.loads(evaluation.read_text())
        rows = [[i + 1, e["steps"], f"{e['return']:.2f}", e["success"]] for i, e in enumerate(result["episodes"])]
        heading = f"evaluation: {result['success_rate']:.0%}, judged by {result['judge']}"
        sections.append((heading, html_table(["episode", "steps", "return", "success"], rows)))
    write_report(folder / "report.html", str(folder), sections)


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
