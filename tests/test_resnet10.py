"""The encoder against the whole network computed again in float64 numpy, from the original's description."""

import numpy as np
import pytest
import torch

from so101.errors import DataError
from so101.learn.resnet10 import ResNet10, load_resnet10, trunk_hash
from so101.learn.weights import write_safetensors

# The keys and shapes of helper2424/resnet10's model.safetensors.
KEYS = {"embedder.0.weight": [64, 3, 7, 7]}
for part in ("weight", "bias"):
    KEYS[f"embedder.1.group_norm.{part}"] = [64]
for stage, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)]):
    prefix = f"encoder.stages.{stage}."
    KEYS[prefix + "conv1.conv.weight"] = [outputs, inputs, 3, 3]
    KEYS[prefix + "conv2.conv.weight"] = [outputs, outputs, 3, 3]
    norms = ["norm1", "norm2"]
    if stage:
        KEYS[prefix + "shortcut.0.conv.weight"] = [outputs, inputs, 1, 1]
        norms.append("shortcut.1")
    for norm in norms:
        for part in ("weight", "bias"):
            KEYS[f"{prefix}{norm}.group_norm.{part}"] = [outputs]


def random_weights(seed=0):
    """Weights with every value random, the norms' too, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in KEYS.items():
        values = torch.randn(shape, generator=generator)
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.3
        weights[name] = values * scale + (1.0 if name.endswith("group_norm.weight") else 0.0)
    return weights


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_safetensors(path, random_weights())
    return str(path)


def conv(x, kernel, stride, before, after):
    """x (C, H, W), kernel (O, C, k, k): padded by hand, then one dot product for each window."""
    x = np.pad(x, ((0, 0), (before, after), (before, after)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
    return np.tensordot(kernel, windows, axes=([1, 2, 3], [0, 3, 4]))


def group_norm(x, weight, bias):
    groups = x.reshape(4, -1)
    normed = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    return normed.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def reference(image, weights, strided_pad=(0, 1)):
    """The network of serl's resnetv1-10-frozen on one image (3, S, S), in float64."""
    w = {name: tensor.numpy().astype(np.float64) for name, tensor in weights.items()}

    def norm(x, name):
        return group_norm(x, w[f"{name}.group_norm.weight"], w[f"{name}.group_norm.bias"])

    x = conv(image.astype(np.float64), w["embedder.0.weight"], 2, 3, 3)
    x = np.maximum(norm(x, "embedder.1"), 0)
    x = np.pad(x, ((0, 0), strided_pad, strided_pad), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(3, 4))
    for stage in range(4):
        prefix, stride = f"encoder.stages.{stage}.", 2 if stage else 1
        pads = strided_pad if stride == 2 else (1, 1)
        y = np.maximum(norm(conv(x, w[prefix + "conv1.conv.weight"], stride, *pads), prefix + "norm1"), 0)
        y = norm(conv(y, w[prefix + "conv2.conv.weight"], 1, 1, 1), prefix + "norm2")
        if stage:
            x = norm(conv(x, w[prefix + "shortcut.0.conv.weight"], 2, 0, 0), prefix + "shortcut.1")
        x = np.maximum(x + y, 0)
    return x


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("size", [32, 96, 128])
def test_output_equals_the_float64_reference(weight_file, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    features = load_resnet10(weight_file)(images)
    assert features.shape == (2, 512, size // 32, size // 32) and features.is_contiguous()
    for image, got in zip(images.numpy(), features.numpy(), strict=True):
        assert relative(got, reference(image, random_weights())) < 1e-5


def test_symmetric_padding_would_be_caught(weight_file):
    """The mistake of at least one public port: padding 1 on both sides of the strided layers."""
    image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    right = load_resnet10(weight_file)(image[None])[0].numpy()
    wrong = reference(image.numpy(), random_weights(), strided_pad=(1, 1))[:, : right.shape[1], : right.shape[2]]
    assert relative(wrong, right) > 0.2


def test_an_images_features_do_not_depend_on_its_batch(weight_file):
    trunk = load_resnet10(weight_file)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(trunk(images)[1], trunk(images[1:2])[0], rtol=1e-4, atol=1e-4)


def test_names_shapes_and_size_are_the_published_ones():
    trunk = ResNet10()
    assert {name: list(tensor.shape) for name, tensor in trunk.state_dict().items()} == KEYS
    assert len(KEYS) == 36 and sum(p.numel() for p in trunk.parameters()) == 4_905_792


def test_the_trunk_is_frozen(weight_file):
    trunk = load_resnet10(weight_file)
    assert not trunk.training and not any(p.requires_grad for p in trunk.parameters())


@pytest.mark.parametrize(
    "prefix",
    ["actor.encoder.image_encoder.image_enc_layers.", "encoder.", "encoders.observation_images_wrist.0."],
)
def test_weights_are_found_under_the_prefixes_of_lerobot_checkpoints(tmp_path, prefix, weight_file):
    stored = {prefix + name: tensor for name, tensor in random_weights().items()}
    stored["critic.network.0.weight"] = torch.zeros(3)
    write_safetensors(tmp_path / "x.safetensors", stored)
    assert trunk_hash(load_resnet10(str(tmp_path / "x.safetensors"))) == trunk_hash(load_resnet10(weight_file))


def test_a_checkpoint_with_two_equal_copies_is_read_and_with_two_different_ones_refused(tmp_path):
    stored = {f"encoders.{camera}.0.{n}": t for camera in "ab" for n, t in random_weights().items()}
    write_safetensors(tmp_path / "x.safetensors", stored)
    load_resnet10(str(tmp_path / "x.safetensors"))
    stored["encoders.b.0.embedder.0.weight"] = stored["encoders.b.0.embedder.0.weight"] + 1
    write_safetensors(tmp_path / "x.safetensors", stored)
    with pytest.raises(DataError, match=r"x.safetensors: holds different encoders: encoders.a.0.embedder"):
        load_resnet10(str(tmp_path / "x.safetensors"))


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    weights = random_weights()

    def refused(said, **changed):
        write_safetensors(path, {**weights, **changed})
        with pytest.raises(DataError, match=said):
            load_resnet10(str(path))

    refused(
        r"'embedder.0.weight' is torch.float32 \[64, 3, 3, 3\]",
        **{"embedder.0.weight": torch.zeros(64, 3, 3, 3)},
    )
    refused("'embedder.0.weight' is torch.int32", **{"embedder.0.weight": torch.zeros(64, 3, 7, 7).int()})
    refused("not finite", **{"embedder.1.group_norm.bias": torch.full((64,), torch.nan)})
    del weights["encoder.stages.2.shortcut.1.group_norm.bias"]
    refused(r"no tensor 'encoder.stages.2.shortcut.1.group_norm.bias' among its 35")


def test_half_precision_weights_become_float32(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {n: t.half() for n, t in random_weights().items()})
    trunk = load_resnet10(str(tmp_path / "x.safetensors"))
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}


def test_the_random_start_warns_and_depends_on_its_seed_only(capsys):
    first = trunk_hash(load_resnet10(None, seed=1))
    assert "random (seed 1), not pretrained" in capsys.readouterr().out
    torch.manual_seed(5)
    assert trunk_hash(load_resnet10(None, seed=1)) == first
    assert trunk_hash(load_resnet10(None, seed=2)) != first


def test_the_hash_changes_with_any_tensor(weight_file):
    trunk = load_resnet10(weight_file)
    hashes = {trunk_hash(trunk)}
    for parameter in trunk.parameters():
        parameter[(-1,) * parameter.ndim] += 1e-3
        hashes.add(trunk_hash(trunk))
    assert len(hashes) == 37
