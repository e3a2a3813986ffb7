"""A policy step with the classifier, beside a learner that never rests: from a frame in memory to an action.

`python tests/bench/bench_policy.py [threads=1] [cameras=1]`, half a minute. The learner is a process of its own on
one thread, as train_sac.py mode=parallel runs it on two cores. The floor is the trunk's operations for one frame at
the rate of a large matrix product on the same threads, with the learner stopped.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_sac import IMAGE_SIZE, TRUNK_FLOPS, fill

from so101.learn.networks import CHANNELS, Policy
from so101.learn.replay import Replay, ViewEncoder
from so101.learn.resnet10 import STRIDE, load_resnet10
from so101.learn.reward import SuccessClassifier, SuccessDetector
from so101.learn.sac import Sac, SacConfig

STEPS, TARGET_MS = 300, 15
SIZE = IMAGE_SIZE // STRIDE


def learn(cameras: int, going: Any) -> None:
    """Critic updates from cached features, batch 256, until the process is ended."""
    torch.set_num_threads(1)
    config, trunk = SacConfig(batch_size=256), load_resnet10(None)
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(ViewEncoder(trunk, 4, 4, 0), Path(folder), {}, cameras, IMAGE_SIZE, 300, 300, 0)
        fill(replay, torch.randn(5, cameras, CHANNELS, SIZE, SIZE).half())
        sac = Sac(config, cameras, size=SIZE)
        while True:
            sac.update_critic(replay.sample(256))
            sac.update_targets()
            going.set()


def times_of(do: Callable[[], object], times: int) -> np.ndarray:
    """Milliseconds of each of some calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        do()
        taken.append(1e3 * (time.perf_counter() - start))
    return np.array(taken)


def main(threads: int = 1, cameras: int = 1) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    rng, noise = np.random.default_rng(0), torch.Generator()
    encoder = ViewEncoder(load_resnet10(None), 0, 4, 0)
    detector = SuccessDetector(SuccessClassifier(cameras, SIZE), 0.5, None, 3)
    policy = Policy(cameras, SIZE).eval()
    state = np.zeros(18, np.float32)

    def step() -> None:
        frames = rng.integers(0, 256, (cameras, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        features = encoder.encode(frames)[0]
        detector.update(detector.probability(features), state)
        policy.act(features, state, 1.0, noise)

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = np.median(times_of(lambda: a @ b, 20))
    floor = cameras * TRUNK_FLOPS / (2 * 1024**3) * product
    times_of(step, 20)
    alone = times_of(step, STEPS)
    spawn = multiprocessing.get_context("spawn")
    going = spawn.Event()
    learner = spawn.Process(target=learn, args=(cameras, going), daemon=True)
    learner.start()
    going.wait()
    beside = times_of(step, STEPS)
    learner.kill()
    print(f"{cameras} camera(s), {threads} thread(s) for the policy, one for the learner")
    print(f"{'ms':28}{'median':>9}{'95 %':>9}{'99 %':>9}")
    for name, taken in (("alone", alone), ("beside the learner", beside)):
        print(f"{name:28}{np.median(taken):9.2f}{np.quantile(taken, 0.95):9.2f}{np.quantile(taken, 0.99):9.2f}")
    print(f"{'floor: the trunk, counted':28}{floor:9.2f}")
    print(f"target: {TARGET_MS} ms beside the learner")


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (word.split("=") for word in sys.argv[1:])})
