"""The answers that go on, as the scheduler keeps them: their order, their sums, and the pages they need."""

from __future__ import annotations

import math

import pytest
from shoplm.request import Generate, Request, Service, token_ids
from shoplm.scheduler.answering import Answering, begins_to_answer
from shoplm.scheduler.cost import Coefficients
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.sequence import Sequence

PROMPT = 6
PAGE_SIZE = 4
COST = Coefficients(step=1.0, token=0.5, kv=0.25, row=2.0)


def answer(name: str, tenant: str = "", max_tokens: int = 8, last: float | None = 0.0) -> Sequence:
    """An answer that has its first token."""
    request = Request(name, Service.CHAT, token_ids(range(PROMPT)), Generate(max_tokens), 0.0, tenant=tenant)
    sequence = Sequence(request, 0.0, token_ids([*range(PROMPT), 9]), computed=PROMPT, last_token_seconds=last)
    sequence.tenant = SHARES.services[Service.CHAT].join(tenant)
    return sequence


SHARES = Shares({}, {})


def test_whoever_was_served_comes_last_and_the_sums_follow() -> None:
    answering = Answering(PAGE_SIZE)
    first, second, third = answers = [answer(name) for name in ("first", "second", "third")]
    for each in answers:
        answering.join(each)
    assert (len(answering), answering.keys) == (3, 3 * (PROMPT + 1))
    served = answering.serve([first, second], 1.0)
    assert (served.starts, served.keys) == ([PROMPT, PROMPT], 2 * (PROMPT + 1))
    assert list(answering.all()) == [third, first, second]
    assert [each.computed for each in answers] == [PROMPT + 1, PROMPT + 1, PROMPT]
    assert [each.in_flight for each in answers] == [1, 1, 0]
    assert answering.keys == 2 * (PROMPT + 2) + PROMPT + 1
    answering.leave(first)
    answering.leave(first)  # is not here any more
    assert (list(answering.all()), answering.keys) == ([third, second], 2 * PROMPT + 3)


def test_an_answer_leaves_when_its_last_token_is_planned() -> None:
    answering = Answering(PAGE_SIZE)
    short, long = answer("short", max_tokens=3), answer("long")
    for each in (short, long):
        answering.join(each)
    answering.serve(answering.all(), 1.0)
    assert list(answering.all()) == [short, long]  # its third token is drawn from the second
    answering.serve(answering.all(), 2.0)
    assert list(answering.all()) == [long]


def test_pages_are_asked_for_when_the_next_token_begins_one() -> None:
    answering = Answering(PAGE_SIZE)
    stays, goes = answer("stays"), answer("goes")
    for each in (stays, goes):
        answering.join(each)
    answering.serve(answering.all(), 1.0)
    assert list(answering.at_page_ends()) == []  # the next token is the eighth, the last of a page
    answering.serve(answering.all(), 2.0)
    answering.leave(goes)
    assert list(answering.at_page_ends()) == [stays]
    assert list(answering.at_page_ends()) == []


def test_the_next_token_is_due_a_target_after_the_last_one_and_late_work_has_patience() -> None:
    answering = Answering(PAGE_SIZE)
    assert answering.first_due(0.1) == math.inf
    late = answer("late", last=1.0)
    late.is_late = True
    answering.join(late)
    assert answering.first_due(0.1) == pytest.approx(1.5)
    answering.join(answer("has no token yet", last=None))
    assert answering.first_due(0.1) == pytest.approx(1.5)
    answering.join(answer("timely", last=1.2))
    assert answering.first_due(0.1) == pytest.approx(1.3)


def test_tokens_are_charged_to_the_tenants_whose_they_are() -> None:
    answering = Answering(PAGE_SIZE)
    answers = [answer("a", "one"), answer("b", "two"), answer("c", "one")]
    for each in answers:
        answering.join(each)
    served = answering.serve(answering.all(), 1.0)
    spent = dict.fromkeys((each.tenant for each in answers if each.tenant is not None), 0.0)
    one = COST.token + COST.row + COST.kv * (PROMPT + 1)
    assert served.charge(spent, COST) == {"chat": 3}
    assert list(spent.values()) == pytest.approx([2 * one, one])
    # What was planned for a tenant is charged once.
    assert answering.serve((), 2.0).charge(spent, COST) == {}
    assert list(spent.values()) == pytest.approx([2 * one, one])


def test_a_preempted_answer_goes_on_when_all_but_its_last_token_is_computed() -> None:
    sequence = answer("again")
    sequence.tokens.extend([9, 9])
    sequence.restart()
    for computed, begins in ((PROMPT + 1, False), (PROMPT + 2, True)):
        sequence.computed = computed
        assert begins_to_answer(sequence) is begins
