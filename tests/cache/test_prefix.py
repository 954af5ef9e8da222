"""The prefix tree: who shares what, who computes what, and which page goes first."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable

import pytest
from shoplm.cache.pages import PagePool
from shoplm.cache.prefix import Node, PrefixTree
from shoplm.request import token_ids

PAGE_SIZE = 4
WRITER = object()


def make_tree(pages: int) -> tuple[PrefixTree, PagePool]:
    pool = PagePool(pages)
    return PrefixTree(pool, PAGE_SIZE), pool


def packed(tokens: Iterable[int]) -> bytes:
    return token_ids(tokens).tobytes()


def write(tree: PrefixTree, tokens: list[int], root: str = "root") -> list[Node]:
    """Acquire what is there, compute the rest; the caller holds all of it."""
    chain = tree.acquire(root, packed(tokens), len(tokens))
    for start in range(len(chain) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        parent = chain[-1] if chain else None
        node = tree.extend(root, parent, packed(tokens[start : start + PAGE_SIZE]), tree.take(), WRITER)
        node.filled, node.writer = True, None
        chain.append(node)
    return chain


def release(tree: PrefixTree, chain: list[Node]) -> None:
    for node in reversed(chain):
        tree.release(node)


def test_the_pool_refuses_to_be_empty_and_notices_a_double_return() -> None:
    with pytest.raises(ValueError, match="pages is 0"):
        PagePool(0)
    pool = PagePool(2)
    page = pool.take()
    pool.give_back(page)
    pool.give_back(page)
    with pytest.raises(AssertionError, match="twice"):
        pool.free_pages()


def test_only_whole_pages_within_the_limit_are_shared() -> None:
    tree, _ = make_tree(8)
    tokens = list(range(12))
    chain = write(tree, tokens)
    assert len(chain) == 3
    for limit, pages in ((3, 0), (4, 1), (7, 1), (8, 2), (11, 2), (12, 3)):
        found = tree.acquire("root", packed(tokens), limit)
        assert found == chain[:pages]
        release(tree, found)


def test_what_was_matched_is_looked_at_again_only_if_it_has_gone() -> None:
    tree, _ = make_tree(8)
    tokens = list(range(16))
    release(tree, write(tree, tokens[:8]))
    known = tree.match("root", packed(tokens), 16)
    assert len(known) == 2
    chain = write(tree, tokens)  # two pages more, behind those that were known
    assert tree.acquire("root", packed(tokens), 16, known) == chain[:4]
    for _ in range(2):
        release(tree, chain)
    tree.clear()
    assert tree.acquire("root", packed(tokens), 16, known) == []
    again = write(tree, tokens[:4])
    assert tree.acquire("root", packed(tokens), 16, known) == again != known[:1]


def test_a_fork_shares_the_common_pages_and_nothing_else() -> None:
    tree, pool = make_tree(8)
    one = write(tree, [*range(8), 8, 8, 8, 8])
    other = write(tree, [*range(8), 9, 9, 9, 9])
    assert one[:2] == other[:2] and one[2] is not other[2]
    assert pool.free == 8 - 4
    assert [node.users for node in one] == [2, 2, 1]
    # A page's tokens are not enough: what stands before it must be the same as well.
    assert tree.acquire("root", packed([9, 9, 9, 9]), 4) == []


def test_nothing_is_shared_across_roots() -> None:
    tree, _ = make_tree(8)
    tokens = list(range(8))
    one, other = write(tree, tokens, "tenant 1"), write(tree, tokens, "tenant 2")
    assert not set(map(id, one)) & set(map(id, other))
    assert len({node.page for node in (*one, *other)}) == 4
    assert tree.acquire("tenant 3", packed(tokens), 8) == []


def test_released_pages_stay_cached_until_they_are_needed() -> None:
    tree, pool = make_tree(3)
    tokens = list(range(8))
    chain = write(tree, tokens)
    release(tree, chain)
    assert (tree.idle, pool.free, tree.available) == (2, 1, 3)
    again = tree.acquire("root", packed(tokens), 8)
    assert again == chain and tree.idle == 0
    release(tree, again)
    taken = [tree.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    assert (tree.idle, tree.evicted) == (0, 2)
    with pytest.raises(IndexError):
        tree.take()


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree, _ = make_tree(4)
    old, new = [1] * 8, [2] * 8
    release(tree, write(tree, old))
    release(tree, write(tree, new))
    release(tree, tree.acquire("root", packed(old), 8))  # now the one used last
    tree.take()
    assert len(tree.acquire("root", packed(new), 8)) == 1  # its leaf is gone, its first page still there
    assert len(tree.acquire("root", packed(old), 8)) == 2


def test_what_is_used_again_and_again_is_remembered_once() -> None:
    tree, _ = make_tree(8)
    release(tree, write(tree, list(range(8))))

    def use_it(times: int) -> int:
        """Bytes that are held afterwards."""
        for _ in range(times):
            tree.release(*tree.acquire("root", packed(range(8)), 8))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few = use_it(1_000)
        assert use_it(3_000) < few + 20_000
    finally:
        tracemalloc.stop()


def test_a_page_with_a_held_page_below_it_is_never_evicted() -> None:
    tree, _ = make_tree(3)
    held = write(tree, list(range(8)))
    release(tree, write(tree, [*range(4), 9, 9, 9, 9]))
    assert tree.available == 1
    tree.take()
    with pytest.raises(IndexError):
        tree.take()
    assert tree.acquire("root", packed(list(range(8))), 8) == held


def test_an_evicted_prefix_can_be_computed_again() -> None:
    tree, pool = make_tree(2)
    for _ in range(3):
        release(tree, write(tree, [1] * 8))
        release(tree, write(tree, [2] * 8))
    assert tree.evicted == 10
    tree.clear()
    assert (pool.free, tree.nodes()) == (2, [])


def test_an_unfilled_page_that_nobody_holds_is_freed_at_once() -> None:
    tree, pool = make_tree(2)
    node = tree.extend("root", None, packed([1, 2, 3, 4]), tree.take(), WRITER)
    tree.release(node)
    assert (pool.free, tree.idle, tree.nodes()) == (2, 0, [])
    with pytest.raises(AssertionError, match="released more often"):
        tree.release(node)


def test_an_adopted_page_is_found_and_a_known_prefix_is_not_adopted_twice() -> None:
    tree, pool = make_tree(4)
    chain = write(tree, [1] * 4)
    node = tree.adopt("root", chain[-1], packed([5, 6, 7, 8]), tree.take())
    assert node is not None and (node.filled, node.users, tree.idle) == (True, 0, 1)
    page = tree.take()
    assert tree.adopt("root", chain[-1], packed([5, 6, 7, 8]), page) is None
    pool.give_back(page)
    release(tree, chain)
    assert tree.acquire("root", packed([1, 1, 1, 1, 5, 6, 7, 8]), 8) == [*chain, node]


@pytest.mark.parametrize("seed", range(3))
def test_random_use_keeps_the_books(seed: int) -> None:
    """Against the plainest model: the holders we know of, and a page each per distinct prefix."""
    generator = random.Random(seed)
    tree, pool = make_tree(20)
    held: list[tuple[list[int], list[Node]]] = []
    for _ in range(3_000):
        tokens = [page for _ in range(generator.randint(1, 5)) for page in [generator.randrange(2)] * PAGE_SIZE]
        if held and generator.random() < 0.5:
            release(tree, held.pop(generator.randrange(len(held)))[1])
        elif tree.available >= 5:
            held.append((tokens, write(tree, tokens)))
        prefixes = {tuple(tokens[: (i + 1) * PAGE_SIZE]) for tokens, chain in held for i in range(len(chain))}
        nodes = tree.nodes()
        assert len({node.page for node in nodes} | pool.free_pages()) == 20
        assert len(nodes) + pool.free == 20
        assert sum(node.users for node in nodes) == sum(len(chain) for _, chain in held)
        assert len(nodes) - tree.idle == len(prefixes)
        assert tree.idle == sum(not node.users for node in nodes)
    assert tree.evicted > 100
    for _, chain in held:
        release(tree, chain)
    tree.clear()
    assert pool.free == 20
