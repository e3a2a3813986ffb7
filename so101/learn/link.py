"""What passes between actor and learner: experience one way, weights the other.

In one process both ends share this object. The messages carry plain arrays and tensors and every weight
that is trained, with a version, so that a wire can stand in between without changing either loop.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch


class Seen(NamedTuple):
    """One observation as the learner stores it."""

    images: np.ndarray  # (cameras, S, S, 3) uint8
    state: np.ndarray  # (18,) float32
    views: torch.Tensor  # (1 + views, cameras, C, h, w) float16, encoded by the actor's trunk


class Started(NamedTuple):
    """An episode begins here."""

    seen: Seen


class Moved(NamedTuple):
    """The transition from the last observation to this one."""

    action: np.ndarray  # (4,) float32, as carried out
    reward: float
    terminated: bool
    truncated: bool
    by_human: bool
    seen: Seen


class Corrected(NamedTuple):
    """A person's verdict on the episode that just ended: its last transition's true reward and end."""

    reward: float
    terminated: bool


class Discarded(NamedTuple):
    """The episode in progress never was: the person wants it again."""


class Weights(NamedTuple):
    """Everything of the policy that is trained; the frozen trunk is named by its hash and does not travel."""

    version: int
    tensors: dict[str, torch.Tensor]
    trunk_hash: str


Experience = Started | Moved | Corrected | Discarded


class Link:
    """Both directions in one process. Experience queues up; of the weights only the newest count."""

    def __init__(self) -> None:
        self._experience: deque[Experience] = deque()
        self._weights: Weights | None = None

    def send(self, message: Experience) -> None:
        """Actor: hand experience to the learner."""
        self._experience.append(message)

    def receive(self) -> list[Experience]:
        """Learner: all experience since the last call, oldest first."""
        messages = list(self._experience)
        self._experience.clear()
        return messages

    def publish(self, weights: Weights) -> None:
        """Learner: offer new weights."""
        self._weights = weights

    def newest(self, than: int) -> Weights | None:
        """Actor: the newest weights, if they are newer than version `than`."""
        return self._weights if self._weights is not None and self._weights.version > than else None
