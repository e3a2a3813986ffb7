"""The learner's updates on a graphics card: replay copied to it, and a group of updates as one CUDA graph.

A critic update is some 250 small operations, and Python asks for them more slowly than a card carries them out. A
graph is asked for once. What it may not do is wait for the host, so sampling happens on the card as well, from a
copy of replay that is brought up to date between graphs, never within one. All shapes are fixed; wherever there are
no graphs the same code runs one operation at a time.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from so101.errors import DataError
from so101.learn.augment import shift
from so101.learn.networks import feature_maps
from so101.learn.replay import Batch, Replay
from so101.learn.sac import Sac

WARM_UP = 3  # groups before the capture: libraries and optimisers set themselves up, which no graph may hold
CHUNK = 256  # slots copied at once: 20 MB of features with 4 views
BESIDE = 1e9  # bytes: the card's context, weights, moments, and the activations of one update from features
TRUNK_BYTES = 200  # of activations and their gradients in the trunk for each byte of its frames, 10 MB at 128 x 128


class DeviceDraw(NamedTuple):
    """Which transitions (B,), and how each of their observations is seen.

    From the cache a look is the number of a view (B,); of pixels the shifts, crop offsets (B, frames, cameras, 2).
    """

    slots: Tensor
    looks: Tensor
    next_looks: Tensor


class DeviceReplay:
    """A copy of what Replay makes batches of, in one place on a device, that is sampled there."""

    def __init__(self, replay: Replay, batch_size: int, device: torch.device) -> None:
        self.replay, self.device, self.batch_size = replay, device, batch_size
        self.tensors = {
            name: torch.from_numpy(array[:1].copy()).to(device).new_zeros(array.shape)
            for name, array in _arrays(replay).items()
        }
        self.pool = torch.zeros(2, len(replay.starts), dtype=torch.int64, device=device)
        self.side = (torch.arange(batch_size, device=device) >= batch_size // 2).long()  # (B,) which pool each is from
        self.count = torch.zeros_like(self.side)  # (B,) transitions in that pool
        self._pools: tuple[np.ndarray, np.ndarray] | None = None
        online = replay.demo_capacity + np.arange(min(replay.online_count, replay.online_capacity))
        self._copy(np.concatenate([np.arange(replay.demo_count), online]))
        replay.touched.clear()

    def update(self) -> None:
        """Take over what changed in replay since the last call. Raises DataError while it holds no transition."""
        self._copy(np.array(sorted(self.replay.touched), np.int64))
        self.replay.touched.clear()
        if self.replay.pools is self._pools:
            return
        filled = [pool for pool in self.replay.pools if len(pool)]
        if not filled:
            raise DataError("replay: there is no transition to learn from yet")
        for row, pool in zip(self.pool, (filled[0], filled[-1]), strict=True):  # one alone is drawn from twice
            row[: len(pool)] = torch.from_numpy(pool).to(self.device)
        sizes = torch.tensor([len(filled[0]), len(filled[-1])], device=self.device)
        self.count.copy_(sizes[self.side])
        self._pools = self.replay.pools

    def draw(self, generator: torch.Generator) -> DeviceDraw:
        """Choose as Replay.draw does, half and half; shifts of pixels are drawn anew, not from the cached views'."""

        def randint(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator, device=self.device)

        encoder, frames, cameras = self.replay.encoder, self.replay.frames, self.replay.images.shape[1]
        # The remainder of 31 random bits favours no slot of 30,000 by more than 1 in 70,000.
        slots = self.pool[self.side, randint(0, 2**31 - 1, self.batch_size) % self.count]
        if self.replay.features == "cached":
            looks = randint(min(1, encoder.views), encoder.views, 2, self.batch_size)
        elif self.replay.features == "pixels":  # each frame of a stack is shifted by itself, as in the cache
            low, high = (0, 2 * encoder.pad) if encoder.views else (encoder.pad, encoder.pad)
            looks = randint(low, high, 2, self.batch_size, frames, cameras, 2)
        else:
            looks = randint(0, 2 * encoder.pad, 2, self.batch_size, 1, cameras, 2).expand(-1, -1, frames, -1, -1)
        return DeviceDraw(slots, looks[0], looks[1])

    def gather(self, draw: DeviceDraw) -> Batch:
        """The drawn transitions, as Replay.gather, gather_pixels and gather_frames make them."""
        kept, slots = self.tensors, draw.slots
        after = kept["next_slot"][slots]
        state, action, reward, terminated, changed = (
            kept[name][slots] for name in ("state", "action", "reward", "terminated", "changed")
        )
        seen, next_seen = self._look(slots, draw.looks), self._look(after, draw.next_looks)
        return Batch(seen, state, action, reward, terminated, next_seen, kept["state"][after], changed)

    @torch.no_grad()
    def _look(self, slots: Tensor, looks: Tensor) -> Tensor:
        """What is seen at `slots` (B,): features or pixels, see Batch.

        The frozen trunk runs in float32 as it does for the cache, on a card with the products in TF32 that are
        torch's default for convolutions. That differs from float64 by 0.08 %, and bfloat16 would by 0.9 %.
        """
        history = self.tensors["history"][slots]  # (B, frames)
        if self.replay.features == "cached":
            return self.tensors["seen"][history, looks[:, None]].flatten(1, 2)
        pixels = shift(self.tensors["seen"][history], looks, self.replay.encoder.pad).flatten(1, 2)
        return pixels if self.replay.features == "trained" else feature_maps(self.replay.encoder.trunk, pixels)

    def _copy(self, slots: np.ndarray) -> None:
        arrays = _arrays(self.replay)
        for start in range(0, len(slots), CHUNK):
            some = slots[start : start + CHUNK]
            where = torch.from_numpy(some).to(self.device)
            for name, tensor in self.tensors.items():
                tensor.index_copy_(0, where, torch.from_numpy(np.asarray(arrays[name][some])).to(self.device))


class UpdateGroups:
    """Makes `actor_every` critic updates, each on its own batch, and one of actor and temperature at a time.

    Says in one line where it does so without a graph, and why. Load a checkpoint before the first `run`: a graph
    holds the optimisers' memory, and is captured anew where that was replaced.
    """

    def __init__(self, sac: Sac, replay: Replay) -> None:
        self.sac, self.replay, self.device = sac, replay, sac.log_temperature.device
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        lacking = lacking_memory(replay, sac.config.batch_size, free)
        self.mirror = None if lacking else DeviceReplay(replay, sac.config.batch_size, self.device)
        reason = lacking or lacking_graphs(self.device)
        if reason:
            print(f"updates run one operation at a time, not as a CUDA graph: {reason}")
        self.captures = reason is None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0  # groups run on the way to a graph
        self._moment: Tensor | None = None  # one of the optimisers' as the graph knows it
        self._metrics: dict[str, Tensor] = {}

    def run(self, groups: int) -> None:
        """Make that many groups of updates, on replay as it is now. Returns before a graphics card is done."""
        if self.mirror is not None:
            self.mirror.update()
        for _ in range(groups):
            if not self.captures:
                self._metrics = self._group()
                continue
            if self._moment is not self._first_moment():
                self._warm, self._graph = 0, None
            if self._warm < WARM_UP:
                self._warm_up()
                self._warm, self._moment = self._warm + 1, self._first_moment()
                continue
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()

    def metrics(self) -> dict[str, float]:
        """What the newest group's updates returned; waits for the device."""
        return dict(zip(self._metrics, torch.stack(list(self._metrics.values())).tolist(), strict=True))

    def _group(self) -> dict[str, Tensor]:
        """The updates of one group; what the last of them measured."""
        for _ in range(self.sac.config.actor_every - 1):
            self.sac.update(self._sample(), actor=False)
        return self.sac.update(self._sample(), actor=True)

    def _sample(self) -> Batch:
        if self.mirror is None:
            return self.replay.sample(self.sac.config.batch_size).to(self.device)
        return self.mirror.gather(self.mirror.draw(self.sac.generator))

    def _warm_up(self) -> None:
        """A group like any other, on the stream of the capture: cuBLAS and autograd keep things by stream."""
        if self._warm == 0:
            self._stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._metrics = self._group()
        current.wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A group as a graph; nothing of it is carried out yet. The metrics are where each replay leaves its own."""
        graph = torch.cuda.CUDAGraph()
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14):  # later ones find out themselves
            graph.register_generator_state(self.sac.generator)
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self._stream):
            self._metrics = self._group()
        return graph

    def _first_moment(self) -> Tensor | None:
        """The first of the critics' moments, None before there are any; loading a checkpoint replaces them all."""
        return next((state["exp_avg"] for state in self.sac.critic_optimizer.state.values()), None)


def lacking_graphs(device: torch.device) -> str | None:
    """Why there are no CUDA graphs on a device; None where there are."""
    if device.type == "cuda" and torch.version.hip is None:
        return None
    return f"ROCm {torch.version.hip} has none" if device.type == "cuda" else f"device {device} has none"


def lacking_memory(replay: Replay, batch_size: int, free: int | None) -> str | None:
    """Why a copy of `replay` has no place in `free` bytes of a card; None where it has, or nobody counts them."""
    needed = sum(array.nbytes for array in _arrays(replay).values()) + BESIDE
    if replay.features != "cached":
        needed += TRUNK_BYTES * replay.images[0].nbytes * batch_size * replay.frames
    if free is None or needed <= free:
        return None
    return (
        f"replay and updates need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on the card, so batches come "
        "from the host; lower sac.buffer_size or sac.views"
    )


def _arrays(replay: Replay) -> dict[str, np.ndarray]:
    """What batches are made of, each by slot; `seen` is the features or, without a cache, the frames."""
    names = ("history", "next_slot", "state", "action", "reward", "terminated", "changed")
    seen = replay.images if replay.file is None else replay.file.features
    return {"seen": seen, **{name: getattr(replay, name) for name in names}}
