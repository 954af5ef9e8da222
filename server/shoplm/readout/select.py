"""Selecting items: the best of a trie, or the scores of given ones.

score = log p_model + popularity_weight * log popularity + what the customer's own purchases say (`readout.habits`:
bought again, or goes with what was bought), natural logs. log p_model is a sum over the trie's levels of log-softmax
over the children that exist; filters come after it, so a score does not depend on the filter. Equal scores are ordered
by item row.

With codes of one token, the last hidden state of the prompt scores all items at once. With longer codes it is a beam
search; the own items that are likeliest to be bought again, and those that go best with the own ones, ride along in
lanes of their own, so that the search cannot lose them before their terms are added, and given candidates are such
lanes alone. The last level is cut by the whole score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.readout.beam_search import Children, Search, extend, finish, log_softmax
from shoplm.readout.popular import popular
from shoplm.readout.ranking import best
from shoplm.readout.table import SelectTable
from shoplm.request import Select, SelectOutput
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class SelectJob:
    """A selection's part of a step."""

    state_slot: int
    select: Select
    level: int
    first: int  # of its rows of the hidden states: one at level 0, then one per lane
    count: int


class Selector:
    """All selections over one table. Keeps the searches of running requests by state slot."""

    def __init__(self, table: SelectTable) -> None:
        self.table = table
        self._searches: dict[int, Search] = {}

    def lanes(self, select: Select) -> int:
        """Rows of this selection's beam steps; 0 for codes of one token, which need none."""
        if self.table.trie.depth == 1:
            return 0
        return self.table.width(select) + len(self.table.forced_items(select))

    def lineage(self, state_slot: int) -> NDArray[np.int64]:
        """[step, lanes]: the lane of each step that a lane descends from; the last row is the lane itself."""
        return self._search(state_slot).lineage

    def tokens(self, state_slot: int) -> NDArray[np.int64]:
        """[lanes]: ids of the code tokens chosen last."""
        search = self._search(state_slot)
        level = search.level - 1
        codes = self.table.trie.levels[level].child_code[search.nodes].astype(np.int64)
        return codes + self.table.token_starts[level]

    def log_p(self, hidden: Tensor, items: Sequence[int]) -> Tensor:
        """fp32 [rows, items]: the model's log-probability of each item, by each row of `hidden` [rows, H]. Raises
        ValueError for codes of several tokens: their later ones are behind other states."""
        trie = self.table.trie
        if trie.depth > 1:
            raise ValueError(f"items have codes of {trie.depth} tokens: one state does not tell their probability")
        scores = torch.log_softmax(self._flat_logits(hidden), dim=-1)
        return scores[:, torch.tensor(items, dtype=torch.long)]

    def _flat_logits(self, hidden: Tensor) -> Tensor:
        """fp32 [rows, items]; codes of one token."""
        table = self.table
        logits = functional.linear(hidden.float(), table.output_rows[0], table.output_bias[0])
        codes = table.trie.levels[0].child_code
        if len(codes) != logits.shape[1]:  # some codes have no item
            logits = logits[:, torch.from_numpy(codes.astype(np.int64))]
        return logits

    def step(self, hidden: Tensor, jobs: Sequence[SelectJob]) -> list[SelectOutput | None]:
        """Advance selections that are all at one level. `hidden` [rows, H] is what the jobs' rows index.

        The items where this was the last level, else None.
        """
        by_model = [job for job in jobs if not job.select.popularity_only]
        from_model = iter(self._by_model(hidden, by_model) if by_model else ())
        return [popular(self.table, job.select) if job.select.popularity_only else next(from_model) for job in jobs]

    def _by_model(self, hidden: Tensor, jobs: Sequence[SelectJob]) -> list[SelectOutput | None]:
        table, level = self.table, jobs[0].level
        wanted = torch.from_numpy(np.concatenate([np.arange(job.first, job.first + job.count) for job in jobs]))
        if table.trie.depth == 1:
            return list(self._flat(self._flat_logits(hidden[wanted]), jobs))
        logits = functional.linear(hidden[wanted].float(), table.output_rows[level], table.output_bias[level])
        if level == 0:
            for job in jobs:
                self._searches[job.state_slot] = Search.start(table, job.select)
        return self._advance(logits.numpy(), level, jobs)

    def _flat(self, logits: Tensor, jobs: Sequence[SelectJob]) -> list[SelectOutput]:
        """Codes of one token: all items are scored, for all jobs in one product."""
        table = self.table
        model = torch.log_softmax(logits, dim=-1).numpy()
        scores = model + table.popularity_terms
        outputs = []
        for job, job_model, job_scores in zip(jobs, model, scores, strict=True):
            select = job.select
            habits = table.habits_of(select)
            allowed = table.filters.allowed(select.item_filter, select.exclude_items).mask
            if select.candidates is not None:
                given = np.unique(np.asarray(select.candidates, np.int64))
                items = given[allowed[given]]
            else:
                habits.add_to(job_scores)
                job_scores[~allowed] = -np.inf
                items = best(job_scores, select.count)  # before all terms are looked up: of these few alone
            outputs.append(table.best(items, job_model[items], habits, select.count))
        return outputs

    def _advance(self, logits: NDArray[np.float32], level: int, jobs: Sequence[SelectJob]) -> list[SelectOutput | None]:
        """One level of all searches: scores of all lanes' children at once, then each search picks its own."""
        trie = self.table.trie
        searches = [self._search(job.state_slot) for job in jobs]
        nodes = np.concatenate([search.nodes for search in searches])
        scores = np.concatenate([search.scores for search in searches])
        live = np.flatnonzero(np.concatenate([search.live for search in searches]))
        found = trie.candidates(level, nodes[live])
        total = log_softmax(logits[live], found, trie.levels[level].child_code) + scores[live][found.source]
        counts = np.zeros(len(nodes), np.int64)
        counts[live] = np.diff(found.begin)
        begin = np.concatenate(([0], np.cumsum(counts)))
        outputs: list[SelectOutput | None] = []
        first = 0
        for job, search in zip(jobs, searches, strict=True):
            last = first + len(search.nodes)
            children = Children(begin[first : last + 1], found.child, total)
            first = last
            if level == trie.depth - 1:
                outputs.append(finish(self.table, search, children))
                del self._searches[job.state_slot]
            else:
                self._searches[job.state_slot] = extend(self.table, search, children)
                outputs.append(None)
        return outputs

    def _search(self, state_slot: int) -> Search:
        search = self._searches.get(state_slot)
        if search is None:
            raise ValueError(f"state slot {state_slot} has no search to go on with; level 0 starts one")
        return search
