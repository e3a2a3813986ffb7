"""Drive the follower with the leader, through the same control step as a recording, and time it.

    python -m so101.tools.teleoperate                  the simulated arms and a scripted person
    python -m so101.tools.teleoperate rig=configs/rig.json seconds=300

Shows where the tool is, how far behind its target (lag; 5 to 30 mm, more where it moves fast, since servos without an
integral part give way to the arm's weight), and at the end how long the ticks took. Nothing is recorded: of the keys r
goes home, p waits there, q or Ctrl-C ends it and leaves the arm safe.
"""

from dataclasses import dataclass, replace

import numpy as np

from so101.config import launch, option, require_within
from so101.env import Env, EnvConfig
from so101.errors import ConfigError
from so101.rig import TOOL_FLIGHTS, RigConfig, describe_task, open_rig
from so101.robot.teleop import DEMONSTRATE
from so101.runlog import Progress
from so101.schema import ACTION, OPENING, TOOL_XYZ, Preprocess, RewardSpec
from so101.web.live_page import LivePage, live_page


@dataclass
class Config:
    """Driving by hand."""

    seconds: float = option(60.0, "for how long; q ends it earlier")
    seed: int = option(0, "seed of the simulated world and of the random start pose")
    page: bool = option(False, "show it live in the browser, on this machine alone, and act from there")
    page_port: int = option(0, "port of the page; 0: any that is free")
    rig: RigConfig = option(RigConfig(), "arms, cameras, person")
    env: EnvConfig = option(EnvConfig(), "the workspace and the timing")
    preprocess: Preprocess = option(Preprocess(), "as in a recording, so that a tick is as long as one of its own")

    def __post_init__(self) -> None:
        require_within(self, seconds=(1 / self.env.fps, 1_000_000), seed=(0, 2**31))
        if self.rig.leader is None and not self.page:
            raise ConfigError("rig.leader: got null; drive with a leader arm, or from the page with page=true")


def main(config: Config) -> None:
    """Drive until the time is up or the person quits."""
    describe_task(config.rig, config.env, config.preprocess)
    with (
        live_page(config.page, config.page_port, "teleoperate") as page,
        open_rig(config.rig, config.seed, page, TOOL_FLIGHTS) as rig,
    ):
        geometry = replace(config.env, control_time_s=config.seconds)
        env = rig.make_env(geometry, config.preprocess, RewardSpec(), config.seed, success_ends=False)
        rig.teleop.hear(DEMONSTRATE)
        observation, pressed = env.reset(person_drives=True)
        periods: list[float] = []
        try:
            if "quit" not in pressed:
                drive(env, observation.time, periods, page)
        finally:
            print(summary(np.array(periods), env.rate.overruns))


def drive(env: Env, before: float, periods: list[float], page: LivePage | None) -> None:
    """Step until the time is up, from `before` (s) on; adds how long each tick took to `periods`."""
    with Progress("teleoperate", env.config.max_steps, "tick", page) as progress:
        while True:
            step = env.step(np.zeros(len(ACTION)))
            periods.append(step.observation.time - before)
            before = step.observation.time
            tool = " ".join(f"{metres:+.3f}" for metres in step.observation.state[TOOL_XYZ])
            opening = float(step.observation.state[OPENING])
            progress.update(len(periods), tool=tool, opening=opening, lag_mm=1000 * step.lag, late=env.rate.overruns)
            if step.terminated or "quit" in step.events or len(periods) == env.config.max_steps:
                return
            if "redo" in step.events:  # back home; after a page that was lost not before somebody presses p
                observation, pressed = env.reset(person_drives=True)
                before = observation.time
                if "quit" in pressed:
                    return


def summary(periods: np.ndarray, overruns: int) -> str:
    """The ticks' lengths (n,) in s, as one line."""
    if not len(periods):
        return "no tick was completed"
    mean, p99, longest = 1000 * periods.mean(), 1000 * np.percentile(periods, 99), 1000 * periods.max()
    return f"{len(periods)} ticks: mean {mean:.1f} ms, p99 {p99:.1f}, longest {longest:.1f}; {overruns} overran"


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
