"""An engine that answers as it is told, for what the real one cannot be made to do on demand: chosen tokens, errors,
and requests that never end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from shoplm.errors import BundleChangedError
from shoplm.request import (
    Degradation,
    Explain,
    FinishedOutput,
    FinishReason,
    Generate,
    ItemScores,
    Predict,
    ReadyOutput,
    Request,
    Select,
    SelectOutput,
    StepStats,
    Timings,
    TokensOutput,
)

CONTEXT_TOKENS = 2048


class ScriptedEngine:
    """Implements `shoplm.server.ManagedEngine`. The attributes may be changed between calls."""

    def __init__(self) -> None:
        self.ready: ReadyOutput | None = None
        self.process_id: int | None = None
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.satisfied: list[str] = []  # ids of requests whose callers had all they wanted
        self.answer: Sequence[Sequence[int]] = ((7,), (8,), (9,))  # tokens of each output
        self.error: Exception | None = None
        self.errors: list[Exception] = []  # of the next requests, one each
        self.explaining: Exception | None = None  # what explanations fail with
        self.holds = False  # True: a request gets its first output and then waits until it is cancelled or released
        self.head_outputs = 64
        self.goes_with: dict[int, float] = {}  # terms of item rows
        self.degraded: tuple[Degradation, ...] = ()
        self.started = asyncio.Event()
        self.released = asyncio.Event()
        self._states: list[Callable[[bool], None]] = []
        self._ends: list[Callable[[BundleChangedError], None]] = []
        self._stats: list[Callable[[StepStats], None]] = []

    async def start(self) -> None:
        self.ready = ReadyOutput(64, 16, CONTEXT_TOKENS, "scripted", {"": 24, "toy": 8}, {"": 1, "toy": 3})

    def on_stats(self, callback: Callable[[StepStats], None]) -> None:
        self._stats.append(callback)

    def on_state(self, callback: Callable[[bool], None]) -> None:
        self._states.append(callback)

    def on_end(self, callback: Callable[[BundleChangedError], None]) -> None:
        self._ends.append(callback)

    def end(self, why: BundleChangedError) -> None:
        for callback in self._ends:
            callback(why)

    def set_state(self, serving: bool) -> None:
        for callback in self._states:
            callback(serving)

    def publish(self, stats: StepStats) -> None:
        for callback in self._stats:
            callback(stats)

    async def close(self) -> None:
        self.released.set()

    async def generate(self, request: Request) -> AsyncGenerator[TokensOutput | FinishedOutput]:
        self.requests.append(request)
        if self.errors:
            raise self.errors.pop(0)
        if self.error is not None:
            raise self.error
        if self.explaining is not None and isinstance(request.task, Explain):
            raise self.explaining
        try:
            if isinstance(request.task, Generate):
                for tokens in self.answer:
                    yield TokensOutput(request.request_id, tuple(tokens), cached_tokens=3)
            self.started.set()
            if self.holds:
                await self.released.wait()
            yield self._finished(request)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.request_id)
            raise

    def answered(self, request_id: str) -> None:
        self.satisfied.append(request_id)

    async def run(self, request: Request) -> FinishedOutput:
        async for output in self.generate(request):
            if isinstance(output, FinishedOutput):
                return output
        raise AssertionError("a request ends with FinishedOutput")

    def _finished(self, request: Request) -> FinishedOutput:
        task = request.task
        selected: SelectOutput | None = None
        values: tuple[float, ...] = ()
        completion = 0
        if isinstance(task, Select):
            rows = task.candidates if task.candidates is not None else range(24)
            chosen = [row for row in rows if row not in task.exclude_items][: task.count]
            model = tuple(-1.0 - row for row in chosen)
            own = dict(zip(task.own_items, task.own_counts, strict=True))
            repeat = tuple(own.get(row, 0.0) for row in chosen)
            popularity = tuple(-0.25 for _ in chosen)
            near = tuple(self.goes_with.get(row, 0.0) for row in chosen)
            scores = tuple(map(sum, zip(model, repeat, popularity, near, strict=True)))
            selected = SelectOutput(tuple(chosen), scores, model, repeat, popularity, near)
        elif isinstance(task, Predict):
            values = tuple(0.1 * index for index in range(self.head_outputs))
        elif isinstance(task, Explain):
            columns = len(task.reads.items) if isinstance(task.reads, ItemScores) else self.head_outputs
            values = tuple(-0.25 * fork + 0.1 * at for fork in range(len(task.hidden)) for at in range(columns))
        elif isinstance(task, Generate):
            completion = sum(map(len, self.answer))
        return FinishedOutput(
            request_id=request.request_id,
            timings=Timings(0.001, 0.002, 0.003),
            prompt_tokens=len(request.tokens),
            cached_tokens=3,
            completion_tokens=completion,
            finish_reason=FinishReason.STOP,
            selected=selected,
            values=values,
            degraded=self.degraded,
        )
