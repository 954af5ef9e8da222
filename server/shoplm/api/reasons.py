"""Why an item was recommended: the exact terms of its score, each with a sentence for a person."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from shoplm.history import EventKind, History, utc_day
from shoplm.request import SelectOutput
from shoplm.v1 import recommendation_pb2

Reason = recommendation_pb2.Reason


def reasons(
    selected: SelectOutput, index: int, history: History, sources: Sequence[str], *, is_read: bool
) -> list[recommendation_pb2.Reason]:
    """The terms of the item at `index` of the selection; they add up to its score. `sources` are the titles of the own
    items that it goes with, the strongest first; a term that is 0 for want of any is not listed. `is_read`: the model
    has read the history."""
    model, repeat, popularity = selected.model[index], selected.repeat[index], selected.popularity[index]
    popularity += 0.0  # a weight of 0 gives -0.0, which would be read as a loss
    near = selected.goes_with[index]
    listed = [Reason(kind=Reason.KIND_GOES_WITH, contribution=near, text=_near_text(near, sources))] if near else []
    return [
        Reason(kind=Reason.KIND_MODEL, contribution=model, text=_model_text(model, is_read)),
        Reason(kind=Reason.KIND_REPEAT, contribution=repeat, text=repeat_text(selected.items[index], history)),
        Reason(kind=Reason.KIND_POPULARITY, contribution=popularity, text=_popularity_text(popularity)),
        *listed,
    ]


def _model_text(log_probability: float, is_read: bool) -> str:
    if not is_read:
        return "the model has no history to read"
    return f"the model expects it next with a probability of {100 * math.exp(min(log_probability, 0.0)):.2g} %"


_VERBS = {EventKind.PURCHASE: "bought", EventKind.CART: "put into the cart", EventKind.VIEW: "looked at"}


def repeat_text(row: int, history: History) -> str:
    """How often and when last the customer bought the item, in visits and UTC dates."""
    bought = history.own & (history.item == row)
    verb = _VERBS[history.counted]
    if not bought.any():
        return f"not {verb} before"
    visits = len(np.unique(history.basket[bought]))
    last = utc_day(float(history.time[bought].max()))
    return f"{verb} once, on {last}" if visits == 1 else f"{verb} {visits} times, last on {last}"


def _near_text(contribution: float, sources: Sequence[str]) -> str:
    *others, last = sources or ["the customer's purchases"]
    named = f"{', '.join(others)} and {last}" if others else last
    if contribution < 0:  # what is new to the customer is less likely than what is not, and some of it less than other
        return f"new to the customer, goes best with {named}"
    return f"goes with {named}" + (", bought before" if sources else "")


def _popularity_text(contribution: float) -> str:
    if contribution == 0:
        return "its popularity in the shop does not count"
    return f"its popularity in the shop {'adds' if contribution > 0 else 'takes away'} {abs(contribution):.2f}"
