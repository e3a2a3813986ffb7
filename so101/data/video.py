"""Video files: encode frames while they come in, and decode them again, in order.

One H.264 file per camera and episode, a key frame every second frame (any frame is then at most one decode
away from a key frame), frame i shown at exactly i / fps.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import cv2  # noqa: F401  # isort: skip  before av: the other way round cv2's windows hang on Linux
import av  # isort: skip
import numpy as np

from so101.errors import DataError, UserError
from so101.files import sync_file

# Encoder -> (name of the format it writes, its options). libx264 ultrafast is the default: on one core and
# noisy 640x480 frames it encodes 435 frames/s (mpeg4 426, x264 veryfast 185, SVT-AV1 164), at the same error
# as the others (3.3 to 3.8 of 255, most of it from yuv420p itself), and every browser plays it.
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "libx264": ("h264", {"preset": "ultrafast", "crf": "23"}),
    "libsvtav1": ("av1", {"preset": "12", "crf": "30", "svtav1-params": "lp=1"}),
    "mpeg4": ("mpeg4", {"flags": "+qscale", "global_quality": "236"}),  # 2 * 118: quantiser 2
}
DEFAULT_CODEC = "libx264"
PIXEL_FORMAT = "yuv420p"
QUEUE_FRAMES = 32  # 29 MB of 640x480; 3 s at 10 Hz before a slow disk holds the caller up


def check_size(height: int, width: int, where: str) -> None:
    """Refuse a size that yuv420p cannot hold: it keeps one colour for each 2x2 pixels.

    Raises DataError.
    """
    if min(height, width) < 2 or height % 2 or width % 2:
        raise DataError(f"{where}: got {width}x{height} pixels, both must be even and at least 2")


class VideoWriter:
    """Encodes uint8 RGB frames into one mp4 file, in a thread of its own with a single encoder thread.

    `add` only copies the frame into a queue of 32; where the encoder cannot keep up it waits, and never
    drops a frame. An error in the thread is raised by the next `add` or by `close`.
    """

    def __init__(self, path: Path, fps: float, height: int, width: int, codec: str = DEFAULT_CODEC) -> None:
        check_size(height, width, str(path))
        if codec not in CODECS:
            raise DataError(f"{path}: unknown codec {codec!r}; use one of {', '.join(CODECS)}")
        self.path, self.shape = path, (height, width, 3)
        self.frames = 0
        self._error: Exception | None = None
        self._aborted = False
        # A Ctrl-C inside queue.Queue may lose its wake-up, and the thread sleeps for ever; a SimpleQueue is made in C.
        self._queue: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()  # free ones in the queue
        for _ in range(QUEUE_FRAMES):
            self._places.put(None)
        rate = Fraction(fps).limit_denominator(1001)
        try:
            self._container = av.open(str(path), "w", format="mp4")
            self._stream = cast(av.VideoStream, self._container.add_stream(codec, rate=rate))
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, PIXEL_FORMAT
            context = self._stream.codec_context
            context.options = CODECS[codec][1]
            context.time_base = 1 / rate
            context.gop_size, context.max_b_frames = 2, 0
            context.thread_count = 1  # a learner beside the recorder keeps its cores
            self._container.start_encoding()
        except (OSError, av.error.FFmpegError, ValueError) as error:
            raise UserError(f"{path}: cannot start a {codec} video: {error}") from error
        self._thread = threading.Thread(target=self._run, name=f"encode {path.name}", daemon=True)
        self._thread.start()

    def add(self, frame: np.ndarray) -> None:
        """Append one frame, (height, width, 3) uint8 RGB; the caller may reuse its memory at once.

        Raises DataError for another shape or type, UserError when the encoder failed on an earlier frame.
        """
        self._raise_error()
        if frame.dtype != np.uint8 or frame.shape != self.shape:
            raise DataError(f"{self.path.name}: got a {frame.dtype} {frame.shape} frame, not uint8 {self.shape}")
        self._places.get()
        self._queue.put(np.array(frame, order="C"))
        self.frames += 1

    def close(self) -> None:
        """Finish the file, check that every frame is in it, and push it to the disk.

        Raises UserError when the encoder failed or a frame is missing from the file.
        """
        self._queue.put(None)
        self._thread.join()
        self._raise_error()
        packets = count_frames(self.path)
        if packets != self.frames:
            raise UserError(f"{self.path}: {self.frames} frames went in, but the file holds {packets}")
        sync_file(self.path)

    def abort(self) -> None:
        """Stop without caring what became of the file."""
        self._aborted = True
        self._queue.put(None)
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise UserError(f"{self.path}: could not be written: {self._error}") from self._error

    def _run(self) -> None:
        # After a failure frames are still taken from the queue, so that the caller never waits for ever.
        index = 0
        while (array := self._queue.get()) is not None:
            self._places.put(None)
            if self._error is None and not self._aborted:
                self._attempt(self._encode, array, index)
                index += 1
        if self._error is None:
            self._attempt(self._finish)
        if self._error is not None:
            with suppress(Exception):  # the first error is the one to report
                self._container.close()

    def _attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception as error:  # whatever it is, the caller is to hear of it
            self._error = error

    def _encode(self, array: np.ndarray, index: int) -> None:
        frame = av.VideoFrame.from_ndarray(array, format="rgb24")
        frame.pts = index
        self._container.mux(self._stream.encode(frame))

    def _finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


def read_frames(path: Path, start: int = 0) -> Iterator[np.ndarray]:
    """Decode a video from frame `start` on, in order: (height, width, 3) uint8 RGB each.

    Raises DataError, naming the file, where it is missing or damaged.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if index >= start:
                    yield frame.to_ndarray(format="rgb24")
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: not a readable video: {error}") from error


def count_frames(path: Path) -> int:
    """How many frames a video file holds, counted packet by packet without decoding.

    Raises DataError, naming the file, where it is missing or damaged.
    """
    try:
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: not a readable video: {error}") from error
