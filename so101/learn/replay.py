"""The replay buffer: each frame stored once, encoded once, and drawn from memory ever after.

An observation has a slot; a transition belongs to the slot it starts from and names the slot it leads to, so
that a next observation is never guessed. Slots below `demo_capacity` hold demonstrations and are never used
again; the rest are a ring in which the oldest online observation makes way for the newest, and the
transition that started from it goes with it. An observation also knows the ones before it that its episode led
through (`history`): a stack of frames is made of them, whoever drove, and never of an unrelated frame.

For each camera a slot takes (1 + views) x 16 KB of the feature file and 48 KB of memory for the frame at
128 x 128 pixels: 30,000 slots with 4 views are 2.5 and 1.5 GB. Both are taken only as slots are filled.
"""

import itertools
import json
import math
import shutil
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from so101.errors import DataError
from so101.files import write_atomic
from so101.learn.augment import random_shift, shift
from so101.learn.networks import feature_maps
from so101.learn.resnet10 import CHANNELS, STRIDE, ResNet10
from so101.schema import ACTION, STATE

TURNS = 1 << 16  # a mark's lowest bits count how often the views were renewed


class Batch(NamedTuple):
    """B transitions; features are (B, frames * cameras, 512, h, w), float16 from the cache, oldest frame first.

    Where the encoder is trained they are its pixels instead, uint8 (B, frames * cameras, S, S, 3).
    """

    features: Tensor
    state: Tensor  # (B, 18) raw: radians, metres, seconds
    action: Tensor  # (B, 4)
    reward: Tensor  # (B,)
    terminated: Tensor  # (B,) bool: no value beyond
    next_features: Tensor
    next_state: Tensor
    changed: Tensor  # (B,) bool: the action told the gripper to open where it was last told to close, or to close

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Draw(NamedTuple):
    """Which transitions, and which cached view of each of their observations."""

    slots: np.ndarray
    views: np.ndarray
    next_views: np.ndarray


class ViewEncoder:
    """Frames -> trunk features of the frame as it is and of randomly shifted copies of it, as in DrQ.

    The shifts depend only on `seed`, the frame's own pixels and its `turn`, the times that its shifted views were
    renewed, so that there is no state to save. `cached` False leaves them to be encoded when they are drawn.
    """

    def __init__(self, trunk: ResNet10, views: int, pad: int, seed: int, cached: bool = True) -> None:
        self.trunk, self.views, self.pad, self.seed, self.cached = trunk, views, pad, seed, cached
        self._last: tuple[np.ndarray, Tensor] | None = None

    def shifted(self, images: np.ndarray, turn: int = 0) -> Tensor:
        """The views in pixels, uint8 (1 + views, cameras, S, S, 3); the first is not shifted."""
        frame = torch.from_numpy(images.copy())
        digest = zlib.crc32(frame.numpy().tobytes())
        if turn:
            digest = zlib.crc32(turn.to_bytes(4, "little"), digest)
        generator = torch.Generator().manual_seed(digest ^ self.seed)
        copies = frame.expand(self.views, *frame.shape)
        return torch.cat([frame[None], random_shift(copies, self.pad, generator)])

    def encode(self, images: np.ndarray) -> Tensor:
        """One observation's frames, uint8 (cameras, S, S, 3) -> float16 (1 + views, cameras, 512, h, w).

        Without a cache to fill it is the unshifted view alone.

        Given the same array object again, the last result is returned: classifier, policy and replay share
        one encoding. The array becomes read-only, so that a buffer filled anew cannot pass for the old frame.
        """
        if self._last is None or self._last[0] is not images:
            images.setflags(write=False)
            self._last = images, self.run_trunk(self.shifted(images)[: None if self.cached else 1]).half()
        return self._last[1]

    @torch.no_grad()
    def run_trunk(self, pixels: Tensor) -> Tensor:
        """uint8 (n, cameras, S, S, 3) -> float32 (n, cameras, 512, h, w), in one pass, on the CPU."""
        return feature_maps(self.trunk, pixels).cpu()


class FeatureFile:
    """Features of every slot in a memory-mapped float16 file, with beside it what they were made with.

    A file made under another key is left alone, and the next free name used. `marks` says which observation
    each slot's features belong to; it is written after them, so a kill leaves none under a wrong mark.
    """

    def __init__(self, folder: Path, key: dict[str, Any], shape: tuple[int, ...]) -> None:
        """`shape` is (slots, 1 + views, cameras, 512, h, w); it becomes part of the key."""
        key = json.loads(json.dumps({**key, "shape": shape}))
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"features{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
        paths = next(found for name in names if (found := _usable(folder / name, key)))
        self.path = paths[0]
        self.features = np.memmap(paths[0], np.float16, "r", shape=shape)
        self.marks = np.memmap(paths[1], np.uint64, "r+", shape=shape[:1])

    def write(self, slot: int, features: Tensor, mark: int) -> None:
        """Store one slot's features, (1 + views, cameras, 512, h, w), as those of observation `mark`."""
        self.marks[slot] = 0
        # Through the file, not the map: on a full disk a map ends the process (SIGBUS), a write raises OSError.
        with open(self.path, "rb+", buffering=0) as file:
            file.seek(slot * features.numel() * features.element_size())
            file.write(features.contiguous().numpy().data)
        self.marks[slot] = mark


def _usable(stem: Path, key: dict[str, Any]) -> tuple[Path, Path] | None:
    """The files of this name, made now if it is free; None where they were made under another key."""
    features, marks, described = (stem.with_suffix(suffix) for suffix in (".f16", ".marks", ".json"))
    sizes = {features: 2 * math.prod(key["shape"]), marks: 8 * key["shape"][0]}
    if not any(path.exists() for path in (features, marks, described)):
        free, needed = shutil.disk_usage(stem.parent).free, sizes[features]
        if free < needed:
            raise DataError(
                f"{features}: the feature cache may grow to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                f"are free on this disk; lower sac.buffer_size or sac.views, or choose another output folder"
            )
        with open(features, "xb") as file:
            file.truncate(sizes[features])  # sparse: takes room on the disk only where it is written
        with open(marks, "xb") as file:
            file.write(bytes(sizes[marks]))
        write_atomic(described, json.dumps(key, indent=2) + "\n")
        return features, marks
    whole = described.exists() and all(path.exists() and path.stat().st_size == size for path, size in sizes.items())
    return (features, marks) if whole and json.loads(described.read_text()) == key else None


class Replay:
    """Observations and transitions of demonstrations and online episodes; batches are half and half."""

    def __init__(
        self,
        encoder: ViewEncoder,
        folder: Path,
        key: dict[str, Any],
        cameras: int,
        image_size: int,
        demo_capacity: int,
        online_capacity: int,
        seed: int,
        frames: int = 1,
        features: Literal["cached", "pixels", "trained"] = "cached",
    ) -> None:
        """`key` says what features depend on, trunk and schema; capacities count observations.

        `frames` is how many of the newest an observation is stacked of; only `features` "cached" makes a file.
        """
        self.encoder, self.demo_capacity, self.online_capacity = encoder, demo_capacity, online_capacity
        slots, size = demo_capacity + online_capacity, image_size // STRIDE
        shape = (slots, 1 + encoder.views, cameras, CHANNELS, size, size)
        key = {**key, "pad": encoder.pad, "seed": encoder.seed}
        self.file = FeatureFile(folder, key, shape) if features == "cached" else None
        self.features, self.frames = features, frames
        self.images = np.zeros((slots, cameras, image_size, image_size, 3), np.uint8)
        self.state = np.zeros((slots, len(STATE)), np.float32)
        self.next_slot = np.zeros(slots, np.int64)
        self.action = np.zeros((slots, len(ACTION)), np.float32)
        self.reward = np.zeros(slots, np.float32)
        self.terminated, self.truncated, self.by_human = np.zeros((3, slots), bool)
        self.starts = np.zeros(slots, bool)  # a transition starts from this slot
        self.history = np.zeros((slots, frames), np.int64)  # slots of the frames seen, oldest first
        self.held = np.zeros(slots, np.int8)  # what the gripper was last told: 1 open, -1 close
        self.changed = np.zeros(slots, bool)
        self.turn = np.zeros(slots, np.int64)  # times that the shifted views were renewed
        self.age = np.zeros(slots, np.int64)  # the larger, the later they were made; 0: there are none
        self._ages = itertools.count(1)
        self.touched: set[int] = set()  # slots that changed, for a copy of this elsewhere to follow
        self.demo_count = self.online_count = 0  # observations ever added
        self.rng = np.random.default_rng(seed)
        self._pools: tuple[np.ndarray, np.ndarray] | None = None

    def add_observation(
        self, images: np.ndarray, state: np.ndarray, views: Tensor | None = None, demonstration: bool = False
    ) -> int:
        """Store frames (cameras, S, S, 3) uint8 and state (18,); returns the slot.

        `views` are the frames' features where they are known (live: the actor encoded them), all or the unshifted one.
        What is missing, as for demonstrations and episodes read back from disk, is taken from the feature file if it
        holds this observation, and encoded if it does not. Raises DataError for other frames than these, and where the
        demonstrations' slots are full.
        """
        if images.dtype != np.uint8 or images.shape != self.images.shape[1:]:
            wanted = f"uint8 {self.images.shape[1:]}"
            raise DataError(f"replay: frames are {images.dtype} {images.shape}, must be {wanted}: see so101/images.py")
        if demonstration:
            slot = number = self.demo_count
            if slot >= self.demo_capacity:
                raise DataError(f"replay: more than the {self.demo_capacity} demonstration frames it was made for")
            self.demo_count += 1
        else:
            number = self.online_count
            slot = self.demo_capacity + number % self.online_capacity
            self.online_count += 1
            for ahead in range(1, self.frames):  # a stack that loses a frame is not what was seen
                after = self.demo_capacity + (number + ahead) % self.online_capacity
                self.starts[after] &= slot not in self.history[after]
        self.images[slot], self.state[slot] = images, state
        self.starts[slot] = False
        self.history[slot], self.held[slot] = slot, 1  # an episode starts from here, its gripper open, until told else
        self._pools = None
        self.touched.add(slot)
        if self.file is not None:
            mark = _mark(demonstration, number, self.state[slot])
            stored, whole = int(self.file.marks[slot]), views is not None and len(views) > self.encoder.views
            known = not whole and 0 <= stored - mark < TURNS
            self.turn[slot] = stored - mark if known else 0
            if not known:
                self.file.write(slot, self._complete(images, views), mark)
            self.age[slot] = next(self._ages)
        return slot

    def _complete(self, images: np.ndarray, views: Tensor | None) -> Tensor:
        """All views of some frames, where some of them or none are encoded."""
        if views is None:
            return self.encoder.encode(images)
        missing = self.encoder.shifted(images)[len(views) :]
        return torch.cat([views, self.encoder.run_trunk(missing).half()]) if len(missing) else views

    def refresh(self) -> bool:
        """Renew the shifted views of the observation whose are oldest; False where there are none to renew.

        For a learner with nothing else to do: one call takes about as long as encoding a frame `views` times.
        """
        if self.file is None or not self.encoder.views or not self.age.any():
            return False
        made = np.flatnonzero(self.age)
        slot = int(made[self.age[made].argmin()])
        self.turn[slot] = (self.turn[slot] + 1) % TURNS
        shifted = self.encoder.shifted(self.images[slot], int(self.turn[slot]))[1:]
        unshifted = torch.from_numpy(self.file.features[slot, :1].copy())
        views = torch.cat([unshifted, self.encoder.run_trunk(shifted).half()])
        mark = int(self.file.marks[slot])
        self.file.write(slot, views, mark - mark % TURNS + int(self.turn[slot]))
        self.age[slot] = next(self._ages)
        self.touched.add(slot)
        return True

    def add_transition(
        self,
        slot: int,
        next_slot: int,
        action: np.ndarray,
        reward: float,
        terminated: bool,
        truncated: bool,
        by_human: bool,
    ) -> None:
        """Store what led from one stored observation to the next: `action` (4,) as commanded, in [-1, 1]."""
        self.next_slot[slot], self.action[slot], self.reward[slot] = next_slot, action, reward
        self.terminated[slot], self.truncated[slot] = terminated, truncated
        self.by_human[slot] = by_human
        told = round(float(action[-1]))  # 0, stay, is also a small part of a move, as the discrete gripper reads it
        self.changed[slot] = told not in (0, self.held[slot])
        self.held[next_slot] = told or self.held[slot]
        self.history[next_slot] = [*self.history[slot, 1:], next_slot]
        self.starts[slot] = True
        self.touched |= {slot, next_slot}
        self._pools = None

    def correct(self, slot: int, reward: float, terminated: bool) -> None:
        """Give the transition from `slot` a person's verdict instead of what was stored."""
        if not self.starts[slot]:
            raise DataError(f"replay: slot {slot} holds no transition to correct; correct an episode before the next")
        self.reward[slot], self.terminated[slot] = reward, terminated
        self.truncated[slot] &= not terminated
        self.touched.add(slot)

    def discard(self, slots: list[int]) -> None:
        """Take back the online observations in `slots`, an episode that was dropped, say.

        Where they are the newest, the ring steps back, so that what it holds stays in step with the episodes that
        were kept on disk.
        """
        newest = [self.demo_capacity + n % self.online_capacity for n in range(self.online_count)[-len(slots) :]]
        if slots == newest:
            self.online_count -= len(slots)
        self.starts[slots], self.age[slots] = False, 0
        self.touched.update(slots)
        self._pools = None

    @property
    def pools(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the transitions that count as demonstrations (interventions too) and as online."""
        if self._pools is None:
            online = self.demo_capacity + np.flatnonzero(self.starts[self.demo_capacity :])
            demos = np.flatnonzero(self.starts[: self.demo_capacity])
            self._pools = np.concatenate([demos, online[self.by_human[online]]]), online
        return self._pools

    def draw(self, batch_size: int) -> Draw:
        """Choose with replacement: half demonstrations, half online, or all of what there is."""
        filled = [pool for pool in self.pools if len(pool)]
        if not filled:
            raise DataError("replay: there is no transition to learn from yet")
        counts = [batch_size] if len(filled) == 1 else [batch_size // 2, batch_size - batch_size // 2]
        slots = [self.rng.choice(pool, count) for pool, count in zip(filled, counts, strict=True)]
        last = self.encoder.views
        views, next_views = self.rng.integers(min(1, last), last, (2, batch_size), endpoint=True)
        return Draw(np.concatenate(slots), views, next_views)

    def gather(self, draw: Draw) -> Batch:
        """The drawn transitions, with features from the cache."""
        slots, after = draw.slots, self.next_slot[draw.slots]
        return self._batch(draw, self._cached(slots, draw.views), self._cached(after, draw.next_views))

    def gather_pixels(self, draw: Draw) -> Batch:
        """The drawn transitions, features encoded anew from the frames: what the cache is checked against."""
        slots, after = draw.slots, self.next_slot[draw.slots]
        return self._batch(draw, self._encoded(slots, draw.views), self._encoded(after, draw.next_views))

    def gather_frames(self, draw: Draw) -> Batch:
        """The drawn transitions with pixels for an encoder that is trained, each observation shifted as one."""
        slots, after = draw.slots, self.next_slot[draw.slots]
        return self._batch(draw, self._shifted(slots), self._shifted(after))

    def sample(self, batch_size: int) -> Batch:
        """A random batch; current and next observation each in a shifted view of its own."""
        gather = {"cached": self.gather, "pixels": self.gather_pixels, "trained": self.gather_frames}[self.features]
        return gather(self.draw(batch_size))

    def _batch(self, draw: Draw, features: Tensor, next_features: Tensor) -> Batch:
        slots, after = draw.slots, self.next_slot[draw.slots]
        rows = [self.state[slots], self.action[slots], self.reward[slots], self.terminated[slots]]
        state, action, reward, terminated = map(torch.from_numpy, rows)
        next_state, changed = torch.from_numpy(self.state[after]), torch.from_numpy(self.changed[slots])
        return Batch(features, state, action, reward, terminated, next_features, next_state, changed)

    def _cached(self, slots: np.ndarray, views: np.ndarray) -> Tensor:
        if self.file is None:
            raise DataError(f"replay: made for features {self.features!r}, there is no cache; make it for 'cached'")
        stacked = np.asarray(self.file.features[self.history[slots], views[:, None]])
        return torch.from_numpy(stacked).flatten(1, 2)

    def _encoded(self, slots: np.ndarray, views: np.ndarray) -> Tensor:
        seen = self.history[slots]  # (B, frames)
        pairs = zip(seen.flat, views.repeat(self.frames), strict=True)
        shifted = [self.encoder.shifted(self.images[slot], int(self.turn[slot]))[view] for slot, view in pairs]
        return self.encoder.run_trunk(torch.stack(shifted)).unflatten(0, seen.shape).flatten(1, 2)

    def _shifted(self, slots: np.ndarray) -> Tensor:
        images = torch.from_numpy(self.images[self.history[slots]])  # (B, frames, cameras, S, S, 3)
        pad, (count, frames, cameras) = self.encoder.pad, images.shape[:3]
        offsets = self.rng.integers(0, 2 * pad, (count, 1, cameras, 2), endpoint=True).repeat(frames, axis=1)
        return shift(images, torch.from_numpy(offsets), pad).flatten(1, 2)

    def rng_state(self) -> dict[str, Any]:
        """The sampler's state, as plain values."""
        return dict(self.rng.bit_generator.state)

    def load_rng_state(self, state: dict[str, Any]) -> None:
        """Go on drawing where `rng_state` was taken."""
        self.rng.bit_generator.state = state


def _mark(demonstration: bool, number: int, state: np.ndarray) -> int:
    """What tells an observation from any other: its place in its stream and its state; never 0, a free slot.

    Not its pixels: online frames come back from a lossy video. The lowest bits are 0, for the turn of its views.
    """
    digest = blake2b(bytes([demonstration]) + number.to_bytes(8, "little") + state.tobytes(), digest_size=8)
    return (int.from_bytes(digest.digest(), "little") | TURNS) // TURNS * TURNS
