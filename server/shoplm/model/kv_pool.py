"""Keys and values of all running and cached tokens, in pages."""

from __future__ import annotations

import torch
from shoplm.errors import ConfigurationError
from torch import Tensor

KV_FORMATS: dict[str, torch.dtype | None] = {"model": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class KVPool:
    """Keys and values [layers, pages, kv_heads, page_size, head_dim] on the CPU.

    A pool slot is `page * page_size + offset`. Reads and writes go through rows of `head_dim` numbers: one slot has one
    row per head. Rows are computed once a step and used in every layer. Only rows that were asked for are read, so what
    unused slots hold never matters.

    With a `kv_format`, keys and values are rounded as a GPU's pool rounds them, and kept in `dtype`: for measuring what
    that costs in quality.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_format: str = "model",
    ) -> None:
        for name, value in (("pages", pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if kv_format not in KV_FORMATS:
            raise ConfigurationError(f"kv_format {kv_format!r} is not one of: {', '.join(KV_FORMATS)}")
        self._rounds_to = KV_FORMATS[kv_format]
        self.pages = pages
        self.page_size = page_size
        self._kv_heads = kv_heads
        shape = (layers, pages, kv_heads, page_size, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self._key_rows = self.keys.view(layers, -1, head_dim)
        self._value_rows = self.values.view(layers, -1, head_dim)
        self._head_offsets = torch.arange(kv_heads) * page_size

    def token_major(self, slots: Tensor) -> Tensor:
        """Rows of `slots` (int64, any shape), heads innermost: flat."""
        return (self._first_rows(slots)[..., None] + self._head_offsets).flatten()

    def head_major(self, slots: Tensor) -> Tensor:
        """Rows of `slots` [groups, tokens], in the order [groups, kv_heads, tokens]: flat."""
        return (self._first_rows(slots)[:, None, :] + self._head_offsets[:, None]).flatten()

    def rounded(self, states: Tensor) -> Tensor:
        """Keys or values [tokens, kv_heads, head_dim] as the pool keeps them."""
        if self._rounds_to is None:
            return states
        from shoplm.kernels.reference_ops import quantise_heads  # the kernels' package needs Triton

        stored, scale = quantise_heads(states.float(), self._rounds_to)
        return (stored.float() * scale[..., None]).to(states.dtype)

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [rows, head_dim]."""
        self._key_rows[layer].index_copy_(0, rows, keys)
        self._value_rows[layer].index_copy_(0, rows, values)

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values [rows, head_dim]."""
        return self._key_rows[layer].index_select(0, rows), self._value_rows[layer].index_select(0, rows)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages, `sources` [C] to `targets` [C]; none is both."""
        copy_pages(self.keys, sources, targets)
        copy_pages(self.values, sources, targets)

    def _first_rows(self, slots: Tensor) -> Tensor:
        """Row of the slot's head 0."""
        page = slots // self.page_size
        return page * (self._kv_heads * self.page_size) + slots % self.page_size


def copy_pages(part: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy pages within `part` [layers, pages, …], layer by layer: what is copied stays in the CPU's cache."""
    for layer in part:
        layer.index_copy_(0, targets, layer.index_select(0, sources))
