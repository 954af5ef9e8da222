"""Small logs as files, and what reading them found."""

from __future__ import annotations

from pathlib import Path

from shoplm.training.log import ShopLog, read_log
from tiny_log import NOW

HEADER = "customer_id,item_id,time"


def read(folder: Path, events: str, items: str | None = None, **options: object) -> ShopLog:
    (folder / "events.csv").write_text(events, "utf-8")
    if items is not None:
        (folder / "items.csv").write_text(items, "utf-8")
        options["items"] = folder / "items.csv"
    return read_log(folder / "events.csv", now=NOW, **options)  # type: ignore[arg-type]


def found(log: ShopLog) -> dict[tuple[str, str], tuple[int, str]]:
    return {(problem.column, problem.found): (problem.rows, problem.done) for problem in log.problems}
