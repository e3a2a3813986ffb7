"""Train the reward classifier: which frames show success? Split by episode, judged on held-out episodes.

    python train_reward.py
    python train_reward.py dataset=outputs/cube output=outputs/cube_reward reward=configs/reward_v2.json
    python train_reward.py --evaluate outputs/other_light      judge the classifier on another dataset instead

The trunk is frozen, everything above it is trained. The folder gets model.safetensors, reward.json (with
threshold, guard, schema and where the data came from) and report.html: the classifier of the lowest loss on
held-out episodes. The one of the last step is in final/, a classifier like any other.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.config import launch, option, to_dict
from so101.data.dataset import open_dataset
from so101.data.labels import labels_path, load_labels
from so101.episodes import load_labelled
from so101.errors import ConfigError, DataError
from so101.files import new_folder
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.reward import RewardConfig, load_reward, read_reward_file, save_reward
from so101.learn.reward_training import encode_views, judge_frames, train_classifier, training_frames
from so101.plots import curve, html_table, image_tag, write_report
from so101.runlog import Progress, table
from so101.schema import STATE, UNITS, Preprocess, require_same
from so101.tools.lint import require_clean


@dataclass
class Config:
    """Training the reward classifier."""

    dataset: str = option("outputs/lift_demos", "dataset with labels beside it")
    output: str = option("outputs/lift_reward", "folder of the classifier; must not exist, unless it is evaluated")
    evaluate: str | None = option(None, "judge the classifier in `output` on this dataset with labels; trains nothing")
    report: str | None = option(None, "evaluate: new folder for report.html and evaluation.json; null: only print")
    encoder: str | None = option(None, "ResNet10 weight file (.safetensors); null: a seeded random start")
    seed: int = option(0, "seed of the shifted and jittered views; reward.seed is that of split and training")
    preprocess: Preprocess = option(Preprocess(), "how a frame becomes the network's image")
    reward: RewardConfig = option(RewardConfig(), "the classifier and its training")

    def __post_init__(self) -> None:
        if self.report is not None and self.evaluate is None:
            raise ConfigError(f"report: got {self.report!r}, which only evaluate=DATASET writes; leave it out")


def main(config: Config) -> None:
    """Load labelled frames, encode them once, train, choose the threshold, report."""
    if config.evaluate is not None:
        evaluate(config, config.evaluate)
        return
    started = time.monotonic()
    output = Path(config.output)
    require_new(output, "output")
    dataset = open_dataset(Path(config.dataset))
    schema = dataset.require_schema()
    wanted = {"state": list(STATE), "units": UNITS, "image": asdict(config.preprocess)}
    require_same({key: schema.get(key) for key in wanted}, wanted, str(dataset.folder))
    require_clean(dataset)
    labels_file = labels_path(dataset.folder)
    labels = load_labels(dataset.folder, dataset.observations)
    pixels, states, success, episode_ids = load_labelled(dataset, labels, config.preprocess)
    images = torch.from_numpy(pixels)
    print(f"{dataset.folder}: {len(success)} labelled frames, {success.sum()} of them success")

    trunk = load_resnet10(config.encoder)
    generator = torch.Generator().manual_seed(config.seed)
    training = training_frames(success, episode_ids, config.reward)
    with Progress("encode", len(images) + config.reward.views * int(training.sum()), "view") as progress:
        features = encode_views(trunk, images, config.reward, generator, progress.update, training)
    with Progress("train reward", config.reward.steps, "step") as progress:
        trained = train_classifier(features, success, episode_ids, states, config.reward, progress.update)
    best, final, report = trained
    provenance = {
        "dataset": str(dataset.folder),
        "labels_sha256": hashlib.sha256(labels_file.read_bytes()).hexdigest() if labels is not None else None,
        "config": to_dict(config),
        "report": report,
    }
    of_final = provenance | {"report": {"episodes": report["episodes"], **report["final"]}}
    with new_folder(output) as aside:
        write_page(aside / "report.html", report, images, success, episode_ids)
        save_reward(aside, best, schema, trunk_hash(trunk), provenance)
        save_reward(aside / "final", final, schema, trunk_hash(trunk), of_final)
    frames = report["at_threshold"]
    print(
        f"held-out episodes {report['episodes']['held_out']}: {frames['accuracy']:.1%} of frames right, "
        f"threshold {report['threshold']:.2f}; {output} written in {time.monotonic() - started:.0f} s"
    )
    for problem in report["problems"]:
        print(f"warning: {problem}")


def evaluate(config: Config, folder: str) -> None:
    """Judge the classifier in `output`, with its own threshold, guard and vote, on a folder's labelled episodes."""
    if config.report is not None:
        require_new(Path(config.report), "report")
    dataset, output = open_dataset(Path(folder)), Path(config.output)
    schema = dataset.require_schema()
    trained_on = read_reward_file(output).provenance
    trunk = load_resnet10(config.encoder or (trained_on.get("config") or {}).get("encoder"))
    detector = load_reward(output, schema, trunk_hash(trunk))
    if trained_on.get("dataset") == str(dataset.folder):
        print(f"warning: {dataset.folder} is what it was trained on; this says nothing of other episodes")
    labels = load_labels(dataset.folder, dataset.observations)
    spec = Preprocess(**schema["image"])
    pixels, states, success, episode_ids = load_labelled(dataset, labels, spec)
    images = torch.from_numpy(pixels)
    with Progress("encode", len(images), "frame") as progress:
        plain = replace(config.reward, views=0, consecutive=detector.consecutive)
        features = encode_views(trunk, images, plain, torch.Generator(), progress.update)[:, 0]
    probabilities = detector.classifier.probabilities(features)
    report = judge_frames(probabilities, success, episode_ids, states, detector.guard, plain, detector.threshold)
    if config.report is not None:
        with new_folder(Path(config.report)) as aside:
            write_page(aside / "report.html", report, images, success, episode_ids)
            about = {"classifier": str(output), "dataset": str(dataset.folder), **report}
            (aside / "evaluation.json").write_text(json.dumps(about, indent=2) + "\n")
    print(table(list(report["held_out"][0]), [list(episode.values()) for episode in report["held_out"]]))
    frames = report["at_threshold"]
    print(
        f"{output} on {dataset.folder}: {frames['accuracy']:.1%} of {len(success)} frames right at threshold "
        f"{detector.threshold:.2f}; of {len(report['held_out'])} episodes {report['false_episodes']} with a false "
        f"success, {report['missed_episodes']} missed"
    )


def require_new(folder: Path, key: str) -> None:
    """Raises DataError where a folder that is to be made exists."""
    if folder.exists():
        raise DataError(f"{folder}: exists already; name another with {key}=, or use it as it is")


def write_page(
    path: Path, report: dict[str, Any], images: torch.Tensor, success: np.ndarray, episode_ids: np.ndarray
) -> None:
    """report.html: what was chosen, what the classifier gets wrong, precision and recall, each episode, losses."""

    def pictures(frame: int) -> str:
        return "".join(image_tag(view.numpy(), 96) for view in images[frame])

    def some(frames: np.ndarray) -> str:
        chosen = frames[np.linspace(0, len(frames) - 1, 10).astype(int)] if len(frames) else frames
        return "".join(pictures(frame) for frame in chosen) or "none"

    def hard(examples: list[dict[str, Any]]) -> str:
        shown = []
        for example in examples:
            frame = int(np.flatnonzero(episode_ids == example["episode"])[example["frame"]])
            caption = f"#{example['episode']}/{example['frame']} {example['probability']:.3f}"
            shown.append(
                f'<figure style="display: inline-block; margin: 0">{pictures(frame)}'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        return "\n".join(shown) or "none"

    points, held, single = report["curve"], report["held_out"], report["at_threshold"]
    names = (
        "threshold_range", "threshold_rule", "f_half", "false_episodes", "missed_episodes", "average_precision", "guard"
    )  # fmt: skip
    chosen = {name: report[name] for name in names if name in report}
    if "final" in report:
        last = report["final"]["at_threshold"]
        chosen["final/, of the last step"] = f"accuracy {last['accuracy']:.4g} at threshold {last['threshold']:.4g}"
    sections = [
        ("Chosen", html_table(["what", "value"], [*single.items(), *chosen.items()])),
        ("Problems", html_table(["problem"], [[p] for p in report["problems"]]) if report["problems"] else "none"),
        (
            "Hard examples: taken for a success, labelled none",
            "<p>#episode/frame and probability, the worst first. Behind the address of label.py's page, #episode/frame "
            f"opens the frame.</p>{hard(report['hard']['false_positives'])}",
        ),
        ("Hard examples: a success that was missed", hard(report["hard"]["misses"])),
    ]
    if "hard_in_training" in report:
        wrong = [*report["hard_in_training"]["false_positives"], *report["hard_in_training"]["misses"]]
        sections.append(("Training frames that are still wrong: look at their labels first", hard(wrong)))
    sections += [
        ("Some successes, as the network sees them", some(np.flatnonzero(success))),
        ("Some of the rest", some(np.flatnonzero(~success))),
        (
            "Precision and recall of single frames",
            curve("as the threshold falls", "recall", "precision", {
                "frames": ([p["recall"] for p in points], [p["precision"] for p in points]),
            })
            + curve("at each threshold", "threshold", "", {
                name: ([p["threshold"] for p in points], [p[name] for p in points]) for name in ("precision", "recall")
            }),
        ),
        ("Episodes", html_table(list(held[0]), [list(e.values()) for e in held])),
    ]  # fmt: skip
    if "losses" in report:
        losses = report["losses"]
        lines = {"training": (losses["step"], losses["train"]), "held out": (losses["step"], losses["held_out"])}
        sections.append(("Loss", curve("loss", "step", "cross entropy", lines)))
    write_report(path, "Reward classifier", sections)


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
