"""Who waits and may give way to cheaper requests, the most work first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoplm.lazy_heap import LazyHeap

if TYPE_CHECKING:
    from shoplm.scheduler.sequence import Sequence


class Dearest:
    """Requests by the work until the first result, as it was when they began to wait."""

    def __init__(self) -> None:
        self._heap: LazyHeap[Sequence] = LazyHeap(lambda _, sequence: not sequence.queued_tokens)

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, sequence: Sequence, waiting: int) -> None:
        """A request begins to wait, beside so many others; its work is known."""
        self._heap.trim(waiting)
        self._heap.push(-sequence.work_seconds, sequence)

    def peek(self) -> Sequence | None:
        """The dearest that still waits."""
        first = self._heap.first()
        return None if first is None else first[1]
