"""The step loop: plan -> batch -> forward -> readouts -> commit -> publish."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from shoplm.engine.builder import build_batch
from shoplm.engine.spec import EngineSpec
from shoplm.model.backend import Backend, Handle
from shoplm.request import EngineOutput, Request, StepStats
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.plan import Plan
from shoplm.scheduler.scheduler import Scheduler

_MOST_FAILURES = 3  # steps that fail in a row before the engine gives up and is started afresh

log = logging.getLogger("shoplm.engine")


class Engine:
    """One backend, one scheduler. Not thread-safe: one loop owns it."""

    def __init__(self, backend: Backend, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        info = backend.info
        if not info.checks_drafts or info.pipeline_depth > 1:  # a guess goes on from tokens that are known
            config = replace(config, max_draft_tokens=0)
        self.backend = backend
        self.scheduler = Scheduler(
            config,
            pages=info.pages,
            page_size=info.page_size,
            state_slots=info.state_slots,
            max_context_tokens=info.max_context_tokens,
            trie_depths=info.trie_depths,
            lanes=backend.lanes,
        )
        self._clock = clock
        self._in_flight: deque[tuple[Plan, Handle]] = deque()
        self._failures = 0
        self._step_seconds: list[float] = []
        self._reported_query = self._reported_hit = self._reported_evicted = 0

    def submit(self, request: Request) -> None:
        """Queue a request; a refusal is among the next step's outputs."""
        self.scheduler.admit(request, self._clock())

    def cancel(self, request_id: str, *, answered: bool = False) -> None:
        """Drop a request; its pages are free when this returns. With `answered` it counts as finished."""
        if answered:
            self.scheduler.finish(request_id, self._clock())
        else:
            self.scheduler.cancel(request_id)

    @property
    def is_idle(self) -> bool:
        """Nothing is queued, running or in flight."""
        return self.scheduler.is_idle and not self._in_flight

    def step(self) -> list[EngineOutput]:
        """One turn of the loop: submit the next step, take the oldest one's results. Returns what happened.

        Raises what a step raised when it is the third in a row to fail: the device is beyond help then.
        """
        plan = self.scheduler.plan(self._clock())
        if plan.load.rows:
            batch = build_batch(plan, self.backend.info.page_size)
            self._in_flight.append((plan, self.backend.submit(batch)))
        if self._in_flight and (len(self._in_flight) >= self.backend.info.pipeline_depth or not plan.load.rows):
            self._take(*self._in_flight.popleft())
        return self.scheduler.drain_outputs()

    def _take(self, plan: Plan, handle: Handle) -> None:
        try:
            result = handle.result()
        except Exception as error:
            self._failures += 1
            log.exception("a step of %d rows failed", plan.load.rows)
            self.scheduler.fail(plan, f"a step failed: {type(error).__name__}", self._clock())
            if self._failures >= _MOST_FAILURES:
                raise
            return
        self._failures = 0
        self._step_seconds.append(result.step_seconds)
        self.scheduler.commit(plan, result.outputs, self._clock())

    def report(self) -> StepStats:
        """Counts since the last report, and gauges."""
        scheduler, memory = self.scheduler, self.scheduler.memory
        stats, tree = scheduler.stats, memory.tree
        report = StepStats(
            step_seconds=tuple(self._step_seconds),
            tokens=dict(stats.tokens),
            rows=dict(stats.rows),
            mixed_steps=stats.mixed_steps,
            queue_seconds={service: tuple(values) for service, values in stats.queue_seconds.items()},
            first_seconds={service: tuple(values) for service, values in stats.first_seconds.items()},
            inter_token_seconds=tuple(stats.inter_token_seconds),
            total_seconds={service: tuple(values) for service, values in stats.total_seconds.items()},
            prefix_query_tokens=memory.prefix_query_tokens - self._reported_query,
            prefix_hit_tokens=memory.prefix_hit_tokens - self._reported_hit,
            evicted_pages=tree.evicted - self._reported_evicted,
            failures=dict(stats.failures),
            submitted=dict(stats.submitted),
            refusals=dict(stats.refusals),
            degraded=dict(stats.degraded),
            preemptions=stats.preemptions,
            drafted_tokens=stats.drafted_tokens,
            accepted_tokens=stats.accepted_tokens,
            cost_errors=tuple(stats.cost_errors),
            wait_corrections={str(service): each for service, each in scheduler.wait_corrections().items()},
            queued_requests={str(service): n for service, n in scheduler.services_queued().items()},
            running_requests={str(service): n for service, n in scheduler.services_running().items()},
            queued_tokens=scheduler.queued_tokens,
            pages_used=memory.pool.size - memory.pool.free - tree.idle,
            pages_cached=tree.idle,
            pages_free=memory.pool.free,
        )
        self._reported_query = memory.prefix_query_tokens
        self._reported_hit = memory.prefix_hit_tokens
        self._reported_evicted = tree.evicted
        self._step_seconds = []
        stats.clear()
        return report


def scheduler_config(spec: EngineSpec) -> SchedulerConfig:
    """The scheduler's bounds, as the spec states them."""
    return SchedulerConfig(
        max_step_tokens=spec.max_step_tokens,
        max_mixed_prompt_tokens=min(spec.max_mixed_prompt_tokens, spec.max_step_tokens),
        max_draft_tokens=spec.max_draft_tokens,
        max_queued_requests=spec.max_queued_requests,
        max_queued_tokens=spec.max_queued_tokens,
        policy=spec.policy,
    )
