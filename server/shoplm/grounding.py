"""What chat may answer from: the shop's texts, its catalogue and the customer's own purchases, found by their words."""

from __future__ import annotations

import re

import numpy as np
from shoplm.catalog.items import Catalog
from shoplm.history import History
from shoplm.retrieval import Knowledge, Passage, habits_passage, item_passage

MAX_HABITS = 5
_MAX_ITEMS = 2
_CANDIDATES = 50  # of the catalogue, before whole names are compared
_WORD = re.compile(r"\w+")
_HABIT_WORDS = frozenset(("bought", "buy", "favorite", "favourite", "often", "purchases", "usual", "usually"))
_OWN_WORDS = frozenset(("i", "my", "me"))


class Grounding:
    """Finds passages for a question. Safe to share: it is not changed after construction."""

    def __init__(self, knowledge: Knowledge, catalog: Catalog, currency: str, decay_days: float) -> None:
        """`decay_days` weighs a customer's purchases, as in recommendations."""
        self._knowledge = knowledge
        self._catalog = catalog
        self._decay_days = decay_days
        # Of several items with one title the first row speaks; a title stands for no more than its words.
        rows: dict[str, int] = {}
        for row, title in enumerate(catalog.titles):
            if title.strip() and np.isfinite(catalog.prices[row]):
                rows.setdefault(title, row)
        self._items = Knowledge(
            [
                item_passage(title, catalog.categories[row], float(catalog.prices[row]), currency)
                for title, row in rows.items()
            ]
        )

    def search(self, question: str, history: History, count: int) -> list[Passage]:
        """At most `count` passages, the surest kind first: own purchases, items that are named, the shop's texts."""
        found = [*self._habits(question, history), *self._named_items(question)[: max(count - 1, 0)]]
        return (found + self._knowledge.search(question, count))[:count]

    def habits(self, history: History) -> list[Passage]:
        """What the customer buys most; nothing where nothing is known."""
        rows, counts = history.own_counts(self._decay_days)
        best = rows[np.argsort(-counts, kind="stable")].tolist()
        titles = list(dict.fromkeys(self._catalog.titles[row].split(",")[0] for row in best))[:MAX_HABITS]
        return [habits_passage(titles)] if titles else []

    def _habits(self, question: str, history: History) -> list[Passage]:
        words = set(_words(question))
        return self.habits(history) if words & _HABIT_WORDS and words & _OWN_WORDS else []

    def _named_items(self, question: str) -> list[Passage]:
        """Items whose name, the title up to its first comma, is in the question word for word; longest names first."""
        asked = f" {' '.join(_words(question))} "
        named: list[tuple[int, Passage]] = []
        for passage in self._items.search(question, _CANDIDATES):
            name = f" {' '.join(_words(passage.title.split(',')[0]))} "
            if name in asked:
                named.append((len(name), passage))
        named.sort(key=lambda pair: -pair[0])
        return [passage for _, passage in named[:_MAX_ITEMS]]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
