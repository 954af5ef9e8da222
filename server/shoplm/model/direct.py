"""Run prompts through a backend without engine, scheduler or cache: for training, benchmarks and tests.

Every sequence gets pages of its own and keeps them until it ends; each step takes what all open sequences have to
compute, within the token limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from shoplm.engine.batch import (
    Batch,
    BeamStep,
    EmbedReadout,
    PredictReadout,
    Readout,
    Row,
    RowOutput,
    SampleReadout,
    SelectReadout,
)
from shoplm.engine.forks import fork_mask, fork_positions, fork_readout
from shoplm.model.backend import Backend
from shoplm.request import Embed, Explain, Generate, Predict, Select, SelectOutput, Task, check_forks, forks_start

Output = tuple[int, ...] | tuple[float, ...] | SelectOutput


@dataclass(eq=False, slots=True)
class _Sequence:
    tokens: tuple[int, ...]
    task: Task
    state_slot: int
    pages: NDArray[np.int32]
    own_slots: NDArray[np.int64]  # [depth - 1, lanes]
    computed: int = 0
    level: int = 0
    produced: list[int] = field(default_factory=list)
    parts: tuple[float, ...] = ()  # Explain: what the forks read that have ended
    output: Output | None = None

    @property
    def in_prompt(self) -> bool:
        return self.computed < len(self.tokens)


class DirectRunner:
    """Owns all pages and state slots of a backend that nobody else uses."""

    def __init__(
        self,
        backend: Backend,
        *,
        chunk_tokens: int = 2048,
        step_tokens: int = 2048,
        free_pages: Sequence[int] | None = None,
    ) -> None:
        """`chunk_tokens` bounds one prompt's part of a step, `step_tokens` the step (single tokens and beams aside).
        `free_pages` is the order in which pages are handed out; all, ascending, where it is not given."""
        self._backend = backend
        self._chunk_tokens = chunk_tokens
        self._step_tokens = step_tokens
        info = backend.info
        self._free_pages = list(range(info.pages) if free_pages is None else free_pages)[::-1]
        self._free_slots = list(range(info.state_slots))[::-1]

    def run(self, work: Sequence[tuple[Sequence[int], Task]]) -> list[Output]:
        """Outputs in order: token ids for Generate, items for Select, values for Predict, the hidden state for Embed.

        Starts as many as there are pages and state slots for, the rest as others end. Raises what the backend raises,
        and ValueError for work that never fits. `stop_token_ids` end an answer and are not part of it.
        """
        waiting = list(enumerate(work))[::-1]
        running: list[tuple[int, _Sequence]] = []
        outputs: dict[int, Output] = {}
        while waiting or running:
            while waiting and self._free_slots:
                index, (tokens, task) = waiting[-1]
                sequence = self._open(tuple(tokens), task)
                if sequence is None:
                    break
                waiting.pop()
                running.append((index, sequence))
            if not running:
                raise ValueError(f"work {waiting[-1][0]} needs more pages or state slots than the backend has")
            self._step([sequence for _, sequence in running])
            for index, sequence in running:
                if sequence.output is not None:
                    outputs[index] = sequence.output
                    self._free_slots.append(sequence.state_slot)
                    self._free_pages += sequence.pages.tolist()
            running = [(index, sequence) for index, sequence in running if sequence.output is None]
        return [outputs[index] for index in range(len(work))]

    def _open(self, tokens: tuple[int, ...], task: Task) -> _Sequence | None:
        info = self._backend.info
        if isinstance(task, Explain):
            check_forks(tokens, task)
        length, beam_shape = len(tokens), (0, 0)
        if isinstance(task, Generate):
            length += task.max_tokens - 1
        elif isinstance(task, Select):
            beam_shape = (info.trie_depths[task.trie] - 1, self._backend.lanes(task))
        linear = -(-length // info.page_size)
        needed = linear + -(-beam_shape[0] * beam_shape[1] // info.page_size)
        if needed > len(self._free_pages):
            return None
        pages = np.array([self._free_pages.pop() for _ in range(needed)], np.int32)
        spare = pages[linear:, None].astype(np.int64) * info.page_size + np.arange(info.page_size)
        own_slots = spare.reshape(-1)[: beam_shape[0] * beam_shape[1]].reshape(beam_shape)
        return _Sequence(tokens, task, self._free_slots.pop(), pages, own_slots)

    def _step(self, sequences: Sequence[_Sequence]) -> None:
        tokens: list[int] = []
        positions: list[NDArray[np.int64]] = []
        slots: list[NDArray[np.int64]] = []
        rows: list[Row] = []
        chosen: list[_Sequence] = []
        budget = self._step_tokens
        for sequence in sequences:
            count = 1
            if sequence.in_prompt:
                count = min(len(sequence.tokens) - sequence.computed, self._chunk_tokens, budget)
                budget -= count
            if not count:
                continue
            chosen.append(sequence)
            if sequence.level:
                rows.append(self._beam_row(sequence, len(tokens)))
                lanes = rows[-1].query_len
                tokens += [0] * lanes
                positions.append(np.full(lanes, len(sequence.tokens) + sequence.level - 1))
                slots.append(sequence.own_slots[sequence.level - 1])
                continue
            rows.append(self._linear_row(sequence, len(tokens), count))
            at = np.arange(sequence.computed, sequence.computed + count)
            tokens += sequence.tokens[at[0] : at[-1] + 1] if sequence.in_prompt else [0]
            task = sequence.task
            if isinstance(task, Explain):
                positions.append(fork_positions(at, task, forks_start(len(sequence.tokens), task)))
            else:
                positions.append(at)
            slots.append(self._slots(sequence, at))
        batch = Batch(
            np.array(tokens, np.int32), np.concatenate(positions).astype(np.int32), np.concatenate(slots), tuple(rows)
        )
        result = self._backend.submit(batch).result()
        for sequence, row, output in zip(chosen, rows, result.outputs, strict=True):
            _advance(sequence, row, output)

    def _linear_row(self, sequence: _Sequence, start: int, count: int) -> Row:
        end, task = sequence.computed + count, sequence.task
        readout = _readout(sequence) if end >= len(sequence.tokens) else None
        hidden = None
        if isinstance(task, Explain):
            part = (forks_start(len(sequence.tokens), task), sequence.computed, count)
            readout, hidden = fork_readout(task, *part), fork_mask(task, *part)
        return Row(
            state_slot=sequence.state_slot,
            query_start=start,
            query_len=count,
            pages=sequence.pages,
            kv_len=end,
            token_from_state=not sequence.in_prompt,
            readout=readout,
            hidden=hidden,
        )

    def _beam_row(self, sequence: _Sequence, start: int) -> Row:
        return Row(
            state_slot=sequence.state_slot,
            query_start=start,
            query_len=sequence.own_slots.shape[1],
            pages=sequence.pages,
            kv_len=len(sequence.tokens),
            beam=BeamStep(sequence.level, sequence.own_slots),
            readout=_readout(sequence),
        )

    def _slots(self, sequence: _Sequence, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        size = self._backend.info.page_size
        result: NDArray[np.int64] = sequence.pages[positions // size].astype(np.int64) * size + positions % size
        return result


def _readout(sequence: _Sequence) -> Readout | None:
    """Of the last token."""
    match sequence.task:
        case Generate(sampling=sampling):
            return SampleReadout(sampling, len(sequence.produced))
        case Select():
            return SelectReadout(sequence.task, sequence.level)
        case Predict(features=features):
            return PredictReadout(features)
        case Embed():
            return EmbedReadout()
        case Explain():
            return None  # its forks' ends are read


def _advance(sequence: _Sequence, row: Row, output: RowOutput) -> None:
    """Account for a step's output."""
    if row.beam is None:
        sequence.computed += row.query_len
    if row.readout is None:
        return
    task = sequence.task
    if isinstance(task, Generate):
        if not isinstance(output, int):
            raise TypeError(f"the backend answered {output!r} to a sampling row")
        stopped = output in task.stop_token_ids
        if not stopped:
            sequence.produced.append(output)
        if stopped or len(sequence.produced) == task.max_tokens:
            sequence.output = tuple(sequence.produced)
    elif output is None:
        sequence.level += 1
    elif isinstance(task, Explain) and isinstance(output, tuple):
        sequence.parts += output
        sequence.output = None if sequence.in_prompt else sequence.parts
    elif not isinstance(output, int | list):
        sequence.output = output
