"""What a reward classifier says of a dataset's frames, computed beside the page that shows it."""

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.data.dataset import Dataset, Episode
from so101.errors import DataError, UserError
from so101.images import preprocess
from so101.learn.eyes import Eyes
from so101.learn.reward import SuccessDetector, read_reward_file
from so101.schema import Preprocess

BATCH = 16  # frames through the trunk at once; more is no faster on a CPU


def open_eyes(folder: Path, schema: dict[str, Any]) -> Eyes:
    """The classifier in `folder` with the encoder that it was trained on, for frames of `schema`.

    Raises DataError where it is damaged, or was made for other states, cameras or frames.
    """
    trained = read_reward_file(folder).provenance.get("config")
    if not isinstance(trained, dict) or not isinstance(encoder := trained.get("encoder"), str | None):
        raise DataError(f"{folder / 'reward.json'}: provenance.config must hold the encoder's name, or null for it")
    return Eyes(encoder, folder, schema, views=0, pad=0, seed=0, device="cpu")


class Judge:
    """Judges every episode in a thread, the one that is being looked at first, and keeps the answers in memory."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        """Raises DataError where the classifier is damaged, or was made for other states, cameras or frames."""
        schema = dataset.require_schema()
        self._eyes = open_eyes(folder, schema)
        self._spec, self._cameras = Preprocess(**schema["image"]), schema["cameras"]
        self._changed = threading.Condition()
        self._known: dict[int, str] = {}  # episodes handed in so far -> their `recorded`
        self._waiting: dict[int, Episode] = {}
        self._now: tuple[int, int] | None = None  # episode that is being judged, how many of its frames are
        self._first: int | None = None
        self._judged: list[dict[str, Any]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    @property
    def threshold(self) -> float:
        """A frame above it counts as success."""
        return self._eyes.threshold

    @property
    def detector(self) -> SuccessDetector:
        """The classifier with its guard and vote."""
        return self._eyes.detector

    def found(self) -> dict[int, dict[str, Any]]:
        """The newest answer for each episode that was judged so far."""
        with self._changed:
            return {answer["episode"]: answer for answer in self._judged}

    def answers(self, episodes: list[Episode], recorded: dict[int, str], first: int, since: int) -> dict[str, Any]:
        """What was judged after the first `since` answers, and how many episodes wait; `first` is the next one.

        `episodes` are all there are by now, and those whose `recorded` changed are judged again. Each answer is an
        episode with its frames' `probability` and `success` ("1" above the threshold, "g" where the state guard then
        forbids it, else "0") and whether the guard `allowed` them ("1", else "0"), or with an `error`. `now`: the one
        that is being judged, and how many frames were.
        """
        with self._changed:
            for episode in episodes:
                stamp = recorded.get(episode.index, "")
                if self._known.get(episode.index) != stamp:
                    self._known[episode.index], self._waiting[episode.index] = stamp, episode
            self._first = first
            self._changed.notify()
            waiting = len(self._waiting) + (self._now is not None)
            return {"judged": self._judged[since:], "waiting": waiting, "now": self._now}

    def close(self) -> None:
        """Judge no further. A thread that is inside torch when the program ends would abort it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                index = self._first if self._first in self._waiting else min(self._waiting)
                episode, recorded, self._now = self._waiting.pop(index), self._known[index], (index, 0)
            try:
                answer = self._judge(episode)
            except UserError as error:  # a damaged file; the other episodes can still be judged
                answer = {"error": str(error)}
            with self._changed:
                self._judged.append({"episode": index, "recorded": recorded, **answer})
                self._now = None

    def _judge(self, episode: Episode) -> dict[str, Any]:
        found: list[float] = []
        observed = zip(*map(episode.observed, self._cameras), strict=True)
        while part := list(islice(observed, BATCH)):  # never the whole episode: 20,000 frames are 1 GB
            if self._closing:
                return {}
            views = np.stack([np.stack([preprocess(frame, self._spec) for frame in frames]) for frames in part])
            features = self._eyes.encoder.run_trunk(torch.from_numpy(views)).half()
            found += self._eyes.detector.classifier.probabilities(features).tolist()
            self._now = episode.index, len(found)
        states, closing = episode.columns()["observation.state"], episode.closing()
        states = states if closing is None else np.concatenate([states, closing.state[None]])
        guard = self._eyes.detector.guard
        allowed = [guard is None or guard.allows(state) for state in states]
        success = ["0" if p <= self.threshold else "1" if ok else "g" for p, ok in zip(found, allowed, strict=True)]
        return {
            "probability": [round(p, 4) for p in found],
            "success": "".join(success),
            "allowed": "".join("1" if ok else "0" for ok in allowed),
        }
