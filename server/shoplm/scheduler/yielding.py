"""Who makes room in a full queue: of a tenant's requests that wait, the lowest priority first and the newest of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoplm.lazy_heap import mostly_gone

if TYPE_CHECKING:
    from shoplm.scheduler.sequence import Sequence


@dataclass(slots=True)
class _Level:
    """Those of one priority."""

    requests: int = 0
    tokens: int = 0
    newest: list[Sequence] = field(default_factory=list)  # the latest comer last; some of them wait no more


class Yielding:
    """A tenant's requests that wait to run for the first time, by priority."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def enter(self, sequence: Sequence) -> None:
        """A request begins to wait; what it counts in the queue is known."""
        level = self._levels.setdefault(sequence.request.priority, _Level())
        level.requests += 1
        level.tokens += sequence.queued_tokens
        if mostly_gone(len(level.newest), level.requests):
            level.newest = [each for each in level.newest if each.queued_tokens]
        level.newest.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is about to wait no more."""
        level = self._levels[sequence.request.priority]
        level.requests -= 1
        level.tokens -= sequence.queued_tokens
        if not level.requests:
            del self._levels[sequence.request.priority]

    def first(self) -> Sequence:
        """Who makes room first, where somebody waits."""
        newest = self._levels[min(self._levels)].newest
        while not newest[-1].queued_tokens:
            newest.pop()
        return newest[-1]

    def below(self, priority: int) -> tuple[int, int]:
        """Requests of lower priority, and their tokens."""
        lower = [level for each, level in self._levels.items() if each < priority]
        return sum(level.requests for level in lower), sum(level.tokens for level in lower)
