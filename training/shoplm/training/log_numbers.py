"""Numbers as spreadsheets of some countries write them: decimal commas, and marks between thousands."""

from __future__ import annotations

import polars as pl
from shoplm.training.problems import Problem

_SIGN = r"^[-+]?"
_DECIMAL_COMMA = _SIGN + r"(\d+|\d{1,3}(\.\d{3})+)?,\d+$"
_DECIMAL_POINT = _SIGN + r"(\d+|\d{1,3}(,\d{3})+)?\.\d+$"
# One mark before three digits may be either: which, the rest of the column tells.
_ONE_COMMA, _ONE_POINT = _SIGN + r"[1-9]\d{0,2},\d{3}$", _SIGN + r"[1-9]\d{0,2}\.\d{3}$"
_MORE_COMMAS, _MORE_POINTS = _SIGN + r"[1-9]\d{0,2}(,\d{3}){2,}$", _SIGN + r"[1-9]\d{0,2}(\.\d{3}){2,}$"


def with_points(frame: pl.DataFrame, name: str, table: str, problems: list[Problem]) -> pl.Expr:
    """A column of text whose numbers have a decimal point and no other mark. In each cell the last mark is the decimal
    one; one that stands before three digits alone is so, too, unless the column's other cells say otherwise."""
    text = pl.col(name).str.strip_chars()
    commas = (text.str.contains(_DECIMAL_COMMA) & ~text.str.contains(_ONE_COMMA)) | text.str.contains(_MORE_POINTS)
    points = (text.str.contains(_DECIMAL_POINT) & ~text.str.contains(_ONE_POINT)) | text.str.contains(_MORE_COMMAS)
    with_comma, with_point = frame.filter(commas)[name], frame.filter(points)[name]
    if len(with_comma) and len(with_point):
        found = f"decimal commas and decimal points, such as {with_comma[0]!r} and {with_point[0]!r}"
        rows = min(len(with_comma), len(with_point))
        problems.append(Problem(table, name, rows, found, "the last mark of each number is its decimal mark"))
    if len(with_comma):
        commas |= text.str.contains(_ONE_POINT)
    if len(with_point) and not len(with_comma):
        points |= text.str.contains(_ONE_COMMA)
    else:
        commas |= text.str.contains(_ONE_COMMA)
    english = text.str.replace_all(",", "", literal=True)
    other = text.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
    return pl.when(points).then(english).when(commas).then(other).otherwise(text).alias(name)
