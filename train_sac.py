"""Train a policy with SAC on the robot while a person steps in (HIL-SERL, Luo et al. 2024).

    python train_sac.py                                in the simulation, from nothing to a policy
    python train_sac.py rig.operator.interventions=false output=outputs/lift_demos_only
    python train_sac.py resume=true                    go on after an interruption
    python train_sac.py mode=parallel                  actor and learner as two processes
    python train_sac.py mode=parallel role=learner link.port=5555       the learner alone, where the GPU is
    python train_sac.py mode=parallel role=actor link.port=5555 link.secret=learner.secret      the arm, by a tunnel

What is missing is made first: demonstrations and labels (record.py), the reward classifier
(train_reward.py). At the end the policy is evaluated (infer.py). The run folder holds config.json,
metrics.csv, events.jsonl, episodes/ (a dataset of every online episode), features.f16, checkpoints/,
TensorBoard's event files, evaluations/ and report.html.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import infer
import record
import train_reward
from so101 import config as configs
from so101.actor import Actor, recorded_episodes
from so101.config import launch, option, require_within
from so101.data.dataset import Episode, open_dataset
from so101.data.labels import load_labels
from so101.data.video import CODEC_HELP, Codec, require_codec
from so101.data.writer import DatasetWriter
from so101.env import Env, EnvConfig
from so101.episodes import first_success, labelled, load_states, trajectories
from so101.errors import ConfigError, DataError, EpisodeAborted, UserError, tell
from so101.evaluation import Contestant, Evaluation, Judges
from so101.files import read_json, write_atomic
from so101.learn.captured import UpdateGroups
from so101.learn.eyes import Eyes
from so101.learn.link import Joined, Link, Recorded, Started, Weights
from so101.learn.replay import ViewEncoder
from so101.learn.resnet10 import STRIDE, load_resnet10
from so101.learn.sac import SacConfig, make_policy
from so101.learn.sealed import make_secret, read_secret
from so101.learn.wire import ActorEnd, LearnerEnd
from so101.learner import Learner
from so101.processes import LearnerProcess, parent_is_gone
from so101.reports.run import write_run_report
from so101.rig import Rig, RigConfig, describe_task, open_rig
from so101.robot.teleop import POLICY_STARTS, TRAINING
from so101.runfolder import begin_run, check_run, require_episodes
from so101.runlog import RunLog
from so101.schema import TOOL_XYZ, Preprocess, RewardSpec, require_same
from so101.signals import signals_held
from so101.starts import make_starts
from so101.tools.lint import require_clean
from so101.web.live_page import LivePage, live_page

ADDRESS, SECRET = "link.json", "link.secret"  # in the run folder: the learner's port, and what proves who writes
CUT_AFTER = 3  # labelled successes in a row at which a demonstration ends for SAC, as online
LOG_EVERY = 50  # updates; reading the numbers makes the learner wait for its device
# Of a learner in its own process: updates between two looks at what has come, s between weights, s of a rest.
AT_ONCE, PUBLISH_EVERY, IDLE = 4, 1.0, 0.005
ORPHAN_ENDS = 30.0  # s


@dataclass
class LinkConfig:
    """Where the learner listens. It does so on its own machine alone: another comes in by an SSH tunnel."""

    host: str = option("127.0.0.1", "for the actor: where the learner, or this end of the tunnel to it, listens")
    port: int | None = option(None, "TCP port; null: any that is free, which the run folder tells an actor beside it")
    secret: str | None = option(None, "file with the shared secret, for its owner alone; null: the run folder's")
    name: str = option("actor", "of this actor; several that feed one learner need several")
    patience_s: float = option(10.0, "s without a sign of the learner after which the arm holds at the next reset")

    def __post_init__(self) -> None:
        require_within(self, patience_s=(1, 1e6))
        if self.port is not None:
            require_within(self, port=(1, 65535))


@dataclass
class Config:
    """Training a policy."""

    output: str = option("outputs/lift_sac", "run folder; must not exist unless resume=true")
    demonstrations: str = option("outputs/lift_demos", "dataset of demonstrations; recorded first if missing")
    reward_model: str = option("outputs/lift_reward", "folder of the reward classifier; trained first if missing")
    encoder: str | None = option(None, "ResNet10 weight file (.safetensors, .pkl); null: a seeded random start")
    mode: Literal["alternate", "parallel"] = option(
        "alternate", "actor and learner take turns in one process, repeatably; or are two processes side by side"
    )
    role: Literal["both", "actor", "learner"] = option("both", "with mode=parallel, what this machine is")
    link: LinkConfig = option(LinkConfig(), "how actor and learner find each other in mode=parallel")
    steps: int = option(1500, "environment steps of training")
    learning_starts: int = option(100, "environment steps with random actions before learning starts")
    checkpoint_every: int = option(500, "environment steps between checkpoints")
    evaluate_every: int = option(
        0, "environment steps between evaluations of a checkpoint, without exploring; the best is kept by name; 0: none"
    )
    evaluate_episodes: int = option(10, "episodes of each such evaluation on the way")
    evaluation_episodes: int = option(50, "episodes of the evaluation at the end; 0: none")
    resume: bool = option(False, "go on with a run that is there, from its last checkpoint and its episodes")
    changed: bool = option(False, "a resume with another config is meant; the differences are printed either way")
    seed: int = option(0, "seed of everything random")
    device: str = option("cpu", "cpu, cuda or mps")
    page: bool = option(False, "show it live in the browser, on this machine alone, and act from there")
    page_port: int = option(0, "port of the page; 0: any that is free")
    codec: Codec = option("h264", CODEC_HELP)
    rig: RigConfig = option(RigConfig(), "arms, cameras, person")
    env: EnvConfig = option(EnvConfig(), "the task's geometry and timing")
    preprocess: Preprocess = option(Preprocess(), "how a frame becomes the network's image")
    reward: RewardSpec = option(RewardSpec(), "what a transition pays")
    sac: SacConfig = option(
        SacConfig(batch_size=64, utd_ratio=7.5, temperature_init=0.001),
        # The number of updates is what counts here: at 64 one costs 0.62 of one at 128, and with 7.5 a step 1,500
        # steps do what 3,000 of five did, 49, 47, 50, 44 and 42 of 50 for five seeds; 2,000 of five: 47, 39 and 49.
        # From 0.01 the temperature takes longer to fall to what the target entropy needs than this run lasts.
        "the algorithm",
    )

    def __post_init__(self) -> None:
        if self.encoder is not None:
            self.encoder = os.path.abspath(self.encoder)  # the policy may be evaluated from anywhere
        require_codec(self.codec)
        many = 1_000_000_000
        require_within(
            self, steps=(1, many), learning_starts=(0, many), checkpoint_every=(1, many),
            evaluation_episodes=(0, many), evaluate_every=(0, many), evaluate_episodes=(1, many), seed=(0, 2**31),
        )  # fmt: skip
        if self.role != "both" and self.mode == "alternate":
            raise ConfigError(f"role: {self.role!r} needs mode=parallel; in one process there is nobody else")
        if self.page and self.role == "learner":
            raise ConfigError("page: a learner alone sees nothing; say page=true where the actor runs")
        if self.role == "actor" and self.link.port is None and not self.link.secret:
            raise ConfigError("link: role=actor needs link.port and link.secret, the learner's (README: two machines)")
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
    if config.role == "learner":
        try:
            run_alone(config)
        finally:
            report(config)
        return
    if config.role == "both":
        require_episodes(folder, config.env.max_steps)
    known = known_demonstrations(config)
    eyes = make_eyes(config)
    begin_run(folder, config)
    with live_page(config.page, config.page_port, "train_sac", folder) as page:
        finish(config, train(config, known, eyes, page), page)
    print(f"{time.monotonic() - started:.0f} s in all")


def train(config: Config, known: list[tuple[Episode, np.ndarray]], eyes: Eyes, page: LivePage | None) -> bool:
    """Act and learn until the person quits; whether the run has all its steps."""
    folder = Path(config.output)
    with ExitStack() as stack:
        if config.role == "both":
            stack.callback(report, config)  # also of a run that is cut short
        learning = watch = None
        if config.mode == "parallel":
            torch.set_num_threads(1)  # the other core is the learner's: two that share both are slower than one each
            if config.role == "both":  # spawned before any camera opens
                (folder / ADDRESS).unlink(missing_ok=True)  # of an earlier life
                watch = stack.enter_context(LearnerProcess(run_alone, config, folder)).watch
            link: Link | ActorEnd = find_link(config, eyes.trunk_hash)
        else:
            link = Link(config.link.name, told(config, 0))
            learner = stack.enter_context(closing(make_learner(config, eyes.encoder, known)))
            learning = run_learner(config, learner, link)
            next(learning)  # takes in what is recorded, before the arm moves
        if page is not None:
            page.judge = eyes
        actor = stack.enter_context(closing(make_actor(config, known, eyes, link, watch, page)))
        actor.find_learner()
        actor.log.event("started", steps=actor.steps, updates=link.status.updates, mode=config.mode, role=config.role)
        stack.callback(lambda: actor.log.event("ended", steps=actor.steps, updates=link.status.updates))
        if actor.steps:
            due = int(actor.steps * config.sac.utd_ratio) - link.status.updates
            missing = f"; {due} updates to make up for first" if learning and due > 0 else ""
            print(f"{folder}: goes on from step {actor.steps}, update {link.status.updates}{missing}", flush=True)
        seed = config.seed + 1 + actor.steps  # a resumed run draws fresh scenes
        rig = stack.enter_context(open_rig(config.rig, seed, page, folder))
        env = rig.make_env(config.env, config.preprocess, config.reward, seed, eyes)
        for _ in run_actor(config, actor, env, rig, eyes):
            if learning:
                next(learning)
        if learning:
            learner.save_last()
    return max(actor.steps, link.status.steps) >= config.steps


def run_actor(config: Config, actor: Actor, env: Env, rig: Rig, eyes: Eyes) -> Iterator[None]:
    """Act, step, record, tell the learner: one environment step at each `next`, until the run has its steps."""
    link, quits, aborts = actor.link, False, 0
    while max(actor.steps, link.status.steps) < config.steps and not quits:
        rig.teleop.hear(TRAINING)
        try:
            observation, pressed = env.reset()
            actor.take_verdict(pressed)
            if silent := link.silent > config.link.patience_s:
                pressed |= actor.wait_for_learner(env)
        except EpisodeAborted as error:
            aborts = rig.teleop.drop(error, aborts)
            continue
        if "quit" in pressed:
            break
        if silent:
            continue  # what was observed before is old
        if (candidate := link.take_evaluation()) is not None:
            quits = evaluate(config, actor, candidate, env, rig, eyes)
            yield
            continue
        actor.begin(observation)
        rig.teleop.hear(POLICY_STARTS)
        ended = False
        while not ended:
            action = actor.act(observation)
            try:
                step = env.step(action)
                dropped, quits = "redo" in step.events, "quit" in step.events
                truncated = step.truncated or (bool(step.events & {"quit", "end"}) and not step.terminated)
                ended = step.terminated or truncated
                if not dropped:
                    actor.record(observation, step, truncated)
            except EpisodeAborted as error:
                dropped, aborts = True, rig.teleop.drop(error, aborts)
            if dropped:
                actor.drop()
                yield
                break
            observation = step.observation
            if ended:
                aborts = 0
            yield
            if config.rig.simulated:
                actor.keep_pace(config.sac.utd_ratio, config.learning_starts)
    actor.let_catch_up()
    if not quits and (candidate := link.take_evaluation()) is not None:  # of the last step's checkpoint
        evaluate(config, actor, candidate, env, rig, eyes)
        yield


def run_learner(config: Config, learner: Learner, link: Link | LearnerEnd) -> Iterator[None]:
    """Take in experience, make the updates that it allows, offer the weights: once at each `next`."""
    sac, replay, parallel = learner.sac, learner.replay, isinstance(link, LearnerEnd)
    groups = UpdateGroups(sac, replay) if config.device != "cpu" else None
    published, most = 0.0, AT_ONCE if parallel else math.inf
    while True:
        for name, message in link.receive():
            learner.take(name, message)
            if isinstance(message, Joined) and isinstance(link, LearnerEnd):
                link.welcome(name, learner.known(name))
            elif isinstance(message, Started) and message.number > learner.known(name) and isinstance(link, LearnerEnd):
                link.send_back(name, f"link: episode {learner.known(name)} of actor {name!r} is missing")
            link.report(learner.status())
        made = 0
        # In one process the next tick of an arm in real time waits for no update: they come after the episode.
        hurries = config.rig.simulated and config.rig.pace is None
        if learner.steps >= config.learning_starts and (parallel or hurries or not learner.acting):
            if groups is not None:  # on a card, as many as one graph holds at a time
                made = int(learner.steps * config.sac.utd_ratio - learner.updates) // config.sac.actor_every
                made = min(made, AT_ONCE) if parallel else made
                groups.run(made)
                before, learner.updates = learner.updates, learner.updates + made * config.sac.actor_every
                if before // LOG_EVERY < learner.updates // LOG_EVERY:
                    learner.log_update(groups.metrics())
            while groups is None and learner.updates + 1 <= learner.steps * config.sac.utd_ratio and made < most:
                learner.updates, made = learner.updates + 1, made + 1
                batch = replay.sample(config.sac.batch_size).to(config.device)
                metrics = sac.update(batch, actor=learner.updates % config.sac.actor_every == 0)
                if learner.updates % LOG_EVERY == 0:
                    learner.log_update({name: float(value) for name, value in metrics.items()})
            if not parallel or (made and time.monotonic() - published > PUBLISH_EVERY):
                link.publish(learner.weights())
                published = time.monotonic()
        if parallel and not made and not replay.refresh():
            time.sleep(IDLE)
        evaluating = learner.due(config.evaluate_every)
        if evaluating or learner.due(config.checkpoint_every):
            name = learner.save_checkpoint()
            if evaluating:
                link.publish(learner.weights(name))
        link.report(learner.status())
        yield


def run_alone(config: Config) -> None:
    """The learner in a process of its own, with its own store for the actors to come to."""
    folder = Path(config.output)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    sac = config.sac
    trunk = load_resnet10(config.encoder).to(config.device)
    encoder = ViewEncoder(trunk, sac.views, sac.pad, config.seed, sac.features == "cached")
    begin_run(folder, config)
    with ExitStack() as stack:
        # A learner whose actor was killed saves before it ends.
        learner = stack.enter_context(
            closing(make_learner(config, encoder, known_demonstrations(config), patience=ORPHAN_ENDS))
        )
        link = LearnerEnd(make_secret(secret_path(config)), config.link.port or 0, agreed(config, learner.trunk_hash))
        stack.enter_context(closing(link))
        link.report(learner.status(), at_once=True)  # an actor that finds it says from which update it goes on
        write_atomic(folder / ADDRESS, json.dumps({"port": link.port}))
        print(f"learner: listening on 127.0.0.1:{link.port}, secret in {secret_path(config)}", flush=True)
        stack.callback(learner.save_last)  # on Ctrl-C as well
        if learner.updates:
            link.publish(learner.weights())
        learning, over = run_learner(config, learner, link), False
        while not over:
            with signals_held():  # a signal between two passes, never within an update
                next(learning)
            over = parent_is_gone() or (learner.steps >= config.steps and not link.actors)


def make_eyes(config: Config) -> Eyes:
    """The trunk and the classifier, as the actor uses them."""
    kept, sac, alone = Path(config.output) / "reward", config.sac, config.mode == "alternate"
    return Eyes(
        # A run keeps the classifier that it began with: what was trained is what runs.
        config.encoder, kept if kept.exists() else Path(config.reward_model), config.schema(),
        # Two processes share the work: shifted views are the learner's, and so is the device.
        sac.views if alone else 0, sac.pad, config.seed, config.device if alone else "cpu",
        sac.n_obs_steps, sac.features,
    )  # fmt: skip


def make_actor(
    config: Config,
    known: list[tuple[Episode, np.ndarray]],
    eyes: Eyes,
    link: Link | ActorEnd,
    watch: Callable[[], None] | None = None,
    page: LivePage | None = None,
) -> Actor:
    """The actor of this run, with the episodes that are recorded; `watch` sees to the learner's process."""
    folder = Path(config.output)
    episodes = DatasetWriter(
        folder / "episodes", fps=config.env.fps, cameras=config.rig.frame_sizes, task="online",
        schema=config.schema(), codec=config.codec, may_wait=config.rig.simulated,
    )  # fmt: skip
    starts = np.stack([load_states(episode)[0][TOOL_XYZ] for episode, _ in known])
    policy = make_policy(config.sac, len(config.rig.cameras), config.preprocess.image_size // STRIDE)
    return Actor(
        link,
        episodes,
        RunLog(folder, mend=False),
        policy,
        eyes,
        config.reward,
        starts,
        config.steps,
        config.seed,
        watch,
        page,
    )


def make_learner(
    config: Config, encoder: ViewEncoder, known: list[tuple[Episode, np.ndarray]], patience: float = 0.0
) -> Learner:
    """The learner of this run, with the demonstrations cut at their success; see Learner."""
    demonstrations = trajectories(known, config.preprocess, config.reward, CUT_AFTER)
    folder = Path(config.output)
    learner = Learner(
        folder, configs.to_dict(config), config.sac, config.reward, config.schema(), encoder, demonstrations,
        config.seed, config.device, patience,
    )  # fmt: skip
    configs.save(config, folder / "config.json")  # a changed one, now that it fits the last checkpoint
    return learner


def evaluate(config: Config, actor: Actor, candidate: Weights, env: Env, rig: Rig, eyes: Eyes) -> bool:
    """Let a checkpoint's policy drive without exploring, and tell the learner; whether the person quits.

    Every checkpoint of a run meets the same starts. The classifier judges, and a person: training sees no other.
    """
    policy = make_policy(config.sac, len(config.rig.cameras), config.preprocess.image_size // STRIDE)
    policy.load_state_dict(candidate.tensors)
    seed, world = config.seed + 20_000, config.rig.world  # others than the evaluation at the end: best is chosen here
    starts = make_starts("trained", [1, 1], config.evaluate_episodes, seed, config.env, world)
    evaluation = Evaluation({}, {"A": Contestant(config.output, candidate.checkpoint, actor.steps, "")}, "", starts)
    infer.evaluate(env, rig, {"A": infer.Driver(policy.eval(), eyes)}, Judges(eyes, None), evaluation)
    env.detector = eyes
    rig.start_over(config.seed + 1 + actor.steps)  # training goes on in scenes of its own
    quits = len(evaluation.episodes) < len(starts)
    if not quits:
        actor.evaluated(candidate.checkpoint, [asdict(result) for result in evaluation.episodes])
    return quits


def agreed(config: Config, trunk: str) -> dict[str, Any]:
    """What an actor and its learner must have in common, by dotted key."""
    sac = config.sac
    policy = {"activation": sac.activation, "gripper": sac.gripper, "n_obs_steps": sac.n_obs_steps}
    policy |= {"features": sac.features}
    parts = {"trunk": trunk, "schema": config.schema(), "reward": asdict(config.reward), "sac": policy}
    return configs.flat(parts)


def told(config: Config, first: int) -> Iterator[Recorded]:
    """The online episodes on disk from number `first` on."""
    folder = Path(config.output) / "episodes"
    return recorded_episodes(folder, first, config.preprocess, config.reward) if folder.exists() else iter(())


def find_link(config: Config, trunk: str) -> ActorEnd:
    """The actor's end of the link; it looks for the learner from here on."""
    return ActorEnd(
        config.link.name, identity(Path(config.output)), agreed(config, trunk),
        lambda: address(config), lambda: read_secret(secret_path(config)), lambda first: told(config, first),
    )  # fmt: skip


def identity(folder: Path) -> str:
    """What tells this run folder from any other, for the learner; made once."""
    path = folder / "actor.id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()


def secret_path(config: Config) -> Path:
    """The file with the secret that both ends share."""
    return Path(config.link.secret) if config.link.secret else Path(config.output) / SECRET


def address(config: Config) -> tuple[str, int] | None:
    """Where the learner listens; None while it has not said so yet."""
    port, told = config.link.port, Path(config.output) / ADDRESS
    if port is None and told.exists():
        port = read_json(told, DataError)["port"]
    return None if port is None else (config.link.host, port)


def finish(config: Config, done: bool, page: LivePage | None) -> None:
    """Evaluate a run that has all its steps, and write its report."""
    folder = Path(config.output)
    if config.role == "actor":
        print(f"{folder}: copy checkpoints/ from the learner's run folder here to evaluate the policy (infer.py)")
        return
    if not done:
        print("ended by the person; resume=true goes on")
    elif config.evaluation_episodes:
        wanted = infer.Config(run=config.output, episodes=config.evaluation_episodes, seed=config.seed + 10_000)
        infer.main(wanted, page)
        report(config)
    print(f"report: {folder / 'report.html'}")


def report(config: Config) -> None:
    """Write report.html; what hinders that is told, and hides no earlier error."""
    try:
        write_run_report(Path(config.output), config)
    except (OSError, UserError) as error:
        tell(f"report: {error}")


def known_demonstrations(config: Config) -> list[tuple[Episode, np.ndarray]]:
    """The demonstrations that succeed, each with the observations (T + 1,) bool that show it."""
    folder = Path(config.demonstrations)
    dataset = open_dataset(folder)
    require_same(dataset.require_schema(), config.schema(), str(folder))
    require_clean(dataset, config.env.locked_joints)
    labels = load_labels(folder, dataset.observations)
    known = [(episode, success) for episode, success in labelled(dataset, labels) if first_success(success, CUT_AFTER)]
    if not known:
        raise DataError(f"{folder}: has no demonstration that succeeds; label one, or record more")
    return known


def make_missing(config: Config) -> None:
    """Record demonstrations and train the classifier where they are not there yet, saying so.

    Of two machines neither does: they must have the same.
    """
    demonstrations, reward_model = Path(config.demonstrations), Path(config.reward_model)
    if config.role != "both":
        for folder in (demonstrations, reward_model):
            if not folder.exists():
                raise DataError(f"{folder}: is not there; copy it here, {config.role} and the other side need the same")
        return
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


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
