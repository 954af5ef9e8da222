"""What customers did after a moment: the only place that looks ahead, and it says how far it looked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.features import event_amounts
from shoplm.history import SECONDS_PER_DAY, EventKind, History


@dataclass(frozen=True, slots=True)
class NextBasket:
    """The first basket at or after a moment."""

    time: float  # Unix seconds
    rows: NDArray[np.int32]  # distinct catalogue rows in it, ascending; empty where none has a row


def next_basket(history: History, moment: float, kind: EventKind, before: float) -> NextBasket | None:
    """The first basket with an event of `kind` in [moment, before); None where there is none."""
    wanted = (history.kind == kind) & (history.time >= moment) & (history.time < before)
    if not wanted.any():
        return None
    first = int(np.flatnonzero(wanted)[0])
    inside = wanted & (history.basket == history.basket[first]) & history.has_item
    return NextBasket(float(history.time[first]), np.unique(history.item[inside]).astype(np.int32))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Purchases of a customer in the days after a moment."""

    delay_days: float  # until the first one; infinite where there is none within the longest horizon
    visits: int  # baskets within the longest horizon
    spend: float  # within the longest horizon


def behaviour(history: History, moment: float, horizon_days: int, item_prices: NDArray[np.floating]) -> Behaviour:
    """What the customer bought in [moment, moment + horizon)."""
    until = moment + horizon_days * SECONDS_PER_DAY
    inside = (history.kind == EventKind.PURCHASE) & (history.time >= moment) & (history.time < until)
    if not inside.any():
        return Behaviour(float("inf"), 0, 0.0)
    return Behaviour(
        delay_days=float(history.time[inside].min() - moment) / SECONDS_PER_DAY,
        visits=len(np.unique(history.basket[inside])),
        spend=float(event_amounts(history, item_prices)[inside].sum()),
    )
