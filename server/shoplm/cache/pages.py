"""Who owns each page of the KV pool. Numbers only; the tensors are the backend's."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers. A page is free or it has exactly one owner: a sequence or a node of the prefix tree."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"pages is {pages}: the pool needs at least one")
        self.size = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self) -> int:
        """A free page. IndexError when there is none: ask `free` first."""
        return self._free.pop()

    def give_back(self, page: int) -> None:
        """Return a page to the pool."""
        self._free.append(page)

    def free_pages(self) -> frozenset[int]:
        """The free pages, for checks. Raises AssertionError when a page is in the list twice."""
        pages = frozenset(self._free)
        assert len(pages) == len(self._free), "a page was given back twice"
        return pages
