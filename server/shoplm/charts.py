"""Small charts as SVG text, for pages that have to stand alone: lines over two axes, and grouped bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH, HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 40
COLOURS = ("#1f6feb", "#d1570a", "#6e7781", "#2da44e", "#8250df")

Point = tuple[float, float]
Bounds = tuple[float, float, float, float]  # smallest and largest x, then y

STYLE = """figure { margin: 0; width: 460px } svg { width: 100% } svg text { font-size: 11px; fill: #57606a }
.end { text-anchor: end } .middle { text-anchor: middle } .grid { stroke: #d8dee4 }
.legend span { margin-right: 1rem; font-size: 13px } .legend i { display: inline-block; width: 10px; height: 10px;
margin-right: .3rem }"""


@dataclass(frozen=True)
class Line:
    """Points joined in their order; None is a gap. `marks` draws each point; `dashed` is for what a line should be
    like."""

    name: str
    points: Sequence[Point | None]
    marks: bool = False
    dashed: bool = False


def line_chart(lines: Sequence[Line], x_title: str, y_title: str, bounds: Bounds) -> str:
    """A drawing with its legend. Points outside the bounds are drawn at the edge."""
    x_low, x_high, y_low, y_high = bounds
    parts = [_grid(bounds, x_title, y_title)]
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        dash = ' stroke-dasharray="4 4"' if line.dashed else ""
        for is_gap, run in groupby(line.points, lambda point: point is None):
            if is_gap:
                continue
            points = filter(None, run)
            at = [(_place(x, x_low, x_high, _LEFT, WIDTH - _RIGHT), _height(y, y_low, y_high)) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            if line.marks:
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
    return _framed(parts, [line.name for line in lines])


def bar_chart(groups: Sequence[str], series: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> str:
    """One bar per group and series, from zero."""
    highest = max((value for values in series.values() for value in values), default=0.0) or 1.0
    bounds = (0.0, 1.0, 0.0, highest)
    parts = [_grid(bounds, x_title, y_title, numbers=False)]
    room = (WIDTH - _LEFT - _RIGHT) / max(len(groups), 1)
    width = 0.8 * room / max(len(series), 1)
    for index, group in enumerate(groups):
        left = _LEFT + index * room + 0.1 * room
        for number, values in enumerate(series.values()):
            top = _height(values[index], 0.0, highest)
            x, tall = left + number * width, HEIGHT - _BOTTOM - top
            colour = COLOURS[number % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall:.1f}" fill="{colour}">'
                f"<title>{values[index]:.4f}</title></rect>"
            )
        middle = left + 0.4 * room
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 14}" class="middle">{escape(group)}</text>')
    return _framed(parts, list(series))


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return start + min(max(share, 0.0), 1.0) * (end - start)


def _height(value: float, low: float, high: float) -> float:
    return _place(value, low, high, HEIGHT - _BOTTOM, _TOP)


def _grid(bounds: Bounds, x_title: str, y_title: str, *, numbers: bool = True) -> str:
    x_low, x_high, y_low, y_high = bounds
    parts = []
    for step in range(5):
        share = step / 4
        y = _height(share, 0.0, 1.0)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{y_low + share * (y_high - y_low):.3g}</text>')
        if numbers:
            x = _place(share, 0.0, 1.0, _LEFT, WIDTH - _RIGHT)
            text = f"{x_low + share * (x_high - x_low):.3g}"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}" class="middle">{text}</text>')
    parts.append(f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" class="middle">{escape(x_title)}</text>')
    turned = f'transform="rotate(-90 12 {HEIGHT / 2})"'
    parts.append(f'<text x="12" y="{HEIGHT / 2}" {turned} class="middle">{escape(y_title)}</text>')
    return "".join(parts)


def _framed(parts: Sequence[str], names: Sequence[str]) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    legend = "".join(
        f'<span><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<figure>{drawing}<figcaption class="legend">{legend}</figcaption></figure>'
