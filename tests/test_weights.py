"""The .safetensors reader and writer, against bytes written by hand from the format's description."""

import json
import struct

import pytest
import torch

from so101.errors import DataError
from so101.learn.weights import pack, read_safetensors, unpack, write_safetensors

# {"a": [[1.0, -2.0]] as float32}: 1.0 is 0x3f800000 and -2.0 is 0xc0000000, least significant byte first.
HEADER = b'{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'  # 56 bytes, a multiple of 8 already
GOLDEN = b"\x38\0\0\0\0\0\0\0" + HEADER + bytes.fromhex("0000803f000000c0")


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_golden_bytes_both_ways():
    tensors = unpack(GOLDEN, "golden")
    assert list(tensors) == ["a"] and tensors["a"].dtype == torch.float32
    assert tensors["a"].tolist() == [[1.0, -2.0]]
    assert pack({"a": torch.tensor([[1.0, -2.0]])}) == GOLDEN


@pytest.mark.parametrize(
    ("dtype", "data", "values"),
    [
        ("F64", "000000000000f83f", [1.5]),
        ("F32", "0000c03f", [1.5]),
        ("F16", "003e", [1.5]),
        ("BF16", "c03f", [1.5]),
        ("I64", "feffffffffffffff", [-2]),
        ("I32", "feffffff", [-2]),
        ("I16", "feff", [-2]),
        ("I8", "fe", [-2]),
        ("U8", "fe", [254]),
        ("BOOL", "0100", [True, False]),
    ],
)
def test_every_dtype_reads_its_little_endian_bytes_and_writes_them(dtype, data, values):
    data = bytes.fromhex(data)
    tensors = unpack(raw({"x": entry(0, len(data), [len(values)], dtype)}, data), "x")
    assert tensors["x"].tolist() == values
    assert pack(tensors).endswith(data)


def test_wide_tensors_stand_first_so_that_all_are_aligned_and_the_buffer_starts_on_eight():
    content = pack({"a": torch.tensor([True]), "b": torch.tensor([1.0], dtype=torch.float64)})
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"]["data_offsets"] == [0, 8] and header["a"]["data_offsets"] == [8, 9]


def test_other_programs_metadata_is_passed_over():
    assert list(unpack(raw({"__metadata__": {"format": "pt"}, "x": entry(0, 1)}, b"\1"), "x")) == ["x"]


def test_scalars_empty_and_strided_tensors_round_trip_and_can_be_written_to(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4, dtype=torch.int16),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "näme": torch.tensor([1, 2], dtype=torch.int8),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    read["scalar"].add_(1)
    assert read["scalar"].item() == 4.5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes are too few"),
        (b"garbage that is no such file", "truncated or is no .safetensors file"),
        (GOLDEN[:40], "truncated"),
        (GOLDEN[:-1], r"data_offsets \[0, 8\], but the data is 7 bytes long"),
        (GOLDEN + b"\0", "1 bytes at the end belong to no tensor"),
        (raw(b"[1, 2]"), "must be a JSON object"),
        (raw(b"{nonsense"), "no valid JSON"),
        (raw(b'{"\xff":1}'), "no valid JSON"),
        (raw(b"[" * 100_000), "no valid JSON"),
        (raw({"a": 3}), "must have dtype, shape and data_offsets"),
        (raw({"a": entry(0, 1, dtype="F8_E4M3")}, b"\0"), "dtype 'F8_E4M3'; allowed: F64, F32"),
        (raw({"a": entry(0, 1, dtype=["U8"])}, b"\0"), "allowed: F64, F32"),
        (raw({"a": entry(0, 4, [-4])}, bytes(4)), "whole numbers >= 0"),
        (raw({"a": entry(0, 4, [4.0])}, bytes(4)), "whole numbers >= 0"),
        (raw({"a": entry(0, 4, [True, 4])}, bytes(4)), "whole numbers >= 0"),
        (raw({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, bytes(4)), r"data_offsets \[0, 4, 8\]"),
        (raw({"a": entry(4, 0, [0])}, bytes(4)), r"data_offsets \[4, 0\]"),
        (raw({"a": entry(0, 4, [2], "F32")}, bytes(4)), r"needs 8 bytes for F32 \[2\], got 4"),
        (
            raw({"a": entry(0, 4), "b": entry(3, 6)}, bytes(6)),
            "'b' starts at byte 3, expected 4: it overlaps",
        ),
        (
            raw({"a": entry(0, 4), "b": entry(5, 6)}, bytes(6)),
            "'b' starts at byte 5, expected 4: it leaves a gap",
        ),
        (raw({"a": entry(0, 2, [2], "BOOL")}, b"\1\2"), "is BOOL and holds a byte other than 0 and 1"),
        (raw({"__metadata__": {"step": 3}}), "__metadata__ must be text"),
        (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "the key 'a' is given twice"),
    ],
)
def test_damaged_files_are_refused_by_name_and_reason(content, said):
    with pytest.raises(DataError, match=f"^broken.safetensors: .*{said}"):
        unpack(content, "broken.safetensors")


def test_every_truncation_of_a_file_is_refused():
    content = pack({"a": torch.arange(5), "b": torch.tensor([1.0])})
    for length in range(len(content)):
        with pytest.raises(DataError, match="^cut: "):
            unpack(content[:length], "cut")


def test_a_missing_file_and_a_dtype_that_cannot_be_stored_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.safetensors: cannot be read"):
        read_safetensors(tmp_path / "nowhere.safetensors")
    with pytest.raises(DataError, match="'a': torch.complex64 cannot be stored"):
        pack({"a": torch.zeros(1, dtype=torch.complex64)})
