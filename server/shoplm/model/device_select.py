"""Selections on the GPU: the search of `readout.beam_search`, with its lanes in device memory.

A level is queued without waiting: the next step's tokens, ancestors and scores are read from device memory, where this
level's kernels put them. What crosses to the host is a finished selection's items and their model scores;
the terms beside the model's are added there again in double precision, so that a score is exactly their sum.

The cut of the last level is by the whole score: each request has a row of its items' other terms (`bonus`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.catalog.trie import TrieLevel
from shoplm.kernels.beam_step import beam_step
from shoplm.kernels.beam_step_types import MAX_SELECT, BeamSelection, TrieTables
from shoplm.model.device_filters import DeviceFilters, check_items
from shoplm.model.device_io import Readback, upload
from shoplm.model.device_state import DeviceState
from shoplm.readout.habits import Habits
from shoplm.readout.popular import popular
from shoplm.readout.select import SelectJob
from shoplm.readout.table import SelectTable
from shoplm.request import Select, SelectOutput
from torch import Tensor
from torch.nn import functional

MOST_LOGITS = 1 << 25  # of item codes at once, 128 MiB: as much again may be filters and terms of items, each
LEAST_CLASS = 16  # widths are rounded up to powers of two from here on: each compiles its own kernels

Finish = Callable[[NDArray[np.int32]], SelectOutput | None]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Search:
    """The host's part of a running search: what does not depend on the model."""

    select: Select
    forced: Integers  # item rows, each in a lane behind the beams
    width: int  # beams; at depth 1, where there are none, whether items are searched
    habits: Habits
    allowed: Tensor | None  # prefix sums on the device

    @property
    def lanes(self) -> int:
        return self.width + len(self.forced)


@dataclass(frozen=True, slots=True)
class _Beams:
    """The beam groups of one level, results included."""

    selection: BeamSelection
    model: Tensor  # fp32 [G, max_select]: the scores without the items' other terms


@dataclass(frozen=True, slots=True)
class _Forced:
    """The forced lanes of one level, lane after lane."""

    slots: Tensor  # int64 [n], state slots
    lanes: Tensor  # int64 [n]
    tokens: Tensor  # int64 [n]: ids of this level's codes
    scores: Tensor  # fp32 [n]: log p of the code so far


class DeviceSelector:
    """All selections over one table. The lanes are in `state`; here is only what the host knows without the model."""

    def __init__(self, table: SelectTable, state: DeviceState, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of the hidden states; the output rows are kept in it, products are summed in fp32."""
        self.table = table
        self._state = state
        self._device = device
        self._rows = [rows.to(device, dtype) for rows in table.output_rows]
        self._bias = [bias.to(device) for bias in table.output_bias]
        self._levels = [_tables(level, device) for level in table.trie.levels]
        self._filters = DeviceFilters(table.filters, table.trie.items, device)
        self._popularity = torch.tensor(table.popularity_terms).to(device)
        self._searches: dict[int, _Search] = {}

    def log_p(self, hidden: Tensor, items: Sequence[int]) -> Tensor:
        """As `Selector.log_p`, on the device."""
        trie = self.table.trie
        if trie.depth > 1:
            raise ValueError(f"items have codes of {trie.depth} tokens: one state does not tell their probability")
        check_items(tuple(items), trie.items)
        (wanted,) = upload([np.asarray(items, np.int64)], self._device)
        logits = product(hidden, self._rows[0]).add_(self._bias[0])
        return torch.log_softmax(logits[:, self._levels[0].child_code.long()], dim=-1)[:, wanted].contiguous()

    def launch(self, hidden: Tensor, jobs: Sequence[SelectJob], readback: Readback) -> list[Finish]:
        """Queue one level of selections that are all at it. `hidden` [rows, H] is what the jobs' rows index.

        Each `Finish` turns the step's results into the items where this was the last level, else into None.
        """
        by_model = [job for job in jobs if not job.select.popularity_only]
        parts = _parts(by_model, MOST_LOGITS // len(self._rows[jobs[0].level]))
        from_model = (finish for part in parts for finish in self._by_model(hidden, part, readback))
        return [self._popular(job.select) if job.select.popularity_only else next(from_model) for job in jobs]

    def _popular(self, select: Select) -> Finish:
        return lambda _: popular(self.table, select)

    def _by_model(self, hidden: Tensor, jobs: Sequence[SelectJob], readback: Readback) -> list[Finish]:
        level = jobs[0].level
        last = level == self.table.trie.depth - 1
        if level == 0:
            self._searches |= {job.state_slot: self._start(job.select) for job in jobs}
        searches = [self._search(job) for job in jobs]
        counts = [job.count for job in jobs]
        wanted = np.concatenate([np.arange(job.first, job.first + job.count) for job in jobs])
        [index] = upload([wanted], self._device)
        logits = product(hidden[index], self._rows[level]).add_(self._bias[level])
        first_rows = np.cumsum([0, *counts[:-1]])
        groups = [at for at, search in enumerate(searches) if search.width]
        lanes = [at for at, search in enumerate(searches) if len(search.forced)]
        beams = forced = None
        # The forced lanes' scores are read before the beams' survivors are stored, and stored behind them.
        if lanes:
            forced = self._forced(logits, [(jobs[at], searches[at], int(first_rows[at])) for at in lanes], level)
        if groups:
            beams = self._beams(logits, [(jobs[at], searches[at], int(first_rows[at])) for at in groups], level, last)
        if not last and forced is not None:
            self._keep_forced(forced, level)
        if not last:
            return [lambda _: None for _ in jobs]
        for job in jobs:
            self._searches.pop(job.state_slot, None)
        return self._finishers(searches, groups, lanes, beams, forced, readback)

    def _start(self, select: Select) -> _Search:
        table = self.table
        for rows in (select.own_items, select.candidates or ()):
            check_items(rows, table.trie.items)
        width = table.width(select)
        habits = table.habits_of(select)
        forced = table.forced_items(select, habits)
        if table.trie.depth == 1 and select.candidates is None:
            width, forced = 1, forced[:0]  # every item is scored: none has to ride along
        if max(width, select.count) > MAX_SELECT and width:
            raise ValueError(f"{width} beams and {select.count} items: at most {MAX_SELECT} of each can be selected")
        return _Search(select, forced, width, habits, self._filters.prefix(select) if width else None)

    def _search(self, job: SelectJob) -> _Search:
        search = self._searches.get(job.state_slot)
        if search is None:
            raise ValueError(f"state slot {job.state_slot} has no search to go on with; level 0 starts one")
        if job.level and job.count != search.lanes:
            raise ValueError(f"state slot {job.state_slot}: {job.count} rows for a search of {search.lanes} lanes")
        return search

    # ---- beams ---------------------------------------------------------------------------------------------------

    def _beams(
        self, logits: Tensor, groups: Sequence[tuple[SelectJob, _Search, int]], level: int, last: bool
    ) -> _Beams:
        """Queue the level's beam step; unless it is the last, its survivors become the lanes of their slots."""
        state = self._state
        searches = [search for _, search, _ in groups]
        keep = [search.select.count if last else search.width for search in searches]
        # The last level keeps fewer: its kernels are still those of the search's width, not others for each count.
        most = max(*keep, *(search.width for search in searches))
        allowed, filter_rows = _stack([search.allowed for search in searches], self.table.trie.items, self._device)
        first_row, select, filter_row, bonus_row, slots = upload(
            [
                np.array([row for _, _, row in groups], np.int32),
                np.array(keep, np.int32),
                filter_rows,
                _bonus_rows(searches),
                np.array([job.state_slot for job, _, _ in groups], np.int64),
            ],
            self._device,
        )
        if level:
            live = min(_width_class(max(search.width for search in searches)), state.lanes)
            nodes = state.nodes.index_select(0, slots)[:, :live]
            scores = state.scores.index_select(0, slots)[:, :live]
            width = state.width.index_select(0, slots)
        else:
            nodes = torch.zeros(len(groups), 1, dtype=torch.int32, device=self._device)
            scores = torch.zeros(len(groups), 1, device=self._device)
            width = torch.ones(len(groups), dtype=torch.int32, device=self._device)
        bonus = self._bonus(searches) if last else None
        selection = beam_step(
            logits,
            first_row,
            self._levels[level],
            nodes,
            scores,
            width,
            select,
            max_select=_width_class(most),
            allowed_cumsum=allowed,
            filter_row=None if allowed is None else filter_row,
            bonus=bonus,
            bonus_row=None if bonus is None else bonus_row,
        )
        model = selection.scores
        if bonus is not None:
            model = model - bonus[bonus_row[:, None], selection.nodes]
        if not last:
            self._keep(selection, slots, level)
        return _Beams(selection, model)

    def _keep(self, selection: BeamSelection, slots: Tensor, level: int) -> None:
        """Survivors become the first lanes. Places behind a narrower search's beams are overwritten by its forced
        lanes, which come later."""
        state = self._state
        places = min(selection.nodes.shape[1], state.lanes)
        codes = selection.codes[:, :places].long() + self.table.token_starts[level]
        state.nodes[:, :places].index_copy_(0, slots, selection.nodes[:, :places])
        state.scores[:, :places].index_copy_(0, slots, selection.scores[:, :places])
        state.tokens[:, 1 : 1 + places].index_copy_(0, slots, codes)
        state.width.index_copy_(0, slots, selection.width)
        if level:
            state.parents[:, level, :places].index_copy_(0, slots, selection.parents[:, :places])

    def _bonus(self, searches: Sequence[_Search]) -> Tensor:
        """fp32 [1 + customers with items of their own, items]: popularity terms, and those of each one's habits."""
        owners = [search.habits.flat for search in searches if len(search.habits.items)]
        bonus = self._popularity.expand(1 + len(owners), -1).contiguous()
        if owners:
            items = self.table.trie.items
            flat = np.concatenate([(1 + at) * items + own for at, (own, _) in enumerate(owners)])
            index, terms = upload([flat, np.concatenate([terms for _, terms in owners])], self._device)
            bonus.view(-1).index_add_(0, index, terms)  # an item is listed once: no two additions meet
        return bonus

    # ---- forced lanes ----------------------------------------------------------------------------------------------

    def _forced(self, logits: Tensor, groups: Sequence[tuple[SelectJob, _Search, int]], level: int) -> _Forced:
        """Queue log p of each forced lane's code so far. Their codes are known to the host."""
        trie, state = self.table.trie, self._state
        items = np.concatenate([search.forced for _, search, _ in groups])
        sizes = np.array([len(search.forced) for _, search, _ in groups])
        group = np.repeat(np.arange(len(groups)), sizes)
        lane = np.concatenate([np.arange(search.width, search.lanes) for _, search, _ in groups])
        slot = np.array([job.state_slot for job, _, _ in groups], np.int64)[group]
        nodes = trie.nodes_of_items[level][items].astype(np.int64)
        codes = trie.levels[level].child_code[nodes].astype(np.int64)
        first_rows = np.array([row for _, _, row in groups], np.int64)
        if level:
            rows, sources = first_rows[group] + lane, np.arange(len(items))
            parents = trie.nodes_of_items[level - 1][items].astype(np.int64)
        else:  # all lanes of a request start from its one row
            rows, sources, parents = first_rows, group, np.zeros(len(groups), np.int64)
        arrays = [rows, sources, parents, codes, slot, lane, codes + self.table.token_starts[level]]
        row, source, parent, code, slots, lanes, tokens = upload(
            [array.astype(np.int64) for array in arrays], self._device
        )
        normaliser = _log_sum_exp(logits, row, parent, self._levels[level])
        scores = logits[row[source], code] - normaliser[source]
        if level:
            scores = scores + state.scores[slots, lanes]
        return _Forced(slots, lanes, tokens, scores)

    def _keep_forced(self, forced: _Forced, level: int) -> None:
        """Each forced lane goes on from itself."""
        state = self._state
        state.scores[forced.slots, forced.lanes] = forced.scores
        state.tokens[forced.slots, forced.lanes + 1] = forced.tokens
        if level:
            state.parents[forced.slots, level, forced.lanes] = forced.lanes.int()

    # ---- results ---------------------------------------------------------------------------------------------------

    def _finishers(
        self,
        searches: Sequence[_Search],
        groups: Sequence[int],
        lanes: Sequence[int],
        beams: _Beams | None,
        forced: _Forced | None,
        readback: Readback,
    ) -> list[Finish]:
        """How each selection is read from the step's results."""
        nothing = slice(0, 0)
        found = dict.fromkeys(range(len(searches)), (nothing, nothing, nothing))
        if beams is not None:
            columns = beams.selection.nodes.shape[1]
            parts = [readback.add(part) for part in (beams.selection.nodes, beams.model, beams.selection.width)]
            for group, at in enumerate(groups):
                items, model = (_row(part, group, columns) for part in parts[:2])
                found[at] = (items, model, _row(parts[2], group, 1))
        own = dict.fromkeys(range(len(searches)), nothing)
        if forced is not None:
            start = readback.add(forced.scores).start
            for at in lanes:
                own[at] = slice(start, start + len(searches[at].forced))
                start = own[at].stop
        return [self._finisher(search, *found[at], own[at]) for at, search in enumerate(searches)]

    def _finisher(self, search: _Search, items: slice, model: slice, width: slice, own: slice) -> Finish:
        def finish(results: NDArray[np.int32]) -> SelectOutput:
            live = int(results[width].sum())
            return self._answer(
                search,
                results[items][:live].astype(np.int64),
                results[model].view(np.float32)[:live],
                results[own].view(np.float32),
            )

        return finish

    def _answer(
        self, search: _Search, found: Integers, found_model: NDArray[np.float32], forced_model: NDArray[np.float32]
    ) -> SelectOutput:
        """The best of what the beams found and the forced lanes, by the whole score."""
        select, table = search.select, self.table
        passes = table.filters.allowed(select.item_filter).mask[search.forced]
        passes &= ~np.isin(search.forced, np.asarray(select.exclude_items, np.int64))
        items, index = np.unique(np.concatenate((found, search.forced[passes])), return_index=True)
        model = np.concatenate((found_model, forced_model[passes]))[index]
        return table.best(items, model, search.habits, select.count)


def _parts(jobs: Sequence[SelectJob], most_rows: int) -> Iterator[list[SelectJob]]:
    """The jobs in order, in parts of at most so many rows; a job that has more is one of its own."""
    part: list[SelectJob] = []
    rows = 0
    for job in jobs:
        if part and rows + job.count > most_rows:
            yield part
            part, rows = [], 0
        part.append(job)
        rows += job.count
    if part:
        yield part


def product(hidden: Tensor, rows: Tensor) -> Tensor:
    """`hidden` [n, H] times `rows` [codes, H] transposed: fp32, also from bf16 operands (rounding to bf16 would make
    equals of scores that differ by less than one in 256)."""
    if hidden.dtype == torch.float32:
        return functional.linear(hidden, rows)
    if hidden.device.type == "cuda":
        return torch.mm(hidden, rows.t(), out_dtype=torch.float32)
    return functional.linear(hidden.float(), rows.float())


def _tables(level: TrieLevel, device: torch.device) -> TrieTables:
    arrays = (level.child_start, level.child_code, level.item_lo, level.item_hi)
    return TrieTables.build(*(torch.tensor(array).to(device) for array in arrays))


def _width_class(width: int) -> int:
    return max(LEAST_CLASS, 1 << (width - 1).bit_length())


def _row(part: slice, row: int, columns: int) -> slice:
    return slice(part.start + row * columns, part.start + (row + 1) * columns)


def _bonus_rows(searches: Sequence[_Search]) -> NDArray[np.int32]:
    """Row 0 is popularity alone; each customer with items of their own has the next."""
    owns = np.array([len(search.habits.items) > 0 for search in searches])
    return np.where(owns, np.cumsum(owns), 0).astype(np.int32)


def _stack(
    prefixes: Sequence[Tensor | None], items: int, device: torch.device
) -> tuple[Tensor | None, NDArray[np.int32]]:
    """Distinct filters [filters, items + 1], and each group's row; None where nobody filters."""
    if all(prefix is None for prefix in prefixes):
        return None, np.zeros(len(prefixes), np.int32)
    rows: dict[int, int] = {}
    tensors: list[Tensor] = []
    index = []
    for prefix in prefixes:
        key = id(prefix)
        if key not in rows:
            rows[key] = len(tensors)
            tensors.append(torch.arange(items + 1, dtype=torch.int32, device=device) if prefix is None else prefix)
        index.append(rows[key])
    return torch.stack(tensors), np.array(index, np.int32)


def _log_sum_exp(logits: Tensor, row: Tensor, node: Tensor, level: TrieTables) -> Tensor:
    """fp32 [n]: of the children of `node` [n], whose logits are in `row` [n]."""
    if len(level.child_start) == 2:  # one node: no table of children for each row, of which there may be a million
        return logits[row].index_select(1, level.child_code).logsumexp(1)
    start, end = level.child_start[node].long(), level.child_start[node + 1].long()
    child = start[:, None] + torch.arange(level.max_children, device=logits.device)
    inside = child < end[:, None]
    codes = level.child_code[child.clamp(max=len(level.child_code) - 1)].long()
    return logits[row[:, None], codes].masked_fill(~inside, -torch.inf).logsumexp(1)
