"""A camera that always has its newest good frame ready, with the time at which it came.

A thread reads, judges and, when the camera is lost, opens it again, so that the control loop never waits for one.
Two cameras that changed places cannot be told from their pixels: `require_lasting_names` therefore asks for names that
stay with a camera, or with its socket, and tools/camera.py shows what each of them sees.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

# Read by OpenCV at its first capture: a V4L2 read blocks 1 s at most instead of 10, and FFmpeg prints nothing.
os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", "1")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np

from so101.config import option, require_within
from so101.errors import ConfigError, EpisodeAborted, HardwareError, tell
from so101.robot.v4l2 import LINKS, device_of, find_cameras, lasting_name
from so101.timing import Clock, Rate

SETTLE_S = 5.0  # a USB camera's exposure takes seconds to settle, and its first frames may be black
ENOUGH_FPS = 0.8  # of what was asked for; a camera in the dark, or on a full USB bus, gives half
FLAT_STD = 0.02 * 255  # grey levels; a covered lens gives less in every colour
BACKOFF_S = (0.2, 2.0)  # first and longest wait between two attempts to open a lost camera
STREAM_TIMEOUTS = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 5000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 1000]
BACKENDS = {"win32": cv2.CAP_DSHOW, "darwin": cv2.CAP_AVFOUNDATION, "linux": cv2.CAP_V4L2}
TURNS = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
LIST = "`python -m so101.tools.camera` lists what is there"


@dataclass
class CameraConfig:
    """One camera and the format asked of it."""

    source: str = option(help="path under /dev/v4l/by-id, index, http stream, video file, or sim for the rendered one")
    width: int = option(640, "width in pixels of its frames, as they are after rotation")
    height: int = option(480, "height in pixels of its frames, as they are after rotation")
    fps: int = option(30, "frames per second asked of the camera; a file is played, and repeated, at this rate")
    rotate: int = option(0, "degrees clockwise by which its frames are turned: 0, 90, 180 or 270")
    max_age: float = option(0.5, "seconds without a good frame after which the episode is aborted")

    def __post_init__(self) -> None:
        require_within(self, width=(1, 8192), height=(1, 8192), fps=(1, 1000), max_age=(0.05, 60))
        if self.rotate not in (0, *TURNS):
            raise ConfigError(f"rotate: got {self.rotate}, must be 0, 90, 180 or 270")


class Camera:
    """An OpenCV capture and the thread that keeps its newest good frame.

    A frame is good when it has the config's size, is not black or flat, and is not the one before it byte for byte
    (a living sensor has noise; a file may hold still). Others are not shown to anybody: the newest good one ages.
    """

    def __init__(self, name: str, config: CameraConfig, clock: Clock) -> None:
        """Open it and wait for its first good frame, 5 s at most. Raises HardwareError that says what is wrong."""
        cv2.setNumThreads(1)  # OpenCV's threads spin between frames, and the learner needs the cores
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        self.name, self.config, self.clock = name, config, clock
        self.outages = 0  # times that `latest` had nothing to give, and then had again
        self.format = ""  # as the driver says it
        self._promised = 0.0  # frames/s, by the driver; 0 where it says none
        self._is_stream = "://" in config.source
        self._is_file = not config.source.isdigit() and os.path.isfile(config.source)
        self._pace = Rate(clock, 1 / config.fps) if self._is_file else None
        self._newest: tuple[np.ndarray, float] | None = None
        self._trouble = "it sends no frames; replug it, or look for another program that uses it"
        self._times: deque[float] = deque(maxlen=30)  # when the last frames came
        self._capture = self._open()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera {name}", daemon=True)
        self._thread.start()
        try:
            self.wait_ready(SETTLE_S)
        except BaseException:
            self.close()
            raise

    def latest(self) -> tuple[np.ndarray, float]:
        """The newest good frame, (H, W, 3) uint8 RGB, and the time on the clock at which it came. Never waits.

        Raises EpisodeAborted, naming the cause, when that is longer ago than `max_age`.
        """
        newest = self._newest
        if newest is None or self.clock.now() - newest[1] > self.config.max_age:
            raise EpisodeAborted(self._complaint(newest))
        return newest

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Return as soon as `latest` has a frame, for a reset that waits until a lost camera is back.

        Tells at once that it waits for one that was lost. Raises HardwareError, naming the cause, after `timeout` s.
        """
        deadline, told = self.clock.now() + timeout, False
        while (newest := self._newest) is None or self.clock.now() - newest[1] > self.config.max_age:
            if self.clock.now() > deadline:
                raise HardwareError(self._complaint(newest))
            if newest is not None and not told:
                told = True
                tell(f"{self._complaint(newest)}; waiting for it, {timeout:g} s at most (Ctrl-C ends that)")
            time.sleep(0.01)

    @property
    def rate(self) -> float:
        """Frames per second, good or not, by the median of the last intervals; 0.0 before there are 5 of them."""
        intervals = np.diff(list(self._times))
        return float(1 / np.median(intervals)) if len(intervals) >= 5 else 0.0

    def report(self) -> str:
        """One plain sentence about what was not as it should be, or "" when all was well."""
        parts = []
        rate = self.rate or self._promised
        if 0 < rate < ENOUGH_FPS * self.config.fps:
            parts.append(
                f"{rate:.1f} frames/s where {self.config.fps} are asked for ({self.format}); "
                "more light, a smaller size or a USB port of its own may help"
            )
        if self.outages:
            parts.append(f"lost {self.outages} time{'s' * (self.outages > 1)}; look at its cable")
        return f"camera {self.name}: {', and '.join(parts)}" if parts else ""

    def close(self) -> None:
        """Stop the thread, which releases the device; returns within 2 s even where a read does not."""
        self._closing.set()
        self._thread.join(1.9)

    def _complaint(self, newest: tuple[np.ndarray, float] | None) -> str:
        since = "opened, but" if newest is None else f"no good frame for {self.clock.now() - newest[1]:.1f} s:"
        return f"camera {self.name}: {since} {self._trouble}"

    def _run(self) -> None:
        """The thread. It alone touches the capture once it runs: a release beside a read crashes."""
        since, sending, before = self.clock.now(), False, None
        while not self._closing.is_set():
            frame = self._read()
            now = self.clock.now()
            trouble = self._judge(frame, before)
            before = frame
            if frame is not None and not trouble:
                if self._newest is not None and now - self._newest[1] > self.config.max_age:
                    self.outages += 1
                since, sending = now, True
                frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                turn = TURNS.get(self.config.rotate)
                self._newest = (frame if turn is None else cv2.rotate(frame, turn), now)
                trouble = "it has stopped sending; look at its cable"  # until the next one comes
            elif now - since > (self.config.max_age if sending and frame is None else SETTLE_S):
                self._capture.release()
                self._reopen()
                since, sending = self.clock.now(), False
            else:
                self._closing.wait(0.01)  # a read that fails may do so at once
            self._trouble = trouble
        self._capture.release()

    def _reopen(self) -> None:
        wait, longest = BACKOFF_S
        self._times.clear()
        while not self._closing.is_set():
            try:
                self._capture = self._open()
                return
            except HardwareError as error:
                self._trouble = str(error).removeprefix(f"camera {self.name}: ")
            self._closing.wait(wait)
            wait = min(2 * wait, longest)

    def _read(self) -> np.ndarray | None:
        """The next frame (BGR), or None where there is none."""
        if self._pace is not None:
            self._pace.wait()
        good, frame = self._capture.read()
        if not good and self._is_file:
            self._capture.open(self.config.source, cv2.CAP_FFMPEG)  # a file of one frame cannot be rewound
            good, frame = self._capture.read()
        if not good:
            return None
        self._times.append(self.clock.now())
        return frame

    def _judge(self, frame: np.ndarray | None, before: np.ndarray | None) -> str:
        """What is wrong with this frame, or ""."""
        if frame is None:
            return self._trouble
        wrong = self._wrong_size(frame.shape[1], frame.shape[0])
        if wrong:
            return wrong
        sample = frame[::8, ::8]
        if sample.std(axis=(0, 1)).max() <= FLAT_STD:
            return f"its frames are black or flat (mean {sample.mean():.0f} of 255); look at its lens and the light"
        if before is not None and not self._is_file and np.array_equal(frame, before):
            return "it repeats one frame byte for byte; replug it if it does not recover"
        return ""

    def _wrong_size(self, width: int, height: int) -> str:
        """What is wrong with frames of this size as the sensor gives them, or ""."""
        given = (height, width) if self.config.rotate in (90, 270) else (width, height)
        if given == (self.config.width, self.config.height):
            return ""
        asked = f"{self.config.width}x{self.config.height}"
        return f"its frames are {given[0]}x{given[1]} where {asked} is asked for; set width and height to one it has"

    def _open(self) -> cv2.VideoCapture:
        """A capture with the format asked for. Raises HardwareError: not there, cannot be opened, another size."""
        config = self.config
        if self._is_stream or self._is_file:
            capture = cv2.VideoCapture(config.source, cv2.CAP_FFMPEG, STREAM_TIMEOUTS if self._is_stream else [])
        else:
            device = device_of(config.source)
            source = int(device) if device.isdigit() else device
            capture = cv2.VideoCapture(source, BACKENDS.get(sys.platform, cv2.CAP_ANY))
        if not capture.isOpened():
            raise HardwareError(f"camera {self.name}: {self._why_not()}")
        if not self._is_stream and not self._is_file:
            # MJPG first: at 640x480 raw YUYV takes 147 Mbit/s of USB and halves the frame rate. The size after it,
            # and the rate last, for each set may change what follows. Two buffers: with one the driver drops frames.
            width, height = (config.width, config.height)[:: -1 if config.rotate in (90, 270) else 1]
            for setting, value in (
                (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG")),
                (cv2.CAP_PROP_FRAME_WIDTH, width),
                (cv2.CAP_PROP_FRAME_HEIGHT, height),
                (cv2.CAP_PROP_FPS, config.fps),
                (cv2.CAP_PROP_BUFFERSIZE, 2),
            ):
                capture.set(setting, value)
        got = [round(capture.get(setting)) for setting in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        wrong = self._wrong_size(*got)
        if wrong:
            capture.release()
            raise HardwareError(f"camera {self.name}: {wrong} ({LIST})")
        self._read_back(capture)
        return capture

    def _read_back(self, capture: cv2.VideoCapture) -> None:
        """Note what the driver says that it gives; the first time, warn where a device gives another format."""
        number, promised, first = int(capture.get(cv2.CAP_PROP_FOURCC)), capture.get(cv2.CAP_PROP_FPS), not self.format
        # Anything but four ASCII letters (0 or -1 mostly, on macOS always) is a driver that does not say.
        code = number.to_bytes(4, "little").decode("ascii", "replace") if 0 < number < 1 << 31 else ""
        self.format = f"{code or 'format unknown'}, {promised:g}/s by its driver"
        if self._is_stream or self._is_file:
            return
        self._promised = promised
        if first and code not in ("", "MJPG"):
            tell(
                f"warning: camera {self.name}: gives {code} where MJPG is asked for; raw frames of 640x480 fill the "
                "USB bus (147 Mbit/s instead of 9), and 16 to 19 of 30 a second arrive. Set a width and height that "
                f"it has in MJPG ({LIST})"
            )

    def _why_not(self) -> str:
        source = self.config.source
        if self._is_stream:
            return f"{source!r} sends no stream; does the address show it in a browser?"
        if self._is_file:
            return f"{source!r} is not a video that OpenCV can play"
        device = device_of(source)
        if not device.isdigit() and not os.path.exists(device):
            there = ", ".join(found.source for found in find_cameras()) or "none"
            return f"{source!r} is not there; cameras that are: {there}. Plug it in, or name another ({LIST})"
        if not device.isdigit() and not os.access(device, os.R_OK | os.W_OK):
            return f"you may not open {source!r}; run `sudo usermod -aG video $USER` and log in again"
        return f"{source!r} cannot be opened: another program uses it, or it is no camera ({LIST})"


def require_lasting_names(cameras: Mapping[str, CameraConfig]) -> None:
    """Refuse two cameras that are one, or that a replug could swap though udev has names which it could not.

    Raises ConfigError.
    """
    seen: dict[str, str] = {}
    for name, config in cameras.items():
        device = device_of(config.source)
        if device in seen:
            raise ConfigError(f"cameras.{name}: {config.source!r} is the same camera as cameras.{seen[device]}")
        seen[device] = name
        own = lasting_name(device)
        if own and len(cameras) > 1 and not config.source.startswith(str(LINKS)):
            raise ConfigError(
                f"cameras.{name}.source: {config.source!r} is whichever camera came up first, and pictures do not tell "
                f"swapped cameras; with two of them write {own!r}, which stays with this one"
            )
