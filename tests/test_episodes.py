"""From a recording to transitions, proven on a toy world whose dynamics are known: the state is a running sum.

In the toy world s' = s + a (in the state's first four entries), and a frame's brightness is the number of its
observation; so any shift between observation, action and reward by one row shows.
"""

import numpy as np
import pytest

from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels
from so101.data.writer import DatasetWriter
from so101.episodes import first_success, labelled, load_images, load_states, observed_success, trajectories
from so101.errors import DataError
from so101.images import preprocess
from so101.schema import Preprocess, RewardSpec, describe

SPEC = Preprocess(crop=[0, 0, 64, 64], image_size=64)
SCHEMA = describe(SPEC, ["wrist"], 10.0, 0.02, 0.5)
REWARD = RewardSpec()


def frame(number):
    return np.full((64, 64, 3), 20 + 4 * number, np.uint8)


def record(folder, lengths, rewards=None, done=False, truncated=True):
    """Episodes of the toy world; returns the actions of each."""
    rng = np.random.default_rng(0)
    actions = []
    writer = DatasetWriter(folder, fps=10.0, cameras={"wrist": (64, 64)}, task="toy", schema=SCHEMA)
    for length in lengths:
        state = np.zeros(18, np.float32)
        taken = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
        for t, action in enumerate(taken):
            last = t == length - 1
            writer.add(
                state.copy(), action, {"wrist": frame(t)},
                done=done and last, truncated=truncated and last, is_intervention=t % 2 == 0, capture_time=t / 10,
            )  # fmt: skip
            state[:4] += action
        writer.save_episode(state, {"wrist": frame(length)}, length / 10, rewards=rewards)
        actions.append(taken)
    writer.close()
    return actions


def brightness(images):
    return np.round((images.astype(float).mean(axis=(1, 2, 3, 4)) - 20) / 4)


def test_each_transition_leads_from_its_state_by_its_action_to_the_next_state(tmp_path):
    actions = record(tmp_path / "toy", [7, 3])
    for episode, taken in zip(open_dataset(tmp_path / "toy").episodes, actions, strict=True):
        path = trajectories([(episode, np.zeros(episode.length + 1, bool))], SPEC, REWARD, consecutive=3)[0]
        n = episode.length
        assert path.states.shape == (n + 1, 18) and path.images.shape == (n + 1, 1, 64, 64, 3)
        assert np.allclose(path.states[1:, :4], path.states[:-1, :4] + path.actions, atol=1e-6)
        assert np.allclose(path.actions, taken)
        assert brightness(path.images).tolist() == list(range(n + 1))  # the closing frame too
        assert path.by_human.tolist() == [t % 2 == 0 for t in range(n)]


def test_a_time_out_bootstraps_from_its_true_next_observation(tmp_path):
    record(tmp_path / "toy", [5])
    (episode,) = open_dataset(tmp_path / "toy").episodes
    path = trajectories([(episode, np.zeros(6, bool))], SPEC, REWARD, consecutive=1)[0]
    assert path.truncated.tolist() == [False] * 4 + [True] and not path.terminated.any()
    assert brightness(path.images)[-1] == 5  # not frame 4 once more, nor another episode's first


def test_success_pays_once_on_the_transition_that_completes_it_and_ends_the_episode(tmp_path):
    # labels     0 0 0 1 1 1 1 1 1   (observations 0..8)
    # transition 0>1 1>2 2>3 3>4 4>5 (the third success in a row is observation 5)
    record(tmp_path / "toy", [8])
    (episode,) = open_dataset(tmp_path / "toy").episodes
    success = np.arange(9) >= 3
    path = trajectories([(episode, success)], SPEC, RewardSpec(success=1.0, step_penalty=0.25), consecutive=3)[0]
    assert path.rewards.tolist() == [-0.25, -0.25, -0.25, -0.25, 0.75]
    assert path.terminated.tolist() == [False, False, False, False, True] and not path.truncated.any()
    assert len(path.states) == 6
    assert trajectories([(episode, success)], SPEC, REWARD, consecutive=1)[0].rewards.tolist() == [0, 0, 1]


def test_first_success_needs_its_frames_in_a_row():
    flicker = np.array([0, 1, 1, 0, 1, 1, 1, 0], bool)
    assert first_success(flicker, 1) == 1
    assert first_success(flicker, 3) == 6
    assert first_success(flicker, 4) is None


def test_labels_overrule_the_recorded_reward_and_unlabelled_is_not_failure(tmp_path):
    record(tmp_path / "toy", [4, 4], rewards=np.array([0, 0, 1, 1], np.float32))
    first, second = open_dataset(tmp_path / "toy").episodes
    # next.reward of row t is the success of observation t + 1
    assert observed_success(first, None).tolist() == [False, False, False, True, True]
    labels = Labels("toy")
    labels.set(0, EpisodeLabel(success_start=2))
    assert observed_success(first, labels).tolist() == [False, False, True, True, True]
    assert observed_success(second, labels) is None
    ((episode, success),) = labelled(open_dataset(tmp_path / "toy"), labels)
    assert episode.index == 0 and success.tolist() == [False, False, True, True, True]


def test_images_loaded_side_by_side_are_those_of_each_frame_in_order(tmp_path):
    record(tmp_path / "toy", [3, 5, 1, 4])
    episodes = open_dataset(tmp_path / "toy").episodes
    heard = []
    images = load_images(episodes, SPEC, heard.append)
    each = [preprocess(frame, SPEC) for episode in episodes for frame in episode.observed("wrist")]
    assert len(each) == 3 + 5 + 1 + 4 + 4 and np.array_equal(images[:, 0], each) and heard[-1] == len(each)
    assert [len(load_states(episode)) for episode in episodes] == [4, 6, 2, 5]
    episodes[2].videos["wrist"][0].write_bytes(b"torn")
    with pytest.raises(DataError, match=r"file-002\.mp4: not a readable video"):
        load_images(episodes, SPEC)


def test_an_episode_without_an_end_is_neither_terminal_nor_cut(tmp_path):
    record(tmp_path / "toy", [3], truncated=False)
    (episode,) = open_dataset(tmp_path / "toy").episodes
    path = trajectories([(episode, np.zeros(4, bool))], SPEC, REWARD, consecutive=1)[0]
    assert not path.terminated.any() and not path.truncated.any() and len(path.actions) == 3


@pytest.mark.parametrize("at", [0, 1])
def test_success_at_the_very_start_still_makes_one_transition(tmp_path, at):
    record(tmp_path / "toy", [4])
    (episode,) = open_dataset(tmp_path / "toy").episodes
    path = trajectories([(episode, np.arange(5) >= at)], SPEC, REWARD, consecutive=1)[0]
    assert len(path.actions) == 1 and path.rewards.tolist() == [1.0] and path.terminated.tolist() == [True]
