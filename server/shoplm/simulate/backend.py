"""A backend that takes the time that a cost curve says, and answers nothing in particular."""

from __future__ import annotations

import random
from dataclasses import dataclass

from shoplm.batch import Batch, Row, RowOutput, SampleReadout, SelectReadout, StepResult
from shoplm.model.backend import BackendInfo
from shoplm.request import Select, SelectOutput
from shoplm.scheduler.cost import StepLoad, kv_tokens
from shoplm.simulate.curve import CostCurve

STOP_TOKEN = 1
_TEXT_TOKEN = 2


class Clock:
    """Seconds that pass only where the simulation says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine can hold."""

    pages: int = 4096
    page_size: int = 16
    state_slots: int = 256
    max_context_tokens: int = 8192
    pipeline_depth: int = 1
    trie_depth: int = 1  # codes per item


@dataclass(slots=True)
class _Handle:
    clock: Clock
    result_: StepResult
    ready_at: float

    def result(self) -> StepResult:
        self.clock.now = max(self.clock.now, self.ready_at)
        return self.result_


class SimulatedBackend:
    """Implements `model.backend.Backend`. A chat's answer ends after `Sampling.seed` tokens."""

    def __init__(
        self, clock: Clock, curve: CostCurve, capacity: Capacity, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        """`noise`: standard deviation of the logarithm of a step's seconds."""
        self._clock = clock
        self._curve = curve
        self._noise = noise
        self._random = random.Random(seed)
        self._free_at = 0.0
        self.busy_seconds = 0.0
        self._info = BackendInfo(
            name="simulated",
            pages=capacity.pages,
            page_size=capacity.page_size,
            state_slots=capacity.state_slots,
            max_context_tokens=capacity.max_context_tokens,
            vocab_size=1 << 31,
            trie_depths={"": capacity.trie_depth},
            trie_items={"": 1},
            pipeline_depth=capacity.pipeline_depth,
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def lanes(self, select: Select) -> int:
        return select.beam_width

    def close(self) -> None:
        """Holds nothing."""

    def submit(self, batch: Batch) -> _Handle:
        keys = sum(
            row.query_len * row.kv_len if row.beam else kv_tokens(row.kv_len - row.query_len, row.query_len)
            for row in batch.rows
        )
        seconds = self._curve.seconds(StepLoad(len(batch.tokens), keys, len(batch.rows)))
        if self._noise:
            seconds *= self._random.lognormvariate(0.0, self._noise)
        self.busy_seconds += seconds
        self._free_at = max(self._free_at, self._clock.now) + seconds
        return _Handle(self._clock, StepResult(tuple(map(self._answer, batch.rows)), seconds), self._free_at)

    def _answer(self, row: Row) -> RowOutput:
        match row.readout:
            case None:
                return None
            case SampleReadout(sampling, index):
                return STOP_TOKEN if index >= sampling.seed else _TEXT_TOKEN
            case SelectReadout(select, level):
                last = select.popularity_only or level == self._info.trie_depths[""] - 1
                return SelectOutput((0,), (0.0,), (0.0,), (0.0,), (0.0,), (0.0,)) if last else None
            case _:
                return (0.0,)
