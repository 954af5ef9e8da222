"""Curves over load as one self-contained HTML file: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from shoplm.charts import STYLE, Bounds, Line, line_chart


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis; None in a line is a gap. Both axes begin at 0."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


def page(title: str, note: str, charts: Sequence[Chart]) -> str:
    """An HTML document with the charts one below the other."""
    body = "\n".join(f"<h2>{escape(each.title)}</h2>\n{line_chart(*_shape(each))}" for each in charts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>body {{ font: 15px system-ui, sans-serif; max-width: 600px; margin: 2em auto; color: #222 }}\n{STYLE}"
        f"</style><h1>{escape(title)}</h1><p>{escape(note)}</p>\n{body}\n</html>\n"
    )


def _shape(chart: Chart) -> tuple[list[Line], str, str, Bounds]:
    values = [value for line in chart.lines.values() for value in line if value is not None]
    lines = [
        Line(name, [None if y is None else (x, y) for x, y in zip(chart.x, line, strict=True)], marks=True)
        for name, line in chart.lines.items()
    ]
    bounds = (0.0, _nice(max(chart.x, default=1.0)), 0.0, _nice(max(values, default=1.0)))
    return lines, chart.x_label, chart.y_label, bounds


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))
