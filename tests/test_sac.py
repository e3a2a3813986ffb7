import math

import numpy as np
import pytest
import torch
from torch import tensor

from so101.config import from_dict
from so101.errors import ConfigError, DataError
from so101.learn.replay import Batch
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
    alive = sac._td_target(batch._replace(terminated=torch.zeros(16, dtype=torch.bool)))
    over = sac._td_target(batch._replace(terminated=torch.ones(16, dtype=torch.bool)))
    assert torch.equal(over, batch.reward)
    assert ((alive - batch.reward) > 0.97 * 5).all()


def test_backup_entropy_adds_temperature_times_entropy():
    plain, paying = make_sac(temperature_init=0.5), make_sac(temperature_init=0.5, backup_entropy=True)
    batch = make_batch()._replace(terminated=torch.zeros(16, dtype=torch.bool))
    noise_state = plain.generator.get_state()
    difference = paying._td_target(batch) - plain._td_target(batch)
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
    seen = {round(sac._td_target(batch)[0].item() / 0.97) for _ in range(200)}
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
    action = sac.policy.act(features, state, True, generator)
    assert (other.policy.act(features, state, True, generator) != action).any()
    sent = sac.policy_tensors()
    other.policy.load_state_dict(sent)
    assert (other.policy.act(features, state, True, generator) == action).all()
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
    ("data", "said"),
    [({"discount": 1.5}, "discount: got 1.5"), ({"critics": 2, "subsample": 3}, "subsample: got 3")],
)
def test_config_refuses(data, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(SacConfig, data, "x.json")


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
    data = Batch(maps[image].half(), state, action, reward, last.bool(), maps[image].half(), then)
    for step in range(200):
        one_round(sac, Batch(*(rows[(torch.arange(32) + 32 * step) % 1024] for rows in data)))
    values = {}
    for side in (-1, 1):
        for end in (-1, 1):
            seen, maps_seen = torch.zeros(1, 18), maps[(side + 1) // 2]
            seen[0, 3] = end
            action = sac.policy.act(maps_seen, seen[0].numpy(), True, torch.Generator())
            assert action[0] * side * end > 0.7
            with torch.no_grad():
                latent = sac.policy.encoder(maps_seen[None], sac.policy.normalizer(seen))
                values[side, end] = sac.critics(latent, torch.from_numpy(action)[None]).mean().item()
    assert [values[-1, 1], values[1, 1]] == pytest.approx([1.0, 1.0], abs=0.25)
    # the first step is worth more than any reward, so the second one's value reached it, and less than 1.97
    assert 1.15 < values[-1, -1] < 2.1 and 1.15 < values[1, -1] < 2.1
