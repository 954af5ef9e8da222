"""Whom to score, as of when: files become questions, and the events behind them histories."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from shoplm.catalog.items import Catalog
from shoplm.history import EventKind, History
from shoplm.raw_events import RawEvents, resolve_items
from shoplm.training.log import read_table
from shoplm.training.log_columns import cleaned_events, text_column, time_column
from shoplm.training.problems import LogError, Problem


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the answer: what will this customer do, seen from `as_of`?"""

    number: int  # of the row in the file that asks
    customer_id: str
    as_of: float  # Unix seconds
    attributes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Questions:
    """All of them, those of one customer next to each other, so that they share the history's pages."""

    asked: tuple[Question, ...]
    problems: tuple[Problem, ...]
    _events: RawEvents
    _rows: dict[str, tuple[int, int]]  # customer -> where its events are
    _counted: EventKind

    def __len__(self) -> int:
        return len(self.asked)

    def history(self, question: Question) -> History:
        """The events up to `as_of`, as a call that sent them would be read."""
        start, end = self._rows.get(question.customer_id, (0, 0))
        rows = np.arange(start, end)
        known = self._events.select(rows[self._events.time[start:end] <= question.as_of])
        return known.history(question.as_of, dict(question.attributes), self._counted)


def read_questions(
    customers: Path,
    events: Path | None,
    catalog: Catalog,
    attributes: tuple[str, ...],
    *,
    counted: EventKind,
    moment: Callable[[str], float],
    timezone: str,
    now: float,
) -> Questions:
    """`customers` has one row per question: customer_id, perhaps as_of, and profile `attributes`. Without `events` it
    has one row per event instead, and each customer (and as_of) in it is asked about once. `moment` gives that of rows
    that name none, from the fingerprint of all else that is asked. Raises LogError with everything that is wrong."""
    problems: list[Problem] = []
    asked = read_table(customers, "customers", ("customer_id",), problems)
    log = read_table(events, "events", ("customer_id", "item_id", "time"), problems) if events is not None else asked
    if events is None and asked is not None:
        for column in ("item_id", "time"):
            if column not in asked.columns:
                found = "the column is missing, and no --events were given"
                problems.append(Problem("customers", column, len(asked), found, "give --events", fatal=True))
    if any(problem.fatal for problem in problems):
        raise LogError(problems)
    assert asked is not None and log is not None
    names = [name for name in attributes if name in asked.columns]
    rows = _asked(asked, names, timezone, once=events is None, problems=problems)
    clean = cleaned_events(log, timezone, now, problems).sort("customer_id", maintain_order=True)
    known, ranges = _known_events(clean, catalog, problems)
    digest = hashlib.sha256(repr(rows.rows()).encode())
    for column in clean.columns:
        digest.update(clean[column].hash(seed=0).to_numpy().tobytes())
    questions = _questions(rows, names, moment(digest.hexdigest()))
    return Questions(questions, tuple(problems), known, ranges, counted)


def _asked(
    frame: pl.DataFrame, names: Sequence[str], timezone: str, *, once: bool, problems: list[Problem]
) -> pl.DataFrame:
    """number, customer_id, as_of (null where the row names none), attributes; usable rows alone."""
    moment = time_column(frame, "as_of", timezone) if "as_of" in frame.columns else pl.lit(None, pl.Float64)
    given = pl.col("as_of").is_not_null() if "as_of" in frame.columns else pl.lit(False)
    table = frame.select(
        text_column("customer_id"), moment.alias("as_of"), given.alias("given"), *(text_column(name) for name in names)
    ).with_row_index("number")
    if bad := len(table.filter(pl.col("customer_id").is_null())):
        problems.append(Problem("customers", "customer_id", bad, "empty", "dropped"))
    if bad := len(table.filter(pl.col("given") & pl.col("as_of").is_null())):
        problems.append(Problem("customers", "as_of", bad, "not a time", "dropped"))
    table = table.filter(pl.col("customer_id").is_not_null() & ~(pl.col("given") & pl.col("as_of").is_null()))
    if once:
        table = table.unique(["customer_id", "as_of"], keep="first", maintain_order=True)
    return table.drop("given")


def _questions(rows: pl.DataFrame, names: Sequence[str], as_of: float) -> tuple[Question, ...]:
    table = rows.with_columns(pl.col("as_of").fill_null(as_of)).sort("customer_id", "as_of", "number")
    return tuple(
        Question(
            number=row["number"],
            customer_id=row["customer_id"],
            as_of=row["as_of"],
            attributes=tuple((name, row[name]) for name in names if row[name] is not None),
        )
        for row in table.iter_rows(named=True)
    )


def _known_events(
    clean: pl.DataFrame, catalog: Catalog, problems: list[Problem]
) -> tuple[RawEvents, dict[str, tuple[int, int]]]:
    item, has_item, known = resolve_items(clean["item_id"].to_list(), catalog)
    if len(clean) and not known.any():
        found, done = "none is an item of the bundle", "give the events of the shop that the bundle was trained on"
        raise LogError([*problems, Problem("events", "item_id", len(clean), found, done, fatal=True)])
    if not known.all():
        found = "not an item of the bundle"
        problems.append(Problem("events", "item_id", int((~known).sum()), found, "dropped"))
    kept = np.flatnonzero(known)
    events = RawEvents(
        item=item,
        has_item=has_item,
        kind=clean["kind"].to_numpy(),
        time=clean["time"].to_numpy(),
        quantity=clean["quantity"].to_numpy(),
        price=clean["price"].to_numpy(),
        basket=clean["basket"].to_list(),
    ).select(kept)
    who = clean["customer_id"].gather(kept).rle().struct.unnest()
    ends = np.cumsum(who["len"].to_numpy()).tolist()
    starts = [0, *ends][: len(ends)]
    return events, dict(zip(who["value"].to_list(), zip(starts, ends, strict=True), strict=True))
