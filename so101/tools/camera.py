"""List the cameras of this machine, or show what one of them sees and what the network will see of it.

    python -m so101.tools.camera                                 what is there
    python -m so101.tools.camera source=0 preprocess.crop=[0,80,480,480]
    python -m so101.tools.camera --config configs/camera.json image=wrist.png
    python -m so101.tools.camera source=sim                      the simulated wrist camera

The picture has the whole frame with the crop drawn in it on the left, and the network's pixels on the right.
"""

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from so101.config import launch, option, require_within
from so101.env import EnvConfig
from so101.errors import ConfigError, DataError
from so101.images import preprocess
from so101.rig import ArmConfig, RigConfig, open_rig
from so101.robot.camera import Camera, CameraConfig
from so101.robot.v4l2 import find_cameras
from so101.schema import Preprocess, RewardSpec
from so101.sim.camera import CameraConfig as SimCameraConfig
from so101.timing import Clock, Rate

GREEN = (0, 255, 0)
LOOKS_PER_S = 10.0  # as often as a control loop


@dataclass
class Config(CameraConfig):
    """A camera as in a rig's config, and what to do with it."""

    source: str = option(
        "", "path under /dev/v4l/by-id, index, http stream, video file or sim; empty: list what is there"
    )
    preprocess: Preprocess = option(Preprocess(), "the crop that is drawn, and the network's image")
    image: str | None = option(None, "PNG or JPG to write, which must not exist; null: a new camera-TIME.png here")
    seconds: float = option(3.0, "how long the rate and the frames' age are measured")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, seconds=(0.5, 600))
        if self.image is not None and Path(self.image).suffix.lower() not in (".png", ".jpg"):
            raise ConfigError(f"image: got {self.image!r}, must end in .png or .jpg")


def main(config: Config) -> None:
    """List, or look. Raises HardwareError for a camera that fails, DataError for a crop or file that will not do."""
    if not config.source:
        return print_cameras()
    path = Path(config.image or time.strftime("camera-%Y%m%d-%H%M%S.png"))
    if path.exists():
        raise DataError(f"{path}: exists, and nothing is overwritten; name another with image=...")
    side_by_side(np.zeros((config.height, config.width, 3), np.uint8), config.preprocess)  # a crop that does not fit
    frame = render(config) if config.source == ArmConfig().port else measure(config)
    _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(side_by_side(frame, config.preprocess), cv2.COLOR_RGB2BGR))
    with open(path, "xb") as file:
        file.write(encoded.tobytes())
    print(f"{path}: the frame with the crop {config.preprocess.crop}, and what the network sees")


def print_cameras() -> None:
    """What is there, and how to look at one."""
    cameras = find_cameras()
    for camera in cameras:
        print(f"{camera.source}  ({camera.name}, {camera.device})", *camera.formats, sep="\n    ")
    if cameras:
        print(f"look at one with source={cameras[0].source}")
    elif sys.platform == "linux":
        print("No camera is plugged in; source=sim shows the simulated one.")
    else:
        print("This system names no camera before it is opened: try source=0, source=1, ...")


def render(config: Config) -> np.ndarray:
    """The simulated camera's frame at the start of an episode, (H, W, 3) uint8 RGB."""
    rig_config = RigConfig(
        cameras={"camera": config}, sim_camera=SimCameraConfig(width=config.width, height=config.height)
    )
    with open_rig(rig_config, 0) as rig:
        observation, _ = rig.make_env(EnvConfig(), config.preprocess, RewardSpec(), 0).reset()
        return observation.frames["camera"]


def measure(config: Config) -> np.ndarray:
    """Watch a real camera for a while, print its rate and its frames' age, return its last frame."""
    clock = Clock()
    with closing(Camera("camera", config, clock)) as camera:
        rate, ages = Rate(clock, 1 / LOOKS_PER_S), []
        for _ in range(round(config.seconds * LOOKS_PER_S)):
            rate.wait()
            frame, taken = camera.latest()
            ages.append(1000 * (clock.now() - taken))
        print(f"{config.width}x{config.height}, {camera.rate:.1f} frames/s, asked for {config.fps} ({camera.format})")
        print(
            f"a control loop finds a frame {np.median(ages):.0f} ms old, {max(ages):.0f} ms at most, counted from its "
            "arrival here; the way from the light to this machine comes on top of that"
        )
        if camera.report():
            print(f"warning: {camera.report()}")
    return frame


def side_by_side(frame: np.ndarray, spec: Preprocess) -> np.ndarray:
    """The frame (H, W, 3) with the crop drawn, and beside it the network's image at the same height, RGB.

    Raises DataError where the crop does not fit.
    """
    seen = preprocess(frame, spec)
    height, width = frame.shape[:2]
    top, left, high, wide = spec.crop or (0, 0, height, width)
    drawn = cv2.rectangle(frame.copy(), (left, top), (left + wide - 1, top + high - 1), GREEN, 2)
    return np.hstack([drawn, cv2.resize(seen, (height, height), interpolation=cv2.INTER_NEAREST)])


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
