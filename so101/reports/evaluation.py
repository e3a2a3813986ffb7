"""The report of an evaluation: rates, judges, two policies start by start, where it fails, episodes in pictures."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from so101.config import flat
from so101.evaluation import Evaluation, Pairs, Result, all_of
from so101.film import STRIP_PX, strip_path
from so101.plots import HALF, curve, html_table, write_report
from so101.reports.dataset import FAILURE, SUCCESS
from so101.reports.head import Run, Section, bullets, changes, head, modified

SPARK = (120, STRIP_PX)  # px of the classifier's curve beside an episode's pictures
BARE = """<style>
td.strip > * { display: block; max-width: none; margin: 0; }
b.success { color: #00745a; } b.fail { color: #b34700; } .episodes td { padding-right: 0.6em; }
</style>"""


def write_evaluation_report(folder: Path, run: Path, began: float, config: Any, threshold: float) -> None:
    """report.html of an evaluation's folder; `config` is infer.py's, `threshold` the classifier's."""
    done = Evaluation.load(folder)
    about: dict[str, Any] = {"run folder": run, "evaluation": folder}
    for name, it in done.policies.items():
        about[f"policy {name}"] = f"checkpoint {it.checkpoint} of {it.run}, step {it.step}, sha256 {it.sha256[:12]}"
    about |= {"starts": f"{len(done.starts)}, {done.headline}", "success is judged by": done.judge}
    sections = [
        head("infer.py", began, config, about),
        ("How it went" if done.complete else "How it went so far", rates(done) + bullets(done.sentences(), "")),
        compared(folder, run, done),
        ("Where it succeeds", maps(done)),
        *((f"Episodes: {done.title(name)}", episodes(folder, done, name, threshold)) for name in done.policies),
    ]
    write_report(folder / "report.html", f"infer.py: {folder.name} of {run.name}", sections)
    print(f"report: {folder / 'report.html'}")


def reported(folder: Path) -> bool:
    """Whether report.html is there, and of all that eval.json holds: it is written last of all."""
    report = folder / "report.html"
    return report.exists() and modified(report) >= modified(folder / "eval.json")


def rates(done: Evaluation) -> str:
    """A row for each policy: its success by the judge that counts, and by each judge alone."""
    rows = []
    for name, figures in done.summary["policies"].items():
        low, high = figures["interval"]
        said = [figures[judge] for judge in ("world", "classifier", "person")]
        judges = [f"{one['success']} of {one['said']}" if one["said"] else "-" for one in said]
        rate = figures["success_rate"]
        won = f"{figures['successes']} of {figures['episodes']}"
        rows.append([name, won, "-" if rate is None else f"{rate:.0%}", f"{low:.0%} to {high:.0%}", *judges])
    return html_table(["policy", "succeeded", "rate", "95 % interval", "the world", "the classifier", "a person"], rows)


def compared(folder: Path, run: Path, done: Evaluation) -> Section:
    """What changed against the evaluation of the run before this one; start by start where these are the same."""
    older = all_of(run)
    older = older[: older.index(folder)] if folder in older else older
    found: list[Evaluation] = []

    def before() -> Run | None:
        if not older:
            return None
        found.append(Evaluation.load(older[-1]))
        return Run(older[-1].name, flat(found[0].config), figures(found[0]))

    _, said = changes(Run(folder.name, flat(done.config), figures(done)), before)
    for previous in found:
        now, then = shared(done, previous)
        sentences = Pairs.of(now, then).sentences(f"A of {folder.name}", f"A of {older[-1].name}")
        said += bullets(sentences if now else ["They have no start in common: only their rates can be compared"], "")
    return "What changed against the previous evaluation", said


def shared(one: Evaluation, other: Evaluation) -> tuple[list[Result], list[Result]]:
    """Both A's results on the starts that are the same: of one seed, at one place."""
    theirs = {result.start: result for result in other.of("A")}
    scenes = {(start.seed, *start.tool): theirs.get(start.number) for start in other.starts}
    places = {start.number: (start.seed, *start.tool) for start in one.starts}
    pairs = [(result, match) for result in one.of("A") if (match := scenes.get(places[result.start])) is not None]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def figures(done: Evaluation) -> dict[str, Any]:
    """The main figures, as two evaluations are compared by."""
    found: dict[str, Any] = {}
    for name, one in done.summary["policies"].items():
        it, (low, high) = done.policies[name], one["interval"]
        found |= {
            f"{name}: checkpoint": it.checkpoint,
            f"{name}: success": f"{one['successes']} of {one['episodes']}, {low:.0%} to {high:.0%}",
            f"{name}: steps an episode": one["steps"],
        }
    return found | {"judged by": done.judge}


def maps(done: Evaluation) -> str:
    """Where tool and object were at first, seen from behind the arm, in the colour of what came of it."""
    drawn = []
    for name in done.policies:
        results = done.of(name)
        for what in ("object", "tool"):
            series = {}
            for outcome, success in (("success", True), ("failure", False)):
                places = [getattr(result, what) for result in results if result.success == success]
                series[outcome] = ([-1000 * place[1] for place in places], [1000 * place[0] for place in places])
            title = f"{name}: {what} at the start" if len(done.policies) > 1 else f"{what} at the start"
            drawn.append(
                curve(title, "mm to the right", "mm ahead of the base", series, width=HALF, joined=False,
                      colours=(SUCCESS, FAILURE))
            )  # fmt: skip
    return "\n".join(drawn)


def episodes(folder: Path, done: Evaluation, policy: str, threshold: float) -> str:
    """Each episode: its pictures, the classifier's probability, and what was said of it."""
    lines = []
    for result, row in zip(done.of(policy), done.rows(policy), strict=True):
        path = strip_path(folder, done.name(result))
        strip = ""
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode()
            strip = f'<img alt="episode {result.start}" height="{STRIP_PX}" src="data:image/jpeg;base64,{data}">'
        number, steps, reward, verdict, *judges, start = (escape(str(cell)) for cell in row)
        named = dict(zip(("world", "classifier", "person"), judges, strict=True))
        said = ", ".join(f"{judge} {word}" for judge, word in named.items() if word != "-")
        lines.append(
            f"<tr><td>{number}</td><td class=strip>{strip}</td><td class=strip>{spark(result, threshold)}</td>"
            f"<td><b class={'success' if result.success else 'fail'}>{verdict}</b><br>{steps} steps, reward {reward}"
            f"<br>{said}<br>start {start}</td></tr>"
        )
    words = (
        "From the first picture to the last; beside it the classifier's probability over the episode, with its "
        "threshold dashed. Vetoed are frames above it that the classifier's state guard refused."
    )
    return f"{BARE}<p>{words}</p><table class=episodes>{''.join(lines)}</table>"


def spark(result: Result, threshold: float) -> str:
    """The classifier's probability, 0 .. 1, over an episode as a small SVG."""
    width, height = SPARK
    values: Sequence[float] = result.probability
    across = width / max(1, len(values) - 1)
    points = " ".join(
        f"{index * across:.1f},{(1 - value) * (height - 4) + 2:.1f}" for index, value in enumerate(values)
    )
    at = (1 - threshold) * (height - 4) + 2
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="probability of success"><rect width="{width}" height="{height}" fill="#f4f4f4"/>'
        f'<path d="M0 {at:.1f}H{width}" stroke="#888" stroke-dasharray="4 3"/>'
        f'<polyline points="{points}" fill="none" stroke="#0072b2" stroke-width="1.8"/></svg>'
    )
