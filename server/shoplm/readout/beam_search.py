"""One request's trie-constrained beam search: the lanes between two steps, and the choice of the next.

Beams are the first lanes; forced lanes, which follow the code of a given item, come behind them. A beam that finds no
child is dead: its lane keeps its place, so that the shape of the step does not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.catalog.filters import AllowedItems
from shoplm.catalog.trie import Candidates
from shoplm.readout.habits import Habits
from shoplm.readout.ranking import best
from shoplm.readout.table import SelectTable
from shoplm.request import Select, SelectOutput

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Children:
    """The children of a request's lanes at one level (at level 0, of the root alone), lane after lane."""

    begin: Integers  # [lanes + 1]: where each lane's children start in the flat arrays
    child: Integers  # nodes of the next level
    score: Floats  # log p of the code so far


@dataclass(frozen=True)
class Search:
    """A request's lanes after some levels."""

    select: Select
    allowed: AllowedItems
    habits: Habits
    forced: Integers  # item rows
    width: int
    nodes: Integers  # [lanes], of the level chosen last; one entry, the root, before the first
    scores: Floats  # [lanes], log p
    live: NDArray[np.bool_]  # [lanes]
    lineage: Integers  # [steps, lanes]: the lane of each step that a lane descends from; the last row is itself

    @staticmethod
    def start(table: SelectTable, select: Select) -> Search:
        """Before the first level: the root is the only lane."""
        habits = table.habits_of(select)
        return Search(
            select=select,
            allowed=table.filters.allowed(select.item_filter, select.exclude_items),
            habits=habits,
            forced=table.forced_items(select, habits),
            width=table.width(select),
            nodes=np.zeros(1, np.int64),
            scores=np.zeros(1, np.float32),
            live=np.ones(1, np.bool_),
            lineage=np.zeros((0, 1), np.int64),
        )

    @property
    def level(self) -> int:
        """Codes chosen so far, which is also the level that the nodes are of."""
        return len(self.lineage)

    @property
    def beams(self) -> int:
        """Leading entries of `nodes` whose children the beams choose from."""
        return min(self.width, len(self.nodes))


def log_softmax(logits: Floats, children: Candidates, codes: NDArray[np.int32]) -> Floats:
    """log p of each candidate among its node's children: `logits` [nodes, codes], one or more children per node."""
    values = logits[children.source, codes[children.child]].astype(np.float64)
    begin = children.begin[:-1]
    values -= np.maximum.reduceat(values, begin)[children.source]
    values -= np.log(np.add.reduceat(np.exp(values), begin))[children.source]
    return values.astype(np.float32)


def extend(table: SelectTable, search: Search, children: Children) -> Search:
    """Choose the next lanes. Filters bar nodes without an allowed item; equal scores go to the lower node."""
    level = table.trie.levels[search.level]
    reach = slice(children.begin[0], children.begin[search.beams])
    order = np.argsort(children.child[reach])
    nodes, scores = children.child[reach][order], children.score[reach][order]
    open_nodes = search.allowed.any_between(level.item_lo[nodes], level.item_hi[nodes])
    chosen = best(np.where(open_nodes, scores, np.float32(-np.inf)), search.width)
    parents = np.searchsorted(children.begin, children.begin[0] + order[chosen], "right") - 1
    forced_nodes, forced_scores = _follow(table, search, children)
    dead = search.width - len(chosen)
    lanes = search.width + len(search.forced)
    if search.level:
        forced_parents = np.arange(search.width, lanes)
        parents = np.concatenate((parents, np.zeros(dead, np.int64), forced_parents))
        lineage = np.concatenate((search.lineage[:, parents], np.arange(lanes)[None]))
    else:
        lineage = np.arange(lanes)[None]
    return Search(
        select=search.select,
        allowed=search.allowed,
        habits=search.habits,
        forced=search.forced,
        width=search.width,
        nodes=np.concatenate((nodes[chosen], np.zeros(dead, np.int64), forced_nodes)),
        scores=np.concatenate((scores[chosen], np.full(dead, -np.inf, np.float32), forced_scores)),
        live=np.concatenate(
            (np.ones(len(chosen), np.bool_), np.zeros(dead, np.bool_), np.ones(len(forced_nodes), bool))
        ),
        lineage=lineage,
    )


def finish(table: SelectTable, search: Search, children: Children) -> SelectOutput:
    """The items, at the last level: all that a beam reaches and the forced ones, by the whole score."""
    reach = slice(children.begin[0], children.begin[search.beams])
    _, forced_scores = _follow(table, search, children)
    items, index = np.unique(np.concatenate((children.child[reach], search.forced)), return_index=True)
    model = np.concatenate((children.score[reach], forced_scores))[index]
    passes = search.allowed.mask[items]
    return table.best(items[passes], model[passes], search.habits, search.select.count)


def _follow(table: SelectTable, search: Search, children: Children) -> tuple[Integers, Floats]:
    """The next nodes of the forced lanes, and their scores."""
    nodes = table.trie.nodes_of_items[search.level][search.forced].astype(np.int64)
    lanes = np.arange(search.width, search.width + len(nodes)) if search.level else np.zeros(len(nodes), np.int64)
    first_child = table.trie.levels[search.level].child_start[search.nodes[lanes]]
    return nodes, children.score[children.begin[lanes] + nodes - first_child]
