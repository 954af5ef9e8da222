"""What the net of own items learns that no decayed count says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from shoplm.training import habits, pipeline, rebuying
from shoplm.training.evaluation import tuning_window
from shoplm.training.log import ShopLog, read_log
from shoplm.training.rebuying import fit_rebuy, item_features
from shoplm.training.scoring import Weights, tune
from shoplm.training.shop import Shop
from tiny_log import NOW, START

CUSTOMERS, OWN, ITEMS = 60, 6, 40


@pytest.fixture(scope="module")
def rotating(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Everybody buys two of their own six items at a visit, in turn: next comes what was bought longest ago."""
    random = np.random.default_rng(4)
    rows = []
    for customer in range(CUSTOMERS):
        own = random.choice(ITEMS, OWN, replace=False)
        day = random.uniform(0.0, 5.0)
        for visit in range(40):
            for place in (0, 1):
                item = own[(2 * visit + place) % OWN]
                rows.append({"customer_id": f"c{customer}", "item_id": f"i{item}", "time": START + timedelta(days=day)})
            day += random.uniform(3.0, 6.0)
    path = tmp_path_factory.mktemp("rotating") / "events.parquet"
    pl.DataFrame(rows).write_parquet(path)
    return pipeline.prepare(read_log(path, now=NOW))


def test_the_net_learns_what_counting_cannot(rotating: Shop) -> None:
    table = rotating.bare_table(np.arange(len(rotating.histories)))
    rebuy = fit_rebuy(rotating, table, 0)
    assert rebuy is not None
    popularity = torch.from_numpy(rotating.popularity())
    known = habits.shop_habits(rotating, rotating.timeline.tuned_at, 0)
    window = tuning_window(rotating, table, popularity, 0, known, rebuy)
    count = tune(window, None, Weights(0.0, 1.0, 0.05, 120.0))
    found = Weights(0.0, 0.0, 0.05, 120.0, rebuy=1.0, own=4.0)
    assert window.ndcg(found, None) > 0.95
    assert window.ndcg(found, None) > window.ndcg(count, None) + 0.2


def test_tuning_takes_the_net_where_it_helps_and_keeps_the_count_where_not(rotating: Shop) -> None:
    table = rotating.bare_table(np.arange(len(rotating.histories)))
    popularity = torch.from_numpy(rotating.popularity())
    known = habits.shop_habits(rotating, rotating.timeline.tuned_at, 0)
    rebuy = fit_rebuy(rotating, table, 0)
    start = Weights(0.0, 1.0, 0.05, 120.0)
    helped = tune(tuning_window(rotating, table, popularity, 0, known, rebuy), None, start, habits=True)
    alone = tune(tuning_window(rotating, table, popularity, 0, known), None, start, habits=True)
    assert helped.rebuy > 0 and alone.rebuy == 0


def test_too_few_examples_have_no_net(tiny_shop_log: ShopLog, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = pipeline.prepare(tiny_shop_log)
    monkeypatch.setattr(rebuying, "FEWEST_EXAMPLES", 10**6)
    assert fit_rebuy(shop, shop.bare_table(np.arange(len(shop.histories))), 0) is None


def test_items_are_told_by_what_customers_did_with_them(tmp_path: Path) -> None:
    """Item 0: three purchases by one customer, ten days apart; item 1: one, long ago."""
    days = {"i0": (60, 70, 80), "i1": (1,), "i2": (0, 99)}
    rows = [
        {"customer_id": "c", "item_id": item, "time": START + timedelta(days=day), "basket_id": f"{day}"}
        for item, bought in days.items()
        for day in bought
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "events.parquet")
    shop = pipeline.prepare(read_log(tmp_path / "events.parquet", now=NOW))
    until = START.timestamp() + 84 * 86_400
    ids = [shop.log.item_ids[item] for item in shop.items.row_item]
    found = dict(zip(ids, item_features(shop, until).tolist(), strict=True))
    usual = 10.0  # the mean of the two gaps that are known
    for item, (count, lately, gaps) in {"i0": (3, 3, 2), "i1": (1, 0, 0), "i2": (1, 0, 0)}.items():
        wanted = [np.log(count * 28 / 84 + 0.5), np.log(lately + 0.5), np.log1p((gaps * 10 + 3 * usual) / (gaps + 3))]
        assert found[item][1:] == pytest.approx(wanted, rel=1e-5)
    assert found["i0"][0] > 0 > found["i1"][0]  # loyalty
