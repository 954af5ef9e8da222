"""What moved an answer: parts of the history, and the forks of a prompt that do without them. numpy only.

The effect of a part is the answer with it less the answer without it. Everything outside the model is computed exactly
without it: counts, dense features, the gap since the last visit. The model reads the history once: the part's keys are
hidden from the task's suffix, while the tokens behind the part keep what they read of it. What leaving the part out and
computing the whole history again would give is the truth that the evaluation compares with (`leave_out`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from shoplm.history import SECONDS_PER_DAY, History
from shoplm.prompt import Prefix, PromptBuilder, Visit
from shoplm.request import Explain, HeadValues, ItemScores

Floats = NDArray[np.float64]
Suffix = Callable[[History], tuple[int, ...]]  # PromptBuilder.recommend_suffix or .predict_suffix

_SAME_ITEM, _SAME_CATEGORY = 1000.0, 4.0  # how much more likely such a part is to matter than any other
_LATELY_DAYS = 60.0  # the age at which a mention weighs 1 / e of one of today


@dataclass(frozen=True, slots=True)
class Part:
    """An item wherever it occurs in a history, or a visit."""

    is_visit: bool
    events: tuple[int, ...]  # those that the prompt names, each item once a visit
    spans: tuple[tuple[int, int], ...]  # [start, end) of the prompt's tokens, ascending and apart


def item_parts(history: History, visits: Sequence[Visit]) -> list[Part]:
    """Each item or product type that the prompt names."""
    mentions = defaultdict(list)
    for visit in visits:
        for mention in visit.mentions:
            mentions[bool(history.has_item[mention.event]), int(history.item[mention.event])].append(mention)
    return [
        Part(False, tuple(each.event for each in found), _joined((each.start, each.end) for each in found))
        for found in mentions.values()
    ]


def visit_parts(visits: Sequence[Visit]) -> list[Part]:
    """Each visit that the prompt names, with all of its tokens."""
    return [
        Part(True, tuple(mention.event for mention in visit.mentions), ((visit.start, visit.end),))
        for visit in visits
        if visit.mentions
    ]


def likeliest(
    parts: Sequence[Part], history: History, most: int, weight: Callable[[int], float] = lambda event: 1.0
) -> list[Part]:
    """At most `most` parts, those first that tend to matter: named often and lately, times an event's `weight`."""

    def total(part: Part) -> float:
        age = (history.as_of - history.time[list(part.events)]) / SECONDS_PER_DAY
        return float(np.exp(-age / _LATELY_DAYS).sum()) * weight(part.events[-1])

    return sorted(parts, key=lambda part: (-total(part), part.spans))[:most]


def parts_for(
    rows: Sequence[int],
    history: History,
    visits: Sequence[Visit],
    categories: Sequence[str],
    *,
    items: int,
    lately: int,
) -> list[Part]:
    """What may have moved the scores of these items: at most so many items of the history, themselves and their
    categories' first, and so many of the latest visits. `categories` are all items'."""
    wanted = set(rows)
    near = {categories[row] for row in rows}

    def weight(event: int) -> float:
        if not history.has_item[event]:
            return 1.0
        row = int(history.item[event])
        return _SAME_ITEM if row in wanted else _SAME_CATEGORY if categories[row] in near else 1.0

    found = likeliest(item_parts(history, visits), history, items, weight)
    return found + likeliest(visit_parts(visits), history, lately)


def gone_with(history: History, parts: Iterable[Part]) -> NDArray[np.bool_]:
    """[E]: all events of these parts, those too that the prompt is too short to name."""
    gone = np.zeros(len(history), np.bool_)
    keys = history.item_keys
    for part in parts:
        events = list(part.events)
        of = history.basket if part.is_visit else keys
        gone |= np.isin(of, of[events])
    return gone


def leave_out(history: History, gone: NDArray[np.bool_]) -> History:
    """The history as if the events [E] had not happened."""
    columns = history.columns(~gone)
    _, basket = np.unique(columns["basket"], return_inverse=True)
    columns["basket"] = basket.astype(np.int32)
    return replace(history, **columns)


def prefix_without(builder: PromptBuilder, history: History, prefix: Prefix, gone: NDArray[np.bool_]) -> Prefix:
    """The prefix of the history without the events, of the same visits as `prefix`, the history's own: no older ones
    move up into the room that is left."""
    oldest = np.unique(history.basket)[prefix.dropped_baskets]
    dropped = len(np.unique(history.basket[~gone & (history.basket < oldest)]))
    return builder.prefix(leave_out(history, gone), dropped)


@dataclass(frozen=True)
class Forks:
    """The whole history, and then one without each part that is not all of it."""

    parts: tuple[Part, ...]
    histories: tuple[History, ...]  # one per fork: one more than parts
    tokens: tuple[int, ...]
    suffix_tokens: int

    @staticmethod
    def of(history: History, prefix: Prefix, parts: Sequence[Part], suffix: Suffix) -> Forks:
        """`suffix` gives what the task's prompt has behind a prefix."""
        kept, histories = [], [history]
        for part in parts:
            left = leave_out(history, gone_with(history, (part,)))
            if len(left):
                kept.append(part)
                histories.append(left)
        suffixes = list(map(suffix, histories))
        tokens = prefix.tokens + tuple(token for each in suffixes for token in each)
        return Forks(tuple(kept), tuple(histories), tokens, len(suffixes[0]))

    def repeated(self, count: int) -> Forks:
        """Add `count` forks of the whole history at the end."""
        nothing = Part(False, (), ())
        suffix = self.tokens[len(self.tokens) - self.suffix_tokens * len(self.histories) :][: self.suffix_tokens]
        return Forks(
            self.parts + (nothing,) * count,
            self.histories + (self.histories[0],) * count,
            self.tokens + suffix * count,
            self.suffix_tokens,
        )

    def task(self, reads: ItemScores | HeadValues) -> Explain:
        """What the engine is asked."""
        return Explain(self.suffix_tokens, ((), *(part.spans for part in self.parts)), reads)

    def values(self, read: Sequence[float]) -> Floats:
        """What the engine answered: [forks, columns]."""
        return np.asarray(read, np.float64).reshape(len(self.histories), -1)


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
