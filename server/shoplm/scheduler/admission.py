"""Whom to let in: what can never be served, what finds the queue full, and what would not be there in time.

Only a deadline that the caller set, or an enforced target, can refuse by the predicted finish (`prospects`); with the
caller's leave the request is made smaller first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
from shoplm.request import Degradation, Explain, FailureKind, Generate, ItemScores, Request, Select
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.forecast import LEAST_TOKENS, Forecast
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.prospects import Load, Prospects
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.waiting import WaitingRoom

_LEAST_RETRY, _MOST_RETRY = 0.05, 30.0


class Refusal(NamedTuple):
    """Why a request is not served, and when it would be worth trying again; 0 seconds: it would not."""

    kind: FailureKind
    reason: str
    message: str
    retry_seconds: float = 0.0


class Limits(NamedTuple):
    """What the backend can hold."""

    max_context_tokens: int
    trie_depths: dict[str, int]
    lanes: Callable[[Select], int]

    def sequence(self, request: Request) -> Sequence:
        """The request with the lanes it takes; its tokens are still the caller's."""
        depth = lanes = 0
        if isinstance(request.task, Select):
            # Popularity alone is answered after the prompt: there are no beams, however deep the trie is.
            depth = 1 if request.task.popularity_only else self.trie_depths.get(request.task.trie, 0)
            lanes = self.lanes(request.task) if depth > 1 else 0
        return Sequence(request, 0.0, request.tokens, max(depth, 1), lanes)


class Admission:
    """Decides about one request at a time."""

    def __init__(
        self,
        config: SchedulerConfig,
        limits: Limits,
        memory: SequenceMemory,
        forecast: Forecast,
        budgeter: Budgeter,
        prospects: Prospects,
        waiting: WaitingRoom,
        give_up: Callable[[Sequence, Refusal], None],
    ) -> None:
        """`give_up` ends a request that waits."""
        self._config = config
        self._limits = limits
        self._memory = memory
        self._forecast = forecast
        self._budgeter = budgeter
        self._prospects = prospects
        self._waiting = waiting
        self._give_up = give_up

    def turned_away(self, sequence: Sequence, load: Load, now: float) -> Refusal | None:
        """Why the request is not even looked at more closely: by itself, or the queue is full; None: it may be let in.
        Nothing but the request is known of it, and what lanes it takes."""
        never = self._never(sequence)
        if never is not None:
            return never
        request, config = sequence.request, self._config
        if request.deadline_seconds is not None and request.deadline_seconds <= now:
            return Refusal(FailureKind.EXPIRED, "EXPIRED", "the deadline had passed on arrival")
        by_slack = config.policy.order == "slack"
        if not self._waiting.has_room(len(request.tokens)) and not (by_slack and self._waiting.may_displace(sequence)):
            if by_slack:
                self._prospects.saw(request.service, None, now)
            return self._full(load, by_tenants=self._waiting.is_shared(sequence))
        return None

    def refusal(self, sequence: Sequence, load: Load, now: float) -> Refusal | None:
        """Why a request for which there is a place is not let in; None: it is. Then it may have been degraded."""
        if self._config.policy.order != "slack":
            return None
        if not self._is_hopeless(sequence):  # no share of the engine would have served it
            self._prospects.saw(sequence.request.service, self._forecast.whole_seconds(sequence), now)
        return self._too_late(sequence, load, now)

    def displaced(self, sequence: Sequence, newcomer: Sequence, load: Load) -> Refusal:
        """Why a request that waited in a full queue gives way to a newcomer."""
        one, other = sequence.request, newcomer.request
        return self._full(load, by_tenants=one.service is other.service and one.tenant != other.tenant)

    def lost(self, sequence: Sequence, load: Load, where: str) -> Refusal:
        """Why a request that was admitted is given up."""
        message = f"the deadline cannot be kept any more: given up {where}"
        retry = self._retry_seconds(sequence, self._prospects.backlog_seconds(load))
        return Refusal(FailureKind.OVERLOADED, "DEADLINE_LOST", message, retry)

    def _never(self, sequence: Sequence) -> Refusal | None:
        task = sequence.request.task
        longest = sequence.most_length + sequence.depth - 1  # beams go on behind the prompt, code by code
        most, context = self._config.max_step_tokens, self._limits.max_context_tokens
        reason, message = "", ""
        if isinstance(task, Generate) and task.max_tokens < 1:
            reason, message = "BAD_MAX_TOKENS", f"max_tokens is {task.max_tokens}: it must be at least 1"
        elif isinstance(task, Select) and task.trie not in self._limits.trie_depths:
            reason, message = "UNKNOWN_TRIE", f"no trie is named {task.trie!r}"
        elif isinstance(task, Explain) and not self._can_explain(task):
            reason, message = "NOT_EXPLAINED", "nothing but heads and items with codes of one token can be explained"
        elif longest > context:
            reason, message = (
                "CONTEXT_EXCEEDED",
                f"prompt and answer take {longest} tokens, the context holds {context}",
            )
        elif sequence.lanes > most:
            reason, message = "BEAMS_EXCEED_STEP", f"{sequence.lanes} lanes do not fit into a step of {most} tokens"
        elif not self._memory.fits(sequence):
            reason, message = "CACHE_EXCEEDED", f"{longest} tokens do not fit into the KV cache (kv_cache_mib)"
        return Refusal(FailureKind.INVALID, reason, message) if reason else None

    def _can_explain(self, task: Explain) -> bool:
        return not isinstance(task.reads, ItemScores) or self._limits.trie_depths.get(task.reads.trie) == 1

    def _full(self, load: Load, *, by_tenants: bool) -> Refusal:
        if by_tenants:
            reason, message = "TENANT_QUEUE_FULL", "the queue is full, and this tenant has its share of it"
        elif load.queued_requests >= self._config.max_queued_requests:
            reason, message = "QUEUE_FULL", f"{load.queued_requests} requests are queued"
        else:
            reason, message = "QUEUE_TOKENS_FULL", f"{load.queued_tokens} tokens are queued"
        # A tenth of the queue is gone by then.
        retry = max(0.1 * self._prospects.backlog_seconds(load), 0.5)
        return Refusal(FailureKind.OVERLOADED, reason, message, min(retry, _MOST_RETRY))

    # ---- predicted finish ------------------------------------------------------------------------------------------

    def _too_late(self, sequence: Sequence, load: Load, now: float) -> Refusal | None:
        promised = self._forecast.promised_seconds(sequence)
        if promised is None or not self._budgeter.uses_time:
            return None
        if self._is_welcome(sequence, load, now):
            return None
        if sequence.request.allow_degraded and self._degrade(sequence, load, now):
            return None
        dearer = self._waiting.dearest(sequence)
        if dearer is not None and self._takes_place(sequence, dearer, load, now):
            self._give_up(dearer, self._too_costly(dearer, load, "given up in the queue"))
            return None
        late = self._prospects.first_result_seconds(sequence, load) - promised
        if late <= 0:
            return self._too_costly(sequence, load, "refused")
        message = f"the answer would come {late:.3g} s after its deadline"
        return Refusal(FailureKind.OVERLOADED, "DEADLINE_UNREACHABLE", message, self._retry_seconds(sequence, late))

    def _takes_place(self, sequence: Sequence, dearer: Sequence, load: Load, now: float) -> bool:
        """Whether a newcomer is welcome in the place of one that waits and is more work, of its own tenant and of no
        higher priority."""
        is_more = dearer.work_seconds > self._forecast.work_seconds(sequence)
        if not is_more or dearer.request.priority > sequence.request.priority:
            return False
        self._prospects.discount(dearer)
        if self._is_welcome(sequence, load, now):
            return True
        self._prospects.count(dearer)
        return False

    def _too_costly(self, sequence: Sequence, load: Load, how: str) -> Refusal:
        message = f"for what it costs, more than one other answer could be in time: {how}"
        retry = self._retry_seconds(sequence, self._prospects.backlog_seconds(load))
        return Refusal(FailureKind.OVERLOADED, "TOO_COSTLY_NOW", message, retry)

    def _retry_seconds(self, sequence: Sequence, wait: float) -> float:
        return 0.0 if self._is_hopeless(sequence) else min(max(wait, _LEAST_RETRY), _MOST_RETRY)

    def _is_hopeless(self, sequence: Sequence) -> bool:
        """Whether even an idle engine would not be in time."""
        limit = sequence.limit_seconds
        return limit is not None and self._forecast.alone_seconds(sequence) > limit - sequence.request.arrival_seconds

    # ---- smaller answers -------------------------------------------------------------------------------------------

    def _degrade(self, sequence: Sequence, load: Load, now: float) -> bool:
        """Make the request small enough to be there in time; False, and nothing changed, if that is impossible."""
        task = sequence.request.task
        if isinstance(task, Select):
            return self._narrow(sequence, task, load, now)
        return isinstance(task, Generate) and self._shorten(sequence, task, load, now)

    def _narrow(self, sequence: Sequence, task: Select, load: Load, now: float) -> bool:
        asked, lanes = sequence.request, sequence.lanes
        width = task.beam_width
        while lanes and width > task.count:
            width = max(width // 2, task.count)
            narrow = msgspec.structs.replace(task, beam_width=width)
            sequence.serve(msgspec.structs.replace(asked, task=narrow))
            sequence.lanes = self._limits.lanes(narrow)
            if self._is_welcome(sequence, load, now):
                sequence.degraded = (Degradation.NARROWER_BEAMS,)
                return True
        sequence.serve(asked)
        sequence.lanes = lanes
        return False

    def _shorten(self, sequence: Sequence, task: Generate, load: Load, now: float) -> bool:
        asked = sequence.request
        if asked.deadline_seconds is None:
            return False
        left = asked.deadline_seconds - self._prospects.first_result_seconds(sequence, load)
        tokens = min(int(left / self._forecast.token_seconds) + 1, task.max_tokens - 1)
        while tokens >= LEAST_TOKENS:
            sequence.serve(msgspec.structs.replace(asked, task=msgspec.structs.replace(task, max_tokens=tokens)))
            self._forecast.set_times(sequence)
            if self._is_welcome(sequence, load, now):
                sequence.degraded = (Degradation.FEWER_TOKENS,)
                return True
            tokens //= 2
        sequence.serve(asked)
        self._forecast.set_times(sequence)
        return False

    def _is_welcome(self, sequence: Sequence, load: Load, now: float) -> bool:
        """Whether it will be in time, and not at the cost of more than it is worth."""
        promised = self._forecast.promised_seconds(sequence)
        if promised is None:
            return False
        predicted = self._prospects.first_result_seconds(sequence, load)
        return predicted <= promised and not self._prospects.costs_others_more(sequence, predicted, promised, now)
