"""Training the success classifier and choosing its threshold, on held-out episodes.

Episodes, never frames, are split: neighbouring frames are all but equal, and a split by frame reported 98 %
for a model of 92 %.
"""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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

Progress = Callable[[int], None]  # called with what is done so far: views or steps
HARD = 12  # frames of each kind on the page of hard examples
ENCODE_BATCH = 16  # images through the trunk at once; more is no faster on a CPU


def split_episodes(success_per_episode: list[bool], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out episodes, each kind (success, failure) split by itself.

    Raises DataError unless both kinds can be on both sides, which takes two episodes of each.
    """
    train: list[int] = []
    held: list[int] = []
    for kind, name in ((True, "with a success"), (False, "without a success")):
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


def training_frames(labels: np.ndarray, episode_ids: np.ndarray, config: RewardConfig) -> np.ndarray:
    """Which frames (N,) bool are of the training episodes, of labels (N,) bool and episode ids (N,).

    Raises DataError as `split_episodes` does.
    """
    episodes = list(dict.fromkeys(episode_ids.tolist()))
    succeeded = [bool(labels[episode_ids == episode].any()) for episode in episodes]
    train, _ = split_episodes(succeeded, config.held_out, config.seed)
    return np.isin(episode_ids, [episodes[index] for index in train])


def training_copy(images: Tensor, config: RewardConfig, generator: torch.Generator) -> Tensor:
    """Images (..., S, S, 3) uint8, each shifted and jittered anew."""
    return color_jitter(
        random_shift(images, config.pad, generator), generator,
        config.brightness, config.contrast, config.saturation, config.hue, config.sharpness,
    )  # fmt: skip


def encode_views(
    trunk: ResNet10,
    images: Tensor,
    config: RewardConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
    copied: np.ndarray | None = None,
) -> Tensor:
    """Images (N, cameras, S, S, 3) uint8 -> features (N, 1 + views, cameras, 512, S/32, S/32) float16.

    View 0 is the plain frame, as it is seen live; the others are shifted and jittered anew. Frames that are not
    `copied` (N,) bool have no others, but zeros: held-out ones are never trained on. `progress` hears of views.
    """
    device = next(trunk.parameters()).device
    frames, cameras, size = images.shape[:3]
    side = size // STRIDE
    features = torch.zeros(frames, 1 + config.views, cameras, CHANNELS, side, side, dtype=torch.float16)
    training = torch.arange(frames) if copied is None else torch.from_numpy(np.flatnonzero(copied))
    done = 0
    for view in range(1 + config.views):
        for part in (training if view else torch.arange(frames)).split(max(1, ENCODE_BATCH // cameras)):
            pixels = training_copy(images[part], config, generator) if view else images[part]
            with torch.inference_mode():
                maps = trunk(images_to_input(pixels.flatten(0, 1).to(device)))
                features[part, view] = maps.view(len(part), *features.shape[2:]).to("cpu", torch.float16)
            done += len(part)
            if progress is not None:
                progress(done)
    return features


class TrainedReward(NamedTuple):
    best: SuccessDetector  # with the weights of the lowest held-out loss
    final: SuccessDetector  # with the last ones
    report: dict[str, Any]  # JSON-able


def train_classifier(
    features: Tensor,
    labels: np.ndarray,
    episode_ids: np.ndarray,
    states: np.ndarray,
    config: RewardConfig,
    progress: Progress | None = None,
    draw: Callable[[np.ndarray], Tensor] | None = None,
    training: np.ndarray | None = None,
) -> TrainedReward:
    """Train on some episodes, choose the threshold on the others.

    features (N, 1 + views, cameras, 512, h, w) on the device to train on, labels (N,) bool, episode_ids (N,),
    states (N, 18); an episode's frames are in order of time. `draw` gives the features (B, cameras, 512, h, w) of
    a batch of frames; None: any of their views here. `training` (N,) bool says which frames to train on; None: those
    of `training_frames`. Raises DataError where the episodes are too few.
    """
    labels = labels.astype(bool)  # of 0.0 and 1.0 too, whose ~ would be no opposite
    if training is None:
        training = training_frames(labels, episode_ids, config)
    train, held = np.flatnonzero(training), np.flatnonzero(~training)
    if labels[train].all() or labels[held].all():
        raise DataError("reward data: every frame is a success; label where each success starts")
    rng = np.random.default_rng(config.seed)
    views = features.shape[1]

    def any_view(frames: np.ndarray) -> Tensor:
        rows = torch.from_numpy(frames * views + rng.integers(0, views, len(frames))).to(features.device)
        return features.flatten(0, 1).index_select(0, rows)

    plain = features[torch.from_numpy(held), 0]
    best, final, losses = _fit(draw or any_view, plain, labels, train, held, config, rng, progress)
    guard = fit_guard(states[train][labels[train]], config)

    def judge(classifier: SuccessClassifier) -> dict[str, Any]:
        probabilities = classifier.probabilities(plain)
        return judge_frames(probabilities, labels[held], episode_ids[held], states[held], guard, config)

    chosen, last = judge(best), judge(final)
    seen = best.probabilities(features[torch.from_numpy(train), 0])
    report = {
        "frames": {"train": len(train), "held_out": len(held), "successes": int(labels.sum())},
        "episodes": {
            "train": np.unique(episode_ids[train]).tolist(),
            "held_out": np.unique(episode_ids[held]).tolist(),
            "successes": len(np.unique(episode_ids[labels])),
        },
        "guard": None if guard is None else {"height_m": guard.height, "opening": guard.opening},
        **chosen,
        "hard_in_training": hard_examples(seen, labels[train], episode_ids[train], chosen["threshold"]),
        "final": {name: last[name] for name in ("threshold", "f_half", "problems", "at_threshold")},
        "losses": losses,
    }
    return TrainedReward(
        SuccessDetector(best, chosen["threshold"], guard, config.consecutive),
        SuccessDetector(final, last["threshold"], guard, config.consecutive),
        report,
    )


def _fit(
    draw: Callable[[np.ndarray], Tensor],
    held_features: Tensor,
    labels: np.ndarray,
    train: np.ndarray,
    held: np.ndarray,
    config: RewardConfig,
    rng: np.random.Generator,
    progress: Progress | None,
) -> tuple[SuccessClassifier, SuccessClassifier, dict[str, Any]]:
    """Train on balanced batches of the frames `train`; the best on `held`, the last, and the losses."""
    device, cameras, size = held_features.device, held_features.shape[1], held_features.shape[-1]
    kinds = train[labels[train]], train[~labels[train]]
    half = config.batch_size // 2
    look_every = config.evaluate_every or math.ceil(len(train) / config.batch_size)
    target = torch.tensor([1.0] * half + [0.0] * half, device=device)
    losses: dict[str, Any] = {"step": [], "train": [], "held_out": [], "best_step": 0}
    recent: list[Tensor] = []
    lowest, noticed, unnoticed = float("inf"), float("inf"), 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        classifier = SuccessClassifier(cameras, size, config.dropout).to(device)
        parameters = list(classifier.parameters())
        optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
        best = copy.deepcopy(classifier)
        for step in range(1, config.steps + 1):
            frames = np.concatenate([rng.choice(kind, half) for kind in kinds])
            batch = draw(frames).to(device).float()  # (B, cameras, 512, h, w)
            loss = F.binary_cross_entropy_with_logits(classifier.train()(batch), target)
            optimizer.zero_grad()
            loss.backward()
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            recent.append(loss.detach())
            if step % look_every == 0 or step == config.steps:
                held_loss = balanced_loss(classifier.probabilities(held_features), labels[held])
                losses["step"].append(step)
                losses["train"].append(torch.stack(recent).mean().item())
                losses["held_out"].append(held_loss)
                recent = []
                if held_loss < lowest:
                    lowest, losses["best_step"] = held_loss, step
                    best.load_state_dict(classifier.state_dict())
                unnoticed += 1
                if held_loss < noticed - config.min_delta:
                    noticed, unnoticed = held_loss, 0
            if progress is not None:
                progress(step)
            if unnoticed >= config.patience:
                break
    return best, classifier, losses


def judge_frames(
    probabilities: np.ndarray,
    labels: np.ndarray,
    episode_ids: np.ndarray,
    states: np.ndarray,
    guard: StateGuard | None,
    config: RewardConfig,
    threshold: float | None = None,
) -> dict[str, Any]:
    """What a detector makes of whole episodes it was not trained on, as JSON-able values.

    probabilities and labels (N,), episode_ids (N,), states (N, 18); threshold None: the best one for them.
    """
    allowed = np.array([guard is None or guard.allows(state) for state in states])
    judged, vetoed = [], []
    for episode in dict.fromkeys(episode_ids.tolist()):
        of = episode_ids == episode
        judged.append(HeldOutEpisode.judge(episode, probabilities[of], labels[of], allowed[of], config))
        sure = HeldOutEpisode.judge(episode, np.ones(of.sum()), labels[of], allowed[of], config)
        if sure.start is not None and sure.true_score == 0:
            vetoed.append(episode)
    choice = choose_threshold(judged) if threshold is None else {"threshold": threshold}
    return {
        **choice,
        **episode_scores(judged, choice["threshold"]),
        "at_threshold": frame_scores(probabilities, labels, choice["threshold"]),
        **precision_recall(probabilities, labels),
        "held_out": [episode.outcome(choice["threshold"]) for episode in judged],
        "vetoed": vetoed,  # episodes whose success the guard forbids, however sure the classifier is
        "hard": hard_examples(probabilities, labels, episode_ids, choice["threshold"]),
    }


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


def precision_recall(probabilities: np.ndarray, labels: np.ndarray, most: int = 100) -> dict[str, Any]:
    """The curve of single frames as the threshold falls, at most so many points of it, and the area under it.

    Each point counts the frames of at least its `threshold`. The area, `average_precision`, is over all points:
    each one's precision times the recall that it adds. None of both where no frame is a success.
    """
    if not labels.any():
        return {"average_precision": None, "curve": []}
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # of the frames that share a probability
    right = labels[order].cumsum()[last]
    precision, recall = right / (last + 1), right / right[-1]
    shown = np.unique(np.linspace(0, len(last) - 1, most).astype(int))
    points = np.stack([ranked[last], precision, recall], axis=1)[shown].round(4).tolist()
    return {
        "average_precision": float((np.diff(recall, prepend=0.0) * precision).sum()),
        "curve": [dict(zip(("threshold", "precision", "recall"), point, strict=True)) for point in points],
    }


def hard_examples(
    probabilities: np.ndarray, labels: np.ndarray, episode_ids: np.ndarray, threshold: float
) -> dict[str, list[dict[str, Any]]]:
    """The frames on the wrong side of the threshold, the worst HARD of each kind first.

    `frame` counts from 0 within its episode, as label.py does. The guard does not excuse a frame: a person who looks
    at it sees what the classifier saw.
    """
    found = probabilities > threshold

    def worst(wrong: np.ndarray, sign: int) -> list[dict[str, Any]]:
        rows = np.flatnonzero(wrong)
        rows = rows[np.argsort(sign * probabilities[rows], kind="stable")][:HARD]
        return [
            {
                "episode": int(episode_ids[row]),
                "frame": int((episode_ids[:row] == episode_ids[row]).sum()),
                "probability": float(probabilities[row]),
            }
            for row in rows
        ]

    return {"false_positives": worst(found & ~labels, -1), "misses": worst(~found & labels, 1)}


@dataclass(frozen=True)
class HeldOutEpisode:
    """One episode as the detector would see it. It fires at a frame exactly when the frame's score, the
    lowest allowed probability of its last `consecutive` frames, is above the threshold."""

    episode: int
    start: int | None  # the first frame labelled a success
    honest_from: int  # from this frame on, firing is right
    allowed: np.ndarray  # each frame's probability, 0 where the guard forbids it
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
        single = np.where(allowed, probabilities, 0.0)
        padded = np.concatenate([np.zeros(config.consecutive - 1), single])
        scores = np.lib.stride_tricks.sliding_window_view(padded, config.consecutive).min(axis=1)
        if not labels.any():
            return cls(episode, None, len(labels), single, scores)
        start = int(labels.argmax())
        return cls(episode, start, max(0, start - config.tolerance_frames), single, scores)

    @property
    def false_score(self) -> float:
        """At or above this threshold the episode has no false success."""
        return float(self.scores[: self.honest_from].max(initial=0.0))

    @property
    def true_score(self) -> float:
        """Below this threshold its success is found; 0 for a failure."""
        return float(self.scores[self.honest_from :].max(initial=0.0))

    def outcome(self, threshold: float) -> dict[str, Any]:
        """What the detector does in this episode: when it first fires, and each false success as [first, end).

        Those are of the vote; the runs are of single frames, and say how near to a vote the classifier came.
        """
        fires = self.scores > threshold
        first = int(fires.argmax()) if fires.any() else None
        return {
            "episode": self.episode,
            "success_start": self.start,
            "first_fired": first,
            "delay_frames": None if first is None or self.start is None else first - self.start,
            "false_successes": runs(fires[: self.honest_from]),
            "false_positive_runs": runs(self.allowed[: self.honest_from] > threshold),
        }


def choose_threshold(episodes: list[HeldOutEpisode]) -> dict[str, Any]:
    """The threshold for the detector, and the range it was taken from.

    The episodes' scores cut [0, 1] into ranges within which nothing changes. Each is judged by F0.5 of whole
    episodes (a false success weighs more than a missed one: it ends an episode with a reward that was not
    earned); of the best the widest is taken, and its middle is the threshold. F0.5 is 1 where no episode has
    a false success and every success is found.
    """

    def judge(threshold: float) -> tuple[float, int]:
        scores = episode_scores(episodes, threshold)
        return scores["f_half"] or 0.0, -scores["false_episodes"]

    edges = sorted({0.0, 1.0, *(e.false_score for e in episodes), *(e.true_score for e in episodes)})
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    low, high = max(ranges, key=lambda edge: (*judge(sum(edge) / 2), edge[1] - edge[0]))
    return {
        "threshold": (low + high) / 2,
        "threshold_range": [low, high],
        "threshold_rule": "middle of the widest range with the best F0.5 over held-out episodes",
    }


def episode_scores(episodes: list[HeldOutEpisode], threshold: float) -> dict[str, Any]:
    """F0.5 of whole episodes at a threshold (None where none of them succeeds), and which are judged wrongly."""
    false = [episode for episode in episodes if episode.false_score > threshold]
    missed = [e for e in episodes if e.start is not None and not e.true_score > threshold]
    found = sum(e.true_score > threshold and not e.false_score > threshold for e in episodes)
    problems = [f"episode {episode.episode}: success before it happened" for episode in false]
    problems += [f"episode {episode.episode}: success not found" for episode in missed]
    succeeded = any(episode.start is not None for episode in episodes)
    return {
        "f_half": 1.25 * found / max(1.25 * found + 0.25 * len(missed) + len(false), 1e-9) if succeeded else None,
        "false_episodes": len(false),
        "missed_episodes": len(missed),
        "admissible": not problems,
        "problems": problems,
    }


def runs(hits: np.ndarray) -> list[list[int]]:
    """Where a (T,) bool is true, as [first, end) of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hits, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()  # type: ignore[no-any-return]


def fit_guard(success_states: np.ndarray, config: RewardConfig) -> StateGuard | None:
    """The ranges seen in the states of successful frames (n, 18), with margins; None where none is wanted."""

    def spread(values: np.ndarray, margin: float) -> tuple[float, float]:
        return float(values.min()) - margin, float(values.max()) + margin

    if not config.guard:
        return None
    height = spread(success_states[:, TOOL_Z], config.guard_margin_z)
    return StateGuard(height, spread(success_states[:, OPENING], config.guard_margin_opening))
