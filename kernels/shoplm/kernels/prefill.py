# mypy: allow-untyped-decorators
"""Prefill attention over paged KV: ragged, causal, chunked, with a cached prefix.

For a row with `n` new tokens and `kv_len` readable ones, new token i has position p = kv_len - n + i and

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h // group]) v[j, h // group]   over p - window < j <= p

Rows of the matrix product are packed (token, group head) pairs, so each key tile is read once for all heads that share
it. Only rows with more than `SHORT_ROWS` packed rows are computed here; `decode.py` splits the keys of the others.

Source: FlashAttention-2 (Dao 2023); packed heads as in FlashInfer (Ye et al. 2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from shoplm.kernels._online_softmax import (
    attend_range,
    first_tile_slot,
    load_packed_queries,
    normalise,
    owning_row,
)
from shoplm.kernels.aot import AotCell, AttentionShape, attention_shapes
from shoplm.kernels.tile_config import SHORT_ROWS, TileConfig, padded_head_dim, tile_config

if TYPE_CHECKING:
    from shoplm.kernels.attention import PagedKv, RaggedRows


@triton.jit(
    do_not_specialize=["query_start_ptr", "kv_len_ptr", "page_table_ptr", "lse_ptr", "rows", "max_pages", "window",
                       "score_scale", "q_stride", "out_stride"]
)  # fmt: skip
def _prefill_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    rows: tl.tensor,
    max_pages: tl.tensor,
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
    SHORT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = owning_row(query_start_ptr, rows, slot, GROUP, BLOCK_M)
    if row < 0:
        return
    first_token = tl.load(query_start_ptr + row)
    new_tokens = tl.load(query_start_ptr + row + 1) - first_token
    packed_rows = new_tokens * GROUP
    tiles = tl.cdiv(packed_rows, BLOCK_M)
    local = slot - first_tile_slot(first_token, row, GROUP, BLOCK_M)
    if packed_rows <= SHORT or local >= tiles:
        return
    # The last tiles see the most keys: start them first so that they do not run alone at the end.
    first_packed = (tiles - 1 - local) * BLOCK_M
    packed = first_packed + tl.arange(0, BLOCK_M)
    in_tile = packed < packed_rows
    q = load_packed_queries(q_ptr, first_token, packed, in_tile, kv_head, q_stride, GROUP, HEAD_DIM, HEAD_DIM_PADDED)

    kv_len = tl.load(kv_len_ptr + row)
    offset = kv_len - new_tokens
    first_position = offset + first_packed // GROUP
    last_position = offset + (tl.minimum(first_packed + BLOCK_M, packed_rows) - 1) // GROUP
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
        page_table_ptr + row.to(tl.int64) * max_pages, kv_head, start, last_position + 1, first_position,
        offset + packed // GROUP, window, score_scale, KV_HEADS, PAGE_SIZE, HEAD_DIM, HEAD_DIM_PADDED,
        BLOCK_N, HAS_WINDOW, QUANTISED,
    )  # fmt: skip

    out, lse = normalise(acc, row_max, row_sum)
    token = (first_token + packed // GROUP).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    dims = tl.arange(0, HEAD_DIM_PADDED)
    pointers = out_ptr + (token * (out_stride * 16) + head * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & (dims[None, :] < HEAD_DIM))
    if lse_ptr is not None:
        tl.store(lse_ptr + token * (KV_HEADS * GROUP) + head, lse, mask=in_tile)


def prefill_attention(
    q: torch.Tensor,
    kv: PagedKv,
    rows: RaggedRows,
    out: torch.Tensor,
    *,
    tile: TileConfig,
    score_scale: float,
    window: int | None,
    lse: torch.Tensor | None,
) -> None:
    """Launch over all rows with more than `SHORT_ROWS` packed rows; other rows' outputs are left untouched.

    Shapes as in `attention.paged_attention`, which validates them. `score_scale` = softmax scale * log2(e).
    """
    group = q.shape[1] // kv.kv_heads
    slots = q.shape[0] * group // tile.block_m + rows.rows
    _prefill_kernel[(slots, kv.kv_heads)](
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, out, lse, rows.query_start, rows.kv_len, rows.page_table,
        rows.rows, rows.page_table.shape[1], 0 if window is None else window, score_scale,
        q.stride(0) // 16, out.stride(0) // 16,
        GROUP=group, KV_HEADS=kv.kv_heads, PAGE_SIZE=kv.page_size,
        HEAD_DIM=kv.head_dim, HEAD_DIM_PADDED=padded_head_dim(kv.head_dim), BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, SHORT=SHORT_ROWS, HAS_WINDOW=window is not None, QUANTISED=kv.quantised,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def prefill_cell(shape: AttentionShape, arch: int) -> AotCell:
    """The cell that `prefill_attention` launches for `shape` on `arch`."""
    tile = tile_config(arch, shape.head_dim, shape.dtype, 2 * SHORT_ROWS, shape.quantised)
    constexprs = {"lse_ptr": None, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SHORT": SHORT_ROWS}
    return shape.cell(
        "prefill", _prefill_kernel, constexprs, arch=arch, num_warps=tile.num_warps, num_stages=tile.num_stages,
        expect_wgmma=arch == 90 and tile.block_m >= 64,
    )  # fmt: skip


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table: representative shapes, or the whole matrix."""
    return [prefill_cell(shape, arch) for shape in attention_shapes(arch, full=full)]
