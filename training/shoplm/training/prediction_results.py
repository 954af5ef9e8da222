"""Measures predictions beside gradient boosting, BG/NBD and means, on the same customers and moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import PROBABILITIES, intervals, point_amounts, probabilities
from shoplm.training import baselines
from shoplm.training.bg_nbd import BgNbd, repeats_at
from shoplm.training.campaigns import Campaigns
from shoplm.training.metrics import (
    auc,
    bootstrap_statistic,
    brier,
    calibration_error,
    calibration_intercept,
    calibration_slope,
    reliability,
    top_decile_lift,
)
from shoplm.training.predictions import Observed, Predictor, observe, weekly_rows
from shoplm.training.report import (
    BG_NBD,
    BOOSTING,
    CONSTANT,
    OURS,
    OWN_MEAN,
    AmountError,
    AmountRow,
    Difference,
    Estimate,
    ProbabilityRow,
    known,
)
from shoplm.training.samples import HiddenTable, Task, Use
from shoplm.training.shop import Shop

Floats = NDArray[np.float64]


def measure_predictions(
    shop: Shop, table: HiddenTable, bare: HiddenTable, predictor: Predictor, seed: int
) -> tuple[list[ProbabilityRow], list[AmountRow]]:
    """All targets that have outcomes after the cut. `bare` names all samples of the customers in `table`."""
    prices = shop.items.row_prices
    train = weekly_rows(np.unique(bare.customer), shop.histories, shop.timeline, prices, seed)
    test = observe(table, table.where(Task.PREDICT, Use.HEAD_TEST), shop.histories, shop.timeline, prices)
    values = predictor.values(test.hidden, test.features)
    chances: list[ProbabilityRow] = []
    amounts: list[AmountRow] = []
    for spec in predictor.specs:
        if spec.kind == "coupon_redemption" or not len(test):
            continue
        if spec.transform in PROBABILITIES:
            chances.append(_chance(spec, train, test, values, seed))
        else:
            amounts.append(_amount(shop, spec, train, test, values, seed))
    return chances + _campaign_rows(shop, bare, predictor, seed), amounts


def _chance(spec: HeadSpec, train: Observed, test: Observed, values: Floats, seed: int) -> ProbabilityRow:
    inside, trained = test.population(spec), train.population(spec)
    truth = test.outcome(spec)[inside] > 0
    boosted = baselines.boosted_probability(
        train.features[trained], train.outcome(spec)[trained] > 0, test.features[inside], seed
    )
    return _chance_row(spec, probabilities(spec, values[inside]), boosted, truth, seed)


def _chance_row(spec: HeadSpec, ours: Floats, boosted: Floats, truth: NDArray[np.bool_], seed: int) -> ProbabilityRow:
    return ProbabilityRow(
        target=spec.label,
        customers=len(truth),
        observed=float(truth.mean()),
        auc=known(auc(ours, truth)),
        brier=brier(ours, truth),
        ece=calibration_error(ours, truth),
        slope=Estimate(*map(known, calibration_slope(ours, truth))),
        intercept=Estimate(*map(known, calibration_intercept(ours, truth))),
        lift=known(top_decile_lift(ours, truth)),
        boosted_auc=known(auc(boosted, truth)),
        boosted_brier=brier(boosted, truth),
        boosted_ece=calibration_error(boosted, truth),
        boosted_lift=known(top_decile_lift(boosted, truth)),
        auc_over_boosting=Difference(*map(known, bootstrap_statistic(auc, ours, boosted, truth, seed=seed))),
        brier_over_boosting=Difference(*map(known, bootstrap_statistic(brier, ours, boosted, truth, seed=seed))),
        reliability=tuple(reliability(ours, truth)),
    )


def _amount(shop: Shop, spec: HeadSpec, train: Observed, test: Observed, values: Floats, seed: int) -> AmountRow:
    truth, past = test.outcome(spec), train.outcome(spec)
    amount = point_amounts(spec, values)
    low, high = intervals(spec, values)
    # The interval as it is served: it always holds the expected amount.
    covered = (truth >= np.minimum(low, amount)) & (truth <= np.maximum(high, amount))
    guesses = {
        OURS: amount,
        BOOSTING: baselines.boosted_amount(train.features, past, test.features, seed),
        OWN_MEAN: baselines.own_mean(test, shop.histories, shop.items.row_prices, spec),
        CONSTANT: np.full(len(test), past.mean()),
    }
    if spec.kind == "purchase_count":
        # What it is fitted on lies before the moment that it predicts from.
        known_of = repeats_at(shop.histories, test.customer, test.moment)
        model = BgNbd.fit(known_of)
        if model is not None:
            guesses[BG_NBD] = model.expected(known_of, float(spec.horizon_days))
    return AmountRow(
        target=spec.label,
        customers=len(test),
        observed=float(truth.mean()),
        predicted=float(amount.mean()),
        coverage=float(covered.mean()),
        errors=tuple(_error(name, guess, truth) for name, guess in guesses.items()),
    )


def _error(name: str, guess: Floats, truth: Floats) -> AmountError:
    off = guess - truth
    return AmountError(name, mae=float(np.abs(off).mean()), rmse=float(np.sqrt((off**2).mean())))


def _campaign_rows(shop: Shop, bare: HiddenTable, predictor: Predictor, seed: int) -> list[ProbabilityRow]:
    specs = [spec for spec in predictor.specs if spec.kind == "coupon_redemption"]
    if not specs:
        return []
    test, train = shop.campaign_rows(bare, "test"), shop.campaign_rows(bare, "train")
    # The weights on the hidden state are zero; see shoplm.training.campaigns.
    head = predictor.head
    hidden_size = head.weight.shape[1] - test.features.shape[1] - len(head.unit_bias)
    values = predictor.values(np.zeros((len(test), hidden_size), np.float32), test.features)
    boosted = baselines.boosted_probability(_with_kind(train), train.redeemed, _with_kind(test), seed)
    rows = []
    for spec in specs:
        of_type = test.kind == shop.campaign_types.index(spec.campaign_type)
        if of_type.any():
            ours = probabilities(spec, values[of_type])
            rows.append(_chance_row(spec, ours, boosted[of_type], test.redeemed[of_type], seed))
    return rows


def _with_kind(campaigns: Campaigns) -> NDArray[np.float32]:
    return np.concatenate([campaigns.features, campaigns.kind[:, None].astype(np.float32)], axis=1)
