"""The steps of `shoplm train`: read, number, compute hidden states, fit, tune, measure, write."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from shoplm.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PromptSchema, file_hash
from shoplm.catalog.items import Catalog, read_catalog
from shoplm.errors import ConfigurationError
from shoplm.features import FEATURE_NAMES
from shoplm.history import EventKind, utc_day
from shoplm.model.base import Base
from shoplm.prompt import PROMPT_VERSION
from shoplm.training.adopting import bundled_adopt, fit_adopt
from shoplm.training.campaigns import fit_campaigns
from shoplm.training.catalogue import ShopItems, choose_items
from shoplm.training.evaluation import tuning_window
from shoplm.training.formats import UNROUNDED, Formats
from shoplm.training.habits import bundled_habits, shop_habits
from shoplm.training.heads import Standard, joined
from shoplm.training.hidden import HiddenStates, Progress
from shoplm.training.histories import Histories
from shoplm.training.log import ShopLog
from shoplm.training.model import Model
from shoplm.training.predictions import (
    FEWEST_CUSTOMERS,
    FEWEST_EVENTS,
    Predictor,
    fit_behaviour,
    observe,
    shifted,
    weekly_rows,
)
from shoplm.training.ranker import OutputRows, RankerSettings, fit_ranker
from shoplm.training.reader import Reader, make_reader
from shoplm.training.rebuying import bundled_rebuy, fit_rebuy
from shoplm.training.samples import HiddenTable, Task, Use
from shoplm.training.scoring import Weights, tune, tune_new
from shoplm.training.shop import Shop
from shoplm.training.timeline import Timeline, make_timeline
from shoplm.training.watch import LOSS, NDCG, Watch

# The likeliest weight of counting spreads chances over all that customers may buy; ranking ten items well takes more.
_REPEAT_FACTORS = (1.0, 2.0, 3.0, 4.0)
_LISTED_VALUES = 50  # of an attribute, at most: of more than these, no list
# A value of the net is below 0 for most own items, yet they lead most lists, which are of ten.
_START = Weights(model=0.2, repeat=0.0, popularity=0.0, decay_days=120.0, rebuy=1.0, own=8.0)
ROWS_STAGE = "output rows"
HIDDEN_SHARE = 0.7  # of the minutes, for hidden states; the rest fits and measures


@dataclass(frozen=True, slots=True)
class Fitted:
    """What training found."""

    model: Model
    ranking_examples: int
    hidden_scales: dict[str, float]


def prepare(log: ShopLog) -> Shop:
    """Timeline, items and histories. Raises ConfigurationError where the log cannot be cut in time."""
    timeline = make_timeline(log.start, log.end)
    items = choose_items(log, timeline.test_at)
    _check_tuning(log, timeline, items.label_kind)
    return Shop(log, timeline, items, Histories(log, items, timeline.cutoffs))


def _check_tuning(log: ShopLog, timeline: Timeline, kind: EventKind) -> None:
    """Raises ConfigurationError where there is nothing to tune on: as after a stray event long after all others."""
    tuned = pl.col("time").is_between(timeline.tuned_at, timeline.test_at, closed="left")
    if not timeline.horizons or len(log.events.filter(tuned & (pl.col("kind") == int(kind)))):
        return
    before = log.events.filter(pl.col("time") < timeline.tuned_at)["time"].to_numpy().max()
    raise ConfigurationError(
        f"no {kind.name.lower()} from {utc_day(timeline.tuned_at)} to {utc_day(timeline.test_at)}, where the score's "
        f"weights are tuned: the log ends on {utc_day(log.end)}, and its last event before these days is of "
        f"{utc_day(before)}. Leave out what comes later if it does not belong there, or give a log that ends before "
        "the gap"
    )


def write_items(items: ShopItems, folder: Path) -> Catalog:
    """items.parquet and types.parquet of a bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    items.table.write_parquet(folder / "items.parquet", compression="zstd", compression_level=12)
    items.types.write_parquet(folder / "types.parquet")
    return read_catalog(folder)


def prompt_schema(shop: Shop, preamble: str, budget_tokens: int, block_tokens: int, *, adapted: bool) -> PromptSchema:
    """Profile attributes are those that the customers' file has."""
    profiles = shop.log.attributes
    names = sorted({name for profile in profiles.values() for name, _ in profile})
    values: dict[str, set[str]] = {name: set() for name in names}
    for customer in shop.log.customer_ids:
        for name, value in profiles.get(customer, ()):
            values[name].add(value)
    # Behind hundreds of item tokens, which it has never seen, a base that was not adapted cannot go on in words.
    return PromptSchema(
        preamble,
        tuple(names),
        {name: tuple(sorted(seen)) for name, seen in values.items() if 0 < len(seen) <= _LISTED_VALUES},
        history_budget_tokens=budget_tokens,
        history_block_tokens=block_tokens,
        chat_reads_item_tokens=adapted,
    )


def hidden_states(
    shop: Shop,
    catalog: Catalog,
    base: Base,
    schema: PromptSchema,
    work: Path,
    seed: int,
    adapter: Path | None,
    input_rows: torch.Tensor | None = None,
    formats: Formats = UNROUNDED,
) -> tuple[HiddenStates, Reader]:
    """Loads the base and opens the folder of shards that belongs to exactly this log, base, adapter and prompt."""
    dtype = torch.bfloat16  # as the server's default; where that is slow, the backend widens it
    vocabulary = shop.items.vocabulary(base.config.vocab_size)
    reader = make_reader(base, catalog, vocabulary, schema, dtype, adapter, input_rows, formats)
    identity: dict[str, object] = {
        "base": base.fingerprint,
        "dtype": str(dtype),
        "backend": reader.backend.info.name,
        "shop": shop.fingerprint,
        "prompt": PROMPT_VERSION,
        "schema": [schema.preamble, *schema.attributes, schema.history_budget_tokens, schema.history_block_tokens],
    }
    if formats.weights != "model":
        identity["weight_format"] = [formats.weights, "cpu"] if formats.of_cpu else formats.weights
    if formats.kv is not None:
        identity["kv_format"] = formats.kv
    if adapter is not None:
        identity["adapter"] = [file_hash(adapter / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
    return HiddenStates(work, reader, shop.histories, shop.timeline, identity, seed), reader


def compute_states(
    states: HiddenStates, customers: int, minutes: float | None, progress: Progress
) -> tuple[HiddenTable, int]:
    """Hidden states of as many customers as fit into the time, and how many that is. The total that `progress` is given
    is the number of customers that are likely to fit."""
    begun = time.monotonic()
    deadline = None if minutes is None else begun + HIDDEN_SHARE * 60.0 * minutes
    found = 0  # from an earlier run

    def likely(done: int, total: int, tokens: int) -> None:
        nonlocal found
        if deadline is not None and done < total:
            now = time.monotonic()
            if not tokens:
                found = done
            elif now > begun:
                pace = (done - found) / (now - begun)
                total = min(total, done + int(pace * max(deadline - now, 0.0)))
        progress(done, total, tokens)

    return states.compute(customers, deadline, likely)


def fit(
    shop: Shop,
    table: HiddenTable,
    embeddings: torch.Tensor,
    *,
    seed: int,
    settings: RankerSettings,
    watch: Watch,
) -> Fitted:
    """Output rows on labels before `tuned_at`, the score's weights on those between it and `test_at`, heads on all
    before `test_at`. `embeddings` [rows, H] are the input embeddings of the catalogue's items."""
    popularity = torch.from_numpy(shop.popularity())
    watch.say("finding what is bought again, together and for the first time")
    bare = shop.bare_table(np.unique(table.customer))
    rebuy, adopt = fit_rebuy(shop, bare, seed), fit_adopt(shop, bare, seed)
    habits = shop_habits(shop, shop.timeline.tuned_at, seed)
    window = tuning_window(shop, table, popularity, seed, habits, rebuy, adopt)
    watch.say("tuning the weights of counting and popularity")
    count = tune(window, None, Weights(model=0.0, repeat=1.0, popularity=0.05, decay_days=120.0))
    examples = shop.training_examples(table, count.decay_days)
    watch.say(f"fitting output rows on {len(examples):,} baskets")
    states = torch.from_numpy(table.hidden[window.examples.sample])
    fitted_steps = 0

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal fitted_steps
        fitted_steps = done
        watch.record(ROWS_STAGE, done, {LOSS: loss})
        watch.advance(ROWS_STAGE, done, total)

    def validate(rows: OutputRows, repeat: float) -> float:
        logits = rows.logits(states)
        tried = (Weights(1.0, repeat * factor, 0.0, count.decay_days) for factor in _REPEAT_FACTORS)
        quality = max(window.ndcg(weights, logits) for weights in tried)
        watch.record(ROWS_STAGE, fitted_steps, {NDCG: quality})
        return quality

    hidden = torch.from_numpy(table.hidden[examples.sample])
    rows, repeat = fit_ranker(
        hidden,
        examples,
        embeddings,
        shop.items.row_types,
        shop.row_counts_before(shop.timeline.tuned_at),
        settings=settings,
        seed=seed,
        validate=validate,
        progress=progress,
    )
    watch.say("tuning the score's weights")
    logits = rows.logits(states)
    start = Weights(1.0, repeat, 0.0, count.decay_days) if rebuy is None else _START
    starts = [start, replace(count, model=0.0)]
    tuned = (tune(window, logits, start, habits=True) for start in starts)
    best = tune_new(window, logits, max(tuned, key=lambda found: window.ndcg(found, logits)))
    centre = hidden.mean(0) if len(hidden) else torch.zeros(hidden.shape[1])
    stored = rows.scaled(best.model).rounded(centre)
    watch.say("fitting prediction heads")
    predictor = fit_predictor(shop, table, seed)
    if predictor is None and shop.timeline.horizons:
        watch.say(f"no prediction targets: they take {FEWEST_CUSTOMERS} customers and {FEWEST_EVENTS} of each outcome")
    habits = bundled_habits(shop, best.goes_with, seed)
    rebuy, adopt = bundled_rebuy(shop, rebuy, best), bundled_adopt(shop, adopt, best.adopt, seed)
    model = Model(stored, popularity, replace(best, model=1.0, own=0.0), habits, rebuy, adopt, predictor)
    return Fitted(model, len(examples), predictor.hidden_scales if predictor is not None else {})


def fit_predictor(shop: Shop, table: HiddenTable, seed: int) -> Predictor | None:
    """All heads that the log has enough data for; None where it has none."""
    prices, timeline, customers = shop.items.row_prices, shop.timeline, np.unique(table.customer)
    chosen = table.where(Task.PREDICT, Use.HEAD_TRAIN | Use.HEAD_TUNE)
    train = observe(table, chosen, shop.histories, timeline, prices)
    dense = weekly_rows(customers, shop.histories, timeline, prices, seed)
    standard = Standard.fit(np.concatenate([train.features, dense.features]))
    heads, specs, scales = fit_behaviour(train, dense, timeline.horizons, standard, seed)
    first = sum(len(head.bias) for head in heads)
    reached = shop.campaign_rows(shop.bare_table(customers), "train")
    more_heads, more_specs = fit_campaigns(reached, shop.campaign_types, standard, table.hidden.shape[1], seed)
    if more_specs:
        scales = {**scales, "coupon_redemption": 0.0}
    heads += more_heads
    specs += shifted(more_specs, first)
    if not specs:
        return None
    return Predictor(standard, joined(heads, len(FEATURE_NAMES)), tuple(specs), scales)
