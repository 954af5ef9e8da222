"""Lost causes: requests that cannot make their deadline any more, the one that was lost first coming first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from shoplm.lazy_heap import LazyHeap
from shoplm.scheduler.sequence import Sequence


class Deadlines:
    """A heap by the moment at which a request becomes a lost cause.

    The moment moves while the request is computed, so it is looked at again when it comes. Entries of requests that
    have ended are dropped once they are the larger part: a far deadline holds nobody's memory.
    """

    def __init__(self, moment: Callable[[Sequence], float | None]) -> None:
        """`moment` tells when a request will be lost if nothing more is computed of it; None: never, from now on."""
        self._moment = moment
        self._heap: LazyHeap[Sequence] = LazyHeap(lambda _, sequence: sequence.ended)
        self._alive = 0

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, sequence: Sequence) -> None:
        """Begin to watch a request."""
        if not _may_be_lost(sequence):
            return
        self._alive += 1
        moment = self._moment(sequence)
        self._heap.push(math.inf if moment is None else moment, sequence)

    def forget(self, sequence: Sequence) -> None:
        """A request has ended."""
        if not _may_be_lost(sequence):
            return
        self._alive -= 1
        self._heap.trim(self._alive)

    def lost(self, now: float) -> Iterator[Sequence]:
        """The requests that are lost at `now`; each must be ended before the next is asked for."""
        while (first := self._heap.first()) is not None and first[0] <= now:
            self._heap.pop()
            sequence = first[1]
            moment = self._moment(sequence)
            if moment is not None and moment <= now:
                yield sequence
            elif moment is not None:
                self._heap.push(moment, sequence)


def _may_be_lost(sequence: Sequence) -> bool:
    return sequence.request.deadline_seconds is not None or sequence.limit_seconds is not None
