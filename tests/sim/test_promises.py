"""Properties over thousands of simulated seconds: shares, a bound on waiting, budgets, and no thrashing."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from shoplm.request import FailedOutput, FinishedOutput, Generate, Predict, Request, Select, Service, Task, token_ids
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from simulation import CheckingBackend, Clock, CostCurve, Simulation

SEEDS = (1, 2)
TASKS: dict[Service, Task] = {
    Service.RECOMMENDATION: Select(1, 1, trie="flat"),
    Service.PREDICTION: Predict(()),
    Service.CHAT: Generate(12),
}


class Crowd:
    """Keeps so many requests of each kind waiting, and counts what each got."""

    def __init__(self, policy: SchedulingPolicy, seed: int, max_queued_requests: int = 2048) -> None:
        print(f"seed {seed}")  # noqa: T201 - pytest shows it with a failure
        backend = CheckingBackend(Clock(), pages=600, state_slots=32, cost=CostCurve(5e-3, 1e-3))
        config = SchedulerConfig(
            max_step_tokens=128, max_mixed_prompt_tokens=64, max_queued_requests=max_queued_requests, policy=policy
        )
        self.simulation = Simulation(backend, config)
        self.random = random.Random(seed)
        self._numbers = itertools.count()

    def submit(self, service: Service, tenant: str = "", **fields: object) -> str:
        name = f"{service.value}-{tenant}-{next(self._numbers)}"
        tokens = tuple(self.random.randrange(1 << 16) for _ in range(self.random.randint(20, 80)))
        now = self.simulation.clock.now
        request = Request(name, service, token_ids(tokens), TASKS[service], now, tenant=tenant, **fields)  # type: ignore[arg-type]
        self.simulation.submit(request)
        return name

    def keep_waiting(self, waiting: dict[tuple[Service, str], int], seconds: float) -> None:
        """Run for so long with at least so many requests alive of each service and tenant."""
        end = self.simulation.clock.now + seconds
        while self.simulation.clock.now < end:
            alive = [sequence.request for sequence in self.simulation.engine.scheduler.alive()]
            for (service, tenant), count in waiting.items():
                have = sum(each.service is service and each.tenant == tenant for each in alive)
                for _ in range(count - have):
                    self.submit(service, tenant)
            self.simulation.step()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
def test_busy_services_get_their_shares_within_a_tenth(weights: tuple[float, float, float], seed: int) -> None:
    by_service = dict(zip(Service, weights, strict=True))
    crowd = Crowd(SchedulingPolicy(service_weights=by_service), seed)
    crowd.keep_waiting({(service, ""): 12 for service in Service}, 8.0)
    shares = crowd.simulation.engine.scheduler.shares.services
    before = {service: share.used_seconds for service, share in shares.items()}
    crowd.keep_waiting({(service, ""): 12 for service in Service}, 40.0)
    used = {service: share.used_seconds - before[service] for service, share in shares.items()}
    for service in Service:
        expected = by_service[service] / sum(weights)
        assert used[service] / sum(used.values()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tenant_that_floods_takes_nothing_from_the_share_of_another(seed: int) -> None:
    crowd = Crowd(SchedulingPolicy(tenant_weights={"gold": 2.0}), seed)
    crowd.keep_waiting(
        {
            (Service.PREDICTION, "flood"): 100,
            (Service.PREDICTION, "gold"): 10,
            (Service.PREDICTION, "plain"): 10,
        },
        60.0,
    )
    tenants = crowd.simulation.engine.scheduler.shares.services[Service.PREDICTION].tenants
    used = {name: tenant.virtual * tenant.weight for name, tenant in tenants.items()}
    for name, share in (("gold", 0.5), ("plain", 0.25), ("flood", 0.25)):
        assert used[name] / sum(used.values()) == pytest.approx(share, rel=0.1)
    ends = [record for record in crowd.simulation.records.values() if isinstance(record.end, FinishedOutput)]
    served = {name: sum(record.request.tenant == name for record in ends) for name in used}
    # A request is as large as another on average, so what was used is what was served.
    assert served["gold"] / len(ends) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_full_queue_never_refuses_who_has_less_than_its_share(seed: int) -> None:
    crowd = Crowd(SchedulingPolicy(tenant_weights={"gold": 2.0}), seed, max_queued_requests=30)
    scheduler = crowd.simulation.engine.scheduler
    checked = 0
    for _ in range(3_000):
        flooding = crowd.random.random() < 0.9
        tenant = "flood" if flooding else crowd.random.choice(("gold", "plain"))
        service = Service.CHAT if flooding else crowd.random.choice(list(Service))
        name = crowd.submit(service, tenant)
        queued: Counter[str] = Counter()
        for sequence in scheduler.alive():
            if sequence.state_slot is None and sequence.request.service is service:
                queued[sequence.request.tenant] += 1
        assert scheduler.queued_requests <= 30
        if name not in {sequence.request.request_id for sequence in scheduler.alive()}:
            weights = {"gold": 2.0, "plain": 1.0, "flood": 1.0}
            total = sum(weights[each] for each in {*queued, tenant})
            # All three services at once may share the queue.
            assert queued[tenant] + 1 > 30 / 3 * weights[tenant] / total, (tenant, queued)
            checked += 1
        if crowd.random.random() < 0.1:
            crowd.simulation.step()
    assert checked > 500
    crowd.simulation.run(20_000)
    crowd.simulation.check_idle()


@pytest.mark.parametrize("seed", SEEDS)
def test_late_work_without_a_deadline_waits_no_longer_than_its_share_of_the_queue(seed: int) -> None:
    crowd = Crowd(SchedulingPolicy(), seed)
    crowd.keep_waiting({(Service.PREDICTION, ""): 5}, 2.0)
    patient = [crowd.submit(Service.PREDICTION, priority=-1) for _ in range(20)]
    started = crowd.simulation.clock.now
    # More urgent work than the engine can do, all of it with deadlines that it can be in time for.
    while any(crowd.simulation.records[name].end is None for name in patient):
        for _ in range(3):
            deadline = crowd.simulation.clock.now + 0.5
            crowd.submit(Service.PREDICTION, deadline_seconds=deadline, priority=5)
        crowd.simulation.step()
        assert crowd.simulation.clock.now - started < 60.0, "starved"
    work = sum(len(crowd.simulation.records[name].request.tokens) * 1e-3 for name in patient)
    # A share of 0.15 of the time, and the constant part of steps.
    assert crowd.simulation.clock.now - started < 2 * work / 0.15 + 1.0


@pytest.mark.parametrize("within_seconds", [0.2, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_who_has_waited_for_half_of_its_time_has_a_share_however_far_its_deadline_is(
    seed: int, within_seconds: float
) -> None:
    crowd = Crowd(SchedulingPolicy(), seed)
    crowd.keep_waiting({(Service.PREDICTION, ""): 5}, 2.0)
    started = crowd.simulation.clock.now
    far = [crowd.submit(Service.PREDICTION, deadline_seconds=started + 30.0) for _ in range(20)]
    # More work than the engine can do, all of it due before the far deadlines.
    while any(crowd.simulation.records[name].end is None for name in far):
        for _ in range(3):
            crowd.submit(Service.PREDICTION, deadline_seconds=crowd.simulation.clock.now + within_seconds)
        crowd.simulation.step()
    assert all(isinstance(crowd.simulation.records[name].end, FinishedOutput) for name in far)
    work = sum(len(crowd.simulation.records[name].request.tokens) * 1e-3 for name in far)
    assert crowd.simulation.clock.now - started < 15.0 + 1.5 * work / 0.15


@pytest.mark.parametrize("seed", SEEDS)
def test_refused_work_is_never_computed_and_no_step_exceeds_its_budget(seed: int) -> None:
    crowd = Crowd(SchedulingPolicy(), seed)
    crowd.keep_waiting({(service, ""): 2 for service in Service}, 2.0)
    while len(crowd.simulation.records) < 1_500:
        service = crowd.random.choice(list(Service))
        within = crowd.random.uniform(0.05, 1.5)
        crowd.submit(service, deadline_seconds=crowd.simulation.clock.now + within)
        if crowd.random.random() < 0.4:
            crowd.simulation.step()
    crowd.simulation.run()
    backend = crowd.simulation.backend
    assert max(len(batch.tokens) for batch in backend.batches) <= 128
    ends = {name: record.end for name, record in crowd.simulation.records.items()}
    unreachable = {
        n for n, end in ends.items() if isinstance(end, FailedOutput) and end.reason == "DEADLINE_UNREACHABLE"
    }
    assert len(unreachable) > 100
    computed = sum(len(batch.tokens) for batch in backend.batches)
    admitted = sum(
        len(record.request.tokens) + len(record.tokens)
        for name, record in crowd.simulation.records.items()
        if name not in unreachable
    )
    assert computed <= admitted
    served = [end for end in ends.values() if isinstance(end, FinishedOutput)]
    assert len(served) > 200
    crowd.simulation.check_answers()
    crowd.simulation.check_idle()


@pytest.mark.parametrize("pipeline_depth", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_answers_that_do_not_fit_together_do_not_take_each_others_pages_in_turn(seed: int, pipeline_depth: int) -> None:
    print(f"seed {seed}")  # noqa: T201 - pytest shows it with a failure
    generator = random.Random(seed)
    backend = CheckingBackend(Clock(), pages=45, state_slots=8, pipeline_depth=pipeline_depth)
    simulation = Simulation(backend, SchedulerConfig(max_step_tokens=64))
    lengths = [generator.randint(20, 60) for _ in range(8)]
    for number, length in enumerate(lengths):  # each up to 120 of 180 tokens
        tokens = tuple(range(1_000 * number, 1_000 * number + length))
        request = Request(f"r{number}", Service.CHAT, token_ids(tokens), Generate(60), arrival_seconds=1e-6 * number)
        simulation.submit(request)
    simulation.run(5_000)
    for name in simulation.records:
        simulation.check_answer(name)
        assert isinstance(simulation.records[name].end, FinishedOutput)
    needed = sum(length + 60 for length in lengths)
    computed = sum(len(batch.tokens) for batch in backend.batches)
    assert computed < 2 * needed, f"{computed} tokens were computed where {needed} are needed"
    # In the order of their arrival, and the first of them without a pause.
    steps = simulation.records["r0"].token_steps
    assert steps == list(range(steps[0], steps[0] + 60))
