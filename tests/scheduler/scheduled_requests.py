"""Requests, and simulations of the scheduler that they are submitted to."""

from __future__ import annotations

from typing import Any

from shoplm.request import (
    FailedOutput,
    FinishedOutput,
    Generate,
    Request,
    Select,
    Service,
    Task,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from simulation import CheckingBackend, Clock, Simulation

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
