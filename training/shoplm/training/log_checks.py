"""What a shop's events say as a whole: kinds that tell little, and an end long after most of them."""

from __future__ import annotations

import numpy as np
import polars as pl
from shoplm.history import SECONDS_PER_DAY, EventKind, utc_day
from shoplm.training.problems import LogError, Problem
from shoplm.training.timeline import make_timeline

_FEW_PURCHASES = 0.01  # of the carts and views
_FEW_AT_THE_END = 0.1  # of the events that so many days have
_STRAY = 0.01  # of all events: among so many, the gap before the end is looked for


def check_kinds(clean: pl.DataFrame, problems: list[Problem]) -> None:
    """What customers buy is recommended, what they put into carts or look at only where nobody buys. Raises LogError
    where there is none of it."""
    counts = dict(clean["kind"].value_counts().iter_rows())
    bought = counts.get(int(EventKind.PURCHASE), 0)
    looked = counts.get(int(EventKind.CART), 0) + counts.get(int(EventKind.VIEW), 0)
    if not bought + looked:
        found, done = "nothing but returns", "give purchases, carts or views"
        raise LogError([*problems, Problem("events", "type", len(clean), found, done, fatal=True)])
    if 0 < bought < _FEW_PURCHASES * looked:
        found = f"so few purchases beside {looked:,} carts and views"
        problems.append(
            Problem("events", "type", bought, found, "these few are recommended; without them, carts or views are")
        )
    if not bought:
        found = "no purchases"
        done = "carts (or views) are recommended instead"
        problems.append(Problem("events", "type", len(clean), found, done))


def check_end(clean: pl.DataFrame, problems: list[Problem]) -> None:
    """The last event says when the shop is tested: one with a wrong date puts that where nobody buys."""
    times = np.sort(clean["time"].to_numpy())
    horizons = make_timeline(float(times[0]), float(times[-1])).horizons
    if not horizons:
        return
    window = horizons[-1] * SECONDS_PER_DAY
    last = int((times > times[-1] - window).sum())
    usual = len(times) * window / (times[-1] - times[0])
    if last >= _FEW_AT_THE_END * usual:
        return
    tail = times[-max(last, int(_STRAY * len(times))) - 1 :]
    before = tail[int(np.argmax(np.diff(tail)))]
    found = (
        f"so few in the last {horizons[-1]} days, which end on {utc_day(tail[-1])}; {usual:,.0f} would be usual, and "
        f"the last event before a gap is of {utc_day(before)}"
    )
    done = "the test is on these days: leave out what lies behind the gap, if it does not belong there"
    problems.append(Problem("events", "time", last, found, done))
