"""Who waits and may give way to cheaper requests, the most work first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoplm.scheduler.sequence import Sequence

_SLACK_ENTRIES = 64


class Dearest:
    """A heap by the work until the first result, which does not change while a request waits. Entries of requests that
    wait no more are dropped when they come up, or once they are the larger part."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, sequence: Sequence, waiting: int) -> None:
        """A request begins to wait, beside so many others; its work is known."""
        if len(self._heap) > 2 * waiting + _SLACK_ENTRIES:
            self._heap = [entry for entry in self._heap if _waits(entry)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (-sequence.work_seconds, sequence.ticket, sequence))

    def peek(self) -> Sequence | None:
        """The dearest that still waits."""
        while self._heap and not _waits(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None


def _waits(entry: tuple[float, int, Sequence]) -> bool:
    return entry[2].queued_tokens > 0
