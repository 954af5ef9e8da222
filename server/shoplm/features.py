"""What a customer's events say in numbers: recency, frequency, money, rhythm. Inputs of the prediction heads.

One function for training and serving, on numpy alone. Amounts and counts go in as log(1 + x), so that a shop's currency
and size matter little. Visits are baskets with a purchase; the moment that ages are measured from is `history.as_of`.

The date itself is no feature: training sees a handful of cut-offs, on which a weekday or season is only their number.
Nor is what grows with it, such as how long the log has known the customer, or all that was ever bought: heads would
take it for the date, and each day of serving would lie further from what they were fitted on. Hence windows, of half a
year at most, and rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from shoplm.history import SECONDS_PER_DAY, EventKind, History

FEATURE_VERSION = 2  # changes whenever the meaning or order of a feature does; a bundle fits one version

_WINDOWS = (7, 14, 30, 60, 90, 180)  # days
_ITEM_WINDOWS = (30, 90, 180)  # days
_SPEND_WINDOWS = (7, 30, 90, 180)  # days
_REPEAT_DAYS = 180
_RECENCY_STEPS = (3, 7, 14, 21, 30, 60)  # days
_HORIZONS = (7, 14, 30)  # days
_WEEKS = (4, 12, 26)
_KNOWN_DAYS = 90  # tells newcomers from others; what is longer is the log's age
_LONGEST_DAYS = 365.0  # that ages count; stands for "never", too
_PRIOR_GAPS = 2.0  # how many imagined gaps the estimates from a customer's own gaps begin with
_PRIOR_GAP_DAYS = 14.0
_OTHER_KINDS = (EventKind.VIEW, EventKind.CART, EventKind.RETURN)

FEATURE_NAMES: tuple[str, ...] = (
    "log_recency_days",
    "log_event_recency_days",
    f"log_tenure_{_KNOWN_DAYS}d",
    *(f"log_visits_{days}d" for days in _WINDOWS),
    *(f"log_items_{days}d" for days in _ITEM_WINDOWS),
    *(f"log_spend_{days}d" for days in _SPEND_WINDOWS),
    "log_visits_per_30d",
    "log_spend_per_30d",
    "log_mean_gap_days",
    "log_median_gap_days",
    "log_gap_deviation_days",
    "log_last_gap_days",
    "log_recency_over_gap",
    "share_of_gaps_below_recency",
    *(f"own_return_probability_{days}d" for days in _HORIZONS),
    *(f"memoryless_return_probability_{days}d" for days in _HORIZONS),
    *(f"recency_above_{days}d" for days in _RECENCY_STEPS),
    *(f"share_of_weeks_active_{weeks}w" for weeks in _WEEKS),
    "visit_trend_30d",
    "spend_trend_30d",
    "log_items_per_visit",
    "log_spend_per_visit",
    "log_spend_deviation_per_visit",
    "log_last_spend",
    f"share_of_repeated_items_{_REPEAT_DAYS}d",
    "share_of_weekend_visits",
    *(f"log_{kind.name.lower()}s_30d" for kind in _OTHER_KINDS),
)

# What the features speak of, for explanations: the beginnings of their names. Each belongs to the first that fits.
FEATURE_GROUPS: dict[str, tuple[str, ...]] = {
    "how long ago the last visit was": ("log_recency", "log_event_recency", "recency_above", "share_of_gaps_below"),
    "the usual time between visits": (
        "log_mean_gap",
        "log_median_gap",
        "log_gap",
        "log_last_gap",
        "own_",
        "memoryless_",
    ),
    "how much is spent": ("log_spend", "log_last_spend", "spend_trend"),
    "how many items are bought": ("log_items", "share_of_repeated"),
    "how often and since when the customer comes": ("log_visits", "log_tenure", "share_of", "visit_trend"),
    "what was looked at, put into the cart or returned": ("log_view", "log_cart", "log_return"),
}


def feature_groups() -> dict[str, tuple[int, ...]]:
    """Group -> its features, by their place in FEATURE_NAMES."""
    groups: dict[str, list[int]] = {group: [] for group in FEATURE_GROUPS}
    for index, name in enumerate(FEATURE_NAMES):
        groups[next(group for group, starts in FEATURE_GROUPS.items() if name.startswith(starts))].append(index)
    return {group: tuple(members) for group, members in groups.items()}


def kinds_in(usual: Sequence[float]) -> tuple[EventKind, ...]:
    """Kinds of events beside purchases that customers had of whom these [F] are the average features."""
    return tuple(kind for kind, mean in zip(_OTHER_KINDS, usual[-len(_OTHER_KINDS) :], strict=True) if mean > 0)


def dense_features(history: History, item_prices: NDArray[np.floating]) -> NDArray[np.float32]:
    """float32 [F], aligned with FEATURE_NAMES; finite for every history, the empty one included.

    `item_prices` [rows] (NaN unknown) stand in for prices that events do not name; what stays unknown counts as 0.
    """
    bought = history.kind == EventKind.PURCHASE
    age = np.maximum(history.as_of - history.time, 0.0) / SECONDS_PER_DAY
    visits = _Visits.of(history, bought, age, item_prices)
    late = bought & (age <= _REPEAT_DAYS)
    lines = history.item[late].astype(np.int64) * 2 + history.has_item[late]
    recency = min(float(visits.age[-1]), _LONGEST_DAYS) if len(visits.age) else _LONGEST_DAYS
    tenure = float(age.max()) if len(age) else 0.0
    values = [
        np.log1p(recency),
        np.log1p(min(float(age.min()), _LONGEST_DAYS) if len(age) else _LONGEST_DAYS),
        np.log1p(min(tenure, _KNOWN_DAYS)),
        *(np.log1p(visits.count(days)) for days in _WINDOWS),
        *(np.log1p(visits.items[visits.age <= days].sum()) for days in _ITEM_WINDOWS),
        *(np.log1p(visits.money(days)) for days in _SPEND_WINDOWS),
        np.log1p(30.0 * len(visits.age) / max(tenure, 30.0)),
        np.log1p(30.0 * visits.spend.sum() / max(tenure, 30.0)),
        *_rhythm(visits.age, recency, tenure),
        *(float(recency > days) for days in _RECENCY_STEPS),
        *(len(np.unique(visits.age[visits.age < 7 * weeks] // 7)) / weeks for weeks in _WEEKS),
        _trend(visits.count(30), visits.count(60)),
        _trend(visits.money(30), visits.money(60)),
        np.log1p(visits.items.mean()) if len(visits.age) else 0.0,
        np.log1p(visits.spend.mean()) if len(visits.age) else 0.0,
        np.log1p(visits.spend.std()) if len(visits.age) else 0.0,
        np.log1p(visits.spend[-1]) if len(visits.age) else 0.0,
        1.0 - len(np.unique(lines)) / len(lines) if len(lines) else 0.0,
        float((_weekday(visits.time) >= 5).mean()) if len(visits.age) else 0.0,
        *(np.log1p(((history.kind == kind) & (age <= 30)).sum()) for kind in _OTHER_KINDS),
    ]
    return np.asarray(values, np.float32)


class _Visits:
    """Baskets with a purchase, oldest first: arrays [visits]."""

    def __init__(
        self,
        time: NDArray[np.float64],
        age: NDArray[np.float64],
        items: NDArray[np.float64],
        spend: NDArray[np.float64],
    ) -> None:
        self.time = time  # Unix seconds
        self.age = age  # days
        self.items = items  # lines
        self.spend = spend

    @classmethod
    def of(
        cls,
        history: History,
        bought: NDArray[np.bool_],
        age: NDArray[np.float64],
        item_prices: NDArray[np.floating],
    ) -> _Visits:
        if not bought.any():
            none = np.zeros(0)
            return cls(none, none, none, none)
        _, first, visit = np.unique(history.basket[bought], return_index=True, return_inverse=True)
        amounts = event_amounts(history, item_prices)[bought]
        spend = np.bincount(visit, weights=amounts).astype(np.float64)
        return cls(history.time[bought][first], age[bought][first], np.bincount(visit).astype(np.float64), spend)

    def count(self, days: float) -> int:
        return int((self.age <= days).sum())

    def money(self, days: float) -> float:
        return float(self.spend[self.age <= days].sum())


def event_amounts(history: History, item_prices: NDArray[np.floating]) -> NDArray[np.float64]:
    """quantity x price of each event [E]; the item's own price where the event names none, 0 where nobody knows."""
    price = history.price.astype(np.float64)
    unknown = np.isnan(price)
    if unknown.any():
        listed = np.full(len(price), np.nan)
        listed[history.has_item] = np.asarray(item_prices, np.float64)[history.item[history.has_item]]
        price = np.where(unknown, listed, price)
    return np.nan_to_num(price * history.quantity.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _rhythm(age: NDArray[np.float64], recency: float, tenure: float) -> list[float]:
    """How a customer's own gaps between visits compare with the time since the last one."""
    gaps = np.maximum(age[:-1] - age[1:], 0.0)
    # A few imagined gaps of usual length keep the estimates of new customers sane.
    mean = (float(gaps.sum()) + _PRIOR_GAPS * _PRIOR_GAP_DAYS) / (len(gaps) + _PRIOR_GAPS)
    median = float(np.median(gaps)) if len(gaps) else _PRIOR_GAP_DAYS
    longer = int((gaps > recency).sum())
    own = [
        (int(((gaps > recency) & (gaps <= recency + days)).sum()) + _PRIOR_GAPS * (1.0 - float(np.exp(-days / mean))))
        / (longer + _PRIOR_GAPS)
        for days in _HORIZONS
    ]
    # The rate of a memoryless customer who was last seen at the end of the tenure: sensible for single visits too.
    rate = (len(age) + 0.5) / (tenure + _PRIOR_GAP_DAYS)
    return [
        float(np.log1p(mean)),
        float(np.log1p(median)),
        float(np.log1p(gaps.std())) if len(gaps) else 0.0,
        float(np.log1p(gaps[-1])) if len(gaps) else float(np.log1p(_PRIOR_GAP_DAYS)),
        float(np.log1p(recency / (mean + 1.0))),
        float((gaps < recency).mean()) if len(gaps) else 0.5,
        *own,
        *(1.0 - float(np.exp(-rate * days)) for days in _HORIZONS),
    ]


def _trend(recent: float, both: float) -> float:
    """log ratio of a window to the one before it, the sums of one and of both given."""
    return float(np.log1p(recent) - np.log1p(max(both - recent, 0.0)))


def _weekday(time: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 Monday … 6 Sunday, UTC: the epoch was a Thursday."""
    result: NDArray[np.float64] = (np.floor(time / SECONDS_PER_DAY) + 3) % 7
    return result
