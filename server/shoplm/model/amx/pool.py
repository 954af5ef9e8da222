"""Keys and values in pages, in the order in which AMX tiles read them."""

from __future__ import annotations

import torch
from shoplm.errors import ConfigurationError
from shoplm.model.kv_pool import copy_pages
from torch import Tensor

TILE = 16  # tokens whose values lie together


class AmxPool:
    """bf16. Keys [layers, pages, kv_heads, page_size, head_dim]; values [layers, pages, kv_heads, page_size / 16,
    head_dim, 16]. What unused slots hold never matters."""

    def __init__(self, *, layers: int, pages: int, kv_heads: int, page_size: int, head_dim: int) -> None:
        if pages < 1:
            raise ValueError(f"pages is {pages}, expected at least 1")
        if page_size % TILE:
            raise ConfigurationError(f"page_size {page_size} is not a multiple of {TILE}")
        self.page_size = page_size
        # Not zeroed: memory that no page has used yet is not occupied either.
        self.keys = torch.empty(layers, pages, kv_heads, page_size, head_dim, dtype=torch.bfloat16)
        self.values = torch.empty(layers, pages, kv_heads, page_size // TILE, head_dim, TILE, dtype=torch.bfloat16)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages, `sources` [C] to `targets` [C]; none is both."""
        copy_pages(self.keys, sources, targets)
        copy_pages(self.values, sources, targets)
