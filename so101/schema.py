"""What an action, a state and a network's image are: names, order, units, ranges. Stated here, once.

The description made here travels inside every dataset and every checkpoint; `require_same` refuses to
go on with one that was made under another, and says what differs.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from so101.config import option
from so101.errors import ConfigError, DataError

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
ARM_JOINTS = JOINTS[:5]  # the gripper does not move the tool

ACTION = ("delta_x", "delta_y", "delta_z", "gripper")  # each in [-1, 1], and nothing else anywhere

# Radians, metres and seconds; the gripper's position is its opening, 0 closed .. 1 open.
STATE = (
    *(f"{joint}.pos" for joint in JOINTS),
    *(f"{joint}.vel" for joint in JOINTS),
    *("tool.x", "tool.y", "tool.z"),
    *("tool.roll", "tool.pitch", "tool.yaw"),
)
UNITS = "rad, m, s; gripper opening 0 closed .. 1 open"
# The smallest standard deviation that normalisation divides by, in each entry's own unit: an entry that
# hardly moved in the demonstrations must not be blown up into noise (the original's pitch was, by 1e8).
STATE_FLOOR = (*[0.02] * 5, 0.05, *[0.1] * 5, 0.2, *[0.005] * 3, *[0.02] * 3)

OPENING = STATE.index("gripper.pos")
TOOL_XYZ = slice(STATE.index("tool.x"), STATE.index("tool.z") + 1)
TOOL_Z = STATE.index("tool.z")

IMAGE_MULTIPLE = 32  # the trunk's stride; its feature map is image_size / 32 on a side


@dataclass(frozen=True)
class Preprocess:
    """How a camera's frame becomes the network's image: crop, then area-resize to a square."""

    crop: list[int] | None = option(
        [0, 80, 480, 480],
        "top, left, height, width in the camera's pixels; null for frames cropped when they were recorded",
    )
    image_size: int = option(128, "side of the network's square image in pixels, a multiple of 32")

    def __post_init__(self) -> None:
        if self.image_size < IMAGE_MULTIPLE or self.image_size % IMAGE_MULTIPLE:
            raise ConfigError(
                f"image_size: got {self.image_size}, must be a multiple of {IMAGE_MULTIPLE} "
                f"(the encoder's stride); 128 is the usual choice"
            )
        if self.crop is not None and (len(self.crop) != 4 or min(self.crop) < 0 or min(self.crop[2:]) < 1):
            raise ConfigError(f"crop: got {self.crop}, must be [top, left, height, width] in pixels, or null")


@dataclass(frozen=True)
class RewardSpec:
    """What a transition pays. Success pays once and ends the episode, so flickering cannot pay."""

    success: float = option(1.0, "reward of the transition that succeeds")
    step_penalty: float = option(0.0, "taken off every transition's reward (0.05 in the author's own runs)")

    def of(self, success: bool) -> float:
        """The reward of one transition."""
        return self.success * success - self.step_penalty


def describe(
    preprocess: Preprocess, cameras: list[str], fps: float, action_scale: float, gripper_step: float
) -> dict[str, Any]:
    """Everything that recorded data and a trained network must agree on, as plain JSON values."""
    return {
        "state": list(STATE),
        "action": list(ACTION),
        "units": UNITS,
        "action_scale_m": action_scale,
        "gripper_step": gripper_step,
        "fps": fps,
        "cameras": list(cameras),
        "image": asdict(preprocess),
    }


def schema_hash(description: dict[str, Any]) -> str:
    """A short digest of a description, for file names and log lines."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def require_same(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Refuse data or weights whose description is not the wanted one.

    Raises DataError, naming each entry that differs with both values.
    """
    differing = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if differing:
        said = "; ".join(f"{key} is {stored.get(key)!r} there, {wanted.get(key)!r} here" for key in differing)
        raise DataError(
            f"{where}: made under another schema: {said}. Use the config it was made with, or make it anew."
        )
