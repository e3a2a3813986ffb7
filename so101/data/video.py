"""Video files: encode frames while they come in, and decode them again, in order.

One H.264 file per camera and episode, a key frame every second frame (any frame is then at most one decode
away from a key frame), frame i shown at exactly i / fps.
"""

import functools
import itertools
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

os.environ.setdefault("SVT_LOG", "1")  # errors only; SVT-AV1 tells its whole life otherwise, over a progress bar

import cv2  # noqa: F401  # isort: skip  before av: the other way round cv2's windows hang on Linux
import av  # isort: skip
import numpy as np

from so101.errors import ConfigError, DataError, EpisodeAborted, UserError
from so101.files import sync_file

# Format -> (its encoder, the encoder's options). On one core and noisy 640x480 frames x264 ultrafast encodes 435
# frames/s (mpeg4 426, x264 veryfast 185, SVT-AV1 164), at the same error as the others (3.3 to 3.8 of 255, most of it
# from yuv420p itself), and every browser plays it.
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"preset": "ultrafast", "crf": "23"}),
    "av1": ("libsvtav1", {"preset": "12", "crf": "30", "svtav1-params": "lp=1"}),
    "mpeg4": ("mpeg4", {"flags": "+qscale", "global_quality": "236"}),  # 2 * 118: quantiser 2
}
Codec = Literal["h264", "av1", "mpeg4"]
CODEC_HELP = "how videos are stored: h264 (fast), av1 (smaller, slower; LeRobot's own), mpeg4 (where there is no other)"
PIXEL_FORMAT = "yuv420p"
QUEUE_FRAMES = 32  # 29 MB of 640x480; 3 s at 10 Hz before a slow disk holds the caller up


def check_size(height: int, width: int, where: str) -> None:
    """Refuse a size that yuv420p cannot hold: it keeps one colour for each 2x2 pixels.

    Raises DataError.
    """
    if min(height, width) < 2 or height % 2 or width % 2:
        raise DataError(f"{where}: got {width}x{height} pixels, both must be even and at least 2")


def require_codec(codec: Codec) -> None:
    """ConfigError, naming those that work, where this machine cannot encode `codec`: one frame of each is tried."""
    if not _works(codec):
        have = ", ".join(name for name in CODECS if _works(name))
        raise ConfigError(f"codec: this machine's FFmpeg cannot encode {codec} ({CODECS[codec][0]}); it can {have}")


@functools.cache
def _works(codec: str) -> bool:
    encoder, options = CODECS[codec]
    try:
        context = cast(av.VideoCodecContext, av.CodecContext.create(encoder, "w"))
        context.width, context.height, context.pix_fmt = 64, 64, PIXEL_FORMAT
        context.time_base, context.options = Fraction(1, 10), options
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        return bool(context.encode(black) + context.encode(None))
    except (av.error.FFmpegError, ValueError):
        return False


class VideoWriter:
    """Encodes uint8 RGB frames into one mp4 file, in a thread of its own with a single encoder thread.

    `add` only copies the frame into a queue of 32, and never drops a frame: where the encoder cannot keep up it waits
    or, with `may_wait` false, as beside an arm that moves, raises EpisodeAborted. What goes wrong in the thread is
    raised by the next `add` or by `close`: UserError where the file could not be written, EpisodeAborted where the
    encoder itself failed, after which another file may go well.
    """

    def __init__(
        self, path: Path, fps: float, height: int, width: int, codec: Codec = "h264", may_wait: bool = True
    ) -> None:
        check_size(height, width, str(path))
        self.path, self.shape, self.may_wait = path, (height, width, 3), may_wait
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
            self._container = av.open(str(path.absolute()), "w", format="mp4")  # a relative take:3 were a protocol
            self._stream = cast(av.VideoStream, self._container.add_stream(CODECS[codec][0], rate=rate))
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
        try:
            self._places.get(block=self.may_wait)
        except queue.Empty:
            raise EpisodeAborted(
                f"{self.path.name}: the encoder is {QUEUE_FRAMES} frames behind; close what else takes the machine, "
                f"or record with codec=h264, smaller frames or fewer cameras"
            ) from None
        self._queue.put(np.array(frame, order="C"))
        self.frames += 1

    def close(self) -> None:
        """Finish the file, check that every frame is in it, and push it to the disk.

        Raises UserError or EpisodeAborted, see above, and UserError where a frame is missing from the file.
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
        if isinstance(self._error, OSError):
            raise UserError(f"{self.path}: could not be written: {self._error}") from self._error
        if self._error is not None:
            raise EpisodeAborted(f"{self.path.name}: the encoder failed: {self._error}") from self._error

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


class VideoReader:
    """One video file, whose frames are asked for by number. Close it, or use it in a `with`.

    Frames asked for in order are decoded once; for another the decoder starts at the key frame before it. Frame k is
    the one that is shown k-th, whatever its time stamp. Raises DataError, naming the file, where it is missing or
    damaged. `threads`: 0 lets the decoder take what cores there are.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.path = path
        with self._naming():
            self._container = av.open(str(path.absolute()))
            self._stream = self._container.streams.video[0]
            self._stream.thread_type, self._stream.codec_context.thread_count = "AUTO", threads
            self._decoded: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._next = 0  # the number of the frame that `_decoded` gives next
        self._converter = av.video.reformatter.VideoReformatter()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._decoded = iter(())
        self._container.close()

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        """The frames from `start` on, in order: (height, width, 3) uint8 RGB each."""
        with self._naming():
            self._go_to(start)
            for frame in self._decoded:
                if self._next >= start:
                    yield self._rgb(frame)
                self._next += 1

    def frame(self, index: int) -> np.ndarray:
        """One frame, (height, width, 3) uint8 RGB. Raises DataError also where the file holds fewer."""
        with self._naming():
            self._go_to(index)
            for frame in self._decoded:
                self._next += 1
                if self._next > index:
                    return self._rgb(frame)
        raise DataError(f"{self.path}: there is no frame {index}, it holds {len(self.times)}")

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        # frame.to_ndarray makes a converter for each frame, with a thread for each core: 0.6 ms at 640x480 for 0.2.
        return self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray()

    @functools.cached_property
    def times(self) -> np.ndarray:
        """When each frame is shown, in order, in the stream's time base: the frame of times[k] is frame k."""
        with self._naming():
            table = self._stream.index_entries
            times = np.array([entry.timestamp for entry in table], np.int64)
            # A whole table holds times of decoding. Where the first is that of showing too, no frame is reordered.
            whole = len(times) > 0 and len(times) == self._stream.frames and not any(e.is_discard for e in table)
            if not whole or times[0] != self._stream.start_time:
                self._container.seek(0)
                packets = self._container.demux(self._stream)
                times = np.sort([p.pts for p in packets if p.size and p.pts is not None and not p.is_discard])
                self._next = len(times)  # read to the end
            return times

    def _go_to(self, index: int) -> None:
        """Bring the decoder to frame `index` or one before it, at most a key frame's distance."""
        if self._next <= index and not self._key_between(self._next + 1, index):
            return
        target = int(self.times[index]) if index < len(self.times) else int(self.times[-1])
        for time in (target, int(self.times[0])):  # a seek may land behind; the start is never behind
            self._container.seek(time, stream=self._stream)
            decoded = self._container.decode(self._stream)
            first = next(decoded)
            shown = first.pts if first.pts is not None else time
            if shown <= target:
                break
        self._next = int(np.searchsorted(self.times, shown))
        self._decoded = itertools.chain([first], decoded)

    def _key_between(self, first: int, last: int) -> bool:
        keys = self._keys
        return first <= last and bool(np.searchsorted(keys, first) < np.searchsorted(keys, last, "right"))

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.flatnonzero([entry.is_keyframe for entry in self._stream.index_entries])

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.error.FFmpegError, IndexError, StopIteration, ValueError, AttributeError) as error:
            # the last two: names that are no text, a stream that is none
            raise DataError(f"{self.path}: not a readable video: {error}") from error


OPEN_READERS = 4  # files: a page with two cameras, and the episode that was looked at before
_readers: "OrderedDict[tuple[Path, int, int], VideoReader]" = OrderedDict()
_readers_lock = threading.Lock()


def read_frame(path: Path, index: int) -> np.ndarray:
    """One frame of a video, (height, width, 3) uint8 RGB; the files used last stay open. Any thread may call.

    Raises DataError, naming the file, where it is missing, damaged or too short.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: not a readable video: {error.strerror}") from None
    key = (path, found.st_mtime_ns, found.st_size)
    with _readers_lock:
        reader = _readers.pop(key, None) or VideoReader(path)
        _readers[key] = reader
        if len(_readers) > OPEN_READERS:
            _readers.popitem(last=False)[1].close()
        return reader.frame(index)


def join_videos(parts: Sequence[Path], path: Path) -> None:
    """Put videos that were encoded alike into one, one after the other, without encoding anew.

    Raises UserError where that fails; `path` may then hold some of it.
    """
    try:
        with av.open(str(path.absolute()), "w", format="mp4") as whole:
            stream, began = None, 0
            for part in parts:
                with av.open(str(part.absolute())) as source:
                    own = source.streams.video[0]
                    stream = stream or whole.add_stream_from_template(own)
                    for packet in source.demux(own):
                        if packet.pts is not None and packet.dts is not None:
                            packet.pts, packet.dts = packet.pts + began, packet.dts + began
                            packet.stream = stream
                            whole.mux(packet)
                    began += own.duration or 0
    except (OSError, av.error.FFmpegError, IndexError, ValueError) as error:
        raise UserError(f"{path}: {len(parts)} clips could not be joined: {error}") from error
    sync_file(path)


def count_frames(path: Path) -> int:
    """How many frames a video file holds, from its packets, without decoding.

    Raises DataError, naming the file, where it is missing or damaged.
    """
    try:
        with av.open(str(path.absolute())) as container:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    except (OSError, av.error.FFmpegError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a readable video: {error}") from error
