"""The original weight file: a pickle of jax arrays, read without jax, and not obeyed."""

import os
import pickle
import pickletools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resnet10 import random_weights

from so101.errors import DataError
from so101.learn.pickled import read_pickle
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.weights import write_safetensors

NAMES = {  # helper2424's name of a part -> the original's
    "conv1.conv": "Conv_0", "conv2.conv": "Conv_1", "norm1.group_norm": "MyGroupNorm_0",
    "norm2.group_norm": "MyGroupNorm_1", "shortcut.0.conv": "conv_proj", "shortcut.1.group_norm": "norm_proj",
}  # fmt: skip


def original_tree(weights: dict[str, torch.Tensor], leaf=lambda array: array) -> dict:
    """The weights as the original keeps them: nested dicts, HWIO kernels, scale and bias."""
    tree: dict = {}
    for name, tensor in weights.items():
        part, _, last = name.rpartition(".")
        if part.startswith("encoder.stages."):
            stage, _, rest = part.removeprefix("encoder.stages.").partition(".")
            place = tree.setdefault(f"ResNetBlock_{stage}", {}).setdefault(NAMES[rest], {})
        else:
            place = tree.setdefault("conv_init" if part == "embedder.0" else "norm_init", {})
        array = tensor.numpy()
        if array.ndim == 4:
            place["kernel"] = leaf(np.ascontiguousarray(np.einsum("oihw->hwio", array)))
        else:
            place["scale" if last == "weight" else "bias"] = leaf(array)
    return tree


class JaxArray:
    """Pickles itself as jax 0.4's arrays do: by a function of jax's, and numpy's own way of making the array."""

    where = ("jax._src.array", "_reconstruct_array")

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self):
        make, arguments, state = self.array.__reduce__()
        aval = {"weak_type": False, "named_shape": {}}
        return getattr(sys.modules[self.where[0]], self.where[1]), (make, arguments, state, aval)


class OldJaxArray(JaxArray):
    where = ("jax._src.device_array", "reconstruct_device_array")


class FrozenDict:
    def __init__(self, content: dict) -> None:
        self.content = content

    def __reduce__(self):
        return FrozenDict, (self.content,)


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """A corner of each tensor."""
    return {name: tensor[:2, :3] if tensor.ndim == 4 else tensor[:2] for name, tensor in random_weights().items()}


@pytest.fixture
def jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the names that jax and flax have, for pickling; reading must not need them."""
    for parent in ("jax", "jax._src"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    for module, name in (JaxArray.where, OldJaxArray.where):
        stand_in = types.ModuleType(module)
        function = types.FunctionType((lambda *arguments: None).__code__, {}, name)
        function.__module__, function.__qualname__ = module, name
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)
    flax = types.ModuleType("flax.core.frozen_dict")
    flax.FrozenDict = FrozenDict  # type: ignore[attr-defined]
    monkeypatch.setattr(FrozenDict, "__module__", flax.__name__)
    for name in ("flax", "flax.core", "flax.core.frozen_dict"):
        monkeypatch.setitem(sys.modules, name, flax)


def test_both_files_give_equal_tensors(tmp_path, monkeypatch, jax):
    weights = random_weights(3)
    write_safetensors(tmp_path / "model.safetensors", weights)
    tree = original_tree(weights, JaxArray) | {"output_head": {"kernel": JaxArray(np.zeros((512, 10), np.float32))}}
    (tmp_path / "resnet10_params.pkl").write_bytes(pickle.dumps(tree))
    monkeypatch.undo()  # and now without jax
    stored = read_pickle(tmp_path / "resnet10_params.pkl")
    assert len(stored) == 36 and sum(tensor.numel() for tensor in stored.values()) == 4_905_792
    assert set(stored) == set(weights) and all(torch.equal(stored[name], weights[name]) for name in weights)
    first, second = (load_resnet10(str(tmp_path / name)) for name in ("model.safetensors", "resnet10_params.pkl"))
    assert trunk_hash(first) == trunk_hash(second)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("leaf", [np.asarray, JaxArray, OldJaxArray], ids=["numpy", "jax", "old jax"])
def test_every_form_of_the_pickle_is_read(tmp_path, monkeypatch, jax, small, leaf, protocol):
    tree = original_tree(small, leaf)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(FrozenDict({"params": tree}) if protocol % 2 else tree, protocol))
    monkeypatch.undo()
    stored = read_pickle(tmp_path / "a.pkl")
    assert set(stored) == set(small) and all(torch.equal(stored[name], small[name]) for name in small)


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil, named",
    [
        (Calls(os.system, "touch {marker}"), r"(posix|nt)\.system"),
        (Calls(eval, "open('{marker}', 'w')"), r"builtins\.eval"),
        (Calls(getattr, "", "upper"), r"builtins\.getattr"),
        (Calls(np.fromfile, "{marker}"), r"numpy.*fromfile"),
        (Calls(Path, "{marker}"), r"pathlib"),
        (types.SimpleNamespace(), r"types\.SimpleNamespace"),
        (torch.zeros(2), r"torch"),
    ],
    ids=["system", "eval", "getattr", "fromfile", "Path", "namespace", "torch"],
)
@pytest.mark.parametrize("place", ["conv_init", "output_head"])
def test_whatever_is_no_array_is_refused_by_name_and_never_called(tmp_path, evil, named, place):
    marker = tmp_path / "called"
    if isinstance(evil, Calls):
        function, arguments = evil.call
        evil = Calls(function, *(a.format(marker=marker) if isinstance(a, str) else a for a in arguments))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({place: {"kernel": evil}}))
    with pytest.raises(DataError, match=rf"a\.pkl: asks for {named}"):
        read_pickle(tmp_path / "a.pkl")
    assert not marker.exists()


@pytest.mark.parametrize(
    "tree, said",
    [
        ([1, 2], "holds a list, must hold a dict of arrays"),
        ({"conv_init": {"kernel": 3}}, "embedder.0.weight is a int, must be an array of floats"),
        ({"conv_init": {"kernel": np.zeros(3, int)}}, "is a array, must be an array of floats"),
        ({"conv_unit": {}}, "has an entry 'conv_unit'"),
        ({"conv_init": {"kernel": np.zeros((2, 3), np.float32)}}, r"no tensor|must be float"),
    ],
)
def test_another_content_is_named(tmp_path, tree, said):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    with pytest.raises(DataError, match=said):
        load_resnet10(str(tmp_path / "a.pkl"))


def test_damage_of_any_kind_is_an_error_in_words(tmp_path, small):
    """Cut off anywhere, any byte another, and an array that asks for a petabyte."""
    whole = pickle.dumps(original_tree({name: tensor for name, tensor in small.items() if "1" in name}), 2)
    rng = np.random.default_rng(0)
    contents = [whole[:cut] for cut in range(0, len(whole), 97)]
    for place in rng.integers(0, len(whole), 400):
        contents.append(whole[:place] + bytes([rng.integers(256)]) + whole[place + 1 :])
    petabyte = b"\x8a\x07" + (10**15).to_bytes(7, "little") + b"\x85"  # LONG1, TUPLE1
    huge = pickle.dumps({"conv_init": {"kernel": np.zeros(1, np.float32)}}, 2).replace(b"K\x01\x85", petabyte)
    assert any(argument == 10**15 for _, argument, _ in pickletools.genops(huge))
    refused = 0
    for content in [*contents, huge]:
        (tmp_path / "a.pkl").write_bytes(content)
        try:
            read_pickle(tmp_path / "a.pkl")
        except DataError as error:
            assert str(error).startswith(str(tmp_path / "a.pkl"))
            refused += 1
    assert refused > len(range(0, len(whole), 97))
    with pytest.raises(DataError, match="cannot reshape array of size 1"):  # the last one
        read_pickle(tmp_path / "a.pkl")
