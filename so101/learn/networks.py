"""The trained networks: from pixels and states to tensors, and from the trunk's features to action and value.

The trunk (resnet10.py) is frozen, so everything here starts from its feature maps, (B, cameras, 512, h, w); only a
policy that trains its own starts from pixels. Frames of a stack are to these networks what further cameras are.
Letters in the shape comments: B batch, N cameras (times stacked frames), C channels, P = h * w positions,
F spatial features, A entries of the action, E critics. Initial weights and layer order follow HIL-SERL's JAX code.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from so101.errors import DataError
from so101.learn.resnet10 import CHANNELS, STRIDE
from so101.schema import ACTION, STATE, STATE_FLOOR

IMAGE_MEAN, IMAGE_STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, what the trunk was trained on
STATE_CLIP = 5.0  # standard deviations
EMBEDDING, STATE_EMBEDDING = 256, 64  # widths of one camera's and of the state's share of the latent
STD_RANGE = (1e-5, 5.0)
NORM_EPS = 1e-6  # flax's LayerNorm; torch's own default is 1e-5
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "silu": nn.SiLU}


def images_to_input(images: np.ndarray | Tensor) -> Tensor:
    """uint8 RGB images (B, S, S, 3) -> the trunk's float32 input (B, 3, S, S), ImageNet-normalised.

    The only place in the program where pixels become network input. Raises DataError for anything but uint8
    RGB: floats in [0, 1] or [0, 255] look alike to a network, and have cost others whole training runs.
    """
    pixels = torch.as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise DataError(f"images: got {pixels.dtype} {tuple(pixels.shape)}, must be uint8 (batch, S, S, 3) RGB")
    scale, offset = _scaling(pixels.device)
    return (pixels * scale - offset).permute(0, 3, 1, 2).contiguous()


@functools.cache
def _scaling(device: torch.device) -> tuple[Tensor, Tensor]:
    """Each colour's factor and offset; made once, since a captured CUDA graph cannot copy from the host."""
    scale = 1 / (255 * torch.tensor(IMAGE_STD, device=device))
    return scale, torch.tensor(IMAGE_MEAN, device=device) * 255 * scale


def feature_maps(trunk: nn.Module, images: Tensor) -> Tensor:
    """uint8 RGB images (B, N, S, S, 3) -> the trunk's features (B, N, C, h, w), all in one pass."""
    weight = next(trunk.parameters())
    maps: Tensor = trunk(images_to_input(images.flatten(0, 1).to(weight.device)).to(weight.dtype))
    return maps.unflatten(0, images.shape[:2])


class StateNormalizer(nn.Module):
    """(state - mean) / std, clipped to +-5; the demonstrations' statistics, saved with the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, state_dim: int = len(STATE)) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))

    def fit(self, states: np.ndarray | Tensor) -> None:
        """Take mean and std from `states` (n, 18), each std at least its entry's STATE_FLOOR."""
        sample = torch.as_tensor(states, dtype=torch.float64).cpu()
        if sample.ndim != 2 or sample.shape[1] != len(self.mean) or not len(sample) or not sample.isfinite().all():
            raise DataError(
                f"states: got {tuple(sample.shape)}, must be (n, {len(self.mean)}) with n > 0 and all finite"
            )
        floor = torch.tensor(STATE_FLOOR, dtype=torch.float64)
        self.mean.copy_(sample.mean(0))
        self.std.copy_(torch.maximum(sample.std(0, correction=0), floor))

    def forward(self, state: Tensor) -> Tensor:
        return ((state - self.mean) / self.std).clamp(-STATE_CLIP, STATE_CLIP)


class SpatialEmbedding(nn.Module):
    """Learned spatial pooling: each channel's map is weighed by F kernels, (B, C, h, w) -> (B, C * F).

    The kernel lies as (C, P, F), one small matrix per channel, so that the whole is a batched matrix product
    (2 ms where the broadcast form takes 98). Entry c * F + f of the output is channel c under kernel f.
    The output is the transpose of a (C * F, B) tensor, as the product leaves it: the next layer's product
    takes it so, and no copy is made on either pass.
    """

    def __init__(self, channels: int = CHANNELS, size: int = 4, features: int = 8) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(channels, size * size, features))
        lecun_normal_(self.kernel, fan_in=channels * size * size)

    def forward(self, features: Tensor) -> Tensor:
        maps = features.to(self.kernel.dtype).flatten(2).permute(1, 2, 0)  # (C, P, B)
        return torch.bmm(self.kernel.transpose(1, 2), maps).flatten(0, 1).t()  # (C, F, B) -> (B, C * F)


class SpatialHead(nn.Module):
    """One camera's feature map (B, C, h, w) -> its embedding (B, 256), each entry in [-1, 1]."""

    def __init__(
        self,
        channels: int = CHANNELS,
        size: int = 4,
        features: int = 8,
        width: int = EMBEDDING,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = SpatialEmbedding(channels, size, features)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels * features, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        lecun_normal_(self.linear.weight, fan_in=channels * features)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(self.dropout(self.embedding(features)))

    def project(self, embedded: Tensor) -> Tensor:
        """What follows the dropout: (B, C * F) -> (B, 256)."""
        return torch.tanh(self.norm(self.linear(embedded)))


class ObservationEncoder(nn.Module):
    """Trunk features (B, N, C, h, w) of N cameras and a normalised state (B, 18) -> latent (B, 256 N + 64).

    It is passed in two steps, because the actor's passes drop out part of what `embed` returns and the
    critics' do not; `forward` is both steps without dropout.
    """

    def __init__(self, cameras: int, size: int = 4, state_dim: int = len(STATE)) -> None:
        super().__init__()
        self.heads = nn.ModuleList(SpatialHead(size=size) for _ in range(cameras))
        self.state = nn.Linear(state_dim, STATE_EMBEDDING)
        self.state_norm = nn.LayerNorm(STATE_EMBEDDING, eps=NORM_EPS)
        self.latent_dim = EMBEDDING * cameras + STATE_EMBEDDING
        xavier_(self.state)

    def embed(self, features: Tensor) -> list[Tensor]:
        """Each camera's spatial embedding, (B, C * F)."""
        maps = features.unbind(1)
        return [head.embedding(image) for head, image in zip(self.heads, maps, strict=True)]  # type: ignore[operator]

    def join(self, embedded: list[Tensor], state: Tensor) -> Tensor:
        """The cameras' embeddings and the state -> latent."""
        parts = [head.project(image) for head, image in zip(self.heads, embedded, strict=True)]  # type: ignore[operator]
        return torch.cat([*parts, torch.tanh(self.state_norm(self.state(state)))], dim=1)

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        return self.join(self.embed(features), state)


class Actor(nn.Module):
    """Latent -> a diagonal Gaussian squashed by tanh, over the first `actions` entries of ACTION, A of them."""

    def __init__(self, latent_dim: int, width: int = 256, activation: str = "tanh", actions: int = len(ACTION)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (latent_dim, width):
            linear = nn.Linear(inputs, width)
            xavier_(linear)
            layers += [linear, nn.LayerNorm(width, eps=NORM_EPS), ACTIVATIONS[activation]()]
        self.mlp = nn.Sequential(*layers)
        self.mean = nn.Linear(width, actions)
        self.log_std = nn.Linear(width, actions)
        xavier_(self.mean)
        xavier_(self.log_std)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before the tanh, both (B, A)."""
        hidden = self.mlp(latent)
        return self.mean(hidden), self.log_std(hidden).exp().clamp(*STD_RANGE)

    def sample(self, latent: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action (B, A) that standard normal `noise` (B, A) picks, and its log-density (B,).

        The density of a = tanh(u) is that of u over da/du = 1 - tanh(u)^2, whose log is written as
        2 (log 2 - u - softplus(-2 u)): exact also where tanh has rounded to 1 (SAC, appendix C).
        """
        mean, std = self(latent)
        u = mean + std * noise
        log_normal = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - functional.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(dim=1)


class Policy(nn.Module):
    """What acts on the robot: normaliser, encoder and actor. Whole, this is what travels and is saved.

    `gripper` (gripper.py) and `trunk` (resnet10.py, trained) are set by whoever wants them: see sac.make_policy.
    """

    def __init__(self, cameras: int, size: int = 4, activation: str = "tanh", actions: int = len(ACTION)) -> None:
        super().__init__()
        self.normalizer = StateNormalizer()
        self.cameras, self.size = cameras, size
        self.encoder = ObservationEncoder(cameras, size)
        self.actor = Actor(self.encoder.latent_dim, activation=activation, actions=actions)
        self.actions = actions  # entries of the action that the actor and the critics have to do with
        self.gripper: nn.Module | None = None  # picks the last entry instead
        self.trunk: nn.Module | None = None

    def look(self, seen: Tensor) -> Tensor:
        """Feature maps (B, N, C, h, w) for the encoder: as they come, or of pixels (B, N, S, S, 3) by its own trunk."""
        return seen if self.trunk is None else feature_maps(self.trunk, seen)

    @torch.no_grad()
    def act(self, seen: Tensor, state: np.ndarray, std_scale: float, generator: torch.Generator) -> np.ndarray:
        """One observation's action (4,) float32: features (N, C, h, w) (see `look`), state (18,) in schema units.

        `std_scale` times the distribution's standard deviation is what it is drawn with: 1 samples as in training,
        0 takes the mode. The generator lives on the CPU.
        """
        device = self.normalizer.mean.device
        raw = torch.as_tensor(state, dtype=torch.float32, device=device)
        latent = self.encoder(self.look(seen.to(device)[None]), self.normalizer(raw[None]))
        noise = std_scale * torch.randn(1, self.actions, generator=generator)
        action, _ = self.actor.sample(latent, noise.to(device))
        if self.gripper is not None:
            action = torch.cat([action, self.gripper(latent).argmax(1, keepdim=True) - 1], dim=1)
        return action[0].cpu().numpy()  # type: ignore[no-any-return]

    def probe(self) -> np.ndarray:
        """The action on an observation that never changes: two copies that agree on it hold the same weights."""
        rng, side = np.random.default_rng(0), self.size * STRIDE
        maps = rng.standard_normal((self.cameras, CHANNELS, self.size, self.size)).astype(np.float32)
        pixels = rng.integers(0, 256, (self.cameras, side, side, 3), np.uint8)
        state = self.normalizer.mean.cpu().numpy() + self.normalizer.std.cpu().numpy()
        return self.act(torch.from_numpy(maps if self.trunk is None else pixels), state, 0.0, torch.Generator())


class EnsembleLayer(nn.Module):
    """Linear, LayerNorm and activation of E critics at once: one batched matrix product for all of them."""

    def __init__(self, members: int, inputs: int, width: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(xavier_ensemble(members, inputs, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias, x, self.weight)  # (E, B, inputs) -> (E, B, width)
        y = functional.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
        return self.activation(torch.addcmul(self.shift, y, self.scale))  # type: ignore[no-any-return]


class Critics(nn.Module):
    """E critics, each 256 x 2: latent (B, L) and action (B, A) -> their values (E, B)."""

    def __init__(
        self,
        latent_dim: int,
        members: int = 2,
        width: int = 256,
        activation: str = "tanh",
        actions: int = len(ACTION),
    ) -> None:
        super().__init__()
        self.members = members
        self.hidden1 = EnsembleLayer(members, latent_dim + actions, width, activation)
        self.hidden2 = EnsembleLayer(members, width, width, activation)
        self.weight = nn.Parameter(xavier_ensemble(members, width, 1))
        self.bias = nn.Parameter(torch.zeros(members, 1, 1))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([latent, action], dim=1).expand(self.members, -1, -1)  # (E, B, L + A)
        return torch.baddbmm(self.bias, self.hidden2(self.hidden1(x)), self.weight).squeeze(2)


def drop(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Dropout with a generator of one's own, on x's device.

    On the CPU one random byte decides each entry (so the rate is rounded to 1/256), eight from each 64-bit
    draw: torch's own mask takes five times as long there, as much as two of the largest matrix products.
    """
    if x.device.type != "cpu":
        return x * torch.empty_like(x).bernoulli_(1 - rate, generator=generator) / (1 - rate)
    dropped = round(256 * rate)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    as_stored = x.t() if x.stride(0) == 1 else x  # the spatial embedding's output lies transposed
    chance = words.view(torch.uint8)[: x.numel()].view(as_stored.shape).float()  # 0 .. 255
    keep = chance.sub_(dropped - 1).clamp_(0, 1)  # three times as fast as comparing and multiplying by a bool
    kept = (as_stored * keep).mul_(256 / (256 - dropped))
    return kept.t() if x.stride(0) == 1 else kept


def xavier_(linear: nn.Linear) -> None:
    """Xavier's uniform weights and zero biases, as HIL-SERL's own layers start."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


def xavier_ensemble(members: int, inputs: int, outputs: int) -> Tensor:
    """(E, inputs, outputs) weights, each member drawn as `xavier_` draws a layer."""
    bound = math.sqrt(6 / (inputs + outputs))
    return torch.empty(members, inputs, outputs).uniform_(-bound, bound)


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Flax's default init: a normal of variance 1 / fan_in, cut off at two standard deviations."""
    std = 1 / math.sqrt(fan_in) / 0.87962566  # the std of a unit normal cut at +-2, so that the variance is right
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
