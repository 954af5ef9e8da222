"""Scratch memory of the attention ops, allocated once from upper bounds so that a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shoplm.kernels.tile_config import MAX_WIDE_SPLITS, SHORT_ROWS, arch_of, split_tokens


def decode_splits(arch: int, max_kv_len: int) -> int:
    """Upper bound of the splits of a decode row of at most `max_kv_len` tokens."""
    return max(1, -(-max_kv_len // split_tokens(arch)))


@dataclass(frozen=True, slots=True)
class Partials:
    """Split results of up to `slots` rows: normalised fp32 outputs with their base-2 log-sum-exp."""

    out: torch.Tensor  # fp32 [slots, splits, kv_heads, packed rows, head_dim]
    lse: torch.Tensor  # fp32 [slots, splits, kv_heads, packed rows]
    count: torch.Tensor  # int32 [slots], splits to merge: 0 = not such a row, 1 = already written to the output

    @property
    def slots(self) -> int:
        """Number of rows there is room for."""
        return self.out.shape[0]

    @property
    def splits(self) -> int:
        """Number of splits per row there is room for."""
        return self.out.shape[1]

    @classmethod
    def allocate(
        cls, slots: int, splits: int, kv_heads: int, packed: int, head_dim: int, device: torch.device
    ) -> Partials:
        """Allocate uninitialised partials: kernels write whatever they later read."""
        return cls(
            out=torch.empty(slots, splits, kv_heads, packed, head_dim, dtype=torch.float32, device=device),
            lse=torch.empty(slots, splits, kv_heads, packed, dtype=torch.float32, device=device),
            count=torch.empty(slots, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.out.nbytes + self.lse.nbytes + self.count.nbytes


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch of `paged_attention` and `beam_attention`, shared by all layers of a model (they run in order).

    Its contents mean nothing between two calls. One workspace serves one stream at a time.
    """

    decode: Partials  # slots = max_rows; packed rows = group heads of the one new token
    short: Partials  # slots = max_rows; packed rows = SHORT_ROWS
    beam: Partials  # slots = max_beam_tokens; packed rows = group heads; count unused

    @classmethod
    def allocate(
        cls,
        *,
        device: torch.device,
        max_rows: int,
        max_kv_len: int,
        max_beam_tokens: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> Workspace:
        """Allocate for steps of at most `max_rows` rows of `max_kv_len` tokens and `max_beam_tokens` beams in all.

        Bytes, up to 1 %: 4 * head_dim * q_heads * (max_rows * ceil(max_kv_len / split_tokens) + 4 * max_beam_tokens)
        + 4 * head_dim * kv_heads * max_rows * 4 * 64.

        Raises:
            ValueError: a bound is negative or the heads do not divide.
        """
        sizes = {"max_rows": max_rows, "max_kv_len": max_kv_len, "max_beam_tokens": max_beam_tokens}
        for name, value in sizes.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if kv_heads < 1 or q_heads % kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads, got {q_heads} and {kv_heads}")
        group = q_heads // kv_heads
        splits = decode_splits(arch_of(device), max_kv_len)
        return cls(
            decode=Partials.allocate(max_rows, splits, kv_heads, group, head_dim, device),
            short=Partials.allocate(max_rows, MAX_WIDE_SPLITS, kv_heads, SHORT_ROWS, head_dim, device),
            beam=Partials.allocate(max_beam_tokens, MAX_WIDE_SPLITS, kv_heads, group, head_dim, device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return self.decode.nbytes + self.short.nbytes + self.beam.nbytes
