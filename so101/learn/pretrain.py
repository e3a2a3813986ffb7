"""Train the encoder on recorded frames, where there is no weight file for it: guess what the person does next.

From one frame and the state beside it a small head guesses the action, where the tool is and how far it is open some
rows on, and whether the frame shows success: a dataset's own columns and labels. The state does not hold the cube's
place, but the tool goes there, so the trunk has to find the cube. The head is thrown away.

Measured in the simulation, on the same 70 recorded episodes with the classifier trained anew, all else train_sac.py's
own: the step from which 0.8 (0.9) of the last 20 episodes succeeded without help, and how many of 50 evaluated
episodes succeed after 1,500 and 2,000 steps (*: in other scenes, since an overload of the gripper ended the first try).
The trained trunk takes 69 % (74 %) of the random one's steps.

    seed   random trunk             trained trunk
    0      2065 (2185)   37, 47     1542 (1646)   46, 46
    1      2150 (2467)   34*, 50    1455 (1852)   48, 49
    2      2354 (2680)   27, 49     1553 (1937)   47, 49

A head on its features tells the cube's place in fresh scenes to 2.2 mm, on a random trunk's to 3.1 mm; without the
state beside the frame it was 2.6 mm. Training is 12,800 frames of 1.7 GFLOP: beside other
work it took 4 to 8 minutes on two cores.

The encoder has seen every labelled episode, also those that train_reward.py holds out: judge a classifier on it with
--evaluate on another dataset (28 episodes: 99.3 % of frames right, on the random trunk 98.3 %).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from so101.config import option, require_within
from so101.errors import DataError
from so101.learn.augment import color_jitter, random_shift
from so101.learn.networks import EMBEDDING, ObservationEncoder, StateNormalizer, feature_maps
from so101.learn.resnet10 import STRIDE, ResNet10
from so101.schema import OPENING, TOOL_XYZ

AHEAD = (1, 2, 4, 8)  # rows; at 10 Hz the person is at the cube within about 8
WARM_UP = 30  # steps in which the step size rises, while Adam's averages are of few batches
MAX_GRAD_NORM = 5.0


@dataclass(frozen=True)
class PretrainConfig:
    """How the encoder is trained on recorded frames."""

    steps: int = option(400, "gradient steps")
    batch_size: int = option(32, "frames in one")
    lr: float = option(1e-3, "AdamW's largest step size; it falls to 0 as half a cosine")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    pad: int = option(4, "largest shift of a frame, in pixels of the network's image")
    brightness: float = option(0.3, "brightness of a frame: a factor between 1 - this and 1 + this")
    contrast: float = option(0.3, "contrast of a frame, likewise")
    saturation: float = option(0.3, "saturation of a frame, likewise")
    hue: float = option(0.05, "hue of a frame: turned by up to this share of a whole turn either way")
    sharpness: float = option(0.5, "sharpness of a frame: a factor between 1 / (1 + this) and 1 + this")
    held_out: float = option(0.1, "share of the episodes kept from training, to tell how well it guesses")

    def __post_init__(self) -> None:
        many = 1_000_000_000
        require_within(
            self, steps=(1, many), batch_size=(1, 65_536), lr=(1e-9, 1), weight_decay=(0, 1), pad=(0, 16),
            brightness=(0, 1), contrast=(0, 1), saturation=(0, 1), hue=(0, 0.5), sharpness=(0, 10),
            held_out=(0.01, 0.99),
        )  # fmt: skip


def what_follows(states: np.ndarray, actions: np.ndarray, success: np.ndarray, episode_ids: np.ndarray) -> np.ndarray:
    """What is to be guessed of each of N observations, (N, 21): action, moves of the tool, openings, success.

    states (N, 18), actions (N, 4) with NaN where none followed, success (N,) bool, episode_ids (N,), an episode's rows
    side by side in order of time. Beyond the end of an episode its last observation stands for what follows.
    """
    starts = np.flatnonzero(np.diff(episode_ids, prepend=episode_ids[0] - 1))
    lengths = np.diff(starts, append=len(episode_ids))
    last = np.repeat(starts + lengths - 1, lengths)
    parts = [actions]
    for rows in AHEAD:
        then = states[np.minimum(np.arange(len(states)) + rows, last)]
        parts += [then[:, TOOL_XYZ] - states[:, TOOL_XYZ], then[:, [OPENING]]]
    return np.concatenate([*parts, success[:, None]], axis=1, dtype=np.float32)


class Guesser(nn.Module):
    """A trunk and the head that guesses from its features: images and states -> (B, targets), standardised."""

    def __init__(self, trunk: ResNet10, cameras: int, size: int, targets: int) -> None:
        super().__init__()
        self.trunk, self.normalizer = trunk, StateNormalizer()
        self.encoder = ObservationEncoder(cameras, size)
        width = EMBEDDING
        self.head = nn.Sequential(
            nn.Linear(self.encoder.latent_dim, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, targets)
        )

    def forward(self, images: Tensor, states: Tensor) -> Tensor:
        """uint8 images (B, cameras, S, S, 3) and states (B, 18), in schema units."""
        return self.head(self.encoder(feature_maps(self.trunk, images), self.normalizer(states)))  # type: ignore[no-any-return]


def guess_error(guess: Tensor, target: Tensor) -> Tensor:
    """Mean square error over the targets (B, K) that are known, those that are not NaN."""
    known = ~target.isnan()
    return (guess - target.nan_to_num()).mul(known).square().sum() / known.sum()


def pretrain(
    trunk: ResNet10,
    images: Tensor,
    states: np.ndarray,
    targets: np.ndarray,
    episode_ids: np.ndarray,
    config: PretrainConfig,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, float]:
    """Train the trunk where it lies; returns the error on held-out episodes, and that of always guessing the mean.

    images (N, cameras, S, S, 3) uint8, states (N, 18), targets (N, K) as from `what_follows`, episode_ids (N,). Both
    errors are mean squares in standard deviations of the training episodes. The trunk is frozen again at the end.
    Raises DataError for fewer than two episodes, and where nothing changes in them.
    """
    episodes = np.unique(episode_ids)
    if len(episodes) < 2:
        raise DataError(f"encoder data: got {len(episodes)} labelled episodes, needs 2: one of them is held out")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    count = min(max(1, round(config.held_out * len(episodes))), len(episodes) - 1)
    held = np.isin(episode_ids, rng.permutation(episodes)[:count])
    mean, std = np.nanmean(targets[~held], axis=0), np.nanstd(targets[~held], axis=0)
    told = std > 1e-6  # what never changes teaches nothing
    if not told.any():
        raise DataError("encoder data: nothing in them changes, so there is nothing to guess; record the task itself")
    target = torch.from_numpy((targets - mean)[:, told] / std[told]).float()
    state = torch.from_numpy(states).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guesser = Guesser(trunk, images.shape[1], images.shape[2] // STRIDE, target.shape[1])
    guesser.normalizer.fit(states[~held])
    parameters = [*trunk.requires_grad_(True).parameters(), *guesser.encoder.parameters(), *guesser.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    training, waiting = np.flatnonzero(~held), np.empty(0, int)
    for step in range(config.steps):
        while len(waiting) < config.batch_size:  # every frame once before any comes again
            waiting = np.concatenate([waiting, rng.permutation(training)])
        rows, waiting = torch.from_numpy(waiting[: config.batch_size]), waiting[config.batch_size :]
        seen = color_jitter(
            random_shift(images[rows], config.pad, generator), generator,
            config.brightness, config.contrast, config.saturation, config.hue, config.sharpness,
        )  # fmt: skip
        loss = guess_error(guesser(seen, state[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / config.steps)) / 2
        optimizer.step()
        progress(step + 1)
    trunk.requires_grad_(False)
    rows = torch.from_numpy(np.flatnonzero(held))
    with torch.no_grad():
        guess = torch.cat([guesser(images[part], state[part]) for part in rows.split(config.batch_size)])
        return float(guess_error(guess, target[rows])), float(guess_error(torch.zeros_like(guess), target[rows]))
