"""Dense features: finite for every history, exact where they can be checked by hand, blind to the future."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shoplm.features import FEATURE_NAMES, dense_features, event_amounts, kinds_in
from shoplm.history import SECONDS_PER_DAY, EventKind, History, build_history

DAY = SECONDS_PER_DAY
PRICES = np.array([2.0, np.nan, 5.0, 1.0])


def history(
    events: list[tuple[float, int]], as_of: float = 100.0, *, price: float | None = None, quantity: float = 1.0
) -> History:
    """Purchases of (day, item row), one basket a day."""
    count = len(events)
    return build_history(
        item=np.array([item for _, item in events], np.int32),
        has_item=np.ones(count, bool),
        kind=np.zeros(count, np.int8),
        time=np.array([day * DAY for day, _ in events], np.float64),
        quantity=np.full(count, quantity, np.float32),
        price=np.full(count, np.nan if price is None else price, np.float32),
        basket_key=[""] * count,
        as_of=as_of * DAY,
    )


def named(known: History) -> dict[str, float]:
    return dict(zip(FEATURE_NAMES, dense_features(known, PRICES).tolist(), strict=True))


def test_there_is_a_value_for_every_name_and_names_are_unique() -> None:
    values = dense_features(history([(1.0, 0)]), PRICES)
    assert values.dtype == np.float32
    assert values.shape == (len(FEATURE_NAMES),) == (len(set(FEATURE_NAMES)),)


def test_recency_frequency_and_money_of_a_small_history() -> None:
    values = named(history([(60.0, 0), (85.0, 2), (85.0, 3), (95.0, 0)]))
    assert np.isclose(values["log_recency_days"], np.log1p(5.0))
    assert np.isclose(values["log_tenure_90d"], np.log1p(40.0))
    assert np.isclose(values["log_visits_7d"], np.log1p(1))
    assert np.isclose(values["log_visits_30d"], np.log1p(2))
    assert np.isclose(values["log_visits_180d"], np.log1p(3))
    assert np.isclose(values["log_items_30d"], np.log1p(3))
    assert np.isclose(values["log_spend_30d"], np.log1p(5.0 + 1.0 + 2.0))
    assert np.isclose(values["log_spend_180d"], np.log1p(10.0))
    assert np.isclose(values["log_median_gap_days"], np.log1p(17.5))
    assert np.isclose(values["log_last_gap_days"], np.log1p(10.0))
    assert np.isclose(values["share_of_gaps_below_recency"], 0.0)
    assert np.isclose(values["share_of_repeated_items_180d"], 0.25)
    assert values["recency_above_3d"] == 1.0
    assert values["recency_above_7d"] == 0.0


def test_a_customer_who_goes_on_as_ever_looks_the_same_however_long_the_log_is() -> None:
    """What grows with the log's age is its date, which heads would learn."""
    every_week = [(float(day), day // 7 % 4) for day in range(7, 1000, 7)]
    young, old = (
        named(history([event for event in every_week if event[0] < end], as_of=end)) for end in (399.0, 987.0)
    )
    assert all(np.isclose(young[name], old[name], atol=0.03) for name in FEATURE_NAMES), {
        name: (young[name], old[name]) for name in FEATURE_NAMES if not np.isclose(young[name], old[name], atol=0.03)
    }


def test_average_features_tell_which_kinds_there_were() -> None:
    usual = dict.fromkeys(FEATURE_NAMES, 0.0) | {"log_visits_30d": 1.0}
    assert kinds_in(list(usual.values())) == ()
    assert kinds_in(list((usual | {"log_carts_30d": 0.1}).values())) == (EventKind.CART,)
    assert kinds_in([1.0] * len(FEATURE_NAMES)) == (EventKind.VIEW, EventKind.CART, EventKind.RETURN)


def test_the_price_paid_comes_before_the_listed_one_and_unknown_ones_count_nothing() -> None:
    np.testing.assert_allclose(event_amounts(history([(1.0, 0), (2.0, 1), (3.0, 2)]), PRICES), [2.0, 0.0, 5.0])
    np.testing.assert_allclose(event_amounts(history([(1.0, 0)], price=0.5, quantity=4.0), PRICES), [2.0])


def test_the_customers_own_rhythm_shows_in_the_return_probabilities() -> None:
    weekly = named(history([(float(day), 0) for day in range(1, 100, 7)]))
    monthly = named(history([(float(day), 0) for day in range(9, 100, 30)]))
    assert weekly["own_return_probability_7d"] > 0.8 > 0.4 > monthly["own_return_probability_7d"]
    assert monthly["own_return_probability_30d"] > 0.7


@st.composite
def histories(draw: st.DrawFn) -> History:
    count = draw(st.integers(0, 12))

    def column(values: st.SearchStrategy[float]) -> NDArray[np.float64]:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), np.float64)

    has_item = column(st.booleans()) > 0
    item = column(st.integers(0, 3))
    price = column(st.one_of(st.just(float("nan")), st.floats(0, 1e9)))
    return build_history(
        item=item.astype(np.int32),
        has_item=has_item,
        kind=column(st.sampled_from([int(kind) for kind in EventKind])).astype(np.int8),
        time=column(st.floats(0, 1e9)),
        quantity=column(st.floats(0, 1e9)).astype(np.float32),
        price=price.astype(np.float32),
        basket_key=[str(int(key)) for key in column(st.integers(0, 4))],
        as_of=draw(st.floats(1e9, 2e9)),
    )


@settings(max_examples=200)
@given(histories())
def test_every_history_gives_finite_features(known: History) -> None:
    assert np.isfinite(dense_features(known, PRICES)).all()


@settings(max_examples=50)
@given(histories(), st.floats(0, 1e9))
def test_what_comes_later_changes_nothing(known: History, moment: float) -> None:
    earlier = known.before(moment)
    keep = known.time < moment
    alone = build_history(
        known.item[keep],
        known.has_item[keep],
        known.kind[keep],
        known.time[keep],
        known.quantity[keep],
        known.price[keep],
        [str(key) for key in known.basket[keep]],
        as_of=moment,
    )
    np.testing.assert_allclose(dense_features(earlier, PRICES), dense_features(alone, PRICES), rtol=1e-5, atol=1e-5)
