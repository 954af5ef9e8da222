"""What predictions of waits rest on: the pace of a queue, their correction, and what services are asked for."""

from __future__ import annotations

import math
import random

import pytest
from shoplm.request import Predict, Request, Service, token_ids
from shoplm.scheduler.correction import Correction
from shoplm.scheduler.dearest import Dearest
from shoplm.scheduler.demand import Demand
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.pace import Pace
from shoplm.scheduler.sequence import Sequence


def test_a_queue_that_moves_is_believed_more_than_the_guess() -> None:
    pace = Pace()
    assert pace.wait_seconds(1.0, guess=4.0) == pytest.approx(4.0)
    for step in range(100):
        pace.planned(0.05, True, 0.1 * step)  # half a second of work a second
    assert pace.wait_seconds(1.0, guess=4.0) == pytest.approx(2.0, rel=0.15)
    assert pace.wait_seconds(3.0, guess=12.0) == pytest.approx(6.0, rel=0.15)


def test_a_queue_that_empties_tells_nothing_of_its_pace() -> None:
    pace = Pace()
    for step in range(10):
        pace.planned(0.05, True, 0.1 * step)
    pace.planned(0.01, False, 1.0)
    assert pace.wait_seconds(1.0, guess=4.0) == pytest.approx(4.0)
    pace.planned(0.05, True, 50.0)  # the time without a queue does not count
    pace.planned(0.05, True, 50.1)
    assert 2.0 < pace.wait_seconds(1.0, guess=4.0) < 4.0


def test_the_correction_follows_the_quantile_and_is_bounded() -> None:
    generator = random.Random(1)
    correction = Correction()
    for _ in range(5_000):
        correction.saw(1.0, generator.uniform(0.9, 1.9))
    assert correction.factor == pytest.approx(1.7, abs=0.15)  # four of five come no later
    for _ in range(1_000):
        correction.saw(1.0, math.inf)
    assert correction.factor == 2.0
    for _ in range(1_000):
        correction.saw(1.0, 0.1)
    assert correction.factor == pytest.approx(0.8)


def test_each_service_leads_by_what_it_began_beyond_the_part_of_all() -> None:
    demand = Demand()
    for moment in range(1_000):
        for service, seconds in ((Service.CHAT, 5e-3), (Service.RECOMMENDATION, 1e-3), (Service.PREDICTION, 1e-3)):
            demand.asked(service, seconds, 0.01 * moment)
            if service is not Service.CHAT or moment % 2:
                demand.begun(service, 0.01 * moment)
    leads = demand.leads()
    assert leads[Service.CHAT] < 0 < leads[Service.RECOMMENDATION] == pytest.approx(leads[Service.PREDICTION])
    assert sum(leads.values()) == pytest.approx(0.0, abs=1e-6)
    shares = demand.shares()
    assert shares[Service.CHAT] == pytest.approx(5 / 7)


def test_who_waits_long_for_its_turn_has_no_more_begun_than_was_asked_for() -> None:
    demand = Demand()
    for moment in range(3_000):
        now = 0.1 * moment
        for service in (Service.CHAT, Service.PREDICTION):
            demand.asked(service, 0.01, now)
        demand.begun(Service.PREDICTION, now)
        if now > 25.0:
            demand.begun(Service.CHAT, now - 25.0)
    leads = demand.leads()
    assert leads[Service.CHAT] < -0.5 and leads[Service.PREDICTION] > 0.5


def test_the_dearest_of_those_that_wait_is_found_and_who_has_left_is_forgotten() -> None:
    dearest, waiting = Dearest(), []
    for number in range(1_000):
        request = Request(str(number), Service.PREDICTION, token_ids([1]), Predict(()), 0.0, deadline_seconds=1.0)
        sequence = Sequence(request, 1.0, token_ids([1]), ticket=number + 1, queued_tokens=1)
        sequence.work_seconds = (number * 7 % 10) / 10
        dearest.push(sequence, len(waiting))
        waiting.append(sequence)
        if len(waiting) > 5:
            waiting.pop(0).queued_tokens = 0
    found = dearest.peek()
    assert found in waiting and found.work_seconds == max(each.work_seconds for each in waiting)
    assert len(dearest) < 150
    for each in waiting:
        each.queued_tokens = 0
    assert dearest.peek() is None


def test_a_flood_of_one_service_leaves_a_tenth_to_another() -> None:
    demand = Demand()
    for moment in range(3_000):
        now = 0.01 * moment
        demand.asked(Service.PREDICTION, 0.01, now)  # as much as the engine can do
        for _ in range(20):  # and twenty times that
            demand.asked(Service.CHAT, 0.01, now)
        demand.begun(Service.CHAT, now)
    leads = demand.leads()
    # A tenth of what was begun is due to predictions, more than their part of all that was asked for.
    total = leads[Service.CHAT] - leads[Service.PREDICTION]
    assert demand.shares()[Service.PREDICTION] >= 0.1
    assert leads[Service.PREDICTION] < 0 < leads[Service.CHAT] < total


def test_weights_that_are_set_count_instead_of_what_is_asked_for() -> None:
    fixed = Shares({Service.CHAT: 2.0}, {})
    fixed.demand.asked(Service.PREDICTION, 5.0, 1.0)
    assert fixed.fractions() == {Service.CHAT: 0.5, Service.RECOMMENDATION: 0.25, Service.PREDICTION: 0.25}
    free = Shares({}, {})
    free.demand.asked(Service.PREDICTION, 5.0, 1.0)
    assert free.fractions()[Service.PREDICTION] == 1.0
