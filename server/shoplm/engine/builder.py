"""From a plan to a batch: the scheduler's sequences become flat arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from shoplm.engine.batch import (
    Batch,
    BeamStep,
    EmbedReadout,
    PredictReadout,
    Readout,
    Row,
    SampleReadout,
    SelectReadout,
)
from shoplm.engine.forks import fork_mask, fork_positions, fork_readout
from shoplm.request import Embed, Explain, Generate, Predict, Select
from shoplm.scheduler.plan import Plan, PlanRow


def build_batch(plan: Plan, page_size: int) -> Batch:
    """The batch of a plan that has rows."""
    total = plan.tokens
    tokens = np.zeros(total, np.int32)
    positions = np.empty(total, np.int32)
    slots = np.empty(total, np.int64)
    rows: list[Row] = []
    start = 0
    for planned in plan.rows:
        end = start + planned.count
        task = planned.sequence.request.task
        row = _beam_row(planned, start, page_size) if planned.is_beam else _linear_row(planned, start)
        if row.beam is not None:
            positions[start:end] = planned.start + planned.level - 1
            slots[start:end] = row.beam.own_slots[planned.level - 1]
        elif planned.count == 1 and not isinstance(task, Explain):
            # What most rows of a busy engine are: arrays of one number would cost more than all the rest of the row.
            page, offset = divmod(planned.start, page_size)
            positions[start] = planned.start
            slots[start] = int(row.pages[page]) * page_size + offset
            if not planned.from_state:
                tokens[start] = planned.sequence.tokens[planned.start]
        else:
            at = np.arange(planned.start, planned.start + planned.count)
            positions[start:end] = at
            if isinstance(task, Explain):
                positions[start:end] = fork_positions(at, task, planned.sequence.shareable)
            slots[start:end] = row.pages[at // page_size].astype(np.int64) * page_size + at % page_size
            if not planned.from_state:
                tokens[start:end] = planned.sequence.tokens[planned.start : planned.start + planned.count]
        rows.append(row)
        start = end
    return Batch(tokens, positions, slots, tuple(rows))


def _linear_row(planned: PlanRow, start: int) -> Row:
    sequence = planned.sequence
    assert sequence.state_slot is not None
    pages = [*(node.page for node in sequence.nodes), *sequence.pages]
    task, span = sequence.request.task, (sequence.shareable, planned.start, planned.count)
    return Row(
        state_slot=sequence.state_slot,
        query_start=start,
        query_len=planned.count,
        pages=np.asarray(pages, np.int32),
        kv_len=planned.start + planned.count,
        token_from_state=planned.from_state,
        readout=_readout(planned) if planned.reads else None,
        hidden=fork_mask(task, *span) if isinstance(task, Explain) else None,
    )


def _beam_row(planned: PlanRow, start: int, page_size: int) -> Row:
    sequence = planned.sequence
    assert sequence.state_slot is not None
    pages = [*(node.page for node in sequence.nodes), *sequence.pages]
    own: NDArray[np.int64] = np.asarray(sequence.beam_pages, np.int64)[:, None] * page_size + np.arange(page_size)
    steps = sequence.depth - 1
    return Row(
        state_slot=sequence.state_slot,
        query_start=start,
        query_len=planned.count,
        pages=np.asarray(pages, np.int32),
        kv_len=sequence.prompt_length,
        beam=BeamStep(planned.level, own.reshape(-1)[: steps * sequence.lanes].reshape(steps, sequence.lanes)),
        readout=_readout(planned),
    )


def _readout(planned: PlanRow) -> Readout | None:
    match planned.sequence.request.task:
        case Generate(sampling=sampling):
            return SampleReadout(sampling, planned.sample_index)
        case Select() as select:
            return SelectReadout(select, planned.level)
        case Predict(features=features):
            return PredictReadout(features)
        case Embed():
            return EmbedReadout()
        case Explain() as explain:
            return fork_readout(explain, planned.sequence.shareable, planned.start, planned.count)
