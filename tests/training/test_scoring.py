"""Rankings with any weights, tuned on a window; the count baseline is the floor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from shoplm.readout.habits import HabitTable
from shoplm.readout.rebuy import own_items
from shoplm.training import pipeline
from shoplm.training.adopting import fit_adopt
from shoplm.training.baselines import frequency_ranking, popularity_ranking, tuned_count_weights
from shoplm.training.evaluation import tuning_window
from shoplm.training.habits import ShopHabits, neighbours, shop_habits
from shoplm.training.log import ShopLog
from shoplm.training.rebuying import fit_rebuy
from shoplm.training.scoring import TOP, Weights, Window, tune, tune_new
from shoplm.training.shop import Shop

COUNT = Weights(0.0, 1.0, 0.05, 120.0)


@pytest.fixture(scope="module")
def shop(tiny_shop_log: ShopLog) -> Shop:
    return pipeline.prepare(tiny_shop_log)


@pytest.fixture(scope="module")
def window(shop: Shop) -> Window:
    table = shop.bare_table(np.arange(len(shop.histories)))
    return tuning_window(shop, table, torch.from_numpy(shop.popularity()), 0)


def test_a_ranking_is_the_sum_of_its_terms(shop: Shop, window: Window) -> None:
    logits = torch.randn(len(window.examples), len(shop.items.row_item), generator=torch.Generator().manual_seed(0))
    weights = Weights(0.5, 2.0, 0.3, 30.0)
    ranked = window.rank(weights, logits)
    for index in (0, 5, len(window.examples) - 1):
        history = shop.histories[int(window.examples.customer[index])].before(float(window.examples.moment[index]))
        rows, counts = history.own_counts(30.0)
        scores = 0.5 * logits[index].numpy() + 0.3 * shop.popularity()
        scores[rows] += 2.0 * np.log1p(counts)
        assert ranked[index].tolist() == np.argsort(-scores, kind="stable")[:TOP].tolist()


def test_habits_rank_as_they_are_served(shop: Shop, window: Window) -> None:
    logits = torch.randn(len(window.examples), len(shop.items.row_item), generator=torch.Generator().manual_seed(0))
    habits = shop_habits(shop, shop.timeline.tuned_at, 0)
    weights = Weights(0.5, 2.0, 0.3, 30.0, 0.7, 50.0, 1.5, 0.4)
    rebuy = fit_rebuy(shop, shop.bare_table(np.arange(len(shop.histories))), 0)
    assert rebuy is not None
    known = Window(window.examples, shop.histories, window.popularity, habits, rebuy)
    ranked, new = known.rank(weights, logits), known.rank(weights, logits, new_only=True)
    assert (ranked != known.rank(Weights(0.5, 2.0, 0.3, 30.0), logits)).any()
    table = HabitTable(2.0, 0.7, 50.0, habits.loyalty, habits.neighbours)
    for index in (0, 5, len(window.examples) - 1):
        history = shop.histories[int(window.examples.customer[index])].before(float(window.examples.moment[index]))
        found = table.of(*own_items(history, 30.0, replace(rebuy, out_bias=rebuy.out_bias + 0.4 / 1.5), 1.5))
        scores = (0.5 * logits[index].numpy() + 0.3 * shop.popularity()).astype(np.float32)
        found.add_to(scores)
        assert ranked[index].tolist() == np.argsort(-scores, kind="stable")[:TOP].tolist()
        scores[found.items] = -np.inf
        assert new[index].tolist() == np.argsort(-scores, kind="stable")[:TOP].tolist()


def test_first_purchases_rank_as_they_are_served(shop: Shop, window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = fit_adopt(shop, shop.bare_table(np.arange(len(shop.histories))), 0)
    assert adopt is not None
    weights = Weights(0.0, 2.0, 0.3, 30.0, adopt=0.5)
    known = Window(window.examples, shop.histories, window.popularity, adopt=adopt)
    ranked, new = known.rank(weights, None), known.rank(weights, None, new_only=True)
    assert (ranked != known.rank(replace(weights, adopt=0.0), None)).any()
    monkeypatch.setattr("shoplm.training.scoring._KEPT_EXAMPLES", 0)  # of a large shop, they are made anew each time
    anew = Window(window.examples, shop.histories, window.popularity, adopt=adopt)
    assert (ranked == anew.rank(weights, None)).all()
    assert (new == anew.rank(weights, None, new_only=True)).all()
    table = HabitTable(2.0, adopt_weight=0.5, adopt=adopt)
    for index in (0, 5, len(window.examples) - 1):
        history = shop.histories[int(window.examples.customer[index])].before(float(window.examples.moment[index]))
        found = table.of(*own_items(history, 30.0, None, 0.0))
        scores = (0.3 * shop.popularity()).astype(np.float32)
        found.add_to(scores)
        assert ranked[index].tolist() == np.argsort(-scores, kind="stable")[:TOP].tolist()
        scores[found.items] = -np.inf
        assert new[index].tolist() == np.argsort(-scores, kind="stable")[:TOP].tolist()


def test_neighbours_are_weighed_by_what_they_find_among_new_items(shop: Shop, window: Window) -> None:
    """Neighbours that know the baskets: they are listened to, as far as the whole list allows."""
    examples, items = window.examples, len(shop.items.row_item)
    together = [np.union1d(examples.owned.row(index), examples.baskets.row(index)) for index in range(len(examples))]
    who = np.repeat(np.arange(len(examples)), [len(each) for each in together])
    near = neighbours(who, np.concatenate(together), items, 0)
    known = Window(examples, shop.histories, window.popularity, ShopHabits(np.zeros(items, np.float32), near))
    start = Weights(0.0, 20.0, 1.0, 120.0)
    found = tune_new(known, None, start)
    assert found.goes_with > 0
    assert known.ndcg(found, None) >= 0.998 * known.ndcg(start, None)
    recall = [known.quality(known.rank(each, None, new_only=True)).means()["explore_recall"] for each in (found, start)]
    assert recall[0] > recall[1]


def test_ties_go_to_the_lower_row(shop: Shop, window: Window) -> None:
    flat = Window(window.examples, shop.histories, torch.zeros(len(shop.items.row_item)))
    ranked = flat.rank(Weights(0.0, 0.0, 1.0, 30.0), None)
    assert (ranked == np.arange(TOP)).all()


def test_tuning_never_loses_to_where_it_began(shop: Shop, window: Window) -> None:
    noise = torch.randn(len(window.examples), len(shop.items.row_item), generator=torch.Generator().manual_seed(0))
    found = tune(window, noise, COUNT)
    assert window.ndcg(found, noise) >= window.ndcg(COUNT, noise)
    tuned = tuned_count_weights(window)
    assert window.ndcg(tuned, None) >= window.ndcg(COUNT, None)


def test_a_model_that_knows_the_basket_is_listened_to(shop: Shop, window: Window) -> None:
    logits = torch.zeros(len(window.examples), len(shop.items.row_item))
    at, column, _ = window.examples.baskets.select(np.arange(len(window.examples)))
    logits[at, column] = 5.0
    found = tune(window, logits, COUNT)
    assert found.model > 0
    assert window.ndcg(found, logits) > window.ndcg(COUNT, None) + 0.2


def test_baselines_rank_by_count_then_popularity(shop: Shop, window: Window) -> None:
    popularity = torch.from_numpy(shop.popularity())
    most = np.argsort(-shop.popularity(), kind="stable")[:TOP]
    assert (popularity_ranking(window) == most).all()
    ranked = frequency_ranking(window.examples, shop.histories, popularity)
    assert all(len(set(row)) == TOP for row in ranked.tolist())
    history = shop.histories[int(window.examples.customer[3])].before(float(window.examples.moment[3]))
    pairs = {(int(item), int(basket)) for item, basket in zip(history.item, history.basket, strict=True)}
    often = max(sum(1 for item, _ in pairs if item == row) for row in history.item)
    assert sum(1 for item, _ in pairs if item == ranked[3][0]) == often
    repeat = window.quality(ranked).means()["repeat_recall"]
    assert repeat > window.quality(popularity_ranking(window)).means()["repeat_recall"]
