"""train_reward.py on small films made by the real writer: what it keeps, what it judges, and what a codec changes."""

import base64
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_lint import ROWS, take

import record
import train_reward
from so101.config import ConfigError, parse
from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels, labels_path
from so101.data.writer import DatasetWriter
from so101.errors import DataError
from so101.images import preprocess
from so101.learn.networks import images_to_input
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.reward import RewardConfig, load_reward
from so101.schema import Preprocess, describe

SMALL = Preprocess([0, 8, 48, 48], 32)
QUICK = RewardConfig(views=1, steps=40, evaluate_every=10, held_out=0.4, batch_size=16, lr=1e-3, seed=1)
STARTS = 9  # the frame at which an episode's success starts, of ROWS + 1


def film(folder, seed, *, dim=1.0, spec=SMALL, wrong=None):
    """Six episodes of changing patches; in each other one a red block stands before them from frame 9 on.

    `wrong`: an episode without a block that is labelled a success from frame 9 all the same. Returns the frames of
    each episode as they went in.
    """
    rng = np.random.default_rng(seed)
    schema = describe(spec, ["wrist"], 10, 0.02, 0.5)
    writer = DatasetWriter(folder, fps=10, cameras={"wrist": (48, 64)}, task="lift", schema=schema)
    labels, raw = Labels(folder.name), []
    for episode in range(6):
        succeeds = episode % 2 == 0
        states, actions = take(episode)
        frames = (60 + 90 * rng.random((ROWS + 1, 6, 8, 3))).repeat(8, axis=1).repeat(8, axis=2)
        frames += rng.normal(0, 4, frames.shape)  # a sensor's
        if succeeds:
            frames[STARTS:, 12:36, 20:44] = (190, 40, 40)
        raw.append((dim * frames).clip(0, 255).astype(np.uint8))
        for row, frame in enumerate(raw[-1][:ROWS]):
            rewarded = float(succeeds and row >= STARTS - 1)
            writer.add(states[row], actions[row], {"wrist": frame}, reward=rewarded, capture_time=0.1 * row)
        writer.save_episode(states[ROWS], {"wrist": raw[-1][ROWS]}, 0.1 * ROWS)
        marked = succeeds or episode == wrong
        labels.set(episode, EpisodeLabel(success_start=STARTS) if marked else EpisodeLabel(all_fail=True))
    writer.close()
    labels.save(labels_path(folder))
    return raw


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Films of the same block, the frames that went into the first, and a classifier trained on it by the script."""
    folder = tmp_path_factory.mktemp("made")
    raw = film(folder / "demos", 0)
    film(folder / "other", 1, dim=0.8, wrong=3)
    train_reward.main(
        train_reward.Config(str(folder / "demos"), str(folder / "reward"), preprocess=SMALL, reward=QUICK)
    )
    return folder, raw


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluate(folder, dataset, **changed):
    """What `train_reward.py --evaluate dataset` does, by its own command line."""
    words = ["--evaluate", str(dataset), f"output={folder / 'reward'}", *(f"{k}={v}" for k, v in changed.items())]
    train_reward.main(parse(train_reward.Config, words, ""))


def test_the_best_and_the_last_are_kept_and_either_can_be_used(made):
    folder = made[0] / "reward"
    schema, trunk = open_dataset(made[0] / "demos").schema, trunk_hash(load_resnet10(None))
    best, final = load_reward(folder, schema, trunk), load_reward(folder / "final", schema, trunk)
    report = json.loads((folder / "reward.json").read_text())["provenance"]["report"]
    assert best.threshold == report["threshold"] and final.threshold == report["final"]["threshold"]
    assert report["admissible"] and 0.9 < report["at_threshold"]["accuracy"] <= 1.0
    differ = best.classifier.mlp[0].weight != final.classifier.mlp[0].weight
    assert differ.any() == (report["losses"]["best_step"] != report["losses"]["step"][-1])
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3 and "middle of the widest range" in page
    # 3 successes of 6 observations from frame 9 of 15 on; 0.4 of 3 and of 3 episodes are held out
    thin = ["18 positive frames of 200 wanted, 182 to go", "3 episodes show a success", "only 2 episodes are judged"]
    assert all(f"<li>{words}" in page for words in thin)


def test_what_stands_in_the_way_of_a_new_classifier_is_named(made, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    what = {"demos": "a dataset", "reward": "a reward classifier, to be used as it is"}
    places = {made[0] / name: kind for name, kind in what.items()}
    places |= {tmp_path / name: "no reward classifier" for name in ("file", "link")}
    for place, kind in places.items():
        with pytest.raises(DataError, match=f"{place}: exists already and is {kind}; .* name another with output="):
            train_reward.main(train_reward.Config(str(made[0] / "demos"), str(place), preprocess=SMALL, reward=QUICK))


def test_a_classifier_is_judged_on_another_dataset_and_nothing_is_trained(made, capsys):
    """Episode 3 of the other film is labelled a success that it does not show: the page must bring that up."""
    folder, report = made[0], made[0] / "judged"
    before = contents(folder / "reward")
    evaluate(folder, folder / "other", report=report)
    printed = capsys.readouterr().out
    assert contents(folder / "reward") == before  # not a byte of the classifier changed
    found = json.loads((report / "evaluation.json").read_text())
    assert found["threshold"] == json.loads(before["reward.json"])["threshold"]
    assert found["missed_episodes"] == 1 and found["problems"] == ["episode 3: success not found"]
    assert {(e["episode"], e["frame"]) for e in found["hard"]["misses"]} == {(3, frame) for frame in range(9, 15)}
    assert found["hard"]["false_positives"] == [] and [e["episode"] for e in found["held_out"]] == list(range(6))
    assert [e["delay_frames"] for e in found["held_out"][::2]] == [2, 2, 2]  # the vote's two frames
    page = (report / "report.html").read_text()
    captions = re.findall(r"<figcaption>#(\d+)/(\d+) (\d\.\d+)", page)
    worst = found["hard"]["misses"][0]
    assert len(captions) == 6 and captions[0] == (
        str(worst["episode"]),
        str(worst["frame"]),
        f"{worst['probability']:.3f}",
    )
    assert re.search(r"of 6 episodes 0 with a false success, 1 missed", printed) and "trained on" not in printed
    assert "single false positives" in printed and "train reward" not in printed
    assert "only 6 episodes are judged" in printed and re.search(r"\n +3 +9 +- +-", printed)  # never fired
    with pytest.raises(DataError, match="judged: exists already and is a classifier's evaluation; .* with report="):
        evaluate(folder, folder / "other", report=report)


def test_the_thumbnail_is_the_frame_it_names(made):
    """The one picture of the page's first figure, decoded, is that frame as the network saw it."""
    folder = made[0]
    evaluate(folder, folder / "other", report=folder / "seen")
    page = (folder / "seen" / "report.html").read_text()
    png, episode, frame = re.search(
        r"<figure[^>]*><img[^>]*base64,([^\"]*)\">\s*<figcaption>#(\d+)/(\d+)", page
    ).groups()
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    recorded = open_dataset(folder / "other").episodes[int(episode)].frame("wrist", int(frame))
    np.testing.assert_array_equal(shown, preprocess(recorded, SMALL))


def test_its_own_data_another_schema_and_another_trunk_are_not_passed_over(made, tmp_path, capsys):
    folder = made[0]
    evaluate(folder, folder / "demos")
    assert "is what it was trained on" in capsys.readouterr().out
    film(tmp_path / "uncropped", 2, spec=Preprocess(None, 32))
    with pytest.raises(DataError, match=r"another schema: image is"):
        evaluate(folder, tmp_path / "uncropped")
    about = json.loads((folder / "reward" / "reward.json").read_text()) | {"trunk_hash": "b" * 64}
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "reward.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="trained on another encoder"):
        evaluate(tmp_path, folder / "other")
    with pytest.raises(DataError, match="no usable reward classifier"):
        evaluate(tmp_path / "nowhere", folder / "other")
    with pytest.raises(ConfigError, match="which only evaluate=DATASET writes"):
        train_reward.Config(report="page")


def test_a_recipe_is_laid_into_any_config_and_its_keys_can_be_changed():
    configs = Path(train_reward.__file__).parent / "configs"
    words = ["--config", str(configs / "reward.json"), f"reward={configs / 'reward_v2.json'}", "reward.steps=7"]
    config = parse(train_reward.Config, words, "")
    assert config.dataset == "outputs/grasp_demos" and (config.reward.lr, config.reward.steps) == (1e-4, 7)
    assert parse(train_reward.Config, words[:2], "").reward.seed == 42  # the author's last is the usual one


def through_codec(folder, raw, classifier_folder, spec):
    """Each frame's probability as it was filmed and as it is read back: two (N,) of the rows, not the closing ones."""
    dataset = open_dataset(folder)
    trunk = load_resnet10(None)
    detector = load_reward(classifier_folder, dataset.schema, trunk_hash(trunk))

    def judged(frames):
        pixels = torch.from_numpy(np.stack([preprocess(frame, spec) for frame in frames]))
        maps = [trunk(images_to_input(part)).half()[:, None] for part in pixels.split(16)]
        return detector.classifier.probabilities(torch.cat(maps))

    read = [frame for episode in dataset.episodes for frame in episode.frames("wrist")]
    filmed = [
        frame for episode, frames in zip(dataset.episodes, raw, strict=True) for frame in frames[: episode.length]
    ]
    assert len(read) == len(filmed) and not np.array_equal(read[0], filmed[0])  # the codec did something
    return judged(filmed), judged(read), detector.threshold


def test_a_frame_through_the_codec_is_judged_as_the_frame_itself(made):
    filmed, read, threshold = through_codec(made[0] / "demos", made[1], made[0] / "reward", SMALL)
    assert filmed.max() - filmed.min() > 0.8  # it does tell them apart
    difference = np.abs(filmed - read)
    print(
        f"through h264: mean difference {difference.mean():.4f}, largest {difference.max():.4f} of {len(read)} frames"
    )
    assert difference.mean() < 0.01 and difference.max() < 0.1 and ((filmed > threshold) == (read > threshold)).all()


@pytest.mark.slow
def test_a_simulated_frame_through_the_codec_is_judged_as_the_frame_itself(tmp_path, monkeypatch):
    raw = []

    class Keeping(DatasetWriter):
        """Also remembers what was filmed."""

        def add(self, state, action, frames, **about):
            if len(raw) == self.episodes:
                raw.append([])
            raw[-1].append(frames["wrist"].copy())
            super().add(state, action, frames, **about)

    monkeypatch.setattr(record, "DatasetWriter", Keeping)
    record.main(record.Config(dataset=str(tmp_path / "demos"), episodes=12, failures=4))
    reward = RewardConfig(views=1, steps=150, held_out=0.3)
    train_reward.main(train_reward.Config(str(tmp_path / "demos"), str(tmp_path / "reward"), reward=reward))
    filmed, read, threshold = through_codec(tmp_path / "demos", raw, tmp_path / "reward", Preprocess())
    difference = np.abs(filmed - read)
    print(
        f"through h264: mean difference {difference.mean():.4f}, largest {difference.max():.4f} of {len(read)} frames"
    )
    assert filmed.max() - filmed.min() > 0.8
    assert difference.mean() < 0.01 and np.mean((filmed > threshold) == (read > threshold)) > 0.99
