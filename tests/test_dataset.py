"""Datasets: what was recorded is read back, a kill or a full disk costs one episode, LeRobot can open it."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from so101.data import stats
from so101.data.dataset import Dataset, episode_rows, open_dataset
from so101.data.index import write_index
from so101.data.video import VideoWriter
from so101.data.writer import DatasetWriter
from so101.errors import EXIT_DONE, DataError, EpisodeAborted, UserError

ROOT = Path(__file__).parents[1]
SIZE = (32, 48)
SCHEMA = {"state": ["a", "b"], "fps": 10, "image": {"crop": None, "image_size": 128}}
MADE = {"fps": 10, "cameras": {"gripper_cam": SIZE, "side": SIZE}, "task": "lift the cube", "schema": SCHEMA}
posix = pytest.mark.skipif(os.name != "posix", reason="kills and limits processes as POSIX does")


def level(episode: int, index: int) -> int:
    """The grey of a test frame: different for neighbours, so a frame out of place shows."""
    return 30 + (episode * 37 + index * 23) % 200


def frames(episode: int, index: int) -> dict[str, np.ndarray]:
    side = np.full((*SIZE, 3), 255 - level(episode, index), np.uint8)
    return {"gripper_cam": np.full((*SIZE, 3), level(episode, index), np.uint8), "side": side}


def state(episode: int, index: int) -> np.ndarray:
    return np.arange(18) / 7 + 100 * episode + index


def record(writer: DatasetWriter, episode: int, length: int) -> int:
    for i in range(length):
        action = np.array([i / 100, -0.5, 0.25, -1.0])
        writer.add(state(episode, i), action, frames(episode, i), capture_time=0.1 * i + 0.003, reward=float(i == 2))
    return writer.save_episode(state(episode, length), closing(episode, length), 0.1 * length + 0.004)


def closing(episode: int, length: int) -> dict[str, np.ndarray]:
    """Noise, which only a lossless file gives back."""
    rng = np.random.default_rng([episode, length])
    return {camera: rng.integers(0, 256, (*SIZE, 3), np.uint8) for camera in ("gripper_cam", "side")}


def check(dataset: Dataset, lengths: list[int]) -> None:
    """Every row, frame and closing observation is what `record` put in."""
    assert [episode.length for episode in dataset.episodes] == lengths
    for e, (episode, length) in enumerate(zip(dataset.episodes, lengths, strict=True)):
        columns = episode.columns()
        assert episode.index == e and episode.observations == length + 1
        assert np.array_equal(columns["observation.state"], [np.float32(state(e, i)) for i in range(length)])
        assert np.array_equal(columns["action"][:, 0], np.float32([i / 100 for i in range(length)]))
        assert columns["index"].tolist() == [sum(lengths[:e]) + i for i in range(length)]
        assert columns["frame_index"].tolist() == list(range(length))
        assert set(columns["episode_index"].tolist()) == {e}
        for camera, sign in (("gripper_cam", 1), ("side", -1)):
            seen = [frame.mean() for frame in episode.frames(camera)]
            wanted = [level(e, i) if sign == 1 else 255 - level(e, i) for i in range(length)]
            assert np.abs(np.subtract(seen, wanted)).max() < 3
        last = episode.closing()
        assert last is not None and last.capture_time == 0.1 * length + 0.004
        assert np.array_equal(last.state, np.float32(state(e, length)))
        for camera, frame in closing(e, length).items():
            assert np.array_equal(last.frames[camera], frame)


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and digest of everything in a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, digest)
    return found


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Two episodes of 4 and 6 rows."""
    writer = DatasetWriter(tmp_path / "set", **MADE)
    assert (record(writer, 0, 4), record(writer, 1, 6)) == (0, 1)
    writer.close()
    return tmp_path / "set"


def test_what_was_recorded_is_read_back(recorded: Path) -> None:
    dataset = open_dataset(recorded)
    assert dataset.fps == 10 and dataset.cameras == {"gripper_cam": SIZE, "side": SIZE}
    assert dataset.schema == SCHEMA and dataset.notes == [] and dataset.episodes[1].task == "lift the cube"
    check(dataset, [4, 6])
    columns = dataset.episodes[0].columns()
    assert columns["next.reward"].tolist() == [0, 0, 1, 0]
    assert columns["capture_time"].tolist() == [0.1 * i + 0.003 for i in range(4)]
    assert columns["next.done"].dtype == columns["next.truncated"].dtype == np.bool_


def test_a_save_imports_nothing(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pyarrow guesses a type it imports a module for each value, and swallows a Ctrl-C that comes meanwhile."""
    asked: list[str] = []
    finder = SimpleNamespace(find_spec=lambda name, path, target=None: asked.append(name))
    writer = DatasetWriter(recorded, **MADE)
    record(writer, 3, 4)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    record(writer, 4, 4)
    writer.close()
    assert asked == []


def test_opening_and_reading_changes_not_a_byte(recorded: Path) -> None:
    before = tree(recorded)
    check(open_dataset(recorded), [4, 6])
    assert tree(recorded) == before


def test_appending_touches_no_data_or_video_that_exists(recorded: Path) -> None:
    def kept() -> dict[str, tuple[int, str]]:
        tops = ("data/", "videos/", "closing/", "meta/episodes/")
        return {n: e for n, e in tree(recorded).items() if n.startswith(tops) and e[1]}

    before = kept()
    writer = DatasetWriter(recorded, **MADE)
    assert writer.recovered == [] and writer.episodes == 2
    assert record(writer, 2, 3) == 2
    writer.close()
    after = kept()
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 5
    check(open_dataset(recorded), [4, 6, 3])


def test_timestamps_are_the_frame_number_over_fps_in_float32(tmp_path: Path) -> None:
    """1/30 added up in float32 drifts; LeRobot refuses 1e-4 s of it."""
    writer = DatasetWriter(tmp_path / "set", fps=30, cameras={}, task="t", schema={})
    for _ in range(1500):
        writer.add(np.zeros(18), np.zeros(4), {}, capture_time=0.0)
    writer.save_episode(np.zeros(18), {}, 50.0)
    writer.close()
    timestamp = open_dataset(tmp_path / "set").episodes[0].columns()["timestamp"]
    assert timestamp.dtype == np.float32
    assert timestamp[1] == np.float32(1 / 30) and timestamp[1499] == np.float32(1499 / 30)


def test_rewards_given_at_the_end_replace_those_of_the_rows(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", fps=10, cameras={}, task="t", schema={})
    for _ in range(3):
        writer.add(np.zeros(18), np.zeros(4), {}, capture_time=0.0, reward=0.5, is_intervention=True)
    with pytest.raises(DataError, match=r"rewards: got shape \(2,\), the episode has 3 rows"):
        writer.save_episode(np.zeros(18), {}, 0.3, rewards=np.zeros(2))
    writer.save_episode(np.zeros(18), {}, 0.3, rewards=np.array([0, 0, 1]))
    writer.close()
    columns = open_dataset(tmp_path / "set").episodes[0].columns()
    assert columns["next.reward"].tolist() == [0, 0, 1]
    assert columns["complementary_info.is_intervention"].tolist() == [True] * 3


def test_a_discarded_take_leaves_nothing_in_the_next(recorded: Path) -> None:
    """Discarded frames that came back in the next video spoiled 235 of 758 recordings elsewhere."""
    before = {name for name, entry in tree(recorded).items() if entry[1]}
    writer = DatasetWriter(recorded, **MADE)
    for i in range(5):
        writer.add(state(9, i), np.zeros(4), frames(9, i), capture_time=0.0)
    writer.discard_episode()
    assert {name for name, entry in tree(recorded).items() if entry[1]} == before | {".lock"}
    with pytest.raises(DataError, match="no rows"):
        writer.save_episode(state(9, 0), frames(9, 0), 0.0)
    assert record(writer, 2, 3) == 2
    writer.close()
    check(open_dataset(recorded), [4, 6, 3])


def test_nothing_is_overwritten_and_nothing_foreign_is_continued(recorded: Path) -> None:
    before = tree(recorded)
    for change, said in (
        ({"fps": 30}, "fps is 10 there, 30 here"),
        ({"cameras": {"gripper_cam": (64, 48), "side": SIZE}}, r"\[32, 48\].*\[64, 48\]"),
        ({"schema": {**SCHEMA, "state": ["b", "a"]}}, r"state is \['a', 'b'\] there"),
    ):
        with pytest.raises(DataError, match=said) as refused:
            DatasetWriter(recorded, **{**MADE, **change})
        assert refused.value.exit_code == 4
    assert tree(recorded) == before
    (recorded.parent / "empty").mkdir()
    with pytest.raises(DataError, match="meta/info.json"):
        DatasetWriter(recorded.parent / "empty", **MADE)
    assert list((recorded.parent / "empty").iterdir()) == []
    DatasetWriter(recorded.parent / "new" / "deep" / "set", **MADE).close()
    assert open_dataset(recorded.parent / "new" / "deep" / "set").episodes == []


def test_two_writers_to_one_folder_are_refused(recorded: Path) -> None:
    first = DatasetWriter(recorded, **MADE)
    with pytest.raises(DataError, match=f'"pid": {os.getpid()}'):
        DatasetWriter(recorded, **MADE)
    assert record(first, 2, 3) == 2
    first.close()
    second = DatasetWriter(recorded, **MADE)
    with pytest.raises(UserError, match="was closed"):
        record(first, 3, 3)
    assert record(second, 3, 2) == 3
    second.close()
    check(open_dataset(recorded), [4, 6, 3, 2])


def test_rows_that_break_the_schema_are_refused(recorded: Path) -> None:
    writer = DatasetWriter(recorded, **MADE)
    good = frames(2, 0)
    zero = np.zeros(4)
    for values, said in (
        ((np.zeros(12), zero, good), "state: got .* must be 18 finite"),
        ((np.full(18, np.nan), zero, good), "18 finite"),
        ((np.zeros(18), np.array([0, 0, 0, 2.0]), good), r"each must be in \[-1, 1\]"),
        ((np.zeros(18), zero, {"gripper_cam": good["side"]}), "must be .'gripper_cam', 'side'"),
        ((np.zeros(18), zero, {**good, "side": good["side"] / 255}), "camera side: got a float64"),
    ):
        with pytest.raises(DataError, match=said):
            writer.add(*values, capture_time=0.0)
    assert record(writer, 2, 3) == 2  # a refused row leaves nothing behind
    writer.close()
    check(open_dataset(recorded), [4, 6, 3])


def test_what_is_missing_or_damaged_is_named(recorded: Path) -> None:
    video = "videos/observation.images.side/chunk-000/file-001.mp4"
    for name in (
        "meta/info.json",
        "data/chunk-000/file-000.parquet",
        video,
        "closing/episode_000001.npz",
        "meta/episodes/chunk-000/file-001.parquet",
    ):
        content = (recorded / name).read_bytes()
        (recorded / name).unlink()
        with pytest.raises(DataError, match=name.rpartition("/")[2].replace(".", r"\.") + ": (missing|cannot be read)"):
            open_dataset(recorded)
        (recorded / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=name.rpartition("/")[2].replace(".", r"\.")):
            for episode in open_dataset(recorded).episodes:
                list(episode.frames("side")), episode.closing()
        (recorded / name).write_bytes(content)
    check(open_dataset(recorded), [4, 6])
    (recorded / "meta/episodes/chunk-000/file-000.parquet").unlink()
    with pytest.raises(DataError, match="file-001.parquet: missing|episode 0 is missing"):
        open_dataset(recorded)


def test_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text('{"codebase_version": "v1.6"}')
    with pytest.raises(DataError, match="'v1.6'; only v2.1 and v3.0"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="nowhere: there is no such folder; name a dataset, or record one"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"info\.json: cannot be read: No such file .* is not a dataset"):
        open_dataset(tmp_path / "empty")


def test_a_short_video_is_not_padded(recorded: Path) -> None:
    path = recorded / "videos/observation.images.side/chunk-000/file-001.mp4"
    path.unlink()
    writer = VideoWriter(path, 10, *SIZE)
    for i in range(5):
        writer.add(frames(1, i)["side"])
    writer.close()
    with pytest.raises(DataError, match="episode 1 has 6 rows, but only 5 frames"):
        list(open_dataset(recorded).episodes[1].frames("side"))


def test_several_episodes_in_one_file_as_lerobot_writes_them(tmp_path: Path) -> None:
    """Episodes of 3 and 4 rows share one data file and one video; metadata miscounts the second as 9."""
    key = "observation.images.top"
    info = {
        "codebase_version": "v3.0", "robot_type": None, "total_episodes": 2, "total_frames": 7, "fps": 10,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [3], "names": None},
            key: {"dtype": "video", "shape": [3, *SIZE], "names": ["channels", "height", "width"]},
        },
    }  # fmt: skip
    for folder in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{key}/chunk-000"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    rows = {
        "action": [[float(i), 0.0, 1.0] for i in range(7)],
        "next.reward": [[0.0]] * 6 + [[1.0]],  # a list of one, as older recorders wrote
        "episode_index": [0, 0, 0, 1, 1, 1, 1],
    }
    pq.write_table(pa.table(rows), tmp_path / "data/chunk-000/file-000.parquet")
    place = {"chunk_index": [0, 0], "file_index": [0, 0]}
    episodes = {"episode_index": [0, 1], "tasks": [["t"], ["t"]], "length": [3, 9]}
    episodes |= {f"data/{name}": value for name, value in place.items()}
    episodes |= {f"videos/{key}/{name}": value for name, value in place.items()}
    episodes[f"videos/{key}/from_timestamp"] = [0.0, 0.3]
    pq.write_table(pa.table(episodes), tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    writer = VideoWriter(tmp_path / "videos" / key / "chunk-000/file-000.mp4", 10, *SIZE)
    for i in range(7):
        writer.add(np.full((*SIZE, 3), 30 * i, np.uint8))
    writer.close()

    dataset = open_dataset(tmp_path)
    assert dataset.schema is None and dataset.cameras == {"top": SIZE}
    assert dataset.notes == [
        "episode 1: 4 rows, but the metadata says 9",
        "no column next.done: the last row of an episode is taken for its end",
        "columns that meta/info.json does not name: episode_index, next.reward",
    ]
    assert dataset.episodes[1].columns()["next.done"].tolist() == [False, False, False, True]
    second = dataset.episodes[1]
    assert second.columns()["action"][:, 0].tolist() == [3, 4, 5, 6]
    assert second.columns()["next.reward"].tolist() == [0, 0, 0, 1]
    assert [round(frame.mean() / 30) for frame in second.frames("top")] == [3, 4, 5, 6]
    assert second.closing() is None and second.observations == 4
    with pytest.raises(DataError, match="another program"):
        DatasetWriter(tmp_path, **MADE)

    rows["episode_index"] = [0] * 5 + [1] * 2  # and now episode 0 has more rows than frames of its own
    pq.write_table(pa.table(rows), tmp_path / "data/chunk-000/file-000.parquet")
    dataset = open_dataset(tmp_path)
    assert any(note.endswith("file-000.mp4: episode 0 has 5 rows and 3 frames") for note in dataset.notes)
    with pytest.raises(DataError, match="episode 0 has 5 rows, but only 3 frames"):
        list(dataset.episodes[0].frames("top"))  # never those of episode 1
    with pytest.raises(DataError, match="episode 0 has 5 rows, but only 3 frames"):
        dataset.episodes[0].frame("top", 3)


def test_data_files_are_as_lerobot_reads_them(recorded: Path) -> None:
    """Literals from a file that LeRobot wrote; a column that is not a feature makes it refuse the set."""
    info = json.loads((recorded / "meta/info.json").read_text())
    file = pq.read_table(recorded / "data/chunk-000/file-001.parquet")
    features = {name for name, feature in info["features"].items() if feature["dtype"] != "video"}
    assert set(file.column_names) == features
    assert str(file.schema.field("action").type) == "fixed_size_list<element: float>[4]"
    types = {name: str(file.schema.field(name).type) for name in ("next.reward", "next.done", "index", "timestamp")}
    assert types == {"next.reward": "float", "next.done": "bool", "index": "int64", "timestamp": "float"}
    described = json.loads(file.schema.metadata[b"huggingface"])["info"]["features"]
    value = {"dtype": "float32", "_type": "Value"}
    assert described["action"] == {"feature": value, "length": 4, "_type": "Sequence"}
    assert described["next.reward"] == value and set(described) == features
    assert info["codebase_version"] == "v3.0" and info["splits"] == {"train": "0:2"}
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (2, 10, 1)
    assert info["features"]["observation.images.side"]["shape"] == [32, 48, 3]
    assert info["features"]["observation.images.side"]["info"]["video.codec"] == "h264"
    assert info["features"]["action"]["names"] == ["delta_x", "delta_y", "delta_z", "gripper"]
    assert [str(path.relative_to(recorded)) for path in sorted((recorded / "data").rglob("*.*"))] == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
    ]


def test_episodes_and_tasks_are_as_lerobot_reads_them(recorded: Path) -> None:
    row = pq.read_table(recorded / "meta/episodes/chunk-000/file-001.parquet").to_pylist()[0]
    video = "videos/observation.images.gripper_cam/"
    assert (row["episode_index"], row["length"], row["tasks"]) == (1, 6, ["lift the cube"])
    assert (row["dataset_from_index"], row["dataset_to_index"]) == (4, 10)
    assert (row["data/chunk_index"], row["data/file_index"], row["meta/episodes/file_index"]) == (0, 1, 1)
    assert (row[video + "file_index"], row[video + "from_timestamp"], row[video + "to_timestamp"]) == (
        1,
        0.0,
        0.6,
    )
    assert row["stats/next.done/min"] == [False] and row["stats/frame_index/max"] == [5]
    image = np.array(row["stats/observation.images.side/mean"])
    assert image.shape == (3, 1, 1)
    assert abs(image[0, 0, 0] - np.mean([255 - level(1, i) for i in range(6)]) / 255) < 1e-9
    tasks = pq.read_table(recorded / "meta/tasks.parquet")
    pandas = json.loads(tasks.schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]
    assert [(c["name"], c["pandas_type"]) for c in pandas["columns"]] == [
        ("task_index", "int64"),
        ("task", "unicode"),
    ]
    assert tasks.to_pydict() == {"task_index": [0], "task": ["lift the cube"]}


def test_stats_of_the_whole_set_are_those_of_all_its_rows(recorded: Path) -> None:
    states = np.concatenate([e.columns()["observation.state"] for e in open_dataset(recorded).episodes])
    stored = json.loads((recorded / "meta/stats.json").read_text())["observation.state"]
    assert np.allclose(stored["mean"], states.mean(0, dtype=float)) and np.allclose(
        stored["std"], states.std(0, dtype=float)
    )
    assert stored["count"] == [10] and np.allclose(stored["max"], states.max(0))


def test_column_statistics_by_hand() -> None:
    found = stats.column_stats(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    assert found["mean"].tolist() == [2.5] and found["std"].tolist() == [1.25**0.5]
    assert found["q50"].tolist() == [2.5] and found["count"].tolist() == [4]
    booleans = stats.column_stats(np.array([True, False]))
    assert booleans["max"].tolist() == [True] and booleans["mean"].tolist() == [0.5]


def test_image_statistics_are_those_of_the_pixels_themselves() -> None:
    pictures = np.random.default_rng(1).normal(120, 40, (5, 20, 30, 3)).clip(0, 255).astype(np.uint8)
    found = stats.image_stats(np.stack([stats.frame_histogram(picture) for picture in pictures]))
    pixels = pictures.reshape(-1, 3) / 255
    wanted = {"mean": pixels.mean(0), "std": pixels.std(0), "min": pixels.min(0), "max": pixels.max(0)}
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q90", 0.9)):
        wanted[name] = np.quantile(pixels, q, axis=0, method="inverted_cdf")
    for name, value in wanted.items():
        assert found[name].shape == (3, 1, 1)
        assert np.allclose(found[name].ravel(), value), name


def test_which_frames_and_pixels_statistics_are_taken_from() -> None:
    assert stats.sampled_frames(100).tolist() == list(range(100))
    assert len(stats.sampled_frames(464)) == 100  # 464 ** 0.75 = 99.98
    assert len(stats.sampled_frames(10_000)) == 1000 and stats.sampled_frames(10_000)[-1] == 9999
    assert stats.frame_histogram(np.zeros((480, 640, 3), np.uint8)).sum() == 3 * 120 * 160  # stride int(640 / 150)
    assert stats.frame_histogram(np.zeros((128, 128, 3), np.uint8)).sum() == 3 * 128 * 128


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow past `size`, as on a disk that fills up."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Disk:
    """What a power cut leaves of a folder: what fsync has pushed out, of files their bytes, of folders their names.

    A journal may have brought names to the disk earlier than asked; a file that was never synced is empty then.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.sync = os.fsync

    def fsync(self, descriptor: int) -> None:
        self.sync(descriptor)
        path, inode = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_ino
        if path.is_dir():
            self.names[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self.bytes[inode] = path.read_bytes()

    def left(self, to: Path, names_early: bool) -> None:
        """Lay down what there would be."""
        live = {path.stat().st_ino: path for path in [self.root, *self.root.rglob("*")]}

        def lay(inode: int, place: Path) -> None:
            if inode in live and live[inode].is_dir():
                place.mkdir()
                names = {e.name: e.stat().st_ino for e in live[inode].iterdir()} if names_early else {}
                for name, entry in (names or self.names.get(inode, {})).items():
                    lay(entry, place / name)
            elif inode in live or inode in self.bytes:
                place.write_bytes(self.bytes.get(inode, b""))

        lay(self.root.stat().st_ino, to)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file is synced")
@pytest.mark.parametrize("names_early", [False, True])
def test_a_power_cut_after_any_sync_leaves_every_saved_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names_early: bool
) -> None:
    (tmp_path / "live").mkdir()
    disk, saved, cuts = Disk(tmp_path / "live"), [0], [0]

    def fsync(descriptor: int) -> None:
        disk.fsync(descriptor)
        cuts[0] += 1
        left = tmp_path / f"left{cuts[0]}"
        disk.left(left, names_early)
        if (left / "set").exists() or saved[0]:
            monkeypatch.setattr(os, "fsync", disk.sync)  # the recovery's own are not watched
            found = open_dataset(left / "set")
            assert len(found.episodes) in (saved[0], saved[0] + 1)
            check(found, [3] * len(found.episodes))
            if cuts[0] % 7 == 0:
                writer = DatasetWriter(left / "set", **MADE)
                assert record(writer, len(found.episodes), 2) == len(found.episodes)
                writer.close()
            monkeypatch.setattr(os, "fsync", fsync)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = DatasetWriter(tmp_path / "live/set", **MADE)
    for episode in range(2):
        record(writer, episode, 3)
        saved[0] += 1
    writer.close()
    monkeypatch.undo()
    disk.left(tmp_path / "end", names_early)
    check(open_dataset(tmp_path / "end/set"), [3, 3])
    assert cuts[0] > 20


def test_a_disk_nearly_full_is_told_before_an_episode_begins(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("so101.data.writer.LEAST_FREE", 10**18)  # an exabyte, which no disk here has
    writer = DatasetWriter(recorded, **MADE)
    with pytest.raises(UserError, match=r"the disk has only \d+ MB left.* no episode was begun"):
        writer.add(state(2, 0), np.zeros(4), frames(2, 0), capture_time=0.0)
    writer.close()
    assert not list((recorded / ".staging").rglob("*"))
    check(open_dataset(recorded), [4, 6])


def test_an_encoder_that_dies_costs_its_episode_and_not_the_recording(recorded: Path) -> None:
    writer = DatasetWriter(recorded, **MADE)
    writer.add(state(2, 0), np.zeros(4), frames(2, 0), capture_time=0.0)
    assert writer._take is not None
    writer._take.videos["side"]._queue.put(np.zeros((3, 3), np.uint8))  # what no encoder takes
    with pytest.raises(EpisodeAborted, match="the encoder failed"):
        writer.save_episode(state(2, 1), closing(2, 1), 0.1)
    assert record(writer, 2, 5) == 2
    writer.close()
    check(open_dataset(recorded), [4, 6, 5])


def test_the_index_is_believed_only_while_the_files_are_those_it_was_made_from(recorded: Path) -> None:
    path = recorded / "meta/episodes/chunk-000/file-001.parquet"
    rows = episode_rows(recorded)
    rows[1]["tasks"] = ["from the index"]
    write_index(recorded, rows)
    assert [e.task for e in open_dataset(recorded).episodes] == ["lift the cube", "from the index"]
    copy = Path(shutil.copytree(recorded, recorded.with_name("copy"), copy_function=shutil.copyfile))
    assert open_dataset(copy).episodes[1].task == "from the index"  # it moves with its dataset
    table = pq.read_table(path)
    pq.write_table(table, path, compression="zstd")  # somebody wrote the file anew
    assert [e.task for e in open_dataset(recorded).episodes] == ["lift the cube"] * 2
    index = json.loads((recorded / "meta/index.json").read_text())
    index["chunk-000/file-000.parquet"][1]["videos/observation.images.side/file_index"] = 1  # a flipped bit
    for torn in ("", "{", "[]", '{"chunk-000/file-000.parquet": 3}', json.dumps(index)):
        (recorded / "meta/index.json").write_text(torn)
        check(open_dataset(recorded), [4, 6])


@pytest.mark.parametrize("name", ["info.json", "stats.json", "tasks.parquet", "episodes/chunk-000/file-001.parquet"])
def test_a_torn_metadata_file_is_named_or_made_anew(recorded: Path, name: str) -> None:
    """What can be made from the rest is, by the next recording; nothing else is guessed."""
    path = recorded / "meta" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before = tree(recorded)
    if name in ("stats.json", "tasks.parquet"):
        check(open_dataset(recorded), [4, 6])
        assert tree(recorded) == before
        DatasetWriter(recorded, **MADE).close()
        assert path.read_bytes() == whole
    else:
        for use in (open_dataset, lambda folder: DatasetWriter(folder, **MADE)):
            with pytest.raises(DataError, match=rf"{Path(name).name}: (no usable JSON|not a readable parquet file)"):
                use(recorded)
        assert tree(recorded) == before


DAMAGER = """
import sys
import numpy as np
from pathlib import Path
from so101.data.dataset import open_dataset
from so101.errors import DataError

folder, pattern, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
whole = {e.index: (e.columns(), [f.copy() for f in e.observed("side")]) for e in open_dataset(folder).episodes}
path = next(folder.glob(pattern))
content = path.read_bytes()
refused = changed = 0
for place in np.random.default_rng(0).choice(len(content), count, replace=False):
    path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
    try:
        episode = open_dataset(folder).episodes[0]
        columns, frames = episode.columns(), list(episode.observed("side"))
    except DataError as error:
        refused += 1
        assert path.name in str(error), error
    else:
        changed += any(not np.array_equal(column, columns.get(name, column)) for name, column in whole[0][0].items())
path.write_bytes(content)
print(refused, changed)
"""


@posix
@pytest.mark.parametrize(
    "pattern", ["data/**/file-000.parquet", "closing/*_000000.npz", "videos/*side/**/file-000.mp4"]
)
def test_a_flipped_bit_is_refused_by_file_or_changes_nothing_and_never_ends_the_program(
    recorded: Path, pattern: str
) -> None:
    """Bits of a footer once brought the interpreter down, others changed actions without a word."""
    command = [sys.executable, "-c", DAMAGER, str(recorded), pattern, "150"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, changed = map(int, done.stdout.split())
    assert refused > 10 and changed <= 3  # names of columns and the like have no checksum


def test_leftovers_are_numbered_on_also_where_a_person_cleared_some(recorded: Path) -> None:
    for kept in range(3):
        stray = recorded / "data/chunk-000/file-007.parquet"
        stray.write_bytes(b"%d" % kept)
        writer = DatasetWriter(recorded, **MADE)
        writer.close()
        assert writer.recovered == ["data/chunk-000/file-007.parquet"]
        if kept == 1:
            shutil.rmtree(recorded / ".leftovers/000")
    assert sorted(path.name for path in (recorded / ".leftovers").iterdir()) == ["001", "002"]


def test_a_place_inside_another_dataset_is_refused(recorded: Path) -> None:
    for place in ("data/mine", "mine", "videos/deep/mine"):
        with pytest.raises(DataError, match="lies inside the dataset"):
            DatasetWriter(recorded / place, **MADE)
    check(open_dataset(recorded), [4, 6])


def test_a_path_may_look_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("take-10:30", "http:x", "a b/ü%20#?&", "-start"):
        writer = DatasetWriter(Path(name), **MADE)
        record(writer, 0, 3)
        writer.close()
        check(open_dataset(Path(name)), [3])


def test_an_episode_is_taken_over_with_its_video_as_it_is(recorded: Path, tmp_path: Path) -> None:
    """A part of one, and two that share a file: linked once, addressed by their first frame, not a frame encoded."""
    episode = open_dataset(recorded).episodes[1]
    columns, last = episode.columns(), episode.closing()
    assert last is not None
    writer = DatasetWriter(tmp_path / "new", **MADE)
    for first, end in ((0, 6), (2, 5)):
        videos = {camera: (path, start + first) for camera, (path, start) in episode.videos.items()}
        writer.copy_episode({name: c[first:end] for name, c in columns.items()}, last, videos, "again")
    assert record(writer, 2, 3) == 2
    writer.close()
    whole, part, own = open_dataset(tmp_path / "new").episodes
    assert [e.length for e in (whole, part, own)] == [6, 3, 3] and part.task == "again"
    assert np.array_equal(part.columns()["action"], columns["action"][2:5])
    assert part.columns()["index"].tolist() == [6, 7, 8]
    seen = list(episode.frames("side"))
    assert all(map(np.array_equal, part.frames("side"), seen[2:5])) and np.array_equal(part.frame("side", 1), seen[3])
    files = sorted((tmp_path / "new/videos").rglob("*.mp4"))
    assert [path.name for path in files] == ["file-000.mp4", "file-002.mp4"] * 2
    assert files[0].samefile(recorded / "videos/observation.images.gripper_cam/chunk-000/file-001.mp4")
    row = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-001.parquet").to_pylist()[0]
    assert row["videos/observation.images.side/file_index"] == 0
    assert row["videos/observation.images.side/from_timestamp"] == 0.2
    assert row["videos/observation.images.side/to_timestamp"] == 0.5
    again = DatasetWriter(tmp_path / "new", **MADE)
    assert again.recovered == []
    again.close()


@posix
@pytest.mark.parametrize("size", [3_000, 6_000, 9_500, 20_000])
def test_a_full_disk_costs_the_episode_in_progress_only(recorded: Path, size: int) -> None:
    """It fills up in the video, the data file, the closing observation, the episodes file."""
    kept = {name: entry for name, entry in tree(recorded).items() if name.startswith(("data/", "videos/", "closing/"))}
    kept = {name: entry for name, entry in kept.items() if entry[1]}
    writer = DatasetWriter(recorded, **MADE)
    with file_size_limit(size), pytest.raises(UserError, match="The 2 episodes saved are whole"):
        record(writer, 2, 40)
    with pytest.raises(UserError, match="resume"):
        record(writer, 2, 3)
    now = tree(recorded)
    assert {name: now[name] for name in kept} == kept
    assert len(list((recorded / "data").rglob("*.parquet"))) == 2
    check(open_dataset(recorded), [4, 6])
    again = DatasetWriter(recorded, **MADE)
    assert record(again, 2, 3) == 2
    again.close()
    check(open_dataset(recorded), [4, 6, 3])


@pytest.mark.parametrize(("survives", "saved"), [(0, 2), (1, 2), (2, 2), (3, 2), (4, 2), (5, 3), (6, 3)])
def test_ctrl_c_between_any_two_steps_of_a_save(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, survives: int, saved: int
) -> None:
    """As below, but the program lives on: what is not committed is out of data/ when it is seen."""
    writer = DatasetWriter(recorded, **MADE)
    rename, left = os.rename, survives

    def interrupted(source: str, target: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(writer, 2, 3)
    monkeypatch.undo()
    assert writer.episodes == saved
    writer.close()
    assert len(list((recorded / "data").rglob("*.parquet"))) == saved
    check(open_dataset(recorded), [4, 6, 3][:saved])
    again = DatasetWriter(recorded, **MADE)
    assert again.episodes == saved
    again.close()
    assert json.loads((recorded / "meta/info.json").read_text())["total_episodes"] == saved


def serve(folder: str) -> None:
    """Runs in a process of its own: for each line of input, fork a recorder and say its process id.

    The line is how many of its renames the recorder survives; it is killed at the next. 999: it records on.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr  # standard output is for the two lines below
            left = int(line)

            def count_down(source: object, target: object, rename: object = os.rename) -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                rename(source, target)  # type: ignore[operator]

            if left < 999:
                os.rename = os.replace = count_down  # type: ignore[assignment]
            writer = DatasetWriter(folder, **MADE)
            while True:
                record(writer, writer.episodes, 1 + writer.episodes % 4)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
    sys.exit(EXIT_DONE)


@contextmanager
def recorder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    code = f"import sys; sys.path[:0] = ['.', 'tests']; import test_dataset; test_dataset.serve({str(folder)!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run_recorder(process: "subprocess.Popen[str]", survives: int, seconds: float) -> None:
    """Let a recorder run until it is killed, by itself or after `seconds`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{survives}\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    if survives == 999:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    assert int(process.stdout.readline()) == signal.SIGKILL


@posix
def test_killed_at_any_instant_every_saved_episode_is_whole(tmp_path: Path) -> None:
    DatasetWriter(tmp_path / "set", **MADE).close()
    rng = random.Random(5)
    total = 0
    with recorder(tmp_path / "set") as process:
        for _ in range(8):
            run_recorder(process, 999, rng.uniform(0.03, 0.2))
            dataset = open_dataset(tmp_path / "set")
            assert len(dataset.episodes) >= total  # none that was there is lost
            total = len(dataset.episodes)
            check(dataset, [1 + e % 4 for e in range(total)])
    assert total >= 1
    writer = DatasetWriter(tmp_path / "set", **MADE)
    assert record(writer, total, 1 + total % 4) == total
    writer.close()
    check(open_dataset(tmp_path / "set"), [1 + e % 4 for e in range(total + 1)])
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert info["total_episodes"] == total + 1 == len(list((tmp_path / "set/data").rglob("*.*")))


@posix
def test_killed_between_any_two_steps_of_a_save(tmp_path: Path) -> None:
    """Renames of one save: 2 videos, data, closing, episodes (the commit), then stats.json and info.json."""
    with recorder(tmp_path / "set") as process:
        for survives, saved in enumerate([1, 1, 1, 1, 1, 2, 2]):
            folder = tmp_path / "set"
            writer = DatasetWriter(folder, **MADE)
            record(writer, 0, 1)
            writer.close()
            run_recorder(process, survives, 0.0)
            check(open_dataset(folder), [1, 2][:saved])
            writer = DatasetWriter(folder, **MADE)
            moved = [name for name in writer.recovered if "tmp" not in name]
            assert len(moved) == (0 if saved == 2 else 5)  # what was staged or moved, never deleted
            assert all((folder / ".leftovers/000" / name).is_file() for name in writer.recovered)
            assert record(writer, saved, 1 + saved % 4) == saved
            writer.close()
            check(open_dataset(folder), [1, 2, 3][: saved + 1])
            names = {path.name for path in (folder / "data").rglob("*") if path.is_file()}
            assert names == {f"file-{e:03d}.parquet" for e in range(saved + 1)}
            assert list((folder / ".staging").iterdir()) == []
            folder.rename(tmp_path / f"set{survives}")
