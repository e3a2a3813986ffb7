"""Make the workspace box by waving the leader through all the space that the tool may use.

    python -m so101.tools.bounds leader=configs/leader.json output=bounds.json

Then env=bounds.json on a script's command line, or "include": "bounds.json" in a config's env. It needs the real
leader: nobody waves a simulated one.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so101.config import launch, option, require_within
from so101.env import EnvConfig
from so101.errors import DataError
from so101.files import write_atomic
from so101.rig import ArmConfig
from so101.robot.kinematics import forward
from so101.runlog import table
from so101.tools.ask import open_limp, until_enter

SMALLEST_SIDE = 0.02  # m; one full action crosses it


@dataclass
class Config:
    """What the command line can set."""

    leader: ArmConfig = option(
        help="the arm to wave: leader.port=/dev/ttyACM1 leader.calibration=calibrations/leader.json"
    )
    output: str = option("bounds.json", "config fragment to write; it must not exist yet")
    margin: float = option(0.0, "metres to leave free inside the waved space, on all sides")

    def __post_init__(self) -> None:
        require_within(self, margin=(0, 0.1))


def main(config: Config) -> None:
    """Follow the leader until Enter; write the box. DataError for a file that is there, and a box that is none."""
    output = Path(config.output)
    _require_new(output)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    with ExitStack() as stack:
        arm = open_limp("leader", config.leader, stack)

        def look() -> str:
            tool, _ = forward(arm.read().position)
            low[:], high[:] = np.minimum(low, tool), np.maximum(high, tool)
            return table(["m", "low", "tool", "high"], list(zip("xyz", *np.round([low, tool, high], 3), strict=True)))

        print("Wave the tool through all the space that it may use, down to the table; then press Enter.", flush=True)
        until_enter(look)
    low, high = np.round(low + config.margin, 3), np.round(high - config.margin, 3)
    if (high - low < SMALLEST_SIDE).any():
        raise DataError(
            f"the box {low} .. {high} m is thinner than {SMALLEST_SIDE} m; wave the leader farther, in x, y and z"
        )
    fragment = {"workspace_low": low.tolist(), "workspace_high": high.tolist()}
    _require_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(fragment, indent=2) + "\n")
    home = EnvConfig().home
    print(f"{output}: written; use it with env={output}")
    if ((home < low) | (home > high)).any():
        print(f"note: the usual home {home} lies outside; give env.home a place inside, or wave the leader there too")


def _require_new(output: Path) -> None:
    if output.exists():
        raise DataError(f"output: {output} exists and is not overwritten; give another name, or move it away")


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")
