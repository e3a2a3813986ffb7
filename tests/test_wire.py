"""The link over a socket: two ends that come and go, messages that are whole, ours, and in order, or refused."""

import contextlib
import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from so101.errors import ConfigError, DataError
from so101.learn import wire
from so101.learn.link import (
    Corrected,
    Discarded,
    Evaluated,
    Joined,
    Left,
    Moved,
    Recorded,
    Seen,
    Started,
    Status,
    Weights,
)  # fmt: skip
from so101.learn.sealed import Answer, Beat, Envelope, make_secret, read_secret, seal, unseal
from so101.learn.wire import ActorEnd, LearnerEnd

SECRET, ABOUT = b"s" * 64, {"schema.fps": 10.0, "trunk": "abc"}
RNG = np.random.default_rng(0)


def seen():
    images, views = RNG.integers(0, 256, (1, 8, 8, 3), np.uint8), torch.randn(1, 1, 4, 2, 2).half()
    return Seen(images, RNG.standard_normal(18).astype(np.float32), views)


def moved(number, ended=False):
    return Moved(np.full(4, number / 100, np.float32), 0.0, ended, ended, False, False, seen(), 0.1, 3, 0.5, 0.01, 0.0)


def recorded(number):
    n = 3
    images, states = RNG.integers(0, 256, (n + 1, 1, 8, 8, 3), np.uint8), np.zeros((n + 1, 18), np.float32)
    flags = np.array([False, False, True])
    return Recorded(
        number, states, images, np.ones((n, 4), np.float32), flags.astype(np.float32), flags, ~flags, flags, True
    )


def weights(version, checkpoint="", size=10):
    return Weights(
        version, {"a.b": torch.full((size,), float(version)), "c": torch.arange(3)}, "abc", np.ones(4), checkpoint
    )


ALL = [
    Joined("one", "folder", "x", {"a": 1.5, "b": [1, 2], "c": None}), Left(), Started(3, seen()), moved(1), Discarded(),
    Corrected(2, 1.0, True), recorded(4), Evaluated("000100", 3, 10, 12.5), weights(7), Answer(3, "no", True),
    Beat(Status(1, 2, ("an alarm",)), ("x/1", 2), None, "one"),
]  # fmt: skip


def equal(a, b):
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("message", ALL, ids=lambda m: type(m).__name__)
def test_a_message_comes_out_as_it_went_in_and_not_at_all_when_a_bit_was_changed(message):
    sealed = seal(SECRET, Envelope("me", 5, message))
    assert equal(unseal(SECRET, sealed), Envelope("me", 5, message))
    for place in {0, 31, 32, len(sealed) // 2, len(sealed) - 1}:
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(DataError, match="was changed, or written with another secret"):
            unseal(SECRET, bytes(changed))
    with pytest.raises(DataError, match="another secret"):
        unseal(b"t" * 64, sealed)


def wait_for(what, seconds=10.0):
    """The first true value of what()."""
    until = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
    return value


class Book:
    """What a learner keeps of its actors: whole episodes by name, and the one that runs."""

    def __init__(self, end):
        self.end, self.whole, self.running = end, {}, {}

    def read(self):
        for name, message in self.end.receive():
            whole = self.whole.setdefault(name, [])
            match message:
                case Joined():
                    self.running.pop(name, None)
                    self.end.welcome(name, len(whole))
                case Recorded():
                    assert message.number == len(whole)
                    whole.append(message)
                case Started() if message.number == len(whole):
                    self.running[name] = [message]
                case Discarded():
                    self.running.pop(name)
                case Moved() if name in self.running:
                    self.running[name].append(message)
                    if message.terminated:
                        whole.append(self.running.pop(name))
                case Left():
                    self.running.pop(name, None)
        self.end.report(Status(sum(map(len, self.whole.values())), 0))
        return self


@contextlib.contextmanager
def actor(port, name="one", disk=(), about=ABOUT, secret=SECRET, identity=None):
    """An actor's end, and its disk: a list of recorded episodes."""
    disk = list(disk)
    end = ActorEnd(
        name,
        identity or name,
        about,
        lambda: ("127.0.0.1", port[0]) if port else None,
        lambda: secret,
        lambda known: iter(disk[known:]),
    )
    end.disk = disk
    try:
        yield end
    finally:
        end.close()


@contextlib.contextmanager
def learner(port=0):
    end = LearnerEnd(SECRET, port, ABOUT)
    try:
        yield Book(end)
    finally:
        end.close()


def act(end, length, number=None):
    """One whole episode: on disk before its last transition is sent."""
    number = len(end.disk) if number is None else number
    end.send(Started(number, seen()))
    for step in range(length):
        if step == length - 1:
            end.disk.append(recorded(number))
        end.send(moved(step, step == length - 1))


def test_experience_arrives_in_order_and_weights_whole(monkeypatch):
    monkeypatch.setattr(wire, "PART", 1000)  # so that all but the smallest cross in parts
    with learner() as book, actor([book.end.port], disk=[recorded(0), recorded(1)]) as end:
        wait_for(lambda: len(book.read().whole.get("one", [])) == 2)
        act(end, 30)
        act(end, 2)
        wait_for(lambda: len(book.read().whole.get("one", [])) == 4)
        first, second = book.whole["one"][2:]
        assert [m.action[0] for m in first[1:]] == [np.float32(t / 100) for t in range(30)] and len(second) == 3
        wait_for(lambda: book.read() and end.status.steps == 4)
        assert end.take_weights() is None
        for version in range(1, 6):  # the first is on its way, so the others but the last are left out
            book.end.publish(weights(version, size=5000))
        assert equal(wait_for(end.take_weights), weights(1, size=5000))
        wait_for(book.end._all_taken)
        book.end.publish(weights(6, size=5000))
        assert equal(wait_for(end.take_weights), weights(6, size=5000))
        assert end.take_weights() is None
        book.end.publish(weights(7, "000100"))
        assert equal(wait_for(end.take_evaluation), weights(7, "000100")) and end.take_weights() is None


def test_a_learner_that_forgot_everything_is_told_again():
    """It dies in the middle of the third episode; another life of it listens on another port."""
    port = []
    with actor(port) as end:
        with learner() as book:
            assert end.silent == np.inf and not end.heard
            port[:] = [book.end.port]
            wait_for(lambda: book.read().end.actors)
            act(end, 3)
            act(end, 4)
            end.send(Started(2, seen()))
            end.send(moved(0))
            wait_for(lambda: book.read().running.get("one") and len(book.running["one"]) == 2)
            book.end.publish(weights(100))
            wait_for(end.take_weights)
        port.clear()
        end.send(moved(1))  # nobody hears it yet, and nothing waits for it
        wait_for(lambda: end.silent > 0.5)
        with learner() as book:
            port[:] = [book.end.port]
            wait_for(lambda: book.read().running.get("one") and len(book.running["one"]) == 3)  # from its beginning
            assert [type(episode) for episode in book.whole["one"]] == [Recorded, Recorded]
            end.disk.append(recorded(2))
            end.send(moved(2, True))
            act(end, 5)
            wait_for(lambda: len(book.read().whole["one"]) == 4)
            assert [len(episode) for episode in book.whole["one"][2:]] == [4, 6]
            assert end.silent < 1 and not book.running
            book.end.publish(weights(3))  # a lower version than before, and newer all the same
            assert wait_for(end.take_weights).version == 3


def test_what_was_sent_before_the_learner_was_there_is_not_lost():
    """A resumed actor begins an episode before it has told of those on its disk."""
    port = []
    with actor(port, disk=[recorded(0), recorded(1)]) as end, learner() as book:
        end.send(Started(2, seen()))
        end.send(moved(0))
        port[:] = [book.end.port]
        wait_for(lambda: len(book.read().running.get("one", [])) == 2)
        assert len(book.whole["one"]) == 2
        end.disk.append(recorded(2))
        end.send(moved(1, True))
        wait_for(lambda: len(book.read().whole["one"]) == 3)
        book.end.send_back("one", "for whatever reason")
        act(end, 3)
        wait_for(lambda: len(book.read().whole["one"]) == 4)


def test_a_learner_that_hangs_is_silent_and_holds_nobody_up():
    with learner() as book, actor([book.end.port]) as end:
        wait_for(lambda: book.read().end.actors)
        time.sleep(0.3)  # nobody reads or reports any more
        began = time.perf_counter()
        for step in range(300):  # far more than may wait
            end.send(moved(step) if step else Started(0, seen()))
            end.take_weights()
        assert time.perf_counter() - began < 0.5 and end.silent > 0.25
        wait_for(lambda: len(book.read().running.get("one", [])) == 300)
        assert [m.action[0] for m in book.running["one"][1:]] == [np.float32(t / 100) for t in range(1, 300)]


def test_whoever_reads_the_keys_can_neither_forge_nor_lose_experience(capfd):
    with learner() as book, actor([book.end.port]) as end:
        end.send(Started(0, seen()))
        wait_for(lambda: book.read().running)
        intruder = TCPStore("127.0.0.1", book.end.port, is_master=False, wait_for_workers=False)
        keys = intruder.list_keys()  # so no key is a secret
        queue = next(key for key in wait_for(lambda: intruder.list_keys() or keys) if key.endswith("beat"))
        prefix = queue.removesuffix("beat")
        session = next(iter(book.end._actors))
        beat = intruder.get(queue)
        forged = seal(b"guess" * 10, Envelope(session, 2, moved(66, True)))
        for entry in (b"w" + forged, b"rubbish", b"w", b"p" + json.dumps(["x", 10**9]).encode(), b"w" + beat):
            intruder.queue_push(f"{prefix}from/{session}", entry)
            wait_for(lambda: book.read().end.actors == 0)
            wait_for(lambda: book.read().end.actors == 1)  # it is asked to come again, and does
            session = next(iter(book.end._actors))
            intruder.queue_push(f"{prefix}join", entry)
        wait_for(lambda: book.read().running)
        act(end, 4)
        act(end, 3)
        wait_for(lambda: len(book.read().whole["one"]) == 2)
        assert [len(episode) - 1 for episode in book.whole["one"]] == [4, 3]
        actions = {float(m.action[0]) for episode in book.whole["one"] for m in episode[1:] if isinstance(m, Moved)}
        assert 0.66 not in {round(a, 2) for a in actions}
    assert "it is refused" in capfd.readouterr().err


def test_an_actor_with_another_config_or_a_taken_name_is_refused():
    with learner() as book:
        with actor([book.end.port], about=ABOUT | {"schema.fps": 20.0}) as other:
            wait_for(lambda: book.read() and other._failed)
            with pytest.raises(ConfigError, match=r"schema.fps is 20.0 there, 10.0 at the learner"):
                other.silent  # noqa: B018
        with actor([book.end.port]) as first:
            wait_for(lambda: book.read().end.actors)
            with actor([book.end.port], identity="another folder") as second:
                wait_for(lambda: book.read() and second._failed)
                with pytest.raises(ConfigError, match="knows an actor 'one' with another run folder; give each"):
                    second.silent  # noqa: B018
            act(first, 3)  # nobody disturbs the one that was there
            wait_for(lambda: len(book.read().whole.get("one", [])) == 1)


def test_several_actors_feed_one_learner_and_the_first_evaluates():
    with learner() as book, actor([book.end.port], "a") as a:
        wait_for(lambda: book.read().end.actors == 1)
        with actor([book.end.port], "b") as b:
            wait_for(lambda: book.read().end.actors == 2)
            for end in (a, b, a):
                act(end, 6)
            wait_for(lambda: book.read() and [len(book.whole.get(n, [])) for n in "ab"] == [2, 1])
            book.end.publish(weights(1))
            assert wait_for(a.take_weights).version == wait_for(b.take_weights).version == 1
            book.end.publish(weights(2, "000050"))
            assert wait_for(a.take_evaluation).checkpoint == "000050" and b.take_evaluation() is None
            b.send(Started(1, seen()))
            wait_for(lambda: "b" in book.read().running)
        wait_for(lambda: book.read().end.actors == 1)  # it has left, and its unfinished episode with it
        assert "b" not in book.running


def test_an_actor_that_was_killed_is_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(wire, "GONE_AFTER", 0.6)
    with learner() as book, actor([book.end.port], "a") as a, actor([book.end.port], "b"):
        wait_for(lambda: book.read().end.actors == 2)
        time.sleep(1)
        assert book.read().end.actors == 2  # they have nothing to say, and are there
        a.send(Started(0, seen()))
        wait_for(lambda: "a" in book.read().running)
        a._talk = lambda post: None  # as if it were killed: no goodbye, and no sign any more
        a._hear = lambda post, learner: None
        wait_for(lambda: book.read().end.actors == 1)
        assert "a" not in book.running and next(iter(book.end._actors.values())).name == "b"
    assert "actor 'a' has not been heard of for 0.6 s" in capfd.readouterr().err


def test_a_verdict_survives_a_cut_line_and_an_evaluation_is_made_once():
    with learner() as book, actor([book.end.port]) as end:
        wait_for(lambda: book.read().end.actors)
        act(end, 3)
        wait_for(lambda: len(book.read().whole["one"]) == 1)
        book.end.publish(weights(1, "000100"))
        assert wait_for(end.take_evaluation).checkpoint == "000100"
        pass_on, end._pass_on = end._pass_on, lambda post: True  # the line is cut: nothing leaves any more
        end.send(Corrected(0, 0.0, False))
        end.send(Evaluated("000100", 1, 1, 9.0))
        end.send(Started(1, seen()))
        book.end._send_back(next(iter(book.end._actors)), "the line was cut")
        came, receive = [], book.end.receive

        def listening():
            for name, message in receive():
                came.append(message)
                yield name, message

        book.end.receive = listening
        end._pass_on = pass_on
        wait_for(lambda: book.read() and any(isinstance(message, Started) for message in came))
        assert [type(message) for message in came] == [Joined, Corrected, Evaluated, Started]
        time.sleep(0.2)
        assert end.take_evaluation() is None


def test_rubbish_under_the_actors_own_keys_does_not_end_it(capfd):
    with learner() as book, actor([book.end.port]) as end:
        wait_for(lambda: book.read().end.actors)
        intruder = TCPStore("127.0.0.1", book.end.port, is_master=False, wait_for_workers=False)
        prefix = next(key for key in intruder.list_keys() if key.endswith("beat")).removesuffix("beat")
        for spoil in (
            lambda: intruder.set(f"{prefix}beat", "x"),
            lambda: intruder.queue_push(f"{prefix}to/{next(iter(book.end._actors))}", b"rubbish"),
        ):
            spoil()
            time.sleep(0.3)
            wait_for(lambda: book.read() and end.silent < 0.2)
        act(end, 3)
        wait_for(lambda: len(book.read().whole.get("one", [])) == 1)


def test_it_listens_on_this_machine_alone_and_a_taken_port_is_told():
    with learner() as book:
        socket.create_connection(("127.0.0.1", book.end.port)).close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", book.end.port)).close()
        with pytest.raises(ConfigError, match=rf"link.port: {book.end.port} cannot be had"):
            LearnerEnd(SECRET, book.end.port, ABOUT)
        port = book.end.port
    with learner(port) as again:  # and is free at once when it has gone
        assert again.end.port == port


def test_the_secret_is_its_owners_alone(tmp_path: Path):
    path = tmp_path / "run" / "link.secret"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(path)
    secret = make_secret(path)
    assert make_secret(path) == secret == read_secret(path) and len(secret) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=f"can be read by others; chmod 600 {path}"):
        read_secret(path)
    path.chmod(0o600)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="cannot be read .it is not text"):
        read_secret(path)
    path.write_text("short")
    with pytest.raises(ConfigError, match="has 5 characters, needs 32"):
        read_secret(path)
