"""What the net of first purchases learns that popularity does not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from shoplm.readout.adopt import ITEM_FEATURES
from shoplm.training import adopting, pipeline
from shoplm.training.adopting import _loss, fit_adopt, shop_tables
from shoplm.training.evaluation import tuning_window
from shoplm.training.habits import shop_habits
from shoplm.training.log import ShopLog, read_log
from shoplm.training.scoring import GOES_WITH_WEIGHTS, Weights, Window, tune_new
from shoplm.training.shop import Shop
from tiny_log import NOW, START

CUSTOMERS, ITEMS, TASTES = 60, 160, 2
SEASON, DAYS = 30, 180
POPULAR = Weights(0.0, 0.0, 1.0, 120.0)


def made(folder: Path, choose: Callable[[np.random.Generator, int, float], np.ndarray]) -> Shop:
    """Every six days, everybody buys the three items that are `choose`d for the customer on that day first and were not
    bought by the customer before."""
    random, rows = np.random.default_rng(5), []
    for customer in range(CUSTOMERS):
        owned: set[int] = set()
        for day in np.arange(random.uniform(0.0, 5.0), DAYS, 6.0).tolist():
            items = [item for item in choose(random, customer, day).tolist() if item not in owned][:3]
            owned.update(items)
            time = START + timedelta(days=day)
            rows += [{"customer_id": f"c{customer}", "item_id": f"i{item}", "time": time} for item in items]
    pl.DataFrame(rows).write_parquet(folder / "events.parquet")
    return pipeline.prepare(read_log(folder / "events.parquet", now=NOW))


@pytest.fixture(scope="module")
def seasons(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """An item a day comes out for each of two tastes, and is bought for a season by those who share the taste."""

    def choose(random: np.random.Generator, customer: int, day: float) -> np.ndarray:
        return TASTES * random.permutation(np.arange(int(day) - SEASON, int(day)) + SEASON) + customer % TASTES

    return made(tmp_path_factory.mktemp("seasons"), choose)


def window_of(shop: Shop) -> Window:
    table, popularity = shop.bare_table(np.arange(len(shop.histories))), torch.from_numpy(shop.popularity())
    known = shop_habits(shop, shop.timeline.tuned_at, 0)
    return tuning_window(shop, table, popularity, 0, known, None, fit_adopt(shop, table, 0))


def test_the_net_learns_what_popularity_and_neighbours_cannot(seasons: Shop) -> None:
    window = window_of(seasons)
    explored = [window.explored(replace(POPULAR, goes_with=value), None) for value in GOES_WITH_WEIGHTS]
    assert window.explored(Weights(0.0, 0.0, 0.0, 120.0, adopt=1.0), None) > 1.5 * max(explored)
    found = tune_new(window, None, POPULAR)
    assert found.adopt > 0 and found.goes_with == 0
    assert window.ndcg(found, None) >= 0.998 * window.ndcg(POPULAR, None)


def test_where_there_is_nothing_to_learn_popularity_stays(tmp_path: Path) -> None:
    weights = 1.0 / np.arange(1, ITEMS + 1)
    weights /= weights.sum()
    shop = made(tmp_path, lambda random, *_: random.choice(ITEMS, ITEMS, replace=False, p=weights))
    window = window_of(shop)
    found = tune_new(window, None, POPULAR)
    assert window.explored(found, None) >= window.explored(POPULAR, None) > 0


def test_too_few_examples_have_no_net(tiny_shop_log: ShopLog, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = pipeline.prepare(tiny_shop_log)
    monkeypatch.setattr(adopting, "FEWEST_EXAMPLES", 10**6)
    assert fit_adopt(shop, shop.bare_table(np.arange(len(shop.histories))), 0) is None


def test_items_are_told_by_who_took_to_them(tmp_path: Path) -> None:
    """c buys item 0 three times, item 1 once; d buys item 0 for the first time five days before the end."""
    bought = [("c", "i0", day) for day in (60, 70, 80)] + [
        ("c", "i1", 1),
        ("d", "i2", 0),
        ("d", "i0", 79),
        ("d", "i2", 99),
    ]
    rows = [
        {"customer_id": who, "item_id": item, "time": START + timedelta(days=day), "basket_id": f"{who}{day}"}
        for who, item, day in bought
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "events.parquet")
    items = pl.DataFrame({"item_id": ["i0", "i1", "i2"], "title": ["a", "b", "c"], "product_type": ["x", "x", "y"]})
    items.write_parquet(tmp_path / "items.parquet")
    shop = pipeline.prepare(read_log(tmp_path / "events.parquet", tmp_path / "items.parquet", now=NOW))
    until = START.timestamp() + 84 * 86_400
    ids = [shop.log.item_ids[item] for item in shop.items.row_item]
    tables = shop_tables(shop, until, 0)
    found = {
        name: dict(zip(ITEM_FEATURES, row, strict=True)) for name, row in zip(ids, tables.items.tolist(), strict=True)
    }
    wanted = {
        "i0": {"purchases": 4 / 3, "28d": 4, "7d": 2, "buyers": 2 / 3, "first": (2, 1, 1), "type": 1.0, "lately": 2},
        "i1": {"purchases": 1 / 3, "28d": 0, "7d": 0, "buyers": 1 / 3, "first": (0, 0, 0), "type": 1.0, "lately": 2},
        "i2": {"purchases": 1 / 3, "28d": 0, "7d": 0, "buyers": 1 / 3, "first": (0, 0, 0), "type": 1 / 3, "lately": 0},
    }
    for item, counts in wanted.items():
        told = found[item]
        assert np.exp(told["log_purchases"]) - 0.5 == pytest.approx(counts["purchases"], rel=1e-4)
        assert np.exp(told["log_purchases_28d"]) - 0.5 == pytest.approx(counts["28d"], abs=1e-4)
        assert np.exp(told["log_purchases_7d"]) - 0.5 == pytest.approx(counts["7d"], abs=1e-4)
        assert np.exp(told["log_buyers"]) - 0.5 == pytest.approx(counts["buyers"], rel=1e-4)
        firsts = [np.exp(told[f"log_first_purchases_{days}d"]) - 0.5 for days in (28, 14, 7)]
        assert firsts == pytest.approx(counts["first"], abs=1e-4)
        assert np.exp(told["log_buyers_of_type"]) - 0.5 == pytest.approx(counts["type"], rel=1e-4)
        assert np.exp(told["log_first_purchases_of_type_28d"]) - 0.5 == pytest.approx(counts["lately"], abs=1e-4)
    assert found["i1"]["log_days_since_first_sold"] == pytest.approx(np.log1p(83.0), rel=1e-4)


def test_the_loss_is_that_of_all_items_where_each_is_there_once() -> None:
    """Two examples: three items of which one was bought, and two of which none was."""
    values = torch.tensor([0.3, -1.0, 0.5, 0.1, -0.2])
    owner, bought = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    again = torch.tensor([2.0, 4.0])
    loss = _loss(values, owner, bought, torch.zeros(5), again)
    total = np.array([np.exp([0.3, -1.0, 0.5]).sum(), np.exp([0.1, -0.2]).sum()])
    new = total / (1.0 + total)
    which = -np.log(np.exp(-1.0) / total[0])
    whether = -np.log(new[0]) / 3 - 2 * np.log(1 - new[0]) / 3 - np.log(1 - new[1])
    assert float(loss) == pytest.approx((which + whether) / 2, rel=1e-5)
    drawn = [0, 1, 2, 3, 4, 4]  # twice at half its weight is once
    counted = torch.tensor([0.0, 0.0, 0.0, 0.0, -np.log(2.0), -np.log(2.0)]).float()
    twice = _loss(values[drawn], owner[drawn], bought[drawn], counted, again)
    assert float(twice) == pytest.approx(float(loss), rel=1e-5)
