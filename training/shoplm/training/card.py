"""The model card: data, splits, metrics beside baselines, privacy, limits. All numbers come from the report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from shoplm.bundle import HeadSpec, PromptSchema
from shoplm.model.base import Base
from shoplm.training.report import AmountRow, ProbabilityRow, RankingResult, Report, label
from shoplm.training.scoring import Weights
from shoplm.training.shop import Shop


def render_card(
    shop: Shop,
    base: Base,
    schema: PromptSchema,
    weights: Weights,
    report: Report,
    targets: Sequence[HeadSpec],
    hidden_scales: dict[str, float],
    *,
    title: str,
    notice: str,
    examples: int,
    remarks: Sequence[str],
) -> str:
    """card.md as text."""
    parts = [
        f"# {title}",
        notice,
        *(f"> {remark}" for remark in remarks),
        _data(shop, report),
        _splits(shop),
        _model(base, schema, weights, hidden_scales, examples),
        "## Recommendation",
        "Next basket, top ten, ranked against all items with a token of their own; means over customers. Recall is the "
        "share of the basket that was found; repeat and explore recall are those of items that the customer had or had "
        "not bought before. Popularity is that of the time before the test for every row.",
        *(_ranking(result) for result in report.rankings),
        *(["Too few events after the cut to measure recommendations."] if not report.rankings else []),
        "## Prediction",
        *_predictions(report, targets),
        _privacy(),
        _limits(report),
        "## Reproduce",
        "`shoplm evaluate --bundle <this folder>` with the files that it was trained on computes every number above "
        f"again (seed {report.seed}, {report.customers:,} customers).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(shop: Shop, report: Report) -> str:
    log, items = shop.log, shop.items
    lines = [
        "## Data",
        f"{len(log.events):,} events of {len(log.customer_ids):,} customers and {len(log.item_ids):,} known items, "
        f"{_day(shop.timeline.start)} to {_day(shop.timeline.end)}.",
        f"{len(items.row_item):,} items have a token of their own: those with at least {items.minimum_count} "
        f"{items.label_kind.name.lower()} events before the test, {items.covered_share:.1%} of "
        "these events. The others "
        f"stand for their product type ({len(items.types):,} types) and are not recommended.",
    ]
    if report.customers < report.customers_in_log:
        lines.append(
            f"Hidden states were computed for {report.customers:,} of the "
            f"{report.customers_in_log:,} customers, drawn at "
            "random: the model was fitted on these and measured on these. Item counts and "
            "popularity use everyone's events."
        )
    if log.problems:
        rows = [f"| {p.table} | {p.column} | {p.rows:,} | {p.found} | {p.done} |" for p in log.problems]
        lines.append("\n".join(["| file | column | rows | found | done |", "|---|---|---:|---|---|", *rows]))
    return "\n\n".join(lines)


def _splits(shop: Shop) -> str:
    timeline = shop.timeline
    cuts = ", ".join(_day(moment) for moment in timeline.train_at)
    return (
        "## Splits\n\n"
        f"Item rows and heads: labels before {_day(timeline.tuned_at)} (head cut-offs {cuts}). Score weights and "
        f"calibration: labels from {_day(timeline.tuned_at)} to {_day(timeline.test_at)}. Tests: labels from "
        f"{_day(timeline.test_at)} on. The *global time split* asks at {_day(timeline.test_at)} for "
        "the next basket; the "
        "*last basket* split asks at the moment of each customer's last visit, where that lies after "
        f"{_day(timeline.test_at)}. **The served bundle is the measured one**: it was not fitted "
        "again on the test period."
    )


def _model(base: Base, schema: PromptSchema, weights: Weights, hidden_scales: dict[str, float], examples: int) -> str:
    kept = [f"{name.replace('_', ' ')} {'yes' if scale else 'no'}" for name, scale in hidden_scales.items()]
    lines = [
        "## Model",
        f"Base {base.name}, frozen. Input rows: mean embedding of each item's words. Output rows: "
        f"fitted on {examples:,} "
        f"next baskets. History: the newest {schema.history_budget_tokens} tokens, dropped in blocks of "
        f"{schema.history_block_tokens}.",
        f"score = log p(item) + {weights.repeat:g} log(1 + own count, decay {weights.decay_days:g} d) "
        f"+ {weights.popularity:g} log popularity.",
    ]
    if kept:
        lines.append(
            "Heads are linear in the dense features of the whole history and the hidden state. "
            "Held-out customers decide "
            f"how strongly a head reads the hidden state; it does: {', '.join(kept)}."
        )
    return "\n\n".join(lines)


def _ranking(result: RankingResult) -> str:
    rows = [
        f"| {row.name} | {row.recall:.4f} | {row.ndcg:.4f} | {row.repeat_recall:.4f} | {row.explore_recall:.4f} |"
        for row in result.rows
    ]
    recall, ndcg = result.recall_over_count, result.ndcg_over_count
    verdict = "above" if ndcg.low > 0 else "below" if ndcg.high < 0 else "not distinguishable from"
    return "\n".join(
        [
            f"### {result.split[0].upper()}{result.split[1:]} ({result.customers:,} customers)",
            "",
            "| ranking | recall@10 | NDCG@10 | repeat recall@10 | explore recall@10 |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
            f"ShopLM minus the tuned count baseline, 95 % bootstrap interval: recall {recall.mean:+.4f} "
            f"({recall.low:+.4f} to {recall.high:+.4f}), NDCG {ndcg.mean:+.4f} ({ndcg.low:+.4f} to {ndcg.high:+.4f}): "
            f"{verdict} counting.",
        ]
    )


def _predictions(report: Report, targets: Sequence[HeadSpec]) -> list[str]:
    if not report.probabilities and not report.amounts:
        return ["No targets: the log is too short, or has too few purchases, to fit and calibrate any."]
    parts = [
        "Beside gradient boosting (scikit-learn) on the same dense features and cut-offs. ECE over ten bins of as many "
        "customers each."
    ]
    if report.probabilities:
        parts.append("\n".join([_PROBABILITY_HEADER, *map(_probability, report.probabilities)]))
    if report.amounts:
        parts.append("\n".join([_AMOUNT_HEADER, *map(_amount, report.amounts)]))
    tested = {row.target for row in report.probabilities} | {row.target for row in report.amounts}
    names = (label(spec.kind, spec.horizon_days, spec.campaign_type) for spec in targets)
    untested = [name for name in names if name not in tested]
    if untested:
        parts.append(f"Served, but not tested, for want of outcomes after the cut: {', '.join(untested)}.")
    return parts


_PROBABILITY_HEADER = (
    "| target | customers | observed | AUC | Brier | ECE | boosting AUC | Brier | ECE |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
_AMOUNT_HEADER = (
    "| target | customers | observed mean | predicted mean | MAE | 90 % interval covers | boosting "
    "MAE | constant MAE |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def _probability(row: ProbabilityRow) -> str:
    return (
        f"| {row.target} | {row.customers:,} | {row.observed:.3f} | {row.auc:.3f} | {row.brier:.4f} | {row.ece:.3f} "
        f"| {row.boosted_auc:.3f} | {row.boosted_brier:.4f} | {row.boosted_ece:.3f} |"
    )


def _amount(row: AmountRow) -> str:
    return (
        f"| {row.target} | {row.customers:,} | {row.observed:.2f} | {row.predicted:.2f} | {row.mae:.2f} "
        f"| {row.coverage:.1%} | {row.boosted_mae:.2f} | {row.constant_mae:.2f} |"
    )


def _privacy() -> str:
    return (
        "## Privacy\n\n"
        "Not trained with differential privacy. The weights hold item rows, one popularity number per item and linear "
        "heads, all fitted on customers' baskets without noise; no formal bound on what they reveal about one customer "
        "is claimed. The demo customers' events are in the bundle as they are: leave them out (`--demo-customers 0`) "
        "for a shop whose customers have not agreed to that."
    )


def _limits(report: Report) -> str:
    lost = [
        f"{result.split}: {result.ndcg_over_count.mean:+.4f} NDCG@10 against counting"
        for result in report.rankings
        if result.ndcg_over_count.low <= 0
    ]
    lost += [f"{row.target}: AUC below boosting" for row in report.probabilities if row.auc < row.boosted_auc]
    lost += [f"{row.target}: Brier above boosting" for row in report.probabilities if row.brier > row.boosted_brier]
    lost += [f"{row.target}: MAE above boosting" for row in report.amounts if row.mae > row.boosted_mae]
    lines = [
        "## Known limits",
        "- The base is frozen: it has never seen this shop, so most of what ranks items is counting.\n"
        "- Chat gets the customer's habits in words, not as item tokens: the frozen base cannot go on in words behind\n"
        "  those. So chat does not share the cached history of the other two services.\n"
        "- One year or less says nothing about the same season a year later.\n"
        "- New items have no token until the next training; they cannot be recommended.",
    ]
    if lost:
        lines.append("Where this model does not clearly win:\n\n" + "\n".join(f"- {line}" for line in lost))
    return "\n\n".join(lines)


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")
