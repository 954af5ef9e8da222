"""What chat may answer from: the shop's texts, its catalogue and the customer's own purchases, found by their words."""

from __future__ import annotations

import itertools
import math
import re
from typing import TypeVar

import numpy as np
from shoplm.catalog.items import Catalog, ItemFacts
from shoplm.history import History
from shoplm.retrieval import ITEMS_SOURCE, Knowledge, Passage, WordIndex, habits_passage

MAX_HABITS = 5
_MAX_ITEMS = 2  # of one name
_MAX_NAME_WORDS = 16
_MAX_TRIED = 16  # of names that share a word with the question
_LEAST_TITLE_WORDS = 2  # a title of one word may be any word of a question
_WORD = re.compile(r"\w+")
_HABIT_WORDS = frozenset(("bought", "favorite", "favourite", "most", "often", "purchases", "usual", "usually"))
_OWN_WORDS = frozenset(("i", "my", "me"))
# Words that ask for an item, and name none.
_ASKING = """aisle available buy carry category cheap cost costs department expensive find get got keep like look
looking much need offer please price prices sell shelf shop show sold stock store today want"""

Words = tuple[str, ...]
Found = TypeVar("Found")


class Grounding:
    """Finds passages for a question. Safe to share: it is not changed after construction."""

    def __init__(self, knowledge: Knowledge, catalog: Catalog, currency: str, decay_days: float) -> None:
        """`decay_days` weighs a customer's purchases, as in recommendations."""
        self._knowledge = knowledge
        self._catalog = catalog
        self._currency = currency
        self._decay_days = decay_days
        # By place: the items of the rows, and behind them the rare ones, which are not recommended.
        rows = zip(catalog.titles, catalog.categories, catalog.prices.tolist(), catalog.in_stock.tolist(), strict=True)
        self._facts = [*itertools.starmap(ItemFacts, rows), *catalog.rare_facts]
        self._titles: dict[Words, int] = {}  # of several items with one title the first speaks
        self._names: dict[Words, list[int]] = {}  # a name is a title up to its first comma
        for place, item in enumerate(self._facts):
            words = _words(item.title)
            if words and words not in self._titles and math.isfinite(item.price):
                self._titles[words] = place
                places = self._names.setdefault(_words(item.title.split(",")[0]), [])
                if len(places) < _MAX_ITEMS:
                    places.append(place)
        self._places_of_names = [(" ".join(name), places) for name, places in self._names.items()]  # as indexed
        self._index = WordIndex([name for name, _ in self._places_of_names]) if self._names else None
        self._asking = frozenset(self._index.words(_ASKING)) if self._index is not None else frozenset[str]()

    def search(self, question: str, history: History | None, count: int) -> list[Passage]:
        """At most `count` passages, the surest first: an item whose whole title is in the question stands alone; else
        the customer's purchases, items by their names, and the shop's texts. Where no name is in the question, an item
        counts whose name holds all that the question asks for (`gasoline` finds `Gasoline-reg unleaded`). Where the
        items hold all of that, texts that share no more than words such as `sell` with the question are left out."""
        words = _words(question)
        titled = _find(words, self._titles, _LEAST_TITLE_WORDS)
        if titled:
            return [self.item(place) for place in titled][:count]
        wanted = self._wanted(question)
        by_name = _find(words, self._names, 1) or self._worded(wanted)
        places = [place for same in by_name for place in same][:_MAX_ITEMS]
        whole = self._hold(places, wanted)
        habits = [] if history is None else self._habits(words, history)
        found = [*habits, *[self.item(place, is_wanted=whole) for place in places][: max(count - 1, 0)]]
        texts = self._knowledge.search(question, count, aside=self._asking if whole else frozenset())
        return (found + texts)[:count]

    def _wanted(self, question: str) -> list[str]:
        """Stems of the question's words that could name an item."""
        return [] if self._index is None else [w for w in self._index.asked(question) if w not in self._asking]

    def _hold(self, places: list[int], wanted: list[str]) -> bool:
        """Whether there are items, and each of these words stands in the title of one of them."""
        titles = " ".join(self._facts[place].title for place in places)
        return self._index is not None and bool(places) and self._index.holds(titles, wanted)

    def _worded(self, wanted: list[str]) -> list[list[int]]:
        """Places of the names that hold all of these words, the closest first."""
        index = self._index
        if index is None or not wanted or index.known(wanted) != wanted:
            return []
        best = np.argsort(-index.scores(wanted), kind="stable")[:_MAX_TRIED].tolist()
        tried = [self._places_of_names[at] for at in best]
        return [places for name, places in tried if index.holds(name, wanted)]

    def habits(self, history: History) -> list[Passage]:
        """What the customer buys most; nothing where nothing is known."""
        rows, counts = history.own_counts(self._decay_days)
        best = rows[np.argsort(-counts, kind="stable")].tolist()
        titles = list(dict.fromkeys(self._catalog.titles[row].split(",")[0] for row in best))[:MAX_HABITS]
        return [habits_passage(titles)] if titles else []

    def _habits(self, words: Words, history: History) -> list[Passage]:
        asked = set(words)
        return self.habits(history) if asked & _HABIT_WORDS and asked & _OWN_WORDS else []

    @property
    def rows_with_facts(self) -> list[int]:
        """Rows of the items that have a title of their own and a price."""
        return [row for row in self._titles.values() if row < len(self._catalog)]

    def rows_of_name(self, name: str) -> list[int]:
        """Items whose title begins with this name, up to its first comma; the first few in the catalogue's order."""
        return self._names[_words(name)]

    def item(self, place: int, *, is_wanted: bool = True) -> Passage:
        """What the catalogue says of the item at a place: a row, or behind the last row a rare item.

        Unless it `is_wanted`, the question asks for more than the item is, as for `train tickets` where there are
        `Tickets`. That what is wanted is sold is said in so many words: a small model that has learnt to decline what
        is not sold does not conclude it from a price."""
        item = self._facts[place]
        facts = ["yes, we sell it"] if is_wanted else []
        facts += [] if item.in_stock else ["but it is out of stock" if is_wanted else "out of stock"]
        facts += [f"category {item.category}", f"price {item.price:.2f} {self._currency}"]
        return Passage(ITEMS_SOURCE, item.title, ", ".join(facts))


def _find(words: Words, known: dict[Words, Found], least: int) -> list[Found]:
    """Values of the keys of at least so many words that stand in `words`, longest first; no word counts twice."""
    found: list[Found] = []
    used: set[int] = set()
    for length in range(min(_MAX_NAME_WORDS, len(words)), least - 1, -1):
        for start in range(len(words) - length + 1):
            value = known.get(words[start : start + length])
            if value is not None and used.isdisjoint(range(start, start + length)):
                used.update(range(start, start + length))
                found.append(value)
    return found


def _words(text: str) -> Words:
    return tuple(_WORD.findall(text.lower()))
