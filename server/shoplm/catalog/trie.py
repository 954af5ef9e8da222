"""The trie of item codes, level by level in compressed sparse rows.

Items are sorted lexicographically by code, so the items below a node are one range of rows, a node's children are one
range of nodes, and the nodes behind the last level are the items themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TrieLevel:
    """Edges from the nodes of one level to those of the next."""

    child_start: NDArray[np.int32]  # [nodes + 1]: children of node n are child_start[n] .. child_start[n + 1] - 1
    child_code: NDArray[np.int32]  # [children]: row of the child in the level's output rows
    item_lo: NDArray[np.int32]  # [children]: first item row below the child
    item_hi: NDArray[np.int32]  # [children]: one past the last


@dataclass(frozen=True)
class Candidates:
    """All children of some nodes, in one flat axis: first those of the first node."""

    begin: NDArray[np.int64]  # [nodes + 1]: where each node's children start in the flat axis
    source: NDArray[np.int64]  # [total]: index into the nodes asked for
    child: NDArray[np.int64]  # [total]: node of the next level


@dataclass(frozen=True)
class Trie:
    """Codes [items, depth] and the levels made from them. The root is node 0 of level 0."""

    codes: NDArray[np.int32]
    level_sizes: tuple[int, ...]  # codes that exist per level, used or not
    levels: tuple[TrieLevel, ...]

    @property
    def items(self) -> int:
        return len(self.codes)

    @property
    def depth(self) -> int:
        return len(self.levels)

    @staticmethod
    def from_codes(codes: NDArray[np.int32], level_sizes: tuple[int, ...] | None = None) -> Trie:
        """Build the trie of `codes` [items, depth], which must be sorted, distinct and at least 0.

        `level_sizes` defaults to one past the largest code of each level. Raises ValueError naming the item row.
        """
        if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] < 1:
            raise ValueError(f"codes has shape {codes.shape}, expected [items, depth] with at least one of each")
        sizes = level_sizes if level_sizes is not None else tuple(int(size) + 1 for size in codes.max(axis=0))
        if len(sizes) != codes.shape[1]:
            raise ValueError(f"{len(sizes)} level sizes for codes of depth {codes.shape[1]}")
        wrong = np.flatnonzero(((codes < 0) | (codes >= np.asarray(sizes))).any(axis=1))
        if len(wrong):
            raise ValueError(f"item row {wrong[0]}: code {codes[wrong[0]].tolist()} outside the level sizes {sizes}")
        _check_sorted(codes)
        levels = []
        parents = np.zeros(len(codes), np.int64)  # node of each item at the level
        for level in range(codes.shape[1]):
            first = np.ones(len(codes), np.bool_)
            first[1:] = (codes[1:, : level + 1] != codes[:-1, : level + 1]).any(axis=1)
            item_lo = np.flatnonzero(first)
            counts = np.bincount(parents[item_lo])
            levels.append(
                TrieLevel(
                    child_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
                    child_code=codes[item_lo, level].astype(np.int32),
                    item_lo=item_lo.astype(np.int32),
                    item_hi=np.append(item_lo[1:], len(codes)).astype(np.int32),
                )
            )
            parents = np.cumsum(first) - 1
        return Trie(codes, sizes, tuple(levels))

    @cached_property
    def nodes_of_items(self) -> NDArray[np.int32]:
        """[depth, items]: the node behind each level that an item is below."""
        rows = np.arange(self.items)
        return np.stack([np.searchsorted(level.item_lo, rows, "right") - 1 for level in self.levels]).astype(np.int32)

    def candidates(self, level: int, nodes: NDArray[np.int64]) -> Candidates:
        """The children of `nodes` of `level`, without a loop over them."""
        start = self.levels[level].child_start.astype(np.int64)
        counts = start[nodes + 1] - start[nodes]
        begin = np.concatenate(([0], np.cumsum(counts)))
        source = np.repeat(np.arange(len(nodes)), counts)
        child = np.arange(begin[-1]) + np.repeat(start[nodes] - begin[:-1], counts)
        return Candidates(begin, source, child)


def _check_sorted(codes: NDArray[np.int32]) -> None:
    """Raise ValueError unless each item's code is larger than the one before it."""
    if len(codes) < 2:
        return
    difference = codes[1:].astype(np.int64) - codes[:-1]
    at = np.argmax(difference != 0, axis=1)  # the first level that differs; 0 where none does
    step = difference[np.arange(len(difference)), at]
    wrong = np.flatnonzero(step <= 0)
    if len(wrong):
        row = int(wrong[0])
        what = "repeats the code of" if step[row] == 0 else "is not sorted behind"
        raise ValueError(f"item row {row + 1}: code {codes[row + 1].tolist()} {what} row {row}; sort the items by code")
