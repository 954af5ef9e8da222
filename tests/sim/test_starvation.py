"""Who waits although there is time or room: a large request beside a stream of small ones, which would take each page
as it comes free, and what has missed its target beside an answer that goes on."""

from __future__ import annotations

import itertools

import pytest
from shoplm.request import FinishedOutput, Generate, Predict, Request, Select, Service, token_ids
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.planner import PATIENCE_SECONDS
from simulation import CheckingBackend, Clock, CostCurve, Simulation

PAGES, PAGE_SIZE = 400, 4


@pytest.mark.parametrize("depth", [1, 2])
def test_a_large_request_gets_its_turn(depth: int) -> None:
    backend = CheckingBackend(
        Clock(),
        pages=PAGES,
        page_size=PAGE_SIZE,
        state_slots=64,
        pipeline_depth=depth,
        cost=CostCurve(1e-3, 1e-4),
        max_context_tokens=4096,
    )
    simulation = Simulation(backend, SchedulerConfig(max_step_tokens=512, max_mixed_prompt_tokens=128))
    numbers = itertools.count()

    def small() -> None:
        first = 100 * next(numbers)
        tokens = token_ids(range(first, first + 40))
        task = Select(8, 16, trie="deep")
        simulation.submit(Request(f"small{first}", Service.RECOMMENDATION, tokens, task, simulation.clock.now))

    for _ in range(30):
        small()
    for _ in range(20):
        simulation.step()
    begun = simulation.clock.now
    large = token_ids(range(1_000_000, 1_000_000 + int(0.94 * PAGES * PAGE_SIZE)))
    simulation.submit(Request("large", Service.CHAT, large, Generate(4), begun))
    while simulation.records["large"].end is None and simulation.clock.now < begun + 3 * PATIENCE_SECONDS:
        waiting = sum(sequence.state_slot is None for sequence in simulation.engine.scheduler.alive())
        for _ in range(12 - waiting):
            small()
        simulation.step()
    assert isinstance(simulation.records["large"].end, FinishedOutput)
    for _ in range(100):  # and then the small ones go on
        simulation.step()
    assert not list(simulation.engine.scheduler.alive())


def test_who_lacked_room_before_it_ran_is_given_time_again_after_a_preemption() -> None:
    backend = CheckingBackend(
        Clock(),
        pages=64,
        page_size=PAGE_SIZE,
        cost=CostCurve(5e-2, 1e-4),
        max_context_tokens=256,
    )
    simulation = Simulation(backend, SchedulerConfig(max_step_tokens=64, max_mixed_prompt_tokens=64))

    def chat(name: str, first: int, length: int, most: int, priority: int = 0) -> None:
        tokens, now = token_ids(range(first, first + length)), simulation.clock.now
        simulation.submit(Request(name, Service.CHAT, tokens, Generate(most), now, priority=priority))
        simulation.step()

    chat("before", 1_000, 200, 3)
    chat("long", 2_000, 60, 196)
    (sequence,) = (each for each in simulation.engine.scheduler.alive() if each.request.request_id == "long")
    while sequence.lacks_since is None:
        simulation.step()
    while simulation.clock.now < PATIENCE_SECONDS + 1:
        simulation.step()
    chat("more important", 5_000, 60, 180, priority=5)
    while not sequence.epoch:
        simulation.step()
    simulation.step()
    small = token_ids(range(9_000, 9_010))
    simulation.submit(Request("small", Service.PREDICTION, small, Predict(()), simulation.clock.now))
    simulation.step()
    assert isinstance(simulation.records["small"].end, FinishedOutput)


@pytest.mark.parametrize("has_room", [True, False])
def test_nobody_leaves_pages_to_a_chat_that_has_room_and_waits_for_time(
    has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(CheckingBackend(Clock(), pages=PAGES, page_size=PAGE_SIZE))
    simulation.submit(Request("chat", Service.CHAT, token_ids(range(20)), Generate(4), 0.0))
    simulation.submit(Request("small", Service.PREDICTION, token_ids(range(50, 60)), Predict(()), 0.0))
    scheduler = simulation.engine.scheduler
    chat = scheduler.alive()[0]
    scheduler._planner._starved = chat
    if not has_room:
        monkeypatch.setattr(scheduler.memory, "pages_needed", lambda sequence: PAGES + 1 if sequence is chat else 3)
    monkeypatch.setattr(scheduler._budgeter, "may_answer", lambda sequence, answers: sequence is not chat)
    simulation.step()
    assert (simulation.records["small"].end is not None) == has_room


@pytest.mark.parametrize("history", [64, 1024])
def test_what_has_missed_its_target_goes_on_beside_an_answer(history: int) -> None:
    """The least chunk of a prompt that reads much costs more than the least part of a step, yet it is begun."""
    backend = CheckingBackend(
        Clock(), pages=200, page_size=16, max_context_tokens=2048, cost=CostCurve(5.5e-3, 1.35e-3, 3e-7)
    )
    simulation = Simulation(backend, SchedulerConfig())
    known = token_ids(range(1_000, 1_000 + history))

    def predict(name: str, own: int) -> None:
        tokens = known + token_ids(range(own, own + 24))
        simulation.submit(Request(name, Service.PREDICTION, tokens, Predict(()), simulation.clock.now))

    predict("first", 5_000)
    simulation.run()
    simulation.submit(Request("chat", Service.CHAT, token_ids(range(20)), Generate(400), simulation.clock.now))
    for _ in range(12):
        simulation.step()
    begun = simulation.clock.now
    for number in range(4):  # together they take longer than the target of all but the first
        predict(f"late{number}", 6_000 + 100 * number)
    while not all(simulation.records[f"late{number}"].end for number in range(4)):
        simulation.step()
    assert simulation.records["chat"].end is None
    assert simulation.clock.now < begun + 0.5


def test_nobody_is_started_for_whom_a_step_has_no_time() -> None:
    backend = CheckingBackend(Clock(), pages=4_000, page_size=16, max_context_tokens=2048, cost=CostCurve(5e-3, 1e-3))
    simulation = Simulation(backend, SchedulerConfig())
    for number in range(20):
        tokens = token_ids(range(1_000 * number, 1_000 * number + 300))
        simulation.submit(Request(f"{number}", Service.PREDICTION, tokens, Predict(()), 1e-6 * number))
    for _ in range(12):  # the cost model knows by then
        simulation.step()
    while not simulation.engine.is_idle:
        waited = {each.request.request_id for each in simulation.engine.scheduler.alive() if each.state_slot is None}
        simulation.step()
        for sequence in simulation.engine.scheduler.running():
            assert sequence.computed or sequence.request.request_id not in waited


def test_three_services_whose_clients_ask_again_once_they_are_answered_all_go_on() -> None:
    """What they ask for depends on what they get: a service that is held back asks for less, and must not be held back
    for that."""
    backend = CheckingBackend(
        Clock(), pages=4_000, page_size=16, max_context_tokens=2048, cost=CostCurve(5.9e-3, 1.4e-3, 3e-7)
    )
    simulation = Simulation(backend, SchedulerConfig())
    tasks = {
        Service.RECOMMENDATION: (6, 420, Select(8, 8, trie="flat")),
        Service.CHAT: (5, 100, Generate(32)),
        Service.PREDICTION: (5, 420, Predict(())),
    }
    numbers = itertools.count()
    asked: dict[str, tuple[Service, float]] = {}

    def ask(service: Service) -> None:
        number, (_, length, task) = next(numbers), tasks[service]
        tokens = token_ids(range(1_000 * number, 1_000 * number + length + 7 * number % 50))
        asked[f"{number}"] = service, simulation.clock.now
        simulation.submit(Request(f"{number}", service, tokens, task, simulation.clock.now))

    for service, (clients, _, _) in tasks.items():
        for _ in range(clients):
            ask(service)
    longest = dict.fromkeys(Service, 0.0)
    while simulation.clock.now < 60.0:
        simulation.step()
        for name, (service, since) in list(asked.items()):
            record = simulation.records[name]
            if record.end is not None:
                del asked[name]
                ask(service)
            if not record.tokens:
                longest[service] = max(longest[service], simulation.clock.now - since)
    assert max(longest.values()) < 25.0, longest
