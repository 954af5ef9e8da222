"""Measures a bundle on what happened after its training data end, beside baselines on the same customers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import PROBABILITIES, expected_amounts, intervals, probabilities
from shoplm.training import baselines
from shoplm.training.campaigns import Campaigns
from shoplm.training.examples import Examples, ranking_examples
from shoplm.training.metrics import BasketQuality, auc, bootstrap_difference, brier, calibration_error
from shoplm.training.predictions import Observed, Predictor, observe
from shoplm.training.ranker import OutputRows
from shoplm.training.report import (
    AmountRow,
    Difference,
    ProbabilityRow,
    RankingResult,
    RankingRow,
    Report,
    label,
)
from shoplm.training.samples import HiddenTable, Task, Use
from shoplm.training.scoring import Weights, Window
from shoplm.training.shop import Shop

TUNE_EXAMPLES = 2000  # of the validation window, at random: enough for weights that come from a coarse grid
SPLITS = {"global time split": Use.ITEM_TEST_TIME, "last basket": Use.ITEM_TEST_LAST}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """What is measured: the tensors of a bundle, and its weights of counting and popularity."""

    rows: OutputRows
    popularity: torch.Tensor  # [items] natural logs
    weights: Weights  # model = 1: the rows are what is stored
    predictor: Predictor | None


def tuning_window(shop: Shop, table: HiddenTable, popularity: torch.Tensor, seed: int) -> Window:
    """Validation examples: next baskets between `tuned_at` and `test_at`."""
    chosen = table.where(Task.RECOMMEND, Use.ITEM_TUNE)
    if len(chosen) > TUNE_EXAMPLES:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, TUNE_EXAMPLES, replace=False))
    examples = _examples(shop, table, chosen, shop.timeline.test_at)
    return Window(examples, shop.histories, popularity)


def measure(shop: Shop, table: HiddenTable, read: int, model: Model, seed: int, say: Say) -> Report:
    """All numbers of the card. `table` holds the hidden states of `read` customers; the baselines read none of them."""
    customers = np.unique(table.customer)
    bare = shop.bare_table(customers)
    say("tuning the count baseline")
    count_weights = baselines.tuned_count_weights(tuning_window(shop, bare, model.popularity, seed))
    rankings = []
    for name, use in SPLITS.items():
        say(f"ranking: {name}")
        examples = _examples(shop, table, table.where(Task.RECOMMEND, use), float("inf"))
        if len(examples):
            rankings.append(_ranking(name, shop, table, examples, model, count_weights, seed))
    amounts: list[AmountRow] = []
    chances: list[ProbabilityRow] = []
    if model.predictor is not None:
        say("predictions and gradient boosting")
        prices = shop.items.row_prices
        train = observe(bare, bare.where(Task.PREDICT, Use.HEAD_TRAIN), shop.histories, shop.timeline, prices)
        test = observe(table, table.where(Task.PREDICT, Use.HEAD_TEST), shop.histories, shop.timeline, prices)
        values = model.predictor.values(test.hidden, test.features)
        for spec in model.predictor.specs:
            if spec.kind == "coupon_redemption" or not len(test):
                continue
            if spec.transform in PROBABILITIES:
                chances.append(_chance(spec, train, test, values, seed))
            else:
                amounts.append(_amount(spec, train, test, values, seed))
        chances += _campaign_rows(shop, bare, model.predictor, seed)
    return Report(
        seed=seed,
        customers=read,
        customers_in_log=len(shop.histories),
        rankings=tuple(rankings),
        probabilities=tuple(chances),
        amounts=tuple(amounts),
        count_weights={"popularity": count_weights.popularity, "decay_days": count_weights.decay_days},
    )


def _examples(shop: Shop, table: HiddenTable, chosen: NDArray[np.intp], before: float) -> Examples:
    return ranking_examples(table, chosen, shop.histories, shop.items.label_kind, before=before, decay_days=120.0)


def _ranking(
    name: str,
    shop: Shop,
    table: HiddenTable,
    examples: Examples,
    model: Model,
    count_weights: Weights,
    seed: int,
) -> RankingResult:
    window = Window(examples, shop.histories, model.popularity)
    logits = model.rows.logits(torch.from_numpy(table.hidden[examples.sample]))
    ranked = {
        "popularity": baselines.popularity_ranking(window),
        "group, then personal frequency": baselines.frequency_ranking(examples, shop.histories, model.popularity),
        "tuned count + decay + popularity": window.rank(count_weights, None),
        "language model alone": window.rank(Weights(1.0, 0.0, 0.0, model.weights.decay_days), logits),
        "ShopLM": window.rank(model.weights, logits),
    }
    quality = {key: window.quality(rows) for key, rows in ranked.items()}
    ours, count = quality["ShopLM"], quality["tuned count + decay + popularity"]
    return RankingResult(
        split=name,
        customers=len(examples),
        rows=tuple(_row(key, found) for key, found in quality.items()),
        recall_over_count=Difference(*bootstrap_difference(ours.recall, count.recall, seed=seed)),
        ndcg_over_count=Difference(*bootstrap_difference(ours.ndcg, count.ndcg, seed=seed)),
    )


def _row(name: str, quality: BasketQuality) -> RankingRow:
    return RankingRow(name=name, **quality.means())


def _chance(spec: HeadSpec, train: Observed, test: Observed, values: NDArray[np.float64], seed: int) -> ProbabilityRow:
    inside, trained = test.population(spec), train.population(spec)
    truth = test.outcome(spec)[inside] > 0
    boosted = baselines.boosted_probability(
        train.features[trained], train.outcome(spec)[trained] > 0, test.features[inside], seed
    )
    return _chance_row(spec, probabilities(spec, values[inside]), boosted, truth)


def _chance_row(
    spec: HeadSpec, ours: NDArray[np.float64], boosted: NDArray[np.float64], truth: NDArray[np.bool_]
) -> ProbabilityRow:
    return ProbabilityRow(
        target=label(spec.kind, spec.horizon_days, spec.campaign_type),
        customers=len(truth),
        observed=float(truth.mean()),
        auc=auc(ours, truth),
        brier=brier(ours, truth),
        ece=calibration_error(ours, truth),
        boosted_auc=auc(boosted, truth),
        boosted_brier=brier(boosted, truth),
        boosted_ece=calibration_error(boosted, truth),
    )


def _amount(spec: HeadSpec, train: Observed, test: Observed, values: NDArray[np.float64], seed: int) -> AmountRow:
    truth, past = test.outcome(spec), train.outcome(spec)
    amount = expected_amounts(spec, values)
    low, high = intervals(spec, values)
    # The interval as it is served: it always holds the expected amount.
    covered = (truth >= np.minimum(low, amount)) & (truth <= np.maximum(high, amount))
    boosted = baselines.boosted_amount(train.features, past, test.features, seed)
    return AmountRow(
        target=label(spec.kind, spec.horizon_days, spec.campaign_type),
        customers=len(test),
        observed=float(truth.mean()),
        predicted=float(amount.mean()),
        mae=float(np.abs(amount - truth).mean()),
        coverage=float(covered.mean()),
        boosted_mae=float(np.abs(boosted - truth).mean()),
        constant_mae=float(np.abs(past.mean() - truth).mean()),
    )


def _campaign_rows(shop: Shop, bare: HiddenTable, predictor: Predictor, seed: int) -> list[ProbabilityRow]:
    specs = [spec for spec in predictor.specs if spec.kind == "coupon_redemption"]
    if not specs:
        return []
    test, train = shop.campaign_rows(bare, "test"), shop.campaign_rows(bare, "train")
    # The weights on the hidden state are zero; see shoplm.training.campaigns.
    hidden_size = predictor.head.weight.shape[1] - test.features.shape[1]
    values = predictor.values(np.zeros((len(test), hidden_size), np.float32), test.features)
    boosted = baselines.boosted_probability(_with_kind(train), train.redeemed, _with_kind(test), seed)
    rows = []
    for spec in specs:
        of_type = test.kind == shop.campaign_types.index(spec.campaign_type)
        if of_type.any():
            ours = probabilities(spec, values[of_type])
            rows.append(_chance_row(spec, ours, boosted[of_type], test.redeemed[of_type]))
    return rows


def _with_kind(campaigns: Campaigns) -> NDArray[np.float32]:
    return np.concatenate([campaigns.features, campaigns.kind[:, None].astype(np.float32)], axis=1)
