"""Train the reward classifier: which frames show success? Split by episode, judged on held-out episodes.

    python train_reward.py
    python train_reward.py dataset=outputs/cube output=outputs/cube_reward reward=configs/reward_v2.json
    python train_reward.py corrections=outputs/lift_reward.corrections output=outputs/lift_reward_2
    python train_reward.py --evaluate outputs/other_light      judge the classifier on another dataset instead

The trunk is frozen, everything above it is trained. The folder gets model.safetensors, reward.json (with
threshold, guard, schema and where the data came from) and report.html: the classifier of the lowest loss on
held-out episodes. The one of the last step is in final/, a classifier like any other. Corrections are the frames that
a person marked as wrong in `python -m so101.tools.preview`: they are trained on beside the dataset's own.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.config import launch, option, to_dict
from so101.data.dataset import open_dataset
from so101.data.labels import Labels, labels_path, load_labels
from so101.episodes import Labelled, load_labelled
from so101.errors import ConfigError, DataError
from so101.files import new_folder
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.reward import RewardConfig, load_reward, read_reward_file, save_reward
from so101.learn.reward_training import encode_views, judge_frames, train_classifier, training_frames
from so101.reports.head import head
from so101.reports.reward import compared, doubts, episode_table, judged, trained, write_reward_report
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
    corrections: str | None = option(None, "dataset of frames marked as wrong in tools.preview, to train on as well")
    encoder: str | None = option(None, "ResNet10 weight file (.safetensors, .pkl); null: a seeded random start")
    seed: int = option(0, "seed of the shifted and jittered views; reward.seed is that of split and training")
    preprocess: Preprocess = option(Preprocess(), "how a frame becomes the network's image")
    reward: RewardConfig = option(RewardConfig(), "the classifier and its training")

    def __post_init__(self) -> None:
        if self.encoder is not None:
            self.encoder = os.path.abspath(self.encoder)  # the classifier may be used from anywhere
        if self.report is not None and self.evaluate is None:
            raise ConfigError(f"report: got {self.report!r}, which only evaluate=DATASET writes; leave it out")


def main(config: Config) -> None:
    """Load labelled frames, encode them once, train, choose the threshold, report."""
    if config.evaluate is not None:
        evaluate(config, config.evaluate)
        return
    began = time.time()
    output = Path(config.output)
    require_new(output, "output")
    dataset = open_dataset(Path(config.dataset))
    schema = dataset.require_schema()
    wanted = {"state": list(STATE), "units": UNITS, "image": asdict(config.preprocess)}
    require_same({key: schema.get(key) for key in wanted}, wanted, str(dataset.folder))
    require_clean(dataset)
    labels_file = labels_path(dataset.folder)
    labels = load_labels(dataset.folder, dataset.observations)
    known = load_labelled(dataset, labels, config.preprocess)
    print(f"{dataset.folder}: {len(known.success)} labelled frames, {known.success.sum()} of them success")
    training = training_frames(known.success, known.episode_ids, config.reward)
    corrected = None
    if config.corrections is not None:
        known, training, corrected = with_corrections(Path(config.corrections), schema, known, training)
    pixels, states, success, episode_ids = known
    images = torch.from_numpy(pixels)

    trunk = load_resnet10(config.encoder)
    generator = torch.Generator().manual_seed(config.seed)
    with Progress("encode", len(images) + config.reward.views * int(training.sum()), "view") as progress:
        features = encode_views(trunk, images, config.reward, generator, progress.update, training)
    with Progress("train reward", config.reward.steps, "step") as progress:
        result = train_classifier(
            features, success, episode_ids, states, config.reward, progress.update, training=training
        )
    best, final, report = result
    provenance = {
        "dataset": str(dataset.folder),
        "labels_sha256": hashlib.sha256(labels_file.read_bytes()).hexdigest() if labels is not None else None,
        "corrections": corrected,
        "config": to_dict(config),
        "report": report,
        "seconds": time.time() - began,
    }
    of_final = provenance | {"report": {"episodes": report["episodes"], **report["final"]}}
    with new_folder(output) as aside:
        write_reward_report(
            aside / "report.html", f"train_reward.py: {output.name}", head("train_reward.py", began, config),
            compared(output, began, {"provenance": provenance}, trained), report, pixels, success, episode_ids,
        )  # fmt: skip
        save_reward(aside, best, schema, trunk_hash(trunk), provenance)
        save_reward(aside / "final", final, schema, trunk_hash(trunk), of_final)
    frames = report["at_threshold"]
    print(
        f"held-out episodes {report['episodes']['held_out']}: {frames['accuracy']:.1%} of frames right, "
        f"threshold {report['threshold']:.2f}; {output} written in {time.time() - began:.0f} s"
    )
    for problem in [*report["problems"], *doubts(report)]:
        print(f"warning: {problem}")


def evaluate(config: Config, folder: str) -> None:
    """Judge the classifier in `output`, with its own threshold, guard and vote, on a folder's labelled episodes."""
    began = time.time()
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
        place, about = Path(config.report), {"classifier": str(output), "dataset": str(dataset.folder), **report}
        with new_folder(place) as aside:
            write_reward_report(
                aside / "report.html", f"train_reward.py: {output.name} on {dataset.folder.name}",
                head("train_reward.py", began, config), compared(place, began, about, judged),
                report, pixels, success, episode_ids,
            )  # fmt: skip
            (aside / "evaluation.json").write_text(json.dumps(about, indent=2) + "\n")
    print(table(*episode_table(report["held_out"])))
    frames = report["at_threshold"]
    print(
        f"{output} on {dataset.folder}: {frames['accuracy']:.1%} of {len(success)} frames right at threshold "
        f"{detector.threshold:.2f}; of {len(report['held_out'])} episodes {report['false_episodes']} with a false "
        f"success, {report['missed_episodes']} missed"
    )
    for problem in doubts(report):
        print(f"warning: {problem}")


def with_corrections(
    folder: Path, schema: dict[str, Any], known: Labelled, training: np.ndarray
) -> tuple[Labelled, np.ndarray, dict[str, Any]]:
    """The labelled frames with the queued ones behind them, which are trained on (N,) bool, and what was taken.

    All that are queued are trained on: two frames are no episode that a vote could be held on. One that shows a frame
    of a held-out episode, by its state, would give that away, and is left out.
    """
    queue = open_dataset(folder)
    looks = ("state", "units", "cameras", "image")  # how fast it was driven does not matter to a picture
    require_same(*({key: said.get(key) for key in looks} for said in (queue.require_schema(), schema)), str(folder))
    require_clean(queue)
    labels = load_labels(folder, queue.observations) or Labels(folder.name)
    queued = load_labelled(queue, labels, Preprocess(**schema["image"]))
    held = {state.tobytes() for state in known.states[~training]}
    new = np.array([state.tobytes() not in held for state in queued.states])
    marks = len(np.unique(queued.episode_ids))
    queued = Labelled(*(values[new] for values in queued))
    taken = len(np.unique(queued.episode_ids))
    queued = queued._replace(episode_ids=queued.episode_ids + known.episode_ids.max() + 1)
    print(
        f"{folder}: {taken} of {marks} marks are taken along ({len(queued.success)} frames, {queued.success.sum()} of "
        f"them success); {marks - taken} are of held-out episodes, which judge and must not teach"
    )
    about = {
        "dataset": str(folder),
        "labels_sha256": hashlib.sha256(labels_path(folder).read_bytes()).hexdigest(),
        "frames": len(queued.success),
        "successes": int(queued.success.sum()),
        "left_out": int((~new).sum()),
    }
    joined = Labelled(*(np.concatenate(both) for both in zip(known, queued, strict=True)))
    return joined, np.concatenate([training, np.ones(len(queued.success), bool)]), about


def require_new(folder: Path, key: str) -> None:
    """Raises DataError, saying what is there, where a folder that is to be made exists."""
    if not os.path.lexists(folder):
        return
    kinds = {
        "reward.json": "a reward classifier, to be used as it is",
        "evaluation.json": "a classifier's evaluation",
        "meta/info.json": "a dataset",
        "config.json": "a run folder",
    }
    what = next((kind for file, kind in kinds.items() if (folder / file).exists()), "no reward classifier")
    raise DataError(f"{folder}: exists already and is {what}; nothing is written over, name another with {key}=")


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
