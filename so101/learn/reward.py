"""The success classifier: what it is, how its answers become a success, and how it is kept on disk.

The trunk is frozen and everything above it is trained (reward_training.py).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from so101 import config as settings
from so101.config import option, require_within
from so101.errors import ConfigError, DataError
from so101.learn.networks import EMBEDDING, SpatialHead
from so101.learn.resnet10 import CHANNELS, STRIDE, require_trunk
from so101.learn.weights import load_strict, read_safetensors, write_safetensors
from so101.schema import OPENING, TOOL_Z, require_same


@dataclass(frozen=True)
class RewardConfig:
    """How the success classifier is trained, and how its answers become a success."""

    views: int = option(3, "shifted and colour-jittered copies of each training frame, besides the plain one")
    pad: int = option(4, "largest shift of a copy, in pixels of the network's image")
    brightness: float = option(0.6, "brightness of a copy: a factor between 1 - this and 1 + this")
    contrast: float = option(0.3, "contrast of a copy, likewise")
    saturation: float = option(0.5, "saturation of a copy, likewise")
    hue: float = option(0.1, "hue of a copy: turned by up to this share of a whole turn either way")
    sharpness: float = option(1.0, "sharpness of a copy: a factor between 1 / (1 + this) and 1 + this")
    held_out: float = option(0.2, "share of the episodes kept from training, to choose the threshold on")
    steps: int = option(1000, "gradient steps at most")
    evaluate_every: int = option(25, "gradient steps between looks at the held-out episodes; 0: one look an epoch")
    patience: int = option(12, "stop after so many looks without a lower loss on the held-out episodes")
    min_delta: float = option(1e-3, "a loss that fell by less than this is no lower one")
    batch_size: int = option(64, "frames per step; half of them are successes")
    lr: float = option(3e-4, "AdamW's learning rate")
    weight_decay: float = option(0.02, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "a longer gradient is cut to this length; 0: never")
    dropout: float = option(0.3, "share of values dropped in training, in each camera's head and after it")
    seed: int = option(0, "of the split, the copies, the first weights and the batches")
    consecutive: int = option(3, "a success is this many frames in a row above the threshold")
    tolerance_frames: int = option(2, "a success this many frames before its label is not a false one")
    guard: bool = option(True, "also require the tool height and the opening that the successes were seen with")
    guard_margin_z: float = option(0.01, "m added to both ends of the guard's range of heights")
    guard_margin_opening: float = option(0.05, "added to both ends of the guard's range of openings (0..1)")

    def __post_init__(self) -> None:
        many = 1_000_000_000
        require_within(
            self, views=(0, 1000), pad=(0, 16), brightness=(0, 1), contrast=(0, 1), saturation=(0, 1), hue=(0, 0.5),
            sharpness=(0, 10), held_out=(0.01, 0.99), steps=(1, many), evaluate_every=(0, many), patience=(1, many),
            min_delta=(0, 1), batch_size=(2, 65_536), lr=(1e-9, 1), weight_decay=(0, 1), max_grad_norm=(0, many),
            dropout=(0, 0.9), consecutive=(1, 1000), tolerance_frames=(0, 1000), guard_margin_z=(0, 1),
            guard_margin_opening=(0, 1),
        )  # fmt: skip
        if self.batch_size % 2:
            raise ConfigError(f"batch_size: got {self.batch_size}, must be even: half of it are successes")


class SuccessClassifier(nn.Module):
    """Trunk features (B, cameras, 512, size, size) -> logit (B,) of "this frame shows success"."""

    def __init__(self, cameras: int = 1, size: int = 4, dropout: float = 0.3) -> None:
        super().__init__()
        self.heads = nn.ModuleList(SpatialHead(CHANNELS, size, dropout=dropout) for _ in range(cameras))
        self.mlp = nn.Sequential(
            nn.Linear(EMBEDDING * cameras, 256),
            nn.Dropout(dropout),
            nn.LayerNorm(256),
            nn.ReLU(),
            nn.Linear(256, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        per_camera = zip(self.heads, features.unbind(1), strict=True)
        embedded = torch.cat([head(maps) for head, maps in per_camera], dim=1)  # (B, 256 * cameras)
        return self.mlp(embedded).squeeze(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> np.ndarray:
        """(N, cameras, 512, h, w) of any float type, anywhere -> (N,) float32 in [0, 1], without dropout."""
        self.eval()
        device = next(self.parameters()).device
        parts = [self(part.to(device).float()).sigmoid().cpu().numpy() for part in features.split(256)]
        return np.concatenate(parts)


@dataclass(frozen=True)
class StateGuard:
    """The tool heights (m) and gripper openings in which a success can be: from a wrist camera alone, a cube
    that is grasped and one that is lifted look alike."""

    height: tuple[float, float]
    opening: tuple[float, float]

    def allows(self, state: np.ndarray) -> bool:
        """Whether a state (18,) lies within both ranges."""
        inside_height = self.height[0] <= state[TOOL_Z] <= self.height[1]
        return bool(inside_height and self.opening[0] <= state[OPENING] <= self.opening[1])


class SuccessDetector:
    """Classifier, threshold, guard and vote: everything between a frame's features and "it succeeded"."""

    def __init__(
        self, classifier: SuccessClassifier, threshold: float, guard: StateGuard | None, consecutive: int
    ) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.threshold, self.guard, self.consecutive = threshold, guard, consecutive
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far; call it when an episode begins."""
        self.in_a_row, self.vetoed = 0, False  # frames; whether the newest would count but for the guard

    def probability(self, features: Tensor) -> float:
        """How likely one frame's features (cameras, 512, h, w) show success, in [0, 1]."""
        return float(self.classifier.probabilities(features[None])[0])

    def update(self, probability: float, state: np.ndarray) -> bool:
        """Count one observation in; True from the `consecutive`-th in a row that is a success."""
        likely = probability > self.threshold
        self.vetoed = likely and self.guard is not None and not self.guard.allows(state)
        self.in_a_row = self.in_a_row + 1 if likely and not self.vetoed else 0
        return self.in_a_row >= self.consecutive


@dataclass(frozen=True)
class RewardFile:
    """What reward.json holds beside model.safetensors."""

    schema: dict[str, Any] = option(help="what the classifier's frames and states were")
    trunk_hash: str = option(help="of the encoder whose features it was trained on")
    model_sha256: str = option(help="of model.safetensors")
    threshold: float = option(help="a frame above it counts")
    consecutive: int = option(help="frames in a row that make a success")
    guard: StateGuard | None = option(help="tool heights in m and openings in which a success can be")
    provenance: dict[str, Any] = option(help="where the classifier comes from")

    def __post_init__(self) -> None:
        require_within(self, threshold=(0, 1), consecutive=(1, 1000))


def save_reward(
    folder: Path,
    detector: SuccessDetector,
    schema: dict[str, Any],
    trunk_hash: str,
    provenance: dict[str, Any],
) -> None:
    """Write model.safetensors and reward.json into `folder`; the second commits the first.

    Raises DataError where the folder holds a classifier already.
    """
    if (folder / "reward.json").exists():
        raise DataError(f"{folder}: holds a reward classifier already, and it is not overwritten; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.safetensors"
    write_safetensors(model, detector.classifier.state_dict())
    about = RewardFile(
        schema,
        trunk_hash,
        hashlib.sha256(model.read_bytes()).hexdigest(),
        detector.threshold,
        detector.consecutive,
        detector.guard,
        provenance,
    )
    settings.save(about, folder / "reward.json")


def read_reward_file(folder: Path) -> RewardFile:
    """What `folder`'s reward.json says. Raises DataError where it is missing or damaged."""
    try:
        return settings.load(RewardFile, folder / "reward.json")
    except ConfigError as error:
        raise DataError(f"no usable reward classifier: {error}") from error


def load_reward(folder: Path, schema: dict[str, Any], trunk_hash: str) -> SuccessDetector:
    """The detector saved in `folder`, on the CPU.

    Raises DataError where a file is missing or damaged, or where it was made for another schema or trunk.
    """
    about = read_reward_file(folder)
    require_same(about.schema, schema, str(folder / "reward.json"))
    require_trunk(about.trunk_hash, trunk_hash, str(folder))
    model = folder / "model.safetensors"
    stored = read_safetensors(model)
    if hashlib.sha256(model.read_bytes()).hexdigest() != about.model_sha256:
        raise DataError(f"{model}: is not the file that reward.json was written for; restore it or train anew")
    classifier = SuccessClassifier(len(schema["cameras"]), schema["image"]["image_size"] // STRIDE)
    load_strict(classifier, stored, str(model))
    return SuccessDetector(classifier, about.threshold, about.guard, about.consecutive)
