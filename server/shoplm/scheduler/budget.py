"""How much a step may compute: tokens, and seconds.

A step should end before the most urgent of its requests is due, and before a running answer's next token is; and it
should not be so long that what arrives meanwhile is late already. A target that cannot be kept by any step constrains
none: then, and before the cost model is fitted, steps are bounded by tokens alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoplm.request import Generate, Service
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import CostModel
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.plan import PlanRow
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import Answers

ATTAINABLE = 0.8  # of the token target that answers may take of a step; the rest is for prompts and for error
PROMPT_FLOOR = 0.15  # of the token target that prompts get of a step, however urgent the answers are
LEAST_CHUNK = 16  # tokens of a prompt that are worth a row, unless fewer end it
_RECENT_SECONDS = 5.0  # how long a service that asked counts as one that may ask any moment
_CHEAP = 0.5  # of a step's constant part: answers that add no more to it are not kept out for each other's sake
_LEAST_CUT = 2.0  # the same of a step that ends early for the most urgent prompt: others' work would fit in, too
_LEAST_STEPS = 4.0  # a step is never bounded below so many times its constant part: efficiency


@dataclass(slots=True)
class StepBudget:
    """What is left of a step that is being planned."""

    tokens: int
    prompt_tokens: int
    seconds: float
    answer_seconds: float  # of these, at most
    answers_first: bool
    used: bool = False  # something was planned

    def take_prompt(self, tokens: int, seconds: float) -> None:
        """A chunk of a prompt was planned."""
        self.used = True
        self.tokens -= tokens
        self.prompt_tokens -= tokens
        self.seconds -= seconds
        self.answer_seconds -= seconds

    def take_answers(self, tokens: int, seconds: float) -> None:
        """Tokens of answers, or levels of searches, were planned."""
        self.used |= tokens > 0
        self.tokens -= tokens
        self.seconds -= seconds
        self.answer_seconds -= seconds


class Budgeter:
    """Opens steps."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, forecast: Forecast) -> None:
        self._config = config
        self._cost = cost
        self._forecast = forecast
        self._by_time = config.policy.order == "slack"
        self._asked: dict[Service, float] = {}

    def saw_request(self, service: Service, now: float) -> None:
        """A request arrived."""
        self._asked[service] = now

    @property
    def uses_time(self) -> bool:
        """Steps have a budget of seconds."""
        return self._by_time and self._cost.is_fitted

    def open(self, answers: Answers, urgent: Sequence | None, now: float) -> StepBudget:
        """The budget of the next step; `urgent` is the prompt that comes first, of those that run and those that wait.

        The prompt's tokens come before the answers' if it is due before them and would be late behind them.
        """
        config = self._config
        if not self.uses_time:
            most = config.max_mixed_prompt_tokens if answers.requests else config.max_step_tokens
            return StepBudget(config.max_step_tokens, most, math.inf, math.inf, True)
        constant, target = self._cost.coefficients.step, config.policy.token_target_seconds
        seconds = self.longest_step_seconds(now)
        least = max(PROMPT_FLOOR * target, self._cost.work_seconds(LEAST_CHUNK, 0, 1))
        prompt_tokens, answers_first = config.max_step_tokens, True
        if answers.requests and self.attainable(answers.seconds):
            seconds = max(min(seconds, answers.first_due - now), constant + answers.seconds + least)
        elif answers.requests:
            # Where prompts are cheap, so many of them as make the step twice as long; else the engine would stand idle.
            cheap = self.tokens_within(constant + answers.seconds, 0)
            prompt_tokens = max(config.max_mixed_prompt_tokens, min(cheap, config.max_step_tokens))
            seconds = max(seconds, constant + 2 * least)
        if urgent is not None and not urgent.is_late:
            need, room = self._forecast.alone_seconds(urgent), urgent.due_seconds - now
            if max(need, _LEAST_CUT * constant) <= room < seconds:
                answers_first = need + answers.seconds <= room or answers.first_due <= urgent.due_seconds
                seconds = max(room, need + answers.seconds) if answers_first else room
        return StepBudget(
            config.max_step_tokens,
            prompt_tokens,
            seconds - constant,
            # Answers that do not all fit leave something to the prompts.
            seconds - constant - (least if urgent is not None and answers_first else 0.0),
            answers_first,
        )

    def attainable(self, answers_seconds: float) -> bool:
        """Whether answers that add so much to each step have their tokens in time."""
        return self._cost.coefficients.step + answers_seconds <= ATTAINABLE * self._config.policy.token_target_seconds

    def may_answer(self, sequence: Sequence, answers: Answers) -> bool:
        """Whether one answer more still leaves those that go on their tokens in time, or all are cheap beside a step's
        constant part. Late ones are not protected, and a target that even a single answer misses protects none."""
        if not self.uses_time or answers.first_due == math.inf or not isinstance(sequence.request.task, Generate):
            return True
        one = self._cost.work_seconds(1, sequence.prompt_length, 1)
        work, constant = answers.seconds + one, self._cost.coefficients.step
        return work <= _CHEAP * constant or self.attainable(work) or not self.attainable(one)

    def longest_step_seconds(self, now: float) -> float:
        """Half of the shortest target among the services that have asked of late: who arrives during a step can still
        be served in time after it."""
        targets = self._config.policy.target_seconds
        recent = [targets[service] for service, asked in self._asked.items() if now - asked <= _RECENT_SECONDS]
        half = 0.5 * min(recent, default=max(targets.values()))
        return max(half, _LEAST_STEPS * self._cost.coefficients.step)

    def tokens_within(self, seconds: float, start: int) -> int:
        """Most tokens of a prompt, from `start` on, that add no more than so much to a step."""
        if seconds == math.inf:
            return self._config.max_step_tokens
        # n tokens add n * per_token + n * n * kv / 2, as `kv_tokens` counts keys: n is the larger root.
        each = self._cost.coefficients
        per_token, left = each.token + each.kv * (start + 0.5), max(seconds - each.row, 0.0)
        divisor = per_token + math.sqrt(per_token * per_token + 2 * each.kv * left)
        if divisor <= 0:
            return self._config.max_step_tokens
        return int(min(2 * left / divisor, self._config.max_step_tokens))

    def row_seconds(self, row: PlanRow) -> float:
        """What a row adds to a step."""
        return self._cost.work_seconds(row.count, row.keys, 1)
