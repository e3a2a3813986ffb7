"""The person's side: a leader arm to drive with and keys to judge with, together one HumanInput a tick.

Two states. While the policy drives, the leader is stiff and follows the follower; while the person
drives, the leader is limp and its motion becomes the action. At takeover only the leader's offset to
the target is set anew, so neither takeover nor hand-back makes anything jump.
"""

import os
import select
import sys
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from so101.errors import UserError
from so101.robot.arm import Arm
from so101.robot.kinematics import forward

if os.name == "posix":
    import termios
    import tty

KEYS = {
    "s": "success",
    "f": "failure",
    "i": "intervene",
    "e": "end",
    "r": "redo",
    "q": "quit",
}
# What the program tells the person, and the simulated person acts on.
PLACE_CUBE = "resetting: place the cube"
DEMONSTRATE = "demonstrate the task"
DEMONSTRATE_FAILURE = "demonstrate a failure"
TRAINING = "the policy drives: help where it needs help"
EVALUATION = "the policy drives: hands off"
SUCCESS, FAILURE, TIME_OUT = "success", "failure", "time out"

KEY_HELP = "keys: s success, f failure, i take over / hand back, e end episode, r redo episode, q quit"


class HumanInput(NamedTuple):
    """What the person did in one tick."""

    action: np.ndarray | None  # (4,) in [-1, 1]; None while the policy drives
    events: frozenset[str]  # of KEYS' values


class KeySource(Protocol):
    """Where pressed keys come from: a terminal, or the simulated person."""

    def poll(self) -> list[str]:
        """Events (KEYS' values) since the last call; never waits."""

    def hear(self, cue: str) -> None:
        """Take in one of the cues above."""

    def close(self) -> None:
        """Give the terminal back."""


class TerminalKeys:
    """Keys typed in the controlling terminal, one at a time without Enter; works over SSH.

    Without a terminal (a pipe, a service) no key is ever pressed.
    """

    def __init__(self) -> None:
        self._saved = None
        if os.name == "posix" and sys.stdin.isatty():
            self._saved = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)

    def poll(self) -> list[str]:
        """Events for the keys pressed since the last call; unknown keys are ignored."""
        events = []
        while self._saved is not None and select.select([sys.stdin], [], [], 0)[0]:
            key = os.read(sys.stdin.fileno(), 1).decode(errors="replace").lower()
            if not key:  # end of file: the terminal went away
                break
            if key in KEYS:
                events.append(KEYS[key])
        return events

    def hear(self, cue: str) -> None:
        """Print the cue for the person."""
        print(cue, flush=True)

    def close(self) -> None:
        """Restore the terminal's line mode."""
        if self._saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)
            self._saved = None


class Leader:
    """A leader arm that is either limp in the person's hand or stiff and tracking the follower."""

    MAX_FOLLOW_STEP = 0.2  # rad (or opening) per tick: a leader left far away comes back without a jerk

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.following = False

    def release(self) -> None:
        """Make the leader limp, for the person to move."""
        self.arm.set_torque(False)
        self.following = False

    def follow(self, position: np.ndarray) -> None:
        """Move stiffly towards the follower's position (6,), within the leader's own limits."""
        here = self.arm.read().position
        if not self.following:
            self.arm.set_torque(True)
            self.following = True
        step = np.clip(position - here, -self.MAX_FOLLOW_STEP, self.MAX_FOLLOW_STEP)
        self.arm.command(np.clip(here + step, *self.arm.limits))

    def pose(self) -> tuple[np.ndarray, float]:
        """Tool position (3,) in m and opening 0..1 of the leader's own arm."""
        position = self.arm.read().position
        return forward(position)[0], float(position[5])


class Teleop:
    """Leader and keys as one source of HumanInput."""

    def __init__(self, leader: Leader | None, keys: KeySource) -> None:
        self.leader, self.keys = leader, keys
        self.driving = False
        self._offset = np.zeros(3)
        self._openings: tuple[list[float], list[float]] = ([0.0, 1.0], [0.0, 1.0])  # leader's -> follower's

    def take_over(self, target: np.ndarray, opening: float, gripper_reach: tuple[float, float]) -> None:
        """The person drives from here: the leader's pose now means the present target and opening.

        The leader's opening is mapped so that it means `opening` now and both ends of `gripper_reach` at its
        own ends: a constant offset would leave a closed hand with an open gripper.
        """
        if self.leader is None:
            return
        self.leader.release()
        tool, leader_opening = self.leader.pose()
        self._offset = target - tool
        shut, wide = gripper_reach
        self._openings = ([0.0, min(max(leader_opening, 0.01), 0.99), 1.0], [shut, opening, wide])
        self.driving = True

    def hand_back(self) -> None:
        """The policy drives from here; `follow` makes the leader track again."""
        self.driving = False

    def poll(
        self,
        target: np.ndarray,
        opening: float,
        gripper_reach: tuple[float, float],
        to_action: Callable[[np.ndarray, float], np.ndarray],
    ) -> HumanInput:
        """Keys, and while the person drives the action that brings target and opening to the leader's.

        `to_action(displacement (3,) in m, opening change)` scales to action units; what exceeds one
        tick's reach stays as the distance that the next ticks close, so fast motion is not lost.
        """
        events = frozenset(self.keys.poll())
        if "intervene" in events:
            if self.driving:
                self.hand_back()
            else:
                self.take_over(target, opening, gripper_reach)
        if not self.driving or self.leader is None:
            return HumanInput(None, events)
        tool, leader_opening = self.leader.pose()
        displacement = tool + self._offset - target
        wanted_opening = float(np.interp(leader_opening, *self._openings))
        return HumanInput(to_action(displacement, wanted_opening - opening), events)

    def follow(self, position: np.ndarray) -> None:
        """While the policy drives, make the leader track the follower's position (6,)."""
        if self.leader is not None and not self.driving:
            self.leader.follow(position)

    def hear(self, cue: str) -> None:
        """Tell the person one of the cues."""
        self.keys.hear(cue)

    def close(self) -> None:
        """Leave the leader limp and the terminal as it was; what fails is told, and hides no earlier error."""
        self.keys.close()
        if self.leader is not None:
            try:
                self.leader.release()
            except UserError as error:
                print(f"releasing the leader: {error}", file=sys.stderr)
