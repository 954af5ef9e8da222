"""Lost causes: requests that cannot make their deadline any more, the one that was lost first coming first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from itertools import count

from shoplm.scheduler.sequence import Sequence

_SLACK_ENTRIES = 64


class Deadlines:
    """A heap by the moment at which a request becomes a lost cause.

    The moment moves while the request is computed, so it is looked at again when it comes. Entries of requests that
    have ended are dropped once they are the larger part: a far deadline holds nobody's memory.
    """

    def __init__(self, moment: Callable[[Sequence], float | None]) -> None:
        """`moment` tells when a request will be lost if nothing more is computed of it; None: never, from now on."""
        self._moment = moment
        self._heap: list[tuple[float, int, Sequence]] = []
        self._tie = count()
        self._alive = 0

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, sequence: Sequence) -> None:
        """Begin to watch a request."""
        if not _may_be_lost(sequence):
            return
        self._alive += 1
        moment = self._moment(sequence)
        heapq.heappush(self._heap, (math.inf if moment is None else moment, next(self._tie), sequence))

    def forget(self, sequence: Sequence) -> None:
        """A request has ended."""
        if not _may_be_lost(sequence):
            return
        self._alive -= 1
        if len(self._heap) > 2 * self._alive + _SLACK_ENTRIES:
            self._heap = [entry for entry in self._heap if not entry[2].ended]
            heapq.heapify(self._heap)

    def lost(self, now: float) -> Iterator[Sequence]:
        """The requests that are lost at `now`; each must be ended before the next is asked for."""
        while self._heap and self._heap[0][0] <= now:
            _, _, sequence = heapq.heappop(self._heap)
            if sequence.ended:
                continue
            moment = self._moment(sequence)
            if moment is not None and moment <= now:
                yield sequence
            elif moment is not None:
                heapq.heappush(self._heap, (moment, next(self._tie), sequence))


def _may_be_lost(sequence: Sequence) -> bool:
    return sequence.request.deadline_seconds is not None or sequence.limit_seconds is not None
