"""The requests that run: they hold a state slot and pages, until they end or make room for others."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from shoplm.request import Generate
from shoplm.scheduler.answering import Answering
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.sequence import Sequence


class Residents:
    """Gives requests a state slot and pages, and takes them back."""

    def __init__(self, memory: SequenceMemory, state_slots: int) -> None:
        self.memory = memory
        self._state_slots = state_slots
        self._slots = list(range(state_slots - 1, -1, -1))
        self._running: dict[str, Sequence] = {}
        self._others: dict[Sequence, None] = {}
        self.answering = Answering(memory.page_size)

    def __len__(self) -> int:
        return len(self._running)

    def all(self) -> Collection[Sequence]:
        """In the order in which they were started."""
        return self._running.values()

    def others(self) -> Collection[Sequence]:
        """All but the answers that go on: prompts, searches, and whoever waits for a last result."""
        return self._others

    def begin_answer(self, sequence: Sequence) -> None:
        """Nothing but its answer is left to plan."""
        del self._others[sequence]
        self.answering.join(sequence)

    def start(self, sequence: Sequence) -> bool:
        """Let a request run, if there is a state slot and memory for it."""
        # After a preemption, results of its earlier life must be in before it may run again; and it comes back when
        # the answers that go on have room to grow, else the next page that one of them needs would be taken from it.
        if not self._slots or sequence.in_flight:
            return False
        if sequence.epoch and not self._has_room(sequence):
            return False
        if not self.memory.admit(sequence):
            return False
        sequence.state_slot = self._slots.pop()
        sequence.lacks_since = None
        self._running[sequence.request.request_id] = sequence
        self._others[sequence] = None
        return True

    def stop(self, sequence: Sequence) -> None:
        """Give back the state slot and the pages; what is known to be computed stays cached."""
        if sequence.state_slot is None:
            return
        # The newest token is never computed when its sequence ends, and a step in flight is not yet.
        safe = 0 if sequence.in_flight else min(sequence.computed, len(sequence.tokens))
        self.memory.release(sequence, safe)
        self._slots.append(sequence.state_slot)
        sequence.state_slot = None
        del self._running[sequence.request.request_id]
        self._others.pop(sequence, None)
        self.answering.leave(sequence)

    def make_room(self) -> Iterator[Sequence]:
        """Every answer that goes on gets the page of its next token; yields who was stopped for that.

        Whoever came last makes room. That never changes, so the first comer always gets on, and no two requests take
        each other's pages in turn. Comes before any row is planned, so that nobody who was stopped is in the step.
        """
        for sequence in self.answering.at_page_ends():
            while sequence.state_slot is not None and not self.memory.grow(sequence):
                victim = max(self._running.values(), key=_last_to_yield)
                self.stop(victim)
                victim.restart()
                yield victim

    def check(self) -> None:
        """Every page and state slot has exactly one owner, and sums are right; AssertionError says what is not."""
        self.memory.check(self._running.values())
        self.answering.check()
        slots = [*self._slots, *(sequence.state_slot for sequence in self._running.values())]
        assert len(slots) == len(set(slots)), "a state slot has two owners"
        assert len(slots) == self._state_slots, f"{self._state_slots - len(slots)} state slots have no owner"

    def _has_room(self, sequence: Sequence) -> bool:
        growing = sum(isinstance(each.request.task, Generate) for each in self._running.values())
        return not growing or self.memory.tree.available >= self.memory.pages_needed(sequence) + growing


def _last_to_yield(sequence: Sequence) -> tuple[int, float, str]:
    request = sequence.request
    return (-request.priority, request.arrival_seconds, request.request_id)
