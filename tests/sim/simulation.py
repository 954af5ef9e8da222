"""An engine on simulated time: the real scheduler, builder and step loop over a backend that checks what it reads.

The backend holds no tensors but a shadow of the KV pool: for each pool slot, the hash of the token prefix whose last
token was written there. Whatever a row reads must be one unbroken chain of such prefixes, so a page that was shared
wrongly, given away too early or marked as computed too early is seen at once. What the backend answers is a pure
function of the prefix that it read, so an answer that differs from the request's own shows lost or doubled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from shoplm.batch import (
    Batch,
    EmbedReadout,
    PredictReadout,
    Row,
    RowOutput,
    SampleReadout,
    SelectReadout,
    StepResult,
)
from shoplm.engine.engine import Engine
from shoplm.model.backend import BackendInfo
from shoplm.request import (
    CallOutput,
    EngineOutput,
    FailedOutput,
    FinishedOutput,
    FinishReason,
    Generate,
    Request,
    Select,
    SelectOutput,
    TokensOutput,
    by_request,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.simulate.backend import Clock

_MASK = (1 << 64) - 1
_SALT, _FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
EMPTY = 0x5EED  # hash of the empty prefix
UNWRITTEN = 0
VOCABULARY = 97  # of sampled tokens
TRIE_DEPTHS = {"flat": 1, "deep": 3}


def mix(prefix: int, token: int) -> int:
    """Hash of a prefix and the token behind it."""
    value = ((prefix ^ (token + _SALT & _MASK)) * _FACTOR) & _MASK
    return value ^ (value >> 31)


def _mix_arrays(prefixes: NDArray[np.uint64], tokens: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (prefixes ^ (tokens + np.uint64(_SALT))) * np.uint64(_FACTOR)
    return value ^ (value >> np.uint64(31))


def hash_tokens(tokens: Sequence[int]) -> int:
    """Hash of a whole prefix."""
    value = EMPTY
    for token in tokens:
        value = mix(value, token)
    return value


def _parent(lane: int, lanes: int) -> int:
    """The lane of the level before that a lane goes on from: neither itself nor one to one."""
    return (lane // 2 + 1) % lanes


def _paths_after(prompt: int, paths: Sequence[int], level: int, lanes: int) -> list[int]:
    """The lanes' path hashes once `level` is chosen, from those of the level before."""
    if level == 0:
        return [mix(prompt, lane) for lane in range(lanes)]
    return [mix(paths[_parent(lane, lanes)], lane + 1000 * level) for lane in range(lanes)]


def _selected(task: Select, prompt: int, paths: Sequence[int]) -> SelectOutput:
    scores = [float(path % 1009) for path in (paths or [prompt])[: task.count]]
    items = tuple(range(len(scores)))
    nothing = (0.0,) * len(items)
    return SelectOutput(items, tuple(scores), tuple(scores), nothing, nothing, nothing)


def expected_answer(
    request: Request, vocabulary: int = VOCABULARY
) -> tuple[int, ...] | SelectOutput | tuple[float, ...]:
    """What the request must get, whatever happens around it."""
    prompt, task = hash_tokens(request.tokens), request.task
    if isinstance(task, Generate):
        produced: list[int] = []
        while len(produced) < task.max_tokens:
            token = prompt % vocabulary
            if token in task.stop_token_ids:
                break
            produced.append(token)
            prompt = mix(prompt, token)
        return tuple(produced)
    if isinstance(task, Select):
        depth = TRIE_DEPTHS[task.trie]
        paths: list[int] = []
        if depth > 1 and not task.popularity_only:
            for level in range(depth):
                paths = _paths_after(prompt, paths, level, task.beam_width)
        return _selected(task, prompt, paths)
    return (float(prompt % 1009),)


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a step: a constant, a part per token and a part per key that a token reads."""

    step_seconds: float = 1e-3
    token_seconds: float = 1e-4
    key_seconds: float = 0.0

    def of(self, batch: Batch) -> float:
        keys = sum(row.query_len * row.kv_len for row in batch.rows)
        return self.step_seconds + self.token_seconds * len(batch.tokens) + self.key_seconds * keys


@dataclass(slots=True)
class _Handle:
    backend: CheckingBackend
    number: int
    outputs: tuple[RowOutput, ...]
    seconds: float
    ready_at: float

    def result(self) -> StepResult:
        backend = self.backend
        assert self.number == backend.taken, f"step {self.number} was asked for before step {backend.taken}"
        backend.taken += 1
        backend.clock.now = max(backend.clock.now, self.ready_at)
        if self.number in backend.broken_steps:
            raise RuntimeError("this step was told to fail")
        return StepResult(self.outputs, self.seconds)


class CheckingBackend:
    """Implements `model.backend.Backend`; raises AssertionError on a batch that reads or writes what it must not."""

    def __init__(
        self,
        clock: Clock,
        *,
        pages: int = 64,
        page_size: int = 4,
        state_slots: int = 16,
        max_context_tokens: int = 512,
        pipeline_depth: int = 1,
        vocabulary: int = VOCABULARY,
        cost: CostCurve | None = None,
    ) -> None:
        """`vocabulary`: sampled tokens; with few of them what follows a pair is often what followed it before."""
        self.clock = clock
        self.vocabulary = vocabulary
        self.cost = cost or CostCurve()
        self.taken = 0  # results that were asked for
        self.batches: list[Batch] = []
        self.broken_steps: set[int] = set()
        self._prefixes = np.full(pages * page_size, UNWRITTEN, np.uint64)
        self._tokens = np.zeros(pages * page_size, np.uint64)
        self._drawn = [0] * state_slots
        self._paths: list[list[list[int]]] = [[] for _ in range(state_slots)]  # state slot -> level -> lane -> hash
        self._free_at = 0.0
        self._info = BackendInfo(
            name="checking",
            pages=pages,
            page_size=page_size,
            state_slots=state_slots,
            max_context_tokens=max_context_tokens,
            vocab_size=1 << 20,
            trie_depths=TRIE_DEPTHS,
            trie_items={"flat": 50, "deep": 50},
            pipeline_depth=pipeline_depth,
            checks_drafts=pipeline_depth == 1,
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def lanes(self, select: Select) -> int:
        return select.beam_width

    def close(self) -> None:
        """Holds nothing."""

    def submit(self, batch: Batch) -> _Handle:
        self._check(batch)
        # All reads come before all writes: what a step reads of others, an earlier step has written.
        prefixes = [self._read_prefix(row, row.kv_len - (0 if row.beam else row.query_len)) for row in batch.rows]
        outputs = tuple(self._run(row, batch, prefix) for row, prefix in zip(batch.rows, prefixes, strict=True))
        seconds = self.cost.of(batch)
        self._free_at = max(self._free_at, self.clock.now) + seconds
        self.batches.append(batch)
        return _Handle(self, len(self.batches) - 1, outputs, seconds, self._free_at)

    def _check(self, batch: Batch) -> None:
        slots = [row.state_slot for row in batch.rows]
        assert len(slots) == len(set(slots)), f"a state slot has two rows: {slots}"
        assert len(np.unique(batch.slots)) == len(batch.slots), "a pool slot is written twice in a step"

    def _read_prefix(self, row: Row, length: int) -> int:
        """Hash of the first `length` tokens that the row reads; each of them must follow the one before."""
        size = self._info.page_size
        at = np.arange(length)
        slots = row.pages[at // size].astype(np.int64) * size + at % size
        prefixes, tokens = self._prefixes[slots], self._tokens[slots]
        before = np.concatenate([np.asarray([EMPTY], np.uint64), prefixes])
        wrong = np.flatnonzero(_mix_arrays(before[:-1], tokens) != prefixes)
        assert not len(wrong), f"position {wrong[0]} of {length}, page {row.pages[wrong[0] // size]}: another's content"
        return int(before[-1])

    def _run(self, row: Row, batch: Batch, prefix: int) -> RowOutput:
        if row.beam is not None:
            return self._run_beams(row, batch, prefix)
        read: list[int] = []  # prefixes up to each token
        for index in range(row.query_start, row.query_end):
            position, slot = row.kv_len - row.query_end + index, int(batch.slots[index])
            assert batch.positions[index] == position
            token = self._drawn[row.state_slot] if row.token_from_state else int(batch.tokens[index])
            prefix = mix(prefix, token)
            if slot == self._slot(row, position):
                self._prefixes[slot], self._tokens[slot] = prefix, token
            else:  # the last token of a prompt that others have computed: theirs is read, this one goes out of the way
                assert row.query_len == 1 and not row.token_from_state and slot == self._slot(row, position + 1)
                assert int(self._prefixes[self._slot(row, position)]) == prefix
                self._tokens[slot] = UNWRITTEN
            read.append(prefix)
        match row.readout:
            case SampleReadout(drafted=0):
                token = self._drawn[row.state_slot] = prefix % self.vocabulary
                return token
            case SampleReadout(drafted=drafted):
                assert row.query_len == 1 + drafted and not row.token_from_state and self._info.checks_drafts
                return [each % self.vocabulary for each in read]
            case SelectReadout(select, level):
                assert level == 0
                return self._choose(row, select, prefix, 0, select.beam_width)
            case PredictReadout() | EmbedReadout():
                return (float(prefix % 1009),)
            case None:
                return None

    def _slot(self, row: Row, position: int) -> int:
        page, offset = divmod(position, self._info.page_size)
        return int(row.pages[page]) * self._info.page_size + offset

    def _run_beams(self, row: Row, batch: Batch, prompt: int) -> RowOutput:
        assert row.beam is not None and isinstance(row.readout, SelectReadout)
        step, own, levels = row.beam.step, row.beam.own_slots, self._paths[row.state_slot]
        assert step == row.readout.level == len(levels) and own.shape == (2, row.query_len)
        for lane in range(row.query_len):
            if step > 1:  # the ancestor's slot still holds what the ancestor wrote
                ancestor = _parent(lane, row.query_len)
                assert int(self._prefixes[own[step - 2, ancestor]]) == levels[step - 2][ancestor]
        for lane in range(row.query_len):
            slot = int(own[step - 1, lane])
            assert batch.slots[row.query_start + lane] == slot
            self._prefixes[slot], self._tokens[slot] = levels[step - 1][lane], UNWRITTEN
        return self._choose(row, row.readout.select, prompt, step, row.query_len)

    def _choose(self, row: Row, select: Select, prompt: int, level: int, lanes: int) -> RowOutput:
        depth = TRIE_DEPTHS[select.trie]
        if depth == 1 or select.popularity_only:
            return _selected(select, prompt, [])
        levels = [] if level == 0 else self._paths[row.state_slot]
        levels.append(_paths_after(prompt, levels[-1] if levels else [], level, lanes))
        self._paths[row.state_slot] = levels
        return _selected(select, prompt, levels[-1]) if level == depth - 1 else None


@dataclass(slots=True)
class Record:
    """What a request got so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    token_steps: list[int] = field(default_factory=list)  # number of the engine step that brought each token
    end: FinishedOutput | FailedOutput | None = None


class Simulation:
    """Submits to a real engine, steps it, checks its books and collects what each request gets."""

    def __init__(self, backend: CheckingBackend, config: SchedulerConfig | None = None) -> None:
        self.clock = backend.clock
        self.backend = backend
        self.engine = Engine(
            backend, config or SchedulerConfig(max_step_tokens=32, max_mixed_prompt_tokens=8), self.clock
        )
        self.records: dict[str, Record] = {}
        self.steps = 0

    def submit(self, *requests: Request) -> None:
        for request in requests:
            assert request.request_id not in self.records
            self.records[request.request_id] = Record(request)
            self.engine.submit(request)

    def step(self) -> list[EngineOutput]:
        outputs = self.engine.step()
        self.steps += 1
        self.engine.scheduler.check()
        for output in by_request(outputs):
            self._take(output)
        return outputs

    def run(self, most_steps: int = 5_000) -> None:
        """Until nothing is left to do."""
        for _ in range(most_steps):
            if self.engine.is_idle:
                return
            self.step()
        raise AssertionError(f"not idle after {most_steps} steps: {self.engine.scheduler.alive()}")

    def _take(self, output: CallOutput) -> None:
        record = self.records[output.request_id]
        assert record.end is None, f"{output} after the end {record.end}"
        if isinstance(output, TokensOutput):
            record.tokens.extend(output.tokens)
            record.token_steps.append(self.steps)
        else:
            record.end = output

    def check_answer(self, request_id: str) -> None:
        """A served request got exactly its own answer; one that failed got the start of it."""
        record = self.records[request_id]
        expected = expected_answer(record.request, self.backend.vocabulary)
        assert record.end is not None, f"{request_id} has no end"
        if isinstance(record.request.task, Generate):
            got = tuple(record.tokens)
            assert isinstance(expected, tuple)
            assert got == expected[: len(got)], f"{request_id}: {got} is not the start of {expected}"
            if isinstance(record.end, FinishedOutput):
                assert got == expected and record.end.completion_tokens == len(got)
                whole = len(got) == record.request.task.max_tokens
                assert record.end.finish_reason is (FinishReason.LENGTH if whole else FinishReason.STOP)
        elif isinstance(record.end, FinishedOutput):
            assert expected == (record.end.selected or record.end.values)

    def check_answers(self) -> None:
        """`check_answer` of every request."""
        for request_id in self.records:
            self.check_answer(request_id)

    def check_idle(self) -> None:
        """Every page is free or cached, every queue empty, and the cache can be emptied."""
        scheduler = self.engine.scheduler
        scheduler.check()
        memory = scheduler.memory
        assert memory.pool.free + memory.tree.idle == memory.pool.size
        assert not scheduler.running() and not scheduler.alive()
        assert (scheduler.queued_requests, scheduler.queued_tokens) == (0, 0)
        assert all(node.filled and not node.users and node.writer is None for node in memory.tree.nodes())
        memory.tree.clear()
        assert memory.pool.free == memory.pool.size
