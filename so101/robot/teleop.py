"""The person's side: a leader arm or a page to drive with and keys to judge with, together one HumanInput a tick.

While the policy drives, the leader is stiff and follows the follower; while the person drives, for a whole
recording or to step in, it is limp and its motion becomes the action. The person steps in with a key, or by
pushing the leader off its course. At takeover only the leader's offset to the target is set anew, so neither
takeover nor hand-back makes anything jump. Handing back is the key's alone: a hand that holds still may be
waiting for the gripper, and a leader that was let go sinks, so stillness would be read wrongly both ways.

Who drives from the page (so101/web/live_page.py) holds keys there, or a gamepad's sticks: what is held now is the
action, and the arm holds still as soon as the page is not heard.
"""

import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from so101.config import option, require_within
from so101.errors import EpisodeAborted, UserError, tell
from so101.robot.arm import Arm
from so101.robot.kinematics import forward
from so101.robot.safety import Watchdog
from so101.robot.sound import Cue, Sound, SoundConfig
from so101.timing import Clock

if sys.platform == "win32":
    import msvcrt
else:
    import termios
    import tty

KEYS = {
    "s": "success",
    "f": "failure",
    "i": "intervene",
    "e": "end",
    "r": "redo",
    "p": "pause",
    "q": "quit",
}
KEY_HELP = (
    "keys: s success, f failure, i take over / hand back, e end episode, r drop the episode and do it again, p pause "
    "after this episode / go on, q quit; while the arm resets s, f and r speak of the episode before"
)
HELD_DOWN_S = 0.7  # a key that comes again sooner was not let go; terminals repeat after 0.25 .. 0.66 s
ESCAPE = re.compile(r"\x1b(?:[\[O][0-9;]*[A-Za-z~])?")  # F2 sends ESC O Q: no reason to quit
PLACE_S = 30.0  # s given to place the object just where it is said: with a ruler it takes longer than a reset
PAUSE_LOOK = 0.1  # s; between two looks at the keys and the servos while the object is placed
DROPS_IN_A_ROW = 3  # episodes; then it is no accident any more
# What the program tells the person, and the simulated person acts on.
DEMONSTRATE = Cue("task", "demonstrate the task")
DEMONSTRATE_FAILURE = Cue("task", "demonstrate a failure")
TRAINING = Cue("task", "the policy drives: help where it needs help")
EVALUATION = Cue("task", "the policy drives: hands off")
PLACE_CUBE = Cue("reset", "resetting: place the cube, {} seconds", (440, 440))
PLACE_AT = Cue("reset", f"place the object {{}}; press p when it is there, or it starts in {PLACE_S:g} s", (440, 440))
RECORDING = Cue("start", "recording episode {}", (440, 660))
POLICY_STARTS = Cue("start", "the policy starts", (440, 660))
SUCCESS = Cue("success", "success", (523, 659, 784))
FAILURE = Cue("failure", "failure", (330, 220))
TIME_OUT = Cue("time_out", "time out", (330, 330))
YOU_DRIVE = Cue("takeover", "you drive", (660, 880))
POLICY_DRIVES = Cue("takeover", "the policy drives", (880, 660))
PAUSED = Cue("pause", "paused after this episode: press p to go on", (440, 330, 440))
GOES_ON = Cue("pause", "goes on", (440, 550))
NOBODY_DRIVES = Cue("pause", "nobody drives: press d on the page, and it begins", (440, 440))
LOST = Cue("pause", "the page was lost while it drove: the episode is dropped; press p to go on", (440, 330, 440))
UNMANNED = Cue("pause", "nobody is at the wheel: the episode is dropped; press p to go on", (440, 330, 440))
LET_GO = Cue("dropped", "the wheel was let go: the episode is dropped", (330, 262))
DROPPED = Cue("dropped", "episode dropped: {}", (330, 262))
NOTHING_HELD = Cue("pause", "episode dropped: nothing was held in it; press p to go on", (440, 330, 440))
STOPPED = Cue("fault", "the arm was stopped", (880, 220, 880, 220))


@dataclass
class TeleopConfig:
    """How a person steps in, and what he hears."""

    takeover: Literal["key", "motion", "both"] = option(
        "both",
        "how a person takes over from the policy: the i key, moving the leader or the page's keys, or both; i "
        "hands back",
    )
    push: float = option(0.25, "rad by which a joint of the following leader must be held off its course to take over")
    push_ticks: int = option(3, "ticks in a row for which it must be held off")
    sounds: SoundConfig = option(SoundConfig(), "which cues are heard; all are printed")

    def __post_init__(self) -> None:
        require_within(self, push=(0.05, 3), push_ticks=(1, 1000))


class HumanInput(NamedTuple):
    """What the person did in one tick."""

    action: np.ndarray | None  # (4,) in [-1, 1]; None while the policy drives
    events: frozenset[str]  # of KEYS' values


class KeySource(Protocol):
    """Where pressed keys come from: a terminal, or the simulated person."""

    def poll(self) -> list[str]:
        """Events (KEYS' values) since the last call; never waits."""

    def quits(self) -> bool:
        """Whether "quit" will be among the events of the next `poll`; takes none of them away."""

    def hear(self, cue: Cue) -> None:
        """Take in one of the cues above."""

    def close(self) -> None:
        """Give the terminal back."""


class Pendant(Protocol):
    """A person somewhere else, at the page in a browser: presses keys, and may drive with what is held there."""

    def poll(self) -> list[str]:
        """As KeySource's."""

    def quits(self) -> bool:
        """As KeySource's."""

    def hear(self, cue: Cue) -> None:
        """Take in one of the cues above."""

    def hand(self) -> np.ndarray | None:
        """The action (4,) that is held there now, zero where nothing is; None where nobody is to drive from there."""

    def silent(self) -> bool:
        """Whether who is to drive from there has just not been heard, and may yet be."""

    def lost(self) -> bool:
        """Whether who was to drive from there went away without a word; said once, then there is nobody."""


class TerminalKeys:
    """Keys typed in the controlling terminal, one at a time without Enter; works over SSH.

    Without a terminal (a pipe, a service, a job in the background) no key is ever pressed. Ctrl-Z gives the
    terminal to the shell and `fg` takes it back; the arm holds meanwhile. `sound` says the cues aloud.
    """

    def __init__(self, sound: Sound | None = None) -> None:
        self.sound = sound
        self._seen: dict[str, float] = {}  # when each event's key last came
        self._unread = ""  # typed, and not yet polled
        self._saved: Any = None  # the terminal's own settings
        self._terminal = sys.stdin.isatty() and _in_foreground()
        if self._terminal:
            print(KEY_HELP, flush=True)
        if sys.platform != "win32" and self._terminal:
            self._saved = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
            self._suspended_by = signal.signal(signal.SIGTSTP, self._suspend)

    def poll(self) -> list[str]:
        """Events for the keys pressed since the last call; unknown keys are ignored, and a key held down is one."""
        now, events = time.monotonic(), []
        typed, self._unread = self._unread + self._typed(), ""
        for key in ESCAPE.sub("", typed).lower():
            event = KEYS.get(key, "")
            if event and now - self._seen.get(event, -np.inf) > HELD_DOWN_S:
                events.append(event)
            self._seen[event] = now
        return events

    def quits(self) -> bool:
        """Whether the key to quit was typed since the last `poll`; as there, a key still held down is not."""
        self._unread += self._typed()
        if time.monotonic() - self._seen.get("quit", -np.inf) <= HELD_DOWN_S:
            return False
        return any(KEYS.get(key) == "quit" for key in ESCAPE.sub("", self._unread).lower())

    def hear(self, cue: Cue) -> None:
        """Print the cue for the person, and say it."""
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""  # a progress bar may stand there
        print(f"{clear}{cue.text}", flush=True)
        if self.sound is not None:
            self.sound.play(cue)

    def close(self) -> None:
        """Restore the terminal's line mode, and let the last cue be said."""
        if sys.platform != "win32" and self._saved is not None:
            self._restore()
            signal.signal(signal.SIGTSTP, self._suspended_by)
        self._terminal, self._saved = False, None
        if self.sound is not None:
            self.sound.close()

    def _typed(self) -> str:
        """The characters typed since the last call."""
        if not self._terminal:
            return ""
        if sys.platform == "win32":
            typed = ""
            while msvcrt.kbhit():
                typed += msvcrt.getwch()
            return typed
        with suppress(OSError):  # the terminal went away
            if _in_foreground() and select.select([sys.stdin], [], [], 0)[0]:
                return os.read(sys.stdin.fileno(), 1024).decode(errors="replace")
        return ""

    if sys.platform != "win32":

        def _restore(self) -> None:
            # From the background, setting the terminal would stop this program; one that is gone needs nothing.
            if _in_foreground():
                with suppress(termios.error):
                    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)

        def _suspend(self, number: int, frame: FrameType | None) -> None:
            self._restore()
            os.kill(os.getpid(), signal.SIGSTOP)  # returns when the shell lets it go on
            if _in_foreground():
                tty.setcbreak(sys.stdin)


def _in_foreground() -> bool:
    """Whether the terminal's keys are this program's to read, and not the shell's."""
    if sys.platform == "win32":
        return True
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # a terminal that no shell shares with others
        return True


class Leader:
    """A leader arm that is either limp in the person's hand or stiff and tracking the follower."""

    MAX_FOLLOW_STEP = 0.2  # rad (or opening) per tick: a leader left far away comes back without a jerk
    CLOSING_IN = 0.02  # rad per tick; a free servo with 0.2 rad to go makes 0.06 in the shortest tick

    def __init__(self, arm: Arm, watchdog: Watchdog) -> None:
        self.arm, self.watchdog = arm, watchdog
        self.following = False
        self._before = np.zeros(6)

    def release(self) -> None:
        """Make the leader limp, for the person to move."""
        self.arm.set_torque(False)
        self.following = False

    def follow(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move stiffly towards the follower's position (6,), within the leader's own limits.

        Returns how far (5,) rad each joint of the arm is off its goal, and whether (5,) it fails to close in on
        it: lag closes in by itself, what a hand holds does not.
        """
        here = self.watchdog.guard(self.arm).position
        if not self.following:
            self.arm.set_torque(True)
            self.following, self._before = True, here
        off = np.clip(position, *self.arm.limits) - here
        stays = (here - self._before) * np.sign(off) < self.CLOSING_IN
        self.arm.command(np.clip(here + np.clip(off, -self.MAX_FOLLOW_STEP, self.MAX_FOLLOW_STEP), *self.arm.limits))
        self._before = here
        return np.abs(off[:5]), stays[:5]

    def pose(self) -> tuple[np.ndarray, float]:
        """Tool position (3,) in m and opening 0..1 of the leader's own arm."""
        position = self.arm.read().position
        return forward(position)[0], float(position[5])


class Teleop:
    """Leader, keys and page as one source of HumanInput."""

    def __init__(
        self,
        leader: Leader | None,
        keys: KeySource,
        config: TeleopConfig | None = None,
        pendant: Pendant | None = None,
    ) -> None:
        self.leader, self.keys, self.config, self.pendant = leader, keys, config or TeleopConfig(), pendant
        self.driver: Literal["policy", "leader", "page"] = "policy"
        self.recording = False  # the person drives all the time: there is nobody to hand back to
        self.paused = False
        self.stranded = False  # who drove from the page went away without a word
        self.afterwards: frozenset[str] = frozenset()  # pressed in the last reset: of the episode before it
        self.note: Callable[[str, str], object] = lambda kind, what: None  # who looks on, the flight recorder say
        self._kept: frozenset[str] = frozenset()
        self._caught_up = False  # the leader has been where the follower is since the hand-back
        self._let_go = True  # nothing was held on the page at some time since the hand-back
        self._ticks_held = np.zeros(5, int)  # by joint, for how long it has been kept from following
        self._offset = np.zeros(3)
        self._openings: tuple[list[float], list[float]] = ([0.0, 1.0], [0.0, 1.0])  # leader's -> follower's

    @property
    def driving(self) -> bool:
        """Whether the person drives."""
        return self.driver != "policy"

    @property
    def manned(self) -> bool:
        """Whether an episode that a person drives may begin: without a leader somebody must be at the page's wheel."""
        return self.leader is not None or self.pendant is None or self.pendant.hand() is not None

    def take_over(self, target: np.ndarray, opening: float, gripper_reach: tuple[float, float]) -> None:
        """The person drives the whole episode; the leader's pose now means the present target and opening.

        The leader's opening is mapped so that it means `opening` now and both ends of `gripper_reach` at its
        own ends: a constant offset would leave a closed hand with an open gripper.
        """
        self.recording = True
        self._drive(target, opening, gripper_reach)
        if not self.driving:  # who was at the page's wheel has let go since: the first step drops the episode
            self.driver = "page"

    def hand_back(self) -> None:
        """The policy drives from here; `follow` makes the leader track again."""
        self.driver, self.recording, self._caught_up, self._let_go = "policy", False, False, False
        self.stranded = False
        self.afterwards = frozenset()
        self._ticks_held[:] = 0

    def place_object(
        self, clock: Clock, seconds: float, look: Callable[[], object], place: str | None = None
    ) -> frozenset[str]:
        """Give the person `seconds` to place the object, longer while paused; the keys pressed in a reset.

        Where it has to be at a certain `place`, that is said, and p or PLACE_S end the wait.
        `look` is called every PAUSE_LOOK, for a watchdog: the follower holds itself up meanwhile. Who quits is kept
        no longer.
        """
        if place is not None and not self.quits():
            events = self._pressed()  # what was pressed before it is told where does not say that it is there
            until = np.inf if self.paused else clock.now() + PLACE_S
            self.paused = True
            self.hear(PLACE_AT.about(place))
            try:
                return self.wait(clock, lambda: not self.paused or clock.now() >= until, look, events)
            finally:
                self.paused = False
        if not self.quits():
            self.hear(PLACE_CUBE.about(f"{seconds:g}"))
        began = clock.now()
        for waited in np.arange(0, seconds, PAUSE_LOOK):
            if self.quits():
                break
            clock.sleep_until(began + min(seconds, waited + PAUSE_LOOK))
            look()
        return self.wait(clock, lambda: not self.paused, look, self._pressed())

    def wait(
        self, clock: Clock, until: Callable[[], bool], look: Callable[[], object], events: frozenset[str] = frozenset()
    ) -> frozenset[str]:
        """Let time pass until something is so or the person quits; `events` and the keys pressed meanwhile."""
        while not until() and "quit" not in events:
            clock.sleep_until(clock.now() + PAUSE_LOOK)
            look()
            events |= self._pressed()
        self._ticks_held[:] = 0  # a hand that held the leader during the reset does not yet want to drive
        self.afterwards |= events
        return events

    def quits(self) -> bool:
        """Whether the key to quit was pressed since the last look at the keys, which it does not replace."""
        return "quit" in self._kept or self.keys.quits() or (self.pendant is not None and self.pendant.quits())

    def poll(
        self,
        target: np.ndarray,
        opening: float,
        gripper_reach: tuple[float, float],
        to_action: Callable[[np.ndarray, float], np.ndarray],
    ) -> HumanInput:
        """Keys, and while the person drives the action: the page's, or what brings target and opening to the leader's.

        `to_action(displacement (3,) in m, opening change)` scales to action units; what exceeds one
        tick's reach stays as the distance that the next ticks close, so fast motion is not lost.
        """
        events = self._pressed()
        if self.stranded:
            return HumanInput(np.zeros(4), events)
        if self._lost():
            return HumanInput(np.zeros(4), events | {"redo"})
        hand = None if self.pendant is None else self.pendant.hand()
        left = self.driver == "page" and hand is None
        held = hand is not None and bool(hand.any())
        self._let_go = self._let_go or not held
        keyed = "intervene" in events and not self.recording
        moved = self._ticks_held.max() >= self.config.push_ticks or (held and self._let_go)
        if self.recording and self.leader and (self.driver == "page") != (hand is not None):
            self._drive(target, opening, gripper_reach)  # from the leader to the page, or back
        elif self.recording and left:
            self.hear(LET_GO)
            return HumanInput(np.zeros(4), events | {"redo"})
        elif self.driving and (keyed or left):
            self.hand_back()
            self.hear(POLICY_DRIVES)
        elif not self.driving and (
            (moved and self.config.takeover != "key") or (keyed and self.config.takeover != "motion")
        ):
            self._drive(target, opening, gripper_reach)
            if not self.driving:  # who wants the policy to stop gets that; rows of nobody would teach to do nothing
                self._strand(UNMANNED)
                return HumanInput(np.zeros(4), events | {"redo"})
            self.hear(YOU_DRIVE)
        if self.driver == "page":
            return HumanInput(np.zeros(4) if hand is None else hand, events)
        if self.leader is None or not self.driving:
            return HumanInput(None, events)
        tool, leader_opening = self.leader.pose()
        displacement = tool + self._offset - target
        wanted_opening = float(np.interp(leader_opening, *self._openings))
        return HumanInput(to_action(displacement, wanted_opening - opening), events)

    def still_there(self, clock: Clock, look: Callable[[], object]) -> frozenset[str]:
        """At an episode's end, wait for a page that drove and is silent just now: its last rows may be nobody's.

        The keys pressed meanwhile, with "redo" where it was lost.
        """
        pendant = self.pendant
        if self.driver != "page" or pendant is None:
            return frozenset()
        events = self.wait(clock, lambda: not pendant.silent(), look)
        return events | {"redo"} if self._lost() else events

    def _lost(self) -> bool:
        """Whether who drove from the page is gone."""
        gone = self.pendant is not None and self.pendant.lost() and self.driver == "page"
        if gone:
            self._strand(LOST)
        return gone

    def _strand(self, why: Cue) -> None:
        """Nothing moves from here on until somebody presses p."""
        self.stranded = True
        self.pause(why)

    def pause(self, why: Cue) -> None:
        """As the key does, for a reason."""
        self.paused = True
        self.hear(why)

    def follow(self, position: np.ndarray) -> None:
        """While the policy drives, make the leader track the follower's position (6,), and feel for a hand on it.

        After a hand-back it feels nothing until the leader has caught up: the hand may not have let go yet.
        """
        if self.leader is None or self.driver == "leader":
            return
        off, stays = self.leader.follow(position)
        self._caught_up = self._caught_up or bool(off.max() < self.config.push)
        held = stays & (off > self.config.push) & self._caught_up
        self._ticks_held = np.where(held, self._ticks_held + 1, 0)

    def come_along(self, position: np.ndarray) -> None:
        """On the follower's way to rest a stiff leader goes too, or it would fall when it is let go.

        What fails here must not hinder the follower; `close` will tell.
        """
        if self.leader is not None and self.leader.following:
            with suppress(UserError):
                self.leader.follow(position)

    def keep(self, events: frozenset[str]) -> None:
        """Keys of a reset that came to nothing: the next look finds them again."""
        self._kept |= events

    def hear(self, cue: Cue) -> None:
        """Tell the person one of the cues."""
        self.note("cue", cue.text)
        self.keys.hear(cue)
        if self.pendant is not None:
            self.pendant.hear(cue)

    def drop(self, error: EpisodeAborted, before: int) -> int:
        """Tell why an episode was dropped, and count it with the ones `before` it; the third in a row is raised."""
        self.hear(DROPPED.about(error))
        if before + 1 == DROPS_IN_A_ROW:
            raise error
        return before + 1

    def release(self) -> None:
        """Leave the leader limp; what fails is told, and hides no earlier error."""
        try:
            if self.leader is not None:
                self.leader.release()
        except UserError as error:
            tell(f"releasing the leader: {error}")

    def _drive(self, target: np.ndarray, opening: float, gripper_reach: tuple[float, float]) -> None:
        """From here on the page drives where somebody is at its wheel, else the leader; where there is none, nobody."""
        if self.pendant is not None and self.pendant.hand() is not None:
            self.driver = "page"
            return
        if self.leader is None:
            return
        self.leader.release()
        tool, leader_opening = self.leader.pose()
        self._offset = target - tool
        shut, wide = gripper_reach
        self._openings = ([0.0, min(max(leader_opening, 0.01), 0.99), 1.0], [shut, opening, wide])
        self.driver = "leader"
        self._ticks_held[:] = 0

    def _pressed(self) -> frozenset[str]:
        """The keys since the last look; the pause key acts here, whatever the program is doing."""
        events = frozenset(self.keys.poll() + ([] if self.pendant is None else self.pendant.poll()))
        for event in events:
            self.note("key", event)
        if "pause" in events:
            self.paused = not self.paused
            self.hear(PAUSED if self.paused else GOES_ON)
        events, self._kept = events | self._kept, frozenset()
        return events
