"""What one step's kernels read: a batch as device tensors, made once and used by every layer.

Beams are moved behind all other tokens, so that each attention kernel meets one contiguous part of the flat axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.engine.batch import Batch, BeamStep, Row
from shoplm.kernels.inputs import BeamGroups, RaggedRows
from torch import Tensor

LANES_STEP = 128  # the room for lanes grows by this much; the least of it already takes the widest tile, see `_beams`


@dataclass(frozen=True, slots=True)
class KernelStep:
    """One step's inputs on the device. T tokens: those of `rows` first, those of `beams` behind them."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T]: pool slots to write
    outputs: Tensor  # int64 [R]: tokens whose hidden state is read
    row_tokens: int  # tokens of `rows`
    rows: RaggedRows | None  # prompt chunks and single tokens; None: there are none
    beams: BeamGroups | None


def plan_step(
    batch: Batch,
    tokens: NDArray[np.int64],
    outputs: NDArray[np.int64],
    lineages: Mapping[int, NDArray[np.int64]],
    device: torch.device,
) -> KernelStep:
    """Device tensors of `batch`.

    `tokens` [T] are the batch's, those filled in that come from a state slot; `outputs` [R] index the batch's flat
    axis. `lineages` gives, by state slot of a beam row, [step, lanes]: the lane at each step that a lane descends from.
    """
    linear = [row for row in batch.rows if row.beam is None]
    beams = [row for row in batch.rows if row.beam is not None]
    order = np.concatenate([np.arange(row.query_start, row.query_end) for row in (*linear, *beams)])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return KernelStep(
        tokens=_upload(tokens[order], device),
        positions=_upload(batch.positions[order].astype(np.int32), device),
        slots=_upload(batch.slots[order], device),
        outputs=_upload(place[outputs], device),
        row_tokens=sum(row.query_len for row in linear),
        rows=_ragged(linear, device) if linear else None,
        beams=_beams(beams, lineages, device) if beams else None,
    )


def _ragged(rows: Sequence[Row], device: torch.device) -> RaggedRows:
    return RaggedRows(
        page_table=_page_table(rows, device),
        kv_len=_upload(np.array([row.kv_len for row in rows], np.int32), device),
        query_start=_starts(rows, device),
        max_query_len=max(row.query_len for row in rows),
        max_kv_len=max(row.kv_len for row in rows),
    )


def _beams(rows: Sequence[Row], lineages: Mapping[int, NDArray[np.int64]], device: torch.device) -> BeamGroups:
    """The kernel walks from a lane to its ancestors by parents. Here each lane's ancestors are known already, so its
    column holds their slots and every parent is the lane itself.

    The room for lanes decides the kernel's tile, and the tile the order of its sums. A multiple of `LANES_STEP` (more
    packed rows than a narrow tile has) makes the tile the same for every step.
    """
    steps = max(_beam(row).step for row in rows)
    room = -(-max(row.query_len for row in rows) // LANES_STEP) * LANES_STEP
    own_slots = np.zeros((len(rows), steps, room), np.int64)
    for index, row in enumerate(rows):
        beam, lineage = _beam(row), lineages[row.state_slot]
        if lineage.shape != (beam.step, row.query_len):
            raise ValueError(
                f"row of state slot {row.state_slot}: step {beam.step} of {row.query_len} lanes does not continue the "
                f"search there, which has {lineage.shape[0]} codes in {lineage.shape[1]} lanes"
            )
        own_slots[index, : beam.step, : row.query_len] = np.take_along_axis(beam.own_slots[: beam.step], lineage, 1)
    parents = torch.arange(room, dtype=torch.int32, device=device).expand(len(rows), steps, room).contiguous()
    return BeamGroups(
        page_table=_page_table(rows, device),
        prompt_len=_upload(np.array([row.kv_len for row in rows], np.int32), device),
        query_start=_starts(rows, device),
        width=_upload(np.array([row.query_len for row in rows], np.int32), device),
        step=_upload(np.array([_beam(row).step - 1 for row in rows], np.int32), device),
        own_slots=_upload(own_slots, device),
        parents=parents,
        max_prompt_len=max(row.kv_len for row in rows),
    )


def _page_table(rows: Sequence[Row], device: torch.device) -> Tensor:
    """int32 [rows, most pages]; the kernels read no entry past a row's own."""
    table = np.zeros((len(rows), max(len(row.pages) for row in rows)), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.pages)] = row.pages
    return _upload(table, device)


def _starts(rows: Sequence[Row], device: torch.device) -> Tensor:
    """int32 [rows + 1]: prefix sums of the rows' tokens."""
    return _upload(np.cumsum([0, *(row.query_len for row in rows)]).astype(np.int32), device)


def _beam(row: Row) -> BeamStep:
    if row.beam is None:
        raise ValueError(f"row of state slot {row.state_slot} has no beams")
    return row.beam


def _upload(values: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
