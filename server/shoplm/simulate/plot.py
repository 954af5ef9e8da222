"""Curves over load as one self-contained HTML file with SVG: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 44
_COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#8c510a")


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis; None in a line is a gap."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


def page(title: str, note: str, charts: Sequence[Chart]) -> str:
    """An HTML document with the charts one below the other."""
    body = "\n".join(svg(chart) for chart in charts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:15px system-ui,sans-serif;max-width:600px;margin:2em auto;color:#222}"
        "svg{display:block;margin:1.5em 0}text{font:12px system-ui,sans-serif;fill:#333}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>\n{body}\n</html>\n"
    )


def svg(chart: Chart) -> str:
    """One chart. Both axes begin at 0."""
    values = [value for line in chart.lines.values() for value in line if value is not None]
    top, right = _nice(max(values, default=1.0)), _nice(max(chart.x, default=1.0))

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(chart.title)}</text>']
    for step in range(5):
        x, y = at(right * step / 4, top * step / 4)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{top * step / 4:.3g}</text>')
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{right * step / 4:.3g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(chart.x_label)}</text>')
    turned = f'transform="rotate(-90)" x="{-_HEIGHT / 2}" y="14"'
    parts.append(f'<text {turned} text-anchor="middle">{html.escape(chart.y_label)}</text>')
    for index, (name, line) in enumerate(chart.lines.items()):
        parts += _line(name, [None if y is None else at(x, y) for x, y in zip(chart.x, line, strict=True)], index)
    inner = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">{inner}</svg>'


def _line(name: str, points: Sequence[tuple[float, float] | None], index: int) -> list[str]:
    colour = _COLOURS[index % len(_COLOURS)]
    path, drawn = [], False
    for point in points:
        if point is not None:
            path.append(f"{'L' if drawn else 'M'}{point[0]} {point[1]}")
        drawn = point is not None
    dots = [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in (p for p in points if p is not None)]
    across = _LEFT + 10 + 120 * index
    return [
        f'<path d="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *dots,
        f'<rect x="{across}" y="23" width="10" height="3" fill="{colour}"/>',
        f'<text x="{across + 14}" y="29">{html.escape(name)}</text>',
    ]


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))
