"""What the scheduler itself takes of a step: `plan` + `commit`, with many requests running and queued.

    python benchmarks/scheduler_overhead.py --out benchmarks/results/scheduler-overhead.json

`few`: steps as a CPU makes them, where the token target bounds how many answers fit into a step. `quarter`, `half`:
steps as a GPU makes them, bounded by their tokens, so that the answers take turns. `all`: every running answer has its
token in every step. The steps take simulated time; what is measured is the processor time of the scheduler alone,
without batch and backend, so that other work on the machine does not count as waiting. Prints microseconds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from shoplm.bench.report import machine, write_json_of
from shoplm.request import Generate, Predict, Request, Select, Service, Task, token_ids
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from shoplm.scheduler.cost import Coefficients
from shoplm.scheduler.plan import PlanRow
from shoplm.scheduler.scheduler import Scheduler

_GPU = Coefficients(step=2.5e-3, token=5e-6, kv=2e-9, row=5e-6)
# What a step costs, and most of its tokens.
LOADS = {
    "few": (Coefficients(step=15e-3, token=9e-4, kv=4e-7, row=1.5e-3), 2048),
    "quarter": (_GPU, 256),
    "half": (_GPU, 512),
    "all": (_GPU, 2048),
}
FILLING = 0.1  # of the curve, until all answers go on
ANSWER_TOKENS = 4_000
TOKEN = 7
WARM_UP_STEPS = 300  # in which the cost model learns the load's curve
QUEUED_TASKS: tuple[tuple[Service, Task], ...] = (
    (Service.RECOMMENDATION, Select(10, 32)),
    (Service.PREDICTION, Predict(())),
    (Service.CHAT, Generate(64)),
)


@dataclass(slots=True)
class Times:
    """Seconds of each step."""

    plan: list[float]
    commit: list[float]
    rows: list[int]


class Bench:
    """A scheduler with steps of simulated time."""

    def __init__(self, curve: Coefficients, max_step_tokens: int, running: int) -> None:
        policy = SchedulingPolicy(token_target_seconds=0.5)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_step_tokens=max_step_tokens,
                max_queued_requests=100_000,
                max_queued_tokens=100_000_000,
                policy=policy,
            ),
            pages=running * (ANSWER_TOKENS // 16 + 4),
            page_size=16,
            state_slots=running,
            max_context_tokens=8192,
            trie_depths={"": 1},
            lanes=lambda select: select.beam_width,
        )
        self.curve = curve
        self.now = 0.0
        self._number = 0

    def submit(self, service: Service, task: Task, length: int, deadline: float | None) -> None:
        """One request of a customer of its own."""
        self._number += 1
        start = self._number * 10_000
        request = Request(
            str(self._number),
            service,
            token_ids(range(start, start + length)),
            task,
            arrival_seconds=self.now,
            deadline_seconds=deadline,
            tenant=str(self._number % 20),
        )
        self.scheduler.admit(request, self.now)

    def step(self) -> tuple[float, float, int]:
        """Plan and commit one step; returns the seconds of both, and its rows."""
        begin = time.thread_time()
        plan = self.scheduler.plan(self.now)
        planned = time.thread_time() - begin
        self.now += self.curve.seconds(plan.load)
        outputs = [*(TOKEN for _ in plan.answers), *map(_output, plan.rows)]
        begin = time.thread_time()
        self.scheduler.commit(plan, outputs, self.now)
        committed = time.thread_time() - begin
        self.scheduler.drain_outputs()
        self.scheduler.stats.clear()
        return planned, committed, plan.load.rows


def _output(row: PlanRow) -> int | tuple[float, ...] | None:
    if not row.reads:
        return None
    return TOKEN if row.draws else (0.0,)


def measure(load: str, running: int, queued: int, steps: int) -> Times:
    """Fill the engine with answers, then the queue, and time steps."""
    curve, max_step_tokens = LOADS[load]
    bench = Bench(Coefficients(*(FILLING * each for each in curve)), max_step_tokens, running)
    for _ in range(running):
        bench.submit(Service.CHAT, Generate(ANSWER_TOKENS), 32, None)
    while sum(sequence.completion_tokens > 0 for sequence in bench.scheduler.running()) < running:
        bench.step()
    for number in range(queued):
        service, task = QUEUED_TASKS[number % len(QUEUED_TASKS)]
        # Half of them with a deadline that is far enough not to be refused, half late work without one.
        bench.submit(service, task, 300, bench.now + 100_000 if number % 2 else None)
    bench.curve = curve
    for _ in range(WARM_UP_STEPS):
        bench.step()
    gc.collect()
    gc.freeze()
    times = Times([], [], [])
    for _ in range(steps):
        planned, committed, rows = bench.step()
        times.plan.append(planned)
        times.commit.append(committed)
        times.rows.append(rows)
    gc.unfreeze()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=1_000)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="JSON with machine and versions.")
    arguments = parser.parse_args()
    results: dict[str, object] = {"running": arguments.running, "queued": arguments.queued, "steps": arguments.steps}
    machine_before = machine()
    print(f"{arguments.running} running, {arguments.queued} queued, microseconds, median (95th, 99th percentile)")
    for load in LOADS:
        times = measure(load, arguments.running, arguments.queued, arguments.steps)
        both = [1e6 * (plan + commit) for plan, commit in zip(times.plan, times.commit, strict=True)]
        p95, p99 = (sorted(both)[int(share * len(both))] for share in (0.95, 0.99))
        print(
            f"{load:7} {statistics.median(times.rows):6.0f} rows  plan + commit {statistics.median(both):7.0f}"
            f" ({p95:.0f}, {p99:.0f})  plan {1e6 * statistics.median(times.plan):7.0f}"
            f"  commit {1e6 * statistics.median(times.commit):7.0f}"
        )
        results[load] = {
            "rows_of_a_step": statistics.median(times.rows),
            "plan_and_commit_processor_seconds_p50": statistics.median(both) / 1e6,
            "plan_and_commit_processor_seconds_p95": p95 / 1e6,
            "plan_and_commit_processor_seconds_p99": p99 / 1e6,
        }
    if arguments.out is not None:
        write_json_of(results, machine_before, arguments.out)


if __name__ == "__main__":
    main()
