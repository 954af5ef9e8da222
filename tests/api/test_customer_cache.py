"""Reading a customer again gives what reading it anew would."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from served_shop import ShopFolders
from shoplm.api.caller import Caller, caller
from shoplm.api.customer_cache import Memo, Read, RecentCustomers
from shoplm.api.customers import CustomerReader
from shoplm.api.validation import Violations
from shoplm.api.warnings import Warnings
from shoplm.history import History
from shoplm.model.base import resolve_base
from shoplm.served import load_served
from shoplm.v1 import shop_pb2
from tiny_shop import DEMO_CUSTOMER, item_id

NOW = 1_500_000_000


class Reader:
    """A reader whose clock is set by hand."""

    def __init__(self, folders: ShopFolders, max_events: int = 100) -> None:
        self.now = float(NOW)
        served = load_served(resolve_base(str(folders.base)), folders.bundle)
        self.reader = CustomerReader(served.shop, max_events, lambda: self.now)

    def __call__(self, customer: shop_pb2.Customer) -> tuple[History, list[tuple[str, int]]]:
        violations, warnings = Violations(), Warnings()
        history = self.reader.read(customer, violations, warnings)
        violations.raise_if_any()
        return history, [(each.code, each.count) for each in warnings.messages()]


@pytest.fixture
def reader(shop_folders: ShopFolders) -> Reader:
    return Reader(shop_folders)


def customer(*ages: int, as_of: int | None = None) -> shop_pb2.Customer:
    """Events this many seconds before NOW; negative ages are in the future. One id in three is unknown."""
    return shop_pb2.Customer(
        customer_id="c",
        attributes={"age": "35-44", "shoe size": "9"},
        events=[
            shop_pb2.Event(item_id=item_id(n) if n % 3 else "unknown", time=Timestamp(seconds=NOW - age))
            for n, age in enumerate(ages)
        ],
        as_of=None if as_of is None else Timestamp(seconds=as_of),
    )


def same(one: History, other: History) -> bool:
    arrays = ("item", "has_item", "kind", "time", "quantity", "price", "basket")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "price") for name in arrays)
    return equal and (one.as_of, one.attributes) == (other.as_of, other.attributes)


@pytest.mark.parametrize("as_of", [None, NOW - 50, NOW + 1000])
def test_a_second_reading_is_the_first(shop_folders: ShopFolders, reader: Reader, as_of: int | None) -> None:
    message = customer(5000, 400, 300, 200, 100, as_of=as_of)
    first, warned = reader(message)
    reader.now += 60
    again, warned_again = reader(message)
    fresh = Reader(shop_folders)
    fresh.now = reader.now
    assert same(again, fresh(message)[0])
    assert warned_again == warned == fresh(message)[1] != []
    assert again.time is first.time  # and nothing was computed for it
    assert again.as_of == (float(as_of) if as_of else NOW + 60)


def test_the_calls_of_a_moment_share_a_history_and_later_ones_do_not(reader: Reader) -> None:
    message = customer(400, 300)
    first = reader(message)[0]
    reader.now += 0.5
    assert reader(message)[0] is first  # and so does what is computed of it
    reader.now += 0.5
    later = reader(message)[0]
    assert (first.as_of, later.as_of) == (NOW, NOW + 1)
    reader.now += 0.5
    assert reader(message)[0] is later


def test_an_event_of_the_future_counts_once_it_has_happened(reader: Reader) -> None:
    message = customer(400, 300, -30)
    before, warned = reader(message)
    assert ("FUTURE_EVENT", 1) in warned
    reader.now += 60
    after, warned = reader(message)
    assert len(after) == len(before) + 1
    assert "FUTURE_EVENT" not in dict(warned)


def test_a_clock_that_is_set_back_reads_anew(reader: Reader) -> None:
    message = customer(400, 300, 10)
    assert len(reader(message)[0]) == 2
    reader.now -= 60
    history, warned = reader(message)
    assert (len(history), dict(warned)["FUTURE_EVENT"]) == (1, 1)


def test_histories_over_the_limit_are_read_anew(shop_folders: ShopFolders) -> None:
    reader = Reader(shop_folders, max_events=2)
    message = customer(400, 300, 200)
    assert reader(message)[0].time is not reader(message)[0].time


def test_a_demo_customer_is_read_once(reader: Reader) -> None:
    message = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
    assert reader(message)[0] is reader(message)[0]


def test_tenants_share_nothing(reader: Reader) -> None:
    message = customer(400, 300)
    mine = reader(message)[0]
    token = caller.set(Caller("other"))
    try:
        assert reader(message)[0].time is not mine.time
    finally:
        caller.reset(token)


def test_the_oldest_go_when_there_are_too_many_events(reader: Reader) -> None:
    recent = RecentCustomers(max_events=350)
    history = reader(customer(400, 300))[0]
    for name in (b"a", b"b", b"c"):
        recent.put(name, Read(history, {}, True))
    recent.put(b"c", Read(history, {}, True))  # again: counted once
    assert recent.get(b"a", NOW) is not None
    recent.put(b"d", Read(history, {}, True))
    assert [recent.get(name, NOW) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


def test_a_memo_tells_arguments_apart_by_identity() -> None:
    calls: list[object] = []

    def count(argument: list[int]) -> int:
        calls.append(argument)
        return len(calls)

    memo = Memo(count, lambda argument: argument, size=2)
    one, equal, third = [1], [1], [1]
    assert [memo(one), memo(equal), memo(one), memo(third), memo(one), memo(equal)] == [1, 2, 1, 3, 1, 4]
