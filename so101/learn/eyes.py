"""What looks at a frame: the frozen trunk, and on its features the success detector. Policy, reward and replay
share one encoding of each frame, so it costs one pass however many look at it."""

from pathlib import Path
from typing import Any, Protocol

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
    ) -> None:
        """Raises DataError where the classifier was trained on another schema or another trunk."""
        trunk = load_resnet10(encoder).to(device)
        self.trunk_hash = trunk_hash(trunk)
        self.encoder = ViewEncoder(trunk, views, pad, seed)
        self.detector = load_reward(reward_model, schema, self.trunk_hash)

    def features(self, observation: Looked) -> torch.Tensor:
        """The unshifted view's features (cameras, 512, h, w) float16, which policy and classifier use."""
        return self.encoder.encode(observation.images)[0]

    def see(self, observation: Looked) -> Seen:
        """The observation as the learner stores it."""
        return Seen(observation.images, observation.state, self.encoder.encode(observation.images))

    def require_trunk(self, other: str) -> None:
        """Refuse weights that were trained on another trunk's features."""
        require_trunk(other, self.trunk_hash, "weights")

    def reset(self) -> None:
        """An episode begins."""
        self.detector.reset()

    def update(self, observation: Looked) -> bool:
        """Whether the classifier, its guard and its vote see success."""
        return self.detector.update(self.detector.probability(self.features(observation)), observation.state)
