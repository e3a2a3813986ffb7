"""Training the success classifier and choosing its threshold, on held-out episodes.

Episodes, never frames, are split: neighbouring frames are all but equal, and a split by frame reported 98 %
for a model of 92 %.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from so101.errors import DataError
from so101.learn.augment import color_jitter, random_shift
from so101.learn.networks import images_to_input
from so101.learn.resnet10 import CHANNELS, STRIDE, ResNet10
from so101.learn.reward import RewardConfig, StateGuard, SuccessClassifier, SuccessDetector
from so101.schema import OPENING, TOOL_Z

Progress = Callable[[int], None]  # called with what is done so far: frames or steps
NOTICEABLE = 1e-3  # a loss that fell by less does not put off the end of training
ENCODE_BATCH = 16  # images through the trunk at once; more is no faster on a CPU


def split_episodes(success_per_episode: list[bool], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out episodes, each kind (success, failure) split by itself.

    Raises DataError unless both kinds can be on both sides, which takes two episodes of each.
    """
    train: list[int] = []
    held: list[int] = []
    for kind, name in ((True, "with a success"), (False, "without one")):
        episodes = [index for index, success in enumerate(success_per_episode) if success is kind]
        if len(episodes) < 2:
            raise DataError(
                f"reward data: {len(episodes)} episodes {name}, at least 2 are needed: one to train on, one "
                f"to choose the threshold on. Record or label more; failures can be recorded on purpose"
            )
        random.Random(seed).shuffle(episodes)
        count = min(max(1, round(held_out * len(episodes))), len(episodes) - 1)
        held += episodes[:count]
        train += episodes[count:]
    return sorted(train), sorted(held)


def encode_views(
    trunk: ResNet10,
    images: Tensor,
    config: RewardConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Images (N, cameras, S, S, 3) uint8 -> features (N, 1 + views, cameras, 512, S/32, S/32) float16.

    View 0 is the plain frame, as it is seen live; the others are shifted and jittered anew.
    """
    device = next(trunk.parameters()).device
    frames, cameras, size = images.shape[:3]
    side = size // STRIDE
    views = 1 + config.views
    features = torch.empty(frames, views, cameras, CHANNELS, side, side, dtype=torch.float16)
    at_once = max(1, ENCODE_BATCH // (views * cameras))
    jitter = functools.partial(
        color_jitter, brightness=config.brightness, contrast=config.contrast, saturation=config.saturation
    )
    for start in range(0, frames, at_once):
        plain = images[start : start + at_once]
        copies = [jitter(random_shift(plain, config.pad, generator), generator) for _ in range(config.views)]
        pixels = torch.stack([plain, *copies], dim=1)  # (n, views, cameras, S, S, 3)
        with torch.inference_mode():
            maps = trunk(images_to_input(pixels.flatten(0, 2).to(device)))
            features[start : start + at_once] = maps.view(-1, *features.shape[1:])
        if progress is not None:
            progress(start + len(plain))
    return features


def train_classifier(
    features: Tensor,
    labels: np.ndarray,
    episode_ids: np.ndarray,
    states: np.ndarray,
    config: RewardConfig,
    progress: Progress | None = None,
) -> tuple[SuccessDetector, dict[str, Any]]:
    """Train on some episodes, choose the threshold on the others; return the detector and a JSON-able report.

    features (N, 1 + views, cameras, 512, h, w) on the device to train on, labels (N,) bool, episode_ids (N,),
    states (N, 18); an episode's frames are in order of time. Raises DataError where the episodes are too few.
    """
    labels = labels.astype(bool)  # of 0.0 and 1.0 too, whose ~ would be no opposite
    episodes = [int(episode) for episode in dict.fromkeys(episode_ids.tolist())]
    succeeded = [bool(labels[episode_ids == episode].any()) for episode in episodes]
    split = split_episodes(succeeded, config.held_out, config.seed)
    train_episodes, held_episodes = ([episodes[index] for index in side] for side in split)
    train, held = (np.flatnonzero(np.isin(episode_ids, side)) for side in (train_episodes, held_episodes))
    if labels[train].all() or labels[held].all():
        raise DataError("reward data: every frame is a success; label where each success starts")
    classifier, losses = _fit(features, labels, train, held, config, progress)
    guard = fit_guard(states[train][labels[train]], config)
    probabilities = classifier.probabilities(features[torch.from_numpy(held), 0])
    judged = [
        HeldOutEpisode.judge(
            episode,
            probabilities[episode_ids[held] == episode],
            labels[episode_ids == episode],
            np.array([guard is None or guard.allows(state) for state in states[episode_ids == episode]]),
            config,
        )
        for episode in held_episodes
    ]
    choice = choose_threshold(judged)
    report = {
        "frames": {"train": len(train), "held_out": len(held), "successes": int(labels.sum())},
        "episodes": {"train": train_episodes, "held_out": held_episodes},
        "guard": None if guard is None else {"height_m": guard.height, "opening": guard.opening},
        **choice,
        "at_threshold": frame_scores(probabilities, labels[held], choice["threshold"]),
        "curve": [frame_scores(probabilities, labels[held], step / 20) for step in range(1, 20)],
        "held_out": [episode.outcome(choice["threshold"]) for episode in judged],
        "losses": losses,
    }
    return SuccessDetector(classifier, choice["threshold"], guard, config.consecutive), report


def _fit(
    features: Tensor,
    labels: np.ndarray,
    train: np.ndarray,
    held: np.ndarray,
    config: RewardConfig,
    progress: Progress | None,
) -> tuple[SuccessClassifier, dict[str, Any]]:
    """Train on balanced batches of the frames `train`; keep the weights of the lowest loss on `held`."""
    device, views, cameras, size = features.device, features.shape[1], features.shape[2], features.shape[-1]
    rng = np.random.default_rng(config.seed)
    kinds = train[labels[train]], train[~labels[train]]
    half = config.batch_size // 2
    target = torch.tensor([1.0] * half + [0.0] * half, device=device)
    losses: dict[str, Any] = {"step": [], "train": [], "held_out": [], "best_step": 0}
    recent: list[Tensor] = []
    lowest, noticed, noticed_at, best = float("inf"), float("inf"), 0, {}
    held_features = features[torch.from_numpy(held), 0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        classifier = SuccessClassifier(cameras, size, config.dropout).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
        for step in range(1, config.steps + 1):
            frames = np.concatenate([rng.choice(kind, half) for kind in kinds])
            rows = torch.from_numpy(frames * views + rng.integers(0, views, len(frames))).to(device)
            batch = features.flatten(0, 1).index_select(0, rows).float()  # (B, cameras, 512, h, w)
            loss = F.binary_cross_entropy_with_logits(classifier.train()(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(loss.detach())
            if step % config.evaluate_every == 0 or step == config.steps:
                held_loss = balanced_loss(classifier.probabilities(held_features), labels[held])
                losses["step"].append(step)
                losses["train"].append(torch.stack(recent).mean().item())
                losses["held_out"].append(held_loss)
                recent = []
                if held_loss < lowest:
                    lowest, losses["best_step"] = held_loss, step
                    best = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
                if held_loss < noticed - NOTICEABLE:
                    noticed, noticed_at = held_loss, step
            if progress is not None:
                progress(step)
            if step - noticed_at >= config.patience:
                break
    classifier.load_state_dict(best)
    return classifier, losses


def balanced_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Cross entropy in which successes and the rest weigh the same, as in the training batches."""
    likelihood = np.where(labels, probabilities, 1 - probabilities.astype(np.float64)).clip(1e-7)
    return float(-(np.log(likelihood[labels]).mean() + np.log(likelihood[~labels]).mean()) / 2)


def frame_scores(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Accuracy, precision and recall of single frames at a threshold; None where nothing was found."""
    found = probabilities > threshold
    right = int((found & labels).sum())
    return {
        "threshold": threshold,
        "accuracy": float((found == labels).mean()),
        "precision": right / int(found.sum()) if found.any() else None,
        "recall": right / int(labels.sum()) if labels.any() else None,
    }


@dataclass(frozen=True)
class HeldOutEpisode:
    """One episode as the detector would see it. It fires at a frame exactly when the frame's score, the
    lowest allowed probability of its last `consecutive` frames, is above the threshold."""

    episode: int
    start: int | None  # the first frame labelled a success
    honest_from: int  # from this frame on, firing is right
    scores: np.ndarray

    @classmethod
    def judge(
        cls,
        episode: int,
        probabilities: np.ndarray,
        labels: np.ndarray,
        allowed: np.ndarray,
        config: RewardConfig,
    ) -> "HeldOutEpisode":
        """From the probabilities, labels and the guard's verdicts of all its frames, each (T,)."""
        padded = np.concatenate([np.zeros(config.consecutive - 1), np.where(allowed, probabilities, 0.0)])
        scores = np.lib.stride_tricks.sliding_window_view(padded, config.consecutive).min(axis=1)
        if not labels.any():
            return cls(episode, None, len(labels), scores)
        start = int(labels.argmax())
        return cls(episode, start, max(0, start - config.tolerance_frames), scores)

    @property
    def false_score(self) -> float:
        """At or above this threshold the episode has no false success."""
        return float(self.scores[: self.honest_from].max(initial=0.0))

    @property
    def true_score(self) -> float:
        """Below this threshold its success is found; 0 for a failure."""
        return float(self.scores[self.honest_from :].max(initial=0.0))

    def outcome(self, threshold: float) -> dict[str, Any]:
        """What the detector does in this episode: when it first fires, and its separate false successes."""
        fires = self.scores > threshold
        first = int(fires.argmax()) if fires.any() else None
        false = np.concatenate([[False], fires[: self.honest_from]])
        return {
            "episode": self.episode,
            "success_start": self.start,
            "first_fired": first,
            "delay_frames": None if first is None or self.start is None else first - self.start,
            "false_successes": int((false[1:] & ~false[:-1]).sum()),
        }


def choose_threshold(episodes: list[HeldOutEpisode]) -> dict[str, Any]:
    """The threshold for the detector, with the range it was taken from and what is wrong with it.

    The episodes' scores cut [0, 1] into ranges within which nothing changes. Each is judged by F0.5 of whole
    episodes (a false success weighs more than a missed one: it ends an episode with a reward that was not
    earned); of the best the widest is taken, and its middle is the threshold. F0.5 is 1 where no episode has
    a false success and every success is found.
    """

    def judge(threshold: float) -> tuple[float, int]:
        false = [episode.false_score > threshold for episode in episodes]
        found = [e.true_score > threshold and not early for e, early in zip(episodes, false, strict=True)]
        missed = sum(e.start is not None and not e.true_score > threshold for e in episodes)
        weighed = 1.25 * sum(found)
        return weighed / max(weighed + 0.25 * missed + sum(false), 1e-9), -sum(false)

    edges = sorted({0.0, 1.0, *(e.false_score for e in episodes), *(e.true_score for e in episodes)})
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    low, high = max(ranges, key=lambda edge: (*judge(sum(edge) / 2), edge[1] - edge[0]))
    threshold = (low + high) / 2
    problems = [f"episode {e.episode}: success before it happened" for e in episodes if e.false_score > threshold]
    problems += [
        f"episode {e.episode}: success not found"
        for e in episodes
        if e.start is not None and not e.true_score > threshold
    ]
    return {
        "threshold": threshold,
        "threshold_range": [low, high],
        "threshold_rule": "middle of the widest range with the best F0.5 over held-out episodes",
        "f_half": judge(threshold)[0],
        "admissible": not problems,
        "problems": problems,
    }


def fit_guard(success_states: np.ndarray, config: RewardConfig) -> StateGuard | None:
    """The ranges seen in the states of successful frames (n, 18), with margins; None where none is wanted."""

    def spread(values: np.ndarray, margin: float) -> tuple[float, float]:
        return float(values.min()) - margin, float(values.max()) + margin

    if not config.guard:
        return None
    height = spread(success_states[:, TOOL_Z], config.guard_margin_z)
    return StateGuard(height, spread(success_states[:, OPENING], config.guard_margin_opening))
