"""The scheduler: admits requests, plans steps and takes their results.

Order of work: answers that go on (chat tokens, beams) come first, one step each, so no prompt starves them; what is
left of the step's token budget goes to prompts, earliest due first. Due is the caller's deadline or, where there is
none, arrival plus the service's target: a target only orders work, a deadline also drops it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import count
from typing import TYPE_CHECKING

from shoplm.request import (
    EngineOutput,
    FailedOutput,
    FailureKind,
    FinishedOutput,
    FinishReason,
    Generate,
    Request,
    Select,
    SelectOutput,
    Service,
    Timings,
    TokensOutput,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.plan import Plan, PlanRow
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.stats import SchedulerStats

if TYPE_CHECKING:
    from shoplm.engine.batch import RowOutput  # numpy; the scheduler itself needs none


class Scheduler:
    """Pure bookkeeping: the caller brings the clock, runs the plans and hands in their results in order."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        pages: int,
        page_size: int,
        state_slots: int,
        max_context_tokens: int,
        trie_depths: dict[str, int],
        lanes: Callable[[Select], int],
    ) -> None:
        self.config = config
        self.memory = SequenceMemory(pages, page_size)
        self.stats = SchedulerStats()
        self._max_context_tokens = max_context_tokens
        self._trie_depths = trie_depths
        self._lanes = lanes
        self._slots = list(range(state_slots - 1, -1, -1))
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[tuple[int, float, int, Sequence]] = []  # heap; entries of ended sequences are stale
        self._tie = count()
        self._running: dict[str, Sequence] = {}
        self._queued_tokens = 0
        self._queued_requests = 0
        self._outputs: list[EngineOutput] = []

    # ---- requests in ---------------------------------------------------------------------------------------------

    def admit(self, request: Request, now: float) -> None:
        """Queue a request, or refuse it: then its FailedOutput is among the next outputs."""
        sequence = self._sequence(request)
        refusal = self._refusal(sequence, now)
        if request.request_id in self._sequences:
            refusal = (FailureKind.INVALID, "DUPLICATE_REQUEST", f"request id {request.request_id!r} is in use")
        if refusal is not None:
            self._refuse(request, *refusal)
            return
        self._sequences[request.request_id] = sequence
        self._enqueue(sequence)

    def cancel(self, request_id: str) -> None:
        """The caller has gone: free what the request holds at once. Unknown ids are ignored: the end was under way."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._fail(sequence, FailureKind.CANCELLED, "CANCELLED", "cancelled by the caller")

    def fail(self, plan: Plan, message: str) -> None:
        """The step raised: its requests fail, the others go on."""
        for row in plan.rows:
            if not row.sequence.ended:
                self._fail(row.sequence, FailureKind.INTERNAL, "ENGINE_FAILURE", message)

    def drain_outputs(self) -> list[EngineOutput]:
        """What happened since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def is_idle(self) -> bool:
        """Nothing is queued or running."""
        return not self._sequences

    @property
    def queued_requests(self) -> int:
        return self._queued_requests

    @property
    def queued_tokens(self) -> int:
        return self._queued_tokens

    def running(self) -> Seq[Sequence]:
        """The sequences that hold pages."""
        return tuple(self._running.values())

    def alive(self) -> Seq[Sequence]:
        """Every request that has not ended."""
        return tuple(self._sequences.values())

    def check(self) -> None:
        """Every page and state slot has exactly one owner; AssertionError says which has not."""
        self.memory.check(self._running.values())
        slots = [*self._slots, *(sequence.state_slot for sequence in self._running.values())]
        assert len(slots) == len(set(slots)), "a state slot has two owners"

    # ---- steps out -----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next step; empty when there is nothing to compute."""
        self._drop_expired(now)
        rows: list[PlanRow] = []
        budget = self.config.max_step_tokens
        self._make_room()
        prompts: list[Sequence] = []
        for sequence in self._running.values():
            if not sequence.wants_more:
                continue
            if self._is_prompt(sequence):
                prompts.append(sequence)
                continue
            row = self._beams(sequence, budget) if sequence.is_selecting else self._chunk(sequence, budget)
            if row is not None:
                rows.append(row)
                budget -= row.count
        if rows:
            budget = min(budget, self.config.max_mixed_prompt_tokens)
        prompts.sort(key=self._rank)
        self._plan_prompts(prompts, rows, budget, now)
        for row in rows:
            row.sequence.in_flight += 1
        return Plan(tuple(rows))

    def _plan_prompts(self, prompts: list[Sequence], rows: list[PlanRow], budget: int, now: float) -> None:
        """Fill the budget with prompt chunks: running prompts and, in the same order, newly admitted ones."""
        at = 0
        while budget > 0:
            running = prompts[at] if at < len(prompts) else None
            waiting = self._next_waiting()
            if waiting is not None and (running is None or self._rank(waiting) < self._rank(running)):
                if self._start(waiting, now):
                    prompts.insert(at, waiting)
                    continue
                if running is None:
                    return
            if running is None:
                return
            at += 1
            row = self._chunk(running, budget)
            if row is not None:
                rows.append(row)
                budget -= row.count

    def _is_prompt(self, sequence: Sequence) -> bool:
        return not sequence.is_selecting and sequence.computed < sequence.prompt_length

    def _make_room(self) -> None:
        """Every answer that goes on gets the page of its next token; whoever is due last makes room for the others.

        Before any row is planned, so that no preempted sequence is already part of the step.
        """
        for sequence in tuple(self._running.values()):
            if sequence.is_selecting or self._is_prompt(sequence) or not sequence.wants_more:
                continue
            while sequence.state_slot is not None and not self.memory.grow(sequence):
                self._preempt(max(self._running.values(), key=self._rank))

    def _beams(self, sequence: Sequence, budget: int) -> PlanRow | None:
        """The next level of a search: all its lanes, or nothing in this step."""
        if sequence.lanes > budget:
            return None
        row = PlanRow(
            sequence, sequence.prompt_length, sequence.lanes, True, True, sequence.level, True, 0, sequence.epoch
        )
        sequence.level += 1
        return row

    def _chunk(self, sequence: Sequence, budget: int) -> PlanRow | None:
        """The next tokens of a sequence, as many as the budget and the pages of others allow."""
        if not self.memory.catch_up(sequence):
            return None
        known = self.memory.computable(sequence) if sequence.computed < len(sequence.tokens) else 0
        from_state = known == 0 and sequence.unknown > 0
        size = min(known if known else sequence.pending, budget)
        if size < 1:
            return None
        start = sequence.computed
        sequence.computed += size
        reads = sequence.computed == sequence.length
        row = PlanRow(
            sequence, start, size, reads, from_state, 0, False, sequence.length - sequence.prompt_length, sequence.epoch
        )
        if reads and isinstance(sequence.request.task, Generate):
            sequence.unknown += 1
        elif reads and isinstance(sequence.request.task, Select):
            sequence.level = 1
        return row

    # ---- results in ----------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, outputs: Seq[RowOutput], now: float) -> None:
        """Take the results of a plan; plans are committed in the order they were made."""
        for row, output in zip(plan.rows, outputs, strict=True):
            sequence = row.sequence
            sequence.in_flight -= 1
            if sequence.ended:
                continue
            if sequence.epoch == row.epoch:
                if not row.is_beam:
                    self.memory.fill(sequence, row.start + row.count)
                if sequence.started_seconds is None:
                    sequence.started_seconds = now
            if not row.reads:
                continue
            if isinstance(sequence.request.task, Generate):
                assert isinstance(output, int)
                self._take_token(sequence, output, now)
            elif output is not None and sequence.epoch == row.epoch:
                self._finish(sequence, now, output=output)
        self.stats.step(plan)

    def _take_token(self, sequence: Sequence, token: int, now: float) -> None:
        task = sequence.request.task
        assert isinstance(task, Generate)
        sequence.unknown -= 1
        if token in task.stop_token_ids:
            self._finish(sequence, now, reason=FinishReason.STOP)
            return
        sequence.tokens.append(token)
        service = sequence.request.service
        if sequence.first_seconds is None:
            sequence.first_seconds = now
            self.stats.first(service, now - sequence.request.arrival_seconds)
        elif sequence.last_token_seconds is not None:
            self.stats.inter_token(now - sequence.last_token_seconds)
        sequence.last_token_seconds = now
        self._outputs.append(TokensOutput(sequence.request.request_id, (token,), sequence.cached_tokens or 0))
        if sequence.completion_tokens >= task.max_tokens:
            self._finish(sequence, now, reason=FinishReason.LENGTH)

    # ---- the life of a sequence ----------------------------------------------------------------------------------

    def _sequence(self, request: Request) -> Sequence:
        depth = lanes = 0
        if isinstance(request.task, Select):
            # Popularity alone is answered after the prompt: there are no beams, however deep the trie is.
            depth = 1 if request.task.popularity_only else self._trie_depths.get(request.task.trie, 0)
            lanes = self._lanes(request.task) if depth > 1 else 0
        return Sequence(request, self._due_seconds(request), list(request.tokens), max(depth, 1), lanes)

    def _due_seconds(self, request: Request) -> float:
        """When the request should have its (first) result: the caller's deadline, or the service's target."""
        target = request.arrival_seconds + self.config.policy.target_seconds[request.service]
        return target if request.deadline_seconds is None else min(target, request.deadline_seconds)

    def _refusal(self, sequence: Sequence, now: float) -> tuple[FailureKind, str, str] | None:
        request, task = sequence.request, sequence.request.task
        longest = len(request.tokens) + (task.max_tokens if isinstance(task, Generate) else 0)
        if isinstance(task, Generate) and task.max_tokens < 1:
            return FailureKind.INVALID, "BAD_MAX_TOKENS", f"max_tokens is {task.max_tokens}: it must be at least 1"
        if isinstance(task, Select) and task.trie not in self._trie_depths:
            return FailureKind.INVALID, "UNKNOWN_TRIE", f"no trie is named {task.trie!r}"
        if longest > self._max_context_tokens:
            return (
                FailureKind.INVALID,
                "CONTEXT_EXCEEDED",
                (f"prompt and answer take {longest} tokens, the context holds {self._max_context_tokens}"),
            )
        if sequence.lanes > self.config.max_step_tokens:
            return (
                FailureKind.INVALID,
                "BEAMS_EXCEED_STEP",
                (f"{sequence.lanes} lanes do not fit into a step of {self.config.max_step_tokens} tokens"),
            )
        if not self.memory.fits(sequence):
            return FailureKind.INVALID, "CACHE_EXCEEDED", f"{longest} tokens do not fit into the KV cache"
        if request.deadline_seconds is not None and request.deadline_seconds <= now:
            return FailureKind.EXPIRED, "EXPIRED", "the deadline had passed on arrival"
        if self._queued_requests >= self.config.max_queued_requests:
            return FailureKind.OVERLOADED, "QUEUE_FULL", f"{self._queued_requests} requests are queued"
        if self._queued_tokens + len(request.tokens) > self.config.max_queued_tokens:
            return FailureKind.OVERLOADED, "QUEUE_TOKENS_FULL", f"{self._queued_tokens} tokens are queued"
        return None

    def _refuse(self, request: Request, kind: FailureKind, reason: str, message: str) -> None:
        retry = 1.0 if kind is FailureKind.OVERLOADED else 0.0
        self._outputs.append(FailedOutput(request.request_id, kind, message, reason, retry))
        self.stats.failure(request.service, kind)

    def _rank(self, sequence: Sequence) -> tuple[int, float]:
        return (-sequence.request.priority, sequence.due_seconds)

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (*self._rank(sequence), next(self._tie), sequence))
        sequence.queued_tokens = len(sequence.tokens)
        self._queued_requests += 1
        self._queued_tokens += sequence.queued_tokens

    def _next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][3].ended:
            heapq.heappop(self._waiting)
        return self._waiting[0][3] if self._waiting else None

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Move the first of the queue to the running ones, if there is a state slot and memory for it."""
        # After a preemption, results of its earlier life must be in before it may run again.
        if not self._slots or sequence.in_flight or not self.memory.admit(sequence):
            return False
        heapq.heappop(self._waiting)
        self._queued_requests -= 1
        self._queued_tokens -= sequence.queued_tokens
        sequence.state_slot = self._slots.pop()
        self._running[sequence.request.request_id] = sequence
        if sequence.epoch == 0:
            self.stats.queued(sequence.request.service, now - sequence.request.arrival_seconds)
        return True

    def _stop_running(self, sequence: Sequence) -> None:
        """Give back the state slot and the pages; what is known to be computed stays cached."""
        if sequence.state_slot is None:
            return
        # The newest token is never computed when its sequence ends, and a step in flight is not yet.
        safe = 0 if sequence.in_flight else min(sequence.computed, len(sequence.tokens))
        self.memory.release(sequence, safe)
        self._slots.append(sequence.state_slot)
        sequence.state_slot = None
        del self._running[sequence.request.request_id]

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, by recompute: its full pages stay cached as long as nobody needs them."""
        self._stop_running(sequence)
        sequence.computed = sequence.level = 0
        sequence.epoch += 1
        self.stats.preemptions += 1
        self._enqueue(sequence)

    def _end(self, sequence: Sequence) -> None:
        if sequence.state_slot is None:
            self._queued_requests -= 1
            self._queued_tokens -= sequence.queued_tokens
        self._stop_running(sequence)
        sequence.ended = True
        del self._sequences[sequence.request.request_id]

    def _fail(self, sequence: Sequence, kind: FailureKind, reason: str, message: str) -> None:
        self._end(sequence)
        self._outputs.append(FailedOutput(sequence.request.request_id, kind, message, reason))
        self.stats.failure(sequence.request.service, kind)

    def _finish(
        self, sequence: Sequence, now: float, *, reason: FinishReason = FinishReason.STOP, output: RowOutput = None
    ) -> None:
        self._end(sequence)
        request = sequence.request
        arrival = request.arrival_seconds
        started = sequence.started_seconds if sequence.started_seconds is not None else now
        if sequence.first_seconds is None:
            sequence.first_seconds = now
            self.stats.first(request.service, now - arrival)
        self.stats.finished(request.service, now - arrival)
        self._outputs.append(
            FinishedOutput(
                request_id=request.request_id,
                timings=Timings(started - arrival, sequence.first_seconds - arrival, now - arrival),
                prompt_tokens=sequence.prompt_length,
                cached_tokens=sequence.cached_tokens or 0,
                completion_tokens=sequence.completion_tokens,
                finish_reason=reason,
                selected=output if isinstance(output, SelectOutput) else None,
                values=output if isinstance(output, tuple) else (),
            )
        )

    def _drop_expired(self, now: float) -> None:
        for sequence in list(self._sequences.values()):
            deadline = sequence.request.deadline_seconds
            if deadline is not None and deadline <= now:
                where = "in the queue" if sequence.state_slot is None else "while it ran"
                self._fail(sequence, FailureKind.EXPIRED, "EXPIRED", f"the deadline passed {where}")

    def services_running(self) -> dict[Service, int]:
        """Running requests by service."""
        counts = dict.fromkeys(Service, 0)
        for sequence in self._running.values():
            counts[sequence.request.service] += 1
        return counts

    def services_queued(self) -> dict[Service, int]:
        """Queued requests by service."""
        counts = dict.fromkeys(Service, 0)
        for sequence in self._sequences.values():
            if sequence.state_slot is None:
                counts[sequence.request.service] += 1
        return counts
