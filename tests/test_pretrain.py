"""Training the encoder on recorded frames: what it guesses, that it learns to see, and the file it leaves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_reward_script import QUICK, SMALL, film

import train_reward
from so101.config import ConfigError, parse
from so101.errors import DataError
from so101.learn.pretrain import Guesser, PretrainConfig, guess_error, pretrain, what_follows
from so101.learn.resnet10 import ResNet10, load_resnet10, trunk_hash
from so101.learn.reward import read_reward_file
from so101.tools import train_encoder


def test_what_follows_is_the_episodes_own_future():
    """Two episodes: in the first the tool goes 1, 2, 3 .. cm a row along x, and opens; the second is one row long."""
    states = np.zeros((12, 18), np.float32)
    states[:11, 12] = np.arange(11) * np.arange(1, 12) / 2 / 100  # 0, 1, 3, 6, 10, ...
    states[:11, 5] = np.arange(11) / 10
    states[11, 12:15] = 9
    actions = np.arange(48).reshape(12, 4) / 48
    actions[[10, 11]] = np.nan
    ids = np.array([4] * 11 + [7])
    success = ids == 7
    found = what_follows(states, actions, success, ids)
    assert found.shape == (12, 21) and found.dtype == np.float32
    moved, opened = found[:, 4:20:4], found[:, 7:20:4]  # along x and of the opening, each 1, 2, 4 and 8 rows on
    assert moved[2] == pytest.approx([0.03, 0.07, 0.18, 0.52])  # 6, 10, 21 and 55 less 3
    assert opened[2] == pytest.approx([0.3, 0.4, 0.6, 1.0])
    assert moved[9] == pytest.approx([0.10] * 4)  # the closing observation stands for all beyond it
    assert not found[10:, 4:20].reshape(2, 4, 4)[:, :, :3].any()  # never into the next episode
    assert opened[10:].tolist() == [[1] * 4, [0] * 4]
    assert np.array_equal(found[:10, :4], actions[:10].astype(np.float32)) and np.isnan(found[10:, :4]).all()
    assert found[:, 20].tolist() == [0] * 11 + [1]


def test_every_parameter_gets_a_gradient_and_what_is_not_known_gives_none():
    torch.manual_seed(0)
    guesser = Guesser(ResNet10(), cameras=2, size=1, targets=3)
    images = torch.randint(0, 256, (4, 2, 32, 32, 3), dtype=torch.uint8)
    guess = guesser(images, torch.randn(4, 18))
    guess.retain_grad()
    target = torch.tensor([[1.0, float("nan"), 0.0]] * 4)
    loss = guess_error(guess, target)
    loss.backward()
    by_hand = (guess.detach()[:, [0, 2]].numpy() - [1.0, 0.0]) ** 2
    assert float(loss.detach()) == pytest.approx(by_hand.mean(), rel=1e-5)
    assert not guess.grad[:, 1].any() and guess.grad[:, [0, 2]].all()
    without = [name for name, p in guesser.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def squares(episodes, seed):
    """Frames of noise with a red square somewhere; where it is stands in no state. Four frames an episode."""
    rng = np.random.default_rng(seed)
    count = 4 * episodes
    images = rng.integers(90, 160, (count, 1, 32, 32, 3), dtype=np.uint8)
    place = rng.integers(0, 23, (count, 2))
    for image, (top, left) in zip(images, place, strict=True):
        image[0, top : top + 10, left : left + 10] = (200, 30, 30)
    states = rng.normal(size=(count, 18)).astype(np.float32)
    return torch.from_numpy(images), states, place.astype(np.float32), np.repeat(np.arange(episodes), 4)


def test_it_learns_to_see_what_the_state_does_not_tell():
    """In episodes that were held out: a constant errs by 1.08, the trained guess by 0.29."""
    config = PretrainConfig(steps=8, batch_size=16, held_out=0.2, pad=0, lr=3e-3)
    trunk = load_resnet10(None)
    before = trunk_hash(trunk)
    steps = []
    error, of_mean = pretrain(trunk, *squares(30, 0), config, 0, steps.append)
    assert 0.7 < of_mean < 1.4 and error < 0.5 * of_mean
    assert trunk_hash(trunk) != before and not any(p.requires_grad for p in trunk.parameters())
    assert steps == list(range(1, 9))


def test_held_out_episodes_are_not_trained_on():
    """Of two episodes one is held out: what its frames, states and targets are changes nothing."""
    config = PretrainConfig(steps=1, batch_size=4)
    images, states, targets, ids = squares(2, 1)

    def trained(spoiled):
        other = [part.clone() if torch.is_tensor(part) else part.copy() for part in (images, states, targets)]
        for part in other:
            rows = np.flatnonzero(ids == spoiled)
            part[rows] = part[rows[::-1].copy()]
        trunk = load_resnet10(None)
        pretrain(trunk, *other, ids, config, 0)
        return trunk_hash(trunk)

    hashes = [trained(None), trained(0), trained(1)]
    assert sorted(hashes[0] == other for other in hashes[1:]) == [False, True]


def test_what_never_changes_is_not_guessed():
    """Two episodes, the training one without success: divided by a deviation of 0 the error was 25495762944."""
    images, states, targets, ids = squares(2, 1)
    targets = np.concatenate([targets, ids[:, None].astype(np.float32)], axis=1)
    error, of_mean = pretrain(
        load_resnet10(None), images, states, targets, ids, PretrainConfig(steps=1, batch_size=4), 0
    )
    assert error < 100 and of_mean < 100
    with pytest.raises(DataError, match="nothing in them changes"):
        pretrain(load_resnet10(None), images, states, targets[:, -1:], ids, PretrainConfig(steps=1), 0)


def test_one_episode_is_too_few():
    with pytest.raises(DataError, match="got 1 labelled episodes, needs 2"):
        pretrain(load_resnet10(None), *squares(1, 0), PretrainConfig(), 0)


def test_the_tool_writes_what_it_trained_and_the_classifier_takes_it(tmp_path, monkeypatch, capsys):
    film(tmp_path / "demos", 0)
    output, trunks = tmp_path / "new" / "encoder.safetensors", []

    def kept(trunk, *rest):
        trunks.append(trunk)
        return pretrain(trunk, *rest)

    monkeypatch.setattr(train_encoder, "pretrain", kept)
    words = [f"dataset={tmp_path / 'demos'}", f"output={output}", "training.steps=2", "training.batch_size=8"]
    words += ["preprocess.crop=[0,8,48,48]", "preprocess.image_size=32"]
    train_encoder.main(parse(train_encoder.Config, words, ""))
    assert "held-out episodes: error" in capsys.readouterr().out
    loaded = load_resnet10(str(output))
    assert trunk_hash(loaded) == trunk_hash(trunks[0]) != trunk_hash(load_resnet10(None))
    train_reward.main(
        train_reward.Config(
            str(tmp_path / "demos"),
            str(tmp_path / "reward"),
            encoder=str(output),
            preprocess=SMALL,
            reward=replace(QUICK, steps=1),
        )
    )
    assert read_reward_file(tmp_path / "reward").trunk_hash == trunk_hash(loaded)


def test_a_file_that_is_there_is_kept_before_anything_is_read(tmp_path):
    output = tmp_path / "encoder.safetensors"
    output.write_text("mine")
    with pytest.raises(DataError, match="encoder.safetensors exists and is not overwritten"):
        train_encoder.main(train_encoder.Config(str(tmp_path / "nothing"), str(output)))
    assert output.read_text() == "mine" and list(tmp_path.iterdir()) == [output]


def test_what_it_cannot_use_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size: got 0"):
        parse(train_encoder.Config, ["training.batch_size=0"], "")
    film(tmp_path / "demos", 0)
    with pytest.raises(DataError, match="image"):
        train_encoder.main(train_encoder.Config(str(tmp_path / "demos"), str(tmp_path / "e.safetensors")))
    assert not (tmp_path / "e.safetensors").exists()
