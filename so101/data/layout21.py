"""The older layout, v2.1, as LeRobot 0.3 opens it: written only as an export, never recorded into.

One data file and one video per camera for each episode; what is known of the episodes stands in JSON lines. It has no
place for the closing observation.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from so101.data import layout
from so101.data.dataset import Closing
from so101.data.stats import QUANTILES, column_stats, frame_histogram, image_stats, sampled_frames
from so101.data.video import Codec, read_frame
from so101.files import link_or_copy, sync_file, write_atomic

VERSION = "v2.1"
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
ONLY_V30 = ("data_files_size_in_mb", "video_files_size_in_mb", "closing_path")  # of info.json


class Writer21:
    """Writes a whole dataset into a new folder. It is not one before `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        fps: float,
        cameras: Mapping[str, tuple[int, int]],
        schema: dict[str, Any],
        codec: Codec,
        provenance: Any,
    ) -> None:
        """As DatasetWriter's. Raises DataError for a camera whose name or size cannot be used."""
        self.folder, self.fps = folder, fps
        info = layout.new_info(fps, cameras, schema, codec) | {"provenance": provenance}
        self._info = {key: value for key, value in info.items() if key not in ONLY_V30}
        self._tasks: list[str] = []
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[dict[str, Any]] = []
        self._frames = 0

    def copy_episode(
        self, columns: Mapping[str, np.ndarray], closing: Closing, videos: Mapping[str, tuple[Path, int]], task: str
    ) -> int:
        """Write an episode, and return its index; `videos` hold its frames and no others, and are linked or copied."""
        index, length = len(self._episodes), len(columns["action"])
        at = {"episode_chunk": index // layout.CHUNK_FILES, "episode_index": index}
        if task not in self._tasks:
            self._tasks.append(task)
        given = {name: np.asarray(columns[name], dtype) for name, (dtype, _) in layout.COLUMNS.items()}
        table = layout.placed(given, self.fps, index, self._frames, self._tasks.index(task))
        stats = {name: column_stats(values) for name, values in table.items()}
        for camera, (path, first) in videos.items():
            key = layout.IMAGES + camera
            link_or_copy(path, self.folder / VIDEO_PATH.format(video_key=key, **at))
            sampled = [frame_histogram(read_frame(path, first + row)) for row in sampled_frames(length)]
            stats[key] = image_stats(np.stack(sampled))
        data = self.folder / DATA_PATH.format(**at)
        data.parent.mkdir(parents=True, exist_ok=True)
        layout.write_parquet(data, layout.data_table(table))
        sync_file(data)
        plain = {
            name: {key: value.tolist() for key, value in found.items() if key not in QUANTILES}
            for name, found in stats.items()
        }
        self._stats.append({"episode_index": index, "stats": plain})
        self._episodes.append({"episode_index": index, "tasks": [task], "length": length})
        self._frames += length
        return index

    def close(self) -> None:
        """Write what is known of all the episodes."""
        count = len(self._episodes)
        videos = sum(feature["dtype"] == "video" for feature in self._info["features"].values())
        self._info |= {
            "codebase_version": VERSION,
            "total_episodes": count,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "total_videos": count * videos,
            "total_chunks": -(-count // layout.CHUNK_FILES),
            "splits": {"train": f"0:{count}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if videos else None,
        }
        meta = self.folder / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        tasks = [{"task_index": index, "task": task} for index, task in enumerate(self._tasks)]
        for name, rows in (("tasks", tasks), ("episodes", self._episodes), ("episodes_stats", self._stats)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(meta / f"{name}.jsonl", "".join(lines))
        write_atomic(meta / "info.json", json.dumps(self._info, indent=4, ensure_ascii=False) + "\n")
