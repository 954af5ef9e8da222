"""What one step's attention reads: index tensors and masks, made once and used by every layer.

Four forms:

- *span*: a longer part of one prompt. Keys are the part's own where nothing came before it, else gathered once.
- *padded*: short rows (single chat tokens, task suffixes) of about the same length, gathered and multiplied together.
- *forked*: the forks of an explanation, a padded row with a mask of its own.
- *lanes*: the beams of requests. All lanes of a request are rows of one product over its prompt, which is gathered
  once; each lane's own codes, found through its ancestors, are further keys of the same softmax.

Padding repeats a slot that the row itself wrote, so a mask never meets what unused slots hold (it could be NaN, which
no mask removes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import Batch, Row, beam_of
from shoplm.model.kv_pool import KVPool
from torch import Tensor

PADDED_TOKENS = 16  # rows of at most so many new tokens are padded together
GATHER_TOKENS = 32768  # keys that a padded group gathers at most: bounds scratch memory, keeps it in the cache

_FirstKey = Callable[[Row], int]


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens `start` .. `end` - 1 of one row; `past` readable keys lie before the first of them."""

    start: int
    end: int
    past: int
    rows: Tensor | None  # pool rows [kv_heads * (past + end - start)]; None: nothing lies before


@dataclass(frozen=True, slots=True)
class Padded:
    """B rows of up to Q new tokens over up to L keys."""

    queries: Tensor | slice  # tokens [B * Q]; padding repeats a row's last token
    targets: Tensor | slice  # tokens that the kept outputs belong to
    kept: Tensor | None  # outputs [B * Q] that are not padding; None: all
    rows: Tensor  # pool rows [B * kv_heads * L]
    shape: tuple[int, int, int]  # B, Q, L
    mask: Tensor | None  # additive [B, 1, Q * group, L]; None: everything is visible
    own_rows: Tensor | None = None  # lanes: pool rows [B * Q * kv_heads * S] of each lane's own codes
    own_steps: int = 0  # S


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one step's attention reads, for one sliding window."""

    window: int | None
    spans: tuple[Span, ...]
    padded: tuple[Padded, ...]


def plan_attention(
    batch: Batch,
    lineages: Mapping[int, NDArray[np.int64]],
    pool: KVPool,
    *,
    window: int | None,
    group: int,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Index tensors for `batch`. `lineages` gives, by state slot of a beam row, [step, lanes]: the lane at each earlier
    step that a lane descends from, its own index last. `group` is query heads per key-value head.
    """
    planner = _Planner(pool, window, group, dtype)
    spans, short, lanes, forked = [], [], [], []
    for row in batch.rows:
        if row.beam is not None:
            lanes.append(row)
        elif row.hidden is not None:
            forked.append(row)
        elif row.query_len > PADDED_TOKENS or row.kv_len == row.query_len > 1:
            spans.append(planner.span(row))
        else:
            short.append(row)
    padded = [planner.padded(rows) for rows in _buckets(short, planner.first_key)]
    padded += [planner.forked(row, batch) for row in forked]
    padded += [planner.lanes(rows, lineages) for rows in _buckets(lanes, planner.first_key)]
    return AttentionPlan(window, tuple(spans), tuple(padded))


class _Planner:
    def __init__(self, pool: KVPool, window: int | None, group: int, dtype: torch.dtype) -> None:
        self._pool = pool
        self._window = window
        self._group = group
        self._dtype = dtype

    def first_key(self, row: Row) -> int:
        """The first position that the row's first query sees."""
        if self._window is None:
            return 0
        first_query = row.kv_len - row.query_len if row.beam is None else row.kv_len + row.beam.step - 1
        return min(max(0, first_query - self._window + 1), row.kv_len - 1)

    def span(self, row: Row) -> Span:
        past = row.kv_len - row.query_len
        if past == 0:
            return Span(row.query_start, row.query_end, 0, None)
        first = self.first_key(row)
        slots = self._slots(row, np.arange(first, row.kv_len))
        return Span(row.query_start, row.query_end, past - first, self._pool.head_major(torch.from_numpy(slots)[None]))

    def padded(self, rows: Sequence[Row]) -> Padded:
        counts = np.array([row.query_len for row in rows])
        starts = np.array([row.query_start for row in rows])
        ends = np.array([row.kv_len for row in rows])
        first = np.array([self.first_key(row) for row in rows])
        width, length = int(counts.max()), int((ends - first).max())
        position = (ends - counts)[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
        queries = starts[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
        real = np.arange(width) < counts[:, None]
        keys = first[:, None] + np.arange(length)
        visible = keys[:, None, :] <= position[:, :, None]
        if self._window is not None:
            visible &= keys[:, None, :] > position[:, :, None] - self._window
        targets = queries.reshape(-1) if real.all() else queries[real]
        return Padded(
            queries=_indices(queries.reshape(-1)),
            targets=_indices(targets),
            kept=None if real.all() else torch.from_numpy(np.flatnonzero(real)),
            rows=self._gather_rows(rows, keys, ends),
            shape=(len(rows), width, length),
            mask=self._mask(visible),
        )

    def forked(self, row: Row, batch: Batch) -> Padded:
        """Forks of one prompt. Their tokens are at other positions than where they are kept; a window goes by the
        former."""
        assert row.hidden is not None
        keys = np.arange(row.kv_len)
        kept_at = np.arange(row.kv_len - row.query_len, row.kv_len)[:, None]
        visible = (keys <= kept_at) & ~row.hidden
        if self._window is not None:
            position = batch.positions[row.query_start : row.query_end, None]
            visible &= keys > position - self._window
        tokens = slice(row.query_start, row.query_end)
        return Padded(
            queries=tokens,
            targets=tokens,
            kept=None,
            rows=self._gather_rows([row], keys[None], np.array([row.kv_len])),
            shape=(1, row.query_len, row.kv_len),
            mask=self._mask(visible[None]),
        )

    def lanes(self, rows: Sequence[Row], lineages: Mapping[int, NDArray[np.int64]]) -> Padded:
        ends = np.array([row.kv_len for row in rows])
        first = np.array([self.first_key(row) for row in rows])
        steps, width, length = beam_of(rows[0]).step, rows[0].query_len, int((ends - first).max())
        keys = first[:, None] + np.arange(length)
        position = (ends + steps - 1)[:, None, None]
        visible = keys[:, None, :] < ends[:, None, None]
        own = steps
        if self._window is not None:
            visible = visible & (keys[:, None, :] > position - self._window)
            own = min(own, self._window)
        visible = np.broadcast_to(visible, (len(rows), width, length))
        queries = np.concatenate([np.arange(row.query_start, row.query_end) for row in rows])
        slots = np.stack([own_slots(row, lineages[row.state_slot])[:, steps - own :] for row in rows])
        return Padded(
            queries=_indices(queries),
            targets=_indices(queries),
            kept=None,
            rows=self._gather_rows(rows, keys, ends),
            shape=(len(rows), width, length),
            mask=self._mask(visible),
            own_rows=self._pool.head_major(torch.from_numpy(slots.reshape(-1, own))),
            own_steps=own,
        )

    def _gather_rows(self, rows: Sequence[Row], keys: NDArray[np.int64], ends: NDArray[np.int64]) -> Tensor:
        inside = np.minimum(keys, ends[:, None] - 1)
        slots = np.stack([self._slots(row, positions) for row, positions in zip(rows, inside, strict=True)])
        return self._pool.head_major(torch.from_numpy(slots))

    def _slots(self, row: Row, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        size = self._pool.page_size
        result: NDArray[np.int64] = row.pages[positions // size].astype(np.int64) * size + positions % size
        return result

    def _mask(self, visible: NDArray[np.bool_]) -> Tensor | None:
        if visible.all():
            return None
        mask = torch.zeros(visible.shape, dtype=self._dtype)
        mask.masked_fill_(torch.from_numpy(~visible), -torch.inf)
        return mask.repeat_interleave(self._group, dim=1)[:, None]


def _buckets(rows: Sequence[Row], first_key: _FirstKey) -> list[list[Row]]:
    """Rows that are padded together: of like new tokens and keys. Lanes only with the same step and width."""

    def kind(row: Row) -> tuple[int, int]:
        if row.beam is not None:
            return row.beam.step, row.query_len
        return 0, (row.query_len - 1).bit_length()

    buckets: list[list[Row]] = []
    shortest = 0
    for row in sorted(rows, key=lambda row: (kind(row), row.kv_len - first_key(row), row.query_start)):
        keys = row.kv_len - first_key(row)
        fits = (
            buckets
            and kind(buckets[-1][0]) == kind(row)
            and keys <= shortest + shortest // 4 + 32
            and (len(buckets[-1]) + 1) * keys <= GATHER_TOKENS
        )
        if fits:
            buckets[-1].append(row)
        else:
            buckets.append([row])
            shortest = keys
    return [sorted(bucket, key=lambda row: row.query_start) for bucket in buckets]


def own_slots(row: Row, lineage: NDArray[np.int64]) -> NDArray[np.int64]:
    """[lanes, step]: the pool slot of each code on each lane's way to its own."""
    beam = beam_of(row)
    if lineage.shape != (beam.step, row.query_len):
        raise ValueError(
            f"row of state slot {row.state_slot}: step {beam.step} of {row.query_len} lanes does not continue the "
            f"search there, which has {lineage.shape[0]} codes in {lineage.shape[1]} lanes"
        )
    return np.take_along_axis(beam.own_slots[: beam.step], lineage, axis=1).T


def _indices(values: NDArray[np.int64]) -> Tensor | slice:
    """A slice where the values are consecutive: it needs no copy."""
    first = int(values[0])
    if np.array_equal(values, np.arange(first, first + len(values))):
        return slice(first, first + len(values))
    return torch.from_numpy(np.ascontiguousarray(values))
