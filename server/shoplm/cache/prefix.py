"""The prefix tree: full pages of prompts, shared between requests, customers' visits and services.

One node is one page. A node may be shared before it is computed: its *writer* is the sequence that computes it, the
others wait for it. When a writer goes away, the next one that needs the page takes over.

Tokens are bytes here, four of each: a page's are cut, compared and hashed at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count

from shoplm.cache.pages import PagePool
from shoplm.lazy_heap import LazyHeap

_TOKEN_BYTES = 4


@dataclass(eq=False, slots=True)
class Node:
    """One page of a prefix."""

    key: bytes  # the page's tokens
    page: int
    parent: Node | None  # None: a root, which has no page of its own
    root: Hashable  # cache identity: nothing is shared across roots
    children: dict[bytes, Node] = field(default_factory=dict)
    users: int = 0  # sequences that hold this node
    filled: bool = False  # its keys and values are computed
    writer: object | None = None  # the sequence that computes it; None when filled or orphaned
    last_used: int = 0


class PrefixTree:
    """Matches prompts against the pages in the pool and evicts the least recently used leaves."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_bytes = page_size * _TOKEN_BYTES
        self._roots: dict[Hashable, Node] = {}
        self._clock = count(1)
        self._leaves = LazyHeap(self._is_in_use)  # idle ones, by when they were used last
        self._idle = 0
        self.evicted = 0  # pages, since the start

    @property
    def idle(self) -> int:
        """Pages that nobody uses: cached, and free for whoever needs them."""
        return self._idle

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones and idle ones."""
        return self._pool.free + self._idle

    def match(self, root: Hashable, tokens: bytes, limit: int) -> list[Node]:
        """The nodes that `acquire` would return; nothing is held."""
        return self._walk(root, tokens, limit, [])

    def acquire(self, root: Hashable, tokens: bytes, limit: int, known: Sequence[Node] = ()) -> list[Node]:
        """The longest chain of nodes for the full pages among the first `limit` tokens, each now held once more.

        `known`: what `match` found for the same tokens, which need not be looked at again if it is still here.
        """
        # Leaves are evicted first: if the last one is here, so are all before it.
        chain = self._walk(root, tokens, limit, list(known) if known and self._holds(known[-1]) else [])
        for node in chain:
            if not node.users:
                self._idle -= 1
            node.users += 1
        return chain

    def _walk(self, root: Hashable, tokens: bytes, limit: int, chain: list[Node]) -> list[Node]:
        """The chain with the nodes behind it for the full pages among the first `limit` tokens."""
        node = chain[-1] if chain else self._roots.get(root)
        if node is None:
            return chain
        size, children = self._page_bytes, node.children
        for start in range(len(chain) * size, limit * _TOKEN_BYTES - size + 1, size):
            node = children.get(tokens[start : start + size])
            if node is None:
                break
            chain.append(node)
            children = node.children
        return chain

    def _holds(self, node: Node) -> bool:
        return node.parent is not None and node.parent.children.get(node.key) is node

    def extend(self, root: Hashable, parent: Node | None, key: bytes, page: int, writer: object) -> Node:
        """A new node for a page that `writer` is going to compute, held once by it."""
        if parent is None:
            parent = self._roots.setdefault(root, Node(b"", -1, None, root))
        assert len(key) == self._page_bytes and key not in parent.children
        node = Node(key, page, parent, root, users=1, writer=writer, last_used=next(self._clock))
        parent.children[key] = node
        return node

    def adopt(self, root: Hashable, parent: Node | None, key: bytes, page: int) -> Node | None:
        """Keep a computed page that a sequence owned, as an idle node; None when the tree has that prefix already."""
        home = parent if parent is not None else self._roots.get(root)
        if home is not None and key in home.children:
            return None
        node = self.extend(root, parent, key, page, writer=None)
        node.filled = True
        self.release(node)
        return node

    def release(self, *chain: Node) -> None:
        """One holder less of these nodes, each a child of the one before it. A page that nobody holds stays cached if
        it is filled, else it is freed."""
        now = next(self._clock)
        for node in reversed(chain):
            assert node.users > 0, "released more often than acquired"
            node.users -= 1
            if node.users:
                continue
            self._idle += 1
            if node.filled:
                node.last_used = now
                self._offer(node)
            else:
                # Nothing below an unfilled node can be filled, and its holders hold it too: it is a leaf by now.
                self._remove(node)

    def take(self) -> int:
        """A page for a new owner: a free one, or the least recently used leaf's. IndexError when none is available."""
        if not self._pool.free:
            self._evict()
        return self._pool.take()

    def nodes(self) -> list[Node]:
        """Every node with a page, for checks."""
        found: list[Node] = []
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                found.append(node)
        return found

    def clear(self) -> None:
        """Evict everything that nobody uses."""
        while self._idle:
            self._evict()

    def _offer(self, node: Node) -> None:
        """It may be evicted, if it is an idle leaf."""
        if not node.children and not node.users:
            self._leaves.trim(self._idle)
            self._leaves.push(node.last_used, node)

    def _is_in_use(self, last_used: float, node: Node) -> bool:
        """Whether it is no idle leaf, or has been used since."""
        return node.last_used != last_used or bool(node.users or node.children) or not self._holds(node)

    def _evict(self) -> None:
        found = self._leaves.first()
        if found is None:
            raise IndexError("no page is idle")
        self._leaves.pop()
        self.evicted += 1
        self._remove(found[1])

    def _remove(self, node: Node) -> None:
        assert not node.children and not node.users
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        self._pool.give_back(node.page)
        self._idle -= 1
        if parent.parent is not None:
            self._offer(parent)
        elif not parent.children:
            self._roots.pop(parent.root, None)
