"""The report of a run: line plots as SVG and one self-contained HTML page, without a plotting library."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from so101.files import write_atomic
from so101.runlog import in_words

WIDTH, HALF, HEIGHT = 720, 400, 320  # px of one plot; two of half width stand side by side
LEFT, RIGHT, BOTTOM = 74, 16, 48  # px around its axes; the legend needs what it needs on top
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for all eyes
MOST_POINTS = 1500  # drawn per line: finer than its pixels
FEW_POINTS = 40  # up to here each point also gets a dot
MARK_PX = 6  # of the coloured bar under a frame of a film strip

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fafafa; color-scheme: light;
       margin: 0 auto; max-width: 60em; padding: 1.5em; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6em; margin: 0 0 0.5em; }}
section {{ background: #fff; border: 1px solid #e3e3e3; border-radius: 6px;
          padding: 1em 1.25em; margin: 1em 0; overflow-x: auto; }}
h2 {{ font-size: 1.15em; margin: 0 0 0.6em; }}
p {{ margin: 0.4em 0 0.8em; max-width: 50em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0 0 0.8em; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.25em 1.5em 0.25em 0; border-bottom: 1px solid #e8e8e8; }}
th {{ font-weight: 600; }}
td.number, th.number {{ text-align: right; }}
td.number, td:first-child {{ white-space: nowrap; }}
td:nth-child(2):nth-last-child(2), td:nth-child(3):last-child {{ max-width: 24em; }} /* two runs: a URL wraps */
summary {{ cursor: pointer; }}
pre {{ font-size: 0.85em; white-space: pre-wrap; }}
figure {{ margin: 0 0 0.8em; break-inside: avoid; }}
figcaption {{ font-size: 0.9em; }}
figure.one {{ display: inline-block; margin: 0 0.25em 0.6em 0; vertical-align: top; }}
svg, img {{ max-width: 100%; height: auto; }}
svg {{ margin-right: 1em; break-inside: avoid; }}
img.pixels {{ image-rendering: pixelated; }}
@media print {{
  body {{ background: #fff; max-width: none; padding: 0; }}
  section {{ border: 0; padding: 0; overflow: visible; }}
  tr, h2 {{ break-inside: avoid; break-after: avoid; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
</body>
</html>
"""


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most `most` + 2, that enclose `low` .. `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def curve(
    title: str, x_label: str, y_label: str, series: Series, *, width: int = WIDTH, joined: bool = True,
    colours: Sequence[str] = COLOURS, x_range: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """An SVG line plot of {name: (xs, ys)}, or of its dots alone; points that are not finite are left out.

    `x_range` is the x axis; None: as far as there are points.
    """
    lines = {name: _finite(xs, ys) for name, (xs, ys) in series.items()}
    legend, top = _legend(list(lines), width - RIGHT, colours, joined)
    xs = np.concatenate([np.zeros(0), *(x for x, _ in lines.values())])
    ys = np.concatenate([np.zeros(0), *(y for _, y in lines.values())])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img" aria-label="{html.escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="#444">',
        f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="600" fill="#222">{html.escape(title)}</text>',
        legend,
        _text((LEFT + width - RIGHT) / 2, HEIGHT - 8, "middle", x_label),
        f'<g transform="translate(14 {(top + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)">'
        f"{_text(0, 0, 'middle', y_label)}</g>",
    ]
    if not len(xs):
        parts.append(_text((LEFT + width - RIGHT) / 2, (top + HEIGHT - BOTTOM) / 2, "middle", "no data yet"))
        return "\n".join([*parts, "</svg>"])
    x_low, x_high = x_range or _spread(xs)
    y_ticks = round_ticks(*_spread(ys))
    x_ticks = [tick for tick in round_ticks(x_low, x_high, width // 75) if x_low <= tick <= x_high]

    def x_px(x: Any) -> Any:
        return LEFT + (x - x_low) / (x_high - x_low) * (width - RIGHT - LEFT)

    def y_px(y: Any) -> Any:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - BOTTOM - top)

    for tick in y_ticks:
        parts.append(_rule(LEFT, y_px(tick), width - RIGHT, y_px(tick)))
        parts.append(_text(LEFT - 8, y_px(tick) + 4, "end", f"{tick:g}"))
    for tick in x_ticks:
        parts.append(_rule(x_px(tick), top, x_px(tick), HEIGHT - BOTTOM))
        parts.append(_text(x_px(tick), HEIGHT - BOTTOM + 16, "middle", f"{tick:g}"))
    parts.append(_rule(LEFT, HEIGHT - BOTTOM, width - RIGHT, HEIGHT - BOTTOM, "#999"))
    for index, (x, y) in enumerate(lines.values()):
        parts.append(_line(x_px(x), y_px(y), colours[index % len(colours)], joined))
    return "\n".join([*parts, "</svg>"])


def _finite(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value; made wider where they are the same, so that there is an axis: of zeros 0 to 1."""
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)


def _legend(names: list[str], right: int, colours: Sequence[str], joined: bool) -> tuple[str, int]:
    """Coloured names in rows under the title, and the height in px at which the plot may begin."""
    parts, x, y = [], LEFT, 40
    for index, name in enumerate(names):
        width = 30 + 7 * len(name)  # px; the mean glyph at 12 px is about 6.5 wide
        if x > LEFT and x + width > right:
            x, y = LEFT, y + 18
        colour = colours[index % len(colours)]
        line = "h16" if joined else "m8 0h0"  # a round dot is a line without length
        parts.append(
            f'<path d="M{x} {y - 4}{line}" stroke="{colour}" stroke-width="{2.5 if joined else 7}" '
            'stroke-linecap="round"/>'
        )
        parts.append(_text(x + 21, y, "start", name))
        x += width + 8
    return "\n".join(parts), y + 14


def _text(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _rule(x0: float, y0: float, x1: float, y1: float, colour: str = "#e6e6e6") -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{colour}"/>'


def _line(x: np.ndarray, y: np.ndarray, colour: str, joined: bool) -> str:
    """One line through points in px, with dots where the points are few, or nothing but dots."""
    x, y = _thin(x, y)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    style = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"'
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in zip(x, y, strict=True)]
    line = f'<polyline points="{points}" {style}/>' if joined else ""
    return line + "".join(dots if len(dots) <= FEW_POINTS or not joined else [])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
    kept = sorted({int(s[pick(y[s])]) for s in stretches for pick in (np.argmin, np.argmax)})
    return x[kept], y[kept]


def image_tag(rgb: np.ndarray, width_px: int | None = None, alt: str = "") -> str:
    """An <img> that holds (H, W, 3) uint8 RGB itself, as PNG; `width_px` is its size on the page."""
    png = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()
    data = base64.b64encode(png).decode()
    width = width_px or rgb.shape[1]
    return f'<img class="pixels" alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{data}">'


def film_strip(
    frames: Sequence[np.ndarray], height_px: int = 96, alt: str = "", marks: Sequence[str | None] = ()
) -> str:  # fmt: skip
    """An <img> with frames (H, W, 3) uint8 RGB side by side, as JPEG: 3 KB for each of 96 x 96.

    `marks` are the colours, "#rrggbb", of a bar under each frame; None: no bar there.
    """
    gap = np.full((height_px + (MARK_PX if marks else 0), 2, 3), 255, np.uint8)
    pieces = []
    for index, frame in enumerate(frames):
        width = max(1, round(frame.shape[1] * height_px / frame.shape[0]))
        piece = cv2.resize(frame, (width, height_px), interpolation=cv2.INTER_AREA)
        if marks:
            colour = bytes.fromhex((marks[index] or "#ffffff")[1:])
            piece = np.concatenate([piece, np.full((MARK_PX, width, 3), list(colour), np.uint8)])
        pieces += [piece, gap]
    row = np.concatenate(pieces[:-1], axis=1)
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(row, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    data = base64.b64encode(jpeg).decode()
    size = f'width="{row.shape[1]}" height="{row.shape[0]}"'
    return f'<img alt="{html.escape(alt)}" {size} src="data:image/jpeg;base64,{data}">'


def html_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with its text escaped; columns of numbers, or None, are aligned to the right.

    Headers that are all empty are left out.
    """
    columns = [[row[i] for row in rows if row[i] is not None] for i in range(len(headers))]
    right = [bool(cells) and all(_is_number(cell) for cell in cells) for cells in columns]

    def line(tag: str, cells: Sequence[Any]) -> str:
        words = [in_words(cell) for cell in cells]
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=number' if r else ''}>{html.escape(word)}</{tag}>"
                for word, r in zip(words, right, strict=True)
            )
            + "</tr>"
        )

    top = [line("th", headers)] if any(headers) else []
    return "\n".join(["<table>", *top, *(line("td", row) for row in rows), "</table>"])


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float | np.number) and not isinstance(cell, bool)


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write one HTML page that needs no other file; sections are (heading, HTML), headings are escaped."""
    body = "\n".join(
        f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>" for heading, content in sections
    )
    write_atomic(path, PAGE.format(title=html.escape(title), sections=body))
