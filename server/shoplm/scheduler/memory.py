"""A sequence's pages: shared ones from the prefix tree, its own behind them, and room for its beams."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from shoplm.cache.pages import PagePool
from shoplm.cache.prefix import PrefixTree
from shoplm.request import Explain, token_ids
from shoplm.scheduler.sequence import Sequence


class SequenceMemory:
    """Gives sequences pages and takes them back. The only code that moves pages between owners."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.tree = PrefixTree(self.pool, page_size)
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def pages_needed(self, sequence: Sequence) -> int:
        """Pages of the sequence from its known tokens to the end of its beams, not counting what it may share."""
        return self._pages(len(sequence.tokens)) + self._pages(sequence.beam_tokens)

    def fits(self, sequence: Sequence) -> bool:
        """Whether the pool could hold the sequence to its very end, were it alone."""
        return self._pages(sequence.most_length) + self._pages(sequence.beam_tokens) <= self.pool.size

    def look_up(self, sequence: Sequence) -> None:
        """Note what need not be computed for this sequence, as things are: others have, or do so now."""
        root = sequence.request.cache_root
        chain = sequence.matched = self.tree.match(root, sequence.tokens.tobytes(), sequence.shareable)
        sequence.expected_cached = expected = min(self.page_size * len(chain), sequence.prompt_length - 1)
        filled = bisect_left(chain, True, key=lambda node: not node.filled)  # before one that is filled, all are
        done = self.page_size * filled
        if filled < len(chain) and isinstance(writer := chain[filled].writer, Sequence):
            done = max(done, writer.computed)
        sequence.expected_awaited = max(expected - done, 0)

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence every page of its known tokens and beams; False, and nothing changed, if they are short.

        One whose tokens are all in pages of others gets a page more: its last token is computed again, and what that
        gives of keys and values must go somewhere. Where there is no room for it, the last page is computed again."""
        tokens, size, tree = sequence.tokens, self.page_size, self.tree
        root, shareable = sequence.request.cache_root, sequence.shareable
        chain = tree.acquire(root, tokens.tobytes(), shareable, sequence.matched)
        whole = len(chain) * size == len(tokens)
        needed = self.pages_needed(sequence) - len(chain) + whole
        if whole and tree.available < needed:
            whole, shareable = False, shareable - size
            tree.release(chain.pop())
        if tree.available < needed:
            tree.release(*chain)
            return False
        sequence.nodes, sequence.matched = list(chain), []
        for start in range(len(chain) * size, shareable - size + 1, size):
            parent = sequence.nodes[-1] if sequence.nodes else None
            key = tokens[start : start + size].tobytes()
            node = tree.extend(root, parent, key, tree.take(), writer=sequence)
            sequence.nodes.append(node)
        while self._pages(len(tokens)) + whole > len(sequence.nodes) + len(sequence.pages):
            sequence.pages.append(tree.take())
        sequence.page_table = token_ids([*[node.page for node in sequence.nodes], *sequence.pages])
        sequence.beam_pages = [tree.take() for _ in range(self._pages(sequence.beam_tokens))]
        shared_tokens = min(len(chain) * size, len(tokens) - 1)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = shared_tokens
            self.prefix_query_tokens += len(tokens)
            self.prefix_hit_tokens += shared_tokens
        return True

    def catch_up(self, sequence: Sequence) -> bool:
        """Skip the pages that others have computed, but for a prompt's last token, whose hidden state is wanted; False
        when the next one is being computed by another sequence."""
        size, nodes = self.page_size, sequence.nodes
        if nodes and nodes[-1].filled:  # and so are all before it
            sequence.computed = max(sequence.computed, size * len(nodes))
        while sequence.computed % size == 0 and sequence.computed // size < len(nodes):
            node = nodes[sequence.computed // size]
            if node.filled:
                sequence.computed += size
                continue
            if node.writer is None:
                node.writer = sequence
            return node.writer is sequence
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        return True

    def awaited(self, sequence: Sequence) -> Sequence | None:
        """Who computes the page that a sequence waits for, which has not caught up; None: nobody."""
        writer = sequence.nodes[sequence.computed // self.page_size].writer
        return writer if isinstance(writer, Sequence) else None

    def is_known(self, sequence: Sequence) -> bool:
        """Whether the keys and values of the next token are in a page of others."""
        page = sequence.computed // self.page_size
        return page < len(sequence.nodes) and sequence.nodes[page].filled

    def computable(self, sequence: Sequence) -> int:
        """Tokens of the prompt that this sequence itself may compute next: up to the first page that is another's."""
        size = self.page_size
        index = sequence.computed // size
        while index < len(sequence.nodes):
            node = sequence.nodes[index]
            if node.filled:
                break
            if node.writer is None:
                node.writer = sequence
            if node.writer is not sequence:
                break
            index += 1
        else:
            return len(sequence.tokens) - sequence.computed
        return index * size - sequence.computed

    def grow(self, sequence: Sequence) -> bool:
        """Make sure that the page of token `computed` exists; False when no page is to be had."""
        return self.reserve(sequence, 1) > 0

    def reserve(self, sequence: Sequence, tokens: int) -> int:
        """Take pages for so many tokens from `computed` on, as far as there are any that nobody holds; returns how many
        of these tokens have pages."""
        size = self.page_size
        room = size * (len(sequence.nodes) + len(sequence.pages)) - sequence.computed
        while room < tokens and self.tree.available:
            sequence.pages.append(page := self.tree.take())
            sequence.page_table.append(page)
            room += size
        return min(room, tokens)

    def fill(self, sequence: Sequence, end: int) -> None:
        """The keys and values of the leading `end` tokens are in the pool now: others may read them."""
        nodes = sequence.nodes
        index = min(end // self.page_size, len(nodes)) - 1
        while index >= 0 and not nodes[index].filled:
            nodes[index].filled = True
            nodes[index].writer = None
            index -= 1

    def release(self, sequence: Sequence, computed: int) -> None:
        """Take everything back. Own full pages among the leading `computed` tokens stay cached for the next turn."""
        size, tree = self.page_size, self.tree
        if isinstance(sequence.request.task, Explain):
            computed = min(computed, sequence.shareable)
        parent = sequence.nodes[-1] if sequence.nodes else None
        kept: set[int] = set()
        shared = len(sequence.nodes)
        if parent is None or parent.filled:
            for index in range(shared, min(computed // size, shared + len(sequence.pages))):
                page = sequence.pages[index - shared]
                key = sequence.tokens[index * size : (index + 1) * size].tobytes()
                node = tree.adopt(sequence.request.cache_root, parent, key, page)
                if node is None:
                    break
                kept.add(page)
                parent = node
        for page in (*sequence.pages, *sequence.beam_pages):
            if page not in kept:
                self.pool.give_back(page)
        for node in reversed(sequence.nodes):
            if node.filled:  # and so are all before it
                break
            if node.writer is sequence:
                node.writer = None
        tree.release(*sequence.nodes)
        sequence.nodes, sequence.pages, sequence.beam_pages = [], [], []
        sequence.page_table = token_ids(())

    def check(self, running: Iterable[Sequence]) -> None:
        """Every page has exactly one owner. AssertionError names what does not."""
        owners: dict[int, str] = dict.fromkeys(self.pool.free_pages(), "free")

        def own(page: int, owner: str) -> None:
            assert page not in owners, f"page {page} belongs to {owners[page]} and to {owner}"
            owners[page] = owner

        users = 0
        for node in self.tree.nodes():
            own(node.page, "the prefix tree")
            users += node.users
        held = 0
        for sequence in running:
            held += len(sequence.nodes)
            table = [*(node.page for node in sequence.nodes), *sequence.pages]
            assert sequence.page_table.tolist() == table, f"{sequence.request.request_id} has a page table of others"
            for page in (*sequence.pages, *sequence.beam_pages):
                own(page, sequence.request.request_id)
        assert users == held, f"nodes count {users} holders, sequences hold {held}"
        assert len(owners) == self.pool.size, f"{self.pool.size - len(owners)} pages have no owner"

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
