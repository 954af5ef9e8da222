"""What deadlines do: refused on arrival, made smaller, given up, or served in time."""

from __future__ import annotations

import random
import time

import pytest
from shoplm.engine.engine import Engine
from shoplm.request import (
    Degradation,
    FailedOutput,
    FailureKind,
    FinishedOutput,
    FinishReason,
    Generate,
    Predict,
    Request,
    Select,
    Service,
    Task,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from shoplm.scheduler.cost import Coefficients
from shoplm.scheduler.deadlines import Deadlines
from shoplm.scheduler.sequence import Sequence
from simulation import CheckingBackend, Clock, CostCurve, Simulation

CURVE = CostCurve(step_seconds=0.01, token_seconds=0.001)
SERVICES = {Generate: Service.CHAT, Select: Service.RECOMMENDATION, Predict: Service.PREDICTION}


class Shop:
    """A simulation whose cost model has seen enough, with short names for requests."""

    def __init__(self, policy: SchedulingPolicy | None = None, **backend: int) -> None:
        config = SchedulerConfig(max_step_tokens=256, policy=policy or SchedulingPolicy())
        sizes = {"pages": 2_000, "state_slots": 64, **backend}
        self.simulation = Simulation(CheckingBackend(Clock(), cost=CURVE, **sizes), config)  # type: ignore[arg-type]
        self._tokens = random.Random(1)
        for number in range(12):
            self.submit(f"warm {number}", 10 + 20 * number, Predict(()))
            self.submit(f"warm chat {number}", 5, Generate(2 + number))
            self.simulation.run()

    @property
    def now(self) -> float:
        return self.simulation.clock.now

    def submit(self, name: str, length: int, task: Task, within: float | None = None, **fields: object) -> None:
        tokens = tuple(self._tokens.randrange(1 << 16) for _ in range(length))
        deadline = None if within is None else self.now + within
        arrival = {"arrival_seconds": self.now, "deadline_seconds": deadline, **fields}
        self.simulation.submit(Request(name, SERVICES[type(task)], token_ids(tokens), task, **arrival))  # type: ignore[arg-type]

    def end(self, name: str) -> FinishedOutput | FailedOutput:
        end = self.simulation.records[name].end
        assert end is not None, f"{name} has no end"
        return end

    def refused(self, name: str) -> FailedOutput:
        end = self.end(name)
        assert isinstance(end, FailedOutput), end
        assert end.kind is FailureKind.OVERLOADED
        return end

    def served(self, name: str) -> FinishedOutput:
        end = self.end(name)
        assert isinstance(end, FinishedOutput), end
        return end


def test_what_an_idle_engine_cannot_do_in_time_is_refused_for_good_and_never_computed() -> None:
    shop = Shop()
    before = len(shop.simulation.backend.batches)
    shop.submit("long", 400, Predict(()), within=0.2)  # 0.4 s of tokens
    shop.simulation.step()
    refused = shop.refused("long")
    assert (refused.reason, refused.retry_seconds) == ("DEADLINE_UNREACHABLE", 0.0)
    assert len(shop.simulation.backend.batches) == before
    # The default target is 50 ms, and missing it refuses nobody.
    shop.submit("patient", 400, Predict(()))
    shop.simulation.run()
    shop.served("patient")


@pytest.mark.parametrize(("spare", "in_time"), [(-0.001, False), (0.001, True)])
def test_an_idle_engine_counts_the_levels_of_a_search_once(spare: float, in_time: bool) -> None:
    shop = Shop(SchedulingPolicy(target_seconds=dict.fromkeys(Service, 2.0)))  # steps may be as long as they need
    cost = shop.simulation.engine.scheduler.cost
    cost.coefficients = Coefficients(CURVE.step_seconds, CURVE.token_seconds, 0.0, 0.0)
    # A step with the prompt and two with levels of eight lanes.
    takes = 3 * CURVE.step_seconds + (60 + 2 * 8) * CURVE.token_seconds
    shop.submit("search", 60, Select(3, 8, trie="deep"), within=takes + spare)
    shop.simulation.step()
    shop.simulation.run()
    assert isinstance(shop.end("search"), FinishedOutput) == in_time


def test_answers_that_have_ended_delay_nobody() -> None:
    shop = Shop()
    names = [f"chat {number}" for number in range(20)]
    for name in names:
        shop.submit(name, 8, Generate(300))
    while not all(shop.simulation.records[name].tokens for name in names):
        shop.simulation.step()
    for name in names:
        shop.simulation.engine.cancel(name)
    shop.simulation.clock.now += 3600.0
    shop.submit("first", 100, Predict(()), within=0.15)  # four steps of 40 ms
    shop.simulation.step()
    shop.simulation.run()
    shop.served("first")


def test_behind_a_backlog_it_is_refused_with_the_time_after_which_it_would_fit() -> None:
    shop = Shop()
    for number in range(6):
        shop.submit(f"before {number}", 200, Predict(()), within=3.0)
    shop.submit("late", 100, Predict(()), within=1.0)
    shop.simulation.step()
    refused = shop.refused("late")
    assert refused.reason == "DEADLINE_UNREACHABLE" and 0 < refused.retry_seconds < 2.0
    shop.simulation.run()
    for number in range(6):
        assert shop.served(f"before {number}").timings.total_seconds <= 3.0
    shop.submit("again", 100, Predict(()), within=1.0)
    shop.simulation.run()
    shop.served("again")


@pytest.mark.parametrize(
    ("priority", "tenant", "in_time"),
    [(-1, "", True), (0, "", False), (1, "", False), (-1, "another", True), (0, "another", True)],
)
def test_work_of_lower_priority_of_the_same_tenant_is_not_foreseen_ahead(
    priority: int, tenant: str, *, in_time: bool
) -> None:
    shop = Shop()
    for number in range(8):
        shop.submit(f"before {number}", 100, Predict(()), within=8.0, priority=priority, tenant=tenant)
    shop.simulation.clock.now += 0.1  # past their target
    shop.submit("new", 100, Predict(()), within=0.6)
    shop.simulation.run()
    assert isinstance(shop.end("new"), FinishedOutput) == in_time
    if not in_time:
        assert shop.refused("new").reason == "DEADLINE_UNREACHABLE"


def test_what_an_idle_engine_cannot_do_in_time_counts_as_asked_for_by_nobody() -> None:
    shop = Shop()
    demand = shop.simulation.engine.scheduler.shares.demand
    before = dict(demand.shares())
    for number in range(20):
        shop.submit(f"hopeless {number}", 400, Predict(()), within=0.2)
    assert demand.shares() == pytest.approx(before)
    shop.submit("possible", 400, Predict(()), within=8.0)
    assert demand.shares()[Service.PREDICTION] > before[Service.PREDICTION]


def test_late_work_is_found_behind_work_of_higher_priority_that_always_comes() -> None:
    shop = Shop()
    shop.submit("low", 20, Predict(()), priority=-1)
    begun = shop.now
    for number in range(200):
        shop.submit(f"high {number}", 100, Predict(()), within=0.6, priority=5)
        shop.submit(f"higher {number}", 100, Predict(()), within=0.7, priority=5)
        shop.simulation.step()
        if shop.simulation.records["low"].end is not None:
            break
    assert shop.now < begun + 3.0


def test_answers_of_late_chats_leave_late_prompts_their_share() -> None:
    """Answers go on in each step anyway: what they take is not what late prompts are owed."""
    shop = Shop()
    long_ago = shop.now - 5.0
    for number in range(12):
        shop.submit(f"chat {number}", 20, Generate(480), arrival_seconds=long_ago)
    for _ in range(60):
        shop.simulation.step()
    begun = shop.now
    for number in range(4):
        shop.submit(f"late {number}", 60, Predict(()), arrival_seconds=long_ago)
    for number in range(400):
        for again in range(3):
            shop.submit(f"timely {number} {again}", 60, Predict(()), within=0.6)
        shop.simulation.step()
        if all(shop.simulation.records[f"late {each}"].end is not None for each in range(4)):
            break
    assert shop.now < begun + 6.0


@pytest.mark.parametrize(("weights", "goes_on"), [({}, True), ({Service.PREDICTION: 1.0}, False)])
def test_what_has_begun_of_a_service_that_is_ahead_by_demand_goes_on(
    weights: dict[Service, float], goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By demand it was counted when it began; by weights it counts as it is computed."""
    shop = Shop(SchedulingPolicy(service_weights=weights))
    shop.submit("begun", 400, Predict(()))
    shop.simulation.step()
    scheduler = shop.simulation.engine.scheduler
    monkeypatch.setattr(scheduler.shares, "ahead", lambda: frozenset({Service.PREDICTION}))
    for number in range(40):
        shop.submit(f"other {number}", 100, Select(1, 1, trie="flat"))
    while shop.simulation.records["begun"].end is None:
        shop.simulation.step()
    assert (sum(shop.simulation.records[f"other {number}"].end is not None for number in range(40)) < 20) == goes_on


def test_other_tenants_take_their_turns_whatever_a_newcomers_priority() -> None:
    shop = Shop()
    for number in range(8):
        shop.submit(f"other {number}", 100, Predict(()), within=8.0, tenant="other")
        shop.submit(f"own {number}", 100, Predict(()), within=8.0, priority=-1)
    shop.submit("hasty", 100, Predict(()), within=0.2)  # 0.1 s of tokens, and half of the engine's
    shop.submit("patient", 100, Predict(()), within=0.45)
    shop.simulation.run()
    assert shop.refused("hasty").reason == "DEADLINE_UNREACHABLE"
    shop.served("patient")


def test_who_is_late_and_of_higher_priority_comes_before_deadlines_of_lower_priority_of_its_tenant() -> None:
    shop = Shop()
    for number in range(20):
        shop.submit(f"low {number}", 100, Predict(()), within=20.0, priority=-1)
    shop.submit("high", 100, Predict(()))
    shop.simulation.run()
    slower = [n for n in range(20) if shop.served(f"low {n}").timings.total_seconds > 0.5]
    assert shop.served("high").timings.total_seconds < 0.5 and len(slower) > 10


def test_an_enforced_target_refuses_as_a_deadline_does() -> None:
    policy = SchedulingPolicy(enforced=(Service.PREDICTION,))
    shop = Shop(policy)
    shop.submit("prediction", 400, Predict(()))
    shop.submit("recommendation", 400, Select(1, 1, trie="flat"))  # its target is not enforced
    shop.simulation.run()
    assert shop.refused("prediction").reason == "DEADLINE_UNREACHABLE"
    shop.served("recommendation")


def test_an_answer_whose_first_token_was_in_time_goes_on_to_its_end() -> None:
    shop = Shop(SchedulingPolicy(enforced=(Service.CHAT,)))
    shop.submit("chat", 20, Generate(200))
    shop.simulation.run()
    assert shop.served("chat").completion_tokens == 200
    assert shop.served("chat").degraded == ()


def test_a_search_is_narrowed_before_it_is_refused_and_only_with_leave() -> None:
    shop = Shop()
    wide = Select(4, 128, trie="deep")  # two levels of 128 lanes: about 0.28 s
    shop.submit("strict", 20, wide, within=0.15)
    shop.submit("lenient", 20, wide, within=0.15, allow_degraded=True)
    shop.simulation.run()
    assert shop.refused("strict").reason == "DEADLINE_UNREACHABLE"
    served = shop.served("lenient")
    assert served.degraded == (Degradation.NARROWER_BEAMS,)
    assert served.selected is not None and len(served.selected.items) == 4
    assert served.timings.total_seconds <= 0.15
    assert shop.simulation.engine.report().degraded == {"recommendation:narrower_beams": 1}


def test_a_chat_is_shortened_before_it_is_refused() -> None:
    shop = Shop()
    shop.submit("chat", 20, Generate(100), within=0.5, allow_degraded=True)
    (sequence,) = shop.simulation.engine.scheduler.alive()
    assert sequence.due_seconds == sequence.limit_seconds and sequence.due_seconds > shop.now  # of what is left of it
    shop.simulation.run()
    served = shop.served("chat")
    assert served.degraded == (Degradation.FEWER_TOKENS,)
    assert served.finish_reason is FinishReason.LENGTH
    assert 8 <= served.completion_tokens < 100
    assert served.timings.total_seconds <= 0.5


@pytest.mark.parametrize("waits", [True, False])
def test_a_chat_that_may_be_cut_short_is_given_up_once_not_even_a_short_answer_is_in_time(*, waits: bool) -> None:
    shop = Shop()
    shop.submit("strict", 20, Generate(200), within=6.0)  # 2.2 s
    shop.submit("lenient", 20, Generate(200), within=6.0, allow_degraded=True)
    shop.simulation.clock.now += 5.0 if waits else 5.95  # the machine stalls
    shop.simulation.step()
    shop.simulation.run()
    assert shop.refused("strict").reason == "DEADLINE_LOST"
    if waits:
        served = shop.served("lenient")
        assert served.degraded == (Degradation.FEWER_TOKENS,) and 8 <= served.completion_tokens < 200
        assert served.timings.total_seconds <= 6.0
    else:
        assert shop.refused("lenient").reason == "DEADLINE_LOST"


def test_a_long_prompt_does_not_take_running_chats_their_tokens() -> None:
    shop = Shop()
    shop.submit("chat", 10, Generate(40))
    while not shop.simulation.records["chat"].tokens:
        shop.simulation.step()
    shop.submit("long", 450, Select(1, 1, trie="flat"))
    shop.simulation.engine.report()
    shop.simulation.run()
    gaps = shop.simulation.engine.report().inter_token_seconds
    assert sum(count for _, count in gaps) == 39
    assert max(gap for gap, _ in gaps) <= 0.06 * 1.05
    shop.served("long")


def test_what_becomes_hopeless_is_given_up_oldest_lost_cause_first_and_before_its_deadline() -> None:
    shop = Shop()
    for number in range(3):
        shop.submit(f"r{number}", 200, Predict(()), within=1.0 + 0.02 * number)
    # The machine stalls for so long that none of them can be done.
    shop.simulation.clock.now += 0.9
    outputs = shop.simulation.step()
    lost = [output for output in outputs if isinstance(output, FailedOutput)]
    assert [output.request_id for output in lost] == ["r0", "r1", "r2"]
    assert {output.reason for output in lost} == {"DEADLINE_LOST"}
    assert all(output.retry_seconds > 0 for output in lost)
    shop.simulation.check_idle()


def test_behind_a_queue_the_dearest_are_refused_first() -> None:
    shop = Shop()
    for _ in range(40):  # what predictions typically cost here
        shop.submit(f"typical {shop.now}", 20, Predict(()))
        shop.simulation.run()
    for number in range(10):
        shop.submit(f"before {number}", 40, Predict(()), within=1.0)
    # Both could be there in time: 0.4 s of tokens are before them.
    shop.submit("dear", 250, Predict(()), within=1.0)
    shop.submit("cheap", 20, Predict(()), within=1.0)
    shop.simulation.run()
    assert shop.refused("dear").reason == "TOO_COSTLY_NOW" and shop.refused("dear").retry_seconds > 0
    shop.served("cheap")
    shop.submit("dear again", 250, Predict(()), within=1.0)
    shop.simulation.run()
    shop.served("dear again")


def test_who_is_dear_and_waits_gives_way_to_the_cheap_that_could_not_be_in_time_behind_it() -> None:
    shop = Shop()
    shop.submit("dear", 250, Predict(()), within=1.0)
    for number in range(16):
        shop.submit(f"cheap {number}", 40, Predict(()), within=1.0)
    shop.simulation.run()
    given_up = shop.refused("dear")
    assert given_up.reason == "TOO_COSTLY_NOW" and given_up.retry_seconds > 0
    for number in range(16):
        shop.served(f"cheap {number}")
    shop.simulation.check_idle()


@pytest.mark.parametrize("fields", [{"priority": 1}, {"tenant": "another"}, {"within": None}])
def test_nobody_gives_way_to_another_tenant_or_a_lower_priority_or_for_a_deadline_it_has_not(
    fields: dict[str, object],
) -> None:
    shop = Shop()
    shop.submit("dear", 250, Predict(()), **{"within": 1.0, **fields})  # type: ignore[arg-type]
    for number in range(40):
        shop.submit(f"cheap {number}", 40, Predict(()), within=1.0)
    shop.simulation.run()
    shop.served("dear")
    assert shop.refused("cheap 39").reason == "DEADLINE_UNREACHABLE"


def test_the_deadlines_of_one_tenant_do_not_wait_for_the_backlog_of_another() -> None:
    shop = Shop()
    for number in range(8):
        shop.submit(f"flood {number}", 100, Predict(()), within=2.0, tenant="flood")
    shop.submit("flood hurried", 100, Predict(()), within=0.6, tenant="flood")
    shop.submit("calm", 100, Predict(()), within=0.6, tenant="calm")
    shop.simulation.run()
    assert shop.refused("flood hurried").reason == "DEADLINE_UNREACHABLE"
    assert shop.served("calm").timings.total_seconds <= 0.6


def test_a_jump_of_the_wall_clock_neither_ends_nor_stalls_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's clock is the machine's monotonic one; the wall clock is moved under everything that runs."""
    monotonic, hour = time.monotonic, 3600.0
    backend = CheckingBackend(Clock(), cost=CURVE, pages=2_000, state_slots=64)
    engine = Engine(backend, SchedulerConfig(max_step_tokens=256))
    served: list[str] = []
    for number, jump in enumerate((0.0, hour, -hour, hour)):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump + monotonic())
        name = f"r{number}"
        tokens = token_ids(range(100 * number, 100 * number + 40))
        deadline = monotonic() + 600.0
        engine.submit(Request(name, Service.CHAT, tokens, Generate(5), monotonic(), deadline_seconds=deadline))
        steps = 0
        while steps < 3 or (number == 3 and not engine.is_idle):
            served += [each.request_id for each in engine.step() if isinstance(each, FinishedOutput)]
            steps += 1
            assert steps < 100, "it stalls"
    assert sorted(served) == ["r0", "r1", "r2", "r3"]


def test_a_far_deadline_holds_no_ended_request() -> None:
    deadlines = Deadlines(lambda sequence: sequence.request.deadline_seconds)
    for number in range(10_000):
        request = Request(str(number), Service.PREDICTION, token_ids([1]), Predict(()), 0.0, deadline_seconds=3600.0)
        sequence = Sequence(request, 0.05, [1])
        deadlines.watch(sequence)
        sequence.ended = True
        deadlines.forget(sequence)
    assert len(deadlines) < 200
