import numpy as np
import pytest
import torch
from torch import tensor

from so101.learn.gripper import choice, gripper_target
from so101.learn.networks import NORM_EPS
from so101.learn.replay import Batch, Replay, ViewEncoder
from so101.learn.resnet10 import load_resnet10
from so101.learn.sac import Sac, SacConfig

torch.set_num_threads(1)  # small products; a second thread would wait for cores that other tests use


def make_sac(seed=0, **options):
    torch.manual_seed(seed)
    return Sac(SacConfig(gripper="discrete", **options), cameras=1, size=1)


def make_batch(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    action = torch.cat([randn(count, 3).tanh(), torch.randint(-1, 2, (count, 1), generator=generator)], dim=1)
    return Batch(
        features=randn(count, 1, 512, 1, 1).half(), state=randn(count, 18), action=action, reward=randn(count),
        terminated=randn(count) > 0, next_features=randn(count, 1, 512, 1, 1).half(), next_state=randn(count, 18),
        changed=randn(count) > 0,
    )  # fmt: skip


def test_choice_is_the_nearest_of_close_stay_and_open():
    last = tensor([-1.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.0])
    assert choice(torch.cat([torch.ones(7, 3), last[:, None]], dim=1)).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_target_by_hand():
    # the online values pick, the slow ones tell: 0 - 0.02 + 0.5 * 3; terminated: 1 and nothing beyond; 2 + 0.5 * -1
    y = gripper_target(
        reward=tensor([0.0, 1.0, 2.0]),
        penalty=tensor([-0.02, 0.0, 0.0]),
        terminated=tensor([False, True, False]),
        next_q=tensor([[1.0, 9.0, 2.0], [5.0, 0.0, 0.0], [0.1, 0.0, 0.2]]),
        slow_next_q=tensor([[7.0, 3.0, 8.0], [5.0, 0.0, 0.0], [4.0, 4.0, -1.0]]),
        discount=0.5,
    )
    assert y.tolist() == pytest.approx([1.48, 1.0, 1.5])


def by_numpy(module, latent):
    """A GripperCritic's values (B, 3) in float64: linear, LayerNorm, tanh, linear, linear."""
    w = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
    x = latent.double().numpy() @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + NORM_EPS)
    x = np.tanh(x * w["mlp.1.weight"] + w["mlp.1.bias"]) @ w["mlp.3.weight"].T + w["mlp.3.bias"]
    return x @ w["mlp.4.weight"].T + w["mlp.4.bias"]


def test_loss_of_one_update_agrees_with_numpy_and_the_critics_pay_no_penalty():
    batch, critics_target = make_batch(), {}
    for penalty in (0.0, -0.02, -3.0):
        sac = make_sac(gripper_penalty=penalty, dropout=0.0)
        with torch.no_grad():
            for slow in (*sac.target_gripper.parameters(), *sac.target_encoder.parameters()):
                slow.add_(0.02 * torch.randn(slow.shape, generator=torch.Generator().manual_seed(slow.numel())))
            encoder, online, slow = sac.policy.encoder, sac.policy.gripper, sac.target_gripper
            q = by_numpy(online, encoder(batch.features, batch.state))
            next_q = by_numpy(online, encoder(batch.next_features, batch.next_state))
            slow_q = by_numpy(slow, sac.target_encoder(batch.next_features, batch.next_state))
        rows = np.arange(16)
        paid = batch.reward.numpy() + penalty * batch.changed.numpy()
        y = paid + 0.97 * ~batch.terminated.numpy() * slow_q[rows, next_q.argmax(1)]
        assert (slow_q[rows, next_q.argmax(1)] != slow_q.max(1)).any()  # or this were no double DQN
        wanted = np.square(q[rows, batch.action[:, 3].numpy().astype(int) + 1] - y).mean()
        metrics = sac.update_critic(batch)  # the first and only: no update in a group is left out
        assert metrics["gripper_loss"].item() == pytest.approx(wanted, rel=1e-4)
        critics_target[penalty] = metrics["td_target"].item()
    assert len(set(critics_target.values())) == 1


def test_both_losses_train_the_encoder_in_one_step_and_the_actor_trains_neither():
    batch, got = make_batch(), {}
    for kind in ("both", "gripper alone", "critics alone"):
        sac = make_sac(dropout=0.0, lr=0.0)
        with torch.no_grad():
            if kind == "critics alone":  # values that do not depend on the latent
                sac.policy.gripper.mlp[4].weight.zero_()
            if kind == "gripper alone":
                sac.critics.weight.zero_()
        sac.update_critic(batch)
        got[kind] = torch.cat([p.grad.flatten() for p in sac.policy.encoder.parameters()])
        assert (sac.policy.gripper.mlp[4].weight.grad != 0).any()
    torch.testing.assert_close(got["both"], got["gripper alone"] + got["critics alone"], rtol=1e-3, atol=1e-6)
    assert min(got["gripper alone"].norm(), got["critics alone"].norm()) > 0.1 * got["both"].norm()
    sac = make_sac()
    assert sac.policy.actor.mean.out_features == 3  # SAC moves the tool only
    before = sac.tensors()
    sac.update_actor(batch)
    changed = {name for name, tensor in sac.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("policy.actor.")}
    sac.update_critic(batch)
    sac.update_targets()
    after = sac.tensors()
    assert all(not torch.equal(after[name], before[name]) for name in before if "gripper.mlp.4" in name)


@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.parametrize("std_scale", [0.0, 1.0])
def test_acts_with_the_best_of_the_three_whatever_the_spread(best, std_scale):
    sac = make_sac()
    with torch.no_grad():
        sac.policy.gripper.mlp[4].bias[best] += 100
    action = sac.policy.act(torch.zeros(1, 512, 1, 1), np.zeros(18, np.float32), std_scale, torch.Generator())
    assert action.shape == (4,) and action.dtype == np.float32 and action[3] == best - 1
    assert any(name.startswith("gripper.") for name in sac.policy_tensors())  # so it travels to the actor


def test_a_change_is_counted_once_and_each_episode_starts_open(tmp_path):
    encoder = ViewEncoder(load_resnet10(None), 0, 4, seed=0)
    replay = Replay(encoder, tmp_path, {}, 1, 32, demo_capacity=20, online_capacity=20, seed=0)
    views, image = torch.zeros(1, 1, 512, 1, 1, dtype=torch.float16), np.zeros((1, 32, 32, 3), np.uint8)
    episodes = [[0, -1, -1, 0.2, -1, 1, 1, -0.3, 0, -0.9], [1, 0.7, -0.6, 0]]
    counted = [[0, 1, 0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 0]]
    for demonstration in (True, False):
        for told, wanted in zip(episodes, counted, strict=True):
            slots = [
                replay.add_observation(image, np.zeros(18, np.float32), views, demonstration)
                for _ in range(len(told) + 1)
            ]
            for slot, after, gripper in zip(slots, slots[1:], told, strict=False):
                action = np.array([1, -1, 1, gripper], np.float32)
                replay.add_transition(slot, after, action, 0.0, False, False, False)
            assert replay.changed[slots[:-1]].tolist() == wanted
    draw = replay.draw(64)
    assert (replay.gather(draw).changed.numpy() == replay.changed[draw.slots]).all()


def test_learns_the_values_of_a_small_mdp():
    """Discount 0.5, a change costs 0.2. A: close, a change, leads to B, stay and open to A again; reward 0. B: reward
    1 and the end. C leads to C, reward 1, always cut off by time.

    Gripper: B 1; A close -0.2 + 0.5 = 0.3, stay and open 0.5 * 0.3; C 1 + 0.5 * 2. The critics do not see what the
    gripper does: with a third of A's transitions each way, v = (0.5 * 1 + 2 * 0.5 v) / 3 = 0.25. B 1, C 2.
    """
    sac = make_sac(discount=0.5, gripper_penalty=-0.2, tau=0.3, lr=3e-3, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    a, b, c = range(3)
    start, gripper = torch.arange(3).repeat_interleave(6), torch.arange(-1, 2).repeat(6)
    after = torch.where((start == a) & (gripper == -1), b, start)
    maps, states = torch.randn(1, 1, 512, 1, 1, generator=generator), 2 * torch.eye(3, 18)
    seen = maps.expand(18, -1, -1, -1, -1)
    for _ in range(90):
        motion = torch.rand(18, 3, generator=generator) * 2 - 1
        action = torch.cat([motion, gripper[:, None]], dim=1)
        reward, changed = (start != a).float(), (start == a) & (gripper == -1)
        sac.update_critic(Batch(seen, states[start], action, reward, start == b, seen, states[after], changed))
        sac.update_targets()
    with torch.no_grad():
        latent = sac.policy.encoder(maps.expand(3, -1, -1, -1, -1), states)
        values, q = sac.policy.gripper(latent), sac.critics(latent, torch.zeros(3, 3)).mean(0)
    assert values[a].tolist() == pytest.approx([0.3, 0.15, 0.15], abs=0.03)
    assert values[b].tolist() == pytest.approx([1.0] * 3, abs=0.03)
    assert values[c].tolist() == pytest.approx([2.0] * 3, abs=0.06)
    assert q.tolist() == pytest.approx([0.25, 1.0, 2.0], abs=0.06)
