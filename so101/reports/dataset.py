"""The report of a dataset, beside it: what was recorded and how it is labelled, what is wrong with it, how it looks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from so101.config import flat
from so101.data.dataset import Dataset, Episode, open_dataset
from so101.data.labels import Labels, beside, frames_wanted, labels_path, load_labels
from so101.data.lint import LATE, Finding, Linter
from so101.errors import DataError
from so101.files import read_json
from so101.plots import HALF, curve, film_strip, html_table, write_report
from so101.reports.head import Run, Section, bullets, changes, head, modified, runs_before
from so101.runlog import Progress, duration
from so101.schema import ACTION, STATE, TOOL_XYZ
from so101.tools.lint import ROBOT, shortened

STRIPS = 100  # film strips at most, 25 KB each
STRIP_PX = 78  # so that eight frames of 4:3 fill the page
STRIP_FRAMES = 7  # evenly from the first to the last; the first success joins them
LONG_TABLE = 100  # rows from which on a table is folded
BINS = 21  # edges of the actions' histogram
SUCCESS, FAILURE, UNLABELLED = "#009e73", "#d55e00", "#999999"
KINDS = {"success": SUCCESS, "failure": FAILURE, "unlabelled": UNLABELLED, "left out": "#cccccc"}


@dataclass(eq=False)
class Facts:
    """What the report says of one episode. `success` (observations,) bool; None where it is unlabelled or left out."""

    episode: Episode
    label: str
    kind: str  # of KINDS
    success: np.ndarray | None
    seconds: float = np.nan
    by_human: float = np.nan  # share of its steps
    late: int | None = None  # ticks of more than LATE periods
    slowest: float = np.nan  # tick, in periods
    start: np.ndarray = field(default_factory=lambda: np.full(3, np.nan))  # (3,) m, where the tool was first
    actions: np.ndarray = field(default_factory=lambda: np.zeros((0, len(ACTION))))  # (T, 4)


def write_dataset_report(
    folder: Path, script: str, began: float, config: Any, seen: Sequence[Finding] = ()
) -> None:  # fmt: skip
    """Write `<folder>.report.html` beside a dataset, and say so; `seen` are findings in pictures that passed by."""
    started, path = time.monotonic(), beside(folder, "report.html")
    dataset = open_dataset(folder)
    labels = load_labels(folder, dataset.observations)
    own = beside(folder, "record.json")
    recorded = read_json(own, DataError) if own.exists() else {}
    locked = (recorded.get("env") or {}).get("locked_joints") or ()
    linter = Linter(dataset, replace(ROBOT, locked=tuple(locked)))
    facts = [facts_of(episode, labels) for episode in dataset.episodes]
    with Progress("report", len(facts), "episode") as progress:
        findings = [*seen, *read_all(facts, labels, linter, progress)]
    left_out = {each.episode.index for each in facts if each.kind == "left out"}
    findings = [found for found in dict.fromkeys(findings) if found.episode not in left_out]
    rows = f"<p>A late tick took more than {LATE} periods; slowest is the longest, in periods.</p>"
    rows += html_table(*episode_table(facts))
    sections = [
        head(script, began, config, {"dataset": folder, "labels": labels_path(folder)}),
        ("What is in it", summary(dataset, facts)),
        compared(folder, recorded, figures(dataset, facts)),
        (
            "What is wrong with it",
            bullets(shortened(findings), "Nothing was found.")
            + "<p>Told from the numbers, and from pictures where they were seen as they were recorded. "
            f"<code>python -m so101.tools.lint {escape(str(folder))}</code> looks at every frame.</p>",
        ),
        ("Lengths, start poses and actions", plots(facts, linter.known)),
        ("Episodes in pictures", strips(facts, {f.episode for f in findings if f.episode is not None})),
        ("Episodes in numbers", folded(rows, f"{len(facts)} episodes") if len(facts) > LONG_TABLE else rows),
    ]
    write_report(path, f"{script}: {folder.name}", sections)
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s)")


def read_all(
    facts: Sequence[Facts], labels: Labels | None, linter: Linter, progress: Progress
) -> list[Finding]:  # fmt: skip
    """Complete the facts from the rows, and say what lint finds in these. No picture is looked at, 2 ms each."""
    findings = []
    for done, each in enumerate(facts, 1):
        look_at(each, linter.known)
        if each.kind != "left out":
            label = labels.episodes.get(each.episode.index) if labels else None
            findings += linter.episode(each.episode, label, pictures={})
        progress.update(done)
    return findings + linter.compared()


def facts_of(episode: Episode, labels: Labels | None) -> Facts:
    """What the metadata and the labels say of an episode."""
    label = labels.episodes.get(episode.index) if labels is not None else None
    success = None if label is None or label.skip else label.success(episode.observations)
    kind = "unlabelled" if label is None else "left out"
    if success is not None:
        kind = "success" if success.any() else "failure"
    return Facts(episode, str(label or "-"), kind, success, episode.length / episode.fps)


def look_at(facts: Facts, known: bool) -> None:
    """Read what its rows say; what cannot be read stays unknown, as lint says what is damaged.

    `known`: whether its state and action are this program's.
    """
    episode = facts.episode
    try:
        columns = episode.columns()
    except DataError:
        return
    if (by_human := columns.get("complementary_info.is_intervention")) is not None:
        facts.by_human = float(by_human.mean())
    times = columns.get("capture_time")
    if times is not None and len(times) > 1 and np.isfinite(times).all():
        periods = np.diff(times) * episode.fps
        facts.late, facts.slowest = int((periods > LATE).sum()), float(periods.max())
        facts.seconds = float(times[-1] - times[0] + 1 / episode.fps)
    if known and columns.get("observation.state", np.zeros(0)).shape[1:] == (len(STATE),):
        facts.start = columns["observation.state"][0, TOOL_XYZ].astype(float)
    if known and columns.get("action", np.zeros(0)).shape[1:] == (len(ACTION),):
        facts.actions = columns["action"].astype(float)


def figures(dataset: Dataset, facts: Sequence[Facts]) -> dict[str, Any]:
    """The main figures, as two recordings are compared by."""
    seen = [f.success for f in facts if f.success is not None]
    kinds = [sum(f.kind == kind for f in facts) for kind in KINDS]
    return {
        "episodes": len(facts),
        ", ".join(KINDS): ", ".join(map(str, kinds)),
        "length": duration(sum(episode.length for episode in dataset.episodes) / dataset.fps),
        "frames": sum(dataset.observations),
        "positive frames": sum(int(success.sum()) for success in seen),
        "negative frames": sum(int((~success).sum()) for success in seen),
    }


def summary(dataset: Dataset, facts: Sequence[Facts]) -> str:
    """The counts, against what a classifier wants; tasks and lateness."""
    counts = figures(dataset, facts)
    wanted = [
        [*each[:3], f"{each.missing} to go" if each.missing else "enough"]
        for each in frames_wanted(counts["positive frames"], counts["negative frames"])
    ]
    late = [f.late for f in facts if f.late is not None]
    ticks = (
        f"{sum(late)} of {sum(f.episode.length for f in facts)} took more than {LATE} periods" if late else "unknown"
    )
    if late:
        ticks += f", the slowest {max(f.slowest for f in facts if f.late is not None):.2f}"
    tasks = list(dict.fromkeys(episode.task for episode in dataset.episodes))
    rows = [["task", "; ".join(tasks)], *map(list, counts.items()), ["ticks", ticks]]
    rows.append(["cameras", ", ".join(f"{name} {w} x {h}" for name, (h, w) in dataset.cameras.items())])
    rows.append(["rate", f"{dataset.fps:g}/s"])
    return (
        html_table(["", ""], [[name, str(value)] for name, value in rows])
        + "<p>What a reward classifier wants:</p>"
        + html_table(["labelled frames", "there are", "wanted", ""], wanted)
    )


def compared(folder: Path, recorded: dict[str, Any], counts: Mapping[str, Any]) -> Section:
    """What changed against the recording before this one, by the configs that record.py leaves beside them.

    `recorded` is this one's, {} where another program recorded it.
    """

    def before() -> Run | None:
        own = beside(folder, "record.json")
        began = modified(own) if recorded else 0.0
        for path, held in runs_before(own, began, recorded, "*.record.json", lambda held: held, modified):
            other = path.with_name(path.name.removesuffix(".record.json"))
            if other.is_dir():
                dataset = open_dataset(other)
                labels = load_labels(other, dataset.observations)
                facts = [facts_of(episode, labels) for episode in dataset.episodes]
                return Run(other.name, settings(held), figures(dataset, facts))
        return None

    return changes(Run(folder.name, settings(recorded), counts), before)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """A recording's settings but for its name."""
    return {key: value for key, value in flat(config).items() if key != "dataset"}


def plots(facts: Sequence[Facts], known: bool) -> str:
    """Length of each episode; and where this program recorded them, start poses and how often each action was given."""

    def dots(title: str, x: str, y: str, values: Sequence[tuple[float, float]]) -> str:
        series = {}
        for kind in KINDS:
            places = [value for value, f in zip(values, facts, strict=True) if f.kind == kind]
            if places:
                series[kind] = tuple(zip(*places, strict=True))
        colours = [KINDS[kind] for kind in series]
        return curve(title, x, y, series, width=HALF, joined=False, colours=colours)  # type: ignore[arg-type]

    drawn = dots("length of each episode", "episode", "length, s", [(f.episode.index, f.seconds) for f in facts])
    if not known:
        return drawn + "<p>This program did not record it, so what its states and actions mean is not known.</p>"
    drawn += dots("start of the tool, from above", "x, m", "y, m", [(f.start[0], f.start[1]) for f in facts])
    drawn += dots("start of the tool, from the side", "x, m", "z, m", [(f.start[0], f.start[2]) for f in facts])
    actions, edges = np.concatenate([np.zeros((0, len(ACTION))), *(f.actions for f in facts)]), np.linspace(-1, 1, BINS)
    steps = {}
    for name, values in zip(ACTION, actions.T, strict=True):
        counts = np.histogram(values.clip(-1, 1), edges)[0]
        share = counts / max(1, counts.sum())
        steps[name] = (np.repeat(edges, 2).tolist(), [0.0, *np.repeat(share, 2).tolist(), 0.0])
    return drawn + curve("share of the steps by action", "action, of its full step", "share", steps, width=HALF)


def strips(facts: Sequence[Facts], found: set[int]) -> str:
    """A film strip of each episode, of at most STRIPS; those with findings first, the others evenly."""
    chosen = facts
    said = (
        "<p>The bar under a frame is <b style='color: #00795a'>green</b> where it is labelled a success, "
        "<b style='color: #b34e00'>orange</b> where it is not, and grey where nothing is said.</p>"
    )
    if len(facts) > STRIPS:
        first = [f for f in facts if f.episode.index in found][: STRIPS // 2]
        rest = [f for f in facts if f not in first]
        picked = np.linspace(0, len(rest) - 1, STRIPS - len(first)).astype(int)
        chosen = sorted([*first, *(rest[i] for i in picked)], key=lambda f: f.episode.index)
        said += (
            f"<p>{STRIPS} of {len(facts)} episodes, evenly, with {len(first)} of which something was found. "
            "The page of label.py shows any of them.</p>"
        )
    shown = []
    for f in chosen:
        frames = set(np.linspace(0, f.episode.observations - 1, STRIP_FRAMES).round().astype(int).tolist())
        success = f.success if f.success is not None else None
        if success is not None and success.any():
            frames.add(int(success.argmax()))
        marks = [UNLABELLED if success is None else SUCCESS if success[i] else FAILURE for i in sorted(frames)]
        shown.append(episode_strip(f.episode, sorted(frames), marks, f"{f.kind}, label {f.label}"))
    return said + "\n".join(shown)


def episode_strip(
    episode: Episode, frames: Sequence[int], marks: Sequence[str | None], words: str, height_px: int = STRIP_PX
) -> str:
    """Some frames of an episode with a line about it above; one strip for each camera.

    Where they cannot be read, the sentence that says why.
    """
    caption = f"episode {episode.index}: {words}; frames {', '.join(map(str, frames))} of {episode.observations}"
    pictures = []
    for camera in episode.cameras:
        try:
            pixels = [episode.frame(camera, frame) for frame in frames]
            pictures.append(film_strip(pixels, height_px, f"{caption}, camera {camera}", marks))
        except DataError as problem:
            pictures.append(f"<p>{escape(str(problem))}</p>")
    return f"<figure><figcaption>{escape(caption)}</figcaption>{''.join(pictures)}</figure>"


def episode_table(facts: Sequence[Facts]) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows, one for each episode."""
    headers = [
        "episode", "steps", "s", "label", "positive", "negative", "by a person", "late ticks", "slowest"
    ]  # fmt: skip
    rows = []
    for f in facts:
        yes = None if f.success is None else int(f.success.sum())
        no = None if f.success is None else int((~f.success).sum())
        driven = None if np.isnan(f.by_human) else f"{f.by_human:.0%}"
        rows.append(
            [f.episode.index, f.episode.length, f"{f.seconds:.1f}", f.label, yes, no, driven, f.late, f.slowest]
        )
    return headers, rows


def folded(content: str, summary: str) -> str:
    """HTML that opens at a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
