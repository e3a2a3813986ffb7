"""Run a trained policy without learning and say how often it succeeds; or two, from the same starts.

    python infer.py                                    the last checkpoint of outputs/lift_sac, 50 episodes
    python infer.py starts=home episodes=5             as the table without random reset; starts=random: with it
    python infer.py starts=grid grid=[5,5] video=true  an even grid over the random range, once each
    python infer.py checkpoint=best against=000500 starts=grid     two checkpoints, in turns from each start
    python infer.py run=outputs/cube against=outputs/lift_sac:last starts=my_starts.json

Everything that the policy was trained with (rig, geometry, preprocessing, reward) comes from its run folder. Success
is judged by the simulated world, by the classifier, and by a person's keys s and f, in the episode or while the arm
resets after it; all three are shown. A real arm holds at the start, says where to place the object, and waits for p.
What comes of it is a new folder in the run's `evaluations`: eval.json, eval.csv, report.html and video.mp4, where each
episode is from the moment it ends.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import math
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from so101.config import from_dict, launch, option, require_within, to_dict
from so101.env import Env, EnvConfig, Observation, Step
from so101.errors import ConfigError, DataError, EpisodeAborted
from so101.evaluation import (
    LAST_WORD,
    TAKEN_OVER,
    VERDICT_S,
    Contestant,
    Evaluation,
    Judges,
    Result,
    begin,
    held,
    newest,
)  # fmt: skip
from so101.files import read_json
from so101.film import Film, join_clips
from so101.learn.checkpoint import find_checkpoint, load_checkpoint
from so101.learn.eyes import Eyes
from so101.learn.networks import Policy
from so101.learn.resnet10 import STRIDE
from so101.learn.sac import Sac, SacConfig
from so101.reports.evaluation import reported, write_evaluation_report
from so101.rig import Rig, RigConfig, describe_task, open_rig
from so101.robot.teleop import DROPPED, EVALUATION, POLICY_STARTS
from so101.runlog import Progress
from so101.schema import TOOL_XYZ, Preprocess, RewardSpec
from so101.starts import KINDS, Start, make_starts, where
from so101.web.live_page import LivePage, live_page

FREE = ("reset_time_s", "random_ee_reset", "random_ee_range_xy", "random_ee_range_z")  # of two runs' env


@dataclass
class Config:
    """Evaluating a policy, or two."""

    run: str = option("outputs/lift_sac", "run folder of train_sac.py")
    checkpoint: str = option("last", "last, best, or a checkpoint's number: the name of its folder")
    against: str | None = option(
        None, "a checkpoint to compare with on the same starts, in turns; of another run: its folder, a colon, its name"
    )
    starts: str = option(
        "trained", "where episodes start: trained (as in training), random (offsets of home), home, grid (over the "
        "random range), or a JSON file that lists tool positions, [[x, y, z], ...] in metres",
    )  # fmt: skip
    grid: list[int] = option([3, 3], "for starts=grid: places along x and y, and z")
    episodes: int | None = option(
        None, "episodes of each policy; null: 50, or each start of a grid or list once; more repeat them in new scenes"
    )
    seed: int = option(10_000, "seed of the starts and their scenes, the same for every policy; training used others")
    std_scale: float = option(0.0, "share of the policy's spread to act with; 0: its mean action, 1: as in training")
    video: bool = option(False, "make video.mp4: every camera, the action, who drives, what the judges say")
    output: str | None = option(None, "folder to make for the results; null: the next number in the run's evaluations")
    resume: bool = option(False, "go on with the newest evaluation (or the one in output), which was cut short")
    page: bool = option(False, "show it live in the browser, on this machine alone, and act from there")
    page_port: int = option(0, "port of the page; 0: any that is free")

    def __post_init__(self) -> None:
        require_within(self, seed=(0, 2**31), std_scale=(0, 1))
        if self.episodes is not None:
            require_within(self, episodes=(1, 1_000_000))
        if not self.run:
            raise ConfigError("run: got no name; give the run folder that train_sac.py made")
        if self.starts not in KINDS and Path(self.starts).suffix != ".json":
            raise ConfigError(f"starts: got {self.starts!r}, must be {', '.join(KINDS)} or a file that ends in .json")
        if not 2 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise ConfigError(f"grid: got {self.grid}, needs the places along x and y, [3, 3] say, or x, y and z")


def main(config: Config, page: LivePage | None = None) -> None:
    """Load what was trained, run it, print and store the result; on a `page` that is open already, if one is."""
    began, run = time.time(), Path(config.run)
    trained = Trained.of(run)
    folder = to_resume(config) if config.resume else begin(run, config.output)
    with held(folder):
        evaluation, config = unfinished(config, folder) if config.resume else (prepare(config, trained), config)
        drivers: dict[str, Driver] = {}
        for name, it in evaluation.policies.items():
            drivers[name] = load_driver(run, trained, it, drivers.get("A"))
        try:
            if evaluation.complete:
                print(f"{folder}: every episode was run; what is missing of its report and video is made now")
            else:
                run_episodes(config, trained, drivers, evaluation, folder, page)
        finally:  # also of one that was cut short
            if (folder / "eval.json").exists():
                done = Evaluation.load(folder)
                done.print()
                join_clips(folder, [done.name(result) for result in done.episodes], done.complete)
                write_evaluation_report(folder, run, began, config, drivers["A"].eyes.threshold)
            else:
                print("no episode was evaluated")


def run_episodes(
    config: Config,
    trained: "Trained",
    drivers: "dict[str, Driver]",
    evaluation: Evaluation,
    folder: Path,
    page: LivePage | None,
) -> None:
    """On the rig, what is left of an evaluation; each episode is in its folder from the moment it ends."""
    eyes = drivers["A"].eyes
    with ExitStack() as stack:
        page = page or stack.enter_context(live_page(config.page, config.page_port, "infer"))
        if page is not None:
            page.judge = eyes
        rig = stack.enter_context(open_rig(trained.rig, config.seed, page, folder))
        env = rig.make_env(trained.env, trained.preprocess, trained.reward, config.seed)
        judges = Judges(eyes, rig.verdict)
        film = Film(
            folder, judges, eyes.threshold, trained.preprocess, trained.env.fps, trained.env.max_steps, config.video,
            trained.rig.simulated,
        )  # fmt: skip
        stack.callback(film.drop)
        evaluate(env, rig, drivers, judges, evaluation, config.std_scale, lambda: evaluation.save(folder), film)


@dataclass
class Trained:
    """The parts of a run's config that its policy needs, to run as it was trained."""

    rig: RigConfig = option(help="arms, cameras, person")
    env: EnvConfig = option(help="the task's geometry and timing")
    preprocess: Preprocess = option(help="how a frame becomes the network's image")
    reward: RewardSpec = option(help="what a transition pays")
    sac: SacConfig = option(help="the algorithm")
    encoder: str | None = option(help="ResNet10 weight file")

    @classmethod
    def of(cls, run: Path) -> "Trained":
        """From the run folder's config.json. Raises DataError or ConfigError where it is missing or damaged."""
        path = run / "config.json"
        hint = f"; without it {run} is not a run folder, which train_sac.py makes"
        stored = read_json(path, DataError, hint)
        needed = [field.name for field in fields(cls) if field.name in stored]
        return from_dict(cls, {name: stored[name] for name in needed}, str(path))

    @property
    def schema(self) -> dict[str, Any]:
        """What its networks were trained on."""
        return describe_task(self.rig, self.env, self.preprocess)


class Driver(NamedTuple):
    """A policy, and the eyes that it was trained with."""

    policy: Policy
    eyes: Eyes


def prepare(config: Config, trained: Trained) -> Evaluation:
    """What is to be run: which policies, from where."""
    run = Path(config.run)
    policies = {"A": contestant(run, config.checkpoint)}
    if config.against is not None:
        other, colon, name = config.against.rpartition(":")
        policies["B"] = contestant(Path(other) if colon else run, name)
    env = trained.env
    starts = make_starts(config.starts, config.grid, config.episodes, config.seed, env, trained.rig.world)
    headline = f"starts: {config.starts}"
    if config.starts in ("trained", "random", "home"):
        random = config.starts == "random" or (config.starts == "trained" and env.random_ee_reset)
        headline = f"random_ee_reset: {'true' if random else 'false'}"
    elif config.starts == "grid":
        headline += " of " + " x ".join(map(str, config.grid))
    return Evaluation(to_dict(config), policies, headline, starts)


def to_resume(config: Config) -> Path:
    """The folder of the evaluation to go on with. Raises DataError where there is none."""
    run = Path(config.run)
    folder = Path(config.output) if config.output else newest(run) or run / "evaluations"
    if not (folder / "eval.json").exists():
        raise DataError(f"{folder}: holds no evaluation to go on with; leave resume=true out")
    return folder


def unfinished(config: Config, folder: Path) -> tuple[Evaluation, Config]:
    """The evaluation that was cut short, and the config that it was begun with."""
    evaluation = Evaluation.load(folder)
    if evaluation.complete and reported(folder):
        raise DataError(f"{folder}: is complete; leave resume=true out for a new evaluation")
    begun = from_dict(Config, evaluation.config, str(folder / "eval.json"))
    for name, it in evaluation.policies.items():
        if it.run == begun.run:  # the run folder may have been moved since
            evaluation.policies[name] = it = replace(it, run=config.run)
        if contestant(Path(it.run), it.checkpoint) != it:
            raise DataError(f"{folder}: {it.checkpoint} of {it.run} is not the checkpoint that it was begun with")
    return evaluation, replace(begun, run=config.run, page=config.page, page_port=config.page_port)


def contestant(run: Path, name: str) -> Contestant:
    """A checkpoint of a run, by number, `last` or `best`. Raises DataError where it is not there, else ConfigError."""
    if not re.fullmatch(r"last|best|[0-9]+(-[0-9]+)?", name):
        raise ConfigError(
            f"checkpoint: got {name!r}, must be last, best or a number; for one of another run write its folder and a "
            f"colon before that: against={name or 'outputs/other'}:last"
        )
    folder = find_checkpoint(run, name) if name in ("last", "best") else run / "checkpoints" / name.zfill(6)
    if not folder.exists():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("[0-9]*")))
        raise DataError(f"{folder}: is not there; checkpoints of this run: {there or 'none'}, or last")
    about = read_json(folder / "schema.json", DataError)
    return Contestant(str(run), folder.name, about["step"], about["sha256"]["model.safetensors"])


def load_driver(run: Path, trained: Trained, it: Contestant, first: Driver | None = None) -> Driver:
    """A contestant's policy, of `run` like the `first`, or of another run that was trained on the same task."""
    own = trained if Path(it.run) == run else Trained.of(Path(it.run))
    here, there = to_dict(trained.env), to_dict(own.env)
    apart = [f"{k} {there[k]} there, {here[k]} here" for k in here if k not in FREE and there[k] != here[k]]
    if apart:
        raise ConfigError(f"against: {it.run} was trained with another env: {'; '.join(apart)}; compare on one task")
    sac, schema = own.sac, trained.schema
    eyes = first.eyes if first is not None and own is trained else None
    eyes = eyes or Eyes(own.encoder, Path(it.run) / "reward", schema, 0, 0, 0, "cpu", sac.n_obs_steps, sac.features)
    agent = Sac(sac, len(schema["cameras"]), size=schema["image"]["image_size"] // STRIDE)
    folder = Path(it.run) / "checkpoints" / it.checkpoint
    agent.load_tensors(load_checkpoint(folder, schema, eyes.trunk_hash).tensors)
    return Driver(agent.policy.eval(), eyes)


def evaluate(
    env: Env,
    rig: Rig,
    drivers: dict[str, Driver],
    judges: Judges,
    evaluation: Evaluation,
    std_scale: float = 0.0,
    keep: Callable[[], None] = lambda: None,
    film: Film | None = None,
) -> None:
    """Run what is left of an evaluation; `keep` is called whenever an episode counts, or is judged otherwise.

    One that is aborted, dropped with a key, or taken over by a person is run again. The keys of the reset after an
    episode speak of it; after the last one the arm holds for a while, to hear them.
    """
    env.detector, done = judges, evaluation.episodes
    fresh, aborts = False, 0  # fresh: keys still speak of the last episode
    with Progress("evaluate", len(evaluation.turns()), "episode", rig.page) as progress:
        while (turn := evaluation.next_turn()) is not None or fresh:
            try:
                observation, pressed = (None, last_word(env)) if turn is None else go_to(env, rig, turn[1], evaluation)
                corrected = fresh and evaluation.correct(pressed)
                fresh = False
                if corrected:
                    keep()
                if "quit" in pressed:
                    return
                if turn is None or observation is None or (corrected and "redo" in pressed):
                    continue
                result = run_one(env, rig, drivers[turn[0]], judges, evaluation, turn, observation, std_scale, film)
            except EpisodeAborted as error:
                aborts = rig.teleop.drop(error, aborts)
                result = "aborted"
            if result == "quit":
                return
            if isinstance(result, str):
                evaluation.repeat(result)
                continue
            done.append(result)
            fresh, aborts = True, 0
            keep()
            wins = {other: [one.success for one in done if one.policy == other] for other in drivers}
            told = {other if len(wins) > 1 else "success": f"{sum(won)}/{len(won)}" for other, won in wins.items()}
            progress.update(len(done), **told)


def go_to(env: Env, rig: Rig, start: Start, evaluation: Evaluation) -> tuple[Observation, frozenset[str]]:
    """Bring arm and scene to a start; what is seen there, and the keys pressed on the way."""
    rig.start_over(start.seed)
    rig.teleop.hear(EVALUATION)
    place = where(start, len(evaluation.starts)) if rig.verdict is None else None
    return env.reset(start=np.array(start.tool), place=place)


def run_one(
    env: Env, rig: Rig, driver: Driver, judges: Judges, evaluation: Evaluation, turn: tuple[str, Start],
    observation: Observation, std_scale: float, film: Film | None,
) -> Result | str:  # fmt: skip
    """One episode from its first observation on; or why it does not count: what is cut off is no failure."""
    name, start = turn
    if film is not None:
        film.begin(f"episode {start.number} of {len(evaluation.starts)}", evaluation.title(name))
    object_at = placed(rig, start)
    rig.teleop.hear(POLICY_STARTS)
    step, helped = drive(env, driver, observation, start.seed, std_scale, film)
    if "quit" in step.events:
        return "quit"
    if helped:
        rig.teleop.hear(DROPPED.about(TAKEN_OVER))
        return "taken over"
    if "redo" in step.events:
        return "dropped by the person"
    result = judge(name, start.number, observation, object_at, step, judges, env.reward)
    if film is not None:
        film.keep(evaluation.name(result), "SUCCESS" if result.success else "FAIL", result.success)
    return result


def drive(
    env: Env, driver: Driver, observation: Observation, seed: int, std_scale: float, film: Film | None
) -> tuple[Step, bool]:  # fmt: skip
    """Let a policy drive to the end of an episode; its last step, and whether a person drove, too."""
    noise = torch.Generator().manual_seed(seed)
    driver.eyes.reset()
    if film is not None:
        film.add(observation, None, env.teleop.driver)
    helped, ended = False, False
    while not ended:
        action = driver.policy.act(driver.eyes.look(observation), observation.state, std_scale, noise)
        step = env.step(action)
        observation = step.observation
        if film is not None:
            film.add(observation, step, env.teleop.driver)
        helped = helped or step.by_human
        ended = step.terminated or step.truncated or bool(step.events & {"end", "redo", "quit"})
    return step, helped


def judge(
    policy: str, start: int, first: Observation, object_at: list[float], step: Step, judges: Judges, reward: RewardSpec
) -> Result:  # fmt: skip
    """What came of an episode from its `first` observation to its last `step`."""
    person = False if "failure" in step.events else True if "success" in step.events else None
    world, classifier = judges.world_at, judges.classifier_at
    ended = "time out" if step.truncated else "the end key"
    if person is not None:
        ended = f"the {'success' if person else 'failure'} key"
    elif step.terminated or world is not None:
        ended = "success"
    steps = world or judges.steps
    result = Result(
        policy=policy, start=start, tool=[float(x) for x in first.state[TOOL_XYZ]], object=object_at, steps=steps,
        reward=reward.of(classifier is not None) + (steps - 1) * reward.of(False), success=False,
        world=None if judges.world is None else world is not None, classifier=classifier is not None, person=person,
        ended=ended, seconds=round(step.observation.time - first.time, 3), time=round(time.time(), 3),
        probability=list(judges.probability), vetoed=judges.vetoed,
    )  # fmt: skip
    result.settle()
    return result


def last_word(env: Env) -> frozenset[str]:
    """Hold the arm for a while after the last episode, as no reset follows it; the keys pressed."""
    seconds = max(VERDICT_S, env.config.reset_time_s)
    env.teleop.hear(LAST_WORD.about(f"{seconds:g}"))
    until = env.clock.now() + seconds
    return env.hold(lambda: env.clock.now() >= until)


def placed(rig: Rig, start: Start) -> list[float]:
    """Where the object is: x y in m, yaw in rad; on a real arm where a person was asked to place it."""
    if rig.verdict is None:
        return start.object
    world = rig.verdict.world
    x_axis = world.cube_rotation[:, 0]
    return [float(world.cube_position[0]), float(world.cube_position[1]), math.atan2(x_axis[1], x_axis[0])]


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
