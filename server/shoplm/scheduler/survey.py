"""What runs and wants more: answers and searches that go on, with what they add to a step, and prompts."""

from __future__ import annotations

import math
from typing import NamedTuple

from shoplm.scheduler.answering import Answering
from shoplm.scheduler.cost import CostModel
from shoplm.scheduler.residents import Residents
from shoplm.scheduler.sequence import Sequence


class Answers(NamedTuple):
    """The answers and searches that go on, as one load."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0  # that all of them together add to a step
    first_due: float = math.inf  # when the first of them should have its next token or its items


class Survey(NamedTuple):
    """Everything that runs and has something to submit, beside the answers that go on."""

    searches: list[Sequence]
    prompts: list[Sequence]
    answers: Answers


def lasting(answering: Answering, cost: CostModel) -> Answers:
    """The answers as a load on many steps to come; the few levels that a search has left are counted as work."""
    requests = len(answering)
    return Answers(requests, requests, cost.work_seconds(requests, answering.keys, requests))


def survey(residents: Residents, cost: CostModel, token_target: float) -> Survey:
    """Look at what runs. Answers, which may be a thousand, are known as a whole."""
    searches: list[Sequence] = []
    prompts: list[Sequence] = []
    answering = residents.answering
    tokens, keys, first_due = len(answering), answering.keys, answering.first_due(token_target)
    for sequence in residents.others():
        if not sequence.level:
            if sequence.wants_more:  # also an answer that was preempted, of which all but the last token is cached
                prompts.append(sequence)
        elif sequence.level < sequence.depth:
            searches.append(sequence)
            tokens += sequence.lanes
            keys += sequence.lanes * sequence.computed
            if sequence.due_seconds < first_due and not sequence.is_late:
                first_due = sequence.due_seconds
    requests = len(answering) + len(searches)
    return Survey(searches, prompts, Answers(requests, tokens, cost.work_seconds(tokens, keys, requests), first_due))
