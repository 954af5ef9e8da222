"""Whether a customer buys an item for the first time: a small net on what the own items say of each other item.

    value(i) = out . relu(W f_i + b) + out_bias

is the log-odds of the item i, not bought before, beside everything that the customer has bought already, f_i its
features: how strongly the own items draw it, as they do over the whole log and as those of its latest newcomers did,
how many own items are of its product type, and how the shop's customers take to the item. It depends on which items
the customer owns, not on when they were bought. Weighted, it is the goes-with term of a score. numpy only.

One call costs items x (2 R + U (O + 2)) multiplications for R factors, U units and O features of own items; the part of
the net that reads the items alone is computed once. Training gives at most 100,000 items a row, which bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shoplm.readout.tensors import Read, check_shapes, whole

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

OWN_FEATURES: tuple[str, ...] = ("strength", "strength_lately", "log_own_of_type", "log_own")
ITEM_FEATURES: tuple[str, ...] = (
    "log_purchases",
    "log_purchases_28d",
    "log_purchases_7d",
    "log_buyers",
    "log_first_purchases_28d",
    "log_first_purchases_14d",
    "log_first_purchases_7d",
    "loyalty",
    "log_days_since_first_sold",
    "log_buyers_of_type",
    "log_first_purchases_of_type_28d",
)
_PLAIN = ("items", "types", "weight", "bias", "out")
_IN_STEPS = ("factors", "lately")
_STEPS = 127  # of 8 bits, either way


@dataclass(frozen=True)
class Adopt:
    """The net, and the shop's part of its features."""

    items: Floats  # [items, I], in order of ITEM_FEATURES
    types: NDArray[np.int32]  # [items]: product types
    factors: Floats  # [items, R]: items draw each other by the products of their factors
    lately: Floats  # [items, R]: the factors by which the latest first purchases were drawn
    weight: Floats  # [U, O + I], for OWN_FEATURES, then ITEM_FEATURES
    bias: Floats  # [U]
    out: Floats  # [U]
    out_bias: float

    def __post_init__(self) -> None:
        items, units = len(self.items), len(self.bias)
        shapes = {
            "items": (self.items.shape, (items, len(ITEM_FEATURES))),
            "types": (self.types.shape, (items,)),
            "factors": (self.factors.shape, (items, self.factors.shape[-1])),
            "lately": (self.lately.shape, self.factors.shape),
            "weight": (self.weight.shape, (units, len(OWN_FEATURES) + len(ITEM_FEATURES))),
            "out": (self.out.shape, (units,)),
        }
        check_shapes("adopt", shapes)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def _of_items(self) -> Floats:
        """[items, U]: what the units read of the items alone."""
        units: Floats = (self.items @ self.weight[:, len(OWN_FEATURES) :].T + self.bias).astype(np.float32)
        return units

    def values(self, own: Integers, rows: Integers | None = None) -> Floats:
        """Log-odds of `rows`, all items where None, for a customer who bought the items `own` (each once, not
        empty): [rows]. Those of own items mean nothing."""
        units = own_features(self.factors, self.lately, self.types, own, rows) @ self.weight[:, : len(OWN_FEATURES)].T
        units += self._of_items if rows is None else self._of_items[rows]
        np.maximum(units, 0.0, out=units)
        result: Floats = (units @ self.out + self.out_bias).astype(np.float32)
        return result

    def sources(self, item: int, own: Integers, count: int) -> Integers:
        """At most `count` of the `own` items that draw `item` most, the strongest first."""
        strengths = self.factors[own] @ self.factors[item]
        order = np.lexsort((own, -strengths))[:count]
        result: Integers = own[order[strengths[order] > 0.0]]
        return result


def own_features(
    factors: Floats, lately: Floats, types: NDArray[np.int32], own: Integers, rows: Integers | None
) -> Floats:
    """OWN_FEATURES of `rows`, all items where None: [rows, O]."""
    profile = factors[own].sum(axis=0) / np.float32(np.sqrt(len(own)))
    at = slice(None) if rows is None else rows
    kind = types[at]
    found = np.empty((len(kind), len(OWN_FEATURES)), np.float32)
    np.matmul(factors[at], profile, out=found[:, 0])
    np.matmul(lately[at], profile, out=found[:, 1])
    found[:, 2] = np.log1p(np.bincount(types[own], minlength=int(types.max()) + 1)).astype(np.float32)[kind]
    found[:, 3] = np.log1p(len(own))
    return found


def in_steps(values: Floats) -> tuple[NDArray[np.int8], Floats]:
    """`values` [items, R] as whole steps, of the size that each row's largest value asks for: [items, R], [items]."""
    size = (np.abs(values).max(axis=1, initial=0.0) / _STEPS).astype(np.float32)
    return np.rint(values / np.where(size > 0.0, size, 1.0)[:, None]).astype(np.int8), size


def from_steps(steps: NDArray[np.int8], size: Floats) -> Floats:
    """What `in_steps` has kept of its values."""
    return steps * np.asarray(size, np.float32)[:, None]


def adopt_arrays(adopt: Adopt) -> dict[str, NDArray[Any]]:
    """The tensors that a bundle stores. The factors are rounded to 8 bits."""
    found = {name: getattr(adopt, name) for name in _PLAIN}
    for name in _IN_STEPS:
        found[name], found[f"{name}_step"] = in_steps(getattr(adopt, name))
    found["out_bias"] = np.array([adopt.out_bias], np.float32)
    return {f"adopt.{name}": np.ascontiguousarray(array) for name, array in found.items()}


def adopt_of(read: Read) -> Adopt | None:
    """Read the net of a bundle; None where it has none. Raises ValueError where the tensors do not fit together."""
    found = whole(read, "adopt", (*_PLAIN, *_IN_STEPS, *(f"{each}_step" for each in _IN_STEPS), "out_bias"))
    if found is None:
        return None
    for name in _IN_STEPS:
        steps, size = found[name], found.pop(f"{name}_step")
        check_shapes("adopt", {f"{name}_step": (size.shape, steps.shape[:1])})
        found[name] = from_steps(steps, size)
    types, out_bias = found.pop("types").astype(np.int32), float(found.pop("out_bias")[0])
    return Adopt(**{name: each.astype(np.float32) for name, each in found.items()}, types=types, out_bias=out_bias)
