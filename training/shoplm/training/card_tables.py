"""The card's tables of results, and where the model does not win."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoplm.bundle import HeadSpec
from shoplm.model.origin import Origin
from shoplm.training.report import (
    OURS,
    POPULARITY,
    AmountRow,
    Breakdown,
    Difference,
    Estimate,
    ProbabilityRow,
    RankingResult,
    Report,
    shown,
)

CHAT_INCREASE = 0.05  # of perplexity, at most
EXPLORE_FACTOR = 1.5  # of popularity's recall of new items: what a language model should add at the least
COVERAGE = (0.87, 0.93)  # of the 90 % intervals

_INTERVAL = "95 % bootstrap interval"


def ranking_rows(result: RankingResult) -> list[tuple[str, ...]]:
    """Name, recall, NDCG, repeat and explore recall of each ranking."""
    return [
        (
            row.name,
            f"{row.recall:.4f}",
            f"{row.ndcg:.4f}",
            shown(row.repeat_recall, ".4f"),
            shown(row.explore_recall, ".4f"),
        )
        for row in result.rows
    ]


def ranking(result: RankingResult) -> str:
    """One split."""
    header = ("ranking", "recall@10", "NDCG@10", "repeat recall@10", "explore recall@10")
    parts = [
        f"### {result.split[0].upper()}{result.split[1:]} ({result.customers:,} customers)",
        table(header, ranking_rows(result)),
        _against("the tuned count baseline", result.recall_over_count, result.ndcg_over_count, "counting"),
        _against("TIFU-KNN", result.recall_over_tifu, result.ndcg_over_tifu, "TIFU-KNN"),
        _exploration(result),
        "Recall@10 by how many visits were known:",
        _breakdown("visits", "customers", result.by_visits),
        "Share of the ten recommendations, and of the next baskets, by how often items are bought (the most often "
        "bought first):",
        _breakdown("items", "number", result.by_popularity),
    ]
    return "\n\n".join(part for part in parts if part)


def _against(what: str, recall: Difference, ndcg: Difference, word: str) -> str:
    return (
        f"ShopLM minus {what}, {_INTERVAL}: recall {_difference(recall)}, NDCG {_difference(ndcg)}: "
        f"recall {recall.verdict} {word}, NDCG {ndcg.verdict} {word}."
    )


def _difference(found: Difference) -> str:
    return f"{shown(found.mean, '+.4f')} ({shown(found.low, '+.4f')} to {shown(found.high, '+.4f')})"


def _exploration(result: RankingResult) -> str:
    found = result.exploration
    if found is None:
        return "Nobody bought anything new: explore recall was not measured."
    return (
        f"With everything that the customer has bought before left out of both lists, explore recall@10 is "
        f"{found.recall[OURS]:.4f} against popularity's {found.recall[POPULARITY]:.4f} "
        f"({shown(found.ratio, '.2f')} times; difference {_difference(found.over_popularity)}; "
        f"{found.customers:,} customers)."
    )


def _breakdown(what: str, count: str, groups: Sequence[Breakdown]) -> str:
    if not groups:
        return ""
    names = list(groups[0].values)
    rows = [(each.group, f"{each.count:,}", *(f"{each.values[name]:.4f}" for name in names)) for each in groups]
    return table((what, count, *names), rows)


def predictions(report: Report, targets: Sequence[HeadSpec]) -> list[str]:
    """Probabilities, amounts, and what is served but could not be tested."""
    if not report.probabilities and not report.amounts:
        return ["No targets: the log is too short, or has too few purchases, to fit and calibrate any."]
    parts = [
        "Beside gradient boosting (scikit-learn) on the same dense features and cut-offs. ECE over ten bins of as many "
        "customers each; lift is that of the tenth with the highest probabilities."
    ]
    if report.probabilities:
        header = ("target", "customers", "observed", "AUC", "Brier", "ECE", "lift")
        boosting = ("boosting AUC", "Brier", "ECE", "lift")
        parts.append(table((*header, *boosting), map(_probability, report.probabilities)))
        parts.append(f"ShopLM minus boosting, {_INTERVAL}; a Brier score is better the lower it is.")
        parts.append(table(("target", "AUC", "Brier"), map(_over_boosting, report.probabilities)))
        parts.append(
            "Calibration: the slope of outcomes on logit(p) is 1 and the intercept (slope held at 1) is 0 where "
            "probabilities mean what they say; 95 % intervals."
        )
        parts.append(table(("target", "slope", "intercept"), map(_calibration, report.probabilities)))
    if report.amounts:
        sizes = ("target", "customers", "observed mean", "predicted mean", "90 % interval covers")
        parts.append(table(sizes, map(_amount, report.amounts)))
        errors = [
            (row.target, error.name, f"{error.mae:.2f}", f"{error.rmse:.2f}")
            for row in report.amounts
            for error in row.errors
        ]
        parts.append(table(("target", "by", "MAE", "RMSE"), errors, words=2))
    tested = {row.target for row in report.probabilities} | {row.target for row in report.amounts}
    untested = [spec.label for spec in targets if spec.label not in tested]
    if untested:
        parts.append(f"Served, but not tested, for want of outcomes after the cut: {', '.join(untested)}.")
    return parts


def _probability(row: ProbabilityRow) -> tuple[str, ...]:
    return (
        row.target,
        f"{row.customers:,}",
        f"{row.observed:.3f}",
        shown(row.auc, ".3f"),
        f"{row.brier:.4f}",
        f"{row.ece:.3f}",
        shown(row.lift, ".2f"),
        shown(row.boosted_auc, ".3f"),
        f"{row.boosted_brier:.4f}",
        f"{row.boosted_ece:.3f}",
        shown(row.boosted_lift, ".2f"),
    )


def _over_boosting(row: ProbabilityRow) -> tuple[str, ...]:
    return row.target, _difference(row.auc_over_boosting), _difference(row.brier_over_boosting)


def _calibration(row: ProbabilityRow) -> tuple[str, ...]:
    return row.target, estimate(row.slope, ".3f"), estimate(row.intercept, "+.3f")


def estimate(found: Estimate, style: str) -> str:
    """Value and interval."""
    return f"{shown(found.value, style)} ({shown(found.low, style)} to {shown(found.high, style)})"


def _amount(row: AmountRow) -> tuple[str, ...]:
    return (
        row.target,
        f"{row.customers:,}",
        f"{row.observed:.2f}",
        f"{row.predicted:.2f}",
        f"{row.coverage:.1%}",
    )


_FROZEN = (
    "- The base is frozen: it has never seen this shop, so most of what ranks items is counting.\n"
    "- Chat gets the customer's habits in words, not as item tokens: the frozen base cannot go on in words behind\n"
    "  those. So chat does not share the cached history of the other two services.\n"
    "- What no passage answers, a frozen base makes up, prices included: adapt it (`shoplm adapt`) before customers\n"
    "  chat."
)
_ADAPTED = (
    "- The base was adapted to the shop, yet most of what ranks items is still counting.\n"
    "- Chat repeats facts from passages; what it says beside them is that of a small model."
)


_SCRATCH = (
    "- The base has read nothing but this log: it cannot chat, and what it knows of items is who bought them.\n"
    "- Most of what ranks items is counting."
)
LIMITS = {Origin.TEXT: _FROZEN, Origin.ADAPTED: _ADAPTED, Origin.SCRATCH: _SCRATCH}


def chat(report: Report) -> str:
    """What the adapter left of ordinary talk; nothing without one, or where no prompt is left to ask."""
    kept = report.chat
    if kept is None or not kept.answers:
        return ""
    rows = [
        ("the base, which wrote the answers", f"{kept.base:.2f}", f"{kept.base_behind_history:.1f}"),
        ("adapted", f"{kept.adapted:.2f}", f"{kept.adapted_behind_history:.2f}"),
    ]
    return (
        f"## Chat\n\nPerplexity of {kept.answers} answers of the base ({kept.tokens:,} tokens) to prompts that the "
        "adapter was not trained on, alone and behind a customer's history.\n\n"
        + table(("model", "alone", "behind a history"), rows)
        + f"\n\nAlone, the adapter changes it by {kept.increase:+.1%}."
    )


def limits(report: Report, origin: Origin) -> str:
    """What is known not to work, and each comparison that is not won."""
    lines = [
        "## Known limits",
        f"{LIMITS[origin]}\n"
        "- One year or less says nothing about the same season a year later.\n"
        "- New items have no token until the next training; they cannot be recommended.",
    ]
    lost = [*_lost_rankings(report), *_lost_probabilities(report), *_lost_amounts(report), *_lost_chat(report)]
    if lost:
        lines.append("Where this model does not clearly win:\n\n" + "\n".join(f"- {line}" for line in lost))
    return "\n\n".join(lines)


def _lost_chat(report: Report) -> Iterable[str]:
    if report.chat is not None and report.chat.increase > CHAT_INCREASE:
        yield f"chat: perplexity {report.chat.increase:+.1%} against the base, wanted at most {CHAT_INCREASE:+.0%}"


def _lost_rankings(report: Report) -> Iterable[str]:
    for result in report.rankings:
        for rival, recall, ndcg in (
            ("counting", result.recall_over_count, result.ndcg_over_count),
            ("TIFU-KNN", result.recall_over_tifu, result.ndcg_over_tifu),
        ):
            for measure, found in (("recall@10", recall), ("NDCG@10", ndcg)):
                if found.verdict != "above":
                    yield f"{result.split}: {shown(found.mean, '+.4f')} {measure} against {rival}, {found.verdict} it"
        ratio = result.exploration.ratio if result.exploration is not None else None
        if ratio is not None and ratio < EXPLORE_FACTOR:
            yield f"{result.split}: explore recall@10 is {ratio:.2f} times popularity's, wanted {EXPLORE_FACTOR:g}"


def _lost_probabilities(report: Report) -> Iterable[str]:
    for row in report.probabilities:
        if row.auc is not None and row.boosted_auc is not None and row.auc < row.boosted_auc:
            found = row.auc_over_boosting
            yield f"{row.target}: AUC {_difference(found)} against boosting, {found.verdict} it"
        if row.brier > row.boosted_brier:
            found = row.brier_over_boosting
            yield f"{row.target}: Brier {_difference(found)} against boosting, {found.verdict} it"
        if not row.slope.holds(1.0):
            yield f"{row.target}: calibration slope {estimate(row.slope, '.3f')} does not hold 1"
        if not row.intercept.holds(0.0):
            yield f"{row.target}: calibration intercept {estimate(row.intercept, '+.3f')} does not hold 0"


def _lost_amounts(report: Report) -> Iterable[str]:
    for row in report.amounts:
        for other in row.errors[1:]:
            for measure, ours, theirs in (
                ("MAE", row.ours.mae, other.mae),
                ("RMSE", row.ours.rmse, other.rmse),
            ):
                if ours > theirs:
                    yield f"{row.target}: {measure} {ours - theirs:.3f} above that of {other.name}"
        if not COVERAGE[0] <= row.coverage <= COVERAGE[1]:
            yield f"{row.target}: the 90 % intervals cover {row.coverage:.1%}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are text and the others numbers."""
    rule = ["---" if index < words else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, *rows)).replace("\n", f"\n|{'|'.join(rule)}|\n", 1)
