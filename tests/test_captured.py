import copy

import numpy as np
import pytest
import torch
from test_replay import add_episode, blank, frame, make_replay, state
from torch.utils._python_dispatch import TorchDispatchMode

from so101.errors import DataError
from so101.learn import captured
from so101.learn.captured import DeviceReplay, UpdateGroups, lacking_graphs, lacking_memory
from so101.learn.replay import Draw
from so101.learn.resnet10 import load_resnet10
from so101.learn.sac import Sac, SacConfig

torch.set_num_threads(1)  # small products; a second thread would wait for cores that other tests use

MODES = {
    "plain": {"cameras": 2},
    "everything": {
        "n_obs_steps": 3, "gripper": "discrete", "critics": 4, "subsample": 2, "actor_every": 3, "actor_q": "min",
        "backup_entropy": True,
    },
    "pixels": {"features": "pixels", "actor_every": 1},
    "pixels of stacks": {"features": "pixels", "n_obs_steps": 3, "cameras": 2, "views": 0},
    "trained": {"features": "trained", "n_obs_steps": 3, "actor_every": 1},
}  # fmt: skip


def modes(*quick):
    """The modes as parameters of a test, those that are not `quick` in the slow suite."""
    return [
        pytest.param(options, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, options in MODES.items()
    ]


@pytest.fixture(scope="module")
def trunk():
    return load_resnet10(None)


def some_views(time, views, cameras):
    generator = torch.Generator().manual_seed(time)
    return torch.randn(1 + views, cameras, 512, 1, 1, generator=generator).half()


def fill(replay, rng, steps=1, start=0):
    """Random episodes, each `start` + 1000 n + step in its states; returns each time the slots it used."""
    cached, cameras = replay.features == "cached", replay.images.shape[1]
    for number in range(steps):
        time = start + 100 * number
        demonstration, length = number % 3 == 0, int(rng.integers(2, 6))
        if demonstration and replay.demo_count + length + 1 > replay.demo_capacity:
            demonstration = False
        used, human = [], rng.random() < 0.4
        for step in range(length + 1):
            views = some_views(time + step, replay.encoder.views, cameras) if cached else None
            images = frame((time + step) % 256, cameras)
            used.append(replay.add_observation(images, state(time + step), views, demonstration))
            if step:
                action = rng.uniform(-1, 1, 4).astype(np.float32)
                replay.add_transition(*used[-2:], action, rng.random(), step == length, False, human)
        yield demonstration, used


def make(trunk, folder, cameras=1, groups=True, device="cpu", **options):
    """A filled replay and a learner of it, the same ones each time."""
    config = SacConfig(**{"batch_size": 7, "views": 2, "utd_ratio": 1, **options})
    replay = make_replay(
        trunk, folder, views=config.views, cameras=cameras, frames=config.n_obs_steps, features=config.features
    )
    list(fill(replay, np.random.default_rng(0), 6))
    torch.manual_seed(0)
    sac = Sac(config, cameras, device, size=1, trunk=trunk)
    sac.policy.normalizer.fit(np.random.default_rng(0).normal(300, 200, (50, 18)))
    return sac, replay, UpdateGroups(sac, replay) if groups else None


def cropped(replay, slots, offsets):
    """Frames (B, frames, cameras, S, S, 3) edge-padded and cropped one by one, by numpy."""
    pad, size = replay.encoder.pad, replay.images.shape[2]
    padding = [(pad, pad), (pad, pad), (0, 0)]
    shifted = np.empty((*replay.history[slots].shape, *replay.images.shape[1:]), np.uint8)
    for index in np.ndindex(shifted.shape[:3]):
        row, number, camera = index
        padded = np.pad(replay.images[replay.history[slots[row], number], camera], padding, "edge")
        top, left = offsets[index]
        shifted[index] = padded[top : top + size, left : left + size]
    return torch.from_numpy(shifted).flatten(1, 2)


def batch_of(replay, draw):
    """The batch that the host's own replay makes of what was drawn on the device."""
    slots, looks, next_looks = (tensor.numpy() for tensor in draw)
    if replay.features == "cached":
        return replay.gather(Draw(slots, looks, next_looks))
    seen = [cropped(replay, slots, looks), cropped(replay, replay.next_slot[slots], next_looks)]
    if replay.features == "pixels":
        seen = [replay.encoder.run_trunk(pixels) for pixels in seen]
    return replay._batch(Draw(slots, looks, next_looks), *seen)


def updates_one_by_one(sac, sample, count):
    """The learner's loop as train_sac.py has it."""
    for number in range(1, count + 1):
        batch = sample()
        metrics = sac.update_critic(batch)
        if number % sac.config.actor_every == 0:
            metrics |= sac.update_actor(batch)
            metrics |= sac.update_temperature(metrics.pop("log_prob"))
        sac.update_targets()
    return metrics


def compare(sac, other, **tolerances):
    """Equal to rounding, the random draws taken so far to the bit; without tolerances everything to the bit."""
    assert torch.equal(sac.generator.get_state(), other.generator.get_state())
    for (name, got), wanted in zip(sac.state_dict().items(), other.state_dict().values(), strict=True):
        options = tolerances or {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}", **options)


@pytest.mark.parametrize("options", modes("plain", "pixels"))
def test_groups_equal_single_updates_on_the_same_draws(trunk, tmp_path, options):
    sac, replay, groups = make(trunk, tmp_path / "a", **options)
    before = sac.tensors()
    groups.run(1)
    groups.run(1)
    other, same, _ = make(trunk, tmp_path / "b", groups=False, **options)
    mirror = DeviceReplay(same, 7, torch.device("cpu"))
    mirror.update()
    metrics = updates_one_by_one(
        other, lambda: batch_of(same, mirror.draw(other.generator)), 2 * sac.config.actor_every
    )
    compare(sac, other, rtol=1e-5, atol=1e-6)
    assert groups.metrics() == pytest.approx({name: m.item() for name, m in metrics.items()}, rel=1e-4)
    still = {name for name, tensor in sac.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {"policy.normalizer.mean", "policy.normalizer.std"}  # all that is trained was


def test_without_room_for_a_copy_updates_are_those_of_the_host(trunk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(captured, "lacking_memory", lambda *_: "the card is full")
    sac, _, groups = make(trunk, tmp_path / "a")
    assert capsys.readouterr().out == "updates run one operation at a time, not as a CUDA graph: the card is full\n"
    groups.run(1)
    other, same, _ = make(trunk, tmp_path / "b", groups=False)
    updates_one_by_one(other, lambda: same.sample(7), 2)
    compare(sac, other)


def test_reasons_against_a_graph(trunk, tmp_path, monkeypatch):
    assert lacking_graphs(torch.device("cpu")) == "device cpu has none"
    monkeypatch.setattr(torch.version, "hip", None)
    assert lacking_graphs(torch.device("cuda")) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert lacking_graphs(torch.device("cuda:1")) == "ROCm 6.4 has none"
    replay = make_replay(trunk, tmp_path)  # 50 slots of 3 views of 1024 bytes, and 8 + 8 + 72 + 16 + 4 + 1 + 1
    needed = 50 * (3 * 1024 + 110) + 1_000_000_000
    assert lacking_memory(replay, 8, needed) is None and lacking_memory(replay, 8, None) is None
    said = "replay and updates need 1.0 GB and 1.0 GB are free on the card"
    assert lacking_memory(replay, 8, needed - 1).startswith(said)
    pixels = make_replay(trunk, tmp_path, features="pixels", frames=3)
    needed = 50 * (32 * 32 * 3 + 126) + 1_000_000_000 + 200 * 32 * 32 * 3 * 8 * 3
    assert lacking_memory(pixels, 8, needed) is None and lacking_memory(pixels, 8, needed - 1)


class Operations(TorchDispatchMode):
    """Notes each operation with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        self.seen.append((func.name(), shapes))
        return func(*args, **(kwargs or {}))


# Reading a value, making a tensor from Python numbers, and what has as many entries as there are trues: each makes
# the host wait for a card or copy to it, which ends a capture.
NOT_IN_A_GRAPH = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "item", "equal")


@pytest.mark.parametrize("options", modes("plain"))
def test_a_group_is_always_the_same_operations_and_none_waits_for_the_host(trunk, tmp_path, options):
    _, replay, groups = make(trunk, tmp_path, **options)
    groups.run(1)  # Adam sets itself up
    rng, lists = np.random.default_rng(1), []
    for number in range(2):
        list(fill(replay, rng, 4, start=1000 * (1 + number)))  # other counts and slots
        groups.mirror.update()
        with Operations() as operations:
            groups._group()
        lists.append(operations.seen)
    assert len(lists[0]) > 200 and lists[0] == lists[1]
    found = {name for name, _ in lists[0] for word in NOT_IN_A_GRAPH if word in name}
    assert not found


def check_copy(replay, mirror):
    """All that a sample can reach is equal here and there."""
    demos, online = replay.pools
    filled = [pool for pool in (demos, online) if len(pool)]
    for row, pool, count in zip(mirror.pool, (filled[0], filled[-1]), (mirror.count[0], mirror.count[-1]), strict=True):
        assert count == len(pool) and np.array_equal(row[:count], pool)
    starts = np.concatenate(filled)
    slots = np.unique([*starts, *replay.next_slot[starts]])
    slots = np.unique([*slots, *replay.history[slots].flat])
    for name in ("history", "next_slot", "state", "action", "reward", "terminated", "changed"):
        assert np.array_equal(mirror.tensors[name].numpy()[slots], getattr(replay, name)[slots]), name
    seen = replay.images if replay.file is None else replay.file.features
    assert np.array_equal(mirror.tensors["seen"].numpy()[slots], seen[slots])


@pytest.mark.parametrize("features", ["cached", "pixels"])
def test_copy_follows_random_additions_corrections_discards_and_refreshes(trunk, tmp_path, features):
    rng = np.random.default_rng(2)
    replay = make_replay(trunk, tmp_path, online=23, frames=3, features=features)
    episodes = fill(replay, rng, 60)
    mirror, generator = None, torch.Generator().manual_seed(0)
    for number, (demonstration, used) in enumerate(episodes):
        if number == 4:
            mirror = DeviceReplay(replay, 16, torch.device("cpu"))
        choice = rng.integers(4)
        if choice == 0 and not demonstration:
            replay.discard(used)
        elif choice == 1:
            replay.correct(used[-2], 7.0, True)
        elif choice == 2:
            replay.refresh()
        if mirror is not None and rng.random() < 0.7:
            mirror.update()
            check_copy(replay, mirror)
            draw = mirror.draw(generator)
            demos, online = map(set, replay.pools)
            assert set(draw.slots[:8].tolist()) <= demos and set(draw.slots[8:].tolist()) <= online
            if features == "cached":  # from pixels it takes longer
                batch = mirror.gather(draw)
                assert torch.equal(batch.next_state, batch.state + 1)  # never across episodes
    assert replay.online_count > 2 * 23


def test_copy_checks_catch_a_slot_that_was_not_followed(trunk, tmp_path):
    _, replay, groups = make(trunk, tmp_path)
    groups.run(1)
    replay.reward[replay.pools[1][3]] += 1  # behind replay's back
    with pytest.raises(AssertionError, match="reward"):
        check_copy(replay, groups.mirror)


def chi_square(drawn, pool):
    """Of how often each of `pool` was drawn, divided by its degrees of freedom: about 1, above 1.5 for no even draw."""
    counts = np.array([(drawn == slot).sum() for slot in pool])
    assert counts.sum() == len(drawn)
    expected = len(drawn) / len(pool)
    return ((counts - expected) ** 2 / expected).sum() / (len(pool) - 1)


def test_draws_are_half_and_half_and_even(trunk, tmp_path):
    replay = make_replay(trunk, tmp_path, demos=200, online=200)
    add_episode(replay, 0, 100, demonstration=True, views=blank())
    generator = torch.Generator().manual_seed(0)
    mirror = DeviceReplay(replay, 20_001, torch.device("cpu"))
    mirror.update()
    assert 0.6 < chi_square(mirror.draw(generator).slots.numpy(), range(100)) < 1.5  # all of what there is
    add_episode(replay, 110, 120, human=range(40, 70), views=blank())
    mirror.update()
    draw = mirror.draw(generator)
    slots, (demos, online) = draw.slots.numpy(), replay.pools
    assert len(demos) == 130 and len(online) == 120
    assert 0.6 < chi_square(slots[:10_000], demos) < 1.5  # of an odd batch the smaller half, as Replay.draw has it
    assert 0.6 < chi_square(slots[10_000:], online) < 1.5
    for looks in (draw.looks.numpy(), draw.next_looks.numpy()):
        assert 0 < chi_square(looks, [1, 2]) < 10  # never the unshifted view
    assert (draw.looks == draw.next_looks).float().mean() == pytest.approx(0.5, abs=0.02)
    alone = make_replay(trunk, tmp_path / "alone")
    mirror = DeviceReplay(alone, 64, torch.device("cpu"))
    with pytest.raises(DataError, match="no transition to learn from"):
        mirror.update()
    add_episode(alone, 100, 3, views=blank())
    mirror.update()
    assert set(mirror.draw(generator).slots.tolist()) == {20, 21, 22}


def test_shifts_are_even_and_each_ones_own(trunk, tmp_path):
    def shifts(features, views=2):
        replay = make_replay(trunk, tmp_path, views=views, cameras=2, frames=3, features=features)
        list(fill(replay, np.random.default_rng(0), 2))
        mirror = DeviceReplay(replay, 4000, torch.device("cpu"))
        mirror.update()
        draw = mirror.draw(torch.Generator().manual_seed(0))
        assert draw.looks.shape == draw.next_looks.shape == (4000, 3, 2, 2)
        return torch.stack([draw.looks, draw.next_looks]).numpy()  # now or next, which, frame, camera, axis

    offsets = shifts("pixels")
    flat = np.moveaxis(offsets, 1, 0).reshape(4000, -1)
    assert all(0.1 < chi_square(column, range(9)) < 3 for column in flat.T)
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert abs(correlation).max() < 0.08  # 24 independent columns of 4000: 5 standard deviations
    assert (shifts("pixels", views=0) == 4).all()  # not shifted at all
    offsets = shifts("trained", views=0)
    assert (offsets == offsets[:, :, :1]).all()  # a stack is shifted as one
    flat = np.moveaxis(offsets[:, :, 0], 1, 0).reshape(4000, -1)
    assert all(0.1 < chi_square(column, range(9)) < 3 for column in flat.T)
    assert abs(np.corrcoef(flat.T) - np.eye(8)).max() < 0.08


def test_resume_goes_on_with_the_same_draws(trunk, tmp_path):
    sac, replay, groups = make(trunk, tmp_path / "a")
    groups.run(1)
    tensors, training = sac.tensors(), sac.training_state()
    groups.run(1)
    resumed, _, again = make(trunk, tmp_path / "b")
    resumed.load_tensors(tensors)
    resumed.load_training_state(training)
    again.run(1)
    compare(resumed, sac)
    assert again.metrics() == groups.metrics()
    before = again._first_moment()
    assert before is again._first_moment() and before.any()
    resumed.load_training_state(training)
    assert again._first_moment() is not before  # so that a graph would be captured anew


def test_adam_can_be_captured_on_a_card_only_and_after_any_checkpoint():
    sac = Sac(SacConfig(), 1)
    assert not any(optimizer.defaults["capturable"] for optimizer in sac._optimizers().values())
    state = sac.training_state()
    state["actor"]["param_groups"][0]["capturable"] = True  # as a checkpoint may have it that was made elsewhere
    sac.load_training_state(state)
    assert sac.actor_optimizer.param_groups[0]["capturable"] is False


def test_warm_up_and_replays_are_the_groups_asked_for_no_more_and_no_less(trunk, tmp_path, monkeypatch):
    done, moment = [], [None]

    class Recording:
        """Stands for a graph where there is no card: a capture carries nothing out, each replay does."""

        def replay(self):
            done.append("replay")

    def warm_up(groups):
        done.append("warm up")
        moment[0] = moment[0] or object()  # Adam's memory comes with its first step

    monkeypatch.setattr(UpdateGroups, "_warm_up", warm_up)
    monkeypatch.setattr(UpdateGroups, "_capture", lambda groups: done.append("capture") or Recording())
    monkeypatch.setattr(UpdateGroups, "_first_moment", lambda groups: moment[0])
    _, _, groups = make(trunk, tmp_path)
    groups.captures = True
    for count in (0, 2, 0, 4, 1):
        groups.run(count)
    once = ["warm up"] * 3 + ["capture"] + ["replay"] * 4
    assert done == once  # seven groups
    moment[0] = object()  # a checkpoint was loaded
    groups.run(7)
    assert done == once + once


ON_CARD = {"rtol": 1e-3, "atol": 1e-4}  # of weights after 12 groups; Adam's first steps are 3e-4 whatever the gradient


def on_card(trunk, folder, graphs, monkeypatch, **options):
    """The same learner on a card, with graphs or without."""
    with monkeypatch.context() as patch:
        if not graphs:
            patch.setattr(captured, "lacking_graphs", lambda device: "this one is to compare with")
        made = make(copy.deepcopy(trunk).to("cuda"), folder, device="cuda", batch_size=64, **options)
    assert made[2].captures is graphs
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("options", modes(*MODES))
def test_graph_equals_single_operations_on_a_card(trunk, tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # a trained trunk's gradients too
    made = [on_card(trunk, tmp_path / str(graphs), graphs, monkeypatch, **options) for graphs in (True, False)]
    for _, replay, groups in made:
        rng = np.random.default_rng(3)
        for number in range(6):
            groups.run(2)
            for demonstration, used in fill(replay, rng, 2, start=1000 * (number + 1)):
                if not demonstration and number % 2:
                    replay.discard(used)
    assert made[0][2]._graph is not None and made[1][2]._graph is None
    compare(made[0][0], made[1][0], **ON_CARD)
    assert made[0][2].metrics() == pytest.approx(made[1][2].metrics(), rel=1e-2, abs=1e-4)


@pytest.mark.gpu
def test_resume_on_a_card_before_and_after_a_capture(trunk, tmp_path, monkeypatch):
    sac, _, groups = on_card(trunk, tmp_path / "a", True, monkeypatch)
    groups.run(6)
    tensors, training = sac.tensors(), sac.training_state()
    groups.run(6)
    for name, before in (("fresh", 0), ("captured", 5)):
        resumed, _, again = on_card(trunk, tmp_path / name, True, monkeypatch)
        again.run(before)
        resumed.load_tensors(tensors)
        resumed.load_training_state(training)
        again.run(6)
        compare(resumed, sac, **ON_CARD)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("options", modes(*MODES))
def test_a_card_is_not_waited_for(trunk, tmp_path, monkeypatch, options):
    _, _, groups = on_card(trunk, tmp_path, True, monkeypatch, **options)
    groups.run(4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        groups._group()
        groups._graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
