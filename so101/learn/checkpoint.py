"""Checkpoints of a training run: each a folder, whole or absent; `last` and `best` are text files naming one.

A kill at any instant leaves what was there before. A checkpoint is never written over another.
"""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from so101.errors import DataError
from so101.files import read_json, sync_folder, write_atomic
from so101.learn.resnet10 import require_trunk
from so101.learn.weights import read_safetensors, write_safetensors
from so101.schema import require_same

HASHED = ("model.safetensors", "training_state.pt")


class Checkpoint(NamedTuple):
    """What a checkpoint holds; `training_state` is what a resume needs beyond the tensors (optimizers)."""

    step: int
    tensors: dict[str, Tensor]
    training_state: dict[str, Any]
    config: dict[str, Any]


def save_checkpoint(
    run_folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    training_state: dict[str, Any],
    config: dict[str, Any],
    schema: dict[str, Any],
    trunk_hash: str,
) -> Path:
    """Write checkpoints/NNNNNN, then make `last` name it. Returns its folder.

    Written aside and renamed once it is on the disk. Where a checkpoint of this step exists (a run that was
    killed after writing it, and resumed from the one before), the new one is NNNNNN-2 and so on. All are kept.
    """
    folder = run_folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    name, again = f"{step:06d}", 2
    while (folder / name).exists():
        name, again = f"{step:06d}-{again}", again + 1
    aside = folder / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)  # left by a kill
    aside.mkdir()
    write_safetensors(aside / "model.safetensors", tensors)
    buffer = io.BytesIO()
    torch.save(training_state, buffer)
    write_atomic(aside / "training_state.pt", buffer.getvalue())  # a full disk is an OSError, not torch's own error
    write_atomic(aside / "config.json", json.dumps(config, indent=2) + "\n")
    about = {"step": step, "schema": schema, "trunk_hash": trunk_hash, "sha256": _digests(aside)}
    write_atomic(aside / "schema.json", json.dumps(about, indent=2) + "\n")
    sync_folder(aside)
    os.rename(aside, folder / name)
    sync_folder(folder)
    write_atomic(folder / "last", name + "\n")
    return folder / name


def mark_best(run_folder: Path, name: str) -> None:
    """Make `best` name a checkpoint."""
    write_atomic(run_folder / "checkpoints" / "best", name + "\n")


def find_checkpoint(run_folder: Path, which: str = "last") -> Path:
    """The folder that `last` or `best` names. Raises DataError where there is none."""
    marker = run_folder / "checkpoints" / which
    try:
        name = marker.read_text().strip()
    except OSError as error:
        raise DataError(f"{run_folder}: has no {which} checkpoint yet ({marker} cannot be read)") from error
    if not name or not (marker.parent / name).is_dir():
        raise DataError(f"{marker}: names {name!r}, which is no checkpoint beside it")
    return marker.parent / name


def load_checkpoint(path: Path, schema: dict[str, Any], trunk_hash: str | None) -> Checkpoint:
    """Read a checkpoint's folder, or the one that a run folder's `last` names; tensors on the CPU.

    Raises DataError where a file is missing or damaged, or where it was made under another schema or for
    another trunk than `trunk_hash` (None: whichever it was).
    """
    if (path / "checkpoints").is_dir():
        path = find_checkpoint(path)
    hint = "; a checkpoint has four files"
    about = read_json(path / "schema.json", DataError, hint)
    if set(about) != {"step", "schema", "trunk_hash", "sha256"}:
        raise DataError(f"{path / 'schema.json'}: must hold step, schema, trunk_hash, sha256, got {', '.join(about)}")
    require_same(about["schema"], schema, str(path))
    if trunk_hash is not None:
        require_trunk(about["trunk_hash"], trunk_hash, str(path))
    tensors = read_safetensors(path / "model.safetensors")
    training_state = _read_training_state(path / "training_state.pt")
    for name, digest in _digests(path).items():
        if about["sha256"].get(name) != digest:
            last = path.parent / "last"
            raise DataError(f"{path / name}: is not what was saved; name an earlier checkpoint in {last}")
    return Checkpoint(about["step"], tensors, training_state, read_json(path / "config.json", DataError, hint))


def _digests(folder: Path) -> dict[str, str]:
    """Of the files that a flipped bit would change without a word."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in HASHED}


def _read_training_state(path: Path) -> dict[str, Any]:
    """Tensors and plain values only: `weights_only` runs no code that a file could bring."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a checkpoint has four files") from error
    except Exception as error:  # torch.load raises a different type for each kind of damage
        raise DataError(f"{path}: is damaged or not a training state: {error}") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: must hold a dict, got {type(state).__name__}")
    return state
