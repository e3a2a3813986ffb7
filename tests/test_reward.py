"""The success classifier: hand-worked votes and thresholds, an honest split, the whole on a toy problem."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from so101 import config as settings
from so101.errors import ConfigError, DataError
from so101.learn import reward_training
from so101.learn.networks import images_to_input
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.reward import (
    RewardConfig,
    StateGuard,
    SuccessClassifier,
    SuccessDetector,
    load_reward,
    save_reward,
)
from so101.learn.reward_training import (
    HeldOutEpisode,
    balanced_loss,
    choose_threshold,
    encode_views,
    episode_scores,
    fit_guard,
    frame_scores,
    hard_examples,
    judge_frames,
    precision_recall,
    runs,
    split_episodes,
    train_classifier,
    training_frames,
)
from so101.schema import OPENING, TOOL_Z, Preprocess, describe

SCHEMA = describe(Preprocess(), ["wrist"], fps=10.0, action_scale=0.02, gripper_step=0.5)


def state(height=0.1, opening=0.2):
    values = np.zeros(18, np.float32)
    values[TOOL_Z], values[OPENING] = height, opening
    return values


def classifier(seed=0, **shape):
    torch.manual_seed(seed)
    return SuccessClassifier(**shape)


def random_features(*shape, seed=0):
    return torch.randn(*shape, 512, 4, 4, generator=torch.Generator().manual_seed(seed)).relu()


# ---- network and detector


@pytest.mark.parametrize("cameras", [1, 2])
def test_every_parameter_is_trained(cameras):
    """L13 of the field record: all but the last layers sat under no_grad and stayed random."""
    model = classifier(cameras=cameras)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        model(random_features(8, cameras)), torch.tensor([1.0, 0.0] * 4)
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert len(list(model.parameters())) == cameras * 5 + 6


def test_each_camera_counts_and_another_number_of_cameras_is_refused():
    model = classifier(cameras=2).eval()
    features = random_features(1, 2)
    for camera in range(2):
        changed = features.clone()
        changed[:, camera] *= 0.5
        assert abs(model(changed) - model(features)).item() > 1e-4
    with pytest.raises(ValueError, match="zip"):
        model(random_features(1, 3))


def test_a_success_takes_three_in_a_row_above_the_threshold():
    detector = SuccessDetector(classifier(), 0.6, None, 3)
    sequence = [
        (0.9, 0),
        (0.7, 0),
        (0.6, 0),
        (0.61, 0),
        (0.8, 0),
        (0.99, 1),
        (0.7, 1),
        (0.1, 0),
        (0.9, 0),
        (0.9, 0),
    ]
    assert [detector.update(p, state()) for p, _ in sequence] == [bool(success) for _, success in sequence]
    detector.reset()  # the two in a row of the last episode do not count in the next
    assert [detector.update(0.9, state()) for _ in range(3)] == [False, False, True]


def test_the_guard_breaks_the_vote_where_the_tool_is_low_or_the_gripper_open():
    guard = StateGuard(height=(0.05, 0.15), opening=(0.1, 0.3))
    detector = SuccessDetector(classifier(), 0.5, guard, 2)
    low, high, wide, shut = state(height=0.04), state(height=0.16), state(opening=0.31), state(opening=0.05)
    visited = [state(), low, state(), high, state(), wide, state(), shut, state(), state()]
    assert [detector.update(0.9, s) for s in visited] == [False] * 9 + [True]


def test_the_guard_is_the_range_of_the_successes_with_margins_in_metres_and_opening():
    successes = np.stack([state(0.06, 0.10), state(0.12, 0.22), state(0.09, 0.30)])
    guard = fit_guard(successes, RewardConfig(guard_margin_z=0.02, guard_margin_opening=0.05))
    assert guard.height == pytest.approx((0.04, 0.14)) and guard.opening == pytest.approx((0.05, 0.35))
    assert fit_guard(successes, RewardConfig(guard=False)) is None


def test_one_frame_at_a_time_gives_what_the_batch_gives():
    model, features = classifier(), random_features(70, 1).half()
    batch = model.probabilities(features)
    detector = SuccessDetector(model, 0.5, None, 3)
    assert batch.std() > 0.005
    np.testing.assert_allclose([detector.probability(frame) for frame in features], batch, atol=1e-6)


def test_a_live_frame_gives_what_its_plain_view_gave_in_training():
    """Row 12 of the field record: a classifier that worked in the preview and was dead in training."""
    trunk, model = load_resnet10(None, seed=3), classifier(cameras=2, size=2)
    images = torch.randint(0, 256, (3, 2, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stored = encode_views(trunk, images, RewardConfig(views=2), torch.Generator().manual_seed(0))
    assert stored.shape == (3, 3, 2, 512, 2, 2) and stored.dtype == torch.float16
    detector = SuccessDetector(model, 0.5, None, 3)
    live = [detector.probability(trunk(images_to_input(frame))) for frame in images]
    np.testing.assert_allclose(live, model.probabilities(stored[:, 0]), atol=1e-3)
    plain, copies = stored[:, :1].float(), stored[:, 1:].float()
    distance = (copies - plain).flatten(2).norm(dim=2) / plain.flatten(2).norm(dim=2)  # (frames, views)
    assert (distance > 0.05).all()  # the copies do differ, from it
    assert (copies[:, 0] - copies[:, 1]).abs().max() > 0.1  # and from each other


# ---- split and threshold


def test_the_split_keeps_both_kinds_on_both_sides_and_shares_no_episode():
    for seed in range(20):
        success = [True] * 9 + [False] * 4
        np.random.default_rng(seed).shuffle(success)
        train, held = split_episodes(success, 0.2, seed)
        assert sorted(train + held) == list(range(13)) and not set(train) & set(held)
        assert sum(success[i] for i in held) == 2 and sum(not success[i] for i in held) == 1
    assert len({tuple(split_episodes([True, False] * 10, 0.2, seed)[1]) for seed in range(10)}) > 5
    assert split_episodes([True, False] * 10, 0.2, 4) == split_episodes([True, False] * 10, 0.2, 4)


@pytest.mark.parametrize(("kinds", "said"), [([True, False, False], "1 episodes with a"), ([True] * 5, "0 episodes w")])
def test_a_kind_that_cannot_be_on_both_sides_is_refused(kinds, said):
    with pytest.raises(DataError, match=f"{said}.*at least 2 are needed"):
        split_episodes(kinds, 0.2, 0)


def judge(probabilities, start=None, allowed=None, episode=0, **changed):
    probabilities = np.array(probabilities, np.float32)
    labels = np.arange(len(probabilities)) >= (len(probabilities) if start is None else start)
    allowed = np.ones(len(probabilities), bool) if allowed is None else np.array(allowed, bool)
    return HeldOutEpisode.judge(episode, probabilities, labels, allowed, RewardConfig(**changed))


def test_an_episodes_scores_by_hand():
    # votes of 3: the lowest of the last three probabilities, 0 until there are three
    failure = judge([0.9, 0.9, 0.4, 0.5, 0.6, 0.2])
    np.testing.assert_allclose(failure.scores, [0, 0, 0.4, 0.4, 0.4, 0.2], rtol=1e-6)
    assert failure.false_score == pytest.approx(0.4) and failure.true_score == 0.0
    # labelled from frame 5: with a tolerance of 2, firing at frame 3 is right and at frame 2 is not
    success = judge([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.9], start=5)
    assert success.false_score == pytest.approx(0.1) and success.true_score == pytest.approx(0.8)
    guarded = judge([0.9] * 6, allowed=[1, 1, 0, 1, 1, 1])
    np.testing.assert_allclose(guarded.scores, [0, 0, 0, 0, 0, 0.9], rtol=1e-6)


def test_the_scores_say_exactly_when_a_detector_fires():
    random = np.random.default_rng(0)
    guard, model = StateGuard((0.05, 0.2), (0.0, 1.0)), classifier()
    for trial in range(50):
        probabilities, consecutive = random.random(20).astype(np.float32), int(random.integers(1, 5))
        states = [state(height) for height in random.uniform(0.03, 0.2, 20)]
        allowed = [guard.allows(s) for s in states]
        scores = judge(probabilities, allowed=allowed, consecutive=consecutive).scores
        detector = SuccessDetector(model, 0.3, guard, consecutive)
        fired = [detector.update(float(p), s) for p, s in zip(probabilities, states, strict=True)]
        assert fired == (scores > 0.3).tolist(), trial


def test_the_threshold_is_the_middle_of_what_gives_no_false_and_no_missed_success():
    failure, success = judge([0.3] * 8, episode=4), judge([0.1] * 4 + [0.9] * 4, start=4, episode=7)
    choice = choose_threshold([failure, success])
    assert choice["threshold_range"] == pytest.approx([0.3, 0.9]) and choice["threshold"] == pytest.approx(0.6)
    scores = episode_scores([failure, success], choice["threshold"])
    assert scores == {"f_half": 1.0, "false_episodes": 0, "missed_episodes": 0, "admissible": True, "problems": []}
    assert success.outcome(choice["threshold"]) == {
        "episode": 7,
        "success_start": 4,
        "first_fired": 6,  # the third frame of the success
        "delay_frames": 2,
        "false_successes": [],
        "false_positive_runs": [],
    }


def test_where_no_threshold_is_right_a_missed_success_is_preferred_to_a_false_one():
    # One failure reaches 0.8 in two separate stretches; successes reach 0.95, 0.9 and 0.5.
    failure = judge([0.8, 0.8, 0.8, 0.1, 0.8, 0.8, 0.8, 0.8], episode=1)
    successes = [judge([0.0] * 4 + [p] * 4, start=4, episode=i + 2) for i, p in enumerate((0.95, 0.9, 0.5))]
    choice = choose_threshold([failure, *successes])
    # below 0.5: F0.5 = 1.25*3 / (3.75 + 0 + 1) = 0.789; in 0.8 .. 0.9: 2.5 / (2.5 + 0.25) = 0.909
    scores = episode_scores([failure, *successes], choice["threshold"])
    assert choice["threshold_range"] == pytest.approx([0.8, 0.9]) and scores["f_half"] == pytest.approx(2.5 / 2.75)
    assert not scores["admissible"] and scores["problems"] == ["episode 4: success not found"]
    assert successes[2].outcome(choice["threshold"])["first_fired"] is None
    low, high = failure.outcome(0.7), failure.outcome(0.85)
    assert low["false_successes"] == [[2, 3], [6, 8]] and high["false_successes"] == []  # of the vote of three
    assert low["false_positive_runs"] == [[0, 3], [4, 8]] and high["false_positive_runs"] == []


def test_a_success_seen_before_it_happened_is_a_false_one():
    early = judge([0.0, 0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.8, 0.8, 0.8, 0.8], start=7, episode=3)
    choice = choose_threshold([early, judge([0.1] * 8)])
    scores = episode_scores([early, judge([0.1] * 8)], choice["threshold"])
    assert choice["threshold"] > 0.9 and scores["problems"] == ["episode 3: success not found"]
    outcome = early.outcome(0.5)
    assert (outcome["first_fired"], outcome["delay_frames"], outcome["false_successes"]) == (3, -4, [[3, 4]])
    assert outcome["false_positive_runs"] == [[1, 4]]  # the first two frames of the success are no false ones


def test_without_a_success_to_find_there_is_no_f_half_but_there_are_false_ones():
    scores = episode_scores([judge([0.9] * 5), judge([0.1] * 5)], 0.5)
    assert scores["f_half"] is None and (scores["false_episodes"], scores["missed_episodes"]) == (1, 0)


def test_runs_by_hand():
    assert runs(np.array([1, 1, 0, 0, 1, 0, 1], bool)) == [[0, 2], [4, 5], [6, 7]]
    assert runs(np.zeros(3, bool)) == [] and runs(np.zeros(0, bool)) == [] and runs(np.ones(3, bool)) == [[0, 3]]


def test_frame_scores_and_balanced_loss_by_hand():
    probabilities, labels = np.array([0.9, 0.6, 0.4, 0.2, 0.7]), np.array([True, True, True, False, False])
    assert frame_scores(probabilities, labels, 0.5) == {
        "threshold": 0.5,
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
    }
    assert frame_scores(probabilities, labels, 0.95)["precision"] is None
    # one success at 1/2, three others at 3/4 and one at 0: (ln 2 + (3 ln 4) / 3 ) / 2
    halves = balanced_loss(np.array([0.5, 0.75, 0.75, 0.75]), np.array([True, False, False, False]))
    assert halves == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_precision_and_recall_by_hand():
    """Ranked 0.9 yes, 0.8 no, 0.7 yes and no, 0.2 yes: the two at 0.7 are one point."""
    probabilities, labels = np.array([0.7, 0.9, 0.2, 0.8, 0.7]), np.array([True, True, True, False, False])
    found = precision_recall(probabilities, labels)
    assert [tuple(point.values()) for point in found["curve"]] == [
        (0.9, 1.0, 0.3333), (0.8, 0.5, 0.3333), (0.7, 0.5, 0.6667), (0.2, 0.6, 1.0),
    ]  # fmt: skip
    assert found["average_precision"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 0.5 + 1 / 3 * 0.6)
    assert precision_recall(probabilities, np.zeros(5, bool)) == {"average_precision": None, "curve": []}
    many = np.random.default_rng(0).random(5000)
    assert len(precision_recall(many, many > 0.3)["curve"]) == 100
    assert precision_recall(many, many > 0.3)["average_precision"] == pytest.approx(1.0)


def test_hard_examples_are_named_as_label_py_names_them():
    probabilities = np.array([0.1, 0.6, 0.9, 0.95, 0.3, 0.45, 0.99])
    labels = np.array([False, False, False, True, True, True, False])
    hard = hard_examples(probabilities, labels, np.array([7, 7, 7, 7, 9, 9, 9]), 0.5)
    assert [tuple(e.values()) for e in hard["false_positives"]] == [(9, 2, 0.99), (7, 2, 0.9), (7, 1, 0.6)]
    assert [tuple(e.values()) for e in hard["misses"]] == [(9, 0, 0.3), (9, 1, 0.45)]
    many = hard_examples(np.linspace(0.6, 0.9, 50), np.zeros(50, bool), np.zeros(50, int), 0.5)
    assert [e["frame"] for e in many["false_positives"]] == list(range(49, 37, -1))


def test_another_dataset_is_judged_at_the_threshold_that_was_stored():
    probabilities, ids = np.array([0.9, 0.9, 0.9, 0.2, 0.65, 0.65]), np.array([0, 0, 0, 1, 1, 1])
    labels = np.array([False, False, False, False, True, True])
    states = np.stack([state()] * 6)
    once = RewardConfig(consecutive=1, tolerance_frames=0)
    report = judge_frames(probabilities, labels, ids, states, None, once, 0.7)
    assert (report["threshold"], report["false_episodes"], report["missed_episodes"]) == (
        0.7,
        1,
        1,
    ) and "threshold_range" not in report
    guarded = judge_frames(probabilities, labels, ids, states, StateGuard((0.2, 0.3), (0, 1)), once, 0.6)
    assert (guarded["false_episodes"], guarded["missed_episodes"]) == (0, 1)  # the guard forbids all of it
    assert guarded["at_threshold"]["accuracy"] == pytest.approx(3 / 6)  # frames are the classifier's alone


def test_an_episode_is_vetoed_where_the_guard_leaves_no_vote_of_its_success():
    """Votes of two; the guard wants 0.05 .. 0.2 m: episode 0 has a vote left, of 1 single frames, 2 is a failure."""
    heights = [0.3, 0.3, 0.1, 0.1, 0.1, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3]
    labels = np.array([0, 1, 1, 1] + [1, 1, 1, 1] + [0] * 4, bool)
    states, guard = np.stack([state(height=height) for height in heights]), StateGuard((0.05, 0.2), (0, 1))
    twice = RewardConfig(consecutive=2, tolerance_frames=0)
    for probability in (0.1, 0.9):  # whatever the classifier says
        found = judge_frames(np.full(12, probability), labels, np.repeat([0, 1, 2], 4), states, guard, twice, 0.5)
        assert found["vetoed"] == [1]
    assert judge_frames(np.ones(12), labels, np.repeat([0, 1, 2], 4), states, None, twice, 0.5)["vetoed"] == []


# ---- training


def toy(frames=12, episodes=16, seed=0, noise=1.0):
    """Episodes of random features; in every other one a pattern stands in the maps from half of it on."""
    generator = torch.Generator().manual_seed(seed)
    count = frames * episodes
    episode_ids = np.repeat(np.arange(episodes) + 100, frames)
    labels = (np.tile(np.arange(frames), episodes) >= frames // 2) & (episode_ids % 2 == 0)
    features = noise * torch.randn(count, 2, 1, 512, 4, 4, generator=generator)
    pattern = torch.randn(512, 4, 4, generator=generator) * (torch.rand(512, 1, 1, generator=generator) < 0.1)
    features[torch.from_numpy(labels)] += pattern
    states = np.stack([state(0.1 if label else 0.03) for label in labels])
    return features.half(), labels, episode_ids, states


QUICK = RewardConfig(steps=30, evaluate_every=5, views=1, held_out=0.25, batch_size=32, lr=1e-3)


def test_a_separable_problem_is_learned_and_reported_episode_by_episode():
    features, labels, episode_ids, states = toy()
    done = []
    detector, final, report = train_classifier(features, labels, episode_ids, states, QUICK, done.append)
    assert report["at_threshold"]["accuracy"] > 0.95 and report["admissible"] and report["problems"] == []
    assert not set(report["episodes"]["train"]) & set(report["episodes"]["held_out"])
    assert sorted(report["episodes"]["train"] + report["episodes"]["held_out"]) == list(range(100, 116))
    assert report["frames"] == {"train": 144, "held_out": 48, "successes": 48}
    assert [e["episode"] for e in report["held_out"]] == report["episodes"]["held_out"]
    for episode in report["held_out"]:
        expected = (6, 8, 2, [], []) if episode["episode"] % 2 == 0 else (None, None, None, [], [])
        assert tuple(episode.values())[1:] == expected
    assert done == list(range(1, len(done) + 1)) and report["losses"]["step"][-1] == len(done)
    best = report["losses"]["step"].index(report["losses"]["best_step"])
    assert report["losses"]["held_out"][best] == min(report["losses"]["held_out"])
    assert json.loads(json.dumps(report, allow_nan=False))["threshold"] == detector.threshold
    assert detector.guard.height == pytest.approx((0.09, 0.11))
    # the weights kept are those of the lowest held-out loss, not the last
    held = np.isin(episode_ids, report["episodes"]["held_out"])
    kept = balanced_loss(detector.classifier.probabilities(features[torch.from_numpy(held), 0]), labels[held])
    assert kept == pytest.approx(min(report["losses"]["held_out"]), rel=1e-5)
    # and the last are kept beside them, with a threshold of their own
    last = balanced_loss(final.classifier.probabilities(features[torch.from_numpy(held), 0]), labels[held])
    assert last == pytest.approx(report["losses"]["held_out"][-1], rel=1e-5)
    assert final.threshold == report["final"]["threshold"] and final.guard == detector.guard
    assert 0.99 < report["average_precision"] <= 1.0 and report["hard"] == {"false_positives": [], "misses": []}


def scripted_losses(monkeypatch, held_out, **changed):
    """A training whose looks at the held-out episodes find these losses, and then the last one for ever."""
    told = itertools.chain(held_out, itertools.repeat(held_out[-1]))
    monkeypatch.setattr(reward_training, "balanced_loss", lambda *_: next(told))
    features, labels, episode_ids, states = toy(frames=4, episodes=4)
    config = RewardConfig(views=1, batch_size=4, held_out=0.5, **{"steps": 30, "evaluate_every": 1, **changed})
    return train_classifier(features, labels, episode_ids, states, config).report["losses"]


def test_training_stops_after_so_many_looks_without_a_lower_loss(monkeypatch):
    # The second look is the last that lowers it by 0.001; three later ones are lower still, by too little.
    losses = scripted_losses(monkeypatch, [1.0, 0.5, 0.4995, 0.4993, 0.4994, 0.3], patience=3, min_delta=0.001)
    assert losses["step"] == [1, 2, 3, 4, 5] and losses["best_step"] == 4  # the lowest is kept all the same
    losses = scripted_losses(monkeypatch, [1.0, 0.5, 0.4995, 0.4993, 0.4994, 0.3], patience=3, min_delta=0.0)
    assert losses["step"] == list(range(1, 10)) and losses["best_step"] == 6
    assert scripted_losses(monkeypatch, [1.0], patience=9, steps=5, evaluate_every=2)["step"] == [2, 4, 5]


def test_a_look_an_epoch_is_as_many_steps_as_the_training_frames_fill_batches(monkeypatch):
    # 4 episodes of 4 frames, half of them held out: 8 training frames, batches of 4
    assert scripted_losses(monkeypatch, [1.0], evaluate_every=0, patience=3)["step"] == [2, 4, 6, 8]


def test_a_long_gradient_is_cut():
    """Adam divides the gradient's length out again, but for its epsilon of 1e-8: cut to 1e-9 it barely moves."""
    data, start = toy(frames=4, episodes=4), classifier(seed=0).mlp[0].weight
    for norm, moved in ((1e-9, False), (0.0, True)):
        config = RewardConfig(views=1, steps=3, weight_decay=0.0, max_grad_norm=norm, lr=1e-3)
        weight = train_classifier(*data, config).final.classifier.mlp[0].weight
        assert ((weight - start).abs().max().item() > 1e-3) is moved


def test_a_success_that_only_the_second_camera_shows_is_learned():
    features, labels, episode_ids, states = toy(frames=6, episodes=8)
    both = torch.cat([torch.randn_like(features[:, :, :1]), features], dim=2)
    quick = RewardConfig(steps=16, evaluate_every=4, views=1, held_out=0.25, batch_size=16, lr=1e-3)
    assert train_classifier(both, labels, episode_ids, states, quick).report["at_threshold"]["accuracy"] > 0.9


def test_held_out_frames_have_no_copies():
    trunk = load_resnet10(None)
    images = torch.randint(0, 256, (5, 2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    copied, told = np.array([True, False, True, True, False]), []
    stored = encode_views(trunk, images, RewardConfig(views=2), torch.Generator(), told.append, copied)
    assert (stored[copied] != 0).flatten(2).any(dim=2).all() and not stored[~copied, 1:].any()
    assert told == [5, 8, 11]  # views
    alone = encode_views(trunk, images, RewardConfig(views=0), torch.Generator())
    assert torch.equal(alone[:, 0], stored[:, 0]) and alone.shape[1] == 1


def test_each_batch_is_half_successes_of_training_episodes_only():
    features, labels, episode_ids, states = toy(frames=6, episodes=8)
    config, drawn = RewardConfig(steps=9, views=1, batch_size=8, held_out=0.25), []

    def draw(frames):
        drawn.append(frames)
        return features[torch.from_numpy(frames), 0]

    report = train_classifier(features, labels, episode_ids, states, config, draw=draw).report
    assert [labels[frames].sum() for frames in drawn] == [4] * 9
    assert set(episode_ids[np.concatenate(drawn)]) <= set(report["episodes"]["train"])
    chosen = training_frames(labels, episode_ids, config)
    assert sorted(set(episode_ids[chosen])) == report["episodes"]["train"]


def test_held_out_frames_never_touch_the_training():
    """Change everything about the held-out episodes' copies: the weights after one step stay the same."""
    features, labels, episode_ids, states = toy(frames=6, episodes=8)
    one_step = RewardConfig(steps=1, views=1, held_out=0.25)
    detector, _, report = train_classifier(features, labels, episode_ids, states, one_step)
    changed = features.clone()
    changed[np.isin(episode_ids, report["episodes"]["held_out"])] = 7.0
    again, _, _ = train_classifier(changed, labels, episode_ids, states, one_step)
    for name, tensor in detector.classifier.state_dict().items():
        assert torch.equal(tensor, again.classifier.state_dict()[name]), name
    changed[np.isin(episode_ids, report["episodes"]["train"])] += 1.0
    other, _, _ = train_classifier(changed, labels, episode_ids, states, one_step)
    assert not torch.equal(other.classifier.mlp[0].weight, detector.classifier.mlp[0].weight)


def test_training_leaves_torchs_own_random_numbers_alone():
    data = toy(frames=4, episodes=4)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_classifier(*data, RewardConfig(steps=2, views=1))
    assert torch.equal(torch.rand(3), expected)


def test_pure_noise_is_not_called_a_success():
    """With nothing to see, the held-out episodes must show it: no claim that all is well."""
    features, labels, episode_ids, states = toy(noise=1.0)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(9)).half()
    no_guard = RewardConfig(steps=20, views=1, held_out=0.25, batch_size=16, guard=False)
    _, _, report = train_classifier(noise, labels, episode_ids, states, no_guard)
    assert report["losses"]["held_out"][-1] > 0.6  # ln 2 = 0.69 is knowing nothing
    assert not report["admissible"] and report["problems"]


def test_frames_that_are_all_successes_are_refused():
    features, labels, episode_ids, states = toy(frames=4, episodes=4)
    labels = np.isin(episode_ids, [100, 102])
    train_classifier(features, labels, episode_ids, states, RewardConfig(steps=1, views=1))  # failures make up for it
    with pytest.raises(DataError, match="0 episodes without a success"):
        train_classifier(features, np.ones(16, bool), episode_ids, states, RewardConfig(steps=1, views=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 63), ("held_out", 1.0), ("dropout", 1.0), ("consecutive", 0), ("views", -1), ("lr", 0.0)],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: got {re.escape(str(value))}, must"):
        RewardConfig(**{field: value})


def test_the_recipes_of_the_author_s_documents():
    """Devlogs 065 and 084 (field record, section 3); used as `reward=configs/reward_v2.json`."""
    configs = Path(__file__).parent.parent / "configs"
    v2 = settings.load(RewardConfig, configs / "reward_v2.json")
    assert (v2.batch_size, v2.lr, v2.dropout, v2.weight_decay, v2.steps) == (32, 1e-4, 0.2, 0.01, 3000)
    assert v2.patience * v2.evaluate_every >= v2.steps  # it knew no early stop
    v5 = settings.load(RewardConfig, configs / "reward_v5.json")
    assert (v5.batch_size, v5.lr, v5.dropout, v5.weight_decay, v5.steps) == (64, 3e-4, 0.3, 0.02, 5000)
    assert (v5.evaluate_every, v5.patience, v5.min_delta, v5.max_grad_norm) == (0, 10, 0.001, 1.0)
    assert (v5.held_out, v5.seed) == (0.15, 42)
    assert (v5.brightness, v5.contrast, v5.saturation, v5.hue, v5.sharpness) == (0.6, 0.3, 0.5, 0.1, 1.0)


# ---- files


@pytest.fixture
def saved(tmp_path):
    detector = SuccessDetector(classifier(), 0.62, StateGuard((0.05, 0.15), (0.0, 0.4)), 3)
    save_reward(tmp_path / "reward", detector, SCHEMA, "a" * 64, {"dataset": "datasets/demo", "episodes": 20})
    return detector, tmp_path / "reward"


def test_saved_and_loaded_gives_identical_answers(saved):
    detector, folder = saved
    loaded = load_reward(folder, SCHEMA, "a" * 64)
    features = random_features(5, 1)
    assert (loaded.classifier.probabilities(features) == detector.classifier.probabilities(features)).all()
    assert (loaded.threshold, loaded.guard, loaded.consecutive) == (0.62, detector.guard, 3)
    about = json.loads((folder / "reward.json").read_text())
    assert about["provenance"] == {"dataset": "datasets/demo", "episodes": 20} and about["schema"] == SCHEMA


def test_no_guard_is_saved_as_none(tmp_path):
    save_reward(tmp_path, SuccessDetector(classifier(), 0.5, None, 2), SCHEMA, "a", {})
    assert load_reward(tmp_path, SCHEMA, "a").guard is None


def test_another_crop_and_another_encoder_are_refused_by_name(saved):
    """Row 13 of the field record: trained on the squashed frame, run on the cropped one."""
    folder = saved[1]
    squashed = describe(Preprocess(crop=None), ["wrist"], fps=10.0, action_scale=0.02, gripper_step=0.5)
    with pytest.raises(DataError, match=r"another schema: image is .*'crop': \[0, 80, 480, 480\].* there, .*None"):
        load_reward(folder, squashed, "a" * 64)
    with pytest.raises(DataError, match=r"trained on another encoder \(aaaaaaaaaaaa, here it is bbbbbbbbbbbb\)"):
        load_reward(folder, SCHEMA, "b" * 64)


def test_a_random_encoder_of_another_seed_is_another_encoder(tmp_path):
    detector = SuccessDetector(classifier(), 0.5, None, 3)
    save_reward(tmp_path, detector, SCHEMA, trunk_hash(load_resnet10(None, seed=0)), {})
    load_reward(tmp_path, SCHEMA, trunk_hash(load_resnet10(None, seed=0)))
    with pytest.raises(DataError, match="another encoder"):
        load_reward(tmp_path, SCHEMA, trunk_hash(load_resnet10(None, seed=1)))


def test_weights_of_another_network_are_refused_by_file(tmp_path):
    save_reward(tmp_path, SuccessDetector(classifier(cameras=2), 0.5, None, 3), SCHEMA, "a", {})
    with pytest.raises(DataError, match=r"model.safetensors: does not fit; .*Unexpected key.*heads.1"):
        load_reward(tmp_path, SCHEMA, "a")


def test_nothing_is_overwritten_and_no_damage_goes_unnoticed(saved):
    detector, folder = saved
    with pytest.raises(DataError, match="holds a reward classifier already"):
        save_reward(folder, detector, SCHEMA, "a" * 64, {})
    model, about = folder / "model.safetensors", folder / "reward.json"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(DataError, match="model.safetensors: is not the file that reward.json was written for"):
        load_reward(folder, SCHEMA, "a" * 64)
    about.write_text(about.read_text().replace('"threshold"', '"treshold"'))
    with pytest.raises(DataError, match="unknown key 'treshold'; did you mean 'threshold'"):
        load_reward(folder, SCHEMA, "a" * 64)
    about.unlink()
    with pytest.raises(DataError, match="no usable reward classifier: .*reward.json: cannot be read"):
        load_reward(folder, SCHEMA, "a" * 64)
