"""The simulated table top: strips of maple, so that the tool's height and sideways motion can be seen.

A texel is brightness on a logarithmic scale, so that a shadow is a subtraction and the light's colour is a
palette: the picture of the table is made in one channel, four times faster than in three.
"""

from functools import lru_cache

import cv2
import numpy as np

# The table in metres: the texture's rows run along x (away from the arm), its columns along y.
TABLE_X, TABLE_Y = (-0.2, 0.8), (-0.6, 0.6)
TEXEL = 0.0005
STRIP = 84  # texels: strips 42 mm wide, wider than the cube

WOOD_LEVEL, LEVELS_PER_E = 200, 100.0  # 100 levels less are a factor e darker; level 0 is "no table here"
WOOD_RGB = np.array([208.0, 177.0, 137.0])
WALL_RGB = np.array([74.0, 76.0, 80.0])


def _palette() -> np.ndarray:
    """The colour of each level under white light, (256, 1, 3); darker wood is also redder."""
    brightness = np.exp((np.arange(256) - WOOD_LEVEL) / LEVELS_PER_E)
    palette = WOOD_RGB * brightness[:, None] ** np.array([0.9, 1.0, 1.15])
    palette[0] = WALL_RGB
    return palette[:, None]


PALETTE = _palette()


@lru_cache(maxsize=1)
def wood() -> np.ndarray:
    """The table's levels, (rows, columns) uint8: the same in every run, made once (0.3 s)."""
    rng = np.random.default_rng(101)
    rows, columns = (round((high - low) / TEXEL) for low, high in (TABLE_X, TABLE_Y))
    levels = np.empty((rows, columns), np.float32)
    for left in range(0, columns, STRIP):
        top = -int(rng.integers(0, 280))  # so that the strips' ends are staggered
        while top < rows:
            plank = _plank(int(rng.integers(280, 620)), rng)[max(-top, 0) : rows - top, : columns - left]
            top = max(top, 0)
            levels[top : top + len(plank), left : left + STRIP] = plank
            top += len(plank)
    levels += rng.normal(0, 2, levels.shape)
    return np.clip(levels, 1, 255).astype(np.uint8)


def _plank(length: int, rng: np.random.Generator) -> np.ndarray:
    """One piece of wood, (length, STRIP): a tone of its own, growth rings, fine grain, two dark joints."""

    def streaks(along: int, across: int) -> np.ndarray:
        """Smooth noise of standard deviation 1 or less, whose spots are so many texels long and wide."""
        spots = rng.standard_normal((length // along + 2, STRIP // across + 2), dtype=np.float32)
        return cv2.resize(spots, (STRIP, length), interpolation=cv2.INTER_CUBIC)

    rings = np.sin(np.linspace(0, rng.uniform(10, 40), STRIP) + 2.2 * streaks(150, 30))
    plank = WOOD_LEVEL + rng.normal(0, 11) + 5 * rings + 5 * streaks(60, 2) + 4 * streaks(25, 8)
    plank[:2] -= 45
    plank[:, :2] -= 45
    return plank
