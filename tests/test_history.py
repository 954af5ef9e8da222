"""A customer's history: one canonical order, nothing from the future, exact decayed counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoplm.history import SECONDS_PER_DAY, EventKind, History, build_history

DAY = SECONDS_PER_DAY
_COLUMNS = ("item", "has_item", "kind", "time", "quantity", "price", "basket")


def history(events: list[tuple[int, float, str]], as_of: float = 100 * DAY, kind: int = 0) -> History:
    """Purchases of (item row, day, basket id)."""
    return build_history(
        item=np.array([item for item, _, _ in events], np.int32),
        has_item=np.ones(len(events), bool),
        kind=np.full(len(events), kind, np.int8),
        time=np.array([day * DAY for _, day, _ in events], np.float64),
        quantity=np.ones(len(events), np.float32),
        price=np.ones(len(events), np.float32),
        basket_key=[basket for _, _, basket in events],
        as_of=as_of,
    )


def test_baskets_are_kept_together_in_order_of_their_first_event() -> None:
    built = history([(5, 2.25, "b"), (1, 1.0, "a"), (4, 1.5, "b"), (2, 1.75, "a")])
    assert built.basket.tolist() == [0, 0, 1, 1]
    assert built.item.tolist() == [1, 2, 4, 5]
    assert built.time.tolist() == [1.0 * DAY, 1.0 * DAY, 1.5 * DAY, 1.5 * DAY]


def test_events_without_a_basket_id_are_grouped_by_utc_day() -> None:
    built = history([(1, 1.1, ""), (2, 1.9, ""), (3, 2.0, "")])
    assert built.basket.tolist() == [0, 0, 1]


def test_a_visit_lasts_a_day_at_most() -> None:
    weekly = history([(week, 7.0 * week, "cart") for week in range(43)], as_of=400 * DAY)
    assert weekly.basket.tolist() == list(range(43))
    assert weekly.time.tolist() == [7.0 * week * DAY for week in range(43)]
    # A day after its first event, not after the last: 1.0 and 2.0 are one visit, 2.5 and 3.25 the next.
    built = history([(1, 1.0, "a"), (2, 2.0, "a"), (3, 2.5, "a"), (4, 3.25, "a"), (5, 2.25, "b"), (6, 2.0, "b")])
    assert built.item.tolist() == [1, 2, 5, 6, 3, 4]
    assert built.basket.tolist() == [0, 0, 1, 1, 2, 2]
    assert built.time.tolist() == [1.0 * DAY] * 2 + [2.0 * DAY] * 2 + [2.5 * DAY] * 2


def test_a_key_that_is_used_again_is_grouped_as_it_was_at_every_moment_before() -> None:
    events = [(day, day / 3, "cart") for day in range(30)]
    whole = history(events)
    for count in range(1, 30):
        part = history(events[:count])
        assert whole.time.tolist()[:count] == part.time.tolist()
        assert whole.basket.tolist()[:count] == part.basket.tolist()


def test_product_types_come_after_items_and_kinds_in_canonical_order() -> None:
    built = build_history(
        item=np.array([3, 1, 2], np.int32),
        has_item=np.array([True, False, True]),
        kind=np.array([EventKind.VIEW, EventKind.PURCHASE, EventKind.PURCHASE], np.int8),
        time=np.full(3, DAY),
        quantity=np.ones(3, np.float32),
        price=np.ones(3, np.float32),
        basket_key=["x"] * 3,
        as_of=2 * DAY,
    )
    assert list(zip(built.kind.tolist(), built.has_item.tolist(), built.item.tolist(), strict=True)) == [
        (EventKind.PURCHASE, True, 2),
        (EventKind.PURCHASE, False, 1),
        (EventKind.VIEW, True, 3),
    ]


@settings(max_examples=60)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 20).map(lambda n: n / 4), st.sampled_from(["", "a", "b"])),
        max_size=12,
    ),
    random=st.randoms(use_true_random=False),
)
def test_the_order_of_the_input_does_not_matter(events: list[tuple[int, float, str]], random: object) -> None:
    shuffled = list(events)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = history(events), history(shuffled)
    for name in _COLUMNS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_before_leaves_out_the_moment_itself() -> None:
    built = history([(1, 1.0, "a"), (2, 2.0, "b"), (3, 3.0, "c")])
    past = built.before(2.0 * DAY)
    assert past.item.tolist() == [1]
    assert past.as_of == 2.0 * DAY


def test_own_counts_decay_with_age_and_count_purchases_only() -> None:
    built = history([(7, 70.0, "a"), (7, 100.0, "b"), (3, 40.0, "c")])
    rows, counts = built.own_counts(decay_days=30.0)
    assert rows.tolist() == [3, 7]
    np.testing.assert_allclose(counts, [np.exp(-2.0), np.exp(-1.0) + 1.0], rtol=1e-6)
    rows, counts = history([(7, 70.0, "a")], kind=EventKind.VIEW).own_counts(30.0)
    assert len(rows) == len(counts) == 0


def test_an_empty_history_is_one() -> None:
    empty = history([])
    assert len(empty) == 0
    assert len(empty.before(DAY)) == 0


def test_columns_of_different_length_are_refused() -> None:
    whole = history([(1, 1.0, "a"), (2, 2.0, "b")])
    columns = {name: getattr(whole, name) for name in _COLUMNS}
    columns["price"] = columns["price"][:1]
    with pytest.raises(ValueError, match=r"History\.price has 1 entries for 2 events"):
        History(**columns, as_of=0.0)
