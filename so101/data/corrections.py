"""The frames that a classifier took for the opposite of what they show, queued for its next training.

A dataset like any other: each frame is an episode of one row, with the same observation once more as the closing one,
and the truth about it stands in the labels beside it. Nothing moves in such an episode, so lint asks nothing of its
motion, and training uses it for the classifier alone.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, label_episode, load_labels
from so101.data.writer import DatasetWriter
from so101.errors import DataError
from so101.schema import ACTION

CORRECTION = "correction of a classifier"  # the task of such an episode


class Corrections:
    """One queue. It is made with the first frame, and gone on with where it is there."""

    def __init__(self, folder: Path, schema: dict[str, Any], cameras: Mapping[str, tuple[int, int]]) -> None:
        """`schema` is the classifier's, `cameras`: name -> (height, width) of the frames as recorded."""
        self.folder = folder
        self._schema, self._cameras = schema, cameras
        self._writer: DatasetWriter | None = None
        self._alone = threading.Lock()

    def add(self, state: np.ndarray, frames: Mapping[str, np.ndarray], success: bool) -> int:
        """Queue an observation, state (18,) and a frame per camera, that shows success or does not; its episode.

        When this returns it is on the disk with its label. Raises DataError for a folder that holds something else,
        and as DatasetWriter does.
        """
        with self._alone:
            if self._writer is None:
                self._writer = self._open()
            writer = self._writer
            still = np.zeros(len(ACTION))
            writer.add(state, still, frames, reward=float(success), truncated=True, capture_time=0.0)
            index = writer.save_episode(state, frames, 1 / writer.fps)
            label_episode(self.folder, index, _label(success))
            return index

    def leave_out(self, index: int, success: bool) -> None:
        """Take a queued frame back: it stays on the disk, and its label says skip."""
        with self._alone:
            label_episode(self.folder, index, replace(_label(success), skip=True))

    def close(self) -> None:
        """Let go of the folder."""
        with self._alone:
            if self._writer is not None:
                self._writer.close()

    def _open(self) -> DatasetWriter:
        if self.folder.exists():
            self._go_on()
        fps = self._schema["fps"]
        return DatasetWriter(self.folder, fps=fps, cameras=self._cameras, task=CORRECTION, schema=self._schema)

    def _go_on(self) -> None:
        """Label what a kill left between an episode and its label; its row holds the verdict."""
        dataset = open_dataset(self.folder)
        labels = load_labels(self.folder, dataset.observations)
        for episode in dataset.episodes:
            if episode.task != CORRECTION:
                raise DataError(f"{self.folder}: holds other episodes than corrections; name another folder for them")
            if labels is None or episode.index not in labels.episodes:
                success = bool(episode.columns()["next.reward"][0] > 0.5)
                label_episode(self.folder, episode.index, _label(success))


def _label(success: bool) -> EpisodeLabel:
    return EpisodeLabel(success_start=0) if success else EpisodeLabel(all_fail=True)
