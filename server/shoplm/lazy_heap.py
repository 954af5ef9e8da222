"""A heap that nobody is taken out of the middle of: who has gone is dropped later."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

_SLACK_ENTRIES = 64

Item = TypeVar("Item")


def mostly_gone(entries: int, present: int) -> bool:
    """Whether so many entries for so many items that are still there are worth a walk over all of them."""
    return entries > 2 * present + _SLACK_ENTRIES


class LazyHeap(Generic[Item]):
    """Items by a key, the smallest first, of equal ones the first that came.

    Entries of items that have gone are dropped when they come up, or once they are the larger part.
    """

    def __init__(self, has_gone: Callable[[float, Item], bool]) -> None:
        """`has_gone` tells whether an entry, of this key and item, counts no more."""
        self._has_gone = has_gone
        self._heap: list[tuple[float, int, Item]] = []
        self._tie = count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, key: float, item: Item) -> None:
        """Add an item that is there."""
        heapq.heappush(self._heap, (key, next(self._tie), item))

    def first(self) -> tuple[float, Item] | None:
        """Key and item of the first that is still there."""
        while self._heap and self._has_gone(self._heap[0][0], self._heap[0][2]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def pop(self) -> None:
        """Take out whom `first` has just returned."""
        heapq.heappop(self._heap)

    def trim(self, present: int) -> None:
        """Drop who has gone, if these are the larger part beside so many that are still there."""
        if mostly_gone(len(self._heap), present):
            self._heap = [entry for entry in self._heap if not self._has_gone(entry[0], entry[2])]
            heapq.heapify(self._heap)
