"""Packs as two steps of a backend: all prefixes, then all suffixes behind them, over the same pages.

A suffix shares the prefix's full pages by index. The page in which its own part of the prefix ends is copied, and its
tokens follow in the copy: so a cut-off's keys and values lie as they would behind a prompt that is computed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.batch import Batch, EmbedReadout, Row
from shoplm.training.packing import Pack


@dataclass(frozen=True, slots=True)
class Passes:
    """The steps of some packs. Suffix rows are in the order of the packs and of their samples."""

    prefixes: Batch | None  # None: no pack has a prefix
    copied: NDArray[np.int64]  # [copies, 2]: pages to copy between the steps, from and to
    suffixes: Batch


def pages_of(pack: Pack, page_size: int) -> int:
    """Pages that a pack needs: those of its prefix, and each suffix's own."""
    own = (-(-(length % page_size + len(suffix)) // page_size) for length, suffix in _suffixes(pack))
    return -(-len(pack.prefix) // page_size) + sum(own)


def groups(packs: Iterable[Pack], page_size: int, pages: int) -> Iterator[list[Pack]]:
    """Packs that fit into `pages` together, in order. Raises ValueError for one that does not fit alone."""
    group: list[Pack] = []
    free = pages
    for pack in packs:
        needed = pages_of(pack, page_size)
        if needed > pages:
            raise ValueError(f"{len(pack.samples)} samples behind {len(pack.prefix)} tokens need {needed} pages")
        if needed > free:
            yield group
            group, free = [], pages
        group.append(pack)
        free -= needed
    if group:
        yield group


def lay_out(packs: Sequence[Pack], page_size: int) -> Passes:
    """The steps of packs that fit into a backend's pages together, on pages 0, 1, …"""
    prefixes, suffixes = _Step(page_size), _Step(page_size)
    copied: list[tuple[int, int]] = []
    free = 0

    def take(tokens: int) -> NDArray[np.int32]:
        nonlocal free
        begin, free = free, free + -(-tokens // page_size)
        return np.arange(begin, free, dtype=np.int32)

    for pack in packs:
        shared = take(len(pack.prefix))
        if pack.prefix:
            prefixes.add(pack.prefix, 0, shared, None)
        for length, suffix in _suffixes(pack):
            whole, rest = divmod(length, page_size)
            own = take(rest + len(suffix))
            if rest:
                copied.append((int(shared[whole]), int(own[0])))
            suffixes.add(suffix, length, np.concatenate((shared[:whole], own)), EmbedReadout())
    pairs = np.array(copied, np.int64).reshape(-1, 2)
    return Passes(prefixes.batch() if prefixes.rows else None, pairs, suffixes.batch())


def _suffixes(pack: Pack) -> Iterator[tuple[int, tuple[int, ...]]]:
    return zip(pack.lengths, pack.suffixes, strict=True)


class _Step:
    """A batch that grows row by row; each row has a state slot of its own."""

    def __init__(self, page_size: int) -> None:
        self.rows: list[Row] = []
        self._page_size = page_size
        self._tokens: list[int] = []
        self._positions: list[NDArray[np.int64]] = []
        self._slots: list[NDArray[np.int64]] = []

    def add(self, tokens: tuple[int, ...], past: int, pages: NDArray[np.int32], readout: EmbedReadout | None) -> None:
        at = np.arange(past, past + len(tokens))
        slots = pages[at // self._page_size].astype(np.int64) * self._page_size + at % self._page_size
        self.rows.append(
            Row(
                state_slot=len(self.rows),
                query_start=len(self._tokens),
                query_len=len(tokens),
                pages=pages,
                kv_len=past + len(tokens),
                readout=readout,
            )
        )
        self._tokens += tokens
        self._positions.append(at)
        self._slots.append(slots)

    def batch(self) -> Batch:
        positions = np.concatenate(self._positions).astype(np.int32)
        return Batch(np.array(self._tokens, np.int32), positions, np.concatenate(self._slots), tuple(self.rows))
