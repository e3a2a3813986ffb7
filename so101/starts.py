"""Where evaluation episodes start, the same for every policy: as trained, at home, on a grid, or from a list.

Each start has a seed of its own, so that every policy and every later evaluation meets the same scene there.
"""

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from so101.config import option
from so101.env import EnvConfig
from so101.errors import ConfigError
from so101.files import parse_json
from so101.sim.world import WorldConfig

KINDS = ("trained", "random", "home", "grid")


@dataclass(frozen=True)
class Start:
    """Where an episode starts."""

    number: int = option(help="from 1")
    seed: int = option(help="of the scene and of the policy's noise")
    tool: list[float] = option(help="tool position, x y z in m")
    object: list[float] = option(help="where a person is to place the object: x y in m, yaw in rad")


def make_starts(
    kind: str, grid: list[int], episodes: int | None, seed: int, env: EnvConfig, world: WorldConfig
) -> list[Start]:  # fmt: skip
    """The starts of an evaluation; `kind` is one of KINDS, or a JSON file that lists tool positions.

    `episodes` None: 50, or each place of a grid or a list once. The object's places, for a real arm, are drawn
    as in the simulated `world`. Start number n of a seed is the same in every evaluation of a kind. Raises ConfigError.
    """
    if kind == "trained":
        kind = "random" if env.random_ee_reset else "home"
    places: list[np.ndarray] = []
    if kind == "grid":
        shares = [np.linspace(-1, 1, count) if count > 1 else np.zeros(1) for count in [*grid, 1][:3]]
        places = [env.start_at(np.array(share)) for share in itertools.product(*shares)]
        if len({tuple(place) for place in places}) < len(places):
            raise ConfigError(
                f"starts: a grid of {grid} covers env.random_ee_range_xy {env.random_ee_range_xy} and _z "
                f"{env.random_ee_range_z} m, where two of its places fall together; ask for 1 where there is no range"
            )
    elif kind not in KINDS:
        places = read_places(Path(kind), env)
    count = episodes or len(places) or 50
    if places and count % len(places):
        raise ConfigError(
            f"episodes: got {count}, but {kind} has {len(places)} starts; a multiple of that runs each as often"
        )
    starts = []
    for number in range(1, count + 1):
        own = np.random.SeedSequence([seed, number])
        rng = np.random.default_rng(own)
        offset = rng.uniform(-1, 1, 3) if kind == "random" else np.zeros(3)
        tool = places[(number - 1) % len(places)] if places else env.start_at(offset)
        reach = [world.cube_range_xy, world.cube_range_xy, world.cube_range_yaw]
        x, y, yaw = rng.uniform(-1, 1, 3) * reach + [*world.center, 0.0]
        starts.append(Start(number, int(own.generate_state(1)[0]), tool.tolist(), [float(x), float(y), float(yaw)]))
    return starts


def read_places(path: Path, env: EnvConfig) -> list[np.ndarray]:
    """The tool positions (3,) m that a JSON file lists. Raises ConfigError, naming the entry that cannot be a start."""
    try:
        listed = parse_json(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"starts: {path} cannot be read: {problem.strerror}; or say {', '.join(KINDS)}") from None
    except ValueError as problem:
        raise ConfigError(f"starts: {path}: no usable JSON: {problem}") from None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"starts: {path}: must hold a list of tool positions, [[x, y, z], ...] in metres")
    for number, place in enumerate(listed, 1):
        numbers = isinstance(place, list) and all(type(value) in (int, float) for value in place)
        if not numbers or len(place) != 3 or not np.isfinite(place).all():
            raise ConfigError(f"starts: {path}: entry {number}: got {place!r}, must be [x, y, z] in metres")
        try:
            replace(env, home=[float(value) for value in place])  # what may be home may be a start
        except ConfigError as problem:
            raise ConfigError(f"starts: {path}: entry {number}: {str(problem).removeprefix('home: ')}") from None
    return [np.array(place, float) for place in listed]


def where(start: Start, count: int) -> str:
    """Where to place the object for a start, in words."""
    x, y, yaw = start.object
    side, way = "left" if y >= 0 else "right", "left" if yaw >= 0 else "right"
    turned = f", turned {abs(math.degrees(yaw)):.0f} degrees to the {way}"
    return f"{x:.3f} m ahead of the base, {abs(y):.3f} m to its {side}{turned} (start {start.number} of {count})"
