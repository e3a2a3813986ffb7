"""What looks at a frame: the frozen trunk, and on its features the success detector. Policy, reward and replay
share one encoding of each frame, so it costs one pass however many look at it."""

from collections import deque
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from so101.learn.link import Seen
from so101.learn.replay import ViewEncoder
from so101.learn.resnet10 import load_resnet10, require_trunk, trunk_hash
from so101.learn.reward import load_reward


class Looked(Protocol):
    """What is needed of an observation."""

    @property
    def images(self) -> np.ndarray: ...  # (cameras, S, S, 3) uint8
    @property
    def state(self) -> np.ndarray: ...  # (18,)


class Eyes:
    """The trunk with its views, and the classifier; as a Detector it tells the environment of success."""

    def __init__(
        self,
        encoder: str | None,
        reward_model: Path,
        schema: dict[str, Any],
        views: int,
        pad: int,
        seed: int,
        device: str,
        frames: int = 1,
        features: Literal["cached", "pixels", "trained"] = "cached",
    ) -> None:
        """`frames` and `features` are the policy's n_obs_steps and features, see SacConfig.

        Raises DataError where the classifier was trained on another schema or another trunk.
        """
        trunk = load_resnet10(encoder).to(device)
        self.trunk_hash = trunk_hash(trunk)
        self.encoder = ViewEncoder(trunk, views, pad, seed, cached=features == "cached")
        self.pixels = features == "trained"
        self._recent: deque[torch.Tensor] = deque(maxlen=frames)
        self._newest: np.ndarray | None = None  # the frames of the newest of them
        self.detector = load_reward(reward_model, schema, self.trunk_hash)
        self.probability: float | None = None  # of success, of the newest frame that `update` saw in this episode

    def features(self, observation: Looked) -> torch.Tensor:
        """The unshifted view's features (cameras, 512, h, w) float16, which policy and classifier use."""
        return self._views(observation)[0]

    def look(self, observation: Looked) -> torch.Tensor:
        """What the policy takes of the episode so far: the features of its newest frames, oldest first.

        (frames * cameras, 512, h, w); for a policy that trains its encoder the pixels, uint8 (frames * cameras, S, S,
        3). At the start the first is repeated.
        """
        self._views(observation)
        missing = (self._recent.maxlen or 0) - len(self._recent)
        return torch.cat([self._recent[0]] * missing + list(self._recent))

    def see(self, observation: Looked) -> Seen:
        """The observation as the learner stores it."""
        return Seen(observation.images, observation.state, self._views(observation))

    def _views(self, observation: Looked) -> torch.Tensor:
        """Every observation that anyone looks at is counted once among the newest frames."""
        views = self.encoder.encode(observation.images)
        if self._newest is not observation.images:
            self._newest = observation.images
            self._recent.append(torch.from_numpy(self._newest.copy()) if self.pixels else views[0])
        return views

    def require_trunk(self, other: str) -> None:
        """Refuse weights that were trained on another trunk's features."""
        require_trunk(other, self.trunk_hash, "weights")

    def reset(self) -> None:
        """An episode begins."""
        self._recent.clear()
        self._newest = None
        self.detector.reset()
        self.probability = None

    @property
    def threshold(self) -> float:
        """A frame whose probability is above it counts as success."""
        return self.detector.threshold

    @property
    def vetoed(self) -> bool:
        """Whether the newest frame is above the threshold and the guard says no."""
        return self.detector.vetoed

    def update(self, observation: Looked) -> bool:
        """Whether the classifier, its guard and its vote see success."""
        self.probability = self.detector.probability(self.features(observation))
        return self.detector.update(self.probability, observation.state)
