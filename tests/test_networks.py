import math

import numpy as np
import pytest
import torch

from so101.errors import DataError
from so101.learn.networks import (
    Actor,
    Critics,
    ObservationEncoder,
    Policy,
    SpatialEmbedding,
    SpatialHead,
    StateNormalizer,
    drop,
    images_to_input,
)
from so101.schema import STATE, STATE_FLOOR

torch.set_num_threads(1)  # small products; a second thread would wait for cores that other tests use


def test_images_to_input_by_hand():
    # red 255: (1 - 0.485) / 0.229 = 2.2489; green 0: -0.456 / 0.224 = -2.0357; blue 51: (0.2 - 0.406) / 0.225
    image = np.zeros((1, 32, 64, 3), np.uint8)
    image[..., 0], image[..., 2] = 255, 51
    image[0, 3, 5] = 0
    pixels = images_to_input(image)
    assert pixels.shape == (1, 3, 32, 64) and pixels.dtype == torch.float32
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([2.2489, -2.0357, -0.9156], abs=1e-4)
    assert pixels[0, :, 3, 5].tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)


@pytest.mark.parametrize("image", [np.zeros((1, 32, 32, 3)), np.zeros((1, 3, 32, 32), np.uint8)])
def test_images_to_input_refuses_all_but_uint8_rgb(image):
    with pytest.raises(DataError, match="must be uint8"):
        images_to_input(image)


def test_normalizer_scales_floors_and_clips():
    normalizer = StateNormalizer()
    states = np.zeros((200, 18), np.float32)
    states[:100, 0], states[100:, 0] = 1.0, 3.0  # mean 2, std 1
    states[:, 16] = 0.5  # a pitch that never moved
    normalizer.fit(states)
    state = torch.zeros(1, 18)
    state[0, 0], state[0, 16] = 3.5, 0.54
    out = normalizer(state)[0]
    assert out[0].item() == pytest.approx(1.5)
    assert out[16].item() == pytest.approx(0.04 / STATE_FLOOR[16])  # two floors away, not 1e8
    assert normalizer(state + 1000).max().item() == 5.0 and normalizer(state - 1000).min().item() == -5.0


@pytest.mark.parametrize("states", [np.zeros((0, 18)), np.zeros((3, 17)), np.full((2, 18), np.nan)])
def test_normalizer_refuses(states):
    with pytest.raises(DataError, match="states: got"):
        StateNormalizer().fit(states)


def test_spatial_embedding_is_the_sum_over_positions():
    torch.manual_seed(0)
    embedding = SpatialEmbedding(channels=6, size=3, features=2)
    features = torch.randn(5, 6, 3, 3)
    kernel = embedding.kernel.view(6, 3, 3, 2)  # as serl's (h, w, C, F), channels first
    wanted = torch.einsum("bchw,chwf->bcf", features, kernel).flatten(1)
    torch.testing.assert_close(embedding(features), wanted)
    assert embedding(features.half()).dtype == torch.float32


def test_initial_spread_is_flax_default():
    torch.manual_seed(0)
    head = SpatialHead()
    assert head.embedding.kernel.std().item() == pytest.approx(1 / math.sqrt(8192), rel=0.02)
    assert head.linear.weight.std().item() == pytest.approx(1 / math.sqrt(4096), rel=0.02)
    assert head.embedding.kernel.abs().max() < 2.3 / math.sqrt(8192)  # truncated


def test_head_drops_out_only_in_training():
    torch.manual_seed(0)
    head, features = SpatialHead(), torch.randn(4, 512, 4, 4)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))
    assert head(features).abs().max() <= 1


def test_latent_width_and_cameras_have_heads_of_their_own():
    torch.manual_seed(0)
    encoder = ObservationEncoder(cameras=2)
    features, state = torch.randn(3, 2, 512, 4, 4), torch.randn(3, 18)
    latent = encoder(features, state)
    assert latent.shape == (3, 2 * 256 + 64)
    features[:, 1] += 1
    moved = encoder(features, state) != latent
    assert moved[:, 256:512].all() and not moved[:, :256].any() and not moved[:, 512:].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_drop_keeps_the_expectation(transposed):
    x = torch.ones(300, 1001).t() if transposed else torch.ones(1001, 300)
    dropped = drop(x, 0.1, torch.Generator().manual_seed(0))
    kept = dropped != 0
    # 300,300 draws: a share of 0.9 has a standard error of 0.0005; and no row or column is favoured
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.004)
    assert dropped.mean().item() == pytest.approx(1, abs=0.003)
    assert kept.float().mean(0).min() > 0.85 and kept.float().mean(1).min() > 0.8


def test_std_is_the_standard_deviation():
    # scale 0.04 must spread the samples by 0.04: others have used it as a variance, which gives 0.20
    torch.manual_seed(0)
    actor = Actor(latent_dim=8)
    with torch.no_grad():
        actor.log_std.weight.zero_()
        actor.log_std.bias.fill_(math.log(0.04))
        latent = torch.randn(1, 8).expand(100_000, 8)
        mean, std = actor(latent)
        action, _ = actor.sample(latent, torch.randn(100_000, 4))
        assert torch.allclose(std, torch.tensor(0.04))
        assert torch.allclose(torch.atanh(action).std(0), torch.tensor(0.04), rtol=0.02)
        actor.log_std.bias.copy_(torch.tensor([-50.0, 50.0, 0.0, 1.0]))
        assert actor(latent)[1][0].tolist() == pytest.approx([1e-5, 5.0, 1.0, math.e])


def test_density_integrates_to_one_and_matches_torch():
    torch.manual_seed(0)
    actor = Actor(latent_dim=8).double()
    latent = torch.randn(1, 8).double()
    mean, std = actor(latent)
    z = torch.linspace(-2.5, 2.5, 101).double()[:, None].expand(-1, 4)
    action, log_prob = actor.sample(latent.expand(101, 8), z)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, std), torch.distributions.TanhTransform()
    )
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(1), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        actor.mean.weight.zero_()
        actor.log_std.weight.zero_()
        actor.mean.bias.copy_(torch.tensor([0.3, 0.0, 0.0, 0.0]))
        actor.log_std.bias.fill_(math.log(0.6))
        # with the other three noises at 0 their log-densities are constants: log(1 / (0.6 sqrt(2 pi))) each
        a = torch.linspace(-1, 1, 20_003).double()[1:-1]
        noise = torch.zeros(len(a), 4).double()
        noise[:, 0] = (torch.atanh(a) - 0.3) / 0.6
        _, log_prob = actor.sample(latent.expand(len(a), 8), noise)
        rest = -3 * math.log(0.6 * math.sqrt(2 * math.pi))
        assert torch.trapezoid((log_prob - rest).exp(), a).item() == pytest.approx(1, abs=1e-3)


def test_log_prob_stays_finite_where_tanh_rounds_to_one():
    torch.manual_seed(0)
    actor, latent = Actor(latent_dim=8), torch.randn(2, 8)
    with torch.no_grad():
        actor.mean.bias.fill_(30.0)
    action, log_prob = actor.sample(latent, torch.randn(2, 4))
    assert (action == 1).all() and log_prob.isfinite().all()
    log_prob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in actor.parameters())


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_critics_equal_the_same_networks_one_at_a_time(activation):
    torch.manual_seed(0)
    critics = Critics(latent_dim=10, members=3, activation=activation)
    for parameter in critics.parameters():  # also the scales and shifts that start at one and zero
        torch.nn.init.normal_(parameter, std=0.3)
    latent, action = torch.randn(7, 10), torch.randn(7, 4)
    q = critics(latent, action)
    assert q.shape == (3, 7)
    squash = torch.tanh if activation == "tanh" else torch.nn.functional.silu
    for member in range(3):
        x = torch.cat([latent, action], 1)
        for layer in (critics.hidden1, critics.hidden2):
            y = x @ layer.weight[member] + layer.bias[member]
            centred = y - y.mean(1, keepdim=True)
            normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            x = squash(normed * layer.scale[member] + layer.shift[member])
        torch.testing.assert_close(q[member], (x @ critics.weight[member] + critics.bias[member])[:, 0])


def test_policy_spreads_its_actions_as_told():
    torch.manual_seed(0)
    policy, generator = Policy(cameras=1), torch.Generator().manual_seed(0)
    features, state = torch.randn(1, 512, 4, 4).half(), np.zeros(18, np.float32)
    mode = policy.act(features, state, 0.0, generator)
    assert mode.shape == (4,) and mode.dtype == np.float32
    assert (policy.act(features, state, 0.0, generator) == mode).all()
    with torch.no_grad():
        latent = policy.encoder(features[None], policy.normalizer(torch.zeros(1, 18)))
        std = policy.actor(latent)[1][0].numpy()
    for scale in (1.0, 0.25):
        samples = np.stack([policy.act(features, state, scale, generator) for _ in range(400)])
        before_tanh = np.arctanh(samples * 0.9999999)
        assert (np.abs(samples) <= 1).all()
        four_errors = float(4 * scale * std.max() / 20)
        assert before_tanh.mean(0) == pytest.approx(np.arctanh(mode), abs=four_errors)
        assert before_tanh.std(0) == pytest.approx(scale * std, rel=0.15)  # standard error 3.5 %


@pytest.mark.parametrize("entry", range(len(STATE)))
def test_every_state_entry_changes_the_action(entry):
    torch.manual_seed(0)
    policy, generator = Policy(cameras=1), torch.Generator()
    rng = np.random.default_rng(0)
    policy.normalizer.fit(rng.normal(0.3, 0.1, (50, 18)))
    features, state = torch.randn(1, 512, 4, 4), np.full(18, 0.3, np.float32)
    before = policy.act(features, state, 0.0, generator)
    state[entry] += STATE_FLOOR[entry]
    assert np.abs(policy.act(features, state, 0.0, generator) - before).max() > 1e-4
