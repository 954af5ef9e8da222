"""The model card: data, splits, metrics beside baselines, privacy, limits. All numbers come from the report."""

from __future__ import annotations

from shoplm.bundle import PromptSchema
from shoplm.history import SECONDS_PER_DAY, utc_day, utc_moment
from shoplm.model.base import Base
from shoplm.model.origin import Origin
from shoplm.training.bundle_writer import Identity
from shoplm.training.card_tables import chat, limits, predictions, ranking
from shoplm.training.pipeline import Fitted
from shoplm.training.report import Report
from shoplm.training.shop import Shop


def render_card(
    shop: Shop,
    base: Base,
    schema: PromptSchema,
    fitted: Fitted,
    report: Report,
    identity: Identity,
    notes: str,
) -> str:
    """card.md as text."""
    predictor = fitted.model.predictor
    parts = [
        f"# {identity.title}",
        identity.notice,
        _data(shop, report),
        _splits(shop),
        _model(base, schema, fitted),
        "## Recommendation",
        "Next basket, top ten, ranked against all items with a token of their own; means over customers. Recall is the "
        "share of the basket that was found; repeat and explore recall are those of items that the customer had or had "
        "not bought before. Popularity is that of the time before the test for every row; counting and TIFU-KNN "
        "(arXiv:2006.00556) are tuned on the validation window.",
        *(ranking(result) for result in report.rankings),
        *(["Too few events after the cut to measure recommendations."] if not report.rankings else []),
        "## Prediction",
        *predictions(report, predictor.specs if predictor is not None else ()),
        chat(report),
        _privacy(),
        limits(report, _origin(base, schema)),
        f"## Notes\n\n{notes}" if notes else "",
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
        f"{utc_day(shop.timeline.start)} to {utc_day(shop.timeline.end)}.",
        f"{len(items.row_item):,} items have a token of their own: those with at least {items.minimum_count} "
        f"{items.label_kind.name.lower()} events before the test, {items.covered_share:.1%} of these events. The "
        f"others stand for their product type ({len(items.types):,} types) and are not recommended.",
    ]
    if report.customers < report.customers_in_log:
        lines.append(
            f"Hidden states were computed for {report.customers:,} of the {report.customers_in_log:,} customers, drawn "
            "at random: the model was fitted on these and measured on these. Item counts and popularity use everyone's "
            "events."
        )
    if log.problems:
        found = ((p.table, p.column, f"{p.rows:,}", p.found, p.done) for p in log.problems)
        rows = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in found]
        lines.append("\n".join(["| file | column | rows | found | done |", "|---|---|---:|---|---|", *rows]))
    return "\n\n".join(lines)


def _splits(shop: Shop) -> str:
    timeline = shop.timeline
    tuned_at, test_at = _cut(timeline.tuned_at), _cut(timeline.test_at)
    cuts = ", ".join(_cut(moment) for moment in (*timeline.train_at, timeline.tuned_at))
    heads = (
        f"Heads: all labels before {test_at} (cut-offs with hidden states {cuts}); chances and intervals are "
        "calibrated on customers, or campaigns, that were held out of the fit in turns. "
    )
    return (
        "## Splits\n\n"
        f"Item rows and nets: labels before {tuned_at}. Score weights: labels from {tuned_at} to {test_at}. "
        f"{heads if timeline.horizons else ''}"
        f"Tests: labels from {test_at} on. The *global time split* asks at {test_at} for the next basket; "
        "the *last basket* split asks at the moment of each customer's last visit, where that lies after "
        f"{test_at}. **The served bundle is the measured one**: it was not fitted again on the test period."
    )


def _cut(moment: float) -> str:
    """Cuts of a long log are at midnight, UTC."""
    return utc_moment(moment) if moment % SECONDS_PER_DAY else utc_day(moment)


def _model(base: Base, schema: PromptSchema, fitted: Fitted) -> str:
    weights = fitted.model.weights
    kept = [f"{name.replace('_', ' ')} {'yes' if scale else 'no'}" for name, scale in fitted.hidden_scales.items()]
    origin = _origin(base, schema)
    if origin is Origin.SCRATCH:
        config = base.config
        state = (
            f"a decoder of {config.num_layers} layers and width {config.hidden_size}, trained on this log alone; it "
            "lies in the bundle. Input rows: trained with it"
        )
    else:
        tuned = "adapted to the shop" + (" (LoRA, merged)" if base.origin is Origin.TEXT else "")
        state = f"{tuned if origin is Origin.ADAPTED else 'frozen'}. Input rows: mean embedding of each item's words"
    lines = [
        "## Model",
        f"Base {base.name}, {state}. Output rows: fitted on {fitted.ranking_examples:,} next baskets. History: the "
        f"newest {schema.history_budget_tokens} tokens, dropped in blocks of {schema.history_block_tokens}.",
        f"score = {weights.score().formula}.",
    ]
    if weights.loyalty:
        lines.append("Loyalty is the log-odds that a purchase of the item comes again.")
    if weights.goes_with:
        lines.append(
            "Neighbours are items of the same customers (ridge regression) and score what the customer has not bought "
            "yet."
        )
    if weights.rebuy:
        lines.append(
            "The log-odds that an own item is bought again are a small net's, fitted on next baskets: how often, how "
            "lately and since when the item and its product type were bought, how the customer shops, and what the "
            "shop's customers do with the item."
        )
    if weights.adopt:
        lines.append(
            "The log-odds that another item is bought for the first time are another small net's, fitted on the new "
            "items of next baskets: how strongly the own items draw the item (ridge regression on what the same "
            "customers buy, over the whole log and on the latest first purchases), how many own items are of its "
            "product type, and how the shop's customers take to the item."
        )
    if kept:
        lines.append(
            "Behaviour heads read the dense features of the whole history, through small nets where the log is long "
            "enough, and the hidden state; the coupon head reads the dense features alone, along lines and, where many "
            "customers were reached, in steps. Held-out customers decide how strongly a head reads the hidden state; "
            f"it does: {', '.join(kept)}."
        )
    return "\n\n".join(lines)


def _origin(base: Base, schema: PromptSchema) -> Origin:
    """The origin of what is served. A published base that was adapted counts as adapted: only such a one can talk
    behind item tokens."""
    return Origin.ADAPTED if schema.chat_reads_item_tokens else base.origin


def _privacy() -> str:
    return (
        "## Privacy\n\n"
        "Not trained with differential privacy. The weights hold item rows, a popularity, a loyalty and a usual gap "
        "between purchases per item, its neighbours or factors, counts of its purchases, small nets and heads, all "
        "fitted on customers' baskets without noise; no formal bound on what they reveal about one customer is "
        "claimed. The demo customers' events are in the bundle as they are: leave them out (`--demo-customers 0`) for "
        "a shop whose customers have not agreed to that."
    )
