"""Video files: every frame, in order, at its exact time; errors reach whoever adds frames."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from so101.data.video import (
    CODECS,
    OPEN_READERS,
    QUEUE_FRAMES,
    VideoReader,
    VideoWriter,
    _works,
    av,
    count_frames,
    read_frame,
    require_codec,
)
from so101.errors import ConfigError, DataError, EpisodeAborted, UserError

ROOT = Path(__file__).parents[1]


def flat(value: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def write(path: Path, frames: list[np.ndarray], fps: float = 10, codec: str = "h264") -> Path:
    writer = VideoWriter(path, fps, *frames[0].shape[:2], codec)
    for frame in frames:
        writer.add(frame)
    writer.close()
    return path


def read_frames(path: Path, start: int = 0) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return list(reader.frames(start))


def test_cv2_is_imported_before_av() -> None:
    code = "import sys, so101.data.video; m = list(sys.modules); print(m.index('cv2') < m.index('av'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("codec", CODECS)
def test_a_picture_survives_encoding_upright_and_in_rgb(tmp_path: Path, codec: str) -> None:
    picture = np.full((64, 96, 3), 128, np.uint8)
    picture[:32, :48] = (220, 30, 30)  # red, top left
    picture[32:, 48:] = (30, 30, 220)  # blue, bottom right
    decoded = list(read_frames(write(tmp_path / "a.mp4", [picture] * 6, codec=codec)))
    assert [frame.shape for frame in decoded] == [(64, 96, 3)] * 6
    for frame in decoded:
        assert frame.dtype == np.uint8
        assert np.abs(frame[8, 8].astype(int) - (220, 30, 30)).max() <= 6
        assert np.abs(frame[-8, -8].astype(int) - (30, 30, 220)).max() <= 6
        assert np.abs(frame.astype(int) - picture).mean() < 3


@pytest.mark.parametrize("fps", [10, 30, 12.5])
def test_frame_i_is_shown_at_exactly_i_over_fps(tmp_path: Path, fps: float) -> None:
    path = write(tmp_path / "a.mp4", [flat(5 * i) for i in range(9)], fps)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        stream = container.streams.video[0]
        assert stream.pix_fmt == "yuv420p"
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
    assert times == [i / Fraction(fps) for i in range(9)]


def test_every_second_frame_is_a_key_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [flat(20 * i) for i in range(7)])
    with av.open(str(path)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys == [True, False, True, False, True, False, True]


def test_a_fast_caller_loses_no_frame_and_may_reuse_its_memory(tmp_path: Path) -> None:
    """More frames than the queue holds, all from one array, as a camera driver hands them out."""
    writer = VideoWriter(tmp_path / "a.mp4", 10, 240, 320)
    frame = flat(0, 240, 320)
    for i in range(120):
        frame[:] = 2 * i
        writer.add(frame)
    frame[:] = 255
    writer.close()
    levels = [decoded.mean() for decoded in read_frames(tmp_path / "a.mp4")]
    assert len(levels) == count_frames(tmp_path / "a.mp4") == 120
    assert np.abs(np.array(levels) - 2 * np.arange(120)).max() < 2.5
    assert [round(f.mean() / 2) for f in read_frames(tmp_path / "a.mp4", start=60)][:2] == [60, 61]


def test_the_wrong_frame_is_refused(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 10, 32, 48)
    with pytest.raises(DataError, match=r"float64 \(32, 48, 3\)"):  # 0..1 pictures once made black videos
        writer.add(flat(1) / 255)
    with pytest.raises(DataError, match=r"\(48, 32, 3\)"):
        writer.add(flat(1, 48, 32))
    writer.abort()
    with pytest.raises(DataError, match="must be even"):
        VideoWriter(tmp_path / "b.mp4", 10, 33, 48)


def test_a_codec_that_the_machine_lacks_is_told_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for codec in CODECS:
        require_codec(codec)
    monkeypatch.setitem(CODECS, "av1", ("libnone", {}))
    _works.cache_clear()
    with pytest.raises(ConfigError, match=r"cannot encode av1 \(libnone\); it can h264, mpeg4"):
        require_codec("av1")
    _works.cache_clear()


def encode(path: Path, encoder: str, options: dict[str, str], gop: int, b_frames: int, start: int = 0) -> None:
    """50 frames of brightness 5 i, as other programs encode: long groups, reordered frames, a late start."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(flat(5 * i, 48, 64), format="rgb24")
            frame.pts = start + i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("h264.mp4", ("libx264", {"preset": "ultrafast"}, 2, 0)),
        ("reordered.mp4", ("libx264", {"preset": "medium"}, 12, 3)),
        ("open_groups.mp4", ("libx264", {"preset": "medium", "x264-params": "open-gop=1"}, 12, 3)),
        ("one_group.mp4", ("libx264", {"preset": "ultrafast"}, 250, 0)),
        ("late.mp4", ("libx264", {"preset": "medium"}, 12, 3, 7)),
        ("mpeg4.mp4", ("mpeg4", {"qscale": "2"}, 12, 2)),
        ("av1.mp4", ("libsvtav1", {"preset": "12", "crf": "30", "svtav1-params": "lp=1"}, 20, 0)),
        ("matroska.mkv", ("libx264", {"preset": "medium"}, 12, 3)),
    ],
)
def test_any_frame_in_any_order_is_the_one_that_decoding_from_the_start_gives(tmp_path, name, arguments):
    encode(tmp_path / name, *arguments)
    with av.open(str(tmp_path / name)) as container:  # PyAV alone, from the start
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.abs([frame.mean() - 5 * i for i, frame in enumerate(truth)]).max() < 5
    with VideoReader(tmp_path / name) as reader:
        for index in [*np.random.default_rng(0).integers(0, 50, 60), 49, 0, 1, 2, 25, 26]:
            assert np.array_equal(reader.frame(index), truth[index]), index
        with pytest.raises(DataError, match="there is no frame 50, it holds 50"):
            reader.frame(50)
        assert np.array_equal(reader.frame(13), truth[13])
    for start in (1, 7, 24, 49):
        rest = read_frames(tmp_path / name, start)
        assert len(rest) == 50 - start and all(map(np.array_equal, rest, truth[start:]))


def test_open_readers_are_few_and_see_a_file_that_was_replaced(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.mp4", [flat(20 * i)] * 3) for i in range(2 * OPEN_READERS)]
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for index in range(3):
        for i, path in enumerate(paths):
            assert round(read_frame(path, index).mean() / 20) == i
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) - before <= OPEN_READERS
    write(tmp_path / "new.mp4", [flat(200)] * 4)
    os.replace(tmp_path / "new.mp4", paths[-1])
    assert abs(read_frame(paths[-1], 3).mean() - 200) < 5


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot start"):
        VideoWriter(tmp_path / "none" / "a.mp4", 10, 32, 48)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
def test_a_full_disk_reaches_the_caller_and_never_hangs_it(tmp_path: Path) -> None:
    import resource

    noise = np.random.default_rng(0).integers(0, 255, (200, 128, 128, 3), np.uint8)
    writer = VideoWriter(tmp_path / "a.mp4", 10, 128, 128)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"a\.mp4: could not be written: .*File too large"):
            for frame in noise:  # many more than the queue holds
                writer.add(frame)
            writer.close()
        with pytest.raises(UserError, match="File too large"):
            writer.add(noise[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.abort()
    with pytest.raises(UserError, match="cannot start a h264 video"):
        VideoWriter(Path("/dev/full"), 10, 32, 48)


def test_a_file_that_lost_its_end_is_found_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [flat(i) for i in range(20)])
    path.write_bytes(path.read_bytes()[:-200])
    for read in (count_frames, lambda path: list(read_frames(path))):
        with pytest.raises(DataError, match=r"a\.mp4: not a readable video"):
            read(path)
        with pytest.raises(DataError, match=r"gone\.mp4: not a readable video"):
            read(tmp_path / "gone.mp4")


def test_close_counts_what_is_in_the_file(tmp_path: Path) -> None:
    """Another program truncates the file under the encoder: close must not call it finished."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 128, 128, 3), np.uint8)
    writer = VideoWriter(tmp_path / "a.mp4", 10, 128, 128)
    for frame in noise:
        writer.add(frame)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DataError, match=r"a\.mp4"):
        writer.close()


def test_abort_frees_the_encoder_with_frames_waiting(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 10, 240, 320)
    for i in range(30):
        writer.add(flat(i, 240, 320))
    writer.abort()
    assert not writer._thread.is_alive()


def test_an_interrupt_at_any_instant_leaves_an_encoder_that_can_be_stopped(tmp_path: Path) -> None:
    """In a queue.Queue it may lose the wake-up of the thread that is to hear of the end, which then sleeps for ever."""
    frame, rng = np.zeros((16, 16, 3), np.uint8), np.random.default_rng(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(200):
            writer = VideoWriter(tmp_path / f"{number}.mp4", 10, 16, 16)
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 3e-3))
                while True:
                    writer.add(frame)
            signal.alarm(5)  # a hang would be interrupted too, and the test fail
            writer.abort()
            signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_an_encoder_that_cannot_keep_up_costs_the_episode_and_never_a_frame(tmp_path: Path) -> None:
    """Beside an arm that moves nobody waits; frames are larger here than any encoder takes in 10 ms."""
    noise = np.random.default_rng(0).integers(0, 255, (1080, 1920, 3), np.uint8)
    writer = VideoWriter(tmp_path / "a.mp4", 10, 1080, 1920, may_wait=False)
    with pytest.raises(EpisodeAborted, match="encoder is 32 frames behind"):
        for _ in range(20 * QUEUE_FRAMES):
            writer.add(noise)
    writer.close()  # what went in is in the file
    assert count_frames(tmp_path / "a.mp4") == writer.frames >= QUEUE_FRAMES


def test_an_encoder_that_fails_is_told_apart_from_a_disk_that_does(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 10, 32, 48)
    writer.add(flat(1))
    writer._queue.put(np.zeros((3, 3), np.uint8))  # what it cannot take
    with pytest.raises(EpisodeAborted, match=r"a\.mp4: the encoder failed"):
        writer.close()
