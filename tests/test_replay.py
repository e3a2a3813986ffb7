import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

from so101.errors import DataError
from so101.learn.eyes import Eyes
from so101.learn.replay import Replay, ViewEncoder
from so101.learn.resnet10 import load_resnet10
from so101.learn.sac import Sac, SacConfig

torch.set_num_threads(1)  # small products; a second thread would wait for cores that other tests use

SIZE = 32  # pixels, the smallest image: a 1 x 1 feature map
KEY = {"trunk": "abc", "schema": "def"}


class CountingTrunk(torch.nn.Module):
    """The real trunk, which notes how many images it was given."""

    def __init__(self):
        super().__init__()
        self.trunk, self.images = load_resnet10(None), 0

    def forward(self, x):
        self.images += len(x)
        return self.trunk(x)


@pytest.fixture(scope="module")
def trunk():
    return CountingTrunk()


def make_replay(trunk, folder, views=2, cameras=1, demos=20, online=30, key=KEY, size=SIZE, **options):
    encoder = ViewEncoder(trunk, views, pad=4, seed=0)
    return Replay(encoder, folder, key, cameras, size, demos, online, seed=0, **options)


def frame(time, cameras=1, size=SIZE):
    """A frame whose first pixel is the time, on noise of its own."""
    images = np.random.default_rng(time).integers(0, 256, (cameras, size, size, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = time
    return images


def state(time):
    return np.full(18, time, np.float32)


def add_episode(replay, start, length, demonstration=False, human=(), views=None, end="truncated"):
    """`length` transitions over the times start .. start + length; action and reward tell the time too."""
    slot = replay.add_observation(frame(start), state(start), views, demonstration)
    first = slot
    for step in range(length):
        time = start + step
        after = replay.add_observation(frame(time + 1), state(time + 1), views, demonstration)
        over = step == length - 1
        action = np.full(4, time / 1000, np.float32)
        terminated, truncated = over and end == "terminated", over and end == "truncated"
        replay.add_transition(slot, after, action, time / 10, terminated, truncated, step in human)
        slot = after
    return first


def check_pairs(batch):
    """Everything in a row tells one time, and the next observation the time after it."""
    time = batch.state[:, 0]
    assert torch.equal(batch.next_state[:, 5], time + 1)
    assert torch.allclose(batch.action[:, 2], time / 1000)
    assert torch.allclose(batch.reward, time / 10)


def blank(views=2, cameras=1):
    return torch.zeros(1 + views, cameras, 512, 1, 1, dtype=torch.float16)


def test_next_observation_never_crosses_an_episode_or_an_intervention(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path, online=60)
    # times jump by 5 between episodes: a pair that crossed would be more than 1 apart
    add_episode(replay, 0, 8, demonstration=True, views=blank())
    add_episode(replay, 13, 7, demonstration=True, views=blank())
    add_episode(replay, 100, 12, human=range(3, 7), views=blank())
    add_episode(replay, 117, 9, human=[8], views=blank())
    batch = replay.sample(2000)
    check_pairs(batch)
    assert set(batch.state[:, 0].tolist()) == {*range(8), *range(13, 20), *range(100, 112), *range(117, 126)}
    assert not batch.terminated.any()  # time ran out: the closing observation is there to bootstrap from


def test_half_demonstrations_half_online_exactly(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path)
    with pytest.raises(DataError, match="no transition to learn from"):
        replay.sample(4)
    add_episode(replay, 0, 5, demonstration=True, views=blank())
    assert (replay.sample(64).state[:, 0] < 100).all()  # all of what there is
    add_episode(replay, 100, 20, views=blank())
    assert [(replay.sample(65).state[:, 0] < 100).sum().item() for _ in range(5)] == [32] * 5
    alone = make_replay(trunk, tmp_path / "alone")
    add_episode(alone, 100, 3, views=blank())
    assert (alone.sample(64).state[:, 0] >= 100).all()


def test_interventions_count_as_demonstrations_and_stay_online(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path)
    add_episode(replay, 0, 4, demonstration=True, views=blank())
    add_episode(replay, 100, 20, human=[3, 4], views=blank())
    demos, online = replay.pools
    assert sorted(replay.state[demos, 0]) == [0, 1, 2, 3, 103, 104]
    assert sorted(replay.state[online, 0]) == list(range(100, 120))


def test_demonstrations_survive_any_amount_of_online_data(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path)
    add_episode(replay, 0, 19, demonstration=True, views=blank())
    for episode in range(20):
        add_episode(replay, 20 + 10 * episode, 7, human=range(7), views=blank())
    batch = replay.sample(4000)
    check_pairs(batch)
    assert set(range(19)) <= set(batch.state[:, 0].tolist())
    assert all(replay.images[slot, 0, 0, 0, 0] == slot for slot in range(20))
    with pytest.raises(DataError, match="more than the 20 demonstration frames"):
        replay.add_observation(frame(1), state(1), blank(), demonstration=True)


def test_ring_keeps_pairs_right_at_every_length(tmp_path, trunk):
    replay, time = make_replay(trunk, tmp_path, online=17), 0
    for length in (1, 5, 16, 9, 3, 14, 2, 11, 8, 8, 40, 1):
        add_episode(replay, time, length, views=blank())
        time += length + 5
        batch = replay.sample(300)
        check_pairs(batch)
        alive = set(batch.state[:, 0].tolist())
        assert alive <= set(replay.state[replay.demo_capacity :, 0])
        assert len(alive) <= 16 and max(alive) == time - 6  # the newest transition is there
        slots = replay.pools[1]
        assert (replay.images[slots, 0, 0, 0, 0] == replay.state[slots, 0] % 256).all()


def test_ring_drops_only_what_was_overwritten(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path, online=30)
    add_episode(replay, 0, 24, views=blank())  # 25 observations
    add_episode(replay, 40, 8, views=blank())  # 9 more: the first 4 make way
    assert sorted(replay.state[replay.pools[1], 0]) == [*range(4, 24), *range(40, 48)]


def test_correct_changes_the_end_that_was_stored(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path)
    add_episode(replay, 0, 3, views=blank())
    last = 20 + 2
    assert replay.truncated[last] and not replay.terminated[last]
    replay.correct(last, reward=1.0, terminated=True)
    assert replay.terminated[last] and not replay.truncated[last] and replay.reward[last] == 1
    with pytest.raises(DataError, match="no transition to correct"):
        replay.correct(last + 1, 1.0, True)


def test_discard_takes_an_episode_back_also_across_the_end_of_the_ring(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path, online=10)
    add_episode(replay, 0, 6, views=blank())
    first = add_episode(replay, 50, 4, views=blank())  # slots 7 8 9 0 1
    assert first == 20 + 7
    replay.discard([27, 28, 29, 20, 21])
    assert sorted(replay.state[replay.pools[1], 0]) == [2, 3, 4, 5]
    assert add_episode(replay, 80, 2, views=blank()) == first
    assert sorted(replay.state[replay.pools[1], 0]) == [2, 3, 4, 5, 80, 81]


def test_sampling_is_reproducible_and_its_state_can_be_saved(tmp_path, trunk):
    first, second = make_replay(trunk, tmp_path / "a"), make_replay(trunk, tmp_path / "b")
    for replay in (first, second):
        add_episode(replay, 0, 10, demonstration=True, views=blank())
        add_episode(replay, 100, 10, views=blank())
    assert torch.equal(first.sample(32).state, second.sample(32).state)
    saved = json.loads(json.dumps(first.rng_state()))
    wanted = [first.draw(32) for _ in range(3)]
    second.load_rng_state(saved)
    for draw in wanted:
        assert all((a == b).all() for a, b in zip(draw, second.draw(32), strict=True))


def test_views_are_drawn_from_the_shifted_ones_and_independently(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path, views=3)
    add_episode(replay, 0, 5, views=blank(views=3))
    draw = replay.draw(3000)
    counts = np.histogram2d(draw.views, draw.next_views, bins=[np.arange(5)] * 2)[0]
    assert (counts[0] == 0).all() and (counts[:, 0] == 0).all()
    assert counts[1:, 1:] == pytest.approx(3000 / 9, rel=0.2)  # standard error 5 %
    unshifted = make_replay(trunk, tmp_path / "none", views=0)
    add_episode(unshifted, 0, 5, views=blank(views=0))
    assert (unshifted.draw(100).views == 0).all()


def test_encoder_remembers_the_last_frame_and_guards_it(trunk):
    encoder = ViewEncoder(trunk, views=2, pad=4, seed=0)
    images, before = frame(3, cameras=2), trunk.images
    views = encoder.encode(images)
    assert views.shape == (3, 2, 512, 1, 1) and views.dtype == torch.float16
    assert encoder.encode(images) is views and trunk.images - before == 6  # one pass over 3 views x 2 cameras
    with pytest.raises(ValueError, match="read-only"):
        images[0, 0, 0, 0] = 1  # a camera that reuses its buffer must not be served the old features
    assert torch.equal(encoder.encode(images.copy()), views)  # the shifts depend on the pixels alone
    assert trunk.images - before == 12
    with torch.no_grad():
        plain = trunk((torch.from_numpy(frame(3, 2)).permute(0, 3, 1, 2) / 255 - MEAN) / STD)
    torch.testing.assert_close(views[0].float(), plain, atol=2e-3, rtol=2e-3)


MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406])[:, None, None],
    torch.tensor([0.229, 0.224, 0.225])[:, None, None],
)


@pytest.mark.parametrize("images", [frame(0) / 255, frame(0)[0], frame(0, size=64), frame(0, cameras=2)])
def test_refuses_other_frames_than_it_was_made_for(tmp_path, trunk, images):
    with pytest.raises(DataError, match="replay: frames are .* must be uint8"):
        make_replay(trunk, tmp_path).add_observation(images, state(0))


def test_no_views_encodes_the_frame_alone(trunk):
    before = trunk.images
    views = ViewEncoder(trunk, views=0, pad=4, seed=0).encode(frame(1))
    assert views.shape == (1, 1, 512, 1, 1) and trunk.images - before == 1


def test_cache_equals_encoding_the_shifted_pixels(tmp_path, trunk):
    """The pixel oracle: features to float16, and every gradient of the critics' loss on the same batch."""
    replay = make_replay(trunk, tmp_path, cameras=2, size=64)
    slots = [replay.add_observation(frame(time, 2, 64), state(time)) for time in range(5)]
    for slot, after in zip(slots, slots[1:], strict=False):
        replay.add_transition(slot, after, np.full(4, 0.1, np.float32), 1.0, False, False, False)
    draw = replay.draw(8)
    cached, pixels = replay.gather(draw), replay.gather_pixels(draw)
    assert cached.features.dtype == torch.float16 and cached.features.shape == (8, 2, 512, 2, 2)
    torch.testing.assert_close(cached.features.float(), pixels.features, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(cached.next_features.float(), pixels.next_features, atol=2e-3, rtol=1e-3)
    other = replay.gather(draw._replace(views=3 - draw.views))  # the check can fail: views do differ
    assert (other.features - cached.features).abs().max() > 0.1
    gradients = []
    for batch in (cached, pixels):
        torch.manual_seed(0)
        sac = Sac(SacConfig(), cameras=2, size=2)
        sac.update_critic(batch)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in sac._fast]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert difference < 5e-3


def test_resume_reads_features_back_without_the_trunk(tmp_path, trunk):
    def fill(replay):
        add_episode(replay, 0, 4, demonstration=True)
        add_episode(replay, 100, 6)

    first = make_replay(trunk, tmp_path)
    fill(first)
    wanted = first.sample(32)
    del first
    encoded = trunk.images
    resumed = make_replay(trunk, tmp_path)
    fill(resumed)
    assert trunk.images == encoded
    assert torch.equal(resumed.sample(32).features, wanted.features) and wanted.features.any()


def test_another_observation_in_a_known_slot_is_encoded_anew(tmp_path, trunk):
    first = make_replay(trunk, tmp_path)
    add_episode(first, 100, 6)
    resumed, encoded = make_replay(trunk, tmp_path), trunk.images
    slot = resumed.add_observation(frame(100), state(100))
    other = resumed.add_observation(frame(7), state(7))  # of an episode that was killed, the slot held 101
    assert trunk.images - encoded == 3
    assert torch.equal(torch.from_numpy(resumed.file.features[slot].copy()), first.encoder.encode(frame(100)))
    assert torch.equal(torch.from_numpy(resumed.file.features[other].copy()), first.encoder.encode(frame(7)))


def test_resume_of_a_ring_that_went_round(tmp_path, trunk):
    first = make_replay(trunk, tmp_path, online=12)
    for start in (0, 20, 40):
        add_episode(first, start, 5)  # 6 observations each: the first episode's are gone
    features = first.file.features.copy()
    resumed = make_replay(trunk, tmp_path, online=12)
    for start in (0, 20, 40):
        add_episode(resumed, start, 5)
    assert (resumed.file.features == features).all()
    assert (resumed.state == first.state).all() and (resumed.next_slot == first.next_slot).all()
    assert (resumed.pools[1] == first.pools[1]).all()


def test_another_key_starts_another_file(tmp_path, trunk):
    first = make_replay(trunk, tmp_path)
    slot = first.add_observation(frame(1), state(1))
    first.file.features.flush()
    before = (tmp_path / "features.f16").read_bytes()
    other = make_replay(trunk, tmp_path, key={**KEY, "trunk": "other"})
    assert other.file.path == tmp_path / "features-2.f16"
    encoded = trunk.images
    assert other.add_observation(frame(1), state(1)) == slot and trunk.images == encoded + 3
    assert make_replay(trunk, tmp_path, views=1).file.path == tmp_path / "features-3.f16"
    assert (tmp_path / "features.f16").read_bytes() == before
    assert make_replay(trunk, tmp_path, key={**KEY, "trunk": "other"}).file.path == other.file.path


def test_a_damaged_cache_is_left_alone(tmp_path, trunk):
    make_replay(trunk, tmp_path)
    with open(tmp_path / "features.f16", "rb+") as file:
        file.truncate(100)
    assert make_replay(trunk, tmp_path).file.path == tmp_path / "features-2.f16"
    assert (tmp_path / "features.f16").stat().st_size == 100


def test_refuses_a_cache_that_the_disk_cannot_hold(tmp_path, trunk):
    with pytest.raises(DataError, match="lower sac.buffer_size"):
        make_replay(trunk, tmp_path, online=10**10)
    assert not any(tmp_path.iterdir())


def tell(time, views=2):
    """Features that all say the time."""
    return torch.full((1 + views, 1, 512, 1, 1), float(time), dtype=torch.float16)


def add_told(replay, start, length, demonstration=False, human=()):
    """As `add_episode`, with features and states that tell the time."""
    slots = [replay.add_observation(frame(start), state(start), tell(start), demonstration)]
    for step in range(length):
        time = start + step + 1
        slots.append(replay.add_observation(frame(time), state(time), tell(time), demonstration))
        replay.add_transition(
            slots[-2], slots[-1], np.zeros(4, np.float32), 0.0, False, step == length - 1, step in human
        )
    return slots[0]


def check_stacks(batch, first):
    """Every stack holds the last three times of its episode, the first repeated; `first` gives an episode's start."""
    for features, states in ((batch.features, batch.state), (batch.next_features, batch.next_state)):
        for told, time in zip(features[:, :, 0, 0, 0].tolist(), states[:, 0].tolist(), strict=True):
            assert told == [max(time - back, first(time)) for back in (2, 1, 0)]


def test_a_stack_is_the_last_three_frames_of_one_episode_whoever_drove(tmp_path, trunk):
    replay, encoded = make_replay(trunk, tmp_path, online=60, frames=3), trunk.images
    starts = [0, 9, 100, 115]
    add_told(replay, 0, 8, demonstration=True)
    add_told(replay, 9, 6, demonstration=True)
    add_told(replay, 100, 12, human=range(3, 7))
    add_told(replay, 115, 2, human=[0])
    batch = replay.sample(1500)
    assert batch.features.shape == (1500, 3, 512, 1, 1)
    check_stacks(batch, lambda time: max(start for start in starts if start <= time))
    # an intervention drawn as a demonstration is seen with what really led to it, as the policy would have seen it
    drawn = batch.features[batch.state[:, 0] == 103][:, :, 0, 0, 0].unique(dim=0)
    assert drawn.tolist() == [[101, 102, 103]] and 103 in replay.state[replay.pools[0], 0]
    assert trunk.images == encoded and replay.images.shape[:2] == (80, 1)  # stored and encoded once, as without stacks


def test_stacks_stay_whole_in_a_ring_and_after_a_discard(tmp_path, trunk):
    replay, time, starts = make_replay(trunk, tmp_path, online=17, frames=3), 0, []
    for length in (1, 5, 16, 9, 3, 14, 2, 11, 8, 8, 40, 1, 6):
        starts.append(time)
        count, first = replay.online_count, add_told(replay, time, length)
        if length in (3, 11):
            slots = replay.demo_capacity + np.arange(count, replay.online_count) % replay.online_capacity
            assert slots[0] == first
            replay.discard(slots.tolist())
        time += length + 3
        if not replay.starts.any():
            continue
        batch = replay.sample(300)
        check_stacks(batch, lambda time: max(start for start in starts if start <= time))
    # of the 40 the ring held 17 observations; 2 + 7 more came, and two stacks lost a frame of theirs
    alive = set(replay.state[replay.pools[1], 0].tolist())
    long = starts[-3]
    assert alive == {*range(long + 40 - 7 + 2, long + 40), starts[-2], *range(starts[-1], starts[-1] + 6)}


def test_a_stack_in_the_cache_equals_encoding_its_shifted_pixels(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path, cameras=2, frames=3)
    slots = [replay.add_observation(frame(time, 2), state(time)) for time in range(5)]
    for slot, after in zip(slots, slots[1:], strict=False):
        replay.add_transition(slot, after, np.full(4, 0.1, np.float32), 1.0, False, False, False)
    draw = replay.draw(8)
    cached, pixels = replay.gather(draw), replay.gather_pixels(draw)
    assert cached.features.shape == (8, 6, 512, 1, 1)
    torch.testing.assert_close(cached.features.float(), pixels.features, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(cached.next_features.float(), pixels.next_features, atol=2e-3, rtol=1e-3)
    # a stack's last frames are the observation's own, camera by camera
    alone = make_replay(trunk, tmp_path, cameras=2)
    for time in range(5):
        alone.add_observation(frame(time, 2), state(time))
    assert torch.equal(cached.features[:, 4:], alone._cached(draw.slots, draw.views))


def test_views_are_renewed_oldest_first_and_remain_what_their_pixels_encode_to(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path)
    assert not replay.refresh()  # there is none yet
    add_episode(replay, 0, 2, demonstration=True)
    add_episode(replay, 100, 3)
    slots, before = [0, 1, 2, 20, 21, 22, 23], replay.file.features.copy()
    marks, encoded, rng = replay.file.marks.copy(), trunk.images, replay.rng_state()
    for count, slot in enumerate(slots, 1):
        assert replay.refresh()
        changed = (replay.file.features != before).reshape(50, 3, -1).any(2)
        assert np.flatnonzero(changed.any(1)).tolist() == sorted(slots[:count])
        assert changed[slot, 1:].all() and not changed[slot, 0]  # the unshifted view is what actor and classifier use
    assert trunk.images - encoded == 2 * len(slots)
    assert (replay.file.marks[slots] == marks[slots] + 1).all()  # the same observations, their views once renewed
    assert replay.rng_state() == rng  # what is drawn next does not depend on how long the learner idled
    once = replay.file.features.copy()
    replay.refresh()
    assert (replay.file.features[0, 1:] != once[0, 1:]).any() and (replay.file.features[1:] == once[1:]).all()
    draw = replay.draw(40)
    cached, pixels = replay.gather(draw), replay.gather_pixels(draw)
    torch.testing.assert_close(cached.features.float(), pixels.features, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(cached.next_features.float(), pixels.next_features, atol=2e-3, rtol=1e-3)
    encoded, resumed = trunk.images, make_replay(trunk, tmp_path)
    add_episode(resumed, 0, 2, demonstration=True)
    add_episode(resumed, 100, 3)
    assert trunk.images == encoded and (resumed.file.features == replay.file.features).all()
    pixels = resumed.gather_pixels(draw)  # a resumed run still knows the shifts
    torch.testing.assert_close(cached.features.float(), pixels.features, atol=2e-3, rtol=1e-3)
    assert not make_replay(trunk, tmp_path / "none", views=0).refresh()


def test_what_was_discarded_is_not_renewed(tmp_path, trunk):
    replay = make_replay(trunk, tmp_path)
    first = add_episode(replay, 0, 3)
    replay.discard([*range(first, first + 4)])
    encoded = trunk.images
    assert not replay.refresh() and trunk.images == encoded


def test_pixel_mode_keeps_no_cache_and_draws_what_the_cache_would_give(tmp_path, trunk):
    replays = [make_replay(trunk, tmp_path / kind, features=kind) for kind in ("cached", "pixels")]
    encoded = []
    for replay in replays:
        before = trunk.images
        add_episode(replay, 0, 4, demonstration=True)
        add_episode(replay, 100, 4)
        encoded.append(trunk.images - before)
    assert encoded == [10 * 3, 0] and not (tmp_path / "pixels").exists() and not replays[1].refresh()
    cached, pixels = (replay.sample(16) for replay in replays)
    assert torch.equal(cached.state, pixels.state) and torch.equal(cached.action, pixels.action)
    torch.testing.assert_close(cached.features.float(), pixels.features, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(cached.next_features.float(), pixels.next_features, atol=2e-3, rtol=1e-3)
    with pytest.raises(DataError, match="replay: made for features 'pixels', there is no cache"):
        replays[1].gather(replays[1].draw(4))


def test_frames_for_a_trained_encoder_are_shifted_anew_and_a_stack_as_one(tmp_path, trunk):
    encoded = trunk.images
    replay = make_replay(trunk, tmp_path, cameras=2, frames=3, features="trained")
    slots = [replay.add_observation(frame(time, 2), state(time)) for time in range(6)]
    for slot, after in zip(slots, slots[1:], strict=False):
        replay.add_transition(slot, after, np.zeros(4, np.float32), 0.0, False, False, False)
    batch = replay.sample(64)
    assert (
        trunk.images == encoded and batch.features.shape == (64, 6, 32, 32, 3) and batch.features.dtype == torch.uint8
    )
    offsets = {}
    for row in range(64):
        for side, (stack, told) in enumerate(((batch.features, batch.state), (batch.next_features, batch.next_state))):
            time = int(told[row, 0])
            for camera in range(2):
                frames = [frame(max(time - back, 0), 2)[camera] for back in (2, 1, 0)]
                padded = [np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="edge") for image in frames]
                seen = stack[row, camera::2].numpy()  # oldest first, each with both cameras
                (found,) = (
                    (top, left)
                    for top in range(9)
                    for left in range(9)
                    if all((p[top : top + 32, left : left + 32] == s).all() for p, s in zip(padded, seen, strict=True))
                )
                offsets[row, side, camera] = found
    assert len(set(offsets.values())) > 50  # of 81
    differ = [offsets[row, 0, camera] != offsets[row, 1, camera] for row in range(64) for camera in range(2)]
    assert sum(differ) > 110 and sum(offsets[row, 0, 0] != offsets[row, 0, 1] for row in range(64)) > 50


@pytest.mark.parametrize("features", ["cached", "trained"])
def test_the_live_stack_is_the_one_that_replay_gives(tmp_path, trunk, features, monkeypatch):
    monkeypatch.setattr("so101.learn.eyes.load_resnet10", lambda path: trunk.trunk)
    monkeypatch.setattr("so101.learn.eyes.load_reward", lambda folder, schema, trunk: Judge())
    eyes = Eyes(None, tmp_path, {}, views=1, pad=4, seed=0, device="cpu", frames=3, features=features)
    replay = Replay(eyes.encoder, tmp_path, KEY, 2, SIZE, 0, 40, 0, frames=3, features=features)
    looked = []
    for start, length in ((0, 4), (50, 2)):
        eyes.reset()
        slot = None
        for time in range(start, start + length + 1):
            observation = Observation(frame(time, 2), state(time))
            if time % 2:
                eyes.update(observation)  # the classifier looks too, and first: a frame counts once
            seen = eyes.see(observation)
            looked.append((time, eyes.look(observation)))
            after = replay.add_observation(*seen)
            if slot is not None:
                replay.add_transition(slot, after, np.zeros(4, np.float32), 0.0, False, False, False)
            slot = after
    assert seen.views.shape[0] == (2 if features == "cached" else 1)  # a view that nobody draws is not encoded
    for slot, (time, stack) in enumerate(looked):
        assert replay.state[slot, 0] == time and stack.shape[0] == 6
        frames = torch.from_numpy(replay.images[replay.history[slot]])
        if features == "cached":
            assert torch.equal(stack, replay._cached(np.array([slot]), np.array([0]))[0])
        else:
            assert torch.equal(stack, frames.flatten(0, 1))


class Observation(NamedTuple):
    images: np.ndarray
    state: np.ndarray


class Judge:
    """A classifier that sees no success."""

    def reset(self):
        pass

    def probability(self, features):
        return 0.0

    def update(self, probability, state):
        return False
