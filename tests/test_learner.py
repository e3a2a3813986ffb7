"""What the learner makes of what actors tell it, and what an actor accepts of its learner."""

import threading

import numpy as np
import pytest
from test_scripts import made, resumed, sac_config  # noqa: F401  (a fixture)

import train_sac
from so101.errors import DataError
from so101.learn.checkpoint import find_checkpoint
from so101.learn.link import Corrected, Discarded, Evaluated, Joined, Left, Link, Moved, Recorded, Seen, Started
from so101.rig import open_rig
from so101.runfolder import begin_run
from so101.runlog import read_rows


@pytest.fixture
def learner(made, tmp_path):  # noqa: F811
    learner, _ = resumed(sac_config(made, tmp_path / "run"))
    yield learner
    learner.close()


def seen(learner, time):
    images = np.full(learner.replay.images.shape[1:], time % 256, np.uint8)
    return Seen(images, np.full(18, time, np.float32), learner.replay.encoder.encode(images))


def moved(learner, time, ended=False):
    """The transition that leads to `time`; its action says so."""
    action = np.full(4, time / 1000, np.float32)
    return Moved(action, float(ended), ended, ended, False, False, seen(learner, time), time / 10, 1, 0.1, 0.01, 0.0)


def online(learner):
    """(time, next time, action * 1000, reward) of each online transition, in the order of their slots."""
    replay = learner.replay
    slots = replay.pools[1]
    rows = replay.state[slots, 0], replay.state[replay.next_slot[slots], 0], replay.action[slots, 0] * 1000
    return list(zip(*(np.rint(row).astype(int).tolist() for row in (*rows, replay.reward[slots])), strict=True))


def test_actors_that_take_turns_do_not_mix_and_a_dropped_episode_never_was(learner):
    for name, message in (
        ("a", Started(0, seen(learner, 0))), ("b", Started(0, seen(learner, 100))), ("a", moved(learner, 1)),
        ("b", moved(learner, 101)), ("a", moved(learner, 2)), ("b", moved(learner, 102)), ("b", Discarded()),
        ("a", moved(learner, 3, ended=True)), ("b", Started(0, seen(learner, 200))), ("b", moved(learner, 201, True)),
    ):  # fmt: skip
        learner.take(name, message)
    assert online(learner) == [(0, 1, 1, 0), (1, 2, 2, 0), (2, 3, 3, 1), (200, 201, 201, 1)]
    assert learner.steps == 4 and learner.known("a") == learner.known("b") == 1 and not learner.acting
    rows = [(row["actor"], row["episode"], row["episode_steps"]) for row in read_rows(learner.folder)]
    assert rows == [("a", "0", "3"), ("b", "0", "1")]


def test_an_actor_that_comes_back_is_heard_once(learner):
    learner.take("a", Started(0, seen(learner, 0)))
    learner.take("a", moved(learner, 1))
    learner.take("a", Joined("a", "folder", "", {}))  # killed, and back: what it was in never was
    assert online(learner) == [] and learner.steps == 0 and learner.known("a") == 0
    images = np.stack([seen(learner, time).images for time in (10, 11)])
    ends, states = np.array([True]), np.array([[10] * 18, [11] * 18], np.float32)
    path = Recorded(
        0, states, images, np.full((1, 4), 0.011, np.float32), ends.astype(np.float32), ends, ~ends, ~ends, True
    )
    for message in (path, path, Started(0, seen(learner, 10)), moved(learner, 11, True)):  # each but the first is known
        learner.take("a", message)
    assert online(learner) == [(10, 11, 11, 1)] and learner.known("a") == 1
    learner.take("a", Corrected(0, 0.0, False))
    assert online(learner) == [(10, 11, 11, 0)]
    learner.take("a", Corrected(0, 1.0, True))
    learner.take("a", Started(1, seen(learner, 20)))
    learner.take("a", moved(learner, 21))
    learner.take("a", Left())
    assert online(learner) == [(10, 11, 11, 1)] and learner.steps == 1
    assert [row["success"] for row in read_rows(learner.folder)] == ["1"]


def test_weights_that_act_otherwise_are_refused_and_alarms_are_said_once(made, tmp_path, capsys):  # noqa: F811
    """A swap that mixed two versions, or another version of the program, would drive the arm."""
    config = sac_config(made, tmp_path / "run")
    eyes = train_sac.make_eyes(config)
    learner, link = resumed(config, eyes)
    actor = train_sac.make_actor(config, train_sac.known_demonstrations(config), eyes, link)
    good = learner.weights()
    actor._swap(good)
    tensors = {name: tensor.clone() for name, tensor in good.tensors.items()}
    tensors["actor.mean.bias"][2] += 0.1
    with pytest.raises(DataError, match=r"on the fixed observation the policy's action is 0\.\d+ off the learner's"):
        actor._swap(good._replace(tensors=tensors))
    tensors["actor.mean.bias"][2] = np.nan
    with pytest.raises(DataError, match="is nan off"):
        actor._swap(good._replace(tensors=tensors))
    with pytest.raises(DataError, match="another encoder"):
        actor._swap(good._replace(trunk_hash="other"))
    learner.alarms.append("lighting drift: close the curtain")
    for _ in range(2):
        link.report(learner.status())
        actor._show()
    assert capsys.readouterr().out.count("lighting drift: close the curtain") == 1
    actor.close()
    learner.close()


def test_a_learner_is_alone_in_its_folder_and_saves_nothing_where_it_learned_nothing(made, tmp_path):  # noqa: F811
    config = sac_config(made, tmp_path / "run", steps=30)
    train_sac.main(config)
    last = (tmp_path / "run" / "checkpoints" / "last").read_text()
    eyes, known = train_sac.make_eyes(config), train_sac.known_demonstrations(config)
    learner = train_sac.make_learner(config, eyes.encoder, known)
    with pytest.raises(DataError, match="is writing to it; stop that first"):
        train_sac.make_learner(config, eyes.encoder, known)
    later = threading.Timer(0.5, learner._lock.release)  # as one that saves before it ends
    later.start()
    train_sac.make_learner(config, eyes.encoder, known, patience=20).close()
    later.join()
    learner.save_last()  # no actor has come yet, so it has taken in 0 steps
    learner.close()
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == last
    train_sac.make_learner(config, eyes.encoder, known).close()


def test_the_best_is_known_again_after_a_kill(made, tmp_path):  # noqa: F811
    """It was forgotten with the checkpoint that was saved before its evaluation, and given to a worse one."""
    config = sac_config(made, tmp_path / "run", steps=30)
    train_sac.main(config)
    checkpoint, best = find_checkpoint(tmp_path / "run").name, tmp_path / "run" / "checkpoints" / "best"
    learner, _ = resumed(config)
    learner.take("actor", Evaluated(checkpoint, 3, 5, 20.0))
    learner.close()  # killed here: no checkpoint has heard of it
    assert best.read_text().strip() == checkpoint
    learner, _ = resumed(config)
    learner.take("actor", Evaluated("000031", 2, 5, 9.0))
    learner.take("actor", Evaluated("000032", 3, 5, 25.0))
    learner.take("actor", Evaluated(checkpoint, 5, 5, 1.0))  # told twice
    assert best.read_text().strip() == checkpoint
    learner.take("actor", Evaluated("000033", 3, 5, 19.0))
    assert best.read_text().strip() == "000033"
    learner.close()


class Sulking(Link):
    """A learner that is silent until it was looked at so many times."""

    def __init__(self, name, looks):
        super().__init__(name)
        self.looks, self.sent = looks, []

    @property
    def silent(self):
        self.looks -= 1
        return 99.0 if self.looks > 0 else 0.0

    def send(self, message):
        self.sent.append((self.looks, message))


@pytest.mark.parametrize("quits", [False, True])
def test_the_arm_holds_after_a_reset_while_the_learner_is_silent(made, tmp_path, capsys, quits):  # noqa: F811
    config = sac_config(made, tmp_path / "run", steps=5)
    config.env.control_time_s = 0.5
    eyes = train_sac.make_eyes(config)
    begin_run(tmp_path / "run", config)
    link = Sulking("actor", looks=10)
    actor = train_sac.make_actor(config, train_sac.known_demonstrations(config), eyes, link)
    with open_rig(config.rig, 1) as rig:
        env = rig.make_env(config.env, config.preprocess, config.reward, 1, eyes)
        resets, reset, moves, command = [], env.reset, [], rig.arm.command
        env.reset = lambda: resets.append(link.looks) or reset()
        rig.arm.command = lambda goals: moves.append(link.looks) or command(goals)
        if quits:
            rig.teleop.keys.poll, rig.teleop.keys.quits = lambda: ["quit"] if link.looks < 6 else [], lambda: False
        for _ in train_sac.run_actor(config, actor, env, rig, eyes):
            pass
    actor.close()
    assert (
        "the learner has been silent for 99 s; the arm holds until it is back, q ends the run"
        in capsys.readouterr().err
    )
    started = [looks for looks, message in link.sent if isinstance(message, Started)]
    if quits:
        assert not link.sent and actor.steps == 0
    else:
        assert started and started[0] <= 0 and len(resets) == len(started) + 1  # what it saw before the wait is old
        assert not [looks for looks in moves if 1 <= looks <= 8]  # nothing was commanded meanwhile
