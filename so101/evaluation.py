"""What an evaluation is made of: who judges, what came of each episode, and what follows from that.

An evaluation is a folder, whose eval.json and eval.csv hold every episode from the moment it ends.
"""

import csv
import io
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from so101 import config as settings
from so101.config import option
from so101.data.lock import FolderLock
from so101.env import Detector, Observation
from so101.errors import ConfigError, DataError
from so101.files import write_atomic
from so101.robot.sound import Cue
from so101.runlog import mcnemar, paired_interval, table, wilson_interval
from so101.starts import Start

LATE = 5  # steps for which the classifier is still heard after the world has said success: it votes on several frames
VERDICT_S = 5.0  # s given to judge the last episode, where no reset follows; more if resets take longer
LAST_WORD = Cue("task", "that was the last episode: press s or f, if it was judged wrongly, within {} seconds")
TAKEN_OVER = "a person took over, so it is not the policy's; it is run again"


class Looks(Protocol):
    """The classifier with its vote: Eyes."""

    probability: float | None

    @property
    def vetoed(self) -> bool: ...
    def reset(self) -> None: ...
    def update(self, observation: Observation) -> bool: ...


class Judges:
    """The classifier, and where there is one the simulated world, on one episode; as a Detector they end it.

    The world ends it where there is one, and the classifier is then heard a little longer: both count frames.
    """

    def __init__(self, eyes: Looks, world: Detector | None) -> None:
        self.eyes, self.world = eyes, world
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        self.classifier_at: int | None = None  # the step at which it said success
        self.world_at: int | None = None
        self.vetoed = 0  # frames above the classifier's threshold that its guard refused
        self.probability: list[float] = []  # of each frame

    def reset(self) -> None:
        """An episode begins."""
        self._begin()
        self.eyes.reset()
        if self.world is not None:
            self.world.reset()

    def update(self, observation: Observation) -> bool:
        """Take in an observation; True where the episode is over for them."""
        self.steps += 1
        if self.eyes.update(observation) and self.classifier_at is None:
            self.classifier_at = self.steps
        self.vetoed += self.eyes.vetoed
        if self.eyes.probability is not None:
            self.probability.append(round(self.eyes.probability, 4))
        if self.world is None:
            return self.classifier_at is not None
        if self.world.update(observation) and self.world_at is None:
            self.world_at = self.steps
        return self.world_at is not None and (self.classifier_at is not None or self.steps >= self.world_at + LATE)


@dataclass
class Result:
    """What came of one episode, and what each judge said: None where it said nothing, or is not there."""

    policy: str = option(help="A, or B where two are compared")
    start: int = option(help="number of its start")
    tool: list[float] = option(help="where the tool was at first, x y z in m, measured")
    object: list[float] = option(help="where the object was at first: x y in m, yaw in rad; on a real arm, was to be")
    steps: int = option(help="up to the success, else to the end")
    reward: float = option(help="the return by the classifier's verdict, paid once")
    success: bool = option(help="by the judge that counts: the world, else the person, else the classifier")
    world: bool | None = option(help="the simulated world's verdict")
    classifier: bool = option(help="the learned classifier's vote, as in training")
    person: bool | None = option(help="the key that a person pressed")
    ended: str = option(help="by what")
    seconds: float = option(help="on the rig's clock")
    time: float = option(help="when it ended, Unix seconds")
    probability: list[float] = option(help="the classifier's, of each frame")
    vetoed: int = option(0, "frames above the classifier's threshold that its state guard refused")

    def __post_init__(self) -> None:
        for name in ("tool", "object"):
            if len(there := getattr(self, name)) != 3:
                raise ConfigError(f"{name}: got {there}, must be three numbers")

    def settle(self) -> None:
        """Say who is right."""
        said = [verdict for verdict in (self.world, self.person) if verdict is not None]
        self.success = said[0] if said else self.classifier


@dataclass(frozen=True)
class Contestant:
    """Which policy it was."""

    run: str = option(help="run folder")
    checkpoint: str = option(help="name of the checkpoint's folder")
    step: int = option(help="environment steps that it had learned from")
    sha256: str = option(help="of its model.safetensors")


class Pairs(NamedTuple):
    """Two policies, A and B, on the same starts."""

    both: int
    only_a: int
    only_b: int
    neither: int
    steps: list[tuple[int, int]]  # A's and B's, where both succeeded

    @classmethod
    def of(cls, a: Sequence[Result], b: Sequence[Result]) -> "Pairs":
        """Of results in the same order of starts."""
        won = [(one.success, other.success) for one, other in zip(a, b, strict=True)]
        steps = [(one.steps, other.steps) for one, other in zip(a, b, strict=True) if one.success and other.success]
        count = won.count
        return cls(count((True, True)), count((True, False)), count((False, True)), count((False, False)), steps)

    @property
    def starts(self) -> int:
        """How many there are."""
        return self.both + self.only_a + self.only_b + self.neither

    def sentences(self, a: str, b: str) -> list[str]:
        """What they say of `a` and `b`, as the policies are called."""
        if not self.starts:
            return [f"{a} and {b} have no start in common yet"]
        low, high = paired_interval(*self[:4])
        chance = mcnemar(self.only_a, self.only_b)
        beyond = "chance alone seldom does that" if chance < 0.05 else "chance alone may well do that"
        if not self.only_a + self.only_b:
            beyond = "no start tells them apart"
        said = [
            f"{a} against {b} on {self.starts} starts: both succeed on {self.both}, {a} alone on {self.only_a}, "
            f"{b} alone on {self.only_b}, neither on {self.neither}",
            f"difference in success {(self.only_a - self.only_b) / self.starts:+.0%} (95 % interval {low:+.0%} .. "
            f"{high:+.0%}); exact McNemar p = {chance:.3g}: {beyond}",
        ]
        if self.steps:
            one, other = np.mean(self.steps, axis=0)
            quicker = sum(left < right for left, right in self.steps)
            slower = sum(left > right for left, right in self.steps)
            said.append(
                f"where both succeed {a} takes {one:.1f} steps and {b} {other:.1f}; "
                f"{a} is quicker on {quicker} of these {len(self.steps)} starts, {b} on {slower}"
            )
        return said


@dataclass
class Evaluation:
    """Everything about one evaluation; eval.json holds it, and its `summary` beside."""

    config: dict[str, Any] = option(help="of infer.py, resolved")
    policies: dict[str, Contestant] = option(help="A, and where two are compared B")
    headline: str = option(help="what kind of starts")
    starts: list[Start] = option(help="in order; each is run once by each policy")
    judge: str = option("the world", "whose verdict the rates are of")
    complete: bool = option(False, "whether every start was run by every policy")
    again: dict[str, int] = option({}, "episodes that were not counted but run again, by what happened")
    episodes: list[Result] = option([], "in the order in which they ended")
    summary: dict[str, Any] = option({}, "what follows from the episodes")

    def __post_init__(self) -> None:
        if "A" not in self.policies:
            raise ConfigError(f"policies: got {', '.join(self.policies) or 'none'}, the first is called A")
        turns = [(policy, start.number) for policy, start in self.turns()]
        if strange := [one for one in self.episodes if (one.policy, one.start) not in turns]:
            raise ConfigError(f"episodes: has policy {strange[0].policy} start {strange[0].start}, none of its turns")
        self._conclude()

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """From a folder's eval.json. Raises DataError where it is missing or damaged."""
        try:
            return settings.load(cls, folder / "eval.json")
        except ConfigError as error:
            raise DataError(f"no usable evaluation: {error}") from error

    def turns(self) -> list[tuple[str, Start]]:
        """Who is to run from where, in order: the policies take turns in being the first, as the arm warms up."""
        names = list(self.policies)
        orders = itertools.cycle([names, names[::-1]])
        return [(name, start) for start, order in zip(self.starts, orders, strict=False) for name in order]

    def next_turn(self) -> tuple[str, Start] | None:
        """The first turn that no episode has counted of; None where all have."""
        ran = {(result.policy, result.start) for result in self.episodes}
        return next((turn for turn in self.turns() if (turn[0], turn[1].number) not in ran), None)

    def correct(self, pressed: frozenset[str]) -> bool:
        """Let the keys of a reset speak of the episode just ended; whether they did. Redo takes it out."""
        last = self.episodes[-1]
        if "redo" in pressed:
            self.repeat("dropped by the person")
            self.episodes.pop()
        elif pressed & {"success", "failure"}:
            last.person = "failure" not in pressed
            last.settle()
        return bool(pressed & {"redo", "success", "failure"})

    def repeat(self, why: str) -> None:
        """Count an episode that is run again."""
        self.again[why] = self.again.get(why, 0) + 1

    def of(self, policy: str) -> list[Result]:
        """A policy's results, by start."""
        return sorted((one for one in self.episodes if one.policy == policy), key=lambda one: one.start)

    def pairs(self, a: str = "A", b: str = "B") -> Pairs:
        """Two policies on the starts that both have run."""
        one, other = ({result.start: result for result in self.of(name)} for name in (a, b))
        shared = sorted(one.keys() & other.keys())
        return Pairs.of([one[number] for number in shared], [other[number] for number in shared])

    def save(self, folder: Path) -> None:
        """Write eval.csv, and eval.json, which commits it."""
        self._conclude()
        write_atomic(folder / "eval.csv", self._csv())
        write_atomic(folder / "eval.json", _json(asdict(self)))

    def _conclude(self) -> None:
        """Work out what follows from the episodes; whatever a file says of it."""
        self.complete = self.next_turn() is None
        self.judge = self._judge()
        self.summary = {"policies": {name: self._figures(name) for name in self.policies}}
        if len(self.policies) > 1:
            pairs = self.pairs()
            counts = pairs._asdict() | {"steps": np.mean(pairs.steps, axis=0).tolist() if pairs.steps else None}
            tests = {"interval": paired_interval(*pairs[:4]), "mcnemar_p": mcnemar(pairs.only_a, pairs.only_b)}
            self.summary["paired"] = counts | tests

    def _judge(self) -> str:
        if all(result.world is not None for result in self.episodes):
            return "the world"
        judged = sum(result.person is not None for result in self.episodes)
        if judged == len(self.episodes):
            return "the person"
        return f"the classifier, and the person in {judged} of {len(self.episodes)}" if judged else "the classifier"

    def _figures(self, policy: str) -> dict[str, Any]:
        results = self.of(policy)
        succeeded = sum(result.success for result in results)
        figures: dict[str, Any] = {
            "episodes": len(results), "successes": succeeded,
            "success_rate": succeeded / len(results) if results else None,
            "interval": list(wilson_interval(succeeded, len(results))),
            "steps": float(np.mean([result.steps for result in results])) if results else None,
        }  # fmt: skip
        for judge in ("world", "classifier", "person"):
            said = [verdict for result in results if (verdict := getattr(result, judge)) is not None]
            figures[judge] = {"said": len(said), "success": sum(said)}
        return figures

    def agreement(self) -> list[str]:
        """How far the judges are of one mind, pair by pair, and where they are not."""
        said = []
        for one, other in itertools.combinations(("world", "classifier", "person"), 2):
            both = [r for r in self.episodes if getattr(r, one) is not None and getattr(r, other) is not None]
            apart = [r for r in both if getattr(r, one) != getattr(r, other)]
            if both:
                names = "; not in " + ", ".join(self.name(result) for result in apart) if apart else ""
                said.append(f"{one} and {other} agree in {len(both) - len(apart)} of {len(both)}{names}")
        return said

    def name(self, result: Result) -> str:
        """What an episode is called: the number of its start, and who ran where two did."""
        return f"{result.start}{result.policy}" if len(self.policies) > 1 else str(result.start)

    def title(self, policy: str) -> str:
        """Which policy it is, in words."""
        it = self.policies[policy]
        letter = f"{policy}: " if len(self.policies) > 1 else ""
        return f"{letter}checkpoint {it.checkpoint} of {it.run}"

    def sentences(self) -> list[str]:
        """The summary."""
        said = []
        for name in self.policies:
            figures = self._figures(name)
            if count := figures["episodes"]:
                low, high = figures["interval"]
                said.append(
                    f"{self.title(name)}: {figures['successes']} of {count} succeed = {figures['success_rate']:.0%} "
                    f"(95 % interval {low:.0%} .. {high:.0%}), judged by {self.judge}; "
                    f"{figures['steps']:.1f} steps an episode"
                )
        said += self.agreement()
        if vetoed := [result for result in self.episodes if result.vetoed]:
            said.append(
                f"frames above the classifier's threshold that the guard vetoed: {sum(r.vetoed for r in vetoed)}, "
                f"episode {', '.join(map(self.name, vetoed))}; height or opening was as in no success it was trained on"
            )
        if len(self.policies) > 1:
            said += self.pairs().sentences("A", "B")
        if self.again:
            said.append("run again: " + ", ".join(f"{count} {why}" for why, count in self.again.items()))
        if not self.complete:
            said.append(
                f"PARTIAL: {len(self.episodes)} of {len(self.turns())} episodes; resume=true goes on with the rest"
            )
        return said

    def rows(self, policy: str) -> list[list[Any]]:
        """A policy's table, see COLUMNS."""
        return [
            [r.start, r.steps, f"{r.reward:.2f}", "SUCCESS" if r.success else "FAIL",
             _said(r.world), _said(r.classifier) + f" ({r.vetoed} vetoed)" * bool(r.vetoed), _said(r.person),
             " ".join(f"{round(x, 3) + 0:.3f}" for x in r.tool)]  # + 0: no -0.000
            for r in self.of(policy)
        ]  # fmt: skip

    def print(self) -> None:
        """The tables, a policy each, and the summary."""
        for name in self.policies:
            count = len(self.of(name))
            print(f"\n{self.title(name)}, {self.headline} ({count} episodes)")
            print(table(COLUMNS, self.rows(name)))
        print("", *self.sentences(), sep="\n")

    def _csv(self) -> str:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(CSV_COLUMNS)
        for r in self.episodes:
            verdicts = ("" if said is None else int(said) for said in (r.success, r.world, r.classifier, r.person))
            rows.writerow([
                r.policy, r.start, *(f"{x:.4f}" for x in r.tool + r.object), r.steps, f"{r.reward:.4f}", *verdicts,
                r.vetoed, r.ended, f"{r.seconds:.2f}", f"{r.time:.0f}",
            ])  # fmt: skip
        return text.getvalue()


COLUMNS = ["episode", "steps", "reward", "result", "world", "classifier", "person", "start (x y z, m)"]
CSV_COLUMNS = [
    "policy", "start", "tool_x", "tool_y", "tool_z", "object_x", "object_y", "object_yaw", "steps", "reward",
    "success", "world", "classifier", "person", "vetoed", "ended", "seconds", "time",
]  # fmt: skip


def _json(content: dict[str, Any]) -> str:
    """An object to read: what is listed takes a line each."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
        if isinstance(value, list) and value:
            text = "[\n    " + ",\n    ".join(json.dumps(item, allow_nan=False) for item in value) + "\n  ]"
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _said(verdict: bool | None) -> str:
    return "-" if verdict is None else "yes" if verdict else "no"


def begin(run: Path, output: str | None) -> Path:
    """A new folder for an evaluation: the next number in the run's `evaluations`, or `output`."""
    numbers = itertools.count(len(all_of(run)) + 1)
    while True:
        folder = Path(output) if output else run / "evaluations" / f"{next(numbers):03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # a number may be of one that runs now, or was killed in its first episode
            if output:
                raise DataError(f"{folder}: exists and is never overwritten; name another output") from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other programs out of an evaluation's folder; afterwards one without an episode is gone, or holds no more
    than a flight record. Raises DataError where another is at work in it.
    """
    try:
        with ExitStack() as stack:
            stack.callback(FolderLock(folder).release)
            yield
    finally:
        if not (folder / "eval.json").exists():
            for part in ("clips", "frames"):
                shutil.rmtree(folder / part, ignore_errors=True)
            with suppress(OSError):
                for part in ("eval.csv", ".lock"):
                    (folder / part).unlink(missing_ok=True)
                folder.rmdir()


def all_of(run: Path) -> list[Path]:
    """The folders of a run's evaluations that hold an episode, oldest first."""
    found = [path.parent for path in (run / "evaluations").glob("*/eval.json")]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))  # 1000 comes after 999


def newest(run: Path) -> Path | None:
    """The folder of a run's newest evaluation; None where there is none."""
    return next(reversed(all_of(run)), None)
