"""Whether a customer buys an item again: a small net on what the history says of each own item.

    value(i) = out . relu(W f_i + b) + out_bias

is the log-odds of the own item i beside everything that the customer has not bought yet, f_i its features: how often,
how lately and since when the item and its product type were bought, how the customer shops, and what the shop's
customers do with the item. Weighted, it is a part of the repeat term of a score. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import ShopManifest
from shoplm.history import SECONDS_PER_DAY, History
from shoplm.readout.tensors import Read, check_shapes, opened, whole

Floats = NDArray[np.float32]

_DECAYS = (7.0, 20.0, 60.0, 240.0)  # days
_TYPE_DECAY = 60.0  # days
_LEAST_UNITS, _MOST_UNITS = 0.25, 20.0  # per visit

HISTORY_FEATURES: tuple[str, ...] = (
    *(f"log_visits_decayed_{days:g}d" for days in _DECAYS),
    "log_visits",
    "log_days_since_last",
    "log_visits_since_last",
    "log_days_since_first",
    "log_visits_since_first",
    "log_units_per_visit",
    "log_type_visits_decayed",
    "log_type_visits",
    "log_type_days_since_last",
    "log_share_of_type",
    "log_customer_visits",
    "log_customer_days_since_last",
    "log_customer_mean_gap_days",
    "log_customer_items_per_visit",
    "log_customer_share_of_repeats",
)
ITEM_FEATURES: tuple[str, ...] = ("loyalty", "log_purchases", "log_purchases_lately", "log_usual_gap_days")
_TENSORS = ("items", "types", "weight", "bias", "out", "out_bias")


class OwnItems(NamedTuple):
    """What a customer bought: item rows, ascending and each once, and what is known of each."""

    items: tuple[int, ...]
    counts: tuple[float, ...]  # decayed
    terms: tuple[float, ...]  # weighted values of `Rebuy`; empty without one


@dataclass(frozen=True)
class Rebuy:
    """The net, and the shop's part of its features."""

    items: Floats  # [items, I], in order of ITEM_FEATURES
    types: NDArray[np.int32]  # [items]: product types
    weight: Floats  # [U, H + I], for HISTORY_FEATURES, then ITEM_FEATURES
    bias: Floats  # [U]
    out: Floats  # [U]
    out_bias: float

    def __post_init__(self) -> None:
        features, units = len(HISTORY_FEATURES) + len(ITEM_FEATURES), len(self.bias)
        shapes = {
            "items": (self.items.shape, (len(self.items), len(ITEM_FEATURES))),
            "types": (self.types.shape, (len(self.items),)),
            "weight": (self.weight.shape, (units, features)),
            "out": (self.out.shape, (units,)),
        }
        check_shapes("rebuy", shapes)

    def features(self, history: History) -> tuple[NDArray[np.int32], Floats]:
        """Own item rows [N], ascending, and their features [N, H + I]."""
        rows, values = history_features(history, self.types)
        return rows, np.concatenate((values, self.items[rows]), axis=1)

    def log_odds(self, features: Floats) -> Floats:
        """Log-odds [N] of items with these `features` [N, H + I]."""
        units = np.maximum(features @ self.weight.T + self.bias, 0.0)
        result: Floats = (units @ self.out + self.out_bias).astype(np.float32)
        return result

    def values(self, history: History) -> Floats:
        """Log-odds of each own item, in the order of `History.own_counts`: [N]."""
        return self.log_odds(self.features(history)[1])


def own_items(history: History, decay_days: float, rebuy: Rebuy | None, weight: float) -> OwnItems:
    """What scores read of the purchases in a history."""
    rows, counts = history.own_counts(decay_days)
    terms = [] if rebuy is None or not weight else (weight * rebuy.values(history)).tolist()
    return OwnItems(tuple(rows.tolist()), tuple(counts.tolist()), tuple(terms))


def history_features(history: History, types: NDArray[np.int32]) -> tuple[NDArray[np.int32], Floats]:
    """Distinct purchased item rows [N], ascending, and HISTORY_FEATURES of each [N, H]; `types` [items] are the items'
    product types."""
    bought = history.kind == history.counted
    has_item, item = history.has_item[bought], history.item[bought].astype(np.int64)
    if not has_item.any():
        return np.zeros(0, np.int32), np.zeros((0, len(HISTORY_FEATURES)), np.float32)
    _, first, visit = np.unique(history.basket[bought], return_index=True, return_inverse=True)
    age = np.maximum(history.as_of - history.time[bought][first], 0.0) / SECONDS_PER_DAY  # of each visit
    visits = len(age)
    back = np.arange(visits - 1.0, -1.0, -1.0)  # visits since
    rows, start, group, at = _grouped(item[has_item], visit[has_item], visits)
    last = np.append(start[1:], len(group)) - 1
    count = last - start + 1.0
    units = np.bincount(np.searchsorted(rows, item[has_item]), weights=history.quantity[bought][has_item])
    kind = item.copy()
    kind[has_item] = types[item[has_item]]
    known, type_start, type_group, type_at = _grouped(kind, visit, visits)
    type_last = np.append(type_start[1:], len(type_group)) - 1
    type_decayed = np.bincount(type_group, weights=np.exp(-age[type_at] / _TYPE_DECAY))
    own_type = np.searchsorted(known, types[rows])
    type_count = (type_last - type_start + 1.0)[own_type]
    customer = (
        np.log1p(visits),
        np.log1p(age[-1]),
        np.log1p((age[0] - age[-1]) / max(visits - 1, 1)),
        np.log1p(len(group) / visits),
        np.log((len(group) - len(rows) + 1.0) / (len(group) + 2.0)),
    )
    columns = [
        *(np.log1p(np.bincount(group, weights=np.exp(-age[at] / days))) for days in _DECAYS),
        np.log1p(count),
        np.log1p(age[at[last]]),
        np.log1p(back[at[last]]),
        np.log1p(age[at[start]]),
        np.log1p(back[at[start]]),
        np.log(np.clip(units / count, _LEAST_UNITS, _MOST_UNITS)),
        np.log1p(type_decayed[own_type]),
        np.log1p(type_count),
        np.log1p(age[type_at[type_last]][own_type]),
        np.log(count / type_count),
        *(np.full(len(rows), value) for value in customer),
    ]
    return rows.astype(np.int32), np.stack(columns, axis=1).astype(np.float32)


def _grouped(
    key: NDArray[np.int64], visit: NDArray[np.integer], visits: int
) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.intp], NDArray[np.int64]]:
    """Distinct keys, ascending, where each begins among the distinct (key, visit) pairs, and of each pair the key's
    index and the visit, oldest first within a key."""
    pairs = np.unique(key * visits + visit)
    keys, start, group = np.unique(pairs // visits, return_index=True, return_inverse=True)
    return keys, start, group, pairs % visits


def rebuy_of(read: Read) -> Rebuy | None:
    """Read the net of a bundle; None where it has none. Raises ValueError where the tensors do not fit together."""
    found = whole(read, "rebuy", _TENSORS)
    if found is None:
        return None
    types, out_bias = found.pop("types").astype(np.int32), float(found.pop("out_bias")[0])
    return Rebuy(**{name: each.astype(np.float32) for name, each in found.items()}, types=types, out_bias=out_bias)


def load_rebuy(bundle: Path, manifest: ShopManifest) -> Rebuy | None:
    """Load the net from a bundle's folder; None where it has none. Raises BundleError."""
    with opened(bundle) as (read, items):
        rebuy = rebuy_of(read)
        if rebuy is None and manifest.score.rebuy_weight:
            raise ValueError(f"rebuy_weight is {manifest.score.rebuy_weight}, but no rebuy tensors are there")
        if rebuy is not None and len(rebuy.items) != items:
            raise ValueError(f"rebuy.items is of {len(rebuy.items)} items, expected {items}")
    return rebuy
