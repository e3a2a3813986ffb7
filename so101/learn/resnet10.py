"""The frozen image encoder: a port of serl's `resnetv1-10-frozen`, in the names of `helper2424/resnet10`.

What ports get wrong: flax pads its strided 3x3 convolutions and its max-pool "SAME", which on an even size
is nothing before and one after, never one on both sides (54 % difference in the output).
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so101.errors import DataError
from so101.learn.pickled import read_pickle
from so101.learn.weights import read_safetensors

CHANNELS = 512  # of the output
STRIDE = 32  # the output is 1/32 of the image on a side
TENSORS, PARAMETERS = 36, 4_905_792


class SameConv(nn.Module):
    """3x3 or 1x1 convolution without bias, padded as flax's "SAME" does on an even size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.asymmetric = kernel == 3 and stride == 2
        padding = 0 if self.asymmetric else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)  # type: ignore[no-any-return]


class Norm(nn.Module):
    """GroupNorm with 4 groups. There is no BatchNorm, so a batch of one is like any other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(4, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.group_norm(x)  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """conv, norm, relu, conv, norm, plus the shortcut, relu (post-activation, ResNet v1)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = SameConv(inputs, outputs, 3, stride), Norm(outputs)
        self.conv2, self.norm2 = SameConv(outputs, outputs, 3, 1), Norm(outputs)
        projected = [SameConv(inputs, outputs, 1, stride), Norm(outputs)] if stride > 1 else []
        self.shortcut = nn.Sequential(*projected)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu_(y.add_(self.shortcut(x)))


class ResNet10(nn.Module):
    """(B, 3, S, S) ImageNet-normalised float -> (B, 512, S/32, S/32) float. S is a multiple of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), Norm(64), nn.ReLU(inplace=True))
        self.encoder = nn.Module()
        self.encoder.stages = nn.Sequential(
            BasicBlock(64, 64, 1), BasicBlock(64, 128, 2), BasicBlock(128, 256, 2), BasicBlock(256, 512, 2)
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on the CPU, the same numbers

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedder(x.contiguous(memory_format=torch.channels_last))  # (B, 64, S/2, S/2)
        # ceil_mode lets the last window hang over the edge: "SAME" with -inf, without a padded copy
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)  # (B, 64, S/4, S/4)
        return self.encoder.stages(x).contiguous()  # type: ignore[operator, no-any-return]


def load_resnet10(path: str | None, seed: int = 0) -> ResNet10:
    """The frozen trunk from a weight file, or, for None, from a seeded random start with a warning.

    The file is the original project's `resnet10_params.pkl`, or a .safetensors file: `helper2424/resnet10`'s own, or a
    LeRobot policy or classifier that contains the trunk under some prefix. Raises DataError where a tensor is
    missing, misshapen, or stands there in two versions.
    """
    trunk = ResNet10().eval().requires_grad_(False)
    if path is None:
        print(f"warning: no encoder weights given: the image encoder is random (seed {seed}), not pretrained")
        generator = torch.Generator().manual_seed(seed)
        for parameter in trunk.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, generator=generator)
        return trunk
    stored = read_pickle(path) if path.endswith((".pkl", ".pickle")) else read_safetensors(path)
    wanted = trunk.state_dict()
    trunk.load_state_dict({name: _find(stored, name, tensor, path) for name, tensor in wanted.items()})
    return trunk


def _find(stored: dict[str, Tensor], name: str, like: Tensor, path: str) -> Tensor:
    """The tensor called `name` under whatever prefix, as float32."""
    found = {key: tensor for key, tensor in stored.items() if key == name or key.endswith(f".{name}")}
    if not found:
        raise DataError(
            f"{path}: no tensor {name!r} among its {len(stored)}; "
            f"the encoder is a ResNet10 ({TENSORS} tensors, {PARAMETERS:,} parameters)"
        )
    first, *others = found.values()
    for key, tensor in found.items():
        if tensor.shape != like.shape or not tensor.is_floating_point():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise DataError(f"{path}: tensor {key!r} is {got}, must be float {list(like.shape)}")
        if not tensor.isfinite().all():
            raise DataError(f"{path}: tensor {key!r} has values that are not finite; the file is damaged")
    if any(not torch.equal(first, other) for other in others):
        raise DataError(f"{path}: holds different encoders: {', '.join(sorted(found))} are not equal")
    return first.float()


def trunk_hash(trunk: ResNet10) -> str:
    """sha256 over the trunk's tensors by name: what cached features and trained heads depend on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trunk.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_trunk(stored: str, here: str, where: str) -> None:
    """Raises DataError where what was trained on one trunk's features meets another, told by `trunk_hash`."""
    if stored != here:
        raise DataError(
            f"{where}: was trained on another encoder ({stored[:12]}, here it is {here[:12]}). Use the encoder "
            "weights it was trained with, or train it anew"
        )
