"""What datasets cost: opening, decoding, seeking, encoding beside a control loop, loading for training.

    python tests/bench/bench_data.py                   all rows, about 2 minutes on two cores
    python tests/bench/bench_data.py open seek         some of: open decode seek encode load

Beside each figure stand its floor, measured in the same run, which is the same work with nothing around it, and the
target. The large datasets are made in a temporary folder: a few real episodes by DatasetWriter, and their files under
further numbers, with the numbers in the rows rewritten, and videos and closing observations linked.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2  # isort: skip  before av, always
import av  # isort: skip
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from so101.data.dataset import episode_rows, open_dataset
from so101.data.index import write_index
from so101.data.video import CODECS, Codec, VideoWriter, require_codec
from so101.data.writer import DatasetWriter
from so101.episodes import load_images
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus
from so101.robot.kinematics import solve_ik
from so101.schema import ACTION, STATE, Preprocess, describe
from so101.sim.servos import SIM_CALIBRATION, SimPort, SimServos
from so101.timing import Clock, Rate

FPS, HEIGHT, WIDTH = 10, 480, 640
EPISODES = 1000  # of the datasets that are opened
ROWS = 5  # of each of their episodes
PACKED = 100  # of their episodes in one file
LOADED = 20_000  # frames
CORES = 2
TIMES = 7
DECODED: tuple[Codec, ...] = ("h264", "av1")
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
# How DatasetWriter writes data, and meta/episodes: the size of 1,000 footers is what opening costs.
AS_WRITTEN = ({}, {"use_dictionary": False, "write_statistics": False, "store_schema": False})

Row = tuple[str, str, str, str]  # what, figure, floor, target


def main(names: list[str]) -> None:
    """Print the table, a row as soon as it is known."""
    os.environ["SVT_LOG"] = "1"  # errors only: SVT-AV1 tells its whole life otherwise
    rows: dict[str, Callable[[Path], Iterator[Row]]] = {
        "open": opening, "decode": decoding, "seek": seeking, "encode": encoding, "load": loading,
    }  # fmt: skip
    if unknown := set(names) - set(rows):
        sys.exit(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    print(f"{'':44}{'here':>22}{'floor':>22}{'target':>14}", flush=True)
    for name in names or rows:
        with tempfile.TemporaryDirectory() as folder:
            for what, figure, floor, target in rows[name](Path(folder)):
                print(f"{what:44}{figure:>22}{floor:>22}{target:>14}", flush=True)


def opening(folder: Path) -> Iterator[Row]:
    """A dataset of 1,000 short episodes, of one file each and of 100 in one; floor: its rows' and tables' bytes."""
    record(folder / "alone", 1, ROWS, 32, 32)
    multiply(folder / "alone", EPISODES)
    pack(folder / "alone", folder / "packed")
    shutil.copytree(folder / "alone", folder / "lost")
    write_index(folder / "alone", episode_rows(folder / "alone"))  # as the end of a recording does
    layouts = {
        "alone": "one file an episode", "lost": "their index lost", "packed": f"{PACKED} episodes in a file"
    }  # fmt: skip
    for name, layout in layouts.items():
        files = [path for top in ("meta", "data") for path in (folder / name / top).rglob("*") if path.is_file()]
        taken = [
            timed(lambda name=name: require(len(open_dataset(folder / name).episodes), EPISODES)) for _ in range(5)
        ]
        floor = [timed(lambda files=files: [path.read_bytes() for path in files]) for _ in range(5)]
        yield (
            f"open {EPISODES} episodes, {layout}",
            f"{np.median(taken):.2f} s",
            f"{np.median(floor):.2f} s",
            "" if name == "lost" else "< 1 s",
        )


def decoding(folder: Path) -> Iterator[Row]:
    """Episode.frames in turns with PyAV alone on the same file, threaded or not: the ratio to the faster median."""
    frames = 200
    for codec in DECODED:
        episode, video = long_episode(folder / codec, codec, frames)
        ours, *others = in_turns(
            lambda episode=episode: require(sum(1 for _ in episode.frames("wrist")), frames),
            lambda video=video: require(sum(1 for _ in decode(video)), frames),
            lambda video=video: require(sum(1 for _ in decode(video, threads=1)), frames),
        )
        alone = min(others)
        yield f"decode 640x480 {codec}", f"{frames / ours:.0f} frames/s", f"{frames / alone:.0f} frames/s", ""
        yield "  as a share of PyAV alone", f"{alone / ours:.0%}", "100 %", ">= 90 %"


def decode(video: Path, threads: int = 0) -> Iterator[np.ndarray]:
    """All frames by PyAV alone; `threads` 0: as many as it likes."""
    with av.open(str(video)) as container:
        container.streams.video[0].thread_type = "AUTO"
        container.streams.video[0].codec_context.thread_count = threads
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def seeking(folder: Path) -> Iterator[Row]:
    """Episode.frame in turns with a seek to the key frame before and decoding on, at the same random frames."""
    frames, picks = 200, np.random.default_rng(0).integers(0, 200, 50).tolist()
    for codec in DECODED:
        episode, video = long_episode(folder / codec, codec, frames)
        with av.open(str(video)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for index in picks[:5]:
                assert np.array_equal(seek(container, index), episode.frame("wrist", index)), index
            ours, alone = in_turns(
                lambda episode=episode: [episode.frame("wrist", index) for index in picks],
                lambda container=container: [seek(container, index) for index in picks],
            )
        taken, floor = 1000 * ours / len(picks), 1000 * alone / len(picks)
        yield f"random frame of 640x480 {codec}", f"{taken:.1f} ms", f"{floor:.1f} ms", ""
        yield "  as a share of the codec's own seek", f"{ours / alone:.0%}", "100 %", "<= 100 %"


def seek(container: av.container.InputContainer, index: int) -> np.ndarray:
    """One frame by the codec's own means; the file is open already."""
    stream = container.streams.video[0]
    wanted = round(index / (FPS * stream.time_base))
    container.seek(wanted, stream=stream)
    return next(frame for frame in container.decode(stream) if frame.pts >= wanted).to_ndarray(format="rgb24")


def encoding(folder: Path) -> Iterator[Row]:
    """Two cameras beside a control loop: CPU time as a share of two cores; floor: the loop, and encoding flat out."""
    frames, seconds = list(noisy_frames(32, HEIGHT, WIDTH)), 8
    alone, _, _ = control_loop([], frames, seconds=3)
    for codec in CODECS:
        require_codec(codec)
        began, count = cpu_seconds(), 40
        writer = VideoWriter(folder / f"{codec}.mp4", FPS, HEIGHT, WIDTH, codec)
        for index in range(count):
            writer.add(frames[index % len(frames)])
        writer.close()
        floor = alone + 2 * FPS * (cpu_seconds() - began) / count / CORES
        writers = [VideoWriter(folder / f"{codec}{n}.mp4", FPS, HEIGHT, WIDTH, codec, False) for n in range(2)]
        share, longest, late = control_loop(writers, frames, seconds)
        yield f"encode 2 x 640x480, {codec}", f"{share:.0%} of two cores", f"{floor:.0%} of two cores", "<= 50 %"
        yield "  longest add, ticks that came late", f"{1000 * longest:.1f} ms, {late}", "", "< 100 ms, 0"


def control_loop(writers: list[VideoWriter], frames: list[np.ndarray], seconds: int) -> tuple[float, float, int]:
    """(CPU time as a share of two cores, longest wait in `add` in s, late ticks) of a 10 Hz loop that records."""
    arm = Arm(ServoBus(SimPort(SimServos())), SIM_CALIBRATION)
    rate = Rate(Clock(), 1 / FPS)
    used, began, longest = cpu_seconds(), time.perf_counter(), 0.0
    rate.restart()
    for tick in range(seconds * FPS):
        position = arm.read().position
        arm.command(np.append(solve_ik(np.array([0.25, 0.02, 0.07]), position[:5]), position[5]))
        for writer in writers:
            longest = max(longest, timed(lambda writer=writer, tick=tick: writer.add(frames[tick % len(frames)])))
        rate.wait()
    for writer in writers:
        writer.close()
    return (cpu_seconds() - used) / (time.perf_counter() - began) / CORES, longest, rate.overruns


def loading(folder: Path) -> Iterator[Row]:
    """20,000 frames to uint8 128x128, as the scripts load them, in a process of its own; floor: decoding alone."""
    record(folder / "demos", 4, 100, HEIGHT, WIDTH)
    multiply(folder / "demos", LOADED // 100)
    taken, size, peak = child("load", folder / "demos")
    base = child("nothing", folder / "demos")[2]
    floor, _, _ = child("decode", folder / "demos")
    yield f"load {LOADED} frames", f"{LOADED / taken:.0f} frames/s", f"{LOADED / floor:.0f} frames/s", ">= 400"
    yield "  memory above the result", f"{(peak - base - size) / 1e6:.0f} MB", "0 MB", "<= 500 MB"
    print(f"  ({size / 1e6:.0f} MB of result, {base / 1e6:.0f} MB of imports, {len(os.sched_getaffinity(0))} cores)")


def child(work: str, folder: Path) -> tuple[float, int, int]:
    """(seconds, bytes of the result, most memory in bytes) of `work` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "child", work, str(folder)], stdout=subprocess.PIPE, check=True)
    seconds, size, peak = json.loads(done.stdout)
    return seconds, size, peak


def work_as_child(work: str, folder: str) -> None:
    """Do it and print what `child` reads. VmHWM: ru_maxrss begins with the parent's own, over fork and exec."""
    began, size = time.perf_counter(), 0
    if work == "load":
        size = load_images(open_dataset(folder).episodes, Preprocess()).nbytes
    elif work == "decode":
        for episode in open_dataset(folder).episodes[:40]:  # 4,000 frames will do
            for _ in decode(episode.videos["wrist"][0]):
                pass
        began -= (LOADED / 4000 - 1) * (time.perf_counter() - began)
    seconds = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([seconds, size, 1024 * int(status["VmHWM"].split()[0])]))


def timed(do: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def in_turns(*dos: Callable[[], object]) -> list[float]:
    """The median seconds of each, after one run to warm up, taken in turns: the machine's moods hit all alike."""
    for do in dos:
        do()
    return np.median([[timed(do) for do in dos] for _ in range(TIMES)], axis=0).tolist()


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def require(got: int, wanted: int) -> None:
    """A figure of less work than was asked for is none."""
    assert got == wanted, (got, wanted)


def noisy_frames(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """A drifting scene with a sensor's noise, which comes again after 32 frames: (height, width, 3) uint8 each."""
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(40, 216, (12, 16, 3)).astype(np.uint8), (width, height))
    moved = np.stack([np.roll(scene, 3 * index, axis=1) for index in range(min(count, 32))])
    frames = np.clip(moved + 4 * rng.standard_normal(moved.shape, np.float32), 0, 255).astype(np.uint8)
    return (frames[index % 32] for index in range(count))


def record(folder: Path, episodes: int, rows: int, height: int, width: int) -> None:
    """A real dataset."""
    rng = np.random.default_rng(0)
    schema = describe(Preprocess(None), ["wrist"], FPS, 0.02, 0.5)
    writer = DatasetWriter(folder, fps=FPS, cameras={"wrist": (height, width)}, task="bench", schema=schema)
    for _ in range(episodes):
        *frames, closing = noisy_frames(rows + 1, height, width)
        for row, frame in enumerate(frames):
            state, action = rng.normal(size=len(STATE)), rng.uniform(-1, 1, len(ACTION))
            writer.add(state, action, {"wrist": frame}, capture_time=row / FPS)
        writer.save_episode(state, {"wrist": closing}, rows / FPS)
    writer.close()


def long_episode(folder: Path, codec: Codec, frames: int) -> tuple:
    """An episode of `frames` noisy 640x480 frames in `codec`, and its video file."""
    record(folder, 1, frames, HEIGHT, WIDTH)
    episode = open_dataset(folder).episodes[0]
    video, _ = episode.videos["wrist"]
    video.unlink()
    writer = VideoWriter(video, FPS, HEIGHT, WIDTH, codec)
    for frame in noisy_frames(frames, HEIGHT, WIDTH):
        writer.add(frame)
    writer.close()
    return episode, video


def multiply(folder: Path, count: int) -> None:
    """Up to `count` episodes in all: the files of the real ones again, under further numbers."""
    info = json.loads((folder / "meta/info.json").read_text())
    real, frames = info["total_episodes"], info["total_frames"]
    paths = [EPISODES_PATH, info["data_path"], info["closing_path"]]
    paths += [info["video_path"].replace("{video_key}", "observation.images.wrist")]
    tables = {path: [pq.read_table(folder / path.format(**numbers(k))) for k in range(real)] for path in paths[:2]}
    for number in range(real, count):
        source, length = number % real, frames // real
        for path in paths[:2]:
            table = renumber(tables[path][source], number, length)
            pq.write_table(table, folder / path.format(**numbers(number)), **AS_WRITTEN[path == EPISODES_PATH])
        for path in paths[2:]:
            os.link(folder / path.format(**numbers(source)), folder / path.format(**numbers(number)))
    write_info(folder, info | {"total_episodes": count, "total_frames": count * frames // real})


def numbers(episode: int) -> dict[str, int]:
    """What stands in the names of an episode's own files."""
    return {"episode_index": episode, "chunk_index": episode // 1000, "file_index": episode % 1000}


def renumber(table: pa.Table, number: int, length: int) -> pa.Table:
    """The rows of an episode (of its data, or its row of meta/episodes) as those of episode `number`."""
    first = number * length
    values = numbers(number) | {"dataset_from_index": first, "dataset_to_index": first + length}
    for column, name in enumerate(table.column_names):
        new: object = values.get(name.rpartition("/")[2])
        if name == "index":
            new = np.arange(first, first + length)
        if new is not None:
            table = table.set_column(column, table.field(column), pa.array(np.broadcast_to(new, len(table))))
    return table


def pack(folder: Path, packed: Path) -> None:
    """The same episodes as LeRobot packs them: PACKED to a data file and a video, one file of meta/episodes."""
    info = json.loads((folder / "meta/info.json").read_text())
    for top in ("meta/episodes/chunk-000", "data/chunk-000", "videos/observation.images.wrist/chunk-000"):
        (packed / top).mkdir(parents=True)
    shutil.copy(folder / "meta/tasks.parquet", packed / "meta")
    shutil.copy(folder / "meta/stats.json", packed / "meta")
    rows = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "meta/episodes").rglob("*.parquet")))
    place, within = np.divmod(np.arange(EPISODES), PACKED)
    for column, name in enumerate(rows.column_names):
        new = {"file_index": place * (not name.startswith("meta")), "from_timestamp": within * ROWS / FPS,
               "to_timestamp": (within + 1) * ROWS / FPS}.get(name.rpartition("/")[2])  # fmt: skip
        if new is not None:
            rows = rows.set_column(column, rows.field(column), pa.array(new))
    pq.write_table(rows, packed / EPISODES_PATH.format(chunk_index=0, file_index=0))
    data = [pq.read_table(path) for path in sorted((folder / "data").rglob("*.parquet"))]
    videos = [packed / info["video_path"].format(video_key="observation.images.wrist", chunk_index=0, file_index=index)
              for index in range(EPISODES // PACKED)]  # fmt: skip
    writer = VideoWriter(videos[0], FPS, 32, 32)
    for frame in noisy_frames(PACKED * ROWS, 32, 32):
        writer.add(frame)
    writer.close()
    for index, video in enumerate(videos):
        together = pa.concat_tables(data[index * PACKED : (index + 1) * PACKED])
        pq.write_table(together, packed / info["data_path"].format(chunk_index=0, file_index=index))
        if index:
            os.link(videos[0], video)
    write_info(packed, {key: value for key, value in info.items() if key not in ("so101", "closing_path")})


def write_info(folder: Path, info: dict) -> None:
    """Replace meta/info.json."""
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        work_as_child(*sys.argv[2:])
    else:
        main(sys.argv[1:])
