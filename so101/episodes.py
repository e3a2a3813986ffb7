"""From a recorded episode and its labels to what learning uses. The only bridge from data to learn.

Row t of a recording holds observation t and the action commanded from it; T rows have T + 1 observations,
the closing one kept beside the episode. Labels say which observations show success, and the reward of a
transition is the label of the observation that follows it. Demonstrations, resumed runs and tests all
come through `trajectory` (DESIGN.md, section 4b).
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from so101.data.dataset import Dataset, Episode
from so101.data.labels import Labels
from so101.errors import DataError
from so101.images import preprocess
from so101.runlog import Progress
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
    rewards = episode.columns().get("next.reward")
    return None if rewards is None else np.concatenate([[False], rewards > 0.5])


def labelled(dataset: Dataset, labels: Labels | None) -> list[tuple[Episode, np.ndarray]]:
    """The episodes whose success is known, each with its (T + 1,) bool."""
    known = ((episode, observed_success(episode, labels)) for episode in dataset.episodes)
    return [(episode, success) for episode, success in known if success is not None]


def first_success(success: np.ndarray, consecutive: int) -> int | None:
    """The observation that completes the first run of `consecutive` successes; None without one."""
    run = 0
    for index, hit in enumerate(success):
        run = run + 1 if hit else 0
        if run == consecutive:
            return index
    return None


def load_states(episode: Episode) -> np.ndarray:
    """The states of all T + 1 observations, (T + 1, 18) float32.

    Raises DataError where the closing observation is missing: a last transition without its true next observation
    would bootstrap from a wrong one.
    """
    closing = episode.closing()
    if closing is None:
        raise DataError(
            f"{episode.data}: episode {episode.index} has no closing observation, so its last transition leads "
            f"nowhere; `python -m so101.tools.edit convert` takes the last row for it"
        )
    return np.concatenate([episode.columns()["observation.state"], closing.state[None]]).astype(np.float32)


def load_images(
    episodes: Sequence[Episode], spec: Preprocess, update: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """The network's images of all observations of some episodes, in order: (N, cameras, S, S, 3) uint8.

    Episodes are decoded side by side, one on each core, straight into the result: nothing is held beside that but a
    frame for each core. `update` hears how many images are there. Raises DataError as reading them does.
    """
    ends = np.cumsum([0, *(episode.observations for episode in episodes)]).tolist()
    cameras = episodes[0].cameras
    images = np.empty((ends[-1], len(cameras), spec.image_size, spec.image_size, 3), np.uint8)
    filled = [0] * len(episodes)  # frames of each episode that are there
    stop = threading.Event()

    def fill(number: int) -> None:
        for at, camera in enumerate(cameras):
            for index, frame in enumerate(episodes[number].observed(camera, threads=1), ends[number]):
                if stop.is_set():
                    return
                images[index, at] = preprocess(frame, spec)
                filled[number] += 1

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            tasks = [pool.submit(fill, number) for number in range(len(episodes))]
            while wait(tasks, timeout=0.1, return_when=FIRST_EXCEPTION).not_done:
                update(sum(filled) // len(cameras))
            for task in tasks:
                task.result()
        finally:  # after an error or a Ctrl-C the pool waits for what was begun
            stop.set()
    update(len(images))
    return images


class Labelled(NamedTuple):
    """All observations of the labelled episodes of a dataset, an episode's side by side in order of time."""

    images: np.ndarray  # (N, cameras, S, S, 3) uint8
    states: np.ndarray  # (N, 18) float32
    success: np.ndarray  # (N,) bool
    episode_ids: np.ndarray  # (N,)


def load_labelled(dataset: Dataset, labels: Labels | None, spec: Preprocess) -> Labelled:
    """Read them, showing progress. Raises DataError where no episode is labelled."""
    known = labelled(dataset, labels)
    if not known:
        raise DataError(f"{dataset.folder}: no episode is labelled; label some with label.py")
    episodes = [episode for episode, _ in known]
    with Progress("read", sum(episode.observations for episode in episodes), "frame") as progress:
        images = load_images(episodes, spec, progress.update)
    ids = np.repeat([episode.index for episode in episodes], [episode.observations for episode in episodes])
    states = np.concatenate([load_states(episode) for episode in episodes])
    return Labelled(images, states, np.concatenate([success for _, success in known]), ids)


def trajectories(
    known: Sequence[tuple[Episode, np.ndarray]], spec: Preprocess, reward: RewardSpec, consecutive: int
) -> list[Trajectory]:
    """The transitions of recorded episodes, each cut where success is complete.

    Each comes with `success` (T + 1,) bool, which says which observations show it; after `consecutive` of them in a
    row the episode has terminated and what was recorded beyond is left out.
    """
    episodes = [episode for episode, _ in known]
    images = np.split(load_images(episodes, spec), np.cumsum([episode.observations for episode in episodes])[:-1])
    return [_cut(*pair, seen, reward, consecutive) for pair, seen in zip(known, images, strict=True)]


def _cut(episode: Episode, success: np.ndarray, images: np.ndarray, reward: RewardSpec, consecutive: int) -> Trajectory:
    states = load_states(episode)
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
