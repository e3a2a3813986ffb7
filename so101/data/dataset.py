"""Datasets on disk, in LeRobot's v3.0 layout: reading, and recording that a kill cannot hurt.

One data file, one video per camera and one episodes file for each episode, so that appending never touches
what exists. An episode's files are made in `.staging`, synced, and moved into place; the last one moved, its
file in meta/episodes, commits it. Opening a dataset reads, and changes nothing.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from so101.data import layout
from so101.data.lock import FolderLock
from so101.data.stats import (
    Stats,
    column_stats,
    frame_histogram,
    image_stats,
    merge_stats,
    sampled_frames,
)
from so101.data.video import VideoWriter, read_frames
from so101.errors import DataError, UserError
from so101.files import read_json, sync_file, sync_folder, write_atomic
from so101.schema import ACTION, STATE, require_same
from so101.signals import signals_held


@dataclass(frozen=True)
class Closing:
    """The observation after an episode's last row: state (18,), one uint8 RGB frame per camera, time in s."""

    state: np.ndarray
    frames: dict[str, np.ndarray]
    capture_time: float


@dataclass(frozen=True)
class Episode:
    """One recorded episode of `length` rows; its arrays are read from disk when asked for."""

    index: int
    length: int
    task: str
    fps: float
    _data: Path
    _videos: dict[str, tuple[Path, int]]  # camera -> file and the episode's first frame in it
    _closing: Path | None

    @property
    def observations(self) -> int:
        """How many observations there are: length + 1 where the closing one was kept."""
        return self.length + (self._closing is not None)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column but the videos, in row order: (T,) or (T, d) arrays.

        Raises DataError, naming the file, where it is missing or damaged.
        """
        table = layout.read_parquet(self._data)
        table = table.filter(pa.array(table["episode_index"].to_numpy() == self.index))
        return {name: layout.to_numpy(table[name], f"{self._data}: {name}") for name in table.column_names}

    def frames(self, camera: str) -> Iterator[np.ndarray]:
        """The T frames of one camera, in row order, (height, width, 3) uint8 RGB each.

        Raises DataError, naming the file, where it is missing, damaged or too short.
        """
        path, start = self._videos[camera]
        count = 0
        for frame in islice(read_frames(path, start), self.length):
            yield frame
            count += 1
        if count < self.length:
            raise DataError(f"{path}: episode {self.index} has {self.length} rows, but only {count} frames")

    def closing(self) -> Closing | None:
        """The observation after the last row, or None where the dataset keeps none.

        Raises DataError, naming the file, where it is missing or damaged.
        """
        if self._closing is None:
            return None
        try:
            with open(self._closing, "rb") as file, np.load(file, allow_pickle=False) as stored:
                frames = {camera: stored[layout.IMAGES + camera] for camera in self._videos}
                return Closing(stored["observation.state"], frames, float(stored["capture_time"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self._closing}: not a readable closing observation: {error}") from error


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. `notes` says where its metadata and its rows disagree; the rows are believed."""

    folder: Path
    fps: float
    features: dict[str, Any]
    schema: dict[str, Any] | None
    cameras: dict[str, tuple[int, int]]  # camera -> height, width
    episodes: list[Episode]
    notes: list[str]


def open_dataset(folder: Path | str) -> Dataset:
    """Open a v3.0 dataset, LeRobot's or ours; not a byte of it changes.

    Raises DataError, naming the file, where one is missing or unreadable, and for another version.
    """
    folder = Path(folder)
    info = _read_info(folder)
    features = info["features"]
    rows = _episode_rows(folder)
    if "so101" in info and len(rows) < info.get("total_episodes", 0):  # it is raised only after a commit
        gone = folder / layout.EPISODES_PATH.format(**layout.place_of(len(rows)))
        raise DataError(f"{gone}: missing, though meta/info.json counts {info['total_episodes']} episodes; put it back")
    paths = [folder / info["data_path"].format(**layout.address(row, "data/")) for row in rows]
    lengths: dict[Path, np.ndarray] = {}  # data file -> how many rows of each episode it holds
    for path in paths:
        if path not in lengths:
            lengths[path] = np.bincount(layout.read_parquet(path, ["episode_index"])["episode_index"].to_numpy())
    episodes, notes = [], []
    for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
        length = int(lengths[path][index]) if index < len(lengths[path]) else 0
        if length == 0:
            raise DataError(f"{path}: holds no row of episode {index}, though meta/episodes says so")
        if length != row.get("length"):
            notes.append(f"episode {index}: {length} rows, but meta/episodes says {row.get('length')}")
        episodes.append(_open_episode(folder, info, row, path, length))
    if len(episodes) != info.get("total_episodes"):
        notes.append(f"{len(episodes)} episodes, but meta/info.json says {info.get('total_episodes')}")
    sizes = {layout.camera_of(key): layout.image_size(features[key]) for key in layout.video_keys(features)}
    return Dataset(folder, info["fps"], features, info.get("so101"), sizes, episodes, notes)


def _open_episode(folder: Path, info: dict[str, Any], row: dict[str, Any], data: Path, length: int) -> Episode:
    index, fps, videos = row["episode_index"], info["fps"], {}
    for key in layout.video_keys(info["features"]):
        where = layout.address(row, f"videos/{key}/")
        first = round(row.get(f"videos/{key}/from_timestamp", 0.0) * fps)
        videos[layout.camera_of(key)] = folder / info["video_path"].format(video_key=key, **where), first
    closing = folder / info["closing_path"].format(episode_index=index) if "closing_path" in info else None
    for needed in [*(path for path, _ in videos.values()), *([closing] if closing else [])]:
        if not needed.is_file():
            raise DataError(f"{needed}: missing, though episode {index} is recorded; put it back")
    task = (row.get("tasks") or [""])[0]
    return Episode(index, length, task, fps, data, videos, closing)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "meta" / "info.json"
    info = read_json(path, DataError, f"; without it {folder} is not a dataset")
    version = info.get("codebase_version")
    if not str(version).startswith("v3."):
        raise DataError(f"{path}: codebase_version is {version!r}; only {layout.VERSION} can be read")
    for key in ("fps", "features", "data_path", "video_path"):
        if key not in info:
            raise DataError(f"{path}: {key!r} is missing")
    return info


def _episode_rows(folder: Path, with_stats: bool = False) -> list[dict[str, Any]]:
    """The rows of meta/episodes, which name each episode's files; 0, 1, 2 ... without a gap."""
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "meta" / "episodes").glob("chunk-*/*.parquet")):
        names = layout.column_names(path)
        columns = [name for name in names if with_stats or not name.startswith("stats/")]
        rows += layout.read_parquet(path, columns).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    indices = [row["episode_index"] for row in rows]
    if indices != list(range(len(rows))):
        wrong = next(i for i, index in enumerate(indices) if index != i)
        raise DataError(f"{folder}/meta/episodes: episode {wrong} is missing or there twice; put its file back")
    return rows


@dataclass
class _Take:
    """The episode in progress: a value per row and column, and per camera its encoder and histograms."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in layout.COLUMNS})
    videos: dict[str, VideoWriter] = field(default_factory=dict)
    histograms: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.columns["action"])


class DatasetWriter:
    """Records episodes into a dataset folder; one writer to a folder, held by a lock.

    `add` each row, then `save_episode` or `discard_episode`. Whatever happens, at any instant, episodes
    already saved stay as they are. `recovered` names what an interrupted writer had left behind, which
    was moved to `.leftovers/`.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        fps: float,
        cameras: Mapping[str, tuple[int, int]],
        task: str,
        schema: dict[str, Any],
    ) -> None:
        """Make a new, empty dataset, or go on after the last saved episode of one that is there.

        `cameras`: name -> (height, width); `schema`: of schema.describe. Prints what a kill had left behind.
        Raises DataError for a camera's name or size that cannot be used, and, for a folder that is there,
        where fps, cameras or schema are not those it was made with, a file is missing, another program made
        it, or another process is writing to it.
        """
        self.folder, self.fps, self.task = Path(folder), fps, task
        self.cameras = {name: (height, width) for name, (height, width) in cameras.items()}
        if self.folder.exists():
            self._require_made_so(schema)
        else:
            _make(self.folder, layout.new_info(fps, cameras, schema))
        self._info = _read_info(self.folder)
        self._take: _Take | None = None
        self._open = True
        self._lock = FolderLock(self.folder)
        try:
            self._load()
            self.recovered = self._set_aside()
            self._write_meta()
        except BaseException:
            self._lock.release()
            raise
        for leftover in self.recovered:
            print(f"{folder}: set aside from an interrupted recording: {leftover}")

    @property
    def episodes(self) -> int:
        """How many episodes are saved."""
        return len(self._rows)

    def add(
        self,
        state: np.ndarray,
        action: np.ndarray,
        frames: Mapping[str, np.ndarray],
        *,
        reward: float = 0.0,
        done: bool = False,
        truncated: bool = False,
        is_intervention: bool = False,
        capture_time: float,
    ) -> None:
        """Append a row: the observation (state (18,), a uint8 RGB frame per camera, taken at `capture_time` s
        since the episode's start), the action (4,) in [-1, 1] commanded from it, and what followed.

        Raises DataError for values of another shape, type or range, UserError when the disk fails; after the
        latter the episode in progress is gone.
        """
        if not self._open:
            raise UserError(f"{self.folder}: this writer was closed, or stopped by an error; resume the dataset")
        command = _vector(action, ACTION, "action")
        if np.abs(command).max() > 1:
            raise DataError(f"action: got {command.tolist()}, each must be in [-1, 1]")
        row = {
            "observation.state": _vector(state, STATE, "state"),
            "action": command,
            "next.reward": float(reward),
            "next.done": bool(done),
            "next.truncated": bool(truncated),
            "complementary_info.is_intervention": bool(is_intervention),
            "capture_time": float(capture_time),
        }
        self._check_frames(frames)
        with self._failing():
            take = self._take = self._take or self._new_take()
            for camera, frame in frames.items():
                take.videos[camera].add(frame)
                take.histograms[camera].append(frame_histogram(frame))
        for name, value in row.items():
            take.columns[name].append(value)

    def save_episode(
        self,
        closing_state: np.ndarray,
        closing_frames: Mapping[str, np.ndarray],
        closing_time: float,
        *,
        rewards: np.ndarray | None = None,
    ) -> int:
        """Save the episode in progress with its closing observation, and return its index.

        `rewards` (T,) replace what the rows were added with. When this returns, the episode is on the disk.
        Raises DataError for values that do not fit, and then nothing is lost; UserError when the disk fails, and
        then the episode in progress is gone and those before it are whole.
        """
        if self._take is None:
            raise DataError("save_episode: the episode has no rows; add some, or discard it")
        closing: dict[str, Any] = {"observation.state": _vector(closing_state, STATE, "closing state")}
        self._check_frames(closing_frames)
        closing |= {layout.IMAGES + camera: closing_frames[camera] for camera in self.cameras}
        closing["capture_time"] = np.float64(closing_time)
        if rewards is not None:
            if rewards.shape != (self._take.length,):
                raise DataError(f"rewards: got shape {rewards.shape}, the episode has {self._take.length} rows")
            self._take.columns["next.reward"] = list(rewards)
        columns = self._columns(self._take)
        with self._failing():
            row, stats = self._commit(self._take, columns, closing)
            self._take = None
            self._count(row, stats)
            self._write_meta()
        return self.episodes - 1

    def discard_episode(self) -> None:
        """Forget the episode in progress, if there is one: its unsaved files are removed."""
        take, self._take = self._take, None
        with signals_held():
            for writer in take.videos.values() if take else ():
                writer.abort()
                writer.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Discard an episode in progress and let go of the folder."""
        self._open = False
        try:
            self.discard_episode()
        finally:
            self._lock.release()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """On any error while files are written: drop the episode in progress and stop for good.

        What is saved is counted anew from the disk: the error may have come on either side of the commit. A Ctrl-C
        waits: codec, parquet and threads do not all survive an exception in their midst, and some swallow it.
        """
        with signals_held():
            try:
                yield
            except BaseException as error:  # where nothing took the signals, a Ctrl-C is one of them
                take, self._take, self._open = self._take, None, False
                for writer in take.videos.values() if take else ():
                    writer.abort()
                with suppress(OSError, UserError):  # on a disk that takes nothing more, the next resume does it
                    self._load()
                    self.recovered += self._set_aside()
                self._lock.release()
                if isinstance(error, OSError | pa.ArrowException | UserError):
                    raise UserError(
                        f"{self.folder}: {error}. The {self.episodes} episodes saved are whole, the one in "
                        "progress is lost; make room on the disk, or mend it, and resume"
                    ) from error
                raise

    def _require_made_so(self, schema: dict[str, Any]) -> None:
        found = open_dataset(self.folder)
        if found.schema is None:
            raise DataError(f"{self.folder}: another program made it, so it cannot be appended to; make a new one")
        have = {"fps": found.fps, "cameras": {name: list(size) for name, size in found.cameras.items()}}
        want = {"fps": self.fps, "cameras": {name: list(size) for name, size in self.cameras.items()}}
        require_same(have, want, str(self.folder))
        require_same(found.schema, json.loads(json.dumps(schema)), str(self.folder))

    def _new_take(self) -> _Take:
        staging = self.folder / ".staging"
        staging.mkdir(exist_ok=True)
        take = self._take = _Take()  # known before an encoder starts, so that a failure stops those that run
        for camera, (height, width) in self.cameras.items():
            path = staging / f"episode_{self.episodes:06d}.{camera}.mp4"
            take.videos[camera] = VideoWriter(path, self.fps, height, width)
            take.histograms[camera] = []
        return take

    def _check_frames(self, frames: Mapping[str, np.ndarray]) -> None:
        if set(frames) != set(self.cameras):
            raise DataError(f"frames: got cameras {sorted(frames)}, must be {sorted(self.cameras)}")
        for camera, size in self.cameras.items():
            if frames[camera].dtype != np.uint8 or frames[camera].shape != (*size, 3):
                got = f"{frames[camera].dtype} {frames[camera].shape}"
                raise DataError(f"camera {camera}: got a {got} frame, must be uint8 {(*size, 3)} RGB")

    def _columns(self, take: _Take) -> dict[str, np.ndarray]:
        """The take as arrays, (T,) or (T, d), with the columns that follow from its place in the dataset."""
        rows = np.arange(take.length, dtype=np.int64)
        columns = {name: np.asarray(take.columns[name], dtype) for name, (dtype, _) in layout.COLUMNS.items()}
        return columns | {
            "timestamp": (rows / self.fps).astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(take.length, self.episodes, np.int64),
            "index": self._frames + rows,
            "task_index": np.full(take.length, self._task_index(), np.int64),
        }

    def _task_index(self) -> int:
        return self._tasks.index(self.task) if self.task in self._tasks else len(self._tasks)

    def _commit(
        self, take: _Take, columns: dict[str, np.ndarray], closing: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Stats]]:
        """Write the episode's files in `.staging`, then move them into place; the last one commits it."""
        index = self.episodes
        at = layout.place_of(index)
        stage = self.folder / ".staging" / f"episode_{index:06d}"
        stats = {name: column_stats(values) for name, values in columns.items()}
        moves: list[tuple[Path, str]] = []
        for camera, writer in take.videos.items():
            writer.close()
            moves.append((writer.path, layout.VIDEO_PATH.format(video_key=layout.IMAGES + camera, **at)))
            histograms = np.stack(take.histograms[camera])
            stats[layout.IMAGES + camera] = image_stats(histograms[sampled_frames(take.length)])
        row = self._episode_row(take, at)
        moves.append((stage.with_suffix(".parquet"), layout.DATA_PATH.format(**at)))
        pq.write_table(layout.data_table(columns), moves[-1][0], compression="snappy")
        moves.append((stage.with_suffix(".npz"), layout.CLOSING_PATH.format(episode_index=index)))
        np.savez_compressed(moves[-1][0], **closing)
        moves.append((stage.with_suffix(".meta.parquet"), layout.EPISODES_PATH.format(**at)))
        flat = {f"stats/{name}/{key}": value.tolist() for name, s in stats.items() for key, value in s.items()}
        table = layout.episode_table(row | flat)
        # Without pyarrow's own copy of the schema the file is 28 kB instead of 67.
        pq.write_table(table, moves[-1][0], use_dictionary=False, write_statistics=False, store_schema=False)
        for staged, _ in moves:
            sync_file(staged)
        for staged, place in moves:
            _move(staged, self.folder / place, self.folder)
        return row, stats

    def _episode_row(self, take: _Take, at: dict[str, int]) -> dict[str, Any]:
        row: dict[str, Any] = {"episode_index": self.episodes, "tasks": [self.task], "length": take.length}
        row |= {f"data/{name}": value for name, value in at.items()}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + take.length}
        for camera in take.videos:
            video = f"videos/{layout.IMAGES}{camera}/"
            row |= {video + name: value for name, value in at.items()}
            row |= {video + "from_timestamp": 0.0, video + "to_timestamp": take.length / self.fps}
        return row | {f"meta/episodes/{name}": value for name, value in at.items()}

    def _load(self) -> None:
        """Take over what is committed: rows, frames, tasks and statistics."""
        self._rows: list[dict[str, Any]] = []
        self._frames = 0
        self._tasks: list[str] = []
        self._stats: dict[str, Stats] = {}
        for row in _episode_rows(self.folder, with_stats=True):
            stats: dict[str, Stats] = {}
            for name in [name for name in row if name.startswith("stats/")]:
                feature, _, key = name.removeprefix("stats/").rpartition("/")
                stats.setdefault(feature, {})[key] = np.array(row.pop(name))
            self._count(row, stats)

    def _count(self, row: dict[str, Any], stats: dict[str, Stats]) -> None:
        self._rows.append(row)
        self._frames += row["length"]
        self._tasks += [task for task in row["tasks"] if task not in self._tasks]
        merged = {name: merge_stats(self._stats[name], stats[name]) for name in stats if name in self._stats}
        self._stats = {**stats, **merged}

    def _set_aside(self) -> list[str]:
        """Move files that belong to no saved episode into `.leftovers/NNN/`; returns their names."""
        kept = {self.folder / place for row in self._rows for place in layout.places(row)}
        strays = [*(self.folder / "meta").glob(".*.tmp")]
        for top in (".staging", "data", "videos", "closing", "meta/episodes"):
            strays += [path for path in (self.folder / top).rglob("*") if path.is_file() and path not in kept]
        if not strays:
            return []
        leftovers = self.folder / ".leftovers"
        leftovers.mkdir(exist_ok=True)
        aside = leftovers / f"{len(list(leftovers.iterdir())):03d}"
        names = sorted(str(path.relative_to(self.folder)) for path in strays)
        for name in names:
            _move(self.folder / name, aside / name, self.folder)
        return names

    def _write_meta(self) -> None:
        """Bring info.json, stats.json and tasks.parquet to what is committed, where they differ from it."""
        meta = self.folder / "meta"
        tasks = self._tasks or [self.task]
        totals = {"total_episodes": self.episodes, "total_frames": self._frames, "total_tasks": len(tasks)}
        self._info |= {**totals, "splits": {"train": f"0:{self.episodes}"}}
        _write_changed(meta / "tasks.parquet", layout.tasks_parquet(tasks))
        if self._stats:
            stats = {name: {key: v.tolist() for key, v in s.items()} for name, s in self._stats.items()}
            _write_changed(meta / "stats.json", _json(stats))
        _write_changed(meta / "info.json", _json(self._info))


def _make(folder: Path, info: dict[str, Any]) -> None:
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.new")  # renamed when whole, as files are
    (aside / "meta").mkdir(parents=True)
    write_atomic(aside / "meta" / "info.json", _json(info))
    os.rename(aside, folder)
    sync_folder(folder.parent)


def _vector(values: np.ndarray, names: tuple[str, ...], where: str) -> np.ndarray:
    vector = np.array(values, np.float32)
    if vector.shape != (len(names),) or not np.isfinite(vector).all():
        raise DataError(f"{where}: got {np.asarray(values).tolist()}, must be {len(names)} finite numbers")
    return vector


def _json(value: Any) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False) + "\n"


def _write_changed(path: Path, content: bytes | str) -> None:
    new = content.encode() if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != new:
        write_atomic(path, new)


def _move(path: Path, place: Path, root: Path) -> None:
    """Rename a synced file to a place inside `root`, durably, never onto another file."""
    if place.exists():
        raise DataError(f"{place}: exists already, though no saved episode owns it; resume moves it aside")
    made = not place.parent.is_dir()
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, place)
    sync_folder(place.parent)
    for parent in place.parent.parents if made else ():
        sync_folder(parent)
        if parent == root:
            break
