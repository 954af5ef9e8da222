"""Arrival times and customers of the load: seeded, Poisson, in the stated ratio."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from shoplm.bench.plan import LoadSettings, drawn_arrivals
from shoplm.bench.workload import NEW_CUSTOMERS_AS_OF, Shop, WorkloadError, make_customers, read_histories, request_for
from shoplm.request import Service
from shoplm.simulate.trace import parse_mix
from shoplm.v1 import model_pb2, shop_pb2


def test_arrivals_are_a_poisson_process_in_the_stated_mix() -> None:
    settings = LoadSettings(rate=50, seconds=190, warmup_seconds=10, customers=8, seed=7)
    arrivals = drawn_arrivals(settings, 8)
    gaps = [later.seconds - earlier.seconds for earlier, later in itertools.pairwise(arrivals)]
    mean = math.fsum(gaps) / len(gaps)
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    # 10,000 gaps: their mean is known to 1 %, so 5 % is five standard errors; exponential gaps have mean = deviation.
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)
    share = sum(arrival.service is Service.RECOMMENDATION for arrival in arrivals) / len(arrivals)
    assert share == pytest.approx(0.6, abs=0.03)
    assert {arrival.customer for arrival in arrivals} == set(range(8))
    assert all(arrival.measured == (arrival.seconds >= 10) for arrival in arrivals)


def test_the_seed_decides_everything() -> None:
    settings = LoadSettings(seconds=30, seed=3)
    assert drawn_arrivals(settings, 5) == drawn_arrivals(settings, 5)
    assert drawn_arrivals(settings, 5) != drawn_arrivals(LoadSettings(seconds=30, seed=4), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0}, "rate=0"),
        ({"rate": math.nan}, "rate=nan"),
        ({"seconds": 5000}, "seconds=5000"),
        ({"rate": 10_000, "seconds": 60}, "more than 200000 requests"),
        ({"mix": {Service.CHAT: 0.0}}, "mix="),
        ({"new_customer_share": 1.5}, "new_customer_share=1.5"),
        ({"customers": 0}, "customers=0"),
    ],
)
def test_impossible_loads_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadSettings(**arguments)


def test_mix_is_parsed() -> None:
    assert parse_mix("chat=1, prediction=0.5") == {Service.CHAT: 1.0, Service.PREDICTION: 0.5}
    with pytest.raises(ValueError, match="'search' is not one of"):
        parse_mix("search=1")
    with pytest.raises(ValueError, match="'chat' is not SERVICE=WEIGHT"):
        parse_mix("chat")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Two customers of 40 events in baskets of four, read from a bundle's table."""
    rows = [
        {
            "customer_id": customer,
            "item_id": f"item-{(number * 7) % 30}",
            "type": "purchase",
            "time": datetime(2017, 1 + number // 8, 1 + number // 4, tzinfo=UTC),
            "quantity": 1.0,
            "price": 2.5,
            "basket_id": f"basket-{number // 4}",
        }
        for customer in ("one", "two")
        for number in range(40)
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "customers.parquet")
    histories = read_histories(tmp_path / "customers.parquet")
    items = tuple(event.item_id for events in histories.values() for event in events)
    return Shop(model_pb2.GetModelResponse(demo_customer_ids=["one", "two"]), histories, items)


def test_returning_customers_have_prefixes_of_real_histories_in_whole_baskets(shop: Shop) -> None:
    customers = make_customers(shop, LoadSettings(customers=20, new_customer_share=0.0))
    assert len({len(customer.events) for customer in customers}) > 3
    for customer in customers:
        full = shop.histories[customer.customer_id]
        assert tuple(customer.events) == full[: len(customer.events)]
        assert len(customer.events) % 4 == 0
        assert customer.as_of.seconds > customer.events[-1].time.seconds


def test_the_longest_new_history_ends_where_it_should(shop: Shop) -> None:
    """A long history reaches further back, not into the future, which a server refuses."""
    event = next(iter(shop.histories.values()))[0]
    shop = replace(shop, histories={"much": (event,) * 3000})
    for customer in make_customers(shop, LoadSettings(customers=8, new_customer_share=1.0)):
        times = [each.time.seconds for each in customer.events]
        assert min(times) > 0 and times == sorted(times) and max(times) < customer.as_of.seconds
        assert NEW_CUSTOMERS_AS_OF <= customer.as_of.seconds < NEW_CUSTOMERS_AS_OF + 365 * 86_400


def test_new_customers_share_no_prefix_and_have_real_lengths(shop: Shop) -> None:
    settings = LoadSettings(customers=20, new_customer_share=1.0)
    customers = make_customers(shop, settings)
    starts = {tuple(event.item_id for event in customer.events[:4]) for customer in customers}
    assert len(starts) == 20
    assert {len(customer.events) for customer in customers} == {40}
    assert {event.item_id for customer in customers for event in customer.events} <= set(shop.item_ids)
    assert customers == make_customers(shop, settings)


def test_requests_are_about_the_arrival_s_customer(shop: Shop) -> None:
    settings = LoadSettings(rate=20, customers=4, count=7, chat_tokens=9)
    customers = make_customers(shop, settings)
    for arrival in drawn_arrivals(settings, 4)[:50]:
        request = request_for(arrival, customers, settings)
        assert request.customer == customers[arrival.customer]
        if arrival.service is Service.CHAT:
            assert request.max_tokens == 9
        if arrival.service is Service.RECOMMENDATION:
            assert request.count == 7


def test_without_a_bundle_demo_ids_stand_for_their_histories() -> None:
    shop = Shop(model_pb2.GetModelResponse(demo_customer_ids=["one"]), {}, ("milk",))
    customers = make_customers(shop, LoadSettings(customers=2, new_customer_share=0.0))
    assert customers == (shop_pb2.Customer(customer_id="one"),) * 2


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"customers\.parquet"):
        read_histories(tmp_path / "customers.parquet")
