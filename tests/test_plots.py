"""Plots and the report: read back as XML and HTML, with the drawn places compared with the data."""

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from so101.plots import HALF, MARK_PX, curve, film_strip, html_table, image_tag, round_ticks, write_report

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> list[np.ndarray]:
    """The points (N, 2) in px of each line of a plot."""
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [np.array([p.split(",") for p in line.attrib["points"].split()], float) for line in lines]


def axis(svg: str, anchor: str, index: int) -> tuple[float, float]:
    """(scale, offset) from px to data, read off the plot's own tick labels."""
    texts = [t for t in ElementTree.fromstring(svg).iter(f"{SVG}text") if t.get("text-anchor") == anchor]
    pairs = [
        (float(t.attrib["xy"[index]]) - 4 * index, float(t.text))
        for t in texts
        if t.text and re.fullmatch(r"-?[\d.]+(e[+-]\d+)?", t.text)
    ]
    return tuple(np.polyfit(*zip(*pairs, strict=True), 1))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 4.2, [0, 1, 2, 3, 4, 5]),
        (-0.003, 0.011, [-0.005, 0, 0.005, 0.01, 0.015]),
        (12000, 61000, [10000, 20000, 30000, 40000, 50000, 60000, 70000]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, ticks):
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_points_stand_where_the_axes_say():
    xs, ys = [0, 10, 25, 40], [0.5, -1.25, 3.0, 2.0]
    svg = curve("t", "x", "y", {"a": (xs, ys)})
    (points,) = drawn(svg)
    (x_scale, x_offset), (y_scale, y_offset) = axis(svg, "middle", 0), axis(svg, "end", 1)
    assert points[:, 0] * x_scale + x_offset == pytest.approx(xs, abs=0.02)
    assert points[:, 1] * y_scale + y_offset == pytest.approx(ys, abs=0.02)


def test_gaps_single_points_constants_and_nothing_are_drawn():
    nan = float("nan")
    (points,) = drawn(curve("t", "x", "y", {"a": ([0, 1, 2], [1.0, nan, 3.0])}))
    assert len(points) == 2
    for ys in ([0.0], [7.0, 7.0], [-1e-9, -1e-9]):
        (points,) = drawn(curve("t", "x", "y", {"a": (range(len(ys)), ys)}))
        assert np.isfinite(points).all()
    assert "no data yet" in curve("t", "x", "y", {}) and "no data yet" in curve("t", "x", "y", {"a": ([1], [nan])})


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0, 1), (4.0, 2, 6), (-4.0, -6, -2)])
def test_the_axis_of_a_constant_has_a_height_and_none_below_zero_that_is_not_there(value, low, high):
    svg = curve("t", "x", "y", {"a": ([0, 1, 2], [value] * 3)})
    texts = [t for t in ElementTree.fromstring(svg).iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    ticks = [float(t.text) for t in texts]
    assert (min(ticks), max(ticks)) == (low, high)


def test_an_axis_that_is_given_is_labelled_to_its_ends():
    svg = curve("t", "x", "y", {"a": ([0.3, 0.9], [0, 1])}, width=HALF, x_range=(0, 1))
    ticks = [t.text for t in ElementTree.fromstring(svg).iter(f"{SVG}text") if t.get("text-anchor") == "middle"]
    assert [tick for tick in ticks if tick not in ("x", "y")] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    (points,) = drawn(svg)
    scale, offset = axis(svg, "middle", 0)
    assert points[:, 0] * scale + offset == pytest.approx([0.3, 0.9], abs=0.01)


def test_a_long_line_is_thinned_and_keeps_its_spike():
    ys = np.zeros(100_000)
    ys[54_321] = 9.0
    svg = curve("t", "x", "y", {"a": (range(100_000), ys)})
    (points,) = drawn(svg)
    scale, offset = axis(svg, "end", 1)
    assert len(points) <= 1500 and (points[:, 1] * scale + offset).max() == pytest.approx(9.0, abs=0.05)


def test_image_tag_holds_the_picture():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    data = re.search(r'base64,([^"]+)"', image_tag(rgb, 70))
    assert data is not None and 'width="70"' in image_tag(rgb, 70)
    bgr = cv2.imdecode(np.frombuffer(base64.b64decode(data[1]), np.uint8), cv2.IMREAD_COLOR)
    assert (bgr[:, :, ::-1] == rgb).all()


def test_dots_alone_are_where_the_axes_say_and_within_a_plot_of_half_width():
    xs, ys = list(np.linspace(-3, 9, 60)), list(np.linspace(2, 1, 60))
    svg = curve("t", "x", "y", {"a": (xs, ys)}, width=HALF, joined=False, colours=["#123456"])
    assert drawn(svg) == []
    dots = [dot for dot in ElementTree.fromstring(svg).iter(f"{SVG}circle") if dot.get("fill") == "#123456"]
    (x_scale, x_offset), (y_scale, y_offset) = axis(svg, "middle", 0), axis(svg, "end", 1)
    assert [float(dot.attrib["cx"]) * x_scale + x_offset for dot in dots] == pytest.approx(xs, abs=0.05)
    assert [float(dot.attrib["cy"]) * y_scale + y_offset for dot in dots] == pytest.approx(ys, abs=0.01)
    assert max(float(dot.attrib["cx"]) for dot in dots) <= HALF


def test_a_film_strip_shows_the_frames_in_order_with_the_colour_of_each_below():
    frames = [np.full((48, 64, 3), value, np.uint8) for value in (20, 120, 220)]
    tag = film_strip(frames, 24, 'of "a"', ["#009e73", None, "#d55e00"])
    assert 'alt="of &quot;a&quot;"' in tag and f'width="{3 * 32 + 2 * 2}" height="{24 + MARK_PX}"' in tag
    jpeg = base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1])
    rgb = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)
    assert rgb.shape == (24 + MARK_PX, 100, 3)
    for column, grey, mark in ((16, 20, (0, 158, 115)), (50, 120, (255, 255, 255)), (84, 220, (213, 94, 0))):
        assert abs(rgb[10, column] - grey).max() < 6
        assert abs(rgb[24 + MARK_PX - 2, column] - mark).max() < 12
    assert f'height="{24}"' in film_strip(frames, 24)


def test_a_table_shows_what_is_missing_as_a_dash_and_keeps_its_numbers_to_the_right():
    text = html_table(["n", "x", "truth"], [[1, None, True], [2, float("nan"), False], [20000.0, 0.5, None]])
    cells = re.findall(r"<td( class=number)?>([^<]*)</td>", text)
    number, dash = " class=number", "-"
    assert cells == [
        (number, "1"), (number, dash), ("", "yes"), (number, "2"), (number, dash), ("", "no"),
        (number, "20000"), (number, "0.5"), ("", dash),
    ]  # fmt: skip
    assert "<th" not in html_table(["", ""], [["a", "b"]])


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_report_is_one_page_that_escapes_text_and_needs_no_other_file(tmp_path):
    rows = [["<b>bold</b>", 1, 0.123456], ["plain", 20, 2.0]]
    image = image_tag(np.zeros((2, 2, 3), np.uint8))
    plot = curve("<i>", "a & b", "y", {"<u>": ([0, 1], [0, 1])})
    path = tmp_path / "report.html"
    write_report(path, "A & <script>", [("Table <1>", html_table(["name", "n", "x"], rows)), ("Plot", plot + image)])
    page = Page(path.read_text())
    assert not {"b", "i", "u", "script"} & set(page.tags)
    assert {"A & <script>", "Table <1>", "<b>bold</b>", "0.1235", "a & b", "<u>"} <= set(page.words)
    assert page.tags.count("td") == 6 and all(link.startswith("data:") for link in page.links)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
