"""Critic updates a second on a graphics card: as one CUDA graph, as single operations, and with batches of the host.

`python tests/bench/bench_captured.py [batch=256] [cameras=1] [n_obs_steps=1] [observations=2000] [seconds=3]`, about a
minute on a card. Each rate includes its share of sampling, actor, temperature and slow copies. Without a card it runs
on the CPU, one operation at a time, to show that it works.

The floors, for one critic update at batch 256 and one camera, counted before the first run:
- products: 3.5 GFLOP in float32 (bench_sac.critic_products), 0.05 ms at an H200's 67 TFLOP/s;
- bytes: 8 MB of features drawn, and 62 MB of weights, gradients, moments and slow copies: 0.015 ms at its 4.8 TB/s;
- operations: some 250, each 2 to 3 microseconds in a graph however small it is: 0.5 to 0.75 ms, by far the most;
- pixel mode: 512 images of 0.58 GFLOP are 0.3 TFLOP, 0.6 ms at the 494 TFLOP/s of TF32; their activations, 5 MB
  each, written and read once take 1.1 ms.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import copy
import sys
import tempfile
import time
from pathlib import Path

import bench_sac
import torch
from bench_sac import IMAGE_SIZE, critic_products, fill, run_of

from so101.learn.captured import WARM_UP, UpdateGroups
from so101.learn.networks import images_to_input
from so101.learn.replay import Replay, ViewEncoder
from so101.learn.resnet10 import CHANNELS, STRIDE, ResNet10, load_resnet10
from so101.learn.sac import Sac, SacConfig

LEAST, LEAST_PIXELS = 1000, 100  # critic updates a second on an H200-class card at batch 256
WAYS = ("one graph", "single operations", "single operations, batches of the host")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def finish() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def rate(groups: UpdateGroups, seconds: float) -> float:
    """Critic updates a second, warmed up and captured before."""
    groups.run(WARM_UP + 1)
    finish()
    start, count, done = time.perf_counter(), 1, 0
    while (taken := time.perf_counter() - start) < seconds:
        groups.run(count)
        finish()
        done, count = done + count, min(2 * count, 100)  # a wait after 100 groups costs nothing
    return done * groups.sac.config.actor_every / taken


def products_rate(batch: int, views: int, critics: int, seconds: float) -> float:
    """How often a second the products of a critic update could be carried out, as one graph if there are any."""
    with torch.device(DEVICE):
        multiply = run_of(critic_products(batch, views, critics))
    multiply()
    if DEVICE == "cuda":
        finish()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply()
        multiply = graph.replay
    start, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        for _ in range(10):
            multiply()
        finish()
        done += 10
    return done / taken


def print_precision(trunk: ResNet10) -> None:
    """How far the trunk's features are from float64's in each way of computing them, and in what the cache keeps."""
    coarse = torch.randint(0, 256, (8, 3, 16, 16), device=DEVICE).float()
    images = torch.nn.functional.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic").clamp(0, 255).byte()
    pixels = images_to_input(images.permute(0, 2, 3, 1))
    with torch.no_grad():
        exact = copy.deepcopy(trunk).double()(pixels.double())
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        results = {str(kind): copy.deepcopy(trunk).to(kind)(pixels.to(kind)) for kind in kinds}
    results["the cache: float32, kept as float16"] = results["torch.float32"].half()
    for name, maps in results.items():
        print(f"{name:48}{((maps.double() - exact).norm() / exact.norm()).item():12.5f}")


def main(
    batch: int = 256, cameras: int = 1, n_obs_steps: int = 1, observations: int = 2000, seconds: float = 3.0
) -> None:
    """Print the table."""
    bench_sac.OBSERVATIONS = observations  # 2000 of each kind: 330 MB of features, more than a card's own cache holds
    size, trunk = IMAGE_SIZE // STRIDE, load_resnet10(None).to(DEVICE)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, batch {batch}, {cameras} camera(s), {n_obs_steps} frame(s)")
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = (cameras, IMAGE_SIZE, observations, observations, 0, n_obs_steps)
        for features in ("cached", "pixels", "trained"):
            config = SacConfig(batch_size=batch, n_obs_steps=n_obs_steps, features=features)  # type: ignore[arg-type]
            encoder = ViewEncoder(trunk, config.views, config.pad, 0, cached=features == "cached")
            replay = Replay(encoder, Path(folder), {}, *shape, features=features)  # type: ignore[arg-type]
            fill(replay, torch.randn(1 + config.views, cameras, CHANNELS, size, size).half())
            for way in WAYS:
                torch.manual_seed(0)
                groups = UpdateGroups(Sac(config, cameras, DEVICE, size, trunk), replay)
                if (way == WAYS[0] and not groups.captures) or (way == WAYS[2] and features != "cached"):
                    continue
                groups.captures = way == WAYS[0]
                groups.mirror = groups.mirror if way != WAYS[2] else None
                rates[f"{features}, {way}"] = rate(groups, seconds)
    rates["products of a cached update alone"] = products_rate(batch, cameras * n_obs_steps, 2, seconds)
    for what, per_second in rates.items():
        print(f"{what:48}{per_second:12.1f} updates/s{1e3 / per_second:10.3f} ms")
    print(f"targets, as one graph: cached at least {LEAST}, pixels at least {LEAST_PIXELS} (batch 256, one camera)")
    print("the trunk's features, relative to float64:")
    print_precision(trunk)


if __name__ == "__main__":
    given = (word.split("=") for word in sys.argv[1:])
    main(**{key: float(value) if key == "seconds" else int(value) for key, value in given})
