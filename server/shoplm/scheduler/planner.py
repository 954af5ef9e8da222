"""What the next step computes: answers that go on and chunks of prompts, within a budget of tokens and seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from collections.abc import Sequence as Seq
from functools import cmp_to_key
from heapq import merge
from operator import attrgetter

from shoplm.scheduler.answering import Served, begins_to_answer
from shoplm.scheduler.budget import LEAST_CHUNK, Budgeter, StepBudget
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import CostModel, StepLoad
from shoplm.scheduler.drafts import Drafter
from shoplm.scheduler.fairness import Tenant
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.plan import Plan, PlanRow
from shoplm.scheduler.prospects import Prospects
from shoplm.scheduler.queue import Queue
from shoplm.scheduler.residents import Residents
from shoplm.scheduler.rows import next_level, next_tokens
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.stats import SchedulerStats
from shoplm.scheduler.survey import Answers, survey

PATIENCE_SECONDS = 5.0  # for room: after it nobody else is started


class Planner:
    """Plans steps, starts requests from the queue and charges for both."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        cost: CostModel,
        memory: SequenceMemory,
        residents: Residents,
        queue: Queue,
        budgeter: Budgeter,
        prospects: Prospects,
        stats: SchedulerStats,
    ) -> None:
        self._answers = Answers()  # of the step that is being planned
        self._token_target = config.policy.token_target_seconds
        self._cost = cost
        self._memory = memory
        self._residents = residents
        self._queue = queue
        self._order = queue.order
        self._budgeter = budgeter
        self._prospects = prospects
        self._stats = stats
        self._drafter = Drafter(config.max_draft_tokens, cost)
        self._starved: Sequence | None = None  # smaller requests have taken every page that came free, for too long

    def plan(self, begin: float, now: float) -> Plan:
        """The step that will begin at `begin`; empty when there is nothing to compute."""
        self._order.open(now)
        searches, prompts, self._answers = survey(self._residents, self._cost, self._token_target)
        self._arrange(prompts, now)
        waiting = self._first_waiting(now)
        budget = self._budgeter.open(self._answers, self._most_urgent(prompts, waiting), begin)
        rows: list[PlanRow] = []
        served = Served()
        # Who waits for a first result has a better use for the step's time than guesses.
        guesses = not searches and not prompts and waiting is None and self._drafter.looks(self._answers.requests)
        if budget.answers_first:
            served = self._plan_answers(searches, rows, budget, now, guesses=guesses)
        self._plan_prompts(prompts, waiting, rows, budget, now)
        if not budget.answers_first:
            served = self._plan_answers(searches, rows, budget, now)
        return self._close(served, rows, now)

    def _arrange(self, prompts: list[Sequence], now: float) -> None:
        """Running prompts by their order; with few of them it is no work."""
        for prompt in prompts:
            self._order.overdue(prompt, now)
        prompts.sort(key=cmp_to_key(lambda one, other: -1 if self._order.before(one, other) else 1))

    def _most_urgent(self, prompts: Seq[Sequence], waiting: Sequence | None) -> Sequence | None:
        first = prompts[0] if prompts else None
        if waiting is None or (first is not None and not self._order.before(waiting, first)):
            return first
        return waiting

    def _plan_answers(
        self,
        searches: list[Sequence],
        rows: list[PlanRow],
        budget: StepBudget,
        now: float,
        *,
        guesses: bool = False,
    ) -> Served:
        """A token or a level for each answer, with `guesses` of further tokens where there is room; if not all fit, for
        those that have waited longest."""
        load, answering = self._answers, self._residents.answering
        if load.tokens <= budget.tokens and load.seconds <= budget.answer_seconds:
            rows += map(next_level, searches)
            budget.take_answers(load.tokens, load.seconds)
            answers = answering.all()
            return answering.serve(self._plan_drafts(answers, rows, budget) if guesses else answers, now)
        waited = attrgetter("last_planned_seconds")
        chosen: list[Sequence] = []
        for sequence in merge(sorted(searches, key=waited), answering.all(), key=waited):
            if budget.tokens < 1 or (budget.used and budget.answer_seconds <= 0):
                break
            if not sequence.level:
                chosen.append(sequence)
                budget.take_answers(1, self._cost.work_seconds(1, sequence.computed + 1, 1))
            elif sequence.lanes <= budget.tokens:
                row = next_level(sequence)
                rows.append(row)
                budget.take_answers(row.count, self._budgeter.row_seconds(row))
        return answering.serve(chosen, now)

    def _plan_drafts(
        self, answers: Collection[Sequence], rows: list[PlanRow], budget: StepBudget
    ) -> Collection[Sequence]:
        """Rows for the answers whose next tokens can be guessed; returns the others."""
        others: list[Sequence] = []
        for sequence in answers:
            each = self._cost.work_seconds(1, sequence.computed, 1)
            within = budget.answer_seconds / each if each > 0 else math.inf
            draft = self._drafter.draft(sequence, len(answers), int(min(budget.tokens, within)))
            # Pages are taken that are needed soon, be the guess right or wrong.
            draft = draft[: self._memory.reserve(sequence, 1 + len(draft)) - 1] if draft else draft
            if draft:
                rows.append(self._residents.answering.serve_draft(sequence, draft))
                budget.take_answers(len(draft), len(draft) * each)
            else:
                others.append(sequence)
        return others

    def _plan_prompts(
        self,
        prompts: list[Sequence],
        waiting: Sequence | None,
        rows: list[PlanRow],
        budget: StepBudget,
        now: float,
    ) -> None:
        """Chunks of prompts: running ones and, in the same order, newly started ones, `waiting` first."""
        at, first = 0, True
        to_come = set(prompts)
        while budget.prompt_tokens > 0 and budget.tokens > 0 and (budget.seconds > 0 or first):
            running = prompts[at] if at < len(prompts) else None
            if waiting is not None and (running is None or self._order.before(waiting, running)):
                if not first and not self._has_time(waiting, budget):
                    return  # nobody is started for whom there is no time
                if self._start(waiting, now):
                    prompts.insert(at, waiting)
                    to_come.add(waiting)
                    waiting = self._first_waiting(now)
                else:
                    self._order.hold(waiting)
                    waiting = None if self._starved is not None else self._order.peek(now)
                continue
            if running is None:
                return
            at += 1
            running = self._whose_turn(running, to_come)
            if running is None:
                continue
            within = self._budgeter.tokens_within(budget.seconds, running.computed)
            if within < min(LEAST_CHUNK, running.pending):
                if not first:
                    return
                within = LEAST_CHUNK  # whoever comes first goes on in each step, however much it reads
            first = False
            most = min(budget.tokens, budget.prompt_tokens, within)
            again = self._memory.is_known(running)  # all of it, but for the hidden state that the task reads
            row = next_tokens(running, 1 if again else min(self._memory.computable(running), most), again=again)
            rows.append(row)
            budget.take_prompt(row.count, self._budgeter.row_seconds(row))

    def _has_time(self, waiting: Sequence, budget: StepBudget) -> bool:
        """Whether what is left of a step holds a chunk of the prompt that is worth a row."""
        start = waiting.expected_cached
        return self._budgeter.tokens_within(budget.seconds, start) >= min(LEAST_CHUNK, waiting.length - start)

    def _whose_turn(self, prompt: Sequence | None, to_come: set[Sequence]) -> Sequence | None:
        """The prompt itself, or where it waits for a page, whoever computes that, to whom it lends its place; None: the
        turn has been, or all is on its way."""
        while prompt is not None and prompt in to_come:
            to_come.remove(prompt)
            if self._memory.catch_up(prompt):
                return prompt
            prompt = self._memory.awaited(prompt)
        return None

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Let the first of the queue run, if it may and there is room for it."""
        if not self._budgeter.may_answer(sequence, self._answers):
            if self._memory.pages_needed(sequence) <= self._memory.tree.available:
                self._starved = None  # it is not pages that it waits for, which others need not leave to it
            return False
        if not self._residents.start(sequence):
            if sequence.lacks_since is None:
                sequence.lacks_since = now
            elif now - sequence.lacks_since > PATIENCE_SECONDS:
                self._starved = sequence
            return False
        self._queue.pop(sequence)
        return True

    def _first_waiting(self, now: float) -> Sequence | None:
        if self._starved is not None and self._starved.ticket:
            return self._starved
        self._starved = None
        return self._order.peek(now)

    def _close(self, served: Served, rows: list[PlanRow], now: float) -> Plan:
        """Charge for the step."""
        if not rows and not served.starts:
            return Plan()
        each = self._cost.coefficients
        spent: defaultdict[Tenant, float] = defaultdict(float)
        answers_of = served.charge(spent, each)
        tokens, keys, reads, late, credited = len(served.starts), served.keys, 0, 0.0, 0.0
        for row in rows:
            sequence, count, read, drafted = row.sequence, row.count, row.keys, len(row.draft)
            sequence.unread += not row.draws
            sequence.last_planned_seconds = now
            if sequence.started_seconds is None:
                sequence.started_seconds = now
                self._stats.queued(sequence.request.service, now - sequence.request.arrival_seconds)
            if not drafted and begins_to_answer(sequence):
                self._residents.begin_answer(sequence)
            seconds = each.token * count + each.kv * read + each.row * (1 + drafted)
            assert sequence.tenant is not None
            spent[sequence.tenant] += seconds
            if sequence.is_late:
                late += seconds
            elif self._order.has_credit(sequence):
                credited += seconds
            self._prospects.progressed(sequence)
            tokens += count
            keys += read
            reads += 1 + drafted
        load = StepLoad(tokens, keys, len(served.starts) + reads)
        self._order.spent(spent, late, credited)
        self._prospects.planned(now)
        return Plan(tuple(rows), tuple(served.sequences), tuple(served.starts), answers_of, load, now)
