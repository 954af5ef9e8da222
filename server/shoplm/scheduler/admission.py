"""Whom to let in: what can never be served, what finds the queue full, and what would not be there in time.

The predicted first result of a request is the work that is due before it, shared between the services as they are
entitled to, at the rate that running answers leave. Only a deadline that the caller set, or an enforced target, can
refuse by it; with the caller's leave the request is made smaller first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
from shoplm.request import Degradation, Explain, FailureKind, Generate, ItemScores, Select, Service
from shoplm.scheduler.backlog import Backlog
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import Answers

LEAST_TOKENS = 8  # of a chat answer that was made shorter
_LEAST_RATE = 0.1  # of the time, that prompts are assumed to get
_CROWDED = 0.5  # of a bound of the queue, from which on no tenant may have more than its share of it
_LEAST_RETRY, _MOST_RETRY = 0.05, 30.0


class Refusal(NamedTuple):
    """Why a request is not served, and when it would be worth trying again; 0 seconds: it would not."""

    kind: FailureKind
    reason: str
    message: str
    retry_seconds: float = 0.0


class Load(NamedTuple):
    """What a newcomer finds."""

    queued_requests: int
    queued_tokens: int
    answers: Answers
    starts_seconds: float  # when the next step can begin


class Limits(NamedTuple):
    """What the backend can hold."""

    max_context_tokens: int
    trie_depths: dict[str, int]
    lanes: Callable[[Select], int]
    can_explain: bool = True


class Admission:
    """Decides about one request at a time."""

    def __init__(
        self,
        config: SchedulerConfig,
        limits: Limits,
        memory: SequenceMemory,
        forecast: Forecast,
        budgeter: Budgeter,
        shares: Shares,
    ) -> None:
        self._config = config
        self._limits = limits
        self._memory = memory
        self._forecast = forecast
        self._budgeter = budgeter
        self._shares = shares
        self.backlogs = {service: Backlog() for service in Service}

    def advance(self, now: float) -> None:
        """What was due before `now` is overdue. Before anything else at this moment."""
        for backlog in self.backlogs.values():
            backlog.advance(now)

    # ---- what was admitted -----------------------------------------------------------------------------------------

    def count(self, sequence: Sequence) -> None:
        """Count what is left of a request's first result in the backlog; again after each part of it."""
        self.discount(sequence)
        if not sequence.is_late:
            sequence.work_seconds = self._forecast.work_seconds(sequence)
            if sequence.work_seconds:
                backlog = self.backlogs[sequence.request.service]
                sequence.work_bucket = backlog.add(sequence.due_seconds, sequence.work_seconds)

    def discount(self, sequence: Sequence) -> None:
        """Count it no more."""
        if sequence.work_bucket is not None:
            self.backlogs[sequence.request.service].remove(sequence.work_bucket, sequence.work_seconds)
            sequence.work_bucket = None

    # ---- newcomers -------------------------------------------------------------------------------------------------

    def refusal(self, sequence: Sequence, load: Load, now: float) -> Refusal | None:
        """Why the request is not let in; None: it is. Then it may have been degraded."""
        never = self._never(sequence)
        if never is not None:
            return never
        request, config = sequence.request, self._config
        if request.deadline_seconds is not None and request.deadline_seconds <= now:
            return Refusal(FailureKind.EXPIRED, "EXPIRED", "the deadline had passed on arrival")
        if load.queued_requests >= config.max_queued_requests:
            return self._full("QUEUE_FULL", f"{load.queued_requests} requests are queued", load)
        if load.queued_tokens + len(request.tokens) > config.max_queued_tokens:
            return self._full("QUEUE_TOKENS_FULL", f"{load.queued_tokens} tokens are queued", load)
        if config.policy.order == "fcfs":
            return None
        return self._crowded_out(sequence, load) or self._too_late(sequence, load, now)

    def lost(self, sequence: Sequence, load: Load, where: str) -> Refusal:
        """Why a request that was admitted is given up."""
        message = f"the deadline cannot be kept any more: given up {where}"
        retry = self._retry_seconds(sequence, self._backlog_seconds(load))
        return Refusal(FailureKind.OVERLOADED, "DEADLINE_LOST", message, retry)

    def _never(self, sequence: Sequence) -> Refusal | None:
        task = sequence.request.task
        longest = sequence.most_length
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
            reason, message = "CACHE_EXCEEDED", f"{longest} tokens do not fit into the KV cache"
        return Refusal(FailureKind.INVALID, reason, message) if reason else None

    def _can_explain(self, task: Explain) -> bool:
        reads, limits = task.reads, self._limits
        return limits.can_explain and (not isinstance(reads, ItemScores) or limits.trie_depths.get(reads.trie) == 1)

    def _full(self, reason: str, message: str, load: Load) -> Refusal:
        # A tenth of the queue is gone by then.
        retry = max(0.1 * self._backlog_seconds(load), 0.5)
        return Refusal(FailureKind.OVERLOADED, reason, message, min(retry, _MOST_RETRY))

    def _crowded_out(self, sequence: Sequence, load: Load) -> Refusal | None:
        """A queue that fills up is shared between its tenants: one that floods it shuts out only itself."""
        bound = self._config.max_queued_requests
        if load.queued_requests < _CROWDED * bound:
            return None
        share = self._shares.services[sequence.request.service]
        name = sequence.request.tenant
        total = sum(each.weight for each in share.tenants.values() if each.requests and each.name != name)
        tenant = share.tenants.get(name)
        if tenant is None or not total:
            return None
        allowed = bound * tenant.weight / (tenant.weight + total)
        if tenant.requests < allowed:
            return None
        message = f"this tenant has {tenant.requests} requests in a queue that is shared between tenants"
        return self._full("TENANT_QUEUE_FULL", message, load)

    # ---- predicted finish ------------------------------------------------------------------------------------------

    def predicted_seconds(self, sequence: Sequence, load: Load) -> float:
        """When the first result of a newcomer will be there, if it is admitted now."""
        cost = self._forecast.cost
        service, work = sequence.request.service, self._forecast.work_seconds(sequence)
        due = sequence.limit_seconds if sequence.limit_seconds is not None else sequence.due_seconds
        own = self.backlogs[service].until(due) + work
        others = {other: backlog.until(due) for other, backlog in self.backlogs.items() if other is not service}
        busy = own + sum(others.values())
        # Others' work that is due first comes first, but no further than their shares: the fixed point from above.
        for _ in range(4):
            entitled = {other: self._shares.fraction(other) * busy for other in others}
            busy = own + sum(min(ahead, entitled[other]) for other, ahead in others.items())
        step = cost.coefficients.step
        cycle = min(self._budgeter.longest_step_seconds(load.starts_seconds), max(busy + step, 2 * step))
        if load.answers.requests:
            cycle = max(min(cycle, self._config.policy.token_target_seconds), step + load.answers.seconds)
        rate = max(1 - (step + load.answers.seconds) / cycle, _LEAST_RATE)
        levels = sequence.depth - 1
        return load.starts_seconds + max(busy / rate, self._forecast.alone_seconds(sequence)) + levels * step

    def _too_late(self, sequence: Sequence, load: Load, now: float) -> Refusal | None:
        if sequence.limit_seconds is None or not self._budgeter.uses_time:
            return None
        predicted = self.predicted_seconds(sequence, load)
        if predicted <= sequence.limit_seconds:
            return None
        if sequence.request.allow_degraded and self._degrade(sequence, load):
            return None
        late = predicted - sequence.limit_seconds
        message = f"the answer would come {late:.3g} s after its deadline"
        return Refusal(FailureKind.OVERLOADED, "DEADLINE_UNREACHABLE", message, self._retry_seconds(sequence, late))

    def _retry_seconds(self, sequence: Sequence, wait: float) -> float:
        limit = sequence.limit_seconds
        allowed = 0.0 if limit is None else limit - sequence.request.arrival_seconds
        if self._forecast.alone_seconds(sequence) > allowed:
            return 0.0
        return min(max(wait, _LEAST_RETRY), _MOST_RETRY)

    def _backlog_seconds(self, load: Load) -> float:
        cost = self._forecast.cost
        known = sum(backlog.total for backlog in self.backlogs.values())
        return max(known, cost.work_seconds(load.queued_tokens, 0, load.queued_requests))

    # ---- smaller answers -------------------------------------------------------------------------------------------

    def _degrade(self, sequence: Sequence, load: Load) -> bool:
        """Make the request small enough to be there in time; False, and nothing changed, if that is impossible."""
        task = sequence.request.task
        if isinstance(task, Select):
            return self._narrow(sequence, task, load)
        return isinstance(task, Generate) and self._shorten(sequence, task, load)

    def _narrow(self, sequence: Sequence, task: Select, load: Load) -> bool:
        asked, lanes = sequence.request, sequence.lanes
        width = task.beam_width
        while lanes and width > task.count:
            width = max(width // 2, task.count)
            narrow = msgspec.structs.replace(task, beam_width=width)
            sequence.serve(msgspec.structs.replace(asked, task=narrow))
            sequence.lanes = self._limits.lanes(narrow)
            if self._in_time(sequence, load):
                sequence.degraded = (Degradation.NARROWER_BEAMS,)
                return True
        sequence.serve(asked)
        sequence.lanes = lanes
        return False

    def _shorten(self, sequence: Sequence, task: Generate, load: Load) -> bool:
        asked, limit = sequence.request, sequence.limit_seconds
        if asked.deadline_seconds is None:
            return False
        left = asked.deadline_seconds - self.predicted_seconds(sequence, load)
        tokens = int(left / self._forecast.token_seconds) + 1
        if not LEAST_TOKENS <= tokens < task.max_tokens:
            return False
        sequence.serve(msgspec.structs.replace(asked, task=msgspec.structs.replace(task, max_tokens=tokens)))
        sequence.limit_seconds = self._forecast.limit_seconds(sequence)
        if self._in_time(sequence, load):
            sequence.degraded = (Degradation.FEWER_TOKENS,)
            return True
        sequence.serve(asked)
        sequence.limit_seconds = limit
        return False

    def _in_time(self, sequence: Sequence, load: Load) -> bool:
        limit = sequence.limit_seconds
        return limit is not None and self.predicted_seconds(sequence, load) <= limit
