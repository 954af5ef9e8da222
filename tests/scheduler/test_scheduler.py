"""What the scheduler promises: sharing, taking over, fairness, bounds, order and progress."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import msgspec
import pytest
from shoplm.request import (
    Embed,
    FailedOutput,
    FailureKind,
    FinishedOutput,
    Generate,
    Predict,
    Request,
    Select,
    Service,
    Task,
    TokensOutput,
    by_request,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import MIN_SAMPLES, Coefficients, CostModel
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.residents import Residents
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import survey
from simulation import CheckingBackend, Clock, CostCurve, Simulation, expected_answer

PAGE_SIZE = 4
DEEP = Select(3, 5, trie="deep")


def simulate(config: SchedulerConfig | None = None, **backend: Any) -> Simulation:
    return Simulation(CheckingBackend(Clock(), page_size=PAGE_SIZE, **backend), config)


def request(name: str, tokens: range | list[int], task: Task, **fields: Any) -> Request:
    service = {Generate: Service.CHAT, Select: Service.RECOMMENDATION}.get(type(task), Service.PREDICTION)
    return Request(name, service, token_ids(tokens), task, **{"arrival_seconds": 0.0, **fields})


def computed_tokens(simulation: Simulation) -> int:
    return sum(len(batch.tokens) for batch in simulation.backend.batches)


def finished(simulation: Simulation, name: str) -> FinishedOutput:
    simulation.check_answer(name)
    end = simulation.records[name].end
    assert isinstance(end, FinishedOutput), end
    return end


def failed(simulation: Simulation, name: str) -> FailedOutput:
    end = simulation.records[name].end
    assert isinstance(end, FailedOutput), end
    return end


# ---- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_the_same_prefix_is_computed_once_however_many_ask_at_once(pipeline_depth: int) -> None:
    simulation = simulate(pages=64, pipeline_depth=pipeline_depth)
    history = list(range(100))
    tasks: list[Task] = [Predict(()), Select(1, 1, trie="flat"), Embed(), Predict(()), Generate(1)]
    simulation.submit(*(request(f"r{i}", [*history, 900 + i, 901], task) for i, task in enumerate(tasks)))
    simulation.run()
    assert computed_tokens(simulation) == 100 + 2 * len(tasks)
    for name in simulation.records:
        finished(simulation, name)
    simulation.check_idle()


def test_a_later_request_finds_the_prefix_and_says_so() -> None:
    simulation = simulate()
    simulation.submit(request("first", range(41), Predict(())))
    simulation.run()
    simulation.submit(request("second", [*range(41), 77], DEEP))
    simulation.run()
    assert finished(simulation, "first").cached_tokens == 0
    assert finished(simulation, "second").cached_tokens == 40
    assert computed_tokens(simulation) == 41 + 2 + 2 * 5


def test_the_last_token_is_computed_even_if_all_is_cached() -> None:
    simulation = simulate()
    for name in ("first", "second"):
        simulation.submit(request(name, range(40), Predict(())))
        simulation.run()
    assert finished(simulation, "second").cached_tokens == 39
    assert computed_tokens(simulation) == 40 + 1


def test_a_cached_prompt_that_fills_the_pool_computes_its_last_page_again() -> None:
    simulation = simulate(pages=10)
    for name in ("first", "second"):
        simulation.submit(request(name, range(40), Predict(())))
        simulation.run()
    assert finished(simulation, "second").cached_tokens == 36
    simulation.check_idle()


def test_a_cached_prompt_takes_the_time_of_the_tokens_that_are_left_of_it() -> None:
    simulation = simulate()
    simulation.submit(request("before", range(40), Predict(())))
    simulation.run()
    cost, now = simulation.engine.scheduler.cost, simulation.clock.now
    cost.coefficients, cost.samples = Coefficients(step=1e-3, token=1e-3, kv=0.0, row=0.0), MIN_SAMPLES
    # A step of 25 ms, half of a prediction's target, has 4 ms left behind the prompt of 20 tokens.
    simulation.submit(
        request("new", range(100, 120), Predict(()), arrival_seconds=now, priority=1),
        request("cached", [*range(40), 77, 78, 79], Predict(()), arrival_seconds=now),
    )
    simulation.step()
    assert [row.query_len for row in simulation.backend.batches[-1].rows] == [20, 3]


def test_an_answer_goes_on_behind_a_prompt_that_was_all_cached() -> None:
    simulation = simulate()
    for name, task in (("first", Embed()), ("second", Generate(9)), ("third", DEEP)):
        simulation.submit(request(name, range(40), task))
        simulation.run()
    assert computed_tokens(simulation) == 40 + 9 + 1 + 2 * 5
    for name in simulation.records:
        finished(simulation, name)
    simulation.check_idle()


def test_the_next_turn_finds_the_answer_in_the_cache() -> None:
    simulation = simulate()
    first = request("first", range(21), Generate(20))
    simulation.submit(first)
    simulation.run()
    answer = expected_answer(first)
    assert isinstance(answer, tuple)
    simulation.submit(request("second", [*range(21), *map(int, answer), 5, 6, 7], Generate(3)))
    simulation.run()
    # 21 + 20 tokens less the last one, which was drawn but not computed, are ten pages.
    assert finished(simulation, "second").cached_tokens == 40


def test_other_roots_share_nothing() -> None:
    simulation = simulate()
    for root in ("one", "two"):
        simulation.submit(request(root, range(40), Predict(()), cache_root=root))
        simulation.run()
    assert computed_tokens(simulation) == 80


@pytest.mark.parametrize("pipeline_depth", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_cancelled_writer_is_taken_over(steps: int, pipeline_depth: int) -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=10), pages=64, pipeline_depth=pipeline_depth)
    simulation.submit(request("writer", range(60), Predict(())))
    simulation.submit(*(request(f"reader {i}", [*range(60), i], Predict(())) for i in range(3)))
    for _ in range(steps):
        simulation.step()
    simulation.engine.cancel("writer")
    simulation.run()
    assert failed(simulation, "writer").kind is FailureKind.CANCELLED
    for i in range(3):
        finished(simulation, f"reader {i}")
    # Lost are at most the steps that were in flight and a page that was not full.
    assert computed_tokens(simulation) <= 60 + 3 + 10 * (pipeline_depth - 1) + PAGE_SIZE
    simulation.check_idle()


def test_an_answer_of_which_the_caller_has_all_it_wanted_counts_as_finished() -> None:
    simulation = simulate()
    simulation.submit(request("chat", range(20), Generate(200)))
    while len(simulation.records["chat"].tokens) < 5:
        simulation.step()
    simulation.engine.cancel("chat", answered=True)
    simulation.engine.cancel("chat", answered=True)  # the end was under way
    simulation.step()
    end = simulation.records["chat"].end
    assert isinstance(end, FinishedOutput) and 5 <= end.completion_tokens == len(simulation.records["chat"].tokens)
    assert not any(simulation.engine.scheduler.stats.failures.values())
    simulation.check_idle()


@pytest.mark.parametrize("holder", [{"priority": -1}, {"priority": 100}, {"tenant": "another"}])
def test_whoever_waits_for_a_page_lends_its_place_to_whoever_computes_it(holder: dict[str, Any]) -> None:
    """A stream of work would come before the holder, and is less urgent than who waits for it."""
    config = SchedulerConfig(max_step_tokens=32, max_mixed_prompt_tokens=32)
    simulation = simulate(config, pages=800, state_slots=64, max_context_tokens=2048)
    history = list(range(1_000, 1_200))
    simulation.submit(request("holder", [*history, 1], Predict(()), **holder))
    simulation.step()
    numbers = itertools.count(1)

    def flood(most: int) -> None:
        waiting = sum(sequence.state_slot is None for sequence in simulation.engine.scheduler.alive())
        for number in itertools.islice(numbers, max(most - waiting, 0)):
            tokens = range(10_000 * number, 10_000 * number + 40)
            now = simulation.clock.now
            simulation.submit(request(f"f{number}", tokens, Predict(()), arrival_seconds=now))

    flood(20)
    simulation.submit(request("urgent", [*history, 2], Predict(()), arrival_seconds=simulation.clock.now, priority=100))
    steps = 0
    while simulation.records["urgent"].end is None:
        flood(20)
        simulation.step()
        steps += 1
        assert steps < 20, "it waits for who waits for everybody else"
    finished(simulation, "urgent")


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_who_lends_its_place_does_not_have_twice_what_is_on_its_way(pipeline_depth: int) -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=12), pages=200, pipeline_depth=pipeline_depth)
    history = list(range(40))
    tasks: list[Task] = [DEEP, Generate(5), Predict(())]
    simulation.submit(*(request(f"holder {i}", [*history, i], task, priority=-i) for i, task in enumerate(tasks)))
    simulation.submit(*(request(f"urgent {i}", [*history, 9 + i], task) for i, task in enumerate(tasks)))
    simulation.run()
    for name in simulation.records:
        finished(simulation, name)
    assert computed_tokens(simulation) == 40 + 6 + 2 * (2 * 5 + 4)


def test_what_others_have_yet_to_compute_of_a_prompt_is_foreseen() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=32), pages=400)
    for i in range(MIN_SAMPLES):
        simulation.submit(request(f"w{i}", range(1_000 * i, 1_000 * i + 30), Predict(())))
        simulation.run()
    now, history = simulation.clock.now, list(range(50_000, 50_400))
    # A chat is due so much later that its work does not count before a prediction's.
    simulation.submit(request("holder", [*history, 1], Generate(2), arrival_seconds=now))
    simulation.step()
    for name, seconds in (("hasty", 0.02), ("patient", 0.4)):  # 400 tokens of 0.1 ms each
        now = simulation.clock.now
        tokens = [*history, 2]
        simulation.submit(request(name, tokens, Predict(()), arrival_seconds=now, deadline_seconds=now + seconds))
    simulation.run()
    assert failed(simulation, "hasty").reason == "DEADLINE_UNREACHABLE"
    finished(simulation, "patient")


# ---- fairness and order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_prompts_never_starve_answers(pipeline_depth: int) -> None:
    config = SchedulerConfig(max_step_tokens=64, max_mixed_prompt_tokens=16)
    simulation = simulate(config, pages=2_000, pipeline_depth=pipeline_depth)
    simulation.submit(request("chat", range(10), Generate(60)))
    while not simulation.records["chat"].tokens:
        simulation.step()
    long_prompts = [request(f"long {i}", range(1000 * (i + 1), 1000 * (i + 1) + 300), DEEP) for i in range(12)]
    simulation.submit(*long_prompts)
    started = len(simulation.backend.batches)
    while simulation.records["chat"].end is None:
        simulation.step()
    steps = simulation.records["chat"].token_steps
    # A token in each step; only the first may wait for steps that were in flight.
    assert max(after - before for before, after in itertools.pairwise(steps[1:])) == 1
    mixed = simulation.backend.batches[started:]
    # A searching request adds its lanes to the chat's token and the prompts' share.
    assert max(len(batch.tokens) for batch in mixed) <= 16 + 1 + 12 * 5
    assert sum(len(batch.tokens) for batch in mixed) > 10 * len(steps)  # and the prompts got on meanwhile
    simulation.run()
    for long_prompt in long_prompts:
        finished(simulation, long_prompt.request_id)


def test_a_search_as_wide_as_a_step_gets_its_turn_among_answers() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=8, max_mixed_prompt_tokens=4), pages=200)
    simulation.submit(*(request(f"chat {i}", [i], Generate(30)) for i in range(4)))
    simulation.submit(request("wide", range(50, 60), Select(3, 8, trie="deep")))
    simulation.run(200)
    finished(simulation, "wide")


def test_whoever_is_due_first_is_served_first() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=16))
    simulation.submit(
        request("chat", range(100, 116), Generate(1)),  # due at 0.5
        request("recommendation", range(200, 216), Select(1, 1, trie="flat")),  # at 0.1
        request("prediction", range(300, 316), Predict(())),  # at 0.05
        request("hurried", range(400, 416), Generate(1), deadline_seconds=0.04),
        request("important", range(500, 516), Generate(1), priority=1),
    )
    simulation.run()
    ends = {name: finished(simulation, name).timings.total_seconds for name in simulation.records}
    assert sorted(ends, key=ends.__getitem__) == ["important", "hurried", "prediction", "recommendation", "chat"]


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_the_time_in_the_queue_ends_before_the_first_step(pipeline_depth: int) -> None:
    curve = CostCurve(step_seconds=1.0, token_seconds=0.0)
    simulation = simulate(SchedulerConfig(max_step_tokens=16), cost=curve, pipeline_depth=pipeline_depth)
    simulation.submit(request("alone", range(64), Predict(())))
    simulation.run()
    alone = finished(simulation, "alone").timings
    assert (alone.queue_seconds, alone.first_seconds) == (0.0, 4.0)
    # Whoever comes while the step is full waits, and the metric says the same as the answer.
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + 16), Generate(1)) for i in range(2, 4)))
    arrived = simulation.clock.now
    simulation.run()
    waits = [finished(simulation, f"r{i}").timings.queue_seconds - arrived for i in range(2, 4)]
    assert waits == ([0.0, 1.0] if pipeline_depth == 1 else [0.0, 0.0])
    queued = simulation.engine.scheduler.stats.queue_seconds
    assert (queued[Service.PREDICTION], sum(queued[Service.CHAT])) == ([0.0], sum(waits) + 2 * arrived)


def test_a_step_is_no_larger_than_its_budget() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=12, max_mixed_prompt_tokens=12), pages=300)
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + 30), DEEP) for i in range(8)))
    simulation.submit(*(request(f"c{i}", range(100 * i, 100 * i + 30), Generate(9)) for i in range(8)))
    simulation.run()
    assert max(len(batch.tokens) for batch in simulation.backend.batches) == 12
    for name in simulation.records:
        finished(simulation, name)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_depth", [1, 2])
@pytest.mark.parametrize("lengths", [(40, 40), (4, 76), (37, 43)])
def test_memory_for_one_request_and_a_half_is_enough(lengths: tuple[int, int], pipeline_depth: int) -> None:
    prompt, answer = lengths
    simulation = simulate(pages=30, pipeline_depth=pipeline_depth)  # 120 tokens, two requests of 80
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + prompt), Generate(answer)) for i in range(2)))
    simulation.run(1_000)
    for i in range(2):
        finished(simulation, f"r{i}")
    assert simulation.engine.scheduler.stats.preemptions >= 1
    simulation.check_idle()


def test_an_important_answer_is_not_preempted_for_another() -> None:
    simulation = simulate(pages=30)
    simulation.submit(request("plain", range(10), Generate(70)))
    simulation.submit(request("important", range(100, 110), Generate(70), priority=1))
    simulation.run()
    steps = simulation.records["important"].token_steps
    assert steps == list(range(steps[0], steps[0] + 70))
    finished(simulation, "plain")


def test_an_answer_that_is_computed_again_leaves_no_page_that_others_would_wait_for() -> None:
    config = SchedulerConfig(max_step_tokens=24, max_mixed_prompt_tokens=24)
    simulation = simulate(config, pages=40, max_context_tokens=160, state_slots=8)
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + 47), Generate(60)) for i in range(3)))
    seen = 0
    while not simulation.engine.is_idle:
        simulation.step()
        for sequence in simulation.engine.scheduler.running():
            if sequence.epoch and not sequence.is_prompt and sequence.pending <= 1 and not sequence.in_flight:
                seen += 1
                assert all(node.filled for node in sequence.nodes), sequence.request.request_id
    assert seen > 20
    for name in simulation.records:
        finished(simulation, name)


def test_an_answer_all_of_which_is_cached_but_its_last_token_goes_on() -> None:
    memory = SequenceMemory(pages=20, page_size=PAGE_SIZE)
    residents = Residents(memory, 1)
    answer = Sequence(request("r", range(10), Generate(9)), 0.0, token_ids(range(13)), computed=12)
    answer.epoch = 1
    assert residents.start(answer)
    assert survey(residents, CostModel(), 0.06).prompts == [answer]


def test_a_state_slot_that_is_lost_is_noticed() -> None:
    simulation = simulate(state_slots=3)
    simulation.submit(request("r", range(10), Generate(9)))
    simulation.step()
    residents = simulation.engine.scheduler._residents
    residents.check()
    residents._slots.pop()
    with pytest.raises(AssertionError, match="1 state slots have no owner"):
        residents.check()


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_a_cancelled_request_frees_everything_at_once_and_its_step_harms_nobody(pipeline_depth: int) -> None:
    simulation = simulate(pages=16, pipeline_depth=pipeline_depth)
    simulation.submit(request("gone", range(30), Generate(30)))
    for _ in range(5):
        simulation.step()
    simulation.engine.cancel("gone")
    memory = simulation.engine.scheduler.memory
    assert memory.tree.available == 16
    simulation.submit(request("next", range(100, 150), Generate(10)))  # takes the pages while the step is in flight
    simulation.run()
    finished(simulation, "next")
    assert failed(simulation, "gone").reason == "CANCELLED"
    simulation.engine.cancel("gone")  # an unknown id by now
    simulation.check_idle()


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_popularity_alone_needs_no_beams_however_deep_the_trie(pipeline_depth: int) -> None:
    simulation = simulate(pipeline_depth=pipeline_depth)
    simulation.submit(request("empty", range(5), Select(3, 7, trie="deep", popularity_only=True)))
    simulation.run()
    assert finished(simulation, "empty").selected is not None
    assert computed_tokens(simulation) == 5


# ---- bounds and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"task": Generate(0)}, FailureKind.INVALID, "BAD_MAX_TOKENS"),
        ({"task": Select(1, 1, trie="unknown")}, FailureKind.INVALID, "UNKNOWN_TRIE"),
        ({"task": Generate(505)}, FailureKind.INVALID, "CONTEXT_EXCEEDED"),
        ({"tokens": token_ids(range(513))}, FailureKind.INVALID, "CONTEXT_EXCEEDED"),
        ({"tokens": token_ids(range(511)), "task": DEEP}, FailureKind.INVALID, "CONTEXT_EXCEEDED"),
        ({"tokens": token_ids(range(510)), "task": DEEP}, FailureKind.INVALID, "CACHE_EXCEEDED"),
        ({"task": Select(1, 33, trie="deep")}, FailureKind.INVALID, "BEAMS_EXCEED_STEP"),
        ({"task": Generate(300)}, FailureKind.INVALID, "CACHE_EXCEEDED"),
        ({"tokens": token_ids(range(250)), "task": DEEP}, FailureKind.INVALID, "CACHE_EXCEEDED"),
        ({"deadline_seconds": 1.0}, FailureKind.EXPIRED, "EXPIRED"),
    ],
)
def test_what_can_never_be_served_is_refused_on_arrival(
    changes: dict[str, Any], kind: FailureKind, reason: str
) -> None:
    simulation = simulate(pages=64)
    simulation.clock.now = 1.0
    good = request("r", range(8), Generate(4), arrival_seconds=1.0)
    simulation.submit(msgspec.structs.replace(good, **changes))
    simulation.run()
    simulation.step()
    assert (failed(simulation, "r").kind, failed(simulation, "r").reason) == (kind, reason)
    assert simulation.backend.batches == []
    # The same request without the fault is served.
    simulation.submit(msgspec.structs.replace(good, request_id="good"))
    simulation.run()
    finished(simulation, "good")


def test_the_queue_is_bounded_by_requests() -> None:
    simulation = simulate(SchedulerConfig(max_queued_requests=3))
    simulation.submit(*(request(f"r{i}", range(5), Predict(())) for i in range(5)))
    simulation.run()
    for i in range(3):
        finished(simulation, f"r{i}")
    for i in (3, 4):
        refused = failed(simulation, f"r{i}")
        assert (refused.kind, refused.reason) == (FailureKind.OVERLOADED, "QUEUE_FULL")
        assert refused.retry_seconds > 0
    assert simulation.engine.scheduler.stats.failures == {"prediction:overloaded": 2}


def test_the_queue_is_bounded_by_tokens() -> None:
    simulation = simulate(SchedulerConfig(max_queued_tokens=100))
    simulation.submit(request("a", range(60), Predict(())), request("b", range(41), Predict(())))
    simulation.submit(request("c", range(40), Predict(())))
    assert simulation.engine.scheduler.queued_tokens == 100
    simulation.run()
    assert failed(simulation, "b").reason == "QUEUE_TOKENS_FULL"
    finished(simulation, "a")
    finished(simulation, "c")
    assert simulation.engine.scheduler.queued_tokens == 0


@pytest.mark.parametrize("bound", ["requests", "tokens"])
@pytest.mark.parametrize("service", [Service.PREDICTION, Service.CHAT])
def test_a_full_queue_lets_in_who_has_less_than_its_share(bound: str, service: Service) -> None:
    limits = {"max_queued_requests": 8} if bound == "requests" else {"max_queued_tokens": 40}
    simulation = simulate(SchedulerConfig(**limits))
    flood = [request(f"f{i}", range(10 * i, 10 * i + 5), Predict(()), tenant="flood") for i in range(9)]
    simulation.submit(*flood)
    task: Task = Predict(()) if service is Service.PREDICTION else Generate(2)
    calm = [request(f"c{i}", range(500 + 10 * i, 505 + 10 * i), task, tenant="calm") for i in range(5)]
    simulation.submit(*calm, request("f9", range(300, 305), Predict(()), tenant="flood"))
    assert simulation.engine.scheduler.queued_requests == 8
    simulation.run()
    refused = [name for name in simulation.records if isinstance(simulation.records[name].end, FailedOutput)]
    # Half of the queue is the other's; the flood's newest made room, and what had waited longest stayed.
    assert sorted(refused) == ["c4", "f4", "f5", "f6", "f7", "f8", "f9"]
    assert {failed(simulation, name).kind for name in refused} == {FailureKind.OVERLOADED}
    same_service = service is Service.PREDICTION
    assert (failed(simulation, "f7").reason == "TENANT_QUEUE_FULL") == same_service
    for name in ("f0", "f3", "c0", "c3"):
        finished(simulation, name)
    simulation.check_idle()


@pytest.mark.parametrize("bound", ["requests", "tokens"])
def test_a_full_queue_gives_up_the_newest_of_the_lowest_priority_of_the_same_tenant(bound: str) -> None:
    limits = {"max_queued_requests": 6} if bound == "requests" else {"max_queued_tokens": 30}
    simulation = simulate(SchedulerConfig(**limits))
    priorities = {"a": -1, "b": -2, "c": -2, "d": 0}
    for number, (name, priority) in enumerate(priorities.items()):
        simulation.submit(request(name, range(10 * number, 10 * number + 5), Predict(()), priority=priority))
    simulation.submit(*(request(f"other {i}", range(200 + i, 205 + i), Predict(()), tenant="o") for i in range(2)))
    for number, name in enumerate(("e", "f", "g")):
        simulation.submit(request(name, range(300 + 10 * number, 305 + 10 * number), Predict(())))
    # "e", "f" and "g" are of the same priority as "d": three others had a lower one.
    simulation.submit(request("same", range(400, 405), Predict(())))
    simulation.submit(request("large", range(500, 530), Predict(()), priority=1))
    assert simulation.engine.scheduler.queued_requests == 6
    outputs = simulation.step()
    ends = [output.request_id for output in outputs if isinstance(output, FailedOutput)]
    assert ends == ["c", "b", "a", "same", "large" if bound == "tokens" else "g"]
    assert {failed(simulation, name).reason for name in ("a", "b", "c")} == {
        "QUEUE_FULL" if bound == "requests" else "QUEUE_TOKENS_FULL"
    }
    simulation.run()
    for name in ("d", "e", "f", "other 0", "other 1"):
        finished(simulation, name)
    simulation.check_idle()


def test_who_finds_the_queue_full_counts_as_asked_for() -> None:
    simulation = simulate(SchedulerConfig(max_queued_requests=10))
    simulation.submit(*(request(f"r{i}", range(10 + i), Predict(())) for i in range(100)))
    demand = simulation.engine.scheduler.shares.demand
    assert demand._asked[Service.PREDICTION] == pytest.approx(100)
    assert demand._seen[Service.PREDICTION] == 10  # whose work was looked at


def test_whoever_is_turned_away_costs_no_look_at_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(SchedulerConfig(max_queued_requests=2))
    simulation.submit(request("first", range(10), Predict(())), request("second", range(10), Predict(())))
    looked_up: list[Sequence] = []
    monkeypatch.setattr(simulation.engine.scheduler.memory, "look_up", looked_up.append)
    simulation.clock.now = 1.0
    simulation.engine.submit(request("first", range(10), Predict(())))
    simulation.submit(
        request("full", range(10), Predict(())),
        request("expired", range(10), Predict(()), deadline_seconds=0.5),
        request("too long", range(600), Predict(())),
    )
    refused = [output for output in simulation.engine.step() if isinstance(output, FailedOutput)]
    reasons = ["DUPLICATE_REQUEST", "QUEUE_FULL", "EXPIRED", "CONTEXT_EXCEEDED"]
    assert [output.reason for output in refused] == reasons
    assert looked_up == []


def test_an_id_that_is_in_use_is_refused_and_its_owner_is_not_disturbed() -> None:
    simulation = simulate()
    simulation.submit(request("same", range(10), Generate(5)))
    simulation.engine.submit(request("same", range(20, 30), Generate(2)))
    outputs = [output for _ in range(10) for output in simulation.engine.step()]
    refused, *others = outputs
    assert isinstance(refused, FailedOutput)
    assert (refused.kind, refused.reason) == (FailureKind.INVALID, "DUPLICATE_REQUEST")
    tokens = [token for output in by_request(others) if isinstance(output, TokensOutput) for token in output.tokens]
    assert tuple(tokens) == expected_answer(simulation.records["same"].request)
    assert isinstance(others[-1], FinishedOutput)
    # The id is free again.
    simulation.engine.submit(request("same", range(10), Predict(())))
    assert any(isinstance(output, FinishedOutput) for _ in range(3) for output in simulation.engine.step())


def test_expired_work_is_dropped_wherever_it_is() -> None:
    config = SchedulerConfig(max_step_tokens=8, max_mixed_prompt_tokens=8)
    simulation = simulate(config, state_slots=1, cost=CostCurve(step_seconds=0.1, token_seconds=0.0))
    simulation.submit(request("runs", range(8), Generate(50), deadline_seconds=1.05))
    simulation.submit(request("waits", range(8), Generate(50), deadline_seconds=1.06))
    # Due later than the chats, whose answers are long: it takes the only state slot after them.
    simulation.submit(request("prediction", range(8), Predict(())))
    simulation.run()
    assert "while it ran" in failed(simulation, "runs").message
    assert len(simulation.records["runs"].tokens) == 11  # one each 0.1 s, the last just after the deadline
    assert "in the queue" in failed(simulation, "waits").message
    assert {failed(simulation, name).kind for name in ("runs", "waits")} == {FailureKind.EXPIRED}
    finished(simulation, "prediction")
    simulation.check_idle()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SchedulerConfig)][:4])
def test_a_bound_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        dataclasses.replace(SchedulerConfig(), **{name: 0})  # type: ignore[arg-type]
