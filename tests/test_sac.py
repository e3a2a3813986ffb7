import math

import numpy as np
import pytest
import torch
from torch import tensor

import infer
from so101.config import from_dict
from so101.errors import ConfigError, DataError
from so101.learn.networks import feature_maps
from so101.learn.replay import Batch
from so101.learn.resnet10 import load_resnet10
from so101.learn.sac import Sac, SacConfig, td_target

torch.set_num_threads(1)  # small products; a second thread would wait for cores that other tests use


def make_batch(count=16, cameras=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return Batch(
        features=randn(count, cameras, 512, 4, 4).half(),
        state=randn(count, 18),
        action=randn(count, 4).tanh(),
        reward=(randn(count) > 1).float(),
        terminated=randn(count) > 1,
        next_features=randn(count, cameras, 512, 4, 4).half(),
        next_state=randn(count, 18),
        changed=randn(count) > 1,
    )


def make_sac(seed=0, **options):
    torch.manual_seed(seed)
    return Sac(SacConfig(**options), cameras=1)


def test_td_target_by_hand():
    # alive: 0.1 + 0.5 min(4, 6) = 2.1; terminated: 1 and nothing beyond; last: -1 - 0.5 * 3
    y = td_target(
        reward=tensor([0.1, 1.0, -1.0]),
        terminated=tensor([False, True, False]),
        next_q=tensor([[4.0, 8.0, -3.0], [6.0, 9.0, 5.0]]),
        discount=0.5,
    )
    assert y.tolist() == pytest.approx([2.1, 1.0, -2.5])


def test_truncated_transition_bootstraps_terminated_does_not():
    sac, batch = make_sac(), make_batch()
    with torch.no_grad():
        sac.target_critics.bias += 10  # every next value is about 10
    alive = sac._targets(batch._replace(terminated=torch.zeros(16, dtype=torch.bool)))[0]
    over = sac._targets(batch._replace(terminated=torch.ones(16, dtype=torch.bool)))[0]
    assert torch.equal(over, batch.reward)
    assert ((alive - batch.reward) > 0.97 * 5).all()


def test_backup_entropy_adds_temperature_times_entropy():
    plain, paying = make_sac(temperature_init=0.5), make_sac(temperature_init=0.5, backup_entropy=True)
    batch = make_batch()._replace(terminated=torch.zeros(16, dtype=torch.bool))
    noise_state = plain.generator.get_state()
    difference = paying._targets(batch)[0] - plain._targets(batch)[0]
    plain.generator.set_state(noise_state)  # the same next actions again, for their log-density
    with torch.no_grad():
        embedded = plain.policy.encoder.embed(batch.next_features)
        latent = plain.policy.encoder.join(plain._drop(embedded), plain.policy.normalizer(batch.next_state))
        _, log_prob = plain._sample(latent)
    torch.testing.assert_close(difference, -0.97 * 0.5 * log_prob)


def test_subsample_takes_the_minimum_over_some_critics_only():
    sac, batch = make_sac(critics=10, subsample=1, dropout=0.0), make_batch(4)
    batch = batch._replace(terminated=torch.zeros(4, dtype=torch.bool), reward=torch.zeros(4))
    with torch.no_grad():
        sac.target_critics.weight.zero_()  # critic e says e
        sac.target_critics.bias.copy_(torch.arange(10.0).view(10, 1, 1))
    seen = {round(sac._targets(batch)[0][0].item() / 0.97) for _ in range(200)}
    assert seen == set(range(10))


def grouped_changes(sac, update):
    before = sac.tensors()
    update()
    after = sac.tensors()
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_each_loss_trains_its_own_tensors_and_no_other():
    sac, batch = make_sac(), make_batch()
    names = {name for name, _ in sac.named_parameters()}
    actor = {name for name in names if name.startswith("policy.actor.")}
    critic = {name for name in names if name.startswith(("policy.encoder.", "critics."))}
    assert len(actor) == 12 and len(critic) == 19
    assert grouped_changes(sac, lambda: sac.update_critic(batch)) == critic
    sac.critic_optimizer.zero_grad()
    assert grouped_changes(sac, lambda: sac.update_actor(batch)) == actor
    assert all(parameter.grad is None for parameter in sac._fast)  # nor is time spent on their gradients
    log_prob = sac.update_actor(batch)["log_prob"]
    assert grouped_changes(sac, lambda: sac.update_temperature(log_prob)) == {"log_temperature"}
    slow = grouped_changes(sac, sac.update_targets)
    assert slow == {name for name in names if name.startswith("target_")}


def test_actor_gradient_agrees_with_finite_differences():
    sac, batch = make_sac(temperature_init=0.3, lr=0.0).double(), make_batch(8)
    batch = Batch(*(t.double() if t.is_floating_point() else t for t in batch))
    state = sac.generator.get_state()
    weight = sac.policy.actor.mean.weight

    def loss():
        sac.generator.set_state(state)
        return sac.update_actor(batch)["actor_loss"].item()

    loss()
    gradient, step = weight.grad[1, 7].item(), 1e-5
    weight.data[1, 7] += step
    high = loss()
    weight.data[1, 7] -= 2 * step
    low = loss()
    assert gradient == pytest.approx((high - low) / (2 * step), rel=1e-5) and abs(gradient) > 1e-9


def test_targets_move_by_tau():
    sac = make_sac(tau=0.25)
    with torch.no_grad():
        sac.critics.bias.fill_(8.0)
        sac.target_critics.bias.fill_(4.0)
        sac.policy.encoder.state.bias.fill_(-4.0)
    sac.update_targets()
    assert sac.target_critics.bias.flatten().tolist() == [5.0, 5.0]  # 4 + 0.25 (8 - 4)
    assert sac.target_encoder.state.bias[0].item() == -1.0


def test_every_state_entry_changes_the_value():
    sac, batch = make_sac(), make_batch(1)
    with torch.no_grad():
        states = batch.state + torch.cat([torch.zeros(1, 18), 0.1 * torch.eye(18)])
        latent = sac.policy.encoder(batch.features.expand(19, -1, -1, -1, -1), sac.policy.normalizer(states))
        q = sac.critics(latent, batch.action.expand(19, 4))
    assert ((q[:, 1:] - q[:, :1]).abs() > 1e-5).all()


@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (-1.0, False)])
def test_temperature_rises_where_entropy_is_under_the_target(entropy, rises):
    sac = make_sac(target_entropy=-2.0)
    after = sac.update_temperature(torch.full((16,), -entropy))["temperature"].item()
    assert after == pytest.approx(0.01 * math.exp(3e-4 if rises else -3e-4), rel=1e-4)  # Adam's first step is lr


def test_actor_q_mean_and_min():
    batch = make_batch()
    losses = {}
    for kind in ("mean", "min"):
        sac = make_sac(actor_q=kind, temperature_init=1e-9)
        with torch.no_grad():
            sac.critics.weight.zero_()
            sac.critics.bias.copy_(tensor([3.0, 7.0]).view(2, 1, 1))
        losses[kind] = sac.update_actor(batch)["actor_loss"].item()
    assert losses == pytest.approx({"mean": -5.0, "min": -3.0}, abs=1e-6)


def one_round(sac, batch):
    sac.update_critic(batch)
    sac.update_temperature(sac.update_actor(batch)["log_prob"])
    sac.update_targets()


def test_resume_is_bit_exact(tmp_path):
    sac, batches = make_sac(), [make_batch(8, seed=seed) for seed in range(5)]
    for batch in batches[:2]:
        one_round(sac, batch)
    torch.save({"tensors": sac.tensors(), "training": sac.training_state()}, tmp_path / "state.pt")
    for batch in batches[2:]:
        one_round(sac, batch)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make_sac(seed=99)
    resumed.load_tensors(saved["tensors"])
    resumed.load_training_state(saved["training"])
    for batch in batches[2:]:
        one_round(resumed, batch)
    wanted = sac.tensors()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in resumed.tensors().items())


def test_policy_that_travelled_acts_the_same():
    sac, other, batch = make_sac(0), make_sac(1), make_batch()
    sac.policy.normalizer.fit(batch.state)
    one_round(sac, batch)
    features, state = batch.features[0], np.linspace(-1, 1, 18, dtype=np.float32)
    generator = torch.Generator()
    action = sac.policy.act(features, state, 0.0, generator)
    assert (other.policy.act(features, state, 0.0, generator) != action).any()
    sent = sac.policy_tensors()
    other.policy.load_state_dict(sent)
    assert (other.policy.act(features, state, 0.0, generator) == action).all()
    one_round(sac, batch)  # what was sent is a copy, not a view of weights that go on changing
    assert torch.equal(sent["actor.mean.weight"], other.policy.actor.mean.weight)


def test_loading_is_strict():
    sac = make_sac()
    tensors = sac.tensors()
    name = "policy.normalizer.mean"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    for wrong, said in (
        (without, f'Missing key.*"{name}"'),
        ({**tensors, "extra": torch.zeros(1)}, 'Unexpected key.*"extra"'),
        ({**tensors, name: torch.zeros(6)}, rf"{name}: .*\(\[6\]\) from checkpoint, .*\(\[18\]\)"),
    ):
        with pytest.raises(DataError, match=f"^checkpoint: does not fit; use the config.*{said}"):
            sac.load_tensors(wrong)


def test_metrics_are_tensors():
    sac, batch = make_sac(), make_batch()
    metrics = {**sac.update_critic(batch), **sac.update_actor(batch)}
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("cls", "data", "said"),
    [
        (SacConfig, {"discount": 1.5}, "discount: got 1.5"),
        (SacConfig, {"critics": 2, "subsample": 3}, "subsample: got 3"),
        (SacConfig, {"n_obs_steps": 2}, "n_obs_steps: got 2, must be one of 1, 3"),
        (SacConfig, {"gripper_penalty": 0.02}, "gripper_penalty: got 0.02"),
        (infer.Config, {"std_scale": 1.5}, "std_scale: got 1.5"),
    ],
)
def test_config_refuses(cls, data, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(cls, data, "x.json")


def test_learns_what_image_and_state_say_together():
    """Two steps; in each the reward is (1 + s a) / 2, where s = +-1 is the image's sign times the state's.

    Best is a = s in both: worth 1 in the last step and 1 + 0.97 in the first, random actions half of it.
    """
    sac = make_sac(lr=2e-3, tau=0.1, target_entropy=-4.0)
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 1, 512, 4, 4, generator=rng)
    image, last = torch.randint(0, 2, (2, 1024), generator=rng)
    state, then = torch.zeros(2, 1024, 18)
    state[:, 3], then[:, 3] = 2.0 * last - 1, 1.0
    action = torch.rand(1024, 4, generator=rng) * 2 - 1
    reward = (1 + (2 * image - 1) * state[:, 3] * action[:, 0]) / 2
    data = Batch(maps[image].half(), state, action, reward, last.bool(), maps[image].half(), then, last.bool())
    for step in range(200):
        one_round(sac, Batch(*(rows[(torch.arange(32) + 32 * step) % 1024] for rows in data)))
    values = {}
    for side in (-1, 1):
        for end in (-1, 1):
            seen, maps_seen = torch.zeros(1, 18), maps[(side + 1) // 2]
            seen[0, 3] = end
            action = sac.policy.act(maps_seen, seen[0].numpy(), 0.0, torch.Generator())
            assert action[0] * side * end > 0.7
            with torch.no_grad():
                latent = sac.policy.encoder(maps_seen[None], sac.policy.normalizer(seen))
                values[side, end] = sac.critics(latent, torch.from_numpy(action)[None]).mean().item()
    assert [values[-1, 1], values[1, 1]] == pytest.approx([1.0, 1.0], abs=0.25)
    # the first step is worth more than any reward, so the second one's value reached it, and less than 1.97
    assert 1.15 < values[-1, -1] < 2.1 and 1.15 < values[1, -1] < 2.1


def numbers(module):
    return {name: p.detach().double().numpy() for name, p in module.state_dict().items()}


def norm(x, scale=1.0, shift=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift


def encode(w, features, state):
    """The encoder of one camera by numpy: (B, 1, 512, h, w) and (B, 18) -> (B, 320)."""
    embedded = np.einsum("bcp,cpf->bcf", features[:, 0].reshape(len(features), 512, -1), w["heads.0.embedding.kernel"])
    image = embedded.reshape(len(features), -1) @ w["heads.0.linear.weight"].T + w["heads.0.linear.bias"]
    image = np.tanh(norm(image, w["heads.0.norm.weight"], w["heads.0.norm.bias"]))
    state = norm(state @ w["state.weight"].T + w["state.bias"], w["state_norm.weight"], w["state_norm.bias"])
    return np.concatenate([image, np.tanh(state)], axis=1)


def values(w, latent, action):
    """The critics by numpy: (B, 320) and (B, 4) -> (E, B)."""
    x = np.concatenate([latent, action], axis=1)[None]
    for layer in ("hidden1", "hidden2"):
        x = x @ w[f"{layer}.weight"] + w[f"{layer}.bias"]
        x = np.tanh(norm(x, w[f"{layer}.scale"], w[f"{layer}.shift"]))
    return (x @ w["weight"] + w["bias"])[..., 0]


def test_critic_loss_and_target_agree_with_numpy():
    sac, batch = make_sac(dropout=0.0), make_batch(8)
    with torch.no_grad():  # slow copies of their own, or a target taken from the fast ones would not show
        for slow in sac._slow:
            slow.add_(0.03 * torch.randn(slow.shape, generator=torch.Generator().manual_seed(slow.numel())))
    rows = {name: tensor.double().numpy() for name, tensor in batch._asdict().items()}
    noise = torch.randn(8, 4, generator=torch.Generator().set_state(sac.generator.get_state())).double().numpy()
    encoder, actor = numbers(sac.policy.encoder), numbers(sac.policy.actor)
    x = encode(encoder, rows["next_features"], rows["next_state"])
    for layer in (0, 3):
        x = x @ actor[f"mlp.{layer}.weight"].T + actor[f"mlp.{layer}.bias"]
        x = np.tanh(norm(x, actor[f"mlp.{layer + 1}.weight"], actor[f"mlp.{layer + 1}.bias"]))
    std = np.clip(np.exp(x @ actor["log_std.weight"].T + actor["log_std.bias"]), 1e-5, 5)
    next_action = np.tanh(x @ actor["mean.weight"].T + actor["mean.bias"] + std * noise)
    slow_latent = encode(numbers(sac.target_encoder), rows["next_features"], rows["next_state"])
    next_q = values(numbers(sac.target_critics), slow_latent, next_action).min(axis=0)
    y = rows["reward"] + 0.97 * (1 - rows["terminated"]) * next_q
    q = values(numbers(sac.critics), encode(encoder, rows["features"], rows["state"]), rows["action"])
    metrics = sac.update_critic(batch)
    assert metrics["td_target"].item() == pytest.approx(y.mean(), rel=1e-4)
    assert metrics["q"].item() == pytest.approx(q.mean(), rel=1e-4)
    assert metrics["critic_loss"].item() == pytest.approx(np.square(q - y).mean(), rel=1e-4)


def make_pixels(count=4, cameras=1, seed=0):
    """A batch of frames of 32 x 32 pixels, for an encoder that is trained."""
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.integers(0, 256, (2, count, cameras, 32, 32, 3), dtype=np.uint8))
    return make_batch(count)._replace(features=pixels[0], next_features=pixels[1])


def make_trained(trunk=None, **options):
    torch.manual_seed(0)
    return Sac(SacConfig(features="trained", **options), cameras=1, size=1, trunk=trunk)


@pytest.fixture(scope="module")
def trunk():
    return load_resnet10(None)


@pytest.mark.parametrize("trained", [False, True])
def test_critic_gradients_agree_with_finite_differences(trunk, trained):
    """Of each part that the critics' loss trains, along a random direction, in float64, towards a fixed target."""
    sac = (make_trained(trunk, lr=0.0, encoder_lr=0.0) if trained else make_sac(lr=0.0)).double()
    batch = make_pixels(2) if trained else make_batch(4)
    target = sac._targets(batch)
    sac._targets = lambda batch: target
    parts = [sac.critics, sac.policy.encoder] + ([sac.policy.trunk] if trained else [])
    for part in parts:
        parameters, rng, step = list(part.parameters()), torch.Generator().manual_seed(1), 1e-6
        directions = [torch.randn(p.shape, generator=rng).double() for p in parameters]
        sac.update_critic(batch)  # a step of size 0, which leaves gradients
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))
        torch._foreach_add_([p.data for p in parameters], directions, alpha=step)
        high = sac.update_critic(batch)["critic_loss"].item()
        torch._foreach_add_([p.data for p in parameters], directions, alpha=-2 * step)
        low = sac.update_critic(batch)["critic_loss"].item()
        assert slope == pytest.approx((high - low) / (2 * step), rel=1e-4) and abs(slope) > 1e-4


def test_encoder_is_trained_by_the_critics_alone_at_its_own_rate(trunk):
    sac, batch = make_trained(trunk, lr=1e-3, encoder_lr=1e-5, tau=0.25), make_pixels()
    named = dict(sac.policy.trunk.named_parameters())
    assert len(named) == 36 and all(torch.equal(p, dict(trunk.named_parameters())[n]) for n, p in named.items())
    assert all(not p.requires_grad for p in (*trunk.parameters(), *sac.target_trunk.parameters()))
    sac.update_actor(batch)
    assert all(p.grad is None and torch.equal(p, trunk.get_parameter(n)) for n, p in named.items())
    slow = [p.clone() for p in sac.target_trunk.parameters()]
    sac.update_critic(batch)
    moved = [(p.detach() - trunk.get_parameter(n)).abs() for n, p in named.items()]
    # Adam's first step is its step size wherever there is a gradient (of a 3x3 kernel on a 1x1 map only the middle
    # has one); a float32 weight of 1 rounds it by 6e-8
    assert all((tensor > 0).any() and tensor.max() < 1.1e-5 for tensor in moved)
    assert all(tensor[tensor > 0].median().item() == pytest.approx(1e-5, rel=0.02) for tensor in moved)
    assert all(torch.equal(p, old) for p, old in zip(sac.target_trunk.parameters(), slow, strict=True))
    sac.update_targets()
    for now, old, fast in zip(sac.target_trunk.parameters(), slow, sac.policy.trunk.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.25 * (fast - old))
    assert {f"trunk.{name}" for name in named} < set(sac.policy_tensors())  # it travels to the actor


def test_trained_encoder_starts_where_the_frozen_one_stands(trunk):
    """On the same pixels the same loss, and the same gradients for what both train; the targets by the slow trunk."""
    batch = make_pixels()
    with torch.no_grad():
        features, after = (feature_maps(trunk, pixels) for pixels in (batch.features, batch.next_features))
    results = []
    for trained in (False, True):
        torch.manual_seed(0)
        kind = SacConfig(features="trained" if trained else "pixels", dropout=0.0)
        sac = Sac(kind, cameras=1, size=1, trunk=trunk)
        sac.load_state_dict(make_trained(trunk, dropout=0.0).state_dict(), strict=trained)
        sac.generator.manual_seed(0)
        seen = batch if trained else batch._replace(features=features, next_features=after)
        loss = sac.update_critic(seen)["critic_loss"].item()
        heads = [*sac.policy.encoder.parameters(), *sac.critics.parameters()]
        results.append((loss, torch.cat([p.grad.flatten() for p in heads])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)
    sac.generator.manual_seed(1)
    target = sac._targets(batch)[0]
    with torch.no_grad():
        sac.target_trunk.embedder[0].weight.mul_(-1)
    sac.generator.manual_seed(1)  # the same next actions, other values
    alive = ~batch.terminated
    assert (sac._targets(batch)[0] != target)[alive].all()


def test_a_stack_is_seen_as_further_cameras():
    torch.manual_seed(0)
    sac = Sac(SacConfig(n_obs_steps=3), cameras=2, size=1)
    assert sac.policy.encoder.latent_dim == 6 * 256 + 64  # the state is there once
    features, state = torch.randn(6, 512, 1, 1), np.zeros(18, np.float32)
    before = sac.policy.act(features, state, 0.0, torch.Generator())
    for frame in range(6):
        other = features.clone()
        other[frame] += 1
        assert (sac.policy.act(other, state, 0.0, torch.Generator()) != before).any()


def test_resume_is_bit_exact_with_every_option(trunk, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        return Sac(SacConfig(features="trained", gripper="discrete"), cameras=1, size=1, trunk=trunk)

    sac, batches = make(0), [make_pixels(2, seed=seed) for seed in range(2)]
    one_round(sac, batches[0])
    torch.save({"tensors": sac.tensors(), "training": sac.training_state()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make(9)
    resumed.load_tensors(saved["tensors"])
    resumed.load_training_state(saved["training"])
    one_round(sac, batches[1])
    one_round(resumed, batches[1])
    wanted = sac.tensors()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in resumed.tensors().items())
    assert [group["lr"] for group in resumed.critic_optimizer.param_groups] == [3e-4, 1e-4]
