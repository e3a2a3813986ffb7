"""Train the reward classifier: which frames show success? Split by episode, judged on held-out episodes.

    python train_reward.py
    python train_reward.py dataset=outputs/cube output=outputs/cube_reward reward.steps=1000

The trunk is frozen, everything above it is trained. The folder gets model.safetensors, reward.json (with
threshold, guard, schema and where the data came from) and report.html.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import hashlib
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.config import launch, option, to_dict
from so101.data.dataset import Dataset, open_dataset
from so101.data.labels import Labels, labels_path, load_labels
from so101.episodes import labelled, load_images, load_states
from so101.errors import DataError
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.reward import RewardConfig, save_reward
from so101.learn.reward_training import encode_views, train_classifier
from so101.plots import curve, html_table, image_tag, write_report
from so101.runlog import Progress
from so101.schema import STATE, UNITS, Preprocess, require_same
from so101.tools.lint import require_clean


@dataclass
class Config:
    """Training the reward classifier."""

    dataset: str = option("outputs/lift_demos", "dataset with labels beside it")
    output: str = option("outputs/lift_reward", "folder of the classifier; must not exist")
    encoder: str | None = option(None, "ResNet10 weight file (.safetensors); null: a seeded random start")
    seed: int = option(0, "seed of the shifted and jittered views; reward.seed is that of split and training")
    preprocess: Preprocess = option(Preprocess(), "how a frame becomes the network's image")
    reward: RewardConfig = option(RewardConfig(), "the classifier and its training")


def main(config: Config) -> None:
    """Load labelled frames, encode them once, train, choose the threshold, report."""
    started = time.monotonic()
    output = Path(config.output)
    if output.exists():
        raise DataError(f"{output}: exists already; name another with output=, or use it as it is")
    dataset = open_dataset(Path(config.dataset))
    if dataset.schema is None:
        raise DataError(f"{dataset.folder}: says nothing of its states and cameras; convert it first")
    wanted = {"state": list(STATE), "units": UNITS, "image": asdict(config.preprocess)}
    require_same({key: dataset.schema.get(key) for key in wanted}, wanted, str(dataset.folder))
    require_clean(dataset)
    labels_file = labels_path(dataset.folder)
    labels = load_labels(dataset.folder, dataset.observations)
    images, states, success, episode_ids = load_frames(dataset, labels, config.preprocess)
    print(f"{dataset.folder}: {len(success)} labelled frames, {success.sum()} of them success")

    trunk = load_resnet10(config.encoder)
    generator = torch.Generator().manual_seed(config.seed)
    with Progress("encode", len(images), "frame") as progress:
        features = encode_views(trunk, images, config.reward, generator, progress.update)
    with Progress("train reward", config.reward.steps, "step") as progress:
        detector, report = train_classifier(features, success, episode_ids, states, config.reward, progress.update)
    provenance = {
        "dataset": str(dataset.folder),
        "labels_sha256": hashlib.sha256(labels_file.read_bytes()).hexdigest() if labels is not None else None,
        "config": to_dict(config),
        "report": report,
    }
    aside = output.with_name(f".{output.name}.tmp")  # renamed when whole: a kill leaves no half classifier
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_page(aside / "report.html", report, images, success)
    save_reward(aside, detector, dataset.schema, trunk_hash(trunk), provenance)
    os.rename(aside, output)
    frames = report["at_threshold"]
    print(
        f"held-out episodes {report['episodes']['held_out']}: {frames['accuracy']:.1%} of frames right, "
        f"threshold {report['threshold']:.2f}; {output} written in {time.monotonic() - started:.0f} s"
    )
    for problem in report["problems"]:
        print(f"warning: {problem}")


def load_frames(
    dataset: Dataset, labels: Labels | None, spec: Preprocess
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """All labelled observations: images (N, cameras, S, S, 3), states (N, 18), success (N,), episode ids (N,)."""
    known = labelled(dataset, labels)
    if not known:
        raise DataError(f"{dataset.folder}: no episode is labelled; label some with label.py")
    episodes = [episode for episode, _ in known]
    with Progress("read", sum(episode.observations for episode in episodes), "frame") as progress:
        images = torch.from_numpy(load_images(episodes, spec, progress.update))
    ids = np.concatenate([np.full(episode.observations, episode.index) for episode in episodes])
    states = np.concatenate([load_states(episode) for episode in episodes])
    return images, states, np.concatenate([success for _, success in known]), ids


def write_page(path: Path, report: dict[str, Any], images: torch.Tensor, success: np.ndarray) -> None:
    """report.html: what was labelled, losses, precision and recall, and what happened in each held-out episode."""

    def some(frames: np.ndarray) -> str:
        chosen = frames[np.linspace(0, len(frames) - 1, 10).astype(int)]
        return "".join(image_tag(images[frame, 0].numpy(), 96) for frame in chosen)

    losses = report["losses"]
    points = [p for p in report["curve"] if p["precision"] is not None]
    held = report["held_out"]
    chosen = {name: report[name] for name in ("threshold", "threshold_range", "threshold_rule", "f_half", "guard")}
    write_report(
        path,
        "Reward classifier",
        [
            ("Chosen", html_table(["what", "value"], [*chosen.items(), *report["at_threshold"].items()])),
            ("Problems", html_table(["problem"], [[p] for p in report["problems"]]) if report["problems"] else "none"),
            ("Some successes, as the network sees them", some(np.flatnonzero(success))),
            ("Some of the rest", some(np.flatnonzero(~success))),
            (
                "Loss",
                curve("loss", "step", "cross entropy", {
                    "training": (losses["step"], losses["train"]),
                    "held out": (losses["step"], losses["held_out"]),
                }),
            ),
            (
                "Frames of held-out episodes",
                curve("precision and recall", "threshold", "", {
                    "precision": ([p["threshold"] for p in points], [p["precision"] for p in points]),
                    "recall": ([p["threshold"] for p in points], [p["recall"] for p in points]),
                }),
            ),
            ("Held-out episodes", html_table(list(held[0]), [list(e.values()) for e in held])),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
