"""The link between actor and learner as two processes, on one machine or on two (through an SSH tunnel).

The learner holds a torch.distributed TCPStore that listens on 127.0.0.1 alone. A store lets whoever reaches its
port read, write and even list keys, so no key can be a secret: every message is sealed (sealed.py), with its sender's
session and its number, and what does not verify is refused.

Both ends may come and go. A session is one life of one end. When the learner's changes, the actor joins anew: it
is told how many of its episodes are known, sends the others from its disk, and then the one that it is in.
"""

import hashlib
import json
import math
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from so101.errors import ConfigError, DataError, tell
from so101.learn.link import (
    Corrected,
    Discarded,
    Evaluated,
    Experience,
    Joined,
    Left,
    Moved,
    Recorded,
    Started,
    Status,
    Weights,
)
from so101.learn.sealed import Answer, Beat, Envelope, seal, unseal

PART = 4_000_000  # bytes in one value; the store takes 8 MiB
MOST_PARTS = 1000
WHOLE, IN_PARTS = b"w", b"p"  # what a queue's entry begins with
MOST_UNREAD = 64  # messages that may wait for a busy learner; an environment step is one
POLL = 0.02  # s between an actor's looks at the learner
REPORT_EVERY = 0.1  # s
ANSWER_WITHIN = 10.0  # s; a call to the store that takes longer has lost its learner
CONNECT_WITHIN = 2.0  # s
GONE_AFTER = 30.0  # s without a change at an actor; one that is killed says no goodbye
WARN_EVERY = 60.0  # s between two sentences about trouble on the line
TAKEN_WITHIN = 60.0  # s; an actor that takes longer for some weights is not waited for with the next
AGAIN_AFTER = 0.5  # s between two tries to find the learner


class _Post:
    """One end's life on the store: what it writes is sealed, what it reads is verified."""

    def __init__(self, server: Store, secret: bytes) -> None:
        # The prefix keeps two links on one port apart; it need not be secret, since keys can be listed.
        self.store = PrefixStore(hashlib.sha256(b"prefix" + secret).hexdigest()[:16], server)
        self.session, self._secret, self._sent = secrets.token_hex(8), secret, 0

    def put(self, message: NamedTuple) -> tuple[str, int]:
        """Store a message in parts; returns their name and number."""
        return self._put(self._sealed(message))

    def get(self, name: str, parts: int) -> Envelope:
        """The message that `put` stored. Raises DataError where it is not what was written."""
        keys = [f"{name}/{number}" for number in range(parts)]
        if not self.store.check(keys):
            raise DataError(f"link: message {name} is gone")
        return unseal(self._secret, b"".join(self.store.get(key) for key in keys))

    def delete(self, name: str, parts: int) -> None:
        """Take a stored message away."""
        for number in range(parts):
            self.store.delete_key(f"{name}/{number}")

    def push(self, queue: str, message: NamedTuple) -> None:
        """Append a message to a queue: itself, or where it is long the name of its parts."""
        sealed = self._sealed(message)
        if len(sealed) <= PART:
            self.store.queue_push(queue, WHOLE + sealed)
        else:
            self.store.queue_push(queue, IN_PARTS + json.dumps(self._put(sealed)).encode())

    def pop(self, queue: str) -> Envelope | None:
        """The oldest message of a queue, None where it is empty. Raises DataError where it was tampered with."""
        if not self.store.queue_len(queue):
            return None
        said = self.store.queue_pop(queue, False)
        if said[:1] == WHOLE:
            return unseal(self._secret, said[1:])
        try:
            name, parts = json.loads(said[1:])
            envelope = self.get(str(name), min(int(parts), MOST_PARTS))
        except (ValueError, TypeError):
            raise DataError("link: somebody else writes to this port") from None
        self.delete(name, parts)
        return envelope

    def show(self, key: str, message: NamedTuple) -> None:
        """Set a key to a small message, in place of the one before."""
        self.store.set(key, self._sealed(message))  # type: ignore[arg-type]

    def shown(self, key: str) -> Envelope | None:
        """The message that a key shows; None where there is none."""
        return unseal(self._secret, self.store.get(key)) if self.store.check([key]) else None

    def _sealed(self, message: NamedTuple) -> bytes:
        self._sent += 1
        return seal(self._secret, Envelope(self.session, self._sent, message))

    def _put(self, sealed: bytes) -> tuple[str, int]:
        name, starts = f"{self.session}/{self._sent}", range(0, len(sealed), PART)
        for number, start in enumerate(starts):
            self.store.set(f"{name}/{number}", sealed[start : start + PART])  # type: ignore[arg-type]
        return name, len(starts)


@dataclass
class _Peer:
    """An actor that is there: the number of its last message, when it was heard of, what it showed then."""

    name: str
    last: int
    heard: float
    shown: bytes = b""


class LearnerEnd:
    """The learner's end: its own store, experience from any number of actors, weights for all of them."""

    def __init__(self, secret: bytes, port: int, about: dict[str, Any]) -> None:
        """Listens on 127.0.0.1:`port`, 0 for any that is free; `about` is what an actor must agree on."""
        try:
            listening = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"link.port: {port} cannot be had ({error.strerror}); name another, or null") from None
        self.port: int = listening.getsockname()[1]
        server = TCPStore(
            "127.0.0.1", self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(),
            timeout=timedelta(seconds=ANSWER_WITHIN),
        )  # fmt: skip
        self._post, self._about = _Post(server, secret), json.loads(json.dumps(about))
        self._actors: dict[str, _Peer] = {}  # by session, those that are there, the longest there first
        self._identities: dict[str, str] = {}  # name -> identity, also of actors that have gone
        self._known_sessions: set[str] = set()
        self._beat, self._reported = Beat(Status()), 0.0
        self._published = 0.0  # s; when the newest weights were
        self._old: dict[str, tuple[str, int]] = {}  # weights that an actor may still be taking
        self.report(Status(), at_once=True)

    @property
    def actors(self) -> int:
        """How many actors are there."""
        return len(self._actors)

    def receive(self) -> Iterator[tuple[str, Experience]]:
        """All experience that has come, each with the name of its actor. What is not an actor's own is refused."""
        while (envelope := self._popped("join")) is not None:
            if self._let_in(envelope):
                yield envelope.message.name, envelope.message
        for session, actor in list(self._actors.items()):
            while session in self._actors and (envelope := self._popped(f"from/{session}", session)) is not None:
                if envelope.session != session or envelope.number != actor.last + 1:
                    self._send_back(session, f"link: message {actor.last + 1} of actor {actor.name!r} is missing")
                    break
                actor.last, actor.heard = actor.last + 1, time.monotonic()
                if isinstance(envelope.message, Left):
                    del self._actors[session]
                yield actor.name, envelope.message
            if session in self._actors and self._is_gone(session, actor):
                self._send_back(session, f"link: actor {actor.name!r} has not been heard of for {GONE_AFTER:g} s")
                yield actor.name, Left()

    def welcome(self, name: str, known: int) -> None:
        """Tell an actor that has joined how many of its episodes are known."""
        for session, actor in self._actors.items():
            if actor.name == name:
                self._post.push(f"to/{session}", Answer(known))

    def send_back(self, name: str, why: str) -> None:
        """Let an actor join anew and tell again what is not known."""
        for session in [session for session, actor in self._actors.items() if actor.name == name]:
            self._send_back(session, why)

    def publish(self, weights: Weights) -> None:
        """Offer new weights, to act with or to evaluate, in place of the ones before.

        Weights to act with wait until all actors have those before: over a slow line one could never get any.
        """
        if not weights.checkpoint and not self._all_taken():
            return
        kind, place = "evaluation" if weights.checkpoint else "weights", self._post.put(weights)
        older = self._old.pop(kind, None)
        if (before := getattr(self._beat, kind)) is not None:
            self._old[kind] = before
        self._beat = self._beat._replace(evaluation=place) if weights.checkpoint else self._beat._replace(weights=place)
        if not weights.checkpoint:
            self._published = time.monotonic()
        self.report(self._beat.status, at_once=True)
        if older is not None:
            self._post.delete(*older)

    def _all_taken(self) -> bool:
        """Whether each actor that has caught up took the newest weights, or had its time."""
        newest, store = self._beat.weights, self._post.store
        if newest is None or time.monotonic() - self._published > TAKEN_WITHIN:
            return True
        keys = [key for session in self._actors if store.check([key := f"taken/{session}"])]
        return all(store.get(key) == newest[0].encode() for key in keys)

    def report(self, status: Status, at_once: bool = False) -> None:
        """Say how far the learner is; also the sign that it is there."""
        now = time.monotonic()
        if at_once or now - self._reported > REPORT_EVERY:
            evaluator = next((actor.name for actor in self._actors.values()), "")
            self._beat, self._reported = self._beat._replace(status=status, evaluator=evaluator), now
            self._post.show("beat", self._beat)

    def close(self) -> None:
        """Let go of the store, and with it of the port."""
        del self._post

    def _popped(self, queue: str, session: str | None = None) -> Envelope | None:
        try:
            return self._post.pop(queue)
        except DataError as error:
            if session is None:
                tell(str(error))
            else:
                self._send_back(session, str(error))
            return None

    def _let_in(self, envelope: Envelope) -> bool:
        """Whether an actor that knocks comes in: it agrees with this learner, and is not an old knock come again."""
        session = envelope.session
        if not isinstance(envelope.message, Joined) or session in self._known_sessions:
            return False
        name, identity, learner, about = envelope.message
        if learner != self._post.session:
            return False
        self._known_sessions.add(session)
        differing = [key for key in self._about if about.get(key) != self._about[key]]
        if differing:
            here = self._about
            said = "; ".join(f"{key} is {about.get(key)!r} there, {here[key]!r} at the learner" for key in differing)
            self._post.push(f"to/{session}", Answer(refused=f"actor {name!r} has another config: {said}"))
            return False
        if self._identities.setdefault(name, identity) != identity:
            taken = f"the learner knows an actor {name!r} with another run folder; give each folder its own link.name"
            self._post.push(f"to/{session}", Answer(refused=taken))
            return False
        for old in [old for old, actor in self._actors.items() if actor.name == name]:
            del self._actors[old]  # an earlier life of the same
        self._actors[session] = _Peer(name, envelope.number, time.monotonic())
        return True

    def _is_gone(self, session: str, actor: "_Peer") -> bool:
        """Whether nothing has changed at an actor for too long; it shows a count that rises."""
        if time.monotonic() - actor.heard > GONE_AFTER / 3:  # seldom asked: it costs a call
            key = f"alive/{session}"
            shown = self._post.store.get(key) if self._post.store.check([key]) else b""
            if shown != actor.shown:
                actor.shown, actor.heard = shown, time.monotonic()
        return time.monotonic() - actor.heard > GONE_AFTER

    def _send_back(self, session: str, why: str) -> None:
        """Let an actor join anew."""
        tell(f"{why}; it is asked to come again")
        del self._actors[session]
        self._post.push(f"to/{session}", Answer(again=True))


class ActorEnd:
    """The actor's end: a thread finds the learner, sends what the loop hands it, fetches weights, and again."""

    def __init__(
        self,
        name: str,
        identity: str,
        about: dict[str, Any],
        address: Callable[[], tuple[str, int] | None],
        secret: Callable[[], bytes],
        recorded: Callable[[int], Iterator[Recorded]],
    ) -> None:
        """`address()` and `secret()` are asked at each try; `recorded(n)` gives the episodes on disk from n on.

        `identity` tells the folder of these episodes from any other.
        """
        self.name, self._identity, self._about = name, identity, about
        self._address, self._secret, self._recorded = address, secret, recorded
        self._lock = threading.Lock()
        self._unsent: deque[Experience] = deque()
        self._episode: list[Experience] = []  # what was sent of the newest episode, for a learner that forgot it
        self._verdicts: list[Experience] = []  # not delivered yet, and not on disk as an episode is
        self._evaluated = ""  # the newest checkpoint that was taken for evaluation
        self._number = 0  # of that episode
        self._saved = 0  # episodes on disk, as far as they were sent from here
        self._weights: Weights | None = None
        self._evaluation: Weights | None = None
        self._status = Status()
        self._heard, self._beat_seen = -math.inf, 0
        self._failed: Exception | None = None
        self._warned = time.monotonic() - WARN_EVERY + 10  # s; when the person was told of trouble: not in the first 10
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="link", daemon=True)
        self._thread.start()

    @property
    def silent(self) -> float:
        """Seconds since the learner was heard of, inf before. Raises what the thread met that it cannot mend."""
        if self._failed is not None:
            raise self._failed
        return time.monotonic() - self._heard

    @property
    def heard(self) -> bool:
        """Whether the learner was ever heard of."""
        return self.silent < math.inf

    @property
    def status(self) -> Status:
        """What the learner last said."""
        return self._status

    def send(self, message: Experience) -> None:
        """Hand experience to the learner; an episode's last transition after the episode is on disk. Never waits."""
        with self._lock:
            self._unsent.append(message)
            if isinstance(message, Corrected | Evaluated):
                self._verdicts.append(message)
                return
            if isinstance(message, Started):
                self._episode, self._number, self._saved = [], message.number, message.number
            if isinstance(message, Moved) and (message.terminated or message.truncated):
                self._saved = self._number + 1
            self._episode = [] if isinstance(message, Discarded) else [*self._episode, message]

    def take_weights(self) -> Weights | None:
        """The newest weights, if they were not taken yet."""
        with self._lock:
            taken, self._weights = self._weights, None
            return taken

    def take_evaluation(self) -> Weights | None:
        """The weights to evaluate before the next episode, once."""
        with self._lock:
            taken, self._evaluation = self._evaluation, None
            return taken

    def close(self) -> None:
        """Send what is left, as long as the learner takes it, and go."""
        self._closing.set()
        self._thread.join(timeout=3 * ANSWER_WITHIN if self._heard > 0 else AGAIN_AFTER)

    def _work(self) -> None:
        while self._failed is None:
            try:
                if (address := self._address()) is not None:
                    where = f"link: nobody answers as a learner on {address[0]}:{address[1]}"
                    # Asked first: a store that finds nobody prints pages of its own stack.
                    socket.create_connection(address, CONNECT_WITHIN).close()
                    within = timedelta(seconds=CONNECT_WITHIN)
                    store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=within)
                    store.set_timeout(timedelta(seconds=ANSWER_WITHIN))
                    self._talk(_Post(store, self._secret()))
            except (DistError, OSError):  # nobody there, or gone: again
                self._warn(where)
            except DataError as error:  # somebody else writes here, or the line was cut in a message: again
                self._warn(str(error))
            except Exception as error:  # the loop raises it, where somebody sees it
                self._failed = error
            if self._closing.wait(AGAIN_AFTER):
                return

    def _talk(self, post: _Post) -> None:
        """Join, catch up, then pass on until the learner's life ends or ours does."""
        beat = self._hear(post, "")
        if beat is None:
            return
        learner = beat.session
        post.push("join", Joined(self.name, self._identity, learner, self._about))
        while (answer := self._answer(post)) is None:
            if self._closing.is_set() or self._hear(post, learner) is None:
                return
            time.sleep(POLL)
        if answer.again or not self._catch_up(post, learner, answer.known):
            return
        taken: Beat | None = None
        post.store.set(f"taken/{post.session}", "none")
        while (beat := self._hear(post, learner)) is not None:
            taken = self._fetch(post, beat.message, taken)
            if (answer := self._answer(post)) is not None and answer.again:
                return
            ending = self._closing.is_set()
            if not self._pass_on(post) and ending:
                post.push(f"from/{post.session}", Left())
                return
            time.sleep(POLL)

    def _warn(self, said: str) -> None:
        if time.monotonic() - self._warned > WARN_EVERY:
            self._warned = time.monotonic()
            tell(f"{said}; trying again")

    def _hear(self, post: _Post, learner: str) -> Envelope | None:
        """The learner's newest sign of life; None where there is none, or it is another's than `learner`."""
        beat = post.shown("beat")
        if beat is None or (learner and beat.session != learner):
            return None
        if beat.number != self._beat_seen:
            self._beat_seen, self._heard, self._status = beat.number, time.monotonic(), beat.message.status
            post.store.set(f"alive/{post.session}", str(beat.number))
        return beat

    def _answer(self, post: _Post) -> Answer | None:
        envelope = post.pop(f"to/{post.session}")
        if envelope is not None and envelope.message.refused:
            raise ConfigError(f"link: {envelope.message.refused}")
        return None if envelope is None else envelope.message

    def _catch_up(self, post: _Post, learner: str, known: int) -> bool:
        """Send the episodes on disk that are not known, then put the newest one's messages in line."""
        while True:
            for recorded in self._recorded(known):
                while post.store.queue_len(f"from/{post.session}") >= 2:  # an episode may be megabytes
                    if self._closing.is_set() or self._hear(post, learner) is None:
                        return False
                    time.sleep(POLL)
                post.push(f"from/{post.session}", recorded)
                known = recorded.number + 1
            with self._lock:
                if known >= self._saved:  # a verdict speaks of the episode before
                    running = self._episode if self._number == self._saved else []
                    self._unsent = deque([*self._verdicts, *running])
                    return True

    def _fetch(self, post: _Post, beat: Beat, taken: Beat | None) -> Beat:
        """Take the weights that are newer than those of `taken`; an evaluation only if it is this actor's."""
        if beat.weights and (taken is None or beat.weights != taken.weights):
            weights = post.get(*beat.weights).message
            with self._lock:
                self._weights = weights
            post.store.set(f"taken/{post.session}", beat.weights[0])
        if beat.evaluation and beat.evaluator == self.name and (taken is None or beat.evaluation != taken.evaluation):
            evaluation = post.get(*beat.evaluation).message
            if evaluation.checkpoint != self._evaluated:  # after a cut it is offered again
                with self._lock:
                    self._evaluation, self._evaluated = evaluation, evaluation.checkpoint
        return beat

    def _pass_on(self, post: _Post) -> bool:
        """Send what is in line, as much as the learner has room for; whether something is left."""
        room = 0  # asked for now and then: each question takes a round trip
        while self._unsent:
            room = room or max(0, MOST_UNREAD - post.store.queue_len(f"from/{post.session}"))
            if not room:
                return True
            with self._lock:
                message = self._unsent.popleft()
            post.push(f"from/{post.session}", message)
            with self._lock:  # the loop may be adding one
                self._verdicts = [verdict for verdict in self._verdicts if verdict is not message]
            room -= 1
        return False
