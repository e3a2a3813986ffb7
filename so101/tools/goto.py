"""Move the arm slowly to a pose, show where it got to, and bring it back to rest.

    python -m so101.tools.goto                                     the simulated arm, to home
    python -m so101.tools.goto rig=configs/rig.json pose=rest
    python -m so101.tools.goto "pose=[0,-0.5,0.6,1.2,1.57,0.5]"    five joints in rad, and the opening

It rises first; where it would meet the table on the way, it does not go.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from so101.config import launch, option, require_within
from so101.env import EnvConfig, straight_down_at
from so101.errors import ConfigError
from so101.rig import TOOL_FLIGHTS, RigConfig, open_rig, require_reachable
from so101.robot.kinematics import TIP_BELOW_TOOL, forward
from so101.robot.safety import EASE_PERIOD, Watchdog, ease_to, lift
from so101.schema import JOINTS

SAG = 0.03  # m; the reference gives 2.9 and 2.1 deg at shoulder and elbow, 4.5 at full reach: 1 to 3 cm


@dataclass
class Config:
    """What the command line can set."""

    pose: Literal["home", "rest"] | list[float] = option("home", "where to: five joints in rad and the opening 0 .. 1")
    stay_s: float = option(5.0, "seconds to stay there; Ctrl-C ends it earlier")
    rig: RigConfig = option(RigConfig(), "the arm; its leader stays where it is")
    env: EnvConfig = option(EnvConfig(), "where home is")

    def __post_init__(self) -> None:
        require_within(self, stay_s=(0, 3600))
        if isinstance(self.pose, list) and len(self.pose) != len(JOINTS):
            raise ConfigError(f"pose: got {len(self.pose)} values, needs one for each of {', '.join(JOINTS)}")


def main(config: Config) -> None:
    """Go there by way of LIFT_Z, and back to rest. Raises SafetyStop when something is in the way."""
    with open_rig(config.rig, 0, flights=TOOL_FLIGHTS) as rig:
        low, high = rig.arm.limits
        if config.pose == "rest":
            goal = np.array(config.rig.follower.rest)
        elif config.pose == "home":
            joints = straight_down_at(np.array(config.env.home), rig.arm.limits)
            goal = np.append(joints, config.env.gripper_range[1])
        else:
            goal = np.array(config.pose)
        require_reachable("pose", goal, rig.arm)
        goal = np.clip(goal, low, high)
        read = partial(Watchdog(config.rig.safety, rig.clock).guard, rig.arm)
        lift(rig.arm, rig.clock, read=read)
        _require_above_table(rig.arm.goals(), goal, config.env.table_z)
        ease_to(rig.arm, rig.clock, goal, read=read)
        until = rig.clock.now() + config.stay_s
        while rig.clock.now() + EASE_PERIOD < until:
            rig.clock.sleep_until(rig.clock.now() + EASE_PERIOD)
            read()
        position = read().position
        tool, _ = forward(position)
        for name, value, wanted in zip(JOINTS, position, goal, strict=True):
            unit = f"of its opening, goal {wanted:.3f}"
            if name != "gripper":
                unit = f"rad, {np.rad2deg(value):7.1f} deg, goal {wanted:.3f} ({np.rad2deg(wanted - value):+.1f} deg)"
            print(f"{name:14} {value:7.3f} {unit}")
        off = float(np.linalg.norm(tool - forward(goal)[0]))
        print("tool at x {:.3f}, y {:.3f}, z {:.3f} m, ".format(*tool) + about(off))


def about(off: float) -> str:
    """What to think of a tool that stays `off` m from its goal."""
    said = f"{1000 * off:.0f} mm from its goal: up to {1000 * SAG:.0f} is the arm's own weight"
    if off <= SAG:
        return f"{said}, which its servos do not make up for"
    return f"{said}; look for what blocks a joint, and run python -m so101.tools.doctor rig=..."


def _require_above_table(start: np.ndarray, goal: np.ndarray, table_z: float) -> None:
    """ConfigError where the fingertips would meet the table on the straight line in joint space."""
    tips = [forward(start + (goal - start) * part)[0][2] - TIP_BELOW_TOOL for part in np.linspace(0, 1, 50)]
    if min(tips) < table_z:
        raise ConfigError(
            f"pose: the fingertips would come to {min(tips):.3f} m on the way there, the table (env.table_z) is at "
            f"{table_z:.3f}; choose a higher one"
        )


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
