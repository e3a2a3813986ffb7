"""Train the image encoder on recorded frames, for whoever has no weight file for it.

    python -m so101.tools.train_encoder                              on the demonstrations of record.py
    python -m so101.tools.train_encoder dataset=outputs/cube output=outputs/cube.safetensors
    python train_sac.py encoder=outputs/cube.safetensors demonstrations=outputs/cube reward_model=outputs/cube_reward

What is learned is in so101/learn/pretrain.py. Classifier and policy know only the encoder that they were trained with,
so both start anew with this one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from so101.config import launch, option, require_within
from so101.data.dataset import open_dataset
from so101.data.labels import load_labels
from so101.episodes import load_labelled
from so101.errors import ConfigError, DataError
from so101.learn.pretrain import PretrainConfig, pretrain, what_follows
from so101.learn.resnet10 import load_resnet10
from so101.learn.weights import write_safetensors
from so101.runlog import Progress
from so101.schema import ACTION, STATE, UNITS, Preprocess, require_same
from so101.tools.lint import require_clean


@dataclass
class Config:
    """What the command line can set."""

    dataset: str = option("outputs/lift_demos", "dataset whose labelled episodes are trained on")
    output: str = option("outputs/lift_encoder.safetensors", "weight file to write; it must not exist yet")
    encoder: str | None = option(None, "ResNet10 weight file to start from; null: a seeded random start")
    seed: int = option(0, "seed of everything random")
    preprocess: Preprocess = option(Preprocess(), "how a frame becomes the network's image")
    training: PretrainConfig = option(PretrainConfig(), "the training")

    def __post_init__(self) -> None:
        require_within(self, seed=(0, 2**31))
        if Path(self.output).suffix != ".safetensors":
            raise ConfigError(f"output: got {self.output!r}, needs a name that ends in .safetensors")


def main(config: Config) -> None:
    """Load the labelled episodes, train, write the trunk. DataError for a file that is there."""
    output = Path(config.output)
    require_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of training
    dataset = open_dataset(Path(config.dataset))
    schema = dataset.require_schema()
    wanted = {"state": list(STATE), "units": UNITS, "image": asdict(config.preprocess)}
    require_same({key: schema.get(key) for key in wanted}, wanted, str(dataset.folder))
    require_clean(dataset)
    labels = load_labels(dataset.folder, dataset.observations)
    pixels, states, success, ids = load_labelled(dataset, labels, config.preprocess)
    actions = np.full((len(states), len(ACTION)), np.nan)  # from an episode's closing observation none is commanded
    for episode in dataset.episodes:
        rows = np.flatnonzero(ids == episode.index)
        if len(rows):
            actions[rows[:-1]] = episode.columns()["action"]
    targets = what_follows(states, actions, success, ids)
    trunk = load_resnet10(config.encoder, config.seed)
    images = torch.from_numpy(pixels)
    with Progress("train encoder", config.training.steps, "step") as progress:
        error, of_mean = pretrain(trunk, images, states, targets, ids, config.training, config.seed, progress.update)
    require_new(output)
    write_safetensors(output, trunk.state_dict())
    print(f"held-out episodes: error {error:.3f}, always guessing the mean {of_mean:.3f}; {output} written")
    if error >= of_mean:
        print("warning: it guesses no better than the mean; record more, or give it more training.steps")


def require_new(output: Path) -> None:
    """Raises DataError where the file exists."""
    if output.exists():
        raise DataError(f"output: {output} exists and is not overwritten; give another name, or move it away")


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
