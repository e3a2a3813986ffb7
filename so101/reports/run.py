"""The report of a training run: how it went, what went wrong, curves, checkpoints, and some episodes in pictures."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from so101.config import flat, to_dict
from so101.data.dataset import Dataset, Episode, open_dataset
from so101.data.labels import Labels, load_labels
from so101.errors import DataError
from so101.evaluation import COLUMNS, Evaluation, newest
from so101.monitor import LAST
from so101.plots import HALF, WIDTH, curve, html_table, write_report
from so101.reports.dataset import STRIP_FRAMES, episode_strip, folded
from so101.reports.head import Run, Section, bullets, changes, head, modified, runs_before, time_of_day
from so101.runlog import as_number, duration, read_events, read_metrics, read_rows

SHOWN = 9  # online episodes in pictures, evenly from the first to the last
OVERRULED = 24  # episodes whose verdict a person corrected, the newest
LAST_FRAMES = 4  # of such an episode: the votes that ended it, and the frame before them
LONG = 30  # rows of a table from which on it is folded
POLICY, PERSON = "#0072b2", "#e69f00"

# What a group of curves tells, and its plots: a title and columns of metrics.csv.
CURVES: tuple[tuple[str, str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    ("Success", "Alone is without help: that curve is the policy's own. Before 20 episodes are over, it is of those "
    "so far. Episodes get shorter as it learns.", (
        ("share of the last 20 episodes", ("success_last_20", "success_alone_last_20", "evaluated_success")),
        ("steps of an episode", ("episode_steps", "evaluated_steps")),
        ("successes in 100 steps", ("reward_rate",)),
    )),
    ("Help", "A person's share should fall to nothing. Help works best in short pieces.", (
        ("share of the steps that a person drove", ("intervention_share",)),
        ("steps of an intervention", ("intervention_length",)),
    )),
    ("Values", "Q stays below what a policy can earn at most, which is where its share is 1, and near its target.", (
        ("value", ("q", "q_max", "td_target")),
        ("highest value, of what is possible", ("q_share",)),
        ("spread of the critics' values", ("q_spread",)),
        ("loss of the critics", ("critic_loss",)),
        ("loss of the actor", ("actor_loss",)),
    )),
    ("Exploration", "The entropy comes up to its target as the temperature settles.", (
        ("entropy", ("entropy",)),
        ("temperature", ("temperature",)),
        ("size of the policy's actions", ("action_size",)),
    )),
    ("Light", "In standard deviations of the demonstrations' brightness. Beyond 3, the policy was not taught it.", (
        ("brightness of the frames", ("brightness_drift",)),
    )),
    ("Speed", "Updates done keep up with those asked for, or the learner is too slow.", (
        ("updates per step", ("utd_asked", "utd_done")),
        ("rates, 1/s", ("actor_hz", "updates_per_s")),
        ("age of the policy, s", ("policy_age",)),
    )),
)  # fmt: skip


def write_run_report(folder: Path, config: Any) -> None:
    """report.html of a run folder of train_sac.py; `config` is its Config."""
    began = begun(folder / "config.json")
    sections = [
        head("train_sac.py", began, config, {"run folder": folder}),
        ("How it went", html_table(["", ""], list(figures(folder).items()))),
        compared(folder, began, to_dict(config)),
        ("Alarms", alarms(folder)),
        *curves(read_metrics(folder)),
        ("Checkpoints", checkpoints(folder)),
        *evaluation(folder),
    ]
    if (folder / "episodes").exists():
        dataset = open_dataset(folder / "episodes")
        labels = load_labels(dataset.folder, dataset.observations)
        sections.append(("Some episodes", some_episodes(dataset, labels)))
        sections.append(("Verdicts that a person corrected", corrected(dataset, labels)))
    sections.append(("What happened", happened(folder)))
    sections.append(("Where the time went", time_split(folder)))
    write_report(folder / "report.html", f"train_sac.py: {folder.name}", sections)


def begun(config: Path) -> float:
    """When the run of a config.json was begun, in Unix seconds."""
    starts = [event["time"] for event in read_events(config.parent) if event["kind"] == "started"]
    return float(starts[0]) if starts else modified(config)


def sessions(folder: Path) -> list[float | None]:
    """Seconds of each part of the run; None where it was killed, so that nobody knows."""
    lengths: list[float | None] = []
    since = 0.0
    for event in read_events(folder):
        if event["kind"] == "started":
            since = event["time"]
            lengths.append(None)
        elif event["kind"] == "ended" and lengths:
            lengths[-1] = event["time"] - since
    return lengths


def figures(folder: Path) -> dict[str, Any]:
    """The main figures, as two runs are compared by; what is not known is None."""
    metrics = read_metrics(folder)
    ended = [row for row in read_rows(folder) if row.get("episode_steps")]

    def column(name: str) -> np.ndarray:
        return np.array([as_number(row.get(name)) for row in ended])

    def last(name: str) -> float | None:
        known = [value for value in metrics.get(name, []) if np.isfinite(value)]
        return known[-1] if known else None

    def share(value: float | None, of: str = "") -> str | None:
        return None if value is None or not np.isfinite(value) else f"{value:.0%}{of}"

    steps = column("episode_steps")
    found: dict[str, Any] = {
        "environment steps": int(steps.sum()),
        "episodes": len(ended),
        "success": share(last("success_last_20"), f" of the last {min(LAST, len(ended))}"),
        "success without help": share(last("success_alone_last_20"), f" of the last {min(LAST, len(ended))}"),
        "steps that a person drove": share((column("intervention_share") * steps).sum() / max(1, steps.sum())),
        "interventions": int(np.nansum(column("interventions"))),
        "updates": updates_made(folder, last("updates")),
    }
    if (place := newest(folder)) is not None:
        with suppress(DataError):  # a damaged one is told below
            found |= evaluated(Evaluation.load(place))
    parts = sessions(folder)
    if known := [part for part in parts if part is not None]:
        found["time"] = "at least " * (len(known) < len(parts)) + duration(sum(known))
    return found


def updates_made(folder: Path, measured: float | None) -> int | None:
    """The run's updates: those at its end, where it ended by itself. Only each 50th is `measured`."""
    ends = [event for event in read_events(folder) if event["kind"] in ("started", "ended")]
    known = [] if measured is None else [int(measured)]
    return max([*known, *(event["updates"] for event in ends[-1:] if event["kind"] == "ended")], default=None)


def compared(folder: Path, began: float, config: dict[str, Any]) -> Section:
    """What changed against the run begun before this one, among the neighbours of its folder."""

    def before() -> Run | None:
        for path, held in runs_before(folder, began, config, "*/config.json", lambda held: held, begun):
            return Run(path.parent.name, flat(held), figures(path.parent))
        return None

    return changes(Run(folder.name, flat(config), figures(folder)), before)


def curves(metrics: Mapping[str, Sequence[float]]) -> list[Section]:
    """The groups of which anything was measured."""
    groups: list[Section] = []
    for heading, words, plots in CURVES:
        drawn: list[str] = []
        for title, names in plots:
            series = {name.replace("_", " "): (metrics["step"], metrics[name]) for name in names if name in metrics}
            if series:
                width = HALF if groups or drawn else WIDTH  # the first is what everybody looks for
                drawn.append(curve(title, "environment step", "", series, width=width))
        if drawn:
            groups.append((heading, f"<p>{escape(words)}</p>" + "\n".join(drawn)))
    return groups


def alarms(folder: Path) -> str:
    """Each alarm with its step."""
    rows = [[time_of_day(e["time"]), e["step"], e["said"]] for e in read_events(folder) if e["kind"] == "alarm"]
    return long_table(["time", "step", "alarm"], rows, "There was none.")


def happened(folder: Path) -> str:
    """Every event in words, with the step where it is known."""
    at = {row["episode"]: row["step"] for row in read_rows(folder) if row.get("episode")}
    rows = [[time_of_day(event["time"]), *in_a_sentence(event, at)] for event in read_events(folder)]
    return long_table(["time", "step", "what"], rows, "Nothing was noted.")


def in_a_sentence(event: Mapping[str, Any], at: Mapping[str, str]) -> tuple[Any, str]:
    """The step of an event, None where it is not known, and what it was; `at` is the last step of each episode."""
    fields = {name: value for name, value in event.items() if name not in ("time", "kind")}
    match event["kind"]:
        case "started" if event["steps"] == 0:
            return 0, f"began, mode {event.get('mode')}"
        case "started":
            return event["steps"], f"went on from update {event['updates']}, mode {event.get('mode')}"
        case "ended":
            return event["steps"], "ended"
        case "alarm":
            return event["step"], f"alarm: {event['said']}"
        case "corrected":
            verdict = "a success" if event["success"] else "no success"
            return at.get(str(event["episode"])), f"a person: episode {event['episode']} was {verdict}"
        case "evaluated":
            won, steps = f"{event['successes']} of {event['episodes']}", f"{event['steps']:.1f} steps an episode"
            return int(event["checkpoint"][:6]), f"checkpoint {event['checkpoint']} evaluated: {won}, {steps}"
        case "config_change_confirmed":
            return None, f"went on with another config: {'; '.join(line.strip() for line in event['changes'])}"
        case "forgot_lost_updates":
            return None, f"{event['rows']} rows of updates that a kill undid were taken out of metrics.csv"
        case "torn_line_removed":
            return None, f"{event['file']}: its last line, torn by a kill, was removed"
        case kind:
            return fields.pop("step", None), ", ".join([kind, *(f"{name} {value}" for name, value in fields.items())])


def long_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], otherwise: str) -> str:
    """A table, folded where it is long; or a sentence where there is nothing."""
    drawn = html_table(headers, rows) if rows else f"<p>{otherwise}</p>"
    return folded(drawn, f"{len(rows)} of them") if len(rows) > LONG else drawn


def checkpoints(folder: Path) -> str:
    """What is kept of the policy, with its evaluation, the last and the best."""
    tried = {event["checkpoint"]: event for event in read_events(folder) if event["kind"] == "evaluated"}
    places = folder / "checkpoints"
    named = {name: (places / name).read_text().strip() for name in ("last", "best") if (places / name).exists()}
    rows = []
    for name in sorted(path.name for path in places.glob("[0-9]*")):
        done = tried.get(name)
        won = f"{done['successes']} of {done['episodes']}" if done else None
        what = ", ".join(kind for kind, of in named.items() if of == name)
        rows.append([name, won, done["steps"] if done else None, what])
    return long_table(["checkpoint", "success when evaluated", "steps an episode", ""], rows, "There is none yet.")


def evaluated(done: Evaluation) -> dict[str, Any]:
    """The main figures of an evaluation: of its first policy, which is the run's own."""
    figures = done.summary["policies"]["A"]
    low, high = figures["interval"]
    won = f"{figures['successes']} of {figures['episodes']}, 95 % interval {low:.0%} to {high:.0%}"
    return {"evaluation": f"{won}, judged by {done.judge}", "steps of an evaluated episode": figures["steps"]}


def evaluation(folder: Path) -> list[Section]:
    """The last evaluation, episode by episode; its own folder has its pictures."""
    place = newest(folder)
    if place is None:
        return []
    try:
        done = Evaluation.load(place)
    except DataError as problem:
        return [(f"Last evaluation: {place.name}", f"<p>{escape(str(problem))}</p>")]
    tables = [
        f"<p>{escape(done.title(policy))}, {escape(done.headline)}</p>"
        + long_table(COLUMNS, done.rows(policy), "No episode was run.")
        for policy in done.policies
    ]
    where = f"<p>Each episode in pictures: {escape(str(place / 'report.html'))}</p>"
    return [(f"Last evaluation: {place.name}", bullets(done.sentences(), "") + where + "".join(tables))]


def some_episodes(dataset: Dataset, labels: Labels | None) -> str:
    """Film strips from the first episode to the last; the bar below says who drove."""
    if not dataset.episodes:
        return "<p>There is none yet.</p>"
    shown = []
    for index in np.unique(np.linspace(0, len(dataset.episodes) - 1, SHOWN).round().astype(int)):
        episode = dataset.episodes[index]
        columns = episode.columns()
        by_human = columns["complementary_info.is_intervention"]
        frames = np.unique(np.linspace(0, episode.observations - 1, STRIP_FRAMES + 1).round().astype(int)).tolist()
        drivers = [PERSON if by_human[min(frame, episode.length - 1)] else POLICY for frame in frames]
        words = f"{verdict(columns, episode, labels)}, {by_human.mean():.0%} by a person"
        shown.append(episode_strip(episode, frames, drivers, words))
    return (
        "<p>The bar under a frame is <b style='color: #005a8e'>blue</b> where the policy drove from it, and "
        "<b style='color: #8a6000'>yellow</b> where a person did.</p>" + "\n".join(shown)
    )  # fmt: skip


def verdict(columns: Mapping[str, np.ndarray], episode: Episode, labels: Labels | None) -> str:
    """How an online episode ended: as it was recorded, or by a person's late word."""
    success = bool(columns["next.reward"].max() > 0.5)
    label = labels.episodes.get(episode.index) if labels is not None else None
    if label is not None:
        corrected = bool(label.success(episode.observations).any())
        if corrected != success:
            return f"{'success' if corrected else 'failure'}, corrected by a person"
    return "success" if success else "time out" if columns["next.truncated"][-1] else "failure"


def corrected(dataset: Dataset, labels: Labels | None) -> str:
    """The ends of the episodes where the classifier was wrong and a person said so, either way."""
    wrong: dict[bool, list[str]] = {True: [], False: []}  # by whether it had been taken for a success
    for index in sorted(labels.episodes if labels is not None else [], reverse=True):
        episode = dataset.episodes[index]
        columns = episode.columns()
        paid = bool(columns["next.reward"].max() > 0.5)
        words = verdict(columns, episode, labels)
        if words.endswith("corrected by a person"):
            frames = list(range(max(0, episode.observations - LAST_FRAMES), episode.observations))
            if len(wrong[paid]) < OVERRULED:
                wrong[paid].append(episode_strip(episode, frames, [], "its last frames", 120))
    if not any(wrong.values()):
        return "<p>Nobody corrected one.</p>"
    parts = []
    for paid, words in ((True, "Taken for a success, which a person took back"), (False, "A success that was missed")):
        if wrong[paid]:
            parts.append(f"<p>{words}:</p>" + "\n".join(wrong[paid]))
    return "\n".join(parts) + f"<p>Of each kind the newest, at most {OVERRULED}.</p>"


def time_split(folder: Path) -> str:
    """Time in all and within episodes, as far as it is known."""
    ended = [row for row in read_rows(folder) if row.get("episode_steps")]
    timed = [(float(row["episode_steps"]) - 1) / float(row["actor_hz"]) for row in ended if row.get("actor_hz")]
    parts = sessions(folder)
    rows = [
        [f"part {number}", "not known, as it did not end by itself" if length is None else duration(length)]
        for number, length in enumerate(parts, 1)
    ]
    rows.append([f"within episodes, {len(timed)} of {len(ended)} of known rate", duration(sum(timed))])
    known = [length for length in parts if length is not None]
    if parts and len(known) == len(parts) and len(timed) == len(ended):
        rows.append(["between them: resets, learning that was made up, checkpoints", duration(sum(known) - sum(timed))])
    return html_table(["", ""], rows)
