"""Answers for people: tables and short notes on a rich console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from shoplm.client.types import (
    ChatSummary,
    Degradation,
    Influence,
    ModelInfo,
    ModelVersion,
    Prediction,
    Predictions,
    Ranking,
    Reason,
    Recommendations,
    ResponseWarning,
    Target,
    TargetKind,
    Usage,
)

_PHRASES = {
    TargetKind.PURCHASE: "buys",
    TargetKind.PURCHASE_COUNT: "number of baskets",
    TargetKind.SPEND: "spends",
    TargetKind.CHURN: "stops buying",
    TargetKind.COUPON_REDEMPTION: "redeems a coupon",
}


def recommendations(console: Console, answer: Recommendations | Ranking) -> None:
    """A table of the items, and below it their reasons where there are some."""
    table = Table("#", "item", "title", "category", "price", "score", box=None)
    for name in ("#", "price", "score"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for rank, item in enumerate(answer.items, start=1):
        price = "" if item.price is None else f"{item.price:.2f}"
        names = (escape(item.item_id), escape(item.title), escape(item.category))
        table.add_row(str(rank), *names, price, f"{item.score:.2f}")
    console.print(table)
    for rank, item in enumerate(answer.items, start=1):
        _why(console, f"{rank}  {escape(item.title)}", item.reasons, item.influences)
    _degradations(console, answer.degradations)
    _notes(console, answer.model, answer.usage, answer.warnings)


def predictions(console: Console, answer: Predictions) -> None:
    """A table of the predictions beside what all customers do, and below it what moved them where that was asked."""
    table = Table("the customer …", "prediction", "90 % interval", "all customers", box=None)
    for column in table.columns[1:4]:
        column.justify = "right"
    for prediction in answer.predictions:
        table.add_row(_phrase(prediction.target), *_values(prediction))
    console.print(table)
    for prediction in answer.predictions:
        _why(console, _phrase(prediction.target), (), prediction.influences)
    _degradations(console, answer.degradations)
    _notes(console, answer.model, answer.usage, answer.warnings)


def chat_summary(console: Console, summary: ChatSummary) -> None:
    """What follows a chat answer."""
    if summary.citations:
        sources = dict.fromkeys(f"{citation.source} ({citation.title})" for citation in summary.citations)
        console.print(f"[dim]from: {escape(', '.join(sources))}[/dim]")
    console.print(f"[dim]{summary.usage.completion_tokens} tokens, ended by {summary.finish_reason}[/dim]")
    _degradations(console, summary.degradations)
    _notes(console, summary.model, summary.usage, summary.warnings)


def _attribute(answer: ModelInfo, name: str) -> str:
    values = answer.attribute_values.get(name)
    return f"{name} ({', '.join(values)})" if values else name


def model_info(console: Console, answer: ModelInfo) -> None:
    """What a server serves."""
    table = Table(show_header=False, box=None)
    bundle = f"{answer.model.bundle} {answer.model.version}" if answer.model.bundle else "none: chat only"
    limits = answer.limits
    rows = {
        "base model": answer.model.base_model,
        "bundle": bundle,
        "items": f"{answer.item_count:,} in {len(answer.categories)} categories",
        "predicts": "; ".join(_phrase(target) for target in answer.targets) or "nothing",
        "attributes": "; ".join(_attribute(answer, name) for name in answer.attributes) or "none",
        "demo customers": ", ".join(answer.demo_customer_ids) or "none",
        "limits": (
            f"{limits.max_context_tokens:,} tokens of context, {limits.max_history_tokens:,} of history, "
            f"{limits.max_events:,} events, {limits.max_count} items, {limits.max_completion_tokens:,} tokens of chat"
        ),
        "server": answer.server_version,
        "notice": answer.notice,
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)


def _why(console: Console, what: str, reasons: Sequence[Reason], influences: Sequence[Influence]) -> None:
    """Lines below the table: beside it they would be a column of a few letters in a terminal of 80."""
    if not (reasons or influences):
        return
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(justify="right", width=9)
    lines.add_column()
    for reason in reasons:
        lines.add_row(f"{reason.contribution:+.2f}", escape(reason.text))
    for influence in influences:
        lines.add_row(f"{influence.effect:+.2f}", escape(influence.text), style="dim")
    console.print(f" [bold]{what}[/bold]", lines)


def _phrase(target: Target) -> str:
    words = _PHRASES.get(target.kind, str(target.kind))
    if target.campaign_type:
        words += f" ({target.campaign_type})"
    if target.horizon_days:
        words += f" within {target.horizon_days} days"
    return escape(words)


def _values(prediction: Prediction) -> tuple[str, str, str]:
    if not prediction.applicable:
        return "does not apply", "", ""
    if prediction.probability is not None:
        return f"{prediction.probability:.1%}", "", f"{prediction.population_mean:.1%}"
    interval = "" if prediction.interval is None else f"{prediction.interval[0]:.2f} to {prediction.interval[1]:.2f}"
    return f"{prediction.amount or 0.0:.2f}", interval, f"{prediction.population_mean:.2f}"


def _degradations(console: Console, taken: Sequence[Degradation]) -> None:
    if taken:
        names = ", ".join(degradation.replace("_", " ") for degradation in taken)
        console.print(f"[yellow]less than asked for, to answer in time: {names}[/yellow]")


def _notes(console: Console, model: ModelVersion, usage: Usage, warnings: Sequence[ResponseWarning]) -> None:
    for warning in warnings:
        console.print(f"[yellow]{escape(warning.code)} ({warning.count}): {escape(warning.message)}[/yellow]")
    served = " ".join(part for part in (model.bundle, model.version, "on", model.base_model) if part)
    console.print(
        f"[dim]{escape(served)}; {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached[/dim]"
    )
