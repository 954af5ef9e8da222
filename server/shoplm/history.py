"""A customer's history in the form that prompts, scores and heads read: one row per event, oldest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS_PER_DAY = 86_400.0


def utc_day(seconds: float) -> str:
    """The ISO 8601 date of a moment in Unix seconds."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def utc_moment(seconds: float) -> str:
    """RFC 3339 of a moment in Unix seconds: whole seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class EventKind(IntEnum):
    """What happened; the order is the canonical order inside a basket."""

    PURCHASE = 0
    CART = 1
    VIEW = 2
    RETURN = 3


EVENT_KINDS: Mapping[str, EventKind] = {kind.name.lower(): kind for kind in EventKind}  # as files name them
MAX_ATTRIBUTES, MAX_ATTRIBUTE_BYTES = 64, 256  # of a customer's profile
MAX_VISIT_SECONDS = SECONDS_PER_DAY  # from a visit's first event to its last


@dataclass(frozen=True, slots=True)
class History:
    """Events sorted by (time, basket, kind, item), all before or at `as_of`. Arrays of one length [E].

    An event's item is either a row of the catalogue (`item` >= 0 where `has_item`) or, for items too rare to have a
    token of their own, a product type (`item` indexes the types where `has_item` is False).
    """

    item: NDArray[np.int32]
    has_item: NDArray[np.bool_]
    kind: NDArray[np.int8]  # EventKind
    time: NDArray[np.float64]  # Unix seconds, UTC
    quantity: NDArray[np.float32]
    price: NDArray[np.float32]  # of one unit; NaN where unknown
    basket: NDArray[np.int32]  # 0, 1, 2, … in order of time
    as_of: float  # Unix seconds, UTC
    attributes: tuple[tuple[str, str], ...] = field(default=())  # known profile attributes, sorted by name
    counted: EventKind = EventKind.PURCHASE  # what the shop recommends, and counts of a customer's own

    def __post_init__(self) -> None:
        count = len(self.item)
        for name in ("has_item", "kind", "time", "quantity", "price", "basket"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"History.{name} has {len(getattr(self, name))} entries for {count} events")

    def __len__(self) -> int:
        return len(self.item)

    def before(self, moment: float) -> History:
        """The history as it was at `moment` (Unix seconds): events strictly earlier, `as_of` = moment."""
        return replace(self, **self.columns(self.time < moment), as_of=moment)

    def columns(self, keep: NDArray[np.bool_]) -> dict[str, Any]:
        """Every array, by name, at the events where `keep` [E] is set; basket numbers as they are."""
        names = ("item", "has_item", "kind", "time", "quantity", "price", "basket")
        return {name: getattr(self, name)[keep] for name in names}

    @property
    def item_keys(self) -> NDArray[np.int64]:
        """[E]: equal where events are of the same item, or of the same product type."""
        return 2 * self.item.astype(np.int64) + self.has_item

    @property
    def own(self) -> NDArray[np.bool_]:
        """[E]: events that make an item of the catalogue the customer's own."""
        own: NDArray[np.bool_] = self.has_item & (self.kind == self.counted)
        return own

    def own_counts(self, decay_days: float) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Distinct item rows of `counted` events, purchases, and their decayed counts, sums of exp(-age / decay_days).

        Returns (rows [U] ascending, counts [U]). Age is measured from `as_of`.
        """
        own = self.own
        age_days = np.maximum(self.as_of - self.time[own], 0.0) / SECONDS_PER_DAY
        rows, inverse = np.unique(self.item[own], return_inverse=True)
        counts = np.bincount(inverse, weights=np.exp(-age_days / decay_days), minlength=len(rows))
        return rows.astype(np.int32), counts.astype(np.float32)


def build_history(
    item: NDArray[np.int32],
    has_item: NDArray[np.bool_],
    kind: NDArray[np.int8],
    time: NDArray[np.float64],
    quantity: NDArray[np.float32],
    price: NDArray[np.floating],
    basket_key: list[str] | NDArray[np.str_] | NDArray[np.int64],
    as_of: float,
    attributes: tuple[tuple[str, str], ...] = (),
    counted: EventKind = EventKind.PURCHASE,
) -> History:
    """Sort raw events of one customer into a History; the one way that training and serving both make one.

    `basket_key` groups events into visits; an empty string means: the visit of that UTC day. Events of one key that
    come more than MAX_VISIT_SECONDS after a visit's first are another visit. A basket happens at the time of its
    earliest event: its events are kept together, and the order does not depend on the order given.
    """
    count = len(item)
    days = np.floor(time / SECONDS_PER_DAY).astype(np.int64)
    keys = np.asarray([f"k{key}" if str(key) else f"d{day}" for key, day in zip(basket_key, days, strict=True)])
    _, group = np.unique(keys, return_inverse=True) if count else (None, np.zeros(0, np.int64))
    first = _first_times(group, time)
    if (time - first[group] > MAX_VISIT_SECONDS).any():
        group = _split_visits(group, time, first)
        first = _first_times(group, time)
    # Item rows before product types, then ascending: canonical, so the same basket gives the same tokens.
    order = (
        np.lexsort((price, quantity, item, ~has_item, kind, group, first[group])) if count else np.zeros(0, np.int64)
    )
    ordered = group[order]
    basket = np.cumsum(np.concatenate([[0], ordered[1:] != ordered[:-1]])) if count else np.zeros(0, np.int64)
    return History(
        item=item[order].astype(np.int32),
        has_item=has_item[order].astype(np.bool_),
        kind=kind[order].astype(np.int8),
        time=first[ordered],
        quantity=quantity[order].astype(np.float32),
        price=price[order].astype(np.float32),
        basket=basket.astype(np.int32),
        as_of=as_of,
        attributes=tuple(sorted(attributes)),
        counted=counted,
    )


def _first_times(group: NDArray[np.int64], time: NDArray[np.float64]) -> NDArray[np.float64]:
    """The time of the earliest event of each group."""
    first = np.full(int(group.max()) + 1 if len(group) else 0, np.inf)
    np.minimum.at(first, group, time)
    return first


def _split_visits(group: NDArray[np.int64], time: NDArray[np.float64], first: NDArray[np.float64]) -> NDArray[np.int64]:
    """`group` [E], with groups of their own for what comes too late for the visit before it."""
    late = np.zeros(len(first), np.bool_)
    late[group[time - first[group] > MAX_VISIT_SECONDS]] = True
    rows = np.flatnonzero(late[group])
    rows = rows[np.lexsort((time[rows], group[rows]))]
    visits, count = group.copy(), len(first)
    current, begun, visit = -1, 0.0, 0
    for row, key, moment in zip(rows.tolist(), group[rows].tolist(), time[rows].tolist(), strict=True):
        if key != current:
            current, begun, visit = key, moment, key
        elif moment - begun > MAX_VISIT_SECONDS:
            begun, visit, count = moment, count, count + 1
        visits[row] = visit
    return visits
