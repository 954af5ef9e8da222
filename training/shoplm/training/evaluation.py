"""Measures a bundle on what happened after its training data end, beside baselines on the same customers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.readout.adopt import Adopt
from shoplm.readout.rebuy import Rebuy
from shoplm.training.examples import Examples, ranking_examples
from shoplm.training.habits import ShopHabits
from shoplm.training.model import Model
from shoplm.training.prediction_results import measure_predictions
from shoplm.training.ranking_results import measure_ranking, tuned_rivals
from shoplm.training.report import AmountRow, ProbabilityRow, Report
from shoplm.training.samples import HiddenTable, Task, Use
from shoplm.training.scoring import Window
from shoplm.training.shop import Shop

TUNE_EXAMPLES = 2000  # of the validation window, at random: enough for weights that come from a coarse grid
SPLITS = {"global time split": Use.ITEM_TEST_TIME, "last basket": Use.ITEM_TEST_LAST}
Say = Callable[[str], None]


def tuning_window(
    shop: Shop,
    table: HiddenTable,
    popularity: torch.Tensor,
    seed: int,
    habits: ShopHabits | None = None,
    rebuy: Rebuy | None = None,
    adopt: Adopt | None = None,
) -> Window:
    """Validation examples: next baskets between `tuned_at` and `test_at`. `habits`, `rebuy` and `adopt` are those
    before `tuned_at`."""
    chosen = table.where(Task.RECOMMEND, Use.ITEM_TUNE)
    if len(chosen) > TUNE_EXAMPLES:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, TUNE_EXAMPLES, replace=False))
    examples = _examples(shop, table, chosen, shop.timeline.test_at)
    return Window(examples, shop.histories, popularity, habits, rebuy, adopt)


def measure(shop: Shop, table: HiddenTable, read: int, model: Model, seed: int, say: Say) -> Report:
    """All numbers of the card. `table` holds the hidden states of `read` customers; the baselines read none of them."""
    bare = shop.bare_table(np.unique(table.customer))
    say("tuning the baselines: counting and TIFU-KNN")
    rivals = tuned_rivals(shop, tuning_window(shop, bare, model.popularity, seed), seed)
    rankings = []
    for name, use in SPLITS.items():
        say(f"ranking: {name}")
        examples = _examples(shop, table, table.where(Task.RECOMMEND, use), float("inf"))
        if len(examples):
            rankings.append(measure_ranking(name, shop, table, examples, model, rivals, seed))
    chances: list[ProbabilityRow] = []
    amounts: list[AmountRow] = []
    if model.predictor is not None:
        say("predictions beside gradient boosting and BG/NBD")
        chances, amounts = measure_predictions(shop, table, bare, model.predictor, seed)
    return Report(
        seed=seed,
        customers=read,
        log=shop.fingerprint,
        customers_in_log=len(shop.histories),
        rankings=tuple(rankings),
        probabilities=tuple(chances),
        amounts=tuple(amounts),
        count_weights={"popularity": rivals.count.popularity, "decay_days": rivals.count.decay_days},
        tifu_settings={name: float(value) for name, value in asdict(rivals.tifu).items()},
    )


def _examples(shop: Shop, table: HiddenTable, chosen: NDArray[np.intp], before: float) -> Examples:
    return ranking_examples(table, chosen, shop.histories, shop.items.label_kind, before=before, decay_days=120.0)
