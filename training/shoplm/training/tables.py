"""What the terminal shows of a log's problems and of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from shoplm.training.problems import Problem
from shoplm.training.report import Report


def print_report(console: Console, report: Report) -> None:
    """The numbers of the card."""
    for result in report.rankings:
        ranking = ("ranking", "recall@10", "NDCG@10", "repeat", "explore")
        rows = [
            (row.name, *(f"{value:.4f}" for value in (row.recall, row.ndcg, row.repeat_recall, row.explore_recall)))
            for row in result.rows
        ]
        console.print(table(f"{result.split}, {result.customers:,} customers", ranking, rows))
        gain = result.ndcg_over_count
        console.print(f"NDCG over counting: {gain.mean:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}")
    if report.probabilities:
        chances = ("target", "observed", "AUC", "Brier", "ECE", "boosting AUC", "Brier", "ECE")
        rows = [
            (
                row.target,
                *(
                    f"{value:.4f}"
                    for value in (
                        row.observed,
                        row.auc,
                        row.brier,
                        row.ece,
                        row.boosted_auc,
                        row.boosted_brier,
                        row.boosted_ece,
                    )
                ),
            )
            for row in report.probabilities
        ]
        console.print(table("probabilities", chances, rows))
    if report.amounts:
        amounts = ("target", "observed", "predicted", "MAE", "90 % covers", "boosting MAE", "constant MAE")
        rows = [
            (
                row.target,
                f"{row.observed:.2f}",
                f"{row.predicted:.2f}",
                f"{row.mae:.2f}",
                f"{row.coverage:.1%}",
                f"{row.boosted_mae:.2f}",
                f"{row.constant_mae:.2f}",
            )
            for row in report.amounts
        ]
        console.print(table("amounts", amounts, rows))


def print_problems(console: Console, problems: Sequence[Problem]) -> None:
    """What is wrong with the files, one row per finding."""
    if problems:
        rows = [(p.table, p.column, f"{p.rows:,}", p.found, p.done) for p in problems]
        console.print(table("the log's problems", ("file", "column", "rows", "found", "done"), rows))


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of text."""
    drawn = Table(*header, title=title, title_justify="left")
    for row in rows:
        drawn.add_row(*row)
    return drawn
