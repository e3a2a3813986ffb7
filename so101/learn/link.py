"""What passes between actor and learner: experience one way, weights the other.

Experience belongs to the actor: each whole episode is on its disk before the learner hears of its end. So a
learner that has forgotten everything is told it again (`Recorded`), and one that goes away loses nothing. In one
process both ends share a `Link`; in two, wire.py puts the same messages on a socket.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch


class Seen(NamedTuple):
    """One observation as the learner stores it."""

    images: np.ndarray  # (cameras, S, S, 3) uint8
    state: np.ndarray  # (18,) float32
    views: torch.Tensor  # (1 + views, cameras, C, h, w) float16; views that the actor did not encode are left out


class Started(NamedTuple):
    """Episode `number` of this actor begins here."""

    number: int
    seen: Seen


class Moved(NamedTuple):
    """The transition from the last observation to this one."""

    action: np.ndarray  # (4,) float32, as carried out
    reward: float
    success: bool
    terminated: bool
    truncated: bool
    by_human: bool
    seen: Seen
    time: float  # s since the episode began, on a clock that also runs while a simulation computes
    version: int  # of the weights that acted; -1: none yet
    age: float  # s since they came
    lag: float  # m between target and tool
    late: float  # s that the tick overran


class Corrected(NamedTuple):
    """A person's verdict on the episode that just ended: its last transition's true reward and end."""

    number: int
    reward: float
    success: bool


class Discarded(NamedTuple):
    """The episode in progress never was: the person wants it again."""


class Recorded(NamedTuple):
    """A whole episode from the actor's disk: n transitions over n + 1 observations (see episodes.Trajectory)."""

    number: int
    states: np.ndarray
    images: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    by_human: np.ndarray
    success: bool


class Evaluated(NamedTuple):
    """How the policy of a checkpoint did without exploring."""

    checkpoint: str
    successes: int
    episodes: int
    steps: float  # of an episode, on average


class Joined(NamedTuple):
    """An actor is there, or again."""

    name: str
    identity: str  # of the folder that its episodes are in: whoever has another is another actor
    learner: str  # session of the learner that it answers to
    about: dict[str, Any]  # must be the learner's own: schema, trunk, what a policy is made of


class Left(NamedTuple):
    """An actor has ended."""


class Weights(NamedTuple):
    """Everything of the policy that is trained; the frozen trunk is named by its hash and does not travel."""

    version: int
    tensors: dict[str, torch.Tensor]
    trunk_hash: str
    action: np.ndarray  # (4,) of Policy.probe: whoever loads them must find the same
    checkpoint: str = ""  # to be evaluated by that name; "": to act with


class Status(NamedTuple):
    """How far the learner is."""

    steps: int = 0  # environment steps taken in, from all actors
    updates: int = 0
    alarms: tuple[str, ...] = ()  # all so far
    demonstrations: int = 0  # observations in replay
    online: int = 0


Experience = Joined | Left | Started | Moved | Corrected | Discarded | Recorded | Evaluated


class Link:
    """Both directions in one process. Experience queues up; of the weights only the newest count."""

    silent, heard = 0.0, True  # s since the learner was heard of, whether it ever was; see wire.ActorEnd

    def __init__(self, name: str, recorded: Iterable[Recorded] = ()) -> None:
        """`name` is the actor's; `recorded` are the episodes on its disk."""
        self.name = name
        self.status = Status()
        self._experience: deque[Experience] = deque()
        self._recorded = iter(recorded)
        self._weights: Weights | None = None
        self._evaluation: Weights | None = None

    def send(self, message: Experience) -> None:
        """Actor: hand experience to the learner."""
        self._experience.append(message)

    def receive(self) -> Iterator[tuple[str, Experience]]:
        """Learner: all experience since the last call, oldest first, each with the name of its actor."""
        for message in self._recorded:
            yield self.name, message
        while self._experience:
            yield self.name, self._experience.popleft()

    def publish(self, weights: Weights) -> None:
        """Learner: offer new weights, to act with or to evaluate."""
        if weights.checkpoint:
            self._evaluation = weights
        else:
            self._weights = weights

    def take_weights(self) -> Weights | None:
        """Actor: the newest weights, if they were not taken yet."""
        taken, self._weights = self._weights, None
        return taken

    def take_evaluation(self) -> Weights | None:
        """Actor: the weights to evaluate before the next episode, once."""
        taken, self._evaluation = self._evaluation, None
        return taken

    def report(self, status: Status) -> None:
        """Learner: say how far it is."""
        self.status = status

    def close(self) -> None:
        """Nothing to close."""
