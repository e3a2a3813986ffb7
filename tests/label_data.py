"""Small datasets for the tests of label.py and its page."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from so101.data.writer import DatasetWriter
from so101.schema import ACTION, STATE, Preprocess, describe

ROWS = 9  # of each episode, so that it has 10 frames with the closing one
SMALL = {"crop": [0, 8, 48, 48], "image_size": 32}  # of a 64x48 frame


def shade(episode: int, frame: int) -> int:
    """The grey of one frame: no two frames of the first few episodes are alike."""
    return 15 + 20 * frame + 5 * episode


def make(
    folder: Path,
    *,
    episodes: int = 3,
    cameras: dict[str, tuple[int, int]] | None = None,
    image: dict[str, Any] = SMALL,
) -> Path:
    """A dataset in this program's schema, or go on with one; each frame is one grey with a black upper half."""
    cameras = {"wrist": (48, 64)} if cameras is None else cameras
    schema = describe(Preprocess(**image), list(cameras), 10, 0.02, 0.5)
    writer = DatasetWriter(folder, fps=10, cameras=cameras, task="lift", schema=schema)

    def frames(frame: int) -> dict[str, np.ndarray]:
        pictures = {
            name: np.full((h, w, 3), shade(writer.episodes, frame), np.uint8) for name, (h, w) in cameras.items()
        }
        for picture in pictures.values():
            picture[: len(picture) // 2] = 0
        return pictures

    for _ in range(episodes):
        for row in range(ROWS):
            state, action = np.full(len(STATE), row / 10), np.full(len(ACTION), row / 10 - 0.4)
            writer.add(state, action, frames(row), is_intervention=row > 5, capture_time=row / 10)
        writer.save_episode(np.full(len(STATE), ROWS / 10), frames(ROWS), ROWS / 10)
    writer.close()
    return folder


def make_foreign(folder: Path, cameras: dict[str, tuple[int, int]]) -> Path:
    """A dataset as another program records it: no schema, no closing observation, no reward, a NaN in its state."""
    make(folder, cameras=cameras, episodes=2)
    path = folder / "meta" / "info.json"
    info: dict[str, Any] = json.loads(path.read_text())
    for key in ("so101", "closing_path"):
        del info[key]
    del info["features"]["next.reward"]
    info["features"]["action"]["names"] = {"motors": [f"motor_{i}" for i in range(4)]}
    path.write_text(json.dumps(info))
    for file in folder.glob("data/*/*.parquet"):
        table = pq.read_table(file).drop_columns("next.reward")
        states = table["observation.state"].to_pylist()
        states[2][0] = float("nan")
        place = table.column_names.index("observation.state")
        table = table.set_column(place, table.schema.field(place), pa.array(states, table.schema.field(place).type))
        pq.write_table(table, file)
    return folder


def save_sure_classifier(folder: Path, schema: dict[str, Any], threshold: float = 0.0, guard: Any = None) -> Path:
    """A classifier of random weights; with the threshold 0 it sees success everywhere, with 1 nowhere."""
    import torch

    from so101.learn.resnet10 import load_resnet10, trunk_hash
    from so101.learn.reward import SuccessClassifier, SuccessDetector, save_reward

    torch.manual_seed(0)
    classifier = SuccessClassifier(len(schema["cameras"]), schema["image"]["image_size"] // 32)
    detector = SuccessDetector(classifier, threshold, guard, 3)
    save_reward(folder, detector, schema, trunk_hash(load_resnet10(None)), {"config": {"encoder": None}})
    return folder


def stored(folder: Path) -> dict[str, Any]:
    """The labels in the file, by episode."""
    path = folder.with_name(f"{folder.name}.labels.json")
    labels: dict[str, Any] = json.loads(path.read_text())["episodes"] if path.exists() else {}
    return labels


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def full(**label: Any) -> dict[str, Any]:
    """A label as the page sends it, every field said."""
    from so101.data.labels import EpisodeLabel

    return asdict(EpisodeLabel(**label))
