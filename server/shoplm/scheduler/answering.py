"""The answers that go on: chats whose prompt is computed, each of which wants one token of a step.

They are most of what runs on a busy engine. So they are kept in the order in which they were last served, with sums
over them, and planning need look at none but those that it serves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from shoplm.request import Generate
from shoplm.scheduler.cost import Coefficients
from shoplm.scheduler.fairness import Tenant
from shoplm.scheduler.plan import PlanRow
from shoplm.scheduler.sequence import Sequence

_PATIENCE = 5.0  # token targets after which an answer of late work must go on


@dataclass(slots=True)
class Served:
    """The answers of a step, a token each."""

    sequences: Collection[Sequence] = ()
    starts: list[int] = field(default_factory=list)  # the positions of these tokens
    keys: int = 0  # that these tokens read
    tenants: list[Tenant] = field(default_factory=list)  # whose they are, with what was planned for each

    def charge(self, spent: dict[Tenant, float], cost: Coefficients) -> dict[str, int]:
        """Add the seconds of these tokens to what was spent on their tenants; returns the rows of each service."""
        rows: dict[str, int] = {}
        for tenant in self.tenants:
            service, count = tenant.service.service, tenant.planned_answers
            spent[tenant] += (cost.token + cost.row) * count + cost.kv * tenant.planned_keys
            rows[service] = rows.get(service, 0) + count
            tenant.planned_answers = tenant.planned_keys = 0
        return rows


class Answering:
    """Who answers, whoever was served longest ago first."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._order: dict[Sequence, None] = {}
        self._late = 0
        self._before = 0  # leading tokens of all of them that are computed
        self._at_page_ends: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._order)

    @property
    def keys(self) -> int:
        """Keys that a token of each of them reads."""
        return self._before + len(self._order)

    def all(self) -> Collection[Sequence]:
        """In their order. Not a view: it may be iterated while they are served."""
        return tuple(self._order)

    def join(self, sequence: Sequence) -> None:
        """Its prompt is planned to the end."""
        self._order[sequence] = None
        self._before += sequence.computed
        self._late += sequence.is_late
        if not sequence.computed % self._page_size:
            self._at_page_ends.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It goes on no more; whoever is not here is ignored."""
        if sequence in self._order:
            del self._order[sequence]
            self._before -= sequence.computed
            self._late -= sequence.is_late

    def at_page_ends(self) -> Iterator[Sequence]:
        """Those whose next token begins a page; each is told of once, or again until it has left."""
        while self._at_page_ends:
            sequence = self._at_page_ends.pop()
            if sequence in self._order:
                yield sequence

    def first_due(self, token_target: float) -> float:
        """When the first of them should have its next token; late ones have more patience."""
        due = math.inf
        if self._late < len(self._order):
            due = self._last_token(is_late=False) + token_target
        if self._late:
            due = min(due, self._last_token(is_late=True) + _PATIENCE * token_target)
        return due

    def serve(self, sequences: Collection[Sequence], now: float) -> Served:
        """The next token of each of these: all that is known before it is computed, or in flight."""
        served = Served(sequences)
        starts, tenants, size = served.starts, served.tenants, self._page_size
        complete: list[Sequence] = []
        for sequence in sequences:
            start = sequence.computed
            starts.append(start)
            sequence.computed = end = start + 1
            sequence.unknown += 1
            sequence.last_planned_seconds = now
            tenant = sequence.tenant
            assert tenant is not None
            if not tenant.planned_answers:
                tenants.append(tenant)
            tenant.planned_answers += 1
            tenant.planned_keys += end
            if end + 1 >= sequence.most_length:
                complete.append(sequence)
            elif not end % size:
                self._at_page_ends.append(sequence)
        served.keys = sum(starts) + len(starts)
        self._before += len(starts)
        if len(starts) < len(self._order):
            for sequence in sequences:
                self._order[sequence] = self._order.pop(sequence)
        for sequence in complete:
            self.leave(sequence)
        return served

    def serve_draft(self, sequence: Sequence, draft: tuple[int, ...]) -> PlanRow:
        """The next token of this one and guesses of those behind it, which have pages. It stays here; whoever takes the
        result calls `settle`."""
        start, count = sequence.computed, 1 + len(draft)
        sequence.computed += count
        sequence.unknown += 1
        self._before += count
        self._order[sequence] = self._order.pop(sequence)
        index = start + 1 - sequence.prompt_length
        return PlanRow(sequence, start, count, True, sample_index=index, epoch=sequence.epoch, draft=draft)

    def settle(self, sequence: Sequence, wrong: int) -> None:
        """So many of the tokens that it was last served were wrong guesses: they are not computed."""
        sequence.computed -= wrong
        self._before -= wrong
        if not sequence.computed % self._page_size:
            self._at_page_ends.append(sequence)

    def check(self) -> None:
        """AssertionError where the sums are not those of who is here."""
        computed, late = sum(each.computed for each in self._order), sum(each.is_late for each in self._order)
        assert self._before == computed, f"{self._before} tokens are said to be computed, {computed} are"
        assert self._late == late, f"{self._late} answers are said to be late, {late} are"

    def _last_token(self, *, is_late: bool) -> float:
        """When the one that was served longest ago had its last token; infinite while none has had its first."""
        moments = (each.last_token_seconds for each in self._order if each.is_late == is_late)
        return next((moment for moment in moments if moment is not None), math.inf)


def begins_to_answer(sequence: Sequence) -> bool:
    """Whether what has been planned of it ends its prompt, and all that was known of an answer that was preempted but
    for the last token; and further tokens come behind it."""
    chats = isinstance(sequence.request.task, Generate)
    return chats and not sequence.is_prompt and sequence.length < sequence.most_length
