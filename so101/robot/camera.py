"""A camera that always has its newest frame ready, with the time at which it was taken."""

import threading
from dataclasses import dataclass

import cv2
import numpy as np

from so101.config import option
from so101.errors import HardwareError
from so101.timing import Clock

FIRST_FRAME_S = 5.0  # a USB camera's exposure takes seconds to settle


@dataclass
class CameraConfig:
    """One camera and the format asked of it."""

    source: str = option(help="a device path or index, a video file, or sim for the rendered one")
    width: int = option(640, "frame width in pixels")
    height: int = option(480, "frame height in pixels")
    fps: int = option(30, "frames per second asked of the camera")
    max_age: float = option(0.5, "seconds after which the newest frame is stale and the episode is aborted")


class Camera:
    """An OpenCV capture read by a thread of its own, so that a slow camera never delays the control loop."""

    def __init__(self, name: str, config: CameraConfig, clock: Clock) -> None:
        self.name, self.config, self.clock = name, config, clock
        source = int(config.source) if config.source.isdigit() else config.source
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            raise HardwareError(f"camera {name}: cannot open {config.source!r}; is it plugged in and free?")
        # MJPG first: at 640x480 raw YUYV takes 147 Mbit/s of USB and halves the frame rate.
        for setting, value in (
            (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG")),
            (cv2.CAP_PROP_FRAME_WIDTH, config.width),
            (cv2.CAP_PROP_FRAME_HEIGHT, config.height),
            (cv2.CAP_PROP_FPS, config.fps),
            (cv2.CAP_PROP_BUFFERSIZE, 1),
        ):
            self._capture.set(setting, value)
        self._newest: tuple[np.ndarray, float] | None = None
        self._fresh = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._read, name=f"camera {name}", daemon=True)
        self._thread.start()

    def latest(self) -> tuple[np.ndarray, float]:
        """The newest frame, (H, W, 3) uint8 RGB, and its time on the clock.

        Raises HardwareError when there is none, it is older than `max_age`, or has another size.
        """
        with self._fresh:
            self._fresh.wait_for(lambda: self._newest is not None, timeout=FIRST_FRAME_S)
            newest = self._newest
        if newest is None:
            raise HardwareError(f"camera {self.name}: opened, but gave no frame in {FIRST_FRAME_S:.0f} s; replug it")
        frame, taken = newest
        if self.clock.now() - taken > self.config.max_age:
            raise HardwareError(f"camera {self.name}: newest frame is {self.clock.now() - taken:.1f} s old; replug it")
        wanted = (self.config.height, self.config.width, 3)
        if frame.shape != wanted:
            raise HardwareError(f"camera {self.name}: gives {frame.shape}, config asks for {wanted}")
        return frame, taken

    def close(self) -> None:
        """Stop the thread and release the device."""
        self._closing = True
        self._thread.join(timeout=2.0)
        self._capture.release()

    def _read(self) -> None:
        while not self._closing:
            good, frame = self._capture.read()
            if not good:
                return  # `latest` tells the age; a lost camera is an aborted episode, not a dead thread's traceback
            taken = self.clock.now()
            with self._fresh:
                self._newest = (cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), taken)
                self._fresh.notify_all()
