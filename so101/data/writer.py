"""Recording episodes into a dataset, in LeRobot's v3.0 layout, so that a kill cannot hurt what is saved.

One data file, one video per camera and one episodes file for each episode, so that appending never touches
what exists. An episode's files are made in `.staging`, synced, and moved into place; the last one moved, its
file in meta/episodes, commits it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from so101.data import index, layout
from so101.data.dataset import Closing, episode_rows, open_dataset, read_info, require_outside
from so101.data.lock import FolderLock
from so101.data.stats import (
    Stats,
    column_stats,
    frame_histogram,
    image_stats,
    merge_stats,
    sampled_frames,
)
from so101.data.video import Codec, VideoWriter, read_frame
from so101.errors import DataError, EpisodeAborted, UserError
from so101.files import link_or_copy, new_folder, sync_file, sync_folder, write_atomic
from so101.schema import ACTION, STATE, require_same
from so101.signals import signals_held

LEAST_FREE = 200_000_000  # bytes: some 30 episodes of two cameras, and what the rest of the machine needs to go on


@dataclass(frozen=True)
class _Video:
    """A finished video of the episode to be saved: where it belongs, and which of its frames is the first."""

    staged: Path | None  # None: an earlier episode brought the file
    at: dict[str, int]  # chunk and file number
    first: int
    histograms: np.ndarray  # (n, 3, 256) of the sampled frames


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
        codec: Codec = "h264",
        may_wait: bool = True,
        provenance: Any = None,
    ) -> None:
        """Make a new, empty dataset, or go on after the last saved episode of one that is there.

        `cameras`: name -> (height, width); `schema`: of schema.describe; `may_wait`: see VideoWriter; `provenance`:
        JSON that a new dataset keeps in its info.json. Prints what a kill had left behind. Raises DataError for a
        camera's name or size that cannot be used, and, for a folder that is there, where fps, cameras, codec or schema
        are not those it was made with, a file is missing, another program made it, or another process writes to it.
        """
        self.folder, self.fps, self.task, self.codec, self.may_wait = Path(folder), fps, task, codec, may_wait
        self.cameras = {name: (height, width) for name, (height, width) in cameras.items()}
        if self.folder.exists():
            self._require_made_so(schema)
        else:
            info = layout.new_info(fps, cameras, schema, codec)
            _make(self.folder, info | ({"provenance": provenance} if provenance is not None else {}))
        self._info = read_info(self.folder)
        self._take: _Take | None = None
        self._brought: dict[tuple[str, Path], dict[str, int]] = {}  # camera and source of each video that was copied
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
        if self._take is None and (free := shutil.disk_usage(self.folder).free) < LEAST_FREE:
            raise UserError(
                f"{self.folder}: the disk has only {free / 1e6:.0f} MB left, {LEAST_FREE / 1e6:.0f} MB are kept free; "
                f"no episode was begun. Make room, and resume"
            )
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
        closing = self._stored(Closing(closing_state, dict(closing_frames), closing_time))
        if rewards is not None:
            if rewards.shape != (self._take.length,):
                raise DataError(f"rewards: got shape {rewards.shape}, the episode has {self._take.length} rows")
            self._take.columns["next.reward"] = list(rewards)
        columns = {name: np.asarray(self._take.columns[name], dtype) for name, (dtype, _) in layout.COLUMNS.items()}
        with self._failing():
            videos = {}
            for camera, writer in self._take.videos.items():
                writer.close()
                sampled = np.stack(self._take.histograms[camera])[sampled_frames(self._take.length)]
                videos[camera] = _Video(writer.path, layout.place_of(self.episodes), 0, sampled)
            self._commit(columns, closing, videos, self.task)
            self._take = None
        return self.episodes - 1

    def copy_episode(
        self, columns: Mapping[str, np.ndarray], closing: Closing, videos: Mapping[str, tuple[Path, int]], task: str
    ) -> int:
        """Save an episode whose videos are there, and return its index; not a frame is encoded anew.

        `columns`: (T,) or (T, d) for each of layout.COLUMNS. `videos`: camera -> a file and the episode's first frame
        in it. The file is linked, or copied from another disk, once for all the episodes that are in it. Raises as
        `save_episode` does.
        """
        rows = {name: np.asarray(columns[name], dtype) for name, (dtype, _) in layout.COLUMNS.items()}
        last = self._stored(closing)
        with self._failing():
            (self.folder / ".staging").mkdir(exist_ok=True)
            brought = {
                camera: self._bring(camera, path, first, len(rows["action"]))
                for camera, (path, first) in videos.items()
            }
            self._commit(rows, last, brought, task)
        return self.episodes - 1

    def _bring(self, camera: str, path: Path, first: int, length: int) -> _Video:
        """Link a finished video into the staging folder, if no episode has brought it yet, and look at its frames."""
        histograms = np.stack([frame_histogram(read_frame(path, first + row)) for row in sampled_frames(length)])
        known = (camera, path.resolve())
        if known in self._brought:
            return _Video(None, self._brought[known], first, histograms)
        staged = self.folder / ".staging" / f"episode_{self.episodes:06d}.{camera}.mp4"
        link_or_copy(path, staged)
        self._brought[known] = layout.place_of(self.episodes)
        return _Video(staged, self._brought[known], first, histograms)

    def discard_episode(self) -> None:
        """Forget the episode in progress, if there is one: its unsaved files are removed."""
        take, self._take = self._take, None
        with signals_held():
            for writer in take.videos.values() if take else ():
                writer.abort()
                writer.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Discard an episode in progress, index what is saved, and let go of the folder."""
        was_open, self._open = self._open, False
        try:
            self.discard_episode()
            if was_open:
                with suppress(OSError):  # on a full disk: without it, opening takes longer
                    index.write_index(self.folder, self._rows)
        finally:
            self._lock.release()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """On any error while files are written: drop the episode in progress and stop for good.

        What is saved is counted anew from the disk: the error may have come on either side of the commit. A Ctrl-C
        waits: codec, parquet and threads do not all survive an exception in their midst, and some swallow it. An
        encoder that failed or is too slow costs its episode only.
        """
        with signals_held():
            try:
                yield
            except EpisodeAborted:
                self.discard_episode()
                raise
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
        for camera in self.cameras.keys() & found.cameras.keys():
            have[f"codec of {camera}"] = found.features[layout.IMAGES + camera]["info"]["video.codec"]
            want[f"codec of {camera}"] = self.codec
        require_same(have, want, str(self.folder))
        require_same(found.schema, json.loads(json.dumps(schema)), str(self.folder))

    def _new_take(self) -> _Take:
        staging = self.folder / ".staging"
        staging.mkdir(exist_ok=True)
        take = self._take = _Take()  # known before an encoder starts, so that a failure stops those that run
        for camera, (height, width) in self.cameras.items():
            path = staging / f"episode_{self.episodes:06d}.{camera}.mp4"
            take.videos[camera] = VideoWriter(path, self.fps, height, width, self.codec, self.may_wait)
            take.histograms[camera] = []
        return take

    def _check_frames(self, frames: Mapping[str, np.ndarray]) -> None:
        if set(frames) != set(self.cameras):
            raise DataError(f"frames: got cameras {sorted(frames)}, must be {sorted(self.cameras)}")
        for camera, size in self.cameras.items():
            if frames[camera].dtype != np.uint8 or frames[camera].shape != (*size, 3):
                got = f"{frames[camera].dtype} {frames[camera].shape}"
                raise DataError(f"camera {camera}: got a {got} frame, must be uint8 {(*size, 3)} RGB")

    def _stored(self, closing: Closing) -> dict[str, Any]:
        self._check_frames(closing.frames)
        state = {"observation.state": _vector(closing.state, STATE, "closing state")}
        frames = {layout.IMAGES + camera: closing.frames[camera] for camera in self.cameras}
        return {**state, **frames, "capture_time": np.float64(closing.capture_time)}

    def _task_index(self, task: str) -> int:
        return self._tasks.index(task) if task in self._tasks else len(self._tasks)

    def _commit(
        self, columns: dict[str, np.ndarray], closing: dict[str, Any], videos: dict[str, _Video], task: str
    ) -> None:
        """Write the episode's files in `.staging`, then move them into place; the last one commits it."""
        index, at = self.episodes, layout.place_of(self.episodes)
        stage = self.folder / ".staging" / f"episode_{index:06d}"
        columns = layout.placed(columns, self.fps, self.episodes, self._frames, self._task_index(task))
        stats = {name: column_stats(values) for name, values in columns.items()}
        moves: list[tuple[Path, str]] = []
        for camera, video in videos.items():
            stats[layout.IMAGES + camera] = image_stats(video.histograms)
            if video.staged is not None:
                place = layout.VIDEO_PATH.format(video_key=layout.IMAGES + camera, **video.at)
                moves.append((video.staged, place))
        moves.append((stage.with_suffix(".parquet"), layout.DATA_PATH.format(**at)))
        layout.write_parquet(moves[-1][0], layout.data_table(columns))
        moves.append((stage.with_suffix(".npz"), layout.CLOSING_PATH.format(episode_index=index)))
        np.savez_compressed(moves[-1][0], **closing)
        moves.append((stage.with_suffix(".meta.parquet"), layout.EPISODES_PATH.format(**at)))
        row = self._episode_row(len(columns["action"]), videos, task)
        flat = {f"stats/{name}/{key}": value.tolist() for name, s in stats.items() for key, value in s.items()}
        table = layout.episode_table(row | flat)
        # Without pyarrow's own copy of the schema the file is 28 kB instead of 67.
        layout.write_parquet(moves[-1][0], table, use_dictionary=False, write_statistics=False, store_schema=False)
        for staged, _ in moves:
            sync_file(staged)
        for staged, place in moves:
            _move(staged, self.folder / place, self.folder)
        self._count(row, stats)
        self._write_meta()

    def _episode_row(self, length: int, videos: dict[str, _Video], task: str) -> dict[str, Any]:
        at = layout.place_of(self.episodes)
        row: dict[str, Any] = {"episode_index": self.episodes, "tasks": [task], "length": length}
        row |= {f"data/{name}": value for name, value in at.items()}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        for camera, video in videos.items():
            key = f"videos/{layout.IMAGES}{camera}/"
            row |= {key + name: value for name, value in video.at.items()}
            row[key + "from_timestamp"] = video.first / self.fps
            row[key + "to_timestamp"] = (video.first + length) / self.fps
        return row | {f"meta/episodes/{name}": value for name, value in at.items()}

    def _load(self) -> None:
        """Take over what is committed: rows, frames, tasks and statistics."""
        self._rows: list[dict[str, Any]] = []
        self._frames = 0
        self._tasks: list[str] = []
        self._stats: dict[str, Stats] = {}
        for row in episode_rows(self.folder, with_stats=True):
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
        numbers = [int(path.name) for path in leftovers.iterdir() if path.name.isdecimal()]
        aside = leftovers / f"{max(numbers, default=-1) + 1:03d}"
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
    require_outside(folder)
    with new_folder(folder) as aside:
        (aside / "meta").mkdir()
        write_atomic(aside / "meta" / "info.json", _json(info))


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
