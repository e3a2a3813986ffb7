"""Training the reward classifier from cached views beside encoding each batch anew: time per step, held-out accuracy.

    python tests/bench/bench_reward.py                          about 5 minutes on two cores
    python tests/bench/bench_reward.py image_size=64 steps=300 dataset=outputs/lift_demos

Both train on the same frames, split and number of steps; they differ in where a batch's features come from: any of
the views that were encoded once, or every frame shifted, jittered and passed through the trunk again. The floors are
the operations counted from the shapes, at the rate of a large matrix product measured in the same run.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from so101.config import launch, option
from so101.data.dataset import open_dataset
from so101.data.labels import load_labels
from so101.episodes import labelled, load_images, load_states
from so101.learn.networks import images_to_input
from so101.learn.resnet10 import STRIDE, ResNet10, load_resnet10
from so101.learn.reward import RewardConfig, SuccessClassifier
from so101.learn.reward_training import TrainedReward, encode_views, train_classifier, training_copy, training_frames
from so101.schema import Preprocess

ROOT = Path(__file__).parent.parent.parent
TARGET = 10  # times faster, at least


@dataclass
class Config:
    """What to compare on."""

    dataset: str | None = option(None, "labelled dataset; null: 20 simulated episodes are recorded, 5 of them failures")
    steps: int = option(150, "gradient steps of each training")
    seeds: int = option(3, "trainings of each kind")
    image_size: int = option(128, "side of the network's image in pixels")
    held_out: float = option(0.4, "share of the episodes that both are judged on")


def main(config: Config) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        if config.dataset is None:
            wanted = [f"dataset={folder}/demos", "episodes=20", "failures=5"]
            subprocess.run([sys.executable, ROOT / "record.py", *wanted], cwd=ROOT, check=True)
        dataset = open_dataset(Path(config.dataset or f"{folder}/demos"))
        known = labelled(dataset, load_labels(dataset.folder, dataset.observations))
        episodes = [episode for episode, _ in known]
        images = torch.from_numpy(load_images(episodes, Preprocess(image_size=config.image_size)))
        states = np.concatenate([load_states(episode) for episode in episodes])
        success = np.concatenate([success for _, success in known])
        episode_ids = np.concatenate([np.full(episode.observations, episode.index) for episode in episodes])
    trunk = load_resnet10(None)
    reward = RewardConfig(
        steps=config.steps, patience=10**9, evaluate_every=max(1, config.steps // 6), held_out=config.held_out
    )
    cached_s, anew_s, encode_s, rows = [], [], [], []
    for seed in range(config.seeds):
        how = replace(reward, seed=seed)
        copied = training_frames(success, episode_ids, how)
        generator = torch.Generator().manual_seed(seed)
        started = time.perf_counter()
        features = encode_views(trunk, images, how, generator, copied=copied)
        encode_s.append(time.perf_counter() - started)

        def anew(frames: np.ndarray, how: RewardConfig = how, generator: torch.Generator = generator) -> torch.Tensor:
            pixels = training_copy(images[torch.from_numpy(frames)], how, generator)
            with torch.inference_mode():
                maps = trunk(images_to_input(pixels.flatten(0, 1)))
            return maps.view(*pixels.shape[:2], *maps.shape[1:]).clone()

        for name, draw, taken in (("cached views", None, cached_s), ("encoded anew", anew, anew_s)):
            started = time.perf_counter()
            trained = train_classifier(features, success, episode_ids, states, how, draw=draw)
            taken.append((time.perf_counter() - started) / config.steps)
            rows.append((seed, name, trained))
            print(outcome(seed, name, trained), flush=True)
    for name in ("cached views", "encoded anew"):
        of = [trained.report for _, which, trained in rows if which == name]
        print(
            f"{name}, mean of {config.seeds}: accuracy {np.mean([r['at_threshold']['accuracy'] for r in of]):.4f}, "
            f"average precision {np.mean([r['average_precision'] for r in of]):.4f}, "
            f"lowest loss {np.mean([min(r['losses']['held_out']) for r in of]):.4f}"
        )
    views = len(images) + reward.views * int(copied.sum())
    print_times(trunk, reward, images, views, np.array(cached_s), np.array(anew_s), np.array(encode_s))


def outcome(seed: int, name: str, trained: TrainedReward) -> str:
    """One training's line."""
    report, losses = trained.report, trained.report["losses"]
    return (
        f"seed {seed}  {name}: {report['frames']['held_out']} held-out frames, accuracy "
        f"{report['at_threshold']['accuracy']:.4f}, average precision {report['average_precision']:.4f}, lowest loss "
        f"{min(losses['held_out']):.4f} at step {losses['best_step']}; episodes: {report['false_episodes']} false, "
        f"{report['missed_episodes']} missed"
    )


def print_times(
    trunk: ResNet10,
    reward: RewardConfig,
    images: torch.Tensor,
    views: int,
    cached_s: np.ndarray,
    anew_s: np.ndarray,
    encode_s: np.ndarray,
) -> None:
    """Seconds per step of both, (seeds,) each, beside their floors; the cached one also with its share of encoding.

    `views` were encoded once, `encode_s` (seeds,) it took.
    """
    cameras, size = images.shape[1:3]
    rate = matmul_flops()
    head = 2 * sum(p.numel() for p in SuccessClassifier(cameras, size // STRIDE).parameters())  # an image, forward
    learn = 3 * head * reward.batch_size / rate  # backward is two products of the same size
    encode = trunk_flops(trunk, size) * cameras * reward.batch_size / rate
    print(f"\n{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s in a product of 1024 x 1024 float32")
    print(f"trunk {trunk_flops(trunk, size) / 1e6:.0f} MFLOP an image of {size} px, heads {head / 1e6:.1f} MFLOP")
    print(f"{'':52}{'ms a step':>10}{'floor':>10}")
    whole, once = cached_s + encode_s / reward.steps, views * trunk_flops(trunk, size) * cameras / rate / reward.steps
    for name, taken, floor in (
        (f"encoded anew, batch {reward.batch_size}", anew_s, encode + learn),
        ("cached views", cached_s, learn),
        (f"  with its share of encoding {1 + reward.views} views once", whole, learn + once),
    ):
        print(f"{name:52}{1000 * np.median(taken):>10.1f}{1000 * floor:>10.1f}")
    print(f"{'times faster a step (target >= ' + str(TARGET) + ')':52}{np.median(anew_s / cached_s):>10.1f}", end="")
    print(f"{(encode + learn) / learn:>10.1f}")
    usual = RewardConfig().steps
    whole = usual * anew_s / (usual * cached_s + encode_s)
    print(f"{f'times faster in all, over {usual} steps':52}{np.median(whole):>10.1f}")


def trunk_flops(trunk: ResNet10, size: int) -> int:
    """Of the convolutions for one image, a multiplication and an addition counted as two."""
    counted: list[int] = []

    def count(layer: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        counted.append(2 * layer.weight.numel() * output.shape[-2] * output.shape[-1])

    hooks = [layer.register_forward_hook(count) for layer in trunk.modules() if isinstance(layer, nn.Conv2d)]
    with torch.inference_mode():
        trunk(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(counted)


def matmul_flops() -> float:
    """Operations a second in a product of two 1024 x 1024 float32 matrices, the best of ten."""
    a, times = torch.randn(1024, 1024), []
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(times)


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
