"""The report of a reward classifier: what was chosen and by which rule, where it is wrong, its curves and episodes."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from so101.config import flat
from so101.data.labels import frames_wanted
from so101.plots import HALF, curve, html_table, image_tag, write_report
from so101.reports.head import Run, Section, bullets, changes, modified, runs_before
from so101.runlog import duration, wilson_interval

PICTURE_PX = 96  # of a frame on the page
NONE = "<p>There is none.</p>"
SOME = 10  # frames of each kind, to see what the labels mean
# From where on a judgement rests on little. HIL-SERL asks for over 95 % of the frames and demonstrates a task 20 times.
ACCURATE, DEMONSTRATED = 0.95, 20
EXTREME = 0.1  # of a threshold from 0 or 1
FEW_HELD_OUT = 10  # of which none is judged wrongly: with so many up to 28 % may yet be


def write_reward_report(
    path: Path, title: str, head: Section, changed: Section, report: Mapping[str, Any],
    images: np.ndarray, success: np.ndarray, episode_ids: np.ndarray,
) -> None:  # fmt: skip
    """report.html of `report`, as train_classifier or judge_frames made it.

    images (N, cameras, S, S, 3) uint8, success (N,) bool, episode_ids (N,): an episode's side by side.
    """

    def frame_of(example: Mapping[str, Any]) -> int:
        return int(np.flatnonzero(episode_ids == example["episode"])[example["frame"]])

    def hard(examples: Sequence[Mapping[str, Any]]) -> str:
        shown = [picture(images[frame_of(e)], e["episode"], e["frame"], e["probability"]) for e in examples]
        return "\n".join(shown) or NONE

    def some(frames: np.ndarray) -> str:
        chosen = frames[np.unique(np.linspace(0, len(frames) - 1, SOME).astype(int))] if len(frames) else frames
        begins = {int(e): int(np.argmax(episode_ids == e)) for e in np.unique(episode_ids[chosen])}
        return "\n".join(picture(images[i], e := int(episode_ids[i]), i - begins[e]) for i in chosen) or NONE

    wrong = report.get("hard_in_training", {})
    sections = [
        head,
        ("How it does", outcome(report)),
        ("Problems", bullets([*report["problems"], *doubts(report)], "None was found.")),
        changed,
        (
            "Worst frames: taken for a success, labelled none",
            "<p>Below each: #episode/frame and the classifier's probability, the worst first. Behind the address of "
            f"label.py's page, #episode/frame opens the frame.</p>{hard(report['hard']['false_positives'])}",
        ),
        ("Worst frames: a success that was missed", hard(report["hard"]["misses"])),
    ]
    if wrong:
        still = hard([*wrong["false_positives"], *wrong["misses"]])
        sections.append(("Training frames that are still wrong: look at their labels first", still))
    sections += [
        ("Precision and recall of single frames", curves(report)),
        ("Episodes", episodes(report["held_out"])),
        ("Some successes, as the network sees them", some(np.flatnonzero(success))),
        ("Some of the rest", some(np.flatnonzero(~success))),
    ]
    if "losses" in report:
        losses = report["losses"]
        lines = {"training": (losses["step"], losses["train"]), "held out": (losses["step"], losses["held_out"])}
        best = f"<p>Kept: step {losses['best_step']}, of the lowest loss on held-out episodes.</p>"
        sections.append(("Loss", best + curve("loss", "step", "cross entropy", lines)))
    write_report(path, title, sections)


def doubts(report: Mapping[str, Any]) -> list[str]:
    """What a judgement rests on that is thin, in sentences."""
    said, held, frames = [], report["held_out"], report["at_threshold"]
    if "frames" in report:  # of a training
        counts = report["frames"]
        positive, _ = frames_wanted(counts["successes"], counts["train"] + counts["held_out"] - counts["successes"])
        if positive.missing:
            said.append(f"{positive}: label or record more successes")
        if (episodes := report["episodes"]["successes"]) < DEMONSTRATED:
            said.append(f"{episodes} episodes show a success, {DEMONSTRATED} are usual: record more")
        if min(threshold := report["threshold"], 1 - threshold) < EXTREME:
            passing = "frames pass that the classifier takes for failures"
            if threshold > 0.5:
                passing = "only frames pass of which the classifier is all but sure"
            todo = "few held-out frames or wrong labels lead there, so look at the worst frames in the report"
            said.append(f"the threshold is {threshold:.3f}, so {passing}: {todo}")
    if frames["accuracy"] < ACCURATE:
        said.append(f"{frames['accuracy']:.1%} of the frames are right, over {ACCURATE:.0%} are wanted")
    if len(held) < FEW_HELD_OUT:
        most = wilson_interval(0, len(held))[1]
        said.append(f"only {len(held)} episodes are judged: were none of them wrong, up to {most:.0%} of others may be")
    if vetoed := report["vetoed"]:
        succeeded = sum(episode["success_start"] is not None for episode in held)
        which = f"{len(vetoed)} of {succeeded} successes (episode {', '.join(map(str, vetoed))})"
        todo = "train it with successes at more heights and openings, or widen reward.guard_margin_z and _opening"
        said.append(f"the state guard forbids {which}, however sure the classifier is: {todo}")
    return said


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """The main figures, as two classifiers are compared by."""
    frames = report["at_threshold"]
    return {
        "accuracy of frames": frames["accuracy"],
        "precision": frames["precision"],
        "recall": frames["recall"],
        "average precision": report["average_precision"],
        "threshold": frames["threshold"],
        "F0.5 of episodes": report["f_half"],
        "episodes with a false success": report["false_episodes"],
        "episodes whose success was missed": report["missed_episodes"],
        "mean delay, frames": mean_delay(report["held_out"]),
    }


def mean_delay(episodes: Sequence[Mapping[str, Any]]) -> float | None:
    """Frames from the labelled start of success to the detector's, over the episodes where it fired."""
    delays = [episode["delay_frames"] for episode in episodes if episode["delay_frames"] is not None]
    return float(np.mean(delays)) if delays else None


def trained(held: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Config, report and seconds of a training, out of its reward.json."""
    made = held.get("provenance") or {}
    return made.get("config"), made.get("report"), made.get("seconds")


def judged(held: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The same of an evaluation, out of its evaluation.json."""
    return {"classifier": held.get("classifier"), "dataset": held.get("dataset")}, held, None


def compared(folder: Path, began: float, held: dict[str, Any], kind: Callable[[Mapping[str, Any]], Any]) -> Section:
    """What changed against the run before this one, among the neighbours of its folder.

    `held` is what this one's reward.json or evaluation.json will hold, `kind` is `trained` or `judged`.
    """
    file = "reward.json" if kind is trained else "evaluation.json"

    def run(name: str, held: Mapping[str, Any]) -> Run:
        config, report, seconds = kind(held)
        return Run(name, flat(config), figures(report) | ({} if seconds is None else {"time": duration(seconds)}))

    def before() -> Run | None:
        found = runs_before(folder, began, kind(held)[0], f"*/{file}", lambda other: kind(other)[0], modified)
        return next((run(path.parent.name, other) for path, other in found), None)

    return changes(run(folder.name, held), before)


def outcome(report: Mapping[str, Any]) -> str:
    """The threshold, the rule that chose it, and what it gives."""
    rows: list[list[Any]] = [[name, value] for name, value in figures(report).items()]
    if "threshold_range" in report:
        low, high = report["threshold_range"]
        alone = "; from 0 on, so the guard alone sorts these right" if report["guard"] is not None and low == 0 else ""
        rows.append(["threshold's rule", f"{report['threshold_rule']}, which is {low:.4g} to {high:.4g}{alone}"])
    if guard := report.get("guard"):
        for name, key in (("tool height, m", "height_m"), ("gripper's opening, 0 to 1", "opening")):
            rows.append([f"guard: {name}", "{:.3f} to {:.3f}".format(*guard[key])])
    if "frames" in report:
        rows.append(
            ["frames", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report["frames"].items())]
        )
    if "final" in report:
        last = report["final"]["at_threshold"]
        rows.append(["final/, of the last step", f"accuracy {last['accuracy']:.4g}, threshold {last['threshold']:.4g}"])
    words = "<p>F0.5 is 1 where no episode has a false success and none is missed; a false one weighs more.</p>"
    return html_table(["", ""], rows) + words


def curves(report: Mapping[str, Any]) -> str:
    """Precision against recall, and both at each threshold, with the chosen one."""
    points, at = report["curve"], report["at_threshold"]["threshold"]
    lines = {n: ([p["threshold"] for p in points], [p[n] for p in points]) for n in ("precision", "recall")}
    pairs = lines["recall"][1], lines["precision"][1]
    return (
        curve("as the threshold falls", "recall", "precision", {"frames": pairs}, width=HALF, x_range=(0, 1))
        + curve(
            "at each threshold", "threshold", "share", lines | {f"chosen: {at:.3g}": ([at, at], [0.0, 1.0])},
            width=HALF, x_range=(0, 1),
        )
    )  # fmt: skip


def episodes(held: Sequence[Mapping[str, Any]]) -> str:
    """When the detector fired in each episode, and false successes."""
    return (
        "<p>Frames count from 0; a dash is where there is none. A false success would have ended the episode with a "
        "reward; a single false positive was above the threshold, for too few frames in a row.</p>"
        + html_table(*episode_table(held))
    )


def episode_table(held: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headers and a row for each episode; ranges are first to last frame."""

    def ranges(runs: Sequence[Sequence[int]]) -> str:
        return ", ".join(f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in runs)

    headers = ["episode", "success from", "fired at", "delay, frames", "false successes", "single false positives"]
    return headers, [
        [
            episode["episode"], episode["success_start"], episode["first_fired"], episode["delay_frames"],
            ranges(episode["false_successes"]), ranges(episode["false_positive_runs"]),
        ]
        for episode in held
    ]  # fmt: skip


def picture(views: np.ndarray, episode: int, frame: int, probability: float | None = None) -> str:
    """One observation, its cameras (cameras, S, S, 3) side by side, with a line below that says which."""
    caption = f"#{episode}/{frame}" + ("" if probability is None else f" {probability:.3f}")
    tags = "".join(image_tag(view, PICTURE_PX, f"episode {episode}, frame {frame}") for view in views)
    return f'<figure class="one">{tags}<figcaption>{escape(caption)}</figcaption></figure>'
