"""Tensors as .safetensors: a length, a JSON header and raw little-endian bytes. Nothing is ever unpickled.

The format is public and small: 8 bytes with the header's length; the header, name -> {dtype, shape,
data_offsets}; then one buffer that the offsets cover without a gap or an overlap.
"""

import json
import math
import struct
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from so101.errors import DataError
from so101.files import parse_json, write_atomic

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit, so that a damaged length does not ask for terabytes
ALIGNMENT = 8  # bytes; the header is padded with spaces so that the buffer starts on a multiple of it


def read_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, by name, on the CPU. Raises DataError naming what is wrong."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the weight file") from error
    return unpack(content, str(path))


def write_safetensors(path: Path | str, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as a .safetensors file that is whole or absent."""
    write_atomic(Path(path), pack(tensors))


def load_strict(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Give a network its tensors. Raises DataError with torch's list of those missing, extra or misshapen."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        said = textwrap.shorten(str(error), 400, placeholder=" ...")  # hundreds of names say no more
        raise DataError(f"{where}: does not fit; use the config it was trained with. {said}") from None


def pack(tensors: dict[str, torch.Tensor]) -> bytes:
    """The tensors as .safetensors bytes: widest dtype first, then by name, as the format's own writer does.

    Raises DataError for a dtype that the format, or this reader of it, does not have.
    """
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu()
        if tensor.dtype not in DTYPE_NAMES:
            raise DataError(f"tensor {name!r}: {tensor.dtype} cannot be stored; allowed: {', '.join(DTYPES)}")
        chunks.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        start, end = end, end + len(chunks[-1])
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, *chunks])


def unpack(content: bytes, where: str) -> dict[str, torch.Tensor]:
    """The tensors in .safetensors bytes; other programs' metadata is passed over.

    Raises DataError, beginning with `where`, for anything the format does not allow.
    """
    header, buffer = _split(content, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{where}: __metadata__ must be text by name, got {metadata!r}")
    tensors: dict[str, torch.Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, start, end = _check_entry(name, entry, len(buffer), where)
        spans.append((start, end, name))
        # a copy, so that the tensor is writable and aligned whatever its offset
        raw = bytearray(buffer[start:end])
        if dtype is torch.bool and max(raw, default=0) > 1:
            raise DataError(f"{where}: tensor {name!r} is BOOL and holds a byte other than 0 and 1")
        tensors[name] = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(shape)
    covered = 0
    for start, end, name in sorted(spans):
        if start != covered:
            fault = "overlaps the tensor before it" if start < covered else "leaves a gap before it"
            raise DataError(f"{where}: tensor {name!r} starts at byte {start}, expected {covered}: it {fault}")
        covered = end
    if covered != len(buffer):
        raise DataError(f"{where}: {len(buffer) - covered} bytes at the end belong to no tensor")
    return tensors


def _split(content: bytes, where: str) -> tuple[dict[str, Any], memoryview]:
    """The parsed header and the data buffer behind it."""
    if len(content) < 8:
        raise DataError(f"{where}: {len(content)} bytes are too few for a .safetensors file")
    (length,) = struct.unpack_from("<Q", content)
    if length > min(MAX_HEADER, len(content) - 8):
        raise DataError(
            f"{where}: the header should be {length} bytes, but {len(content) - 8} follow its length; "
            f"the file is truncated or is no .safetensors file"
        )
    try:
        header = parse_json(content[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the header is no valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise DataError(f"{where}: the header must be a JSON object, got {type(header).__name__}")
    return header, memoryview(content)[8 + length :]


def _check_entry(name: str, entry: Any, size: int, where: str) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's dtype, shape and byte range, checked against each other and the buffer's size."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{where}: tensor {name!r} must have dtype, shape and data_offsets, got {entry!r}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise DataError(f"{where}: tensor {name!r} has dtype {entry['dtype']!r}; allowed: {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise DataError(f"{where}: tensor {name!r} has {numbers!r} where whole numbers >= 0 belong")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise DataError(f"{where}: tensor {name!r} has data_offsets {offsets}, but the data is {size} bytes long")
    dtype = DTYPES[entry["dtype"]]
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise DataError(
            f"{where}: tensor {name!r} needs {needed} bytes for {entry['dtype']} {shape}, got {offsets[1] - offsets[0]}"
        )
    return dtype, shape, offsets[0], offsets[1]
