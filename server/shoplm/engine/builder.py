"""From a plan to a batch: the scheduler's sequences become flat arrays."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray
from shoplm.batch import (
    Batch,
    BeamStep,
    EmbedReadout,
    PredictReadout,
    Readout,
    Row,
    SampleReadout,
    SelectReadout,
    beam_of,
)
from shoplm.engine.forks import fork_mask, fork_positions, fork_readout
from shoplm.request import Embed, Explain, Generate, Predict, Select
from shoplm.scheduler.plan import Plan, PlanRow
from shoplm.scheduler.sequence import Sequence

_FEW_TOKENS = 16


def build_batch(plan: Plan, page_size: int) -> Batch:
    """The batch of a plan that is not empty, which must be the latest: it tells what tokens are known by now."""
    total, answers = plan.tokens, len(plan.answers)
    tokens = np.zeros(total, np.int32)
    positions = np.empty(total, np.int32)
    slots = np.empty(total, np.int64)
    rows: list[Row] = []
    answer_slots: list[int] = []
    for start, (sequence, position) in enumerate(zip(plan.answers, plan.starts, strict=True)):
        rows.append(row := _answer_row(sequence, position, start))
        answer_slots.append(_slot(sequence.page_table, position, page_size))
        if not row.token_from_state:
            tokens[start] = sequence.tokens[position]
    positions[:answers], slots[:answers] = plan.starts, answer_slots
    start = answers
    for planned in plan.rows:
        end, sequence = start + planned.count, planned.sequence
        if planned.is_beam:
            row = _beam_row(planned, start, page_size)
            positions[start:end] = planned.start + planned.level - 1
            slots[start:end] = beam_of(row).own_slots[planned.level - 1]
        else:
            row = _linear_row(planned, start)
            at = np.arange(planned.start, planned.start + planned.count)
            task = sequence.request.task
            positions[start:end] = fork_positions(at, task, sequence.shareable) if isinstance(task, Explain) else at
            slots[start:end] = _slots(sequence.page_table, planned.start + planned.again, planned.count, page_size)
            known = planned.count - len(planned.draft)
            tokens[start : start + known] = sequence.tokens[planned.start : planned.start + known]
            tokens[start + known : end] = planned.draft
        rows.append(row)
        start = end
    return Batch(tokens, positions, slots, tuple(rows))


def _slots(pages: Seq[int], first: int, count: int, page_size: int) -> NDArray[np.int64]:
    """Pool slots of `count` tokens of these pages, from the `first` on."""
    if count <= _FEW_TOKENS:  # arrays take longer to begin than few tokens to end
        return np.array([_slot(pages, at, page_size) for at in range(first, first + count)], np.int64)
    page, offset = np.divmod(np.arange(first, first + count), page_size)
    slots: NDArray[np.int64] = np.asarray(pages, np.int64)[page] * page_size + offset
    return slots


def _slot(pages: Seq[int], position: int, page_size: int) -> int:
    return pages[position // page_size] * page_size + position % page_size


def _answer_row(sequence: Sequence, position: int, start: int) -> Row:
    """The row of an answer's token. Numbers, no arrays of one: those would cost more than all the rest of the row."""
    assert sequence.state_slot is not None
    task = sequence.request.task
    assert isinstance(task, Generate)
    return Row(
        state_slot=sequence.state_slot,
        query_start=start,
        query_len=1,
        pages=_pages(sequence),
        kv_len=position + 1,
        token_from_state=position >= len(sequence.tokens),
        readout=SampleReadout(task.sampling, position + 1 - sequence.prompt_length),
    )


def _linear_row(planned: PlanRow, start: int) -> Row:
    sequence = planned.sequence
    assert sequence.state_slot is not None
    task = sequence.request.task
    return Row(
        state_slot=sequence.state_slot,
        query_start=start,
        query_len=planned.count,
        pages=_pages(sequence),
        kv_len=planned.start + planned.count,
        readout=_readout(planned) if planned.reads else None,
        hidden=fork_mask(task, sequence.shareable, planned.start, planned.count) if isinstance(task, Explain) else None,
    )


def _beam_row(planned: PlanRow, start: int, page_size: int) -> Row:
    sequence = planned.sequence
    assert sequence.state_slot is not None
    own = _slots(sequence.beam_pages, 0, sequence.beam_tokens, page_size).reshape(-1, sequence.lanes)
    return Row(
        state_slot=sequence.state_slot,
        query_start=start,
        query_len=planned.count,
        pages=_pages(sequence),
        kv_len=sequence.prompt_length,
        beam=BeamStep(planned.level, own),
        readout=_readout(planned),
    )


def _pages(sequence: Sequence) -> NDArray[np.int32]:
    return np.array(sequence.page_table, np.int32)  # a copy: the table grows


def _readout(planned: PlanRow) -> Readout | None:
    match planned.sequence.request.task:
        case Generate(sampling=sampling):
            return SampleReadout(sampling, planned.sample_index, len(planned.draft))
        case Select() as select:
            return SelectReadout(select, planned.level)
        case Predict(features=features):
            return PredictReadout(features)
        case Embed():
            return EmbedReadout()
        case Explain() as explain:
            return fork_readout(explain, planned.sequence.shareable, planned.start, planned.count)
