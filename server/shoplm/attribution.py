"""What moved an answer of the model: parts of the history, and the forks of a prompt that do not read them. numpy only.

The effect of a part is the answer with it less the answer without it. *Without* is fast: the part's keys are hidden
from the task's suffix, while the tokens behind the part keep what they read of it. What leaving the part out of the
history and computing all again would give is the truth that the evaluation compares with (`without`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from shoplm.catalog.items import Catalog
from shoplm.history import SECONDS_PER_DAY, History
from shoplm.prompt import Visit
from shoplm.request import Explain, HeadValues, ItemScores

Floats = NDArray[np.float64]


class PartKind(IntEnum):
    """What a part of a history is."""

    ITEM = 0
    CATEGORY = 1
    VISIT = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Events of a history, and the prompt's tokens that stand for them."""

    kind: PartKind
    events: tuple[int, ...]  # one for each visit and item: those that the prompt names; others like them are not listed
    spans: tuple[tuple[int, int], ...]  # [start, end), ascending and apart


def item_parts(history: History, visits: Sequence[Visit]) -> list[Part]:
    """Each item or product type of the prompt, wherever it is mentioned."""
    return _grouped(history, visits, PartKind.ITEM, lambda event: _item_of(history, event))


def category_parts(history: History, visits: Sequence[Visit], catalog: Catalog) -> list[Part]:
    """All items of a category; a product type is a category of its own."""

    def category(event: int) -> Hashable:
        known, item = _item_of(history, event)
        return catalog.categories[item] if known else item

    return _grouped(history, visits, PartKind.CATEGORY, category)


def visit_parts(visits: Sequence[Visit]) -> list[Part]:
    """Each visit of the prompt with all of its tokens."""
    return [
        Part(PartKind.VISIT, tuple(mention.event for mention in visit.mentions), ((visit.start, visit.end),))
        for visit in visits
        if visit.mentions
    ]


def likeliest(
    parts: Sequence[Part], history: History, most: int, related: Callable[[int], bool] | None = None
) -> list[Part]:
    """At most so many parts, those first that tend to matter: named often and lately, or `related` (by event)."""

    def weight(part: Part) -> float:
        age = (history.as_of - history.time[list(part.events)]) / SECONDS_PER_DAY
        total = float(np.exp(-age / _LATELY_DAYS).sum())
        return total * _RELATED if related is not None and any(map(related, part.events)) else total

    return sorted(parts, key=lambda part: (-weight(part), part.spans))[:most]


def forked(
    prompt: Sequence[int], prefix_tokens: int, parts: Sequence[Part], reads: ItemScores | HeadValues
) -> tuple[tuple[int, ...], Explain]:
    """The prompt with a fork that reads all of its prefix, and then one without each part; and the task."""
    suffix = tuple(prompt[prefix_tokens:])
    hidden = ((), *(part.spans for part in parts))
    return tuple(prompt[:prefix_tokens]) + suffix * len(hidden), Explain(len(suffix), hidden, reads)


def fork_values(values: Sequence[float], forks: int) -> Floats:
    """What each fork read: [forks, columns]."""
    return np.asarray(values, np.float64).reshape(forks, -1)


def without(history: History, gone: NDArray[np.bool_]) -> History:
    """The history as if the events [E] had not happened."""
    columns = {
        name: getattr(history, name)[~gone] for name in ("item", "has_item", "kind", "time", "quantity", "price")
    }
    _, basket = np.unique(history.basket[~gone], return_inverse=True)
    return History(**columns, basket=basket.astype(np.int32), as_of=history.as_of, attributes=history.attributes)


def events_of(history: History, part: Part, first_basket: int) -> NDArray[np.bool_]:
    """[E]: all events from `first_basket` on that the part stands for, those included that a prompt names once."""
    named = np.zeros(len(history), np.bool_)
    named[list(part.events)] = True
    if part.kind is PartKind.VISIT:
        found: NDArray[np.bool_] = np.isin(history.basket, history.basket[named])
        return found
    keys = 2 * history.item.astype(np.int64) + history.has_item
    return np.isin(keys, keys[named]) & (history.basket >= first_basket)


_LATELY_DAYS = 60.0  # the age at which a mention weighs 1 / e of one of today
_RELATED = 4.0  # how many times as much a part weighs that has to do with what is explained


def _item_of(history: History, event: int) -> tuple[bool, int]:
    return bool(history.has_item[event]), int(history.item[event])


def _grouped(history: History, visits: Sequence[Visit], kind: PartKind, key: Callable[[int], Hashable]) -> list[Part]:
    mentions = defaultdict(list)
    for visit in visits:
        for mention in visit.mentions:
            mentions[key(mention.event)].append(mention)
    return [
        Part(kind, tuple(each.event for each in found), _joined((each.start, each.end) for each in found))
        for found in mentions.values()
    ]


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
