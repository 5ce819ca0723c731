"""Charts with logarithmic axes, as SVG: what `bench --plot` and benchmarks/plot.py draw, without a package for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, cos, floor, log10, pi, sin

# Okabe and Ito's colours, which nearly everybody can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"

LINES = {"solid": "", "dashed": "6 3", "dotted": "1.5 2.5"}

_WIDTH, _HEIGHT = 800, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 210, 52, 50  # beside the axes; at the right is the legend
_LINE_HEIGHT = 18


@dataclass(frozen=True)
class Series:
    """Points of one colour. Without a name they are not in the legend, without a line or a mark these are not drawn."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    line: str = ""  # one of LINES
    mark: str = ""  # one of MARKS


@dataclass(frozen=True)
class Note:
    """Text above a point, which it ends at, or below one, which it begins at."""

    x: float
    y: float
    text: str
    ends: bool


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    notes: Sequence[Note] = (),
    x_ticks: Sequence[float] = (),
    y_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """The file. Numbers are positive; ticks of x are at 1, 2 and 5 times powers of ten unless they are given."""
    xs, ys = ([point[i] for each in series for point in each.points] for i in (0, 1))
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *(_text(_LEFT, 20 + i * _LINE_HEIGHT, line, size=14) for i, line in enumerate(title.splitlines())),
        *_grid(x_axis, y_axis, x_ticks or x_axis.ticks(), y_text),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_label, anchor="middle"),
        f'<g transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)">'
        f"{_text(0, 0, y_label, anchor='middle')}</g>",
    ]
    for each in series:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in each.points]
        parts += _drawn(each, places)
    for note in notes:
        anchor, away = ("end", -4) if note.ends else ("start", 14)
        x, y = x_axis.place(note.x), y_axis.place(note.y) + away
        parts.append(_text(x, y, note.text, anchor=anchor, colour="#555555"))
    for i, each in enumerate(one for one in series if one.name):
        x, y = _WIDTH - _RIGHT + 14, _TOP + 8 + i * _LINE_HEIGHT
        parts += _drawn(each, [(x, y), (x + 24, y)] if each.line else [(x + 12, y)])
        parts.append(_text(x + 32, y + 4, each.name))
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """From a logarithm to places between two ends, a little inside of them."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.first, self.last = first, last
        room = max(0.06 * log10(high / low), 0.06)
        self._low, self._high = log10(low) - room, log10(high) + room

    def place(self, value: float) -> float:
        return self.first + (log10(value) - self._low) / (self._high - self._low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        factors = (1, 2, 5) if self._high - self._low < 3 else (1,)
        powers = range(floor(self._low), ceil(self._high) + 1)
        return [f * 10.0**p for p in powers for f in factors if self._low <= log10(f) + p <= self._high]


def _grid(x_axis: _Axis, y_axis: _Axis, x_ticks: Sequence[float], y_text: Callable[[float], str]) -> Iterator[str]:
    for value in x_ticks:
        x = x_axis.place(value)
        yield _line([(x, y_axis.first), (x, y_axis.last)], "#e6e6e6")
        yield _text(x, y_axis.first + 18, f"{value:g}", anchor="middle")
    for value in y_axis.ticks():
        y = y_axis.place(value)
        yield _line([(x_axis.first, y), (x_axis.last, y)], "#e6e6e6")
        yield _text(x_axis.first - 8, y + 4, y_text(value), anchor="end")
    corners = [(x_axis.first, y_axis.last), (x_axis.first, y_axis.first), (x_axis.last, y_axis.first)]
    yield _line(corners, "#000000")


def _drawn(series: Series, places: Sequence[tuple[float, float]]) -> Iterator[str]:
    if series.line:
        yield _line(places, series.colour, LINES[series.line], width=1.5)
    if series.mark:
        for x, y in places:
            yield f'<path transform="translate({x:.1f} {y:.1f})" d="{MARKS[series.mark]}" fill="{series.colour}"/>'


def _line(places: Sequence[tuple[float, float]], colour: str, dashes: str = "", width: float = 1) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#000000", size: int = 12) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


# ---- marks -----------------------------------------------------------------------------------


def _polygon(radii: Sequence[float], start: float) -> str:
    """With one corner for each radius; the first one is at `start` turns, clockwise from the top."""
    angles = [2 * pi * (start + i / len(radii)) for i in range(len(radii))]
    corners = [f"{r * sin(angle):.2f} {-r * cos(angle):.2f}" for r, angle in zip(radii, angles)]
    return f"M{'L'.join(corners)}Z"


MARKS = {
    "circle": "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1-4 0Z",
    "dot": "M-2 0A2 2 0 1 1 2 0A2 2 0 1 1-2 0Z",
    "square": _polygon([5] * 4, 1 / 8),
    "diamond": _polygon([5] * 4, 0),
    "up": _polygon([5] * 3, 0),
    "down": _polygon([5] * 3, 1 / 2),
    "left": _polygon([5] * 3, -1 / 4),
    "right": _polygon([5] * 3, 1 / 4),
    "pentagon": _polygon([5] * 5, 0),
    "hexagon": _polygon([5] * 6, 0),
    "star": _polygon([6, 2.5] * 5, 0),
    "plus": _polygon([5, 5, 2.2] * 4, -1 / 24),
    "cross": _polygon([5, 5, 2.2] * 4, 1 / 12),
}
