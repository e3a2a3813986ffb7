"""ServoBus: reads and writes registers of the servos on one serial line, and survives a bad line.

Vendor code fails where lines are bad: late bytes leak into the next transaction, a reply's length goes
unchecked, a servo that reports a condition counts as missing. None of that happens here. A damaged reply is
asked for again within milliseconds; when that does not help (a cable shaken loose, an adapter pulled out), the
port is opened again and the transaction goes on, for as long as `patience` lasts.
"""

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

from so101.errors import HardwareError, tell
from so101.robot import feetech
from so101.robot.feetech import PACKET_OVERHEAD, REGISTERS
from so101.timing import Clock

BACKOFF = 0.002  # s before the first retry, longer each time: a late reply arrives and is purged
LATE_MARGIN = 0.005  # s
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 1.0  # s between the rounds of an outage, doubled each time
SHOWN = 32  # bytes of a damaged reply in a message
MAX_RECEIVED = 1024  # bytes; the longest answer is 126, so more is a line that never falls silent


class ServoError(HardwareError):
    """A servo that does not answer validly, or a request that no servo could fulfil."""


class _Outage(ServoError):
    """All tries of one transaction failed: `kind` as in ServoBus.faults, or "port" when that raised OSError."""

    def __init__(self, message: str, kind: str, others_answer: bool = False) -> None:
        super().__init__(message)
        self.kind, self.others_answer = kind, others_answer


def together(messages: Iterable[str]) -> str:
    """What was said of several servos, the same only once: `servo 1, servo 2: no reply`."""
    whose: dict[str, dict[str, None]] = {}
    for message in messages:
        who, _, why = message.partition(": ")
        whose.setdefault(why, {})[who] = None
    return "; ".join(f"{', '.join(who)}: {why}" for why, who in whose.items())


class Port(Protocol):
    """What a bus needs of a serial port: pyserial's Serial and the simulated port both have it."""

    @property
    def name(self) -> str | None: ...
    @property
    def in_waiting(self) -> int: ...
    def write(self, data: bytes, /) -> int | None: ...
    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


@functools.cache
def _span(first: str, last: str) -> tuple[int, int, list[tuple[str, int, int]]]:
    """Address and size of the registers from first to last, and (name, start, end) of each in them."""
    start = REGISTERS[first].address
    size = REGISTERS[last].address + REGISTERS[last].size - start
    inside = [
        (name, entry.address - start, entry.address - start + entry.size)
        for name, entry in REGISTERS.items()
        if start <= entry.address and entry.address + entry.size <= start + size
    ]
    return start, size, inside


class ServoBus:
    """The servos on one port. Each transaction is tried 1 + `retries` times.

    `port` needs a timeout of its own (20 ms is ample: a reply takes about 2). `names` ({4: "wrist_flex"})
    make messages readable. `status` holds the error byte of each servo's last reply (see
    feetech.STATUS_BITS), `faults` how often each kind of line fault was met.

    `reopen` gives the port anew (OSError or HardwareError while it cannot). With it, a transaction whose tries
    all failed is an outage: it is told on stderr, counted in `outages`, and tried in rounds until it succeeds or
    `patience` (s of `clock`) has passed. After an outage that was not outlasted each transaction gets one round
    only, until one succeeds, so that a shutdown is not held up at every servo. `ping` and `write_eprom` are
    never patient: the one asks whether a servo is there, and a servo that lost its power in the middle of the
    other has forgotten that it was unlocked.
    """

    def __init__(
        self,
        port: Port,
        retries: int = 3,
        names: Mapping[int, str] | None = None,
        reopen: Callable[[], Port] | None = None,
        patience: float = 3.0,
        clock: Clock | None = None,
    ) -> None:
        self.port, self.retries = port, retries
        self.names = dict(names or {})
        self.reopen, self.patience, self.clock = reopen, patience, clock or Clock()
        self.status: dict[int, int] = {}
        self.faults: Counter[str] = Counter()
        self.outages = 0
        self._outage_s = 0.0  # in all
        self._is_open = self._patient = True
        self._given_up = False
        self._quiet_at = 0.0  # s on the clock; until then replies to earlier tries may still come

    def report(self) -> str:
        """What the line has done so far, in one sentence; empty when it was clean."""
        parts = []
        if self.faults:
            kinds = ", ".join(f"{kind} {times}" for kind, times in self.faults.most_common())
            parts.append(f"bad answers: {sum(self.faults.values())}, asked for again or mended ({kinds})")
        if self.outages:
            parts.append(f"outages: {self.outages}, {self._outage_s:.1f} s in all")
        return f"servo line {self.port.name}: {'; '.join(parts)}" if parts else ""

    def ping(self, servo_id: int) -> int:
        """The model number (777 for an STS3215) of a servo that answers; ServoError when it does not."""
        request = feetech.instruction_packet(self._checked_id(servo_id), feetech.PING)
        with self.impatient():
            try:
                self._transact(request, [servo_id], 0, "PING")
                return self.read(servo_id, "Model_Number")
            except _Outage as outage:
                if outage.kind in ("port", "no reply"):
                    raise
                advice = "two servos with this id, or a damaged line: connect one servo at a time"
                raise ServoError(f"{outage}; {advice}") from None

    def read(self, servo_id: int, register: str) -> int:
        """The value of one register."""
        entry = self._checked_register(register)
        params = bytes((entry.address, entry.size))
        request = feetech.instruction_packet(self._checked_id(servo_id), feetech.READ, params)
        replies = self._transact(request, [servo_id], entry.size, f"READ {register}")
        return feetech.decode_value(register, replies[servo_id])

    def write(self, servo_id: int, register: str, value: int) -> None:
        """Set one register, and wait for the servo's acknowledgement."""
        entry = self._checked_register(register, writing=True)
        params = bytes((entry.address,)) + self._encode(servo_id, register, value)
        request = feetech.instruction_packet(self._checked_id(servo_id), feetech.WRITE, params)
        self._transact(request, [servo_id], 0, f"WRITE {register}")

    def sync_read(self, register: str, ids: Sequence[int]) -> dict[int, int]:
        """The same register of several servos in one transaction, by servo id."""
        entry = self._checked_register(register)
        replies = self._sync_read(entry.address, entry.size, ids, register)
        return {servo_id: feetech.decode_value(register, data) for servo_id, data in replies.items()}

    def sync_read_span(self, first: str, last: str, ids: Sequence[int]) -> dict[int, dict[str, int]]:
        """All registers from `first` to `last` of several servos in one transaction.

        Returns {servo id: {register name: value}}; addresses without a name are left out.
        """
        if self._checked_register(last).address < self._checked_register(first).address:
            raise ServoError(f"sync_read_span: {last} lies before {first}")
        address, size, inside = _span(first, last)
        replies = self._sync_read(address, size, ids, f"{first} .. {last}")
        return {
            servo_id: {name: feetech.decode_value(name, data[start:end]) for name, start, end in inside}
            for servo_id, data in replies.items()
        }

    def sync_write(self, register: str, values: Mapping[int, int]) -> None:
        """Set the same register of several servos ({id: value}) in one packet. Not acknowledged."""
        entry = self._checked_register(register, writing=True)
        if not values:
            raise ServoError(f"SYNC WRITE {register}: no servos given")
        params = bytearray((entry.address, entry.size))
        for servo_id, value in values.items():
            params.append(self._checked_id(servo_id))
            params += self._encode(servo_id, register, value)
        request = feetech.instruction_packet(feetech.BROADCAST_ID, feetech.SYNC_WRITE, bytes(params))
        self._transact(request, (), 0, f"SYNC WRITE {register}")

    def write_eprom(self, servo_id: int, register: str, value: int) -> bool:
        """Store a setting that outlasts the power, if it differs; returns whether it was written.

        Writing switches the servo's torque off, so that a loaded joint falls. The value is read back;
        ServoError when the servo does not keep it. A new ID holds at once.
        """
        if not self._checked_register(register, writing=True).eprom:
            raise ServoError(f"{register}: not an EPROM register; use write")
        data = self._encode(servo_id, register, value)
        with self.impatient():
            if self.read(servo_id, register) == value:
                return False
            self.write(servo_id, "Torque_Enable", 0)
            answers_as = value if register == "ID" else servo_id
            with self.unlocked(servo_id, answers_as):
                if register == "ID":  # no document says whether the old or the new id acknowledges
                    params = bytes((REGISTERS["ID"].address,)) + data
                    self._transact(feetech.instruction_packet(servo_id, feetech.WRITE, params), (), 0, "WRITE ID")
                    self._pause(BACKOFF)
                else:
                    self.write(servo_id, register, value)
                stored = self.read(answers_as, register)
                if stored != value:
                    raise ServoError(
                        f"{self._name(servo_id)}: {register} reads {stored} after {value} was written; "
                        f"switch its power off and on, and try again"
                    )
            return True

    @contextmanager
    def unlocked(self, servo_id: int, answers_as: int) -> Iterator[None]:
        """Inside the block the servo's EPROM can be written; it is locked again on every way out.

        `answers_as` is the id that it has at the end of the block; where that went wrong it may still have the other.
        """
        try:
            self.write(servo_id, "Lock", 0)
            yield
            self.write(answers_as, "Lock", 1)
        except BaseException:  # a Ctrl-C too: an unlocked servo takes any stray write for good
            for each in dict.fromkeys((answers_as, servo_id)):
                with suppress(ServoError):  # the first error is the one to tell
                    self.write(each, "Lock", 1)
            raise

    def close(self) -> None:
        """Close the port, for good. Torque stays as it is."""
        self._is_open, self.reopen = False, None
        self.port.close()

    def _name(self, servo_id: int) -> str:
        return f"servo {servo_id} ({self.names[servo_id]})" if servo_id in self.names else f"servo {servo_id}"

    def _checked_id(self, servo_id: int) -> int:
        if not 0 <= servo_id <= feetech.MAX_ID:
            raise ServoError(f"servo id: got {servo_id}, must be 0 .. {feetech.MAX_ID}")
        return servo_id

    def _checked_register(self, register: str, writing: bool = False) -> feetech.Register:
        if register not in REGISTERS:
            near = difflib.get_close_matches(register, REGISTERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ServoError(f"unknown register {register!r}{hint}")
        if writing and REGISTERS[register].read_only:
            raise ServoError(f"{register}: a servo's measurement or marking, it cannot be written")
        return REGISTERS[register]

    def _encode(self, servo_id: int, register: str, value: int) -> bytes:
        try:
            return feetech.encode_value(register, value)
        except HardwareError as error:
            raise ServoError(f"{self._name(servo_id)}: {error}") from None

    def _sync_read(self, address: int, size: int, ids: Sequence[int], what: str) -> dict[int, bytes]:
        if not ids:
            raise ServoError(f"SYNC READ {what}: no servos given")
        params = bytes((address, size, *(self._checked_id(servo_id) for servo_id in ids)))
        request = feetech.instruction_packet(feetech.BROADCAST_ID, feetech.SYNC_READ, params)
        return self._transact(request, ids, size, f"SYNC READ {what}")

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Inside the block a servo that does not answer is an error at once, not an outage to wait for."""
        before, self._patient = self._patient, False
        try:
            yield
        finally:
            self._patient = before

    def _pause(self, seconds: float) -> None:
        self.clock.sleep_until(self.clock.now() + seconds)

    def _purge(self) -> None:
        """Throw away what came too late for the last transaction. On a lost port this raises OSError."""
        if not self._is_open:  # pyserial's in_waiting would be a TypeError
            raise OSError("it is closed")
        if waiting := self.port.in_waiting:
            self.port.read(waiting)

    def _transact(self, request: bytes, ids: Sequence[int], size: int, what: str) -> dict[int, bytes]:
        """Send, through an outage if need be; `size` bytes of data from each servo in `ids`, {id: data}."""
        try:
            replies = self._ask(request, ids, size, what)
        except _Outage as outage:
            if self.reopen is None or not self._patient:
                raise
            replies = self._outlast(outage, self.reopen, request, ids, size, what)
        self._given_up = False
        return replies

    def _outlast(
        self, outage: _Outage, reopen: Callable[[], Port], request: bytes, ids: Sequence[int], size: int, what: str
    ) -> dict[int, bytes]:
        """`_ask` again in rounds; ServoError when our patience ends."""
        began, pause = self.clock.now(), SHORTEST_PAUSE
        patience = 0.0 if self._given_up else self.patience
        if patience:
            self.outages += 1
            tell(f"{outage}; trying again for {patience:g} s")
        while True:
            self._pause(min(pause, began + patience - self.clock.now()))
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                if not outage.others_answer:  # else the port is well, and one servo missing
                    self._open_again(reopen, what)
                replies = self._ask(request, ids, size, what)
            except _Outage as latest:
                outage = latest
            else:
                break
            if self.clock.now() > began + patience - SHORTEST_PAUSE:
                self._outage_s += self.clock.now() - began
                self._given_up = True
                raise ServoError(f"{outage}; given up after {patience:g} s" if patience else str(outage)) from None
        lasted = self.clock.now() - began
        self._outage_s += lasted
        tell(f"{what}: answered again after {lasted:.1f} s")
        return replies

    def _open_again(self, reopen: Callable[[], Port], what: str) -> None:
        with suppress(OSError):
            self._purge()
        self._is_open = False
        with suppress(OSError):
            self.port.close()
        try:
            self.port = reopen()
        except (OSError, HardwareError) as error:
            said = str(error).partition(". ")[0]  # what else there is concerns who is writing a config
            raise _Outage(f"{what}: the port failed, and cannot be opened again: {said}", "port") from None
        self._is_open = True

    def _ask(self, request: bytes, ids: Sequence[int], size: int, what: str) -> dict[int, bytes]:
        """Send until every servo in `ids` has answered; _Outage after 1 + `retries` tries."""
        if ids and self.clock.now() < self._quiet_at:
            self.clock.sleep_until(self._quiet_at)
        began = self.clock.now()
        try:
            for attempt in range(self.retries + 1):
                if attempt:
                    self._pause(BACKOFF * attempt)
                self._purge()
                self.port.write(request)
                if not ids:
                    return {}
                received, answer = self._receive(request, ids, size)
                if received == request and request[4] == feetech.PING:
                    # A servo whose voltage bit is set answers a PING with the very bytes of the PING; an echo
                    # looks the same. The READ that follows decides, so that a status bit is not a missing servo.
                    return {ids[0]: b""}
                silent = [servo_id for servo_id in ids if servo_id not in answer.replies]
                if answer.stray is not None:
                    kind, why = "unexpected", answer.stray
                elif silent:
                    kind, why = feetech.explain_no_status(answer.leftover)
                else:
                    if answer.leftover:
                        self.faults["noise"] += 1
                    if attempt:
                        # Where replies are slow this one was to an earlier try, and the others' are still to come.
                        now = self.clock.now()
                        self._quiet_at = now + attempt * (now - began) + LATE_MARGIN
                    return answer.replies
                self.faults[kind] += 1
        except OSError as error:
            message = f"{what}: the port failed ({self.port.name}: {error}); check its USB cable"
            raise _Outage(message, "port") from error
        raise _Outage(
            f"{', '.join(self._name(servo_id) for servo_id in silent or ids)}: no valid reply to {what} in "
            f"{self.retries + 1} attempts: {why}{_advice(kind, silent, answer, received)}",
            kind,
            others_answer=bool(answer.replies),
        )

    def _receive(self, request: bytes, ids: Sequence[int], size: int) -> tuple[bytes, "_Answer"]:
        """Read until all in `ids` have answered or the port times out."""
        received, answer = b"", _Answer({}, None, b"", 0)
        wanted = len(ids) * (PACKET_OVERHEAD + size)
        while len(received) < MAX_RECEIVED:
            chunk = self.port.read(wanted)
            received += chunk
            answer = self._match(received, request, ids, size)
            missing = len(ids) - len(answer.replies)
            if not missing or len(chunk) < wanted:
                break
            wanted = max(1, missing * (PACKET_OVERHEAD + size) - answer.unread)
        if request[4] == feetech.PING:
            self._pause(BACKOFF)  # there may be a second servo with this id
        if len(answer.replies) == len(ids) and (surplus := self.port.in_waiting):
            # A late reply came first, so all that follows is one reply behind; or two servos have one id.
            received += self.port.read(surplus)
            answer = answer._replace(stray=f"{surplus} bytes more than the whole answer")
        return received, answer

    def _match(self, received: bytes, request: bytes, ids: Sequence[int], size: int) -> "_Answer":
        """Take the replies out of `received`: servos answer in the order of `ids`, or not at all."""
        replies: dict[int, bytes] = {}
        stray, leftover, expected = None, b"", list(ids)
        echo = received.find(request)  # an adapter on one data wire hears itself
        start = echo + len(request) if echo >= 0 else 0
        while True:
            packet, end = feetech.find_status(received, start)
            if packet is None:
                break
            leftover += received[start : end - PACKET_OVERHEAD - len(packet.params)]
            start = end
            if packet.servo_id in expected and len(packet.params) == size:
                del expected[: expected.index(packet.servo_id) + 1]
                replies[packet.servo_id] = packet.params
                self.status[packet.servo_id] = packet.code
            else:
                stray = f"servo {packet.servo_id} sent {len(packet.params)} bytes of data, not asked for now"
        return _Answer(replies, stray, leftover + received[start:], len(received) - start)


class _Answer(NamedTuple):
    replies: dict[int, bytes]  # by servo id
    stray: str | None  # what was received that belongs to another transaction
    leftover: bytes  # outside valid packets: noise, or a damaged reply
    unread: int  # of these, bytes behind the last valid packet: the next one may have begun


def _advice(kind: str, silent: Sequence[int], answer: _Answer, received: bytes) -> str:
    """What a person should look at, and the bytes where they say more than words."""
    if kind == "no reply" and len(silent) == 1:
        return "; check its power and the cable that leads to it"
    if kind == "no reply":
        return "; check the power supply, and the cable before the first of them"
    damaged = (answer.leftover or received)[:SHOWN].hex(" ")
    other = "; another program may be using the port, or the servo has another baud rate" if kind == "noise" else ""
    return f": {damaged}{other}"
