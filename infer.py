"""Run a trained policy without learning and say how often it succeeds.

    python infer.py                                    the last checkpoint of outputs/lift_sac, 50 episodes
    python infer.py run=outputs/cube checkpoint=001500 episodes=20 video=outputs/cube.mp4

Everything that the policy was trained with (rig, geometry, preprocessing, reward) comes from its run
folder. In the simulation the world judges success; the classifier's verdict is the return beside it.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import itertools
import json
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.config import from_dict, launch, option, require_within
from so101.data.video import VideoWriter
from so101.env import Env, EnvConfig
from so101.errors import ConfigError, DataError, EpisodeAborted
from so101.files import read_json, write_atomic
from so101.learn.checkpoint import find_checkpoint, load_checkpoint
from so101.learn.eyes import Eyes
from so101.learn.networks import Policy
from so101.learn.resnet10 import STRIDE
from so101.learn.sac import Sac, SacConfig
from so101.rig import Rig, RigConfig, describe_task, open_rig
from so101.robot.teleop import EVALUATION, POLICY_STARTS
from so101.runlog import Progress, table, wilson_interval
from so101.schema import Preprocess, RewardSpec
from so101.web.live_page import live_page


@dataclass
class Config:
    """Evaluating a policy."""

    run: str = option("outputs/lift_sac", "run folder of train_sac.py")
    checkpoint: str = option("last", "last, best, or a checkpoint's number: the name of its folder")
    episodes: int = option(50, "episodes to run")
    seed: int = option(10_000, "seed of the fresh scenes; training used others")
    std_scale: float = option(0.0, "share of the policy's spread to act with; 0: its mean action, 1: as in training")
    video: str | None = option(None, "mp4 file to write, of what the networks see; must not exist")
    output: str | None = option(None, "folder for eval.json; null: the run folder")
    page: bool = option(False, "show it live in the browser, on this machine alone, and act from there")
    page_port: int = option(0, "port of the page; 0: any that is free")

    def __post_init__(self) -> None:
        require_within(self, episodes=(1, 1_000_000), seed=(0, 2**31), std_scale=(0, 1))
        if not self.run:
            raise ConfigError("run: got no name; give the run folder that train_sac.py made")
        if self.video is not None and Path(self.video).suffix.lower() != ".mp4":
            raise ConfigError(f"video: got {self.video!r}, needs a name that ends in .mp4, the only kind written here")


def main(config: Config) -> None:
    """Load what was trained, run it, print and store the result."""
    run = Path(config.run)
    if config.video is not None and Path(config.video).exists():
        raise DataError(f"{config.video}: exists and is never overwritten; name another video")
    trained = Trained.of(run)
    output = Path(config.output) if config.output else run
    output.mkdir(parents=True, exist_ok=True)  # before the robot's time is spent
    schema = describe_task(trained.rig, trained.env, trained.preprocess)
    sac = trained.sac
    eyes = Eyes(trained.encoder, run / "reward", schema, 0, 0, 0, "cpu", sac.n_obs_steps, sac.features)
    policy = load_policy(run, config.checkpoint, sac, schema, eyes.trunk_hash)
    with ExitStack() as stack:
        video = None
        if config.video is not None:
            size = trained.preprocess.image_size
            width = size * len(trained.rig.cameras)
            video = stack.enter_context(closing(VideoWriter(Path(config.video), trained.env.fps, size, width)))
        page = stack.enter_context(live_page(config.page, config.page_port, "infer"))
        if page is not None:
            page.judge = eyes
        rig = stack.enter_context(open_rig(trained.rig, config.seed, page))
        env = rig.make_env(trained.env, trained.preprocess, trained.reward, config.seed, rig.verdict or eyes)
        episodes = evaluate(env, rig, policy, eyes, config.episodes, config.std_scale, video)
    report(output, episodes, rig)


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


def load_policy(run: Path, name: str, sac: SacConfig, schema: dict, trunk_hash: str) -> Policy:
    """The policy of a run's checkpoint, by number, `last` or `best`."""
    folder = find_checkpoint(run, name) if name in ("last", "best") else run / "checkpoints" / name.zfill(6)
    if not folder.exists():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("[0-9]*")))
        raise DataError(f"{folder}: is not there; checkpoints of this run: {there or 'none'}, or last")
    agent = Sac(sac, len(schema["cameras"]), size=schema["image"]["image_size"] // STRIDE)
    agent.load_tensors(load_checkpoint(folder, schema, trunk_hash).tensors)
    return agent.policy.eval()


def evaluate(
    env: Env,
    rig: Rig,
    policy: Policy,
    eyes: Eyes,
    episodes: int,
    std_scale: float,
    video: VideoWriter | None = None,
) -> list[dict[str, Any]]:
    """Run episodes; each gives its steps, return (the classifier's, paid once) and success.

    One that is aborted, or dropped with a key, is run again. Success is the world's verdict where there is one,
    else the classifier's or the person's.
    """
    generator = torch.Generator().manual_seed(0)
    results: list[dict[str, Any]] = []
    aborts = 0  # since an episode was finished
    with Progress("evaluate", episodes, "episode", rig.page) as progress:
        while len(results) < episodes:
            rig.teleop.hear(EVALUATION)
            try:
                observation, pressed = env.reset()
                if "quit" in pressed:
                    break
                rig.teleop.hear(POLICY_STARTS)
                eyes.reset()
                steps, rewarded, done = 0, False, False
                while not done:
                    step = env.step(policy.act(eyes.look(observation), observation.state, std_scale, generator))
                    observation = step.observation
                    if video is not None:
                        video.add(np.concatenate(list(observation.images), axis=1))
                    # Where the classifier is the environment's own judge it has counted this observation already.
                    rewarded = rewarded or (step.success if env.detector is eyes else eyes.update(observation))
                    steps += 1
                    done = step.terminated or step.truncated or bool(step.events & {"end", "redo", "quit"})
            except EpisodeAborted as error:
                aborts = rig.teleop.drop(error, aborts)
                continue
            aborts = 0
            if "quit" in step.events:  # what was cut off is no failure of the policy
                break
            if "redo" in step.events:
                continue
            paid = env.reward.of(rewarded) + (steps - 1) * env.reward.of(False)
            results.append({"steps": steps, "return": paid, "paid": rewarded, "success": step.success})
            progress.update(len(results), success=f"{sum(r['success'] for r in results)}/{len(results)}")
    return results


def report(folder: Path, episodes: list[dict[str, Any]], rig: Rig) -> None:
    """Print the table and the rate with its 95 % Wilson interval; write eval.json."""
    if not episodes:
        return
    succeeded = sum(e["success"] for e in episodes)
    low, high = wilson_interval(succeeded, len(episodes))
    rows = [[i + 1, e["steps"], f"{e['return']:.2f}", "yes" if e["success"] else "no"] for i, e in enumerate(episodes)]
    print(table(["episode", "steps", "return", "success"], rows))
    judge = "the classifier" if rig.verdict is None else "the world"
    print(
        f"success {succeeded} of {len(episodes)} = {succeeded / len(episodes):.0%} "
        f"(95 % interval {low:.0%} .. {high:.0%}), judged by {judge}; "
        f"{np.mean([e['steps'] for e in episodes]):.1f} steps an episode; "
        f"the classifier paid in {sum(e['paid'] for e in episodes)}"
    )
    summary = {"success_rate": succeeded / len(episodes), "interval": [low, high], "judge": judge, "episodes": episodes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "eval.json"
    if path.exists():  # an earlier evaluation is kept
        number = next(n for n in itertools.count(1) if not (folder / f"eval-{n}.json").exists())
        path.rename(folder / f"eval-{number}.json")
    write_atomic(path, json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
