"""From a recorded episode and its labels to what learning uses. The only bridge from data to learn.

Row t of a recording holds observation t and the action commanded from it; T rows have T + 1 observations,
the closing one kept beside the episode. Labels say which observations show success, and the reward of a
transition is the label of the observation that follows it. Demonstrations, resumed runs and tests all
come through `trajectory` (DESIGN.md, section 4b).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from so101.data.dataset import Dataset, Episode
from so101.data.labels import Labels
from so101.errors import DataError
from so101.images import preprocess
from so101.schema import Preprocess, RewardSpec


class Trajectory(NamedTuple):
    """n transitions over n + 1 observations: transition t leads from observation t to t + 1."""

    states: np.ndarray  # (n + 1, 18) float32
    images: np.ndarray  # (n + 1, cameras, S, S, 3) uint8
    actions: np.ndarray  # (n, 4) float32
    rewards: np.ndarray  # (n,) float32
    terminated: np.ndarray  # (n,) bool: no value beyond
    truncated: np.ndarray  # (n,) bool: cut off, bootstraps from the next observation
    by_human: np.ndarray  # (n,) bool


def observed_success(episode: Episode, labels: Labels | None) -> np.ndarray | None:
    """Which of the T + 1 observations show success, (T + 1,) bool; None where that is not known.

    From the labels where there are any, else from the episode's own next.reward. An episode that the
    labels leave out or skip is not known.
    """
    if labels is not None:
        return labels.success(episode.index, episode.length)
    rewards = np.asarray(episode.columns()["next.reward"], dtype=np.float32)
    return np.concatenate([[False], rewards > 0.5])


def first_success(success: np.ndarray, consecutive: int) -> int | None:
    """The observation that completes the first run of `consecutive` successes; None without one."""
    run = 0
    for index, hit in enumerate(success):
        run = run + 1 if hit else 0
        if run == consecutive:
            return index
    return None


def observations(episode: Episode, spec: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """All T + 1 observations: states (T + 1, 18) float32, images (T + 1, cameras, S, S, 3) uint8.

    Raises DataError where the closing observation is missing: a last transition without its true next
    observation would bootstrap from a wrong one.
    """
    closing = episode.closing()
    if closing is None:
        raise DataError(f"{episode}: has no closing observation, so its last transition leads nowhere")
    states = np.concatenate([episode.columns()["observation.state"], closing.state[None]]).astype(np.float32)
    views = []
    for camera, last in closing.frames.items():
        small = [preprocess(frame, spec) for frame in episode.frames(camera)]
        views.append(np.stack([*small, preprocess(last, spec)]))
    return states, np.stack(views, axis=1)


def trajectory(
    episode: Episode, success: np.ndarray, spec: Preprocess, reward: RewardSpec, consecutive: int
) -> Trajectory:
    """The transitions of a recorded episode, cut where success is complete.

    `success` (T + 1,) bool says which observations show it; after `consecutive` of them in a row the
    episode has terminated and what was recorded beyond is left out.
    """
    states, images = observations(episode, spec)
    columns = episode.columns()
    end = first_success(success, consecutive)
    n = episode.length if end is None else max(end, 1)
    terminated = np.asarray(columns["next.done"], dtype=bool)[:n].copy()
    truncated = np.asarray(columns["next.truncated"], dtype=bool)[:n].copy()
    rewards = np.full(n, reward.of(False), dtype=np.float32)
    if end is not None:
        terminated[-1], truncated[-1], rewards[-1] = True, False, reward.of(True)
    by_human = np.asarray(columns["complementary_info.is_intervention"], dtype=bool)[:n]
    actions = np.asarray(columns["action"], dtype=np.float32)[:n]
    return Trajectory(states[: n + 1], images[: n + 1], actions, rewards, terminated, truncated, by_human)


def labelled_frames(
    dataset: Dataset, labels: Labels | None, spec: Preprocess
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """For each episode whose success is known: its index, images, states and success, T + 1 of each."""
    for episode in dataset.episodes:
        success = observed_success(episode, labels)
        if success is not None:
            states, images = observations(episode, spec)
            yield episode.index, images, states, success
