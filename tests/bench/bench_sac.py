"""A critic update from cached features, beside its matrix products alone and the same update in pixel mode.

`python tests/bench/bench_sac.py [threads=1] [batch=256] [cameras=1] [n_obs_steps=1]`, about a minute. The floor is
what cannot be left out: the products of one update, counted below and run alone, in the layout that is fastest.
Sampling, norms, activations, Adam and the slow copies are what the update costs beyond it. Rounds take turns and the
fastest of each counts, since other programs may run.
"""

import so101  # noqa: F401  (before torch: it says how OpenMP waits)

# isort: split
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from so101.learn.networks import EMBEDDING, STATE_EMBEDDING
from so101.learn.replay import Replay, ViewEncoder
from so101.learn.resnet10 import CHANNELS, STRIDE, load_resnet10
from so101.learn.sac import Sac, SacConfig
from so101.schema import ACTION, STATE

IMAGE_SIZE, OBSERVATIONS, ROUNDS, UPDATES = 128, 300, 12, 5
WIDTH, SPATIAL = 256, 8  # of the hidden layers; spatial features of the embedding
TRUNK_FLOPS = 0.580e9  # one image of 128 x 128 (reference/learning.md, A)
MOST_FLOOR, LEAST_PIXELS = 2, 50


class Product(NamedTuple):
    """(groups, rows, inner) times (groups, inner, columns), `times` of them in one update."""

    groups: int
    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.rows * self.inner * self.columns * self.times


def critic_products(batch: int, views: int, critics: int) -> list[Product]:
    """One critic update's: forward through two encoders, actor and slow critics; forward and backward through the
    encoder and the critics. Backward is two products for one, but none for the gradient of what is not trained.
    """
    positions, flat = (IMAGE_SIZE // STRIDE) ** 2, CHANNELS * SPATIAL
    latent = EMBEDDING * views + STATE_EMBEDDING
    return [
        Product(CHANNELS, SPATIAL, positions, batch, 3 * views),  # spatial embedding
        Product(CHANNELS, SPATIAL, batch, positions, views),  # its kernel's gradient
        Product(1, batch, flat, EMBEDDING, 3 * views),  # bottleneck
        Product(1, flat, batch, EMBEDDING, views),  # its weight's gradient
        Product(1, batch, EMBEDDING, flat, views),  # its input's
        Product(1, batch, len(STATE), STATE_EMBEDDING, 4),  # state, with its weight's gradient
        Product(1, batch, latent, WIDTH, 1),  # actor
        Product(1, batch, WIDTH, WIDTH, 1),
        Product(1, batch, WIDTH, len(ACTION), 2),
        Product(critics, batch, latent + len(ACTION), WIDTH, 2),  # critics and slow critics
        Product(critics, latent + len(ACTION), batch, WIDTH, 1),
        Product(critics, batch, WIDTH, latent + len(ACTION), 1),
        Product(critics, batch, WIDTH, WIDTH, 3),
        Product(critics, WIDTH, batch, WIDTH, 1),
        Product(critics, batch, WIDTH, 1, 2),
    ]


def run_of(products: list[Product]) -> Callable[[], None]:
    """What multiplies them all once, on memory of their own."""
    pairs = []
    for p in products:
        left, right = torch.randn(p.groups, p.rows, p.inner), torch.randn(p.groups, p.inner, p.columns)
        if p.groups == 1:
            left, right = left[0], right[0].t().contiguous().t()  # of the four layouts the fastest, and a Linear's
        pairs.append((left, right, torch.empty(left.shape[:-1] + right.shape[-1:]), p.times))

    def multiply() -> None:
        for left, right, out, times in pairs:
            for _ in range(times):
                torch.matmul(left, right, out=out)

    return multiply


def fill(replay: Replay, views: torch.Tensor) -> None:
    """Episodes of 30 transitions, half of them demonstrations."""
    rng = np.random.default_rng(0)
    for demonstration in (True, False):
        slot = -1
        for step in range(OBSERVATIONS):
            images = rng.integers(0, 256, replay.images.shape[1:], dtype=np.uint8)
            now = replay.add_observation(images, rng.normal(size=18).astype(np.float32), views, demonstration)
            if step % 30:
                action = rng.uniform(-1, 1, len(ACTION)).astype(np.float32)
                replay.add_transition(slot, now, action, 0.0, False, step % 30 == 29, False)
            slot = now


def seconds(do: Callable[[], object], times: int) -> float:
    """Wall time of each of `times` calls in a row."""
    start = time.perf_counter()
    for _ in range(times):
        do()
    return (time.perf_counter() - start) / times


def main(threads: int = 1, batch: int = 256, cameras: int = 1, n_obs_steps: int = 1) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = SacConfig(batch_size=batch, n_obs_steps=n_obs_steps)  # type: ignore[arg-type]
    trunk, size = load_resnet10(None), IMAGE_SIZE // STRIDE
    sac = Sac(config, cameras, size=size)

    def updating(replay: Replay) -> Callable[[], None]:
        def update() -> None:
            sac.update_critic(replay.sample(batch))
            sac.update_targets()

        return update

    products = critic_products(batch, cameras * n_obs_steps, config.critics)
    multiply, flops = run_of(products), sum(p.flops for p in products)
    with tempfile.TemporaryDirectory() as folder:
        shape, replays = (cameras, IMAGE_SIZE, OBSERVATIONS, OBSERVATIONS, 0, n_obs_steps), []
        for features in ("cached", "pixels"):
            encoder = ViewEncoder(trunk, config.views, config.pad, 0, cached=features == "cached")
            replays.append(Replay(encoder, Path(folder), {}, *shape, features=features))
            fill(replays[-1], torch.randn(1 + config.views, cameras, CHANNELS, size, size).half())
        cached, pixels = map(updating, replays)
        draw = replays[0].draw(batch)
        rows = [("its matrix products alone", multiply), ("sampling alone", lambda: replays[0].gather(draw))]
        best = dict.fromkeys(["critic update from cached features", *(name for name, _ in rows)], np.inf)
        for _ in range(ROUNDS):
            for name, do in [("critic update from cached features", cached), *rows]:
                best[name] = min(best[name], seconds(do, UPDATES))
        best["the same in pixel mode"] = seconds(pixels, 1)
    update, floor, pixel = (best[name] for name in ("critic update from cached features", rows[0][0], list(best)[-1]))
    counted = {rows[0][0]: flops, "the same in pixel mode": flops + 2 * batch * cameras * n_obs_steps * TRUNK_FLOPS}
    print(f"batch {batch}, {cameras} camera(s), {n_obs_steps} frame(s), {threads} thread(s)")
    print(f"{'':38}{'ms':>9}{'per s':>9}{'GFLOP':>9}{'GFLOP/s':>9}")
    for name, taken in best.items():
        gflop = counted.get(name, 0) / 1e9
        rate = f"{gflop:9.2f}{gflop / taken:9.0f}" if gflop else ""
        print(f"{name:38}{1e3 * taken:9.2f}{1 / taken:9.1f}{rate}")
    print(f"update / products: {update / floor:.2f} (target: at most {MOST_FLOOR})")
    print(f"pixel mode / update: {pixel / update:.0f} (target: at least {LEAST_PIXELS})")


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (word.split("=") for word in sys.argv[1:])})
