"""What the terminal shows of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from rich.console import Console
from rich.table import Table
from shoplm.bundle_cli import table
from shoplm.training.card_tables import estimate, ranking_rows
from shoplm.training.format_gate import Loss
from shoplm.training.report import ExplanationResult, ProbabilityRow, RankingResult, Report, shown


def print_report(console: Console, report: Report) -> None:
    """The numbers of the card."""
    for result in report.rankings:
        _print_ranking(console, result)
    if report.probabilities:
        header = ("target", "observed", "by", "AUC", "Brier", "ECE")
        console.print(table("probabilities", header, chain.from_iterable(map(_probability, report.probabilities))))
        calibration = [
            (row.target, estimate(row.slope, ".3f"), estimate(row.intercept, "+.3f")) for row in report.probabilities
        ]
        console.print(table("calibration", ("target", "slope", "intercept"), calibration))
    if report.amounts:
        rows = [
            (row.target, error.name, f"{error.mae:.2f}", f"{error.rmse:.2f}", covers, observed)
            for row in report.amounts
            for error in row.errors
            for covers, observed in [(f"{row.coverage:.1%}", f"{row.observed:.2f}") if error is row.ours else ("", "")]
        ]
        console.print(table("amounts", ("target", "by", "MAE", "RMSE", "90 % covers", "observed"), rows))
    if report.explanations is not None:
        console.print(_explanation_table(report.explanations))


def print_losses(console: Console, formats: str, losses: Sequence[Loss]) -> None:
    """What formats of fewer bits cost, and whether they may."""
    if losses:
        rows = [
            (loss.metric, f"{loss.reference:.4f}", f"{loss.found:.4f}", f"{loss.loss:+.4f}", f"{loss.limit:g}",
             "holds" if loss.holds else "BROKEN")
            for loss in losses
        ]  # fmt: skip
        header = ("metric", "as it is", "rounded", "loss", "limit", "")
        console.print(table(f"what they cost: {formats}", header, rows))


def _print_ranking(console: Console, result: RankingResult) -> None:
    header = ("ranking", "recall@10", "NDCG@10", "repeat", "explore")
    console.print(table(f"{result.split}, {result.customers:,} customers", header, ranking_rows(result)))
    for rival, gain in (("counting", result.ndcg_over_count), ("TIFU-KNN", result.ndcg_over_tifu)):
        low, high = shown(gain.low, "+.4f"), shown(gain.high, "+.4f")
        console.print(f"NDCG over {rival}: {shown(gain.mean, '+.4f')}, 95 % interval {low} to {high}")
    if result.exploration is not None:
        console.print(f"new items: {shown(result.exploration.ratio, '.2f')} times the recall of popularity")


def _probability(row: ProbabilityRow) -> Iterator[tuple[str, ...]]:
    yield (row.target, f"{row.observed:.4f}", "ShopLM", shown(row.auc, ".4f"), f"{row.brier:.4f}", f"{row.ece:.4f}")
    yield ("", "", "boosting", shown(row.boosted_auc, ".4f"), f"{row.boosted_brier:.4f}", f"{row.boosted_ece:.4f}")


def _explanation_table(result: ExplanationResult) -> Table:
    """How well named effects follow leave-one-out."""
    rows = [
        ("score", shown(result.score, ".2f"), shown(result.deletion.ratio, ".1f")),
        ("model's term", shown(result.model, ".2f"), shown(result.model_deletion.ratio, ".1f")),
        *((target, shown(value, ".2f"), "") for target, value in result.predictions.items()),
        ("term of a model of shuffled weights", shown(result.randomised, ".2f"), ""),
    ]
    title = f"explanations of {result.customers} customers"
    return table(title, ("effects on", "Spearman with leave-one-out", "top three against matched"), rows)
