"""What one step's kernels read: a batch as arrays, padded to bounds where a captured graph asks for it, then on the
device in one copy.

Beams are moved behind all other tokens, so that each attention kernel meets one contiguous part of the flat axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from operator import attrgetter, ge
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import Batch, Row, SampleReadout, SelectReadout, beam_of
from shoplm.kernels.inputs import WORD_BITS, BeamGroups, ForkRows, RaggedRows, packed_bits
from shoplm.model.device_io import upload
from shoplm.model.device_state import DeviceState
from shoplm.model.readouts import output_tokens
from torch import Tensor

LANES_STEP = (
    128  # the room for lanes grows by this much; the least of it already takes the widest tile, see `StepBounds`
)

_Scalar = TypeVar("_Scalar", bound=np.generic)
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Draws = tuple[Int64, Int64, Float32, Int32, Float32, Int64, Int32]  # the last seven arrays of `StepArrays`


@dataclass(frozen=True, slots=True)
class StepBounds:
    """Sizes of a step's arrays. A captured graph serves every step within its own.

    The room for lanes decides the beam kernel's tile, and the tile the order of its sums. A multiple of `LANES_STEP`
    (more packed rows than a narrow tile has) makes the tile the same for every step.
    """

    row_tokens: int  # tokens of prompts and chats, with and without forks
    rows: int  # without forks
    query_len: int  # most new tokens of a row
    kv_len: int  # most tokens that a row reads, or that a search's prompt has
    pages: int  # columns of the page tables
    groups: int = 0  # searches
    lane_tokens: int = 0  # tokens of all searches
    lanes: int = 0  # room for the lanes of one search
    steps: int = 0  # codes of one search's lanes
    samples: int = 0  # rows that draw a token
    outputs: int = 0  # hidden states that are read

    @staticmethod
    def of(batch: Batch) -> StepBounds:
        """What a step needs."""
        plain, forked, beams = _parts(batch)
        widest = max((row.query_len for row in beams), default=0)
        return StepBounds(
            row_tokens=sum(row.query_len for row in (*plain, *forked)),
            rows=len(plain),
            query_len=max((row.query_len for row in plain), default=0),
            kv_len=max(row.kv_len for row in batch.rows),
            pages=max(len(row.pages) for row in batch.rows),
            groups=len(beams),
            lane_tokens=sum(row.query_len for row in beams),
            lanes=lane_room(widest),
            steps=max((beam_of(row).step for row in beams), default=0),
            samples=sum(isinstance(row.readout, SampleReadout) for row in batch.rows),
            outputs=sum(row.output_count for row in batch.rows),
        )

    def cover(self, other: StepBounds) -> bool:
        """Whether a step of these sizes has room for `other`."""
        return all(map(ge, _sizes(self), _sizes(other)))


_sizes = attrgetter(*(field.name for field in fields(StepBounds)))


def lane_room(lanes: int) -> int:
    """The room for this many lanes of one search: the next multiple of `LANES_STEP`."""
    return -(-lanes // LANES_STEP) * LANES_STEP


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step on the host. T tokens: those of rows first, then their padding, then those of beams and theirs."""

    tokens: Int64  # [T]
    from_state: NDArray[np.bool_]  # [T]: the token is what `source` of the state's tokens holds
    source: Int64  # [T]
    positions: Int32  # [T]
    slots: Int64  # [T]: pool slots to write; -1 for padding
    outputs: Int64  # [R]: tokens whose hidden state is read
    row_pages: Int32  # [rows, pages]
    row_kv_len: Int32  # [rows]
    row_start: Int32  # [rows + 1]: first token of each row
    beam_pages: Int32  # [groups, pages]
    beam_prompt_len: Int32  # [groups]
    beam_start: Int32  # [groups + 1], counted from the first lane
    beam_width: Int32  # [groups]
    beam_step: Int32  # [groups]
    beam_slots: Int64  # [groups]: state slots, where the lanes' parents are
    own_slots: Int64  # [groups, steps, lanes]
    sample_outputs: Int64  # [S]: which of the outputs are drawn from
    sample_target: Int64  # [S]: entry of the state's tokens that the drawn one goes to
    temperature: Float32  # [S]
    top_k: Int32  # [S]
    top_p: Float32  # [S]
    seed: Int64  # [S]
    sample_index: Int32  # [S]


@dataclass(frozen=True, slots=True)
class KernelStep:
    """One step on the device; see `StepArrays`, whose tensors these are."""

    bounds: StepBounds
    tokens: Tensor
    from_state: Tensor
    source: Tensor
    positions: Tensor
    slots: Tensor
    outputs: Tensor
    row_pages: Tensor
    row_kv_len: Tensor
    row_start: Tensor
    beam_pages: Tensor
    beam_prompt_len: Tensor
    beam_start: Tensor
    beam_width: Tensor
    beam_step: Tensor
    beam_slots: Tensor
    own_slots: Tensor
    sample_outputs: Tensor
    sample_target: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    sample_index: Tensor
    # Numbers of new tokens of `rows`, where the host knows them. In no captured graph.
    query_lens: frozenset[int] | None = field(default=None, kw_only=True)
    # Prompts with forks: their tokens come between those of the other rows and the beams'. In no captured graph.
    forks: ForkRows | None = field(default=None, kw_only=True)

    @staticmethod
    def upload(arrays: StepArrays, bounds: StepBounds, device: torch.device, into: Tensor | None = None) -> KernelStep:
        """One copy, to the buffer `into` where it is given."""
        return KernelStep(bounds, *upload(host_arrays(arrays), device, into))

    def known_tokens(self, state: DeviceState) -> Tensor:
        """int64 [T]: token ids, those filled in that an earlier step chose."""
        return torch.where(self.from_state, state.tokens.view(-1)[self.source], self.tokens)

    def rows(self) -> RaggedRows | None:
        """Prompt chunks and single tokens; None: there are none."""
        if not self.bounds.rows:
            return None
        return RaggedRows(
            page_table=self.row_pages,
            kv_len=self.row_kv_len,
            query_start=self.row_start,
            max_query_len=self.bounds.query_len,
            max_kv_len=self.bounds.kv_len,
            query_lens=self.query_lens,
        )

    def beams(self, state: DeviceState) -> BeamGroups | None:
        """The searches, with the lanes' parents as the state has them now; None: there are none."""
        bounds = self.bounds
        if not bounds.groups:
            return None
        parents = state.parents.index_select(0, self.beam_slots)[:, : bounds.steps, : bounds.lanes]
        return BeamGroups(
            page_table=self.beam_pages,
            prompt_len=self.beam_prompt_len,
            query_start=self.beam_start,
            width=self.beam_width,
            step=self.beam_step,
            own_slots=self.own_slots,
            parents=parents.contiguous(),
            max_prompt_len=bounds.kv_len,
        )


def _parts(batch: Batch) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of each kernel's, in the order that their tokens have on the device: prompts and chats, prompts with forks,
    beams."""
    linear = [row for row in batch.rows if row.beam is None]
    plain, forked = [row for row in linear if row.hidden is None], [row for row in linear if row.hidden is not None]
    return plain, forked, [row for row in batch.rows if row.beam is not None]


def query_lens(batch: Batch) -> frozenset[int]:
    """The numbers of new tokens of prompts and chats."""
    return frozenset(row.query_len for row in _parts(batch)[0])


def fork_rows(batch: Batch, device: torch.device) -> ForkRows | None:
    """The prompts of a step that have forks; None: there are none. Steps with one are in no captured graph."""
    if all(row.hidden is None for row in batch.rows):
        return None
    plain, rows, _ = _parts(batch)
    most, longest = max(row.query_len for row in rows), max(row.kv_len for row in rows)
    position = np.zeros((len(rows), most), np.int32)
    words = -(-longest // WORD_BITS)
    readable = np.zeros((len(rows), most, words), np.int32)
    for index, row in enumerate(rows):
        assert row.hidden is not None
        position[index, : row.query_len] = batch.positions[row.query_start : row.query_end]
        kept_at = np.arange(row.kv_len - row.query_len, row.kv_len)
        readable[index, : row.query_len] = packed_bits((np.arange(row.kv_len) <= kept_at[:, None]) & ~row.hidden, words)
    arrays = (
        _page_table(rows, len(rows), max(len(row.pages) for row in rows)),
        np.array([row.kv_len for row in rows], np.int32),
        sum(row.query_len for row in plain) + _starts(rows, len(rows))[:-1],
        np.array([row.query_len for row in rows], np.int32),
        position,
        readable,
    )
    return ForkRows(*upload(arrays, device))


def host_arrays(arrays: StepArrays) -> list[NDArray[np.generic]]:
    """The arrays in their order of upload."""
    return [getattr(arrays, field.name) for field in fields(arrays)]


def plan_step(batch: Batch, bounds: StepBounds, state: DeviceState) -> StepArrays:
    """The arrays of `batch` in the sizes of `bounds`, which must cover it. Outputs are in the batch's order of rows.

    Padding computes nothing that is kept: no page is written, rows and groups are empty, drawn tokens go to the spare
    slot. A padded output repeats the first one, so that no garbage is multiplied.
    """
    plain, forked, beams = _parts(batch)
    place = np.arange(len(batch.tokens))
    if forked or beams:
        _move(place, (*plain, *forked), 0)
        _move(place, beams, bounds.row_tokens)
    size = bounds.row_tokens + bounds.lane_tokens
    from_state, source = _sources(batch, state)
    first, outputs = output_tokens(batch)
    placed = place[outputs]
    padded = np.full(bounds.outputs, placed[0] if len(placed) else 0, np.int64)
    padded[: len(placed)] = placed
    sample_outputs, sample_target, temperature, top_k, top_p, seed, sample_index = _samples(
        batch, first, bounds.samples, state
    )
    return StepArrays(
        tokens=_spread(batch.tokens, place, size, 0, np.int64),
        from_state=_spread(from_state, place, size, 0, np.bool_),
        source=_spread(source, place, size, 0, np.int64),
        positions=_spread(batch.positions, place, size, 0, np.int32),
        slots=_spread(batch.slots, place, size, -1, np.int64),
        outputs=padded,
        row_pages=_page_table(plain, bounds.rows, bounds.pages),
        row_kv_len=_column([row.kv_len for row in plain], bounds.rows, 0, np.int32),
        row_start=_starts(plain, bounds.rows),
        beam_pages=_page_table(beams, bounds.groups, bounds.pages),
        beam_prompt_len=_column([row.kv_len for row in beams], bounds.groups, 0, np.int32),
        beam_start=_starts(beams, bounds.groups),
        beam_width=_column([row.query_len for row in beams], bounds.groups, 0, np.int32),
        beam_step=_column([beam_of(row).step - 1 for row in beams], bounds.groups, 0, np.int32),
        beam_slots=_column([row.state_slot for row in beams], bounds.groups, state.spare_slot, np.int64),
        own_slots=_own_slots(beams, bounds),
        sample_outputs=sample_outputs,
        sample_target=sample_target,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        sample_index=sample_index,
    )


def _move(place: Int64, rows: Sequence[Row], start: int) -> None:
    """Place the rows' tokens one row behind another."""
    for row in rows:
        place[row.query_start : row.query_end] = np.arange(start, start + row.query_len)
        start += row.query_len


def _sources(batch: Batch, state: DeviceState) -> tuple[NDArray[np.bool_], Int64]:
    """Which tokens an earlier step chose, and their entries of the state."""
    from_state = np.zeros(len(batch.tokens), np.bool_)
    source = np.zeros(len(batch.tokens), np.int64)
    columns = state.token_columns
    single = [row for row in batch.rows if row.token_from_state]
    if single:
        tokens = [row.query_start for row in single]
        source[tokens] = [row.state_slot * columns for row in single]
        from_state[tokens] = True
    for row in batch.rows:
        if row.beam is not None and isinstance(row.readout, SelectReadout):
            if row.query_len > state.lanes:
                raise ValueError(f"state slot {row.state_slot} has {row.query_len} lanes, at most {state.lanes} fit")
            part = slice(row.query_start, row.query_end)
            source[part] = row.state_slot * columns + 1 + np.arange(row.query_len)
            from_state[part] = True
    return from_state, source


def _samples(batch: Batch, first: Mapping[int, int], count: int, state: DeviceState) -> Draws:
    """The draws' settings; `first` as in `output_tokens`. Padding is greedy, and goes to the spare slot."""
    read = [(batch.rows[index], at) for index, at in first.items()]
    chosen = [(row, at, row.readout) for row, at in read if isinstance(row.readout, SampleReadout)]
    settings = [readout.sampling for _, _, readout in chosen]
    columns = state.token_columns
    seeds = np.array([sampling.seed % 2**64 for sampling in settings], np.uint64).view(np.int64)
    return (
        _column([at for _, at, _ in chosen], count, 0, np.int64),
        _column([row.state_slot * columns for row, _, _ in chosen], count, state.spare_slot * columns, np.int64),
        _column([0.0 if each.is_greedy else each.temperature for each in settings], count, 0, np.float32),
        _column([sampling.top_k for sampling in settings], count, 0, np.int32),
        _column([sampling.top_p for sampling in settings], count, 1, np.float32),
        _column(seeds.tolist(), count, 0, np.int64),
        _column([readout.index for _, _, readout in chosen], count, 0, np.int32),
    )


def _own_slots(rows: Sequence[Row], bounds: StepBounds) -> Int64:
    own = np.zeros((bounds.groups, bounds.steps, bounds.lanes), np.int64)
    for index, row in enumerate(rows):
        beam = beam_of(row)
        own[index, : beam.step, : row.query_len] = beam.own_slots[: beam.step]
    return own


def _page_table(rows: Sequence[Row], count: int, pages: int) -> Int32:
    """[count, pages]; the kernels read no entry past a row's own."""
    table = np.zeros((count, pages), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.pages)] = row.pages
    return table


def _starts(rows: Sequence[Row], count: int) -> Int32:
    """[count + 1]: prefix sums of the rows' tokens; padding rows are empty ones at the end."""
    starts = list(accumulate((row.query_len for row in rows), initial=0))
    return _column(starts, count + 1, starts[-1], np.int32)


def _spread(values: NDArray[np.generic], place: Int64, size: int, fill: int, dtype: type[_Scalar]) -> NDArray[_Scalar]:
    result: NDArray[_Scalar] = np.full(size, fill, dtype)
    result[place] = values
    return result


def _column(values: Sequence[float], count: int, fill: int, dtype: type[_Scalar]) -> NDArray[_Scalar]:
    result: NDArray[_Scalar] = np.full(count, fill, dtype)
    result[: len(values)] = values
    return result
