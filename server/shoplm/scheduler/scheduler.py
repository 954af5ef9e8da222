"""The scheduler: admits requests, has steps planned and takes their results.

Answers that go on (chat tokens, levels of beams) and prompts share a step's budget of tokens and seconds; prompts come
by their order, most urgent first. What cannot make its deadline is refused on arrival, or given up as soon as it is a
lost cause. docs/scheduling.md explains the rules; who decides what: `admission`, `planner`, `ordering`, `fairness`,
`budget`, `deadlines`, and `cost` for how long things take.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, cast

from shoplm.request import (
    Degradation,
    EngineOutput,
    Explain,
    FailureKind,
    FinishReason,
    Generate,
    Request,
    Select,
    Service,
)
from shoplm.scheduler.admission import Admission, Limits, Refusal
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import CostModel
from shoplm.scheduler.deadlines import Deadlines
from shoplm.scheduler.drafts import accepted
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.ordering import ArrivalOrder, Order, SlackOrder
from shoplm.scheduler.outcomes import Outcomes
from shoplm.scheduler.plan import Plan, PlanRow
from shoplm.scheduler.planner import Planner
from shoplm.scheduler.prospects import Load, Prospects
from shoplm.scheduler.queue import Queue
from shoplm.scheduler.residents import Residents
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.stats import SchedulerStats
from shoplm.scheduler.survey import lasting
from shoplm.scheduler.waiting import WaitingRoom

if TYPE_CHECKING:
    from shoplm.batch import RowOutput  # numpy; the scheduler itself needs none


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
        self.cost = CostModel()
        self.shares = Shares(config.policy.service_weights, config.policy.tenant_weights)
        self._limits = Limits(max_context_tokens, trie_depths, lanes)
        self._forecast = Forecast(config, self.cost)
        self._budgeter = Budgeter(config, self.cost, self._forecast)
        self._prospects = Prospects(config, self._forecast, self._budgeter, self.shares)
        self._waiting = WaitingRoom(config, self.shares)
        self._admission = Admission(
            config,
            self._limits,
            self.memory,
            self._forecast,
            self._budgeter,
            self._prospects,
            self._waiting,
            give_up=self._fail,
        )
        self._deadlines = Deadlines(self._forecast.lost_at)
        self._outcomes = Outcomes(self.stats, self._forecast)
        self._residents = Residents(self.memory, state_slots)
        order: Order = (
            ArrivalOrder()
            if config.policy.order == "fcfs"
            else SlackOrder(self.shares, self._forecast, self._prospects.count)
        )
        self._queue = Queue(order, self._waiting, self.shares, self._prospects)
        self._planner = Planner(
            config,
            cost=self.cost,
            memory=self.memory,
            residents=self._residents,
            queue=self._queue,
            budgeter=self._budgeter,
            prospects=self._prospects,
            stats=self.stats,
        )
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[float] = deque()  # predicted seconds of the steps in flight
        self._busy_until = 0.0  # when they should be done
        self._last_commit = 0.0

    # ---- requests in ---------------------------------------------------------------------------------------------

    def admit(self, request: Request, now: float) -> None:
        """Queue a request, or refuse it: then its FailedOutput is among the next outputs."""
        self._prospects.advance(now)
        self.stats.submitted[request.service] += 1
        self._budgeter.saw_request(request.service, now)
        if request.request_id in self._sequences:
            message = f"request id {request.request_id!r} is in use"
            self._outcomes.failed(request, Refusal(FailureKind.INVALID, "DUPLICATE_REQUEST", message))
            return
        sequence, load = self._limits.sequence(request), self._load(now)
        refusal = self._admission.turned_away(sequence, load, now)
        if refusal is None:
            sequence.tokens = request.tokens[:]
            self.memory.look_up(sequence)
            self._forecast.set_times(sequence)
            refusal = self._admission.refusal(sequence, load, now)
        if refusal is not None:
            self._outcomes.failed(request, refusal)
            return
        if not self._waiting.has_room(len(request.tokens)):
            load = self._load(now)
            for other in self._waiting.displaced(sequence):
                self._fail(other, self._admission.displaced(other, sequence, load))
        self._sequences[request.request_id] = sequence
        sequence.tenant = self.shares.services[request.service].join(request.tenant)
        self._deadlines.watch(sequence)
        self._queue.push(sequence)

    def cancel(self, request_id: str) -> None:
        """The caller has gone: free what the request holds at once. Unknown ids are ignored: the end was under way."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._fail(sequence, Refusal(FailureKind.CANCELLED, "CANCELLED", "cancelled by the caller"))

    def finish(self, request_id: str, now: float) -> None:
        """The caller has read all of the answer that it wanted: a stop string. Unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.first_seconds is not None:
            self._end(sequence)
            self._outcomes.finished(sequence, now)

    def fail(self, plan: Plan, message: str, now: float) -> None:
        """The step raised: its requests fail, the others go on."""
        self._passed(now)
        for sequence in (*plan.answers, *(row.sequence for row in plan.rows)):
            if not sequence.ended:
                self._fail(sequence, Refusal(FailureKind.INTERNAL, "ENGINE_FAILURE", message))

    def drain_outputs(self) -> list[EngineOutput]:
        """What happened since the last call, in order."""
        return self._outcomes.drain()

    @property
    def is_idle(self) -> bool:
        """Nothing is queued or running."""
        return not self._sequences

    @property
    def queued_requests(self) -> int:
        return self._waiting.requests

    @property
    def queued_tokens(self) -> int:
        return self._waiting.tokens

    def running(self) -> Seq[Sequence]:
        """The sequences that hold pages."""
        return tuple(self._residents.all())

    def alive(self) -> Seq[Sequence]:
        """Every request that has not ended."""
        return tuple(self._sequences.values())

    def services_running(self) -> dict[Service, int]:
        """Running requests by service."""
        counts = dict.fromkeys(Service, 0)
        for sequence in self._residents.all():
            counts[sequence.request.service] += 1
        return counts

    def services_queued(self) -> dict[Service, int]:
        """Queued requests by service."""
        return {service: share.waiting for service, share in self.shares.services.items()}

    def wait_corrections(self) -> dict[Service, float]:
        """By how much the forecast of waits is corrected at present, as a factor."""
        return {service: each.factor for service, each in self._prospects.corrections.items()}

    def check(self) -> None:
        """Every page and state slot has exactly one owner; AssertionError says which has not."""
        self._residents.check()

    # ---- steps out -----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next step; empty when there is nothing to compute."""
        self._prospects.advance(now)
        self._drop_lost(now)
        for stopped in self._residents.make_room():
            self.stats.preemptions += 1
            self._queue.push(stopped)
        begin = max(now, self._busy_until)
        plan = self._planner.plan(begin, now)
        if plan.load.rows:
            predicted = self.cost.seconds(plan.load)
            self._in_flight.append(predicted)
            self._busy_until = begin + predicted
        return plan

    # ---- results in ----------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, outputs: Seq[RowOutput], now: float) -> None:
        """Take the results of a plan; plans are committed in the order they were made."""
        self._learn(plan, now)
        answers = len(plan.answers)
        self._take_answers(plan.answers, cast("Seq[int]", outputs[:answers]), now)
        for row, output in zip(plan.rows, outputs[answers:], strict=True):
            sequence = row.sequence
            sequence.unread -= not row.draws
            if sequence.ended:
                continue
            # Behind the shared pages there is nothing that others could read.
            in_shared = not row.is_beam and row.start < len(sequence.nodes) * self.memory.page_size
            if in_shared and sequence.epoch == row.epoch:
                self.memory.fill(sequence, row.start + row.count)
            if not row.reads:
                continue
            if row.draft:
                self._take_draft(row, cast("list[int]", output), now)
            elif isinstance(sequence.request.task, Generate):
                assert isinstance(output, int)
                self._take_tokens(sequence, [output], now)
            elif output is not None and sequence.epoch == row.epoch:
                if isinstance(sequence.request.task, Explain):
                    assert isinstance(output, tuple)
                    output = sequence.parts = sequence.parts + output
                    if row.start + row.count < sequence.length:
                        continue
                self._end(sequence)
                self._prospects.came(sequence, now)
                self._outcomes.finished(sequence, now, output=output)
        self.stats.step(plan)

    def _learn(self, plan: Plan, now: float) -> None:
        """A step took from its plan, or the end of the one before it, until now."""
        seconds = now - max(plan.planned_seconds, self._last_commit)
        if seconds > 0:
            self.stats.cost_errors.append(self.cost.observe(plan.load, seconds))
        self._passed(now)

    def _passed(self, now: float) -> None:
        """The oldest step in flight is over."""
        self._last_commit = now
        self._in_flight.popleft()
        self._busy_until = now + sum(self._in_flight)

    def _take_answers(self, answers: Seq[Sequence], drawn: Seq[int], now: float) -> None:
        """The next tokens of answers that have their first."""
        longer: list[Sequence] = []
        tokens: list[int] = []
        ended: list[tuple[Sequence, FinishReason]] = []
        for sequence, token in zip(answers, drawn, strict=True):
            sequence.unknown -= 1
            if sequence.ended:
                continue
            if token in sequence.stop_token_ids:
                ended.append((sequence, FinishReason.STOP))
                continue
            known = sequence.tokens
            known.append(token)
            longer.append(sequence)
            tokens.append(token)
            if len(known) >= sequence.most_length:
                ended.append((sequence, FinishReason.LENGTH))
        self._outcomes.answered(longer, tokens, now)
        for sequence, reason in ended:
            self._end(sequence)
            self._outcomes.finished(sequence, now, reason=reason)

    def _take_draft(self, row: PlanRow, drawn: list[int], now: float) -> None:
        """What was drawn behind an answer's known token and behind each guess."""
        sequence, drafted = row.sequence, len(row.draft)
        tokens = accepted(row.draft, drawn)
        right = len(tokens) - 1
        self.stats.drafted_tokens += drafted
        self.stats.accepted_tokens += right
        self._residents.answering.settle(sequence, drafted - right)
        self._take_tokens(sequence, tokens, now)

    def _take_tokens(self, sequence: Sequence, drawn: Seq[int], now: float) -> None:
        """The token behind a prompt, an answer's first or the next one where the answer was preempted; or those that a
        draft has brought."""
        sequence.unknown -= 1
        stop = next((at for at, token in enumerate(drawn) if token in sequence.stop_token_ids), None)
        tokens = drawn[:stop]
        if tokens:
            sequence.tokens.extend(tokens)
            if sequence.first_seconds is None:
                self._prospects.came(sequence, now)
            self._outcomes.tokens(sequence, tuple(tokens), now)
        if stop is not None or len(sequence.tokens) >= sequence.most_length:
            self._end(sequence)
            reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
            self._outcomes.finished(sequence, now, reason=reason)

    # ---- the life of a sequence ----------------------------------------------------------------------------------

    def _load(self, now: float) -> Load:
        answers = lasting(self._residents.answering, self.cost)
        return Load(self._waiting.requests, self._waiting.tokens, answers, max(now, self._busy_until))

    def _end(self, sequence: Sequence) -> None:
        if sequence.state_slot is None:
            self._queue.drop(sequence)
        self._residents.stop(sequence)
        self._prospects.discount(sequence)
        sequence.ended = True
        self._deadlines.forget(sequence)
        assert sequence.tenant is not None
        sequence.tenant.service.leave(sequence.tenant)
        del self._sequences[sequence.request.request_id]

    def _fail(self, sequence: Sequence, refusal: Refusal) -> None:
        self._end(sequence)
        self._outcomes.failed(sequence.request, refusal)

    def _drop_lost(self, now: float) -> None:
        """Give up what cannot be in time, the oldest lost cause first; an answer that may be cut short is ended."""
        for sequence in self._deadlines.lost(now):
            if sequence.first_seconds is None:
                self._prospects.came(sequence, math.inf)
            where = "in the queue" if sequence.state_slot is None else "while it ran"
            deadline = sequence.request.deadline_seconds
            if deadline is not None and deadline <= now:
                self._fail(sequence, Refusal(FailureKind.EXPIRED, "EXPIRED", f"the deadline passed {where}"))
            elif sequence.first_seconds is not None:
                sequence.degraded = tuple({*sequence.degraded, Degradation.FEWER_TOKENS})
                self._end(sequence)
                self._outcomes.finished(sequence, now, reason=FinishReason.LENGTH)
            else:
                self._fail(sequence, self._admission.lost(sequence, self._load(now), where))
