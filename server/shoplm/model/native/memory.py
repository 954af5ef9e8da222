"""Memory for weights in pages of 2 MiB. A step reads all of them once, and at each page of 4 KiB a core waits for a
walk of its page tables."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK = 64 << 20  # of address space; what is not used takes no memory
_ALIGNMENT = 128


class WeightMemory:
    """Hands out pieces one behind the other. A chunk is freed with the last piece of it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Take `size` bytes that begin at a cache line."""
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        if taken > len(self._chunk):
            self._chunk = _reserve(max(taken, _CHUNK))
        memory, self._chunk = self._chunk[:size], self._chunk[taken:]
        return memory


def _reserve(size: int) -> Tensor:
    """Bytes that begin at a huge page. Where Linux has none to give, its usual pages."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    chunk = torch.frombuffer(memory, dtype=torch.uint8)
    start = -chunk.data_ptr() % _HUGE_PAGE
    return chunk[start : start + size]
