"""What runs and wants more: answers and searches that go on, with what they add to a step, and prompts.

The only pass over everything that runs that each step makes; with a thousand requests running, it is what planning
costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from shoplm.scheduler.cost import CostModel
from shoplm.scheduler.sequence import Sequence

_PATIENCE = 5.0  # token targets after which an answer of late work must go on


class Answers(NamedTuple):
    """The answers and searches that go on, as one load."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0  # that all of them together add to a step
    first_due: float = math.inf  # when the first of them should have its next token or its items


class Survey(NamedTuple):
    """Everything that runs and has something to submit."""

    going_on: list[Sequence]
    prompts: list[Sequence]
    answers: Answers


def survey(running: Iterable[Sequence], cost: CostModel, token_target: float) -> Survey:
    """Look at all that runs, once."""
    going_on: list[Sequence] = []
    prompts: list[Sequence] = []
    tokens = keys = 0
    first_due = last = last_late = math.inf
    for sequence in running:
        computed = sequence.computed
        if sequence.level:
            if sequence.level < sequence.depth:
                going_on.append(sequence)
                tokens += sequence.lanes
                keys += sequence.lanes * computed
                if sequence.due_seconds < first_due and not sequence.is_late:
                    first_due = sequence.due_seconds
            continue
        length = len(sequence.tokens) + sequence.unknown
        if length - computed > 1 or computed < sequence.prompt_length:
            if sequence.wants_more:
                prompts.append(sequence)
        elif length > computed and length < sequence.most_length:
            going_on.append(sequence)
            tokens += 1
            keys += computed
            moment = sequence.last_token_seconds
            if moment is None:
                continue
            if sequence.is_late:
                if moment < last_late:
                    last_late = moment
            elif moment < last:
                last = moment
    first_due = min(first_due, last + token_target, last_late + _PATIENCE * token_target)
    seconds = cost.work_seconds(tokens, keys, len(going_on))
    return Survey(going_on, prompts, Answers(len(going_on), tokens, seconds, first_due))
