"""The main job over several seeds, and the paper's ablations of it: demonstrations only, neither.

    python tests/bench/bench_lift.py                           5 seeds x 3 kinds, some hours on two cores
    python tests/bench/bench_lift.py kinds='["full"]' seeds='[0]' output=outputs/bench_lift encoder=FILE

Each run is train_sac.py's own `main` in a process of its own, with the demonstrations and the classifier of its seed.
Without interventions nobody steps in; with neither, the demonstrations give only what a policy's input is normalised
by: replay holds none of them. What is done is kept in `output`, so an interrupted comparison goes on.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import json
import multiprocessing
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import train_sac
from so101.config import launch, option
from so101.data.dataset import open_dataset
from so101.evaluation import Evaluation, newest
from so101.files import write_atomic
from so101.plots import curve
from so101.runlog import read_metrics, table, wilson_interval

KINDS = ("full", "demonstrations", "neither")
CALLED = {"full": "stepping in", "demonstrations": "demonstrations only", "neither": "neither"}


@dataclass
class Config:
    """What to compare."""

    output: str = option("outputs/bench_lift", "folder of all runs; those that are done are not repeated")
    seeds: list[int] = option([0, 1, 2, 3, 4], "seeds, each with its own demonstrations")
    kinds: list[str] = option(list(KINDS), "full: with interventions; demonstrations: without; neither")
    steps: int = option(train_sac.Config().steps, "environment steps of each run")
    encoder: str | None = option(None, "ResNet10 weight file; null: a seeded random start")


def main(config: Config) -> None:
    """Run what is missing, and print the table."""
    spawn, rows = multiprocessing.get_context("spawn"), []
    for kind in config.kinds:
        results = []
        for seed in config.seeds:
            result = Path(config.output) / f"{kind}{seed}.json"
            if not result.exists():
                process = spawn.Process(target=run, args=(config, kind, seed, result))
                process.start()
                process.join()
            if not result.exists():
                raise SystemExit(f"{result.with_suffix('.log')}: says why the run failed")
            results.append(json.loads(result.read_text()))
            rows.append([kind, seed, *row_of([results[-1]])])
        rows.append([kind, "all", *row_of(results)])
    print(table(["kind", "seed", "success", "95 %", "steps", "helped", "env. steps", "seconds"], rows))
    picture = Path(config.output) / "curve.svg"
    write_atomic(picture, curves(config))
    print(picture)


def curves(config: Config) -> str:
    """How often the policy succeeded without help while it trained: SVG, the mean over the seeds."""
    steps = np.arange(0, config.steps + 1, 25)
    series = {}
    for kind in config.kinds:
        metrics = [read_metrics(Path(config.output) / f"{kind}{seed}") for seed in config.seeds]
        known = [(np.array(m["step"]), np.array(m["success_alone_last_20"])) for m in metrics]
        of_seeds = [np.interp(steps, x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in known]
        series[f"{CALLED[kind]}, mean of {len(of_seeds)} seeds"] = (steps, np.mean(of_seeds, axis=0))
    return curve("success alone, of the last 20 episodes", "environment step", "", series)


def row_of(results: list[dict[str, Any]]) -> list[str]:
    """Success with its interval, steps an episode, share of training steps that a person drove, steps, time."""
    done, tried = sum(r["successes"] for r in results), sum(r["episodes"] for r in results)
    low, high = wilson_interval(done, tried)
    mean = {name: float(np.mean([r[name] for r in results])) for name in ("steps", "helped", "env_steps", "seconds")}
    return [
        f"{done} of {tried}", f"{low:.0%} .. {high:.0%}", f"{mean['steps']:.1f}", f"{mean['helped']:.1%}",
        f"{mean['env_steps']:.0f}", f"{mean['seconds']:.0f}",
    ]  # fmt: skip


def run(config: Config, kind: str, seed: int, result: Path) -> None:
    """One training with its evaluation; what it prints goes to a log beside the result."""
    folder = result.with_suffix("")
    wanted = train_sac.Config(
        output=str(folder), steps=config.steps, seed=seed, encoder=config.encoder,
        demonstrations=str(folder.with_name(f"demos{seed}")), reward_model=str(folder.with_name(f"reward{seed}")),
        resume=folder.exists(),
    )  # fmt: skip
    wanted.rig.operator.interventions = kind == "full"
    if kind == "neither":
        make_learner = train_sac.make_learner

        def without_demonstrations(*args: Any) -> Any:
            learner = make_learner(*args)
            learner.replay.starts[: learner.replay.demo_capacity] = False
            return learner

        train_sac.make_learner = without_demonstrations
    result.parent.mkdir(parents=True, exist_ok=True)
    with open(result.with_suffix(".log"), "a") as log, redirect_stdout(log):
        train_sac.make_missing(wanted)
        started = time.monotonic()
        train_sac.main(wanted)
        seconds = time.monotonic() - started
    evaluated = newest(folder)
    if evaluated is None:
        raise SystemExit(f"{folder}: the run ended without an evaluation")
    episodes = Evaluation.load(evaluated).episodes
    columns = [episode.columns() for episode in open_dataset(folder / "episodes").episodes]
    helped = np.concatenate([c["complementary_info.is_intervention"] for c in columns])
    told = {
        "successes": sum(episode.success for episode in episodes), "episodes": len(episodes),
        "steps": float(np.mean([episode.steps for episode in episodes])),
        "helped": float(helped.mean()), "env_steps": len(helped), "seconds": seconds,
    }  # fmt: skip
    write_atomic(result, json.dumps(told) + "\n")


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
