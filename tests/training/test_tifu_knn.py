"""TIFU-KNN against numbers worked out by hand from its formula."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from shoplm.training import pipeline
from shoplm.training.log import ShopLog
from shoplm.training.shop import Shop
from shoplm.training.tifu_knn import Purchases, TifuSettings, basket_weights, tifu_ranking

DAY = 86_400.0
PAPER = TifuSettings(groups=2, within_decay=0.5, group_decay=0.25, own_share=0.7)


def weights(baskets: int, settings: TifuSettings) -> list[float]:
    found: list[float] = basket_weights(np.full(baskets, baskets), np.arange(baskets), settings).tolist()
    return found


def test_weights_of_five_baskets_in_two_groups() -> None:
    """Groups of 2 and 3; r_b^(4 - i) * r_g^(1 - g) / size / 2."""
    expected = [
        0.5**4 * 0.25 / 2 / 2,
        0.5**3 * 0.25 / 2 / 2,
        0.5**2 * 1.0 / 3 / 2,
        0.5**1 * 1.0 / 3 / 2,
        0.5**0 * 1.0 / 3 / 2,
    ]
    assert weights(5, PAPER) == pytest.approx(expected)


def test_fewer_baskets_than_groups_are_groups_of_their_own() -> None:
    """As in the code of the paper's authors, their decay starts at the first of m groups, however few there are."""
    settings = TifuSettings(groups=4, within_decay=0.5, group_decay=0.1)
    assert weights(2, settings) == pytest.approx([0.5 * 0.1**3 / 2, 0.1**2 / 2])


def test_without_decay_a_vector_is_the_mean_of_its_group_means() -> None:
    settings = TifuSettings(groups=3, within_decay=1.0, group_decay=1.0)
    for baskets in range(1, 30):
        assert sum(weights(baskets, settings)) == pytest.approx(1.0)


def shop_of(baskets: dict[int, list[list[int]]], log: ShopLog) -> Shop:
    """Customers with these baskets, one a day; items by their ids' numbers."""
    rows = [
        {"customer": customer, "item": item, "time": DAY * (1000 + day), "basket": f"{customer}/{day}"}
        for customer, visits in baskets.items()
        for day, visit in enumerate(visits)
        for item in visit
    ]
    events = pl.DataFrame(rows).select(
        pl.col("customer", "item").cast(pl.Int32),
        pl.lit(0, pl.Int8).alias("kind"),
        "time",
        pl.lit(1.0, pl.Float32).alias("quantity"),
        pl.lit(1.0, pl.Float32).alias("price"),
        "basket",
    )
    made = ShopLog(
        customer_ids=[f"c{customer:03d}" for customer in baskets],
        item_ids=log.item_ids,
        events=events,
        items=log.items,
        attributes={},
        campaigns=log.campaigns,
    )
    return pipeline.prepare(made)


@pytest.fixture
def alike(tiny_shop_log: ShopLog) -> Shop:
    """Customers 0 and 1 buy alike, but only 1 buys item 7; 2 and 3 buy other things. Item 30 is bought most often: it
    is the first of those that a ranking gives no score."""
    return shop_of(
        {
            0: [[1, 2], [1, 2], [1], [2]],
            1: [[1, 2, 7], [1, 2], [1, 7], [2]],
            2: [[11], [12], [11], [12]],
            3: [[30]] * 10,
        },
        tiny_shop_log,
    )


def purchases(shop: Shop, customers: list[int], day: float) -> Purchases:
    chosen = np.array(customers, np.int32)
    return Purchases(shop.histories, chosen, np.full(len(chosen), DAY * (1000 + day)), len(shop.items.row_item))


def named(shop: Shop, rows: np.ndarray) -> list[int]:
    return [int(shop.items.row_item[row]) for row in rows]


def test_a_vector_adds_the_weights_of_the_baskets_with_the_item(alike: Shop) -> None:
    settings = TifuSettings(groups=2, within_decay=0.5, group_decay=0.25)
    vector = purchases(alike, [1], 4).vectors(settings).toarray()[0]
    of = {int(item): vector[row] for row, item in enumerate(alike.items.row_item)}
    w = [0.125 * 0.25 / 4, 0.25 * 0.25 / 4, 0.5 / 4, 1.0 / 4]
    assert of[1] == pytest.approx(w[0] + w[1] + w[2])
    assert of[2] == pytest.approx(w[0] + w[1] + w[3])
    assert of[7] == pytest.approx(w[0] + w[2])
    assert of[11] == 0.0


def test_a_vector_knows_nothing_of_what_comes_later(alike: Shop) -> None:
    settings = TifuSettings(groups=2, within_decay=0.5, group_decay=0.25)
    early = purchases(alike, [1], 1).vectors(settings).toarray()[0]
    items = {int(alike.items.row_item[row]) for row in np.flatnonzero(early)}
    assert items == {1, 2, 7}
    assert early[early > 0].tolist() == pytest.approx([0.25] * 3)


def test_the_neighbour_brings_what_the_customer_never_bought(alike: Shop) -> None:
    pool = purchases(alike, [0, 1, 2, 3], 4)
    near = TifuSettings(neighbours=1, groups=2, within_decay=1.0, group_decay=1.0, own_share=0.7)
    ranked = named(alike, tifu_ranking(purchases(alike, [0], 4), pool, near)[0])
    assert set(ranked[:2]) == {1, 2} and ranked[2] == 7
    alone = TifuSettings(neighbours=1, groups=2, within_decay=1.0, group_decay=1.0, own_share=1.0)
    ranked = named(alike, tifu_ranking(purchases(alike, [0], 4), pool, alone)[0])
    assert set(ranked[:2]) == {1, 2} and ranked[2] == 30


def test_nobody_is_their_own_neighbour(alike: Shop) -> None:
    """Customer 1's own vector is nearest to itself; left out, the neighbour is 0, who does not have item 7."""
    pool = purchases(alike, [0, 1, 2, 3], 4)
    others = TifuSettings(neighbours=1, groups=2, within_decay=1.0, group_decay=1.0, own_share=0.0)
    ranked = named(alike, tifu_ranking(purchases(alike, [1], 4), pool, others)[0])
    assert set(ranked[:2]) == {1, 2} and ranked[2] == 30


def test_a_pool_smaller_than_the_neighbours_is_all_of_them(alike: Shop) -> None:
    pool = purchases(alike, [1, 2], 4)
    many = TifuSettings(neighbours=900, groups=2, within_decay=1.0, group_decay=1.0, own_share=0.0)
    ranked = named(alike, tifu_ranking(purchases(alike, [0], 4), pool, many)[0])
    assert set(ranked[:5]) == {1, 2, 7, 11, 12}
