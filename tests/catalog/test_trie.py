"""The trie of item codes against sets of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoplm.catalog.trie import Trie

codes_strategy = st.integers(1, 4).flatmap(
    lambda depth: st.sets(st.tuples(*[st.integers(0, 4)] * depth), min_size=1, max_size=40)
)


@given(codes_strategy)
def test_levels_are_the_distinct_prefixes(chosen: set[tuple[int, ...]]) -> None:
    codes = sorted(chosen)
    trie = Trie.from_codes(np.array(codes, np.int32))
    assert (trie.items, trie.depth) == (len(codes), len(codes[0]))
    parents: list[tuple[int, ...]] = [()]
    for depth, level in enumerate(trie.levels, start=1):
        nodes = sorted({code[:depth] for code in codes})
        assert level.child_code.tolist() == [node[-1] for node in nodes]
        for index, parent in enumerate(parents):
            children = nodes[level.child_start[index] : level.child_start[index + 1]]
            assert children == [node for node in nodes if node[:-1] == parent]
        for node, low, high in zip(nodes, level.item_lo, level.item_hi, strict=True):
            assert codes[low:high] == [code for code in codes if code[:depth] == node]
        assert [nodes[node] for node in trie.nodes_of_items[depth - 1]] == [code[:depth] for code in codes]
        parents = nodes
    assert trie.levels[-1].item_lo.tolist() == list(range(len(codes)))


@given(codes_strategy, st.randoms(use_true_random=False))
def test_candidates_are_the_children_of_the_nodes_in_turn(chosen: set[tuple[int, ...]], random: object) -> None:
    trie = Trie.from_codes(np.array(sorted(chosen), np.int32))
    level = trie.levels[-1]
    nodes = np.random.default_rng(random.randrange(99)).integers(0, len(level.child_start) - 1, 7)  # type: ignore[attr-defined]
    found = trie.candidates(trie.depth - 1, nodes)
    for index, node in enumerate(nodes):
        part = slice(found.begin[index], found.begin[index + 1])
        assert found.child[part].tolist() == list(range(level.child_start[node], level.child_start[node + 1]))
        assert (found.source[part] == index).all()


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        ([[0, 1], [0, 0]], None, r"item row 1: code \[0, 0\] is not sorted behind row 0"),
        ([[0, 1], [2, 0], [2, 0]], None, r"item row 2: code \[2, 0\] repeats the code of row 1"),
        ([[0, 1], [1, 3]], (2, 3), r"item row 1: code \[1, 3\] outside the level sizes \(2, 3\)"),
        ([[0, -1]], None, r"item row 0: code \[0, -1\] outside"),
        ([[0, 1]], (2,), "1 level sizes for codes of depth 2"),
        (np.zeros((0, 2)), None, "at least one of each"),
    ],
)
def test_wrong_codes_name_the_item(codes: object, sizes: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trie.from_codes(np.array(codes, np.int32), sizes)
