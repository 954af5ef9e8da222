"""What is wrong with a shop's files."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from shoplm.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the table of what is wrong with the files."""

    table: str  # events | items | customers | campaigns
    column: str
    rows: int
    found: str
    done: str  # what was done about it; for fatal ones, what to do
    fatal: bool = False


class LogError(ConfigurationError):
    """The log cannot be trained on. `problems` says why, one row each."""

    reason = "TRAINING_LOG"

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{p.table}.{p.column}: {p.found}" for p in problems if p.fatal))


class Notes:
    """Collects the problems of one table."""

    def __init__(self, table: str, problems: list[Problem]) -> None:
        self._table = table
        self._problems = problems

    def add(self, column: str, rows: int, found: str, done: str) -> None:
        """Nothing where no row is touched."""
        if rows:
            self._problems.append(Problem(self._table, column, rows, found, done))

    def drop(self, frame: pl.DataFrame, column: str, bad: pl.Expr, found: str) -> pl.DataFrame:
        """The rows that are not `bad`."""
        kept = frame.filter(~bad.fill_null(False))
        self.add(column, len(frame) - len(kept), found, "dropped")
        return kept
