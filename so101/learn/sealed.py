"""How a message between actor and learner is written: sealed with the secret that both share.

MAC, length of the JSON, JSON, .safetensors. Nothing is ever unpickled: arrays cross as .safetensors bytes, the rest as
JSON, and what was not written with the secret is not looked into.
"""

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from so101.errors import ConfigError, DataError
from so101.learn.link import (
    Corrected,
    Discarded,
    Evaluated,
    Joined,
    Left,
    Moved,
    Recorded,
    Seen,
    Started,
    Status,
    Weights,
)
from so101.learn.weights import pack, unpack

MAC = hashlib.sha256().digest_size


class Answer(NamedTuple):
    """The learner's to an actor that joined: episodes of it that are known; or what it must do instead."""

    known: int = 0
    refused: str = ""
    again: bool = False  # join again: a message was lost


class Beat(NamedTuple):
    """What the learner last said, and where its newest weights lie: name and number of parts by kind."""

    status: Status
    weights: tuple[str, int] | None = None
    evaluation: tuple[str, int] | None = None
    evaluator: str = ""  # the actor that is to make it


KINDS = {
    kind.__name__: kind
    for kind in (
        Joined, Left, Started, Moved, Corrected, Discarded, Recorded, Evaluated, Weights, Status, Answer, Beat
    )
}  # fmt: skip


class Envelope(NamedTuple):
    """A message, whose it is, and its number in its session."""

    session: str
    number: int
    message: Any


def seal(secret: bytes, envelope: Envelope) -> bytes:
    """MAC, length of the JSON, JSON, .safetensors."""
    arrays: dict[str, torch.Tensor] = {}
    plain = _take_apart(envelope.message, "", arrays)
    head = json.dumps([envelope.session, envelope.number, type(envelope.message).__name__, plain]).encode()
    body = len(head).to_bytes(8, "little") + head + pack(arrays)
    return hmac.digest(secret, body, "sha256") + body


def unseal(secret: bytes, sealed: bytes) -> Envelope:
    """What `seal` closed. Raises DataError where it was not closed with this secret."""
    body = sealed[MAC:]
    if not hmac.compare_digest(hmac.digest(secret, body, "sha256"), sealed[:MAC]):
        raise DataError("link: a message was changed, or written with another secret; it is refused")
    size = 8 + int.from_bytes(body[:8], "little")
    session, number, kind, plain = json.loads(body[8:size])
    return Envelope(session, number, _put_together(KINDS[kind], plain, "", unpack(body[size:], "link")))


def _take_apart(message: NamedTuple, prefix: str, arrays: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A message's plain fields; its arrays go to `arrays`, by the names of the fields that lead to them."""
    plain: dict[str, Any] = {}
    for name, value in message._asdict().items():
        if isinstance(value, np.ndarray | torch.Tensor):
            # Copied: torch warns of a frame that may not be written.
            arrays[prefix + name] = value if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())
        elif isinstance(value, Seen | Status):
            plain[name] = _take_apart(value, f"{prefix}{name}.", arrays)
        elif name == "tensors":
            arrays.update({f"{prefix}{name}.{key}": tensor for key, tensor in value.items()})
        else:
            plain[name] = value.item() if isinstance(value, np.generic) else value
    return plain


def _put_together(kind: Any, plain: dict[str, Any], prefix: str, arrays: dict[str, torch.Tensor]) -> Any:
    fields: dict[str, Any] = {}
    for name in kind._fields:
        nested, value = {"seen": Seen, "status": Status}.get(name), plain.get(name)
        if nested is not None:
            fields[name] = _put_together(nested, value or {}, f"{prefix}{name}.", arrays)
        elif name == "tensors":
            start = f"{prefix}{name}."
            fields[name] = {key.removeprefix(start): item for key, item in arrays.items() if key.startswith(start)}
        elif prefix + name in arrays:
            array = arrays[prefix + name]
            fields[name] = array if name == "views" else array.numpy()
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def make_secret(path: Path) -> bytes:
    """The secret in `path`, which only its owner may read; made now where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_hex(32) + "\n")
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The secret in `path`. Raises ConfigError where it is missing, too short, or open to others."""
    try:
        text, mode = path.read_text().strip(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"link.secret: {path} cannot be read ({why}); copy the learner's here") from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"link.secret: {path} can be read by others; chmod 600 {path}")
    if len(text) < 32:
        raise ConfigError(f"link.secret: {path} has {len(text)} characters, needs 32; delete it to get a new one")
    return text.encode()
