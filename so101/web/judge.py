"""What a reward classifier says of a dataset's frames, computed beside the page that shows it."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.config import load
from so101.data.dataset import Dataset, Episode
from so101.errors import ConfigError, DataError, UserError
from so101.images import preprocess
from so101.learn.eyes import Eyes
from so101.learn.reward import RewardFile
from so101.schema import Preprocess

BATCH = 16  # frames through the trunk at once; more is no faster on a CPU


class Judge:
    """Judges every episode in a thread, the one that is being looked at first, and keeps the answers in memory."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        """Raises DataError where the classifier is damaged, or was made for other states, cameras or frames."""
        if dataset.schema is None:
            raise DataError(f"{dataset.folder}: says nothing of its states, so no classifier fits; convert it first")
        try:
            about = load(RewardFile, folder / "reward.json")
        except ConfigError as error:
            raise DataError(f"no usable reward classifier: {error}") from error
        encoder = about.provenance.get("config", {}).get("encoder")
        self._eyes = Eyes(encoder, folder, dataset.schema, views=0, pad=0, seed=0, device="cpu")
        self._spec, self._cameras = Preprocess(**dataset.schema["image"]), dataset.schema["cameras"]
        self._changed = threading.Condition()
        self._waiting: dict[int, Episode] = {}
        self._known = 0  # episodes handed in so far
        self._first: int | None = None
        self._judged: list[dict[str, Any]] = []
        threading.Thread(target=self._run, name="judge", daemon=True).start()

    @property
    def threshold(self) -> float:
        """A frame above it counts as success."""
        return self._eyes.detector.threshold

    def answers(self, episodes: list[Episode], first: int, since: int) -> dict[str, Any]:
        """What was judged after the first `since` answers, and how many episodes wait; `first` is the next one.

        `episodes` are all there are by now. Each answer is an episode with its frames' `probability` and
        `success` ("1" where it is above the threshold and the guard allows it), or with an `error`.
        """
        with self._changed:
            self._waiting.update({episode.index: episode for episode in episodes[self._known :]})
            self._known, self._first = len(episodes), first
            self._changed.notify()
            return {"judged": self._judged[since:], "waiting": self._known - len(self._judged)}

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                index = self._first if self._first in self._waiting else min(self._waiting)
                episode = self._waiting.pop(index)
            try:
                answer = self._judge(episode)
            except UserError as error:  # a damaged file; the other episodes can still be judged
                answer = {"error": str(error)}
            with self._changed:
                self._judged.append({"episode": index, **answer})

    def _judge(self, episode: Episode) -> dict[str, Any]:
        closing = episode.closing()
        views = []
        for camera in self._cameras:
            frames = [preprocess(frame, self._spec) for frame in episode.frames(camera)]
            views.append(np.stack(frames + ([preprocess(closing.frames[camera], self._spec)] if closing else [])))
        states = episode.columns()["observation.state"]
        states = states if closing is None else np.concatenate([states, closing.state[None]])
        pixels = torch.from_numpy(np.stack(views, axis=1)).split(BATCH)  # (n, cameras, S, S, 3) each
        trunk, detector = self._eyes.encoder.run_trunk, self._eyes.detector
        found = np.concatenate([detector.classifier.probabilities(trunk(part).half()) for part in pixels])
        allowed = [detector.guard is None or detector.guard.allows(state) for state in states]
        return {
            "probability": [round(float(value), 4) for value in found],
            "success": "".join(str(int(hit)) for hit in (found > detector.threshold) & np.array(allowed)),
        }
