"""How long the rest of a request takes, by the cost model."""

from __future__ import annotations

from shoplm.request import Generate, Request, Service
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import CostModel, kv_tokens
from shoplm.scheduler.sequence import Sequence

LEAST_TOKENS = 8  # of a chat answer that is made shorter
_CERTAIN = 0.9  # of the least time that is left: less is a lost cause beyond the model's error
_CUT_GAPS = 2.0  # token gaps before its deadline at which an answer is ended that may be cut short
_GAP_FORGET = 0.95
_LENGTH_FORGET = 0.95
_FULL_ANSWER = 1.0  # share of the longest answer that is expected before any was seen


class Forecast:
    """Seconds of work that is left, and moments by which it must begin."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self._config = config
        self._policy = config.policy
        self.cost = cost
        self._token_gap: float | None = None
        self._answer_share = _FULL_ANSWER

    def set_times(self, sequence: Sequence) -> None:
        """Note by when the first result must and should be there."""
        sequence.limit_seconds = self.limit_seconds(sequence)
        sequence.due_seconds = self.due_seconds(sequence)

    def limit_seconds(self, sequence: Sequence) -> float | None:
        """The moment after which the first result is of no use: the caller's deadline less the rest of the answer, or
        the target of a service whose target is enforced."""
        request = sequence.request
        return self._limit_seconds(request, self.answer_seconds(sequence))

    def _limit_seconds(self, request: Request, answer_seconds: float) -> float | None:
        limits = []
        if request.deadline_seconds is not None:
            limits.append(request.deadline_seconds - answer_seconds)
        if request.service in self._policy.enforced:
            limits.append(request.arrival_seconds + self._policy.target_seconds[request.service])
        return min(limits, default=None)

    def promised_seconds(self, sequence: Sequence) -> float | None:
        """By when a newcomer's first result must be expected for it to be let in. Its limit, and for a chat early
        enough for its tokens to come no faster than their target, unless that were before its first token's target.
        """
        request, limit = sequence.request, sequence.limit_seconds
        if limit is None or request.deadline_seconds is None or not isinstance(request.task, Generate):
            return limit
        at_pace = request.deadline_seconds - request.task.max_tokens * self._policy.token_target_seconds
        target = request.arrival_seconds + self._policy.target_seconds[request.service]
        return min(limit, max(at_pace, target))

    def due_seconds(self, sequence: Sequence) -> float:
        """When the first result should be there."""
        target = sequence.request.arrival_seconds + self._policy.target_seconds[sequence.request.service]
        return target if sequence.limit_seconds is None else min(target, sequence.limit_seconds)

    def answer_seconds(self, sequence: Sequence) -> float:
        """From a chat's first token to its last, if the answer is as long as others were."""
        task = sequence.request.task
        if not isinstance(task, Generate):
            return 0.0
        return (max(1.0, self._answer_share * task.max_tokens) - 1) * self.token_seconds

    @property
    def token_seconds(self) -> float:
        """Between two tokens of an answer: as observed, at most the target, which the scheduler keeps."""
        target = self._policy.token_target_seconds
        return target if self._token_gap is None else min(self._token_gap, target)

    def work_seconds(self, sequence: Sequence) -> float:
        """What the first result still adds to steps: the prompt's rest and the levels of a search."""
        if not sequence.level and not sequence.is_prompt:
            return 0.0
        work = 0.0
        if sequence.level == 0:
            start = sequence.computed or sequence.expected_cached
            left = max(len(sequence.tokens) - start, 1)
            work = self.cost.work_seconds(left, kv_tokens(start, left), 1)
        levels = sequence.depth - max(sequence.level, 1)
        if levels:
            lanes = sequence.lanes
            work += levels * self.cost.work_seconds(lanes, lanes * sequence.prompt_length, 1)
        return work

    def whole_seconds(self, sequence: Sequence) -> float:
        """What the request adds to steps until its end: the first result, and as much of an answer as is expected."""
        work, task = self.work_seconds(sequence), sequence.request.task
        if isinstance(task, Generate):
            count = max(1.0, self._answer_share * task.max_tokens) - 1
            keys = count * (sequence.prompt_length + count / 2)
            work += count * self.cost.work_seconds(1, 0, 1) + self.cost.coefficients.kv * keys
        return work

    def alone_seconds(self, sequence: Sequence, work: float | None = None) -> float:
        """To the first result on an engine that does nothing else, with this `work_seconds`; None: it is worked out.
        0 when all of it is on its way."""
        steps = 0
        if sequence.level == 0 and sequence.is_prompt:
            left = len(sequence.tokens) - (sequence.computed or sequence.expected_cached)
            steps = -(-left // self._config.max_step_tokens)
        steps += sequence.depth - max(sequence.level, 1)
        return (self.work_seconds(sequence) if work is None else work) + steps * self.cost.coefficients.step

    def lost_at(self, sequence: Sequence) -> float | None:
        """When the request is a lost cause if nothing more is computed of it; None: never.

        Once an answer is being read, only its end counts; before, one that may be cut short counts as cut short.
        """
        deadline = sequence.request.deadline_seconds
        if sequence.first_seconds is not None:
            if deadline is None or not sequence.request.allow_degraded:
                return deadline
            return deadline - _CUT_GAPS * self.token_seconds
        limit = sequence.limit_seconds
        if sequence.request.allow_degraded and isinstance(sequence.request.task, Generate):
            shortest = min(self.answer_seconds(sequence), (LEAST_TOKENS - 1) * self.token_seconds)
            limit = self._limit_seconds(sequence.request, shortest)
        if limit is None or not self.cost.is_fitted or self._policy.order == "fcfs":
            return deadline
        return limit - _CERTAIN * self.alone_seconds(sequence)

    def can_be_on_time(self, sequence: Sequence, now: float) -> bool:
        """Whether the first result could be there when it is due."""
        return now + _CERTAIN * self.alone_seconds(sequence) <= sequence.due_seconds

    def saw_gaps(self, seconds: float, count: int) -> None:
        """So many times, the same time between two tokens of an answer."""
        known, kept = self._token_gap, _GAP_FORGET**count
        self._token_gap = seconds if known is None else kept * known + (1 - kept) * seconds

    def saw_answer(self, sequence: Sequence) -> None:
        """An answer came to its own end; how long the next ones will be."""
        task = sequence.request.task
        if isinstance(task, Generate) and sequence.request.service is Service.CHAT and not sequence.degraded:
            share = sequence.completion_tokens / task.max_tokens
            self._answer_share = _LENGTH_FORGET * self._answer_share + (1 - _LENGTH_FORGET) * share
