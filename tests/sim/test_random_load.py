"""Thousands of random requests on a small pool: nothing leaks, nothing is shared wrongly, everybody gets an end."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Literal

import pytest
from shoplm.request import (
    Embed,
    FailedOutput,
    FinishedOutput,
    Generate,
    Predict,
    Request,
    Select,
    Service,
    Task,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from simulation import CheckingBackend, Clock, Simulation

ARRIVALS = 2_000
PAGE_SIZE = 4


class RandomLoad:
    """Arrivals that fork from a few customers' histories, cancellations and deadlines, all from one seed."""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self.simulation = simulation
        self.vocabulary = simulation.backend.vocabulary
        self.random = random.Random(seed)
        self.histories: list[tuple[int, ...]] = [self._tokens(40) for _ in range(6)]
        self.numbers = itertools.count()

    def _tokens(self, most: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(1000) for _ in range(self.random.randint(1, most)))

    def _task(self) -> tuple[Service, Task]:
        draw = self.random.random
        kind = self.random.randrange(5)
        if kind < 2:
            # Among few tokens a stop would come at once: most of these never come.
            most = self.vocabulary if self.vocabulary > 10 else 5 * self.vocabulary
            stops = (self.random.randrange(most), self.random.randrange(most)) if draw() < 0.7 else ()
            return Service.CHAT, Generate(self.random.randint(1, 40), stop_token_ids=stops)
        if kind == 2:
            width = self.random.randint(1, 9)
            select = Select(min(3, width), width, trie="deep", popularity_only=draw() < 0.1)
            return Service.RECOMMENDATION, select
        if kind == 3:
            return Service.RECOMMENDATION, Select(1, 1, trie="flat")
        return Service.PREDICTION, Predict(()) if draw() < 0.8 else Embed()

    def arrive(self) -> None:
        """One request: a whole history, a part of one or none, and a tail; now and then it becomes a history."""
        history = self.random.choice(self.histories)
        history = history[: self.random.randint(0, len(history))] if self.random.random() < 0.4 else history
        tokens = history + self._tokens(10)
        if self.random.random() < 0.1:
            self.histories[self.random.randrange(len(self.histories))] = tokens[:60]
        service, task = self._task()
        now = self.simulation.clock.now
        deadline = now + self.random.expovariate(10.0) if self.random.random() < 0.15 else None
        self.simulation.submit(
            Request(
                f"request-{next(self.numbers)}",
                service,
                token_ids(tokens),
                task,
                arrival_seconds=now,
                deadline_seconds=deadline,
                history_tokens=len(history),
                cache_root=self.random.choice(("one", "one", "one", "two")),
                priority=self.random.choice((0, 0, 0, 1)),
            )
        )

    def cancel(self) -> None:
        """The caller of a random request goes away; mostly of one that runs."""
        scheduler = self.simulation.engine.scheduler
        alive = scheduler.running() or scheduler.alive()
        if alive:
            self.simulation.engine.cancel(self.random.choice(alive).request.request_id)


@pytest.mark.parametrize(("pipeline_depth", "drafted", "vocabulary"), [(1, 0, 97), (2, 0, 97), (1, 5, 3)])
@pytest.mark.parametrize(("pages", "state_slots", "step_tokens"), [(40, 8, 24), (64, 24, 16), (200, 12, 64)])
@pytest.mark.parametrize("order", ["slack", "fcfs"])
@pytest.mark.parametrize("seed", [1])
def test_random_load_loses_nothing(
    order: Literal["slack", "fcfs"],
    pages: int,
    state_slots: int,
    step_tokens: int,
    pipeline_depth: int,
    drafted: int,
    vocabulary: int,
    seed: int,
) -> None:
    print(f"seed {seed}")  # noqa: T201 - pytest shows it with a failure
    backend = CheckingBackend(
        Clock(),
        pages=pages,
        page_size=PAGE_SIZE,
        state_slots=state_slots,
        pipeline_depth=pipeline_depth,
        vocabulary=vocabulary,
    )
    config = SchedulerConfig(
        max_step_tokens=step_tokens,
        max_mixed_prompt_tokens=8,
        max_queued_requests=60,
        max_queued_tokens=2_000,
        max_draft_tokens=drafted,
        policy=SchedulingPolicy(order=order),
    )
    simulation = Simulation(backend, config)
    load = RandomLoad(simulation, seed)
    arrived = 0
    while arrived < ARRIVALS:
        # Bursts and lulls, about as much work as the engine can do.
        if load.random.random() < 0.3:
            for _ in range(load.random.choice((1, 1, 2, 6))):
                load.arrive()
                arrived += 1
        if load.random.random() < 0.04:
            load.cancel()
        simulation.step()
    stats = simulation.engine.scheduler.stats
    preemptions = stats.preemptions
    simulation.run()
    simulation.check_answers()
    ends = Counter(
        "served" if isinstance(record.end, FinishedOutput) else record.end.reason
        for record in simulation.records.values()
        if isinstance(record.end, FinishedOutput | FailedOutput)
    )
    assert sum(ends.values()) == arrived
    # The run met what it is about.
    assert ends["served"] > 0.3 * arrived
    hopeless = (
        {"EXPIRED", "DEADLINE_UNREACHABLE", "DEADLINE_LOST", "TOO_COSTLY_NOW"} if order == "slack" else {"EXPIRED"}
    )
    assert min(ends["CANCELLED"], sum(ends[reason] for reason in hopeless)) > 20
    assert set(ends) <= {"served", "CANCELLED", "QUEUE_FULL", "QUEUE_TOKENS_FULL"} | hopeless
    if drafted:
        assert stats.drafted_tokens > stats.accepted_tokens > (50 if pages > 40 else 0)  # where requests seldom wait
    memory = simulation.engine.scheduler.memory
    assert memory.prefix_hit_tokens > 0.2 * memory.prefix_query_tokens
    if pages < 100:
        assert preemptions > 10 and memory.tree.evicted > 500
    simulation.check_idle()
