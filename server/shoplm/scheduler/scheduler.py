"""The scheduler: admits requests, plans steps and takes their results.

Answers that go on (chat tokens, levels of beams) and prompts share a step's budget of tokens and seconds; prompts come
by their order, most urgent first. What cannot make its deadline is refused on arrival, or given up as soon as it is a
lost cause. docs/scheduling.md explains the rules; who decides what: `admission`, `ordering`, `fairness`, `budget`,
`deadlines`, and `cost` for how long things take.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cmp_to_key
from heapq import merge
from operator import attrgetter
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
from shoplm.scheduler.answering import Served, begins_to_answer
from shoplm.scheduler.budget import LEAST_CHUNK, Budgeter, StepBudget
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import CostModel, StepLoad
from shoplm.scheduler.deadlines import Deadlines
from shoplm.scheduler.fairness import Shares, Tenant
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.ordering import ArrivalOrder, Order, SlackOrder
from shoplm.scheduler.outcomes import Outcomes
from shoplm.scheduler.plan import Plan, PlanRow
from shoplm.scheduler.prospects import Load, Prospects
from shoplm.scheduler.residents import Residents
from shoplm.scheduler.rows import next_level, next_tokens
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.stats import SchedulerStats
from shoplm.scheduler.survey import Answers, survey
from shoplm.scheduler.waiting import WaitingRoom

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
        self.cost = CostModel()
        self.shares = Shares(config.policy.service_weights, config.policy.tenant_weights)
        self._limits = Limits(max_context_tokens, trie_depths, lanes)
        self._forecast = Forecast(config, self.cost)
        self._budgeter = Budgeter(config, self.cost, self._forecast)
        self._prospects = Prospects(config, self._forecast, self._budgeter, self.shares)
        self._waiting = WaitingRoom(config, self.shares)
        self._admission = Admission(
            config, self._limits, self.memory, self._forecast, self._budgeter, self._prospects, self._waiting
        )
        self._order: Order = (
            ArrivalOrder()
            if config.policy.order == "fcfs"
            else SlackOrder(self.shares, self._forecast, self._prospects.count)
        )
        self._deadlines = Deadlines(self._forecast.lost_at)
        self._outcomes = Outcomes(self.stats, self._forecast)
        self._residents = Residents(self.memory, state_slots)
        self._sequences: dict[str, Sequence] = {}
        self._answers = Answers()  # as of the last plan
        self._in_flight: deque[float] = deque()  # predicted seconds of the steps in flight
        self._busy_until = 0.0  # when they should be done
        self._last_commit = 0.0

    # ---- requests in ---------------------------------------------------------------------------------------------

    def admit(self, request: Request, now: float) -> None:
        """Queue a request, or refuse it: then its FailedOutput is among the next outputs."""
        self._prospects.advance(now)
        self.stats.submitted[request.service] += 1
        self._budgeter.saw_request(request.service, now)
        sequence = self._sequence(request)
        if request.request_id in self._sequences:
            message = f"request id {request.request_id!r} is in use"
            refusal: Refusal | None = Refusal(FailureKind.INVALID, "DUPLICATE_REQUEST", message)
        else:
            refusal = self._admission.refusal(sequence, self._load(now), now)
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
        self._enqueue(sequence, now)

    def cancel(self, request_id: str) -> None:
        """The caller has gone: free what the request holds at once. Unknown ids are ignored: the end was under way."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._fail(sequence, Refusal(FailureKind.CANCELLED, "CANCELLED", "cancelled by the caller"))

    def fail(self, plan: Plan, message: str) -> None:
        """The step raised: its requests fail, the others go on."""
        self._in_flight.popleft()
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
            self._enqueue(stopped, now)
        self._order.open(now)
        token_target = self.config.policy.token_target_seconds
        searches, prompts, self._answers = survey(self._residents, self.cost, token_target)
        self._arrange(prompts, now)
        begin = max(now, self._busy_until)
        budget = self._budgeter.open(self._answers, self._most_urgent(prompts, now), begin)
        rows: list[PlanRow] = []
        served = Served()
        if budget.answers_first:
            served = self._plan_answers(searches, rows, budget, now)
        self._plan_prompts(prompts, rows, budget, now)
        if not budget.answers_first:
            served = self._plan_answers(searches, rows, budget, now)
        return self._close(served, rows, begin, now)

    def _arrange(self, prompts: list[Sequence], now: float) -> None:
        """Running prompts by their order; with few of them it is no work."""
        for prompt in prompts:
            self._order.overdue(prompt, now)
        prompts.sort(key=cmp_to_key(lambda one, other: -1 if self._order.before(one, other) else 1))

    def _most_urgent(self, prompts: Seq[Sequence], now: float) -> Sequence | None:
        first = prompts[0] if prompts else None
        waiting = self._order.peek(now)
        if waiting is None or (first is not None and not self._order.before(waiting, first)):
            return first
        return waiting

    def _plan_answers(self, searches: list[Sequence], rows: list[PlanRow], budget: StepBudget, now: float) -> Served:
        """A token or a level for each answer; if not all fit, for those that have waited longest."""
        load, answering = self._answers, self._residents.answering
        if load.tokens <= budget.tokens and load.seconds <= budget.answer_seconds:
            rows += map(next_level, searches)
            budget.take_answers(load.tokens, load.seconds)
            return answering.serve(answering.all(), now)
        waited = attrgetter("last_planned_seconds")
        chosen: list[Sequence] = []
        for sequence in merge(sorted(searches, key=waited), answering.all(), key=waited):
            if budget.tokens < 1 or (budget.used and budget.answer_seconds <= 0):
                break
            if not sequence.level:
                chosen.append(sequence)
                budget.take_answers(1, self.cost.work_seconds(1, sequence.computed + 1, 1))
            elif sequence.lanes <= budget.tokens:
                row = next_level(sequence)
                rows.append(row)
                budget.take_answers(row.count, self._budgeter.row_seconds(row))
        return answering.serve(chosen, now)

    def _plan_prompts(self, prompts: list[Sequence], rows: list[PlanRow], budget: StepBudget, now: float) -> None:
        """Chunks of prompts: running ones and, in the same order, newly started ones."""
        at = 0
        while budget.prompt_tokens > 0 and budget.tokens > 0 and (budget.seconds > 0 or not budget.used):
            running = prompts[at] if at < len(prompts) else None
            waiting = self._order.peek(now)
            if waiting is not None and (running is None or self._order.before(waiting, running)):
                if self._start(waiting, now):
                    prompts.insert(at, waiting)
                else:
                    self._order.hold(waiting)
                continue
            if running is None:
                return
            at += 1
            within = self._budgeter.tokens_within(budget.seconds, running.computed)
            if within < min(LEAST_CHUNK, running.pending):
                if budget.used:
                    return  # nobody is started for whom there is no time
                within = LEAST_CHUNK
            row = next_tokens(running, min(budget.tokens, budget.prompt_tokens, within), self.memory)
            if row is not None:
                rows.append(row)
                budget.take_prompt(row.count, self._budgeter.row_seconds(row))

    def _close(self, served: Served, rows: list[PlanRow], begin: float, now: float) -> Plan:
        """Charge for the step and note what it should take."""
        if not rows and not served.starts:
            return Plan()
        each = self.cost.coefficients
        spent: defaultdict[Tenant, float] = defaultdict(float)
        answers_of = served.charge(spent, each)
        late = served.late_seconds(each)
        tokens, keys = len(served.starts), served.keys
        for row in rows:
            sequence, count, read = row.sequence, row.count, row.keys
            sequence.unread += not row.draws
            sequence.last_planned_seconds = now
            if begins_to_answer(sequence):
                self._residents.begin_answer(sequence)
            seconds = each.token * count + each.kv * read + each.row
            assert sequence.tenant is not None
            spent[sequence.tenant] += seconds
            if sequence.is_late:
                late += seconds
            if sequence.work_bucket is not None:
                self._prospects.count(sequence)
            tokens += count
            keys += read
        load = StepLoad(tokens, keys, len(served.starts) + len(rows))
        plan = Plan(tuple(rows), tuple(served.sequences), tuple(served.starts), answers_of, load, now)
        self._order.spent(spent, late)
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
            if sequence.epoch == row.epoch:
                # Behind the shared pages there is nothing that others could read.
                if not row.is_beam and row.start < len(sequence.nodes) * self.memory.page_size:
                    self.memory.fill(sequence, row.start + row.count)
                if sequence.started_seconds is None:
                    sequence.started_seconds = now
            if not row.reads:
                continue
            if isinstance(sequence.request.task, Generate):
                assert isinstance(output, int)
                self._take_first_token(sequence, output, now)
            elif output is not None and sequence.epoch == row.epoch:
                if isinstance(sequence.request.task, Explain):
                    assert isinstance(output, tuple)
                    output = sequence.parts = sequence.parts + output
                    if row.start + row.count < sequence.length:
                        continue
                self._end(sequence)
                self._outcomes.finished(sequence, now, output=output)
        self.stats.step(plan)

    def _learn(self, plan: Plan, now: float) -> None:
        """A step took from its plan, or the end of the one before it, until now."""
        seconds = now - max(plan.planned_seconds, self._last_commit)
        if seconds > 0:
            self.stats.cost_errors.append(self.cost.observe(plan.load, seconds))
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

    def _take_first_token(self, sequence: Sequence, token: int, now: float) -> None:
        """The token behind a prompt: an answer's first, or the next one where the answer was preempted."""
        sequence.unknown -= 1
        reason = FinishReason.STOP if token in sequence.stop_token_ids else None
        if reason is None:
            sequence.tokens.append(token)
            self._outcomes.token(sequence, token, now)
            reason = FinishReason.LENGTH if len(sequence.tokens) >= sequence.most_length else None
        if reason is not None:
            self._end(sequence)
            self._outcomes.finished(sequence, now, reason=reason)

    # ---- the life of a sequence ----------------------------------------------------------------------------------

    def _sequence(self, request: Request) -> Sequence:
        depth = lanes = 0
        if isinstance(request.task, Select):
            # Popularity alone is answered after the prompt: there are no beams, however deep the trie is.
            depth = 1 if request.task.popularity_only else self._limits.trie_depths.get(request.task.trie, 0)
            lanes = self._limits.lanes(request.task) if depth > 1 else 0
        sequence = Sequence(request, 0.0, list(request.tokens), max(depth, 1), lanes)
        self.memory.look_up(sequence)
        sequence.limit_seconds = self._forecast.limit_seconds(sequence)
        sequence.due_seconds = self._forecast.due_seconds(sequence)
        return sequence

    def _load(self, now: float) -> Load:
        return Load(self._waiting.requests, self._waiting.tokens, self._answers, max(now, self._busy_until))

    def _enqueue(self, sequence: Sequence, now: float) -> None:
        self._order.push(sequence)
        self._prospects.count(sequence)
        self._waiting.enter(sequence)
        self.shares.services[sequence.request.service].queue_grows(now)

    def _dequeue(self, sequence: Sequence) -> None:
        self._order.drop(sequence)
        self._waiting.leave(sequence)
        self.shares.services[sequence.request.service].waiting -= 1

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Let the first of the queue run, if it may and there is room for it."""
        if not self._budgeter.may_answer(sequence, self._answers) or not self._residents.start(sequence):
            return False
        self._dequeue(sequence)
        self.shares.services[sequence.request.service].queue_moves(now)
        if sequence.epoch == 0:
            self.stats.queued(sequence.request.service, now - sequence.request.arrival_seconds)
        return True

    def _end(self, sequence: Sequence) -> None:
        if sequence.state_slot is None:
            self._dequeue(sequence)
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
