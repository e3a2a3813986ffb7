"""A scripted person in front of the simulated robot: holds the leader, presses keys, places the cube.

It acts only through what a person has: its hand moves the leader's joints and its fingers press keys, so
a demonstration in the simulation is a real recording. What it sees is the world itself.
"""

from dataclasses import dataclass

import numpy as np

from so101.config import option, require_within
from so101.robot import teleop
from so101.robot.kinematics import forward, jaw_angle, solve_ik
from so101.robot.sound import Cue
from so101.sim.servos import SimServos
from so101.sim.world import World

GRIP_OFFSET = 0.016  # m; half a cube and the 8 mm at which the fixed finger's inner face stands, less some air
HOVER_Z = 0.055  # m; the fingertips clear the 30 mm cube here
GRASP_Z = 0.014  # m; the tips reach to 8 mm above the table
CARRY_Z = 0.10  # m
CLOSE_TICKS = 7  # a closing jaw that holds nothing by then has missed
OUT_OF_REACH = 0.11  # m from the middle of the field
OPEN, CLOSED = 1.0, 0.0  # of the hand on the leader
LAG = 0.4  # share of the last motion that the servos have yet to carry out: the eye allows for it
FAILURES = ("beside", "above", "no lift", "no grasp")


@dataclass
class OperatorConfig:
    """How the simulated person behaves."""

    noise: float = option(0.15, "standard deviation of the hand's motion, as a share of a full step")
    speed: float = option(0.02, "how far the hand moves in one step at most, metres per axis")
    interventions: bool = option(True, "step in while the policy trains; false: demonstrations only")
    help_share: float = option(1.0, "share of the training episodes in which help is given when it is needed")
    explore_steps: int = option(10, "steps that the policy is left alone before each intervention")
    guide_steps: int = option(12, "steps that an intervention lasts at most")

    def __post_init__(self) -> None:
        steps = (0, 1_000_000)
        require_within(self, noise=(0, 1), speed=(1e-6, 0.1), help_share=(0, 1), explore_steps=steps, guide_steps=steps)


class Operator:
    """The KeySource of a simulated rig."""

    def __init__(
        self, config: OperatorConfig, world: World, follower: SimServos, leader: SimServos, rng: np.random.Generator
    ) -> None:
        self.config, self.world, self.follower, self.leader, self.rng = config, world, follower, leader, rng
        self._failures_shown = 0
        self._begin(None)

    def hear(self, cue: Cue) -> None:
        """Act on what the program says."""
        if cue.kind == teleop.PLACE_CUBE.kind:
            self.world.reset()
            self._ticks = -1  # the look during the reset is not yet one of the episode's
        elif cue in (teleop.DEMONSTRATE, teleop.DEMONSTRATE_FAILURE, teleop.TRAINING, teleop.EVALUATION):
            self._begin(cue)

    def close(self) -> None:
        """Nothing to give back."""

    def quits(self) -> bool:
        """It never does."""
        return False

    def poll(self) -> list[str]:
        """One look at the scene: move the hand, if it holds the leader, and press keys."""
        self._ticks += 1
        if self._ticks == 0:
            return []
        if self._cue == teleop.TRAINING:
            return self._supervise()
        if self._cue in (teleop.DEMONSTRATE, teleop.DEMONSTRATE_FAILURE):
            return self._demonstrate()
        return []

    def _begin(self, cue: Cue | None) -> None:
        self._cue = cue
        self._ticks = 0
        self._driving = False
        self._patience = self.config.explore_steps
        self._closing = 0
        self._marked = False
        self._wander = np.zeros(3)
        self._motion = np.zeros(3)
        self._helps = self.config.interventions and self.rng.random() < self.config.help_share
        if cue == teleop.DEMONSTRATE_FAILURE:
            self._failure = FAILURES[self._failures_shown % len(FAILURES)]
            self._failures_shown += 1
            angle = self.rng.uniform(0, 2 * np.pi)
            self._miss = self.rng.uniform(0.03, 0.05) * np.array([np.cos(angle), np.sin(angle)])

    def _demonstrate(self) -> list[str]:
        """Drive through the task, or through a deliberate failure, and mark what happened."""
        self._move_hand(*(self._failing_goal() if self._cue == teleop.DEMONSTRATE_FAILURE else self._goal()))
        if self._cue == teleop.DEMONSTRATE_FAILURE:
            return ["failure"] if self._ticks > 35 else []
        if self.world.lifted and not self._marked:
            self._marked = True
            return ["success"]
        return ["redo"] if self._hopeless() else []

    def _supervise(self) -> list[str]:
        """Let the policy explore, guide it briefly, let go again: the pattern that works.

        A policy that succeeds within `explore_steps` is never interrupted, so help fades by itself.
        """
        if self._hopeless():
            return ["failure"]
        if not self._helps:
            return []
        self._patience -= 1
        if self._patience < 0 and (self._driving or not self.world.held):  # a policy that holds the cube is let be
            self._driving = not self._driving
            self._patience = self.config.guide_steps if self._driving else self.config.explore_steps
            self._closing, self._motion = 0, np.zeros(3)
            return ["intervene"]
        if self._driving:
            self._move_hand(*self._goal())
        return []

    def _hopeless(self) -> bool:
        """The cube lies where the arm cannot fetch it."""
        away = self.world.cube_position[:2] - np.array(self.world.config.center)
        return not self.world.held and float(np.abs(away).max()) > OUT_OF_REACH

    def _tool(self) -> tuple[np.ndarray, np.ndarray]:
        """Tool position (3,), and the place (2,) over the cube where the fingers straddle it."""
        tool, _ = forward(self.follower.angle)
        _, gripper = forward(self.follower.angle, "gripper_link")
        return tool, self.world.cube_position[:2] - GRIP_OFFSET * gripper[:2, 0]

    def _goal(self) -> tuple[np.ndarray, float]:
        """Where to take the tool next (3,), and the opening: over, down, close, up."""
        tool, over = self._tool()
        error = float(np.linalg.norm(over - tool[:2]))
        if self.world.held:
            self._closing = 0
            if tool[2] > CARRY_Z - 0.02:  # stroll about at height: the classifier wants varied successes
                self._wander = np.clip(self._wander + self.rng.normal(0, 0.01, 3), -0.03, 0.03)
            return np.array([tool[0], tool[1], CARRY_Z]) + self._wander, CLOSED
        if self._closing > CLOSE_TICKS:  # missed: open again before the next try
            self._closing = 0 if self.follower.angle[5] > 0.6 else self._closing
            return np.array([*over, HOVER_Z]), OPEN
        if self._closing or (error < 0.006 and tool[2] < GRASP_Z + 0.008):
            self._closing += 1
            return np.array([*over, GRASP_Z]), CLOSED
        if error < 0.012 or (tool[2] < HOVER_Z - 0.01 and error < 0.02):
            return np.array([*over, GRASP_Z]), OPEN
        return np.array([*over, HOVER_Z]), OPEN

    def _failing_goal(self) -> tuple[np.ndarray, float]:
        """One of the ways to fail that a classifier must not mistake for success."""
        tool, over = self._tool()
        if self._failure == "no lift" and self.world.held:  # grasped, and left on the table
            return np.array([tool[0], tool[1], GRASP_Z + 0.005]), CLOSED
        if self._failure == "no lift":
            return self._goal()
        if self._failure == "no grasp":  # up and down over the cube with an open gripper
            return np.array([*over, GRASP_Z if self._ticks % 24 < 12 else CARRY_Z]), OPEN
        aside = over + self._miss if self._failure == "beside" else over
        height = GRASP_Z if self._failure == "beside" else HOVER_Z
        if self._ticks > 22:
            return np.array([*aside, CARRY_Z]), CLOSED
        return np.array([*aside, height if np.linalg.norm(aside - tool[:2]) < 0.02 else HOVER_Z]), (
            CLOSED if self._ticks > 14 else OPEN
        )

    def _move_hand(self, goal: np.ndarray, opening: float) -> None:
        """Move the leader by the tool's way to `goal`, at most a full step, with a hand's noise."""
        tool, _ = self._tool()
        motion = np.clip(0.8 * (goal - tool - LAG * self._motion), -self.config.speed, self.config.speed)
        motion += self.rng.normal(0, self.config.noise * self.config.speed, 3)
        self._motion = motion
        hand, _ = forward(self.leader.angle)
        joints = solve_ik(hand + motion, self.leader.angle[:5], max_iterations=30)
        self.leader.move_by_hand(np.append(joints, jaw_angle(opening)))
