"""The original project's `resnet10_params.pkl`, read without jax and without trusting it.

A pickle is a program. Of all that one may call, this reader has stand-ins for what an array of numpy or jax needs, and
no more: nothing of numpy's is called with what the file says, and whatever else it asks for is refused by name. The
file is the one of github.com/rail-berkeley/serl, release "resnet10": a tree of dicts, HWIO convolution kernels, `scale`
and `bias` of each norm.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so101.errors import DataError

# Names in the tree -> those of helper2424/resnet10, which are this program's.
PARTS = {
    "conv_init": "embedder.0",
    "norm_init": "embedder.1.group_norm",
    "Conv_0": "conv1.conv",
    "Conv_1": "conv2.conv",
    "MyGroupNorm_0": "norm1.group_norm",
    "MyGroupNorm_1": "norm2.group_norm",
    "conv_proj": "shortcut.0.conv",
    "norm_proj": "shortcut.1.group_norm",
    **{f"ResNetBlock_{stage}": f"encoder.stages.{stage}" for stage in range(4)},
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
}
NOT_THE_TRUNK = "output_head"  # what it was pretrained with


def read_pickle(path: Path | str) -> dict[str, torch.Tensor]:
    """The trunk's tensors by their names here, convolutions as OIHW.

    Raises DataError for a file that cannot be read, asks for anything but arrays, or holds other names.
    """
    try:
        with open(path, "rb") as file:
            tree = _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the weight file") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way that its opcodes can
        raise DataError(f"{path}: no usable pickle: {type(error).__name__}: {error}") from error
    if isinstance(tree, dict) and set(tree) == {"params"}:
        tree = tree["params"]
    if not isinstance(tree, dict):
        raise DataError(f"{path}: holds a {type(tree).__name__}, must hold a dict of arrays")
    return {name: _tensor(name, array, str(path)) for name, array in _leaves(tree, str(path)).items()}


def _leaves(tree: dict[Any, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == NOT_THE_TRUNK:
            continue
        if key not in PARTS:
            raise DataError(f"{where}: has an entry {key!r}, which the ResNet10 does not")
        if isinstance(value, dict):
            found |= {f"{PARTS[key]}.{rest}": leaf for rest, leaf in _leaves(value, where).items()}
        else:
            found[PARTS[key]] = value
    return found


def _tensor(name: str, array: Any, where: str) -> torch.Tensor:
    values = getattr(array, "values", None)
    if not isinstance(array, _Array) or values is None:
        raise DataError(f"{where}: {name} is a {type(array).__name__.strip('_').lower()}, must be an array of floats")
    oihw = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values
    return torch.from_numpy(np.array(oihw, np.float32, order="C"))


class _Kind:
    """A dtype, as numpy pickles it: its name, and a state of which only the order of bytes matters for floats.

    numpy's own takes flags from that state which make it take floats for pointers.
    """

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    @property
    def floats(self) -> np.dtype[Any] | None:
        """None for what is no kind of floats."""
        known = self.name in ("f2", "f4", "f8") and self.order in ("<", ">", "=", "|")
        return np.dtype(self.order + self.name) if known else None


class _Array:
    """An array, as numpy pickles it; `values` are None until its state came, and for an array of no floats."""

    def __init__(self, *arguments: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.take(shape, kind, "F" if fortran else "C", content)

    def take(self, shape: Any, kind: Any, order: str, content: Any) -> "_Array":
        """Make the values of their bytes, which must be as many as the shape needs."""
        if isinstance(kind, _Kind) and kind.floats is not None:
            data = content.encode("latin1") if isinstance(content, str) else bytes(content)
            self.values = np.frombuffer(data, kind.floats).reshape(shape, order=order)  # type: ignore[call-overload]
        return self


def _array_of_jax(make: Any, arguments: tuple[Any, ...], state: Any, aval: Any) -> _Array:
    """What jax pickles of an array is how numpy would make it, and an `aval` that says whether it is weakly typed."""
    array = _Array()
    array.__setstate__(state)
    return array


def _array_in_band(content: Any, kind: Any, shape: Any, order: str) -> _Array:
    """How protocol 5 makes an array."""
    return _Array().take(shape, kind, order, content)


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise DataError(f"asks for the encoding {encoding!r}, which no array needs")
    return text.encode(encoding)


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _array_in_band,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
    ("jax._src.array", "_reconstruct_array"): _array_of_jax,
    ("jax._src.device_array", "reconstruct_device_array"): _array_of_jax,
    ("flax.core.frozen_dict", "FrozenDict"): dict,
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        home = module.replace("numpy._core", "numpy.core")  # numpy 2 calls it so
        if (home, name) not in ALLOWED:
            raise DataError(f"asks for {module}.{name}, which is no part of an array; it is not the ResNet10's file")
        return ALLOWED[home, name]
