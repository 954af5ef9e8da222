# mypy: allow-untyped-decorators
"""Attention of an explanation's forks over paged KV: tokens that do not read some of the keys before them.

For token i of a prompt, at position p_i and with the set R_i of keys that it reads,

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h // group]) v[j, h // group]   over j > p_i - window in R_i

R_i is a bit per key. A fork's token reads the history without the spans that are hidden from it, and its own fork up
to itself; the forks of one prompt lie one after another in its pages, so a token's place there is not its position.
Rows of the matrix product are packed (token, group head) pairs, so each key tile is read once for 64 of them.

Source: as `prefill.py`; which keys a fork reads is `shoplm.engine.forks`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from shoplm.kernels._online_softmax import attend_tiles, load_packed_queries, normalise
from shoplm.kernels.aot import AotCell, AttentionShape, attention_shapes
from shoplm.kernels.attention import check_queries, check_window, score_scale_of
from shoplm.kernels.inputs import WORD_BITS, ForkRows, PagedKv
from shoplm.kernels.tile_config import SHORT_ROWS, TileConfig, arch_of, padded_head_dim, tile_config


@triton.jit(
    do_not_specialize=["kv_len_ptr", "first_token_ptr", "new_tokens_ptr", "page_table_ptr", "position_ptr",
                       "readable_ptr", "max_pages", "max_new_tokens", "words", "window", "score_scale", "q_stride",
                       "out_stride"]
)  # fmt: skip
def _forks_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    first_token_ptr: tl.tensor,
    new_tokens_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    position_ptr: tl.tensor,
    readable_ptr: tl.tensor,
    max_pages: tl.tensor,
    max_new_tokens: tl.tensor,
    words: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first_token = tl.load(first_token_ptr + row)
    packed_rows = tl.load(new_tokens_ptr + row) * GROUP
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_tile = packed < packed_rows
    if tl.program_id(0) * BLOCK_M >= packed_rows:
        return
    q = load_packed_queries(q_ptr, first_token, packed, in_tile, kv_head, q_stride, GROUP, HEAD_DIM, HEAD_DIM_PADDED)
    # Rows behind the last read what the last one does, and are not stored.
    own = row * max_new_tokens + tl.minimum(packed, packed_rows - 1) // GROUP
    position = tl.load(position_ptr + own)
    kv_len = tl.load(kv_len_ptr + row)
    # No token reads what is kept behind it.
    last = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, packed_rows) - 1
    end = kv_len - packed_rows // GROUP + last // GROUP + 1
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(tl.min(position, 0) - window + 1, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = attend_tiles(
        q, acc, row_max, row_sum, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr + row * max_pages, kv_head,
        start, end, end, position, window, score_scale, KV_HEADS, PAGE_SIZE, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N,
        True, HAS_WINDOW, QUANTISED, readable_ptr + own * words,
    )  # fmt: skip
    out, _ = normalise(acc, row_max, row_sum)
    token = (first_token + packed // GROUP).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    dims = tl.arange(0, HEAD_DIM_PADDED)
    pointers = out_ptr + (token * (out_stride * 16) + head * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & (dims[None, :] < HEAD_DIM))


def fork_attention(
    q: torch.Tensor,
    kv: PagedKv,
    forks: ForkRows,
    *,
    out: torch.Tensor,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of the new tokens of prompts with forks; returns `out`, whose other tokens are left as they are.

    The new tokens' keys and values must already be in the pool. A token that reads no key gets 0.

    Args:
        q: [tokens, q_heads, head_dim] as in `attention.paged_attention`.
        kv: the layer's pool.
        forks: which tokens, their pages and what each reads; see `ForkRows`.
        out: as q. Written, never read.
        softmax_scale: 1 / sqrt(head_dim) if None.
        window: number of visible keys counting the token itself; None for all.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value.
    """
    check_queries(q, out, kv)
    check_window(window)
    if forks.page_table.device != kv.k.device:
        raise ValueError(f"forks are on {forks.page_table.device}, expected {kv.k.device}")
    group = q.shape[1] // kv.kv_heads
    if not forks.rows or not forks.max_new_tokens:
        return out
    tile = _tile(arch_of(kv.k.device), kv.head_dim, q.dtype, kv.quantised)
    tiles = triton.cdiv(forks.max_new_tokens * group, tile.block_m)
    _forks_kernel[(tiles, kv.kv_heads, forks.rows)](
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, out, forks.kv_len, forks.first_token, forks.new_tokens,
        forks.page_table, forks.position, forks.readable, forks.page_table.shape[1], forks.max_new_tokens,
        forks.readable.shape[2], 0 if window is None else window, score_scale_of(softmax_scale, kv.head_dim),
        q.stride(0) // 16, out.stride(0) // 16,
        GROUP=group, KV_HEADS=kv.kv_heads, PAGE_SIZE=kv.page_size, HEAD_DIM=kv.head_dim,
        HEAD_DIM_PADDED=padded_head_dim(kv.head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HAS_WINDOW=window is not None, QUANTISED=kv.quantised, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _tile(arch: int, head_dim: int, dtype: torch.dtype, quantised: bool) -> TileConfig:
    """That of short chunks, with a word of bits for each of its rows: wider ones leave no registers for them. Where the
    pool has scales, more threads share the rows, or a large head has fewer."""
    rows = 1 if quantised and head_dim > 128 else SHORT_ROWS
    tile = replace(tile_config(arch, head_dim, dtype, rows, quantised), block_n=WORD_BITS)
    return replace(tile, num_warps=8, num_stages=2) if quantised and rows == SHORT_ROWS else tile


def _cell(shape: AttentionShape, arch: int) -> AotCell:
    """The cell that `fork_attention` launches for `shape` on `arch`."""
    tile = _tile(arch, shape.head_dim, shape.dtype, shape.quantised)
    return shape.cell(
        "forks", _forks_kernel, {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}, arch=arch,
        num_warps=tile.num_warps, num_stages=tile.num_stages, expect_wgmma=arch == 90 and tile.block_m >= 64,
    )  # fmt: skip


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table: representative shapes, or the whole matrix."""
    return [_cell(shape, arch) for shape in attention_shapes(arch, full=full)]
