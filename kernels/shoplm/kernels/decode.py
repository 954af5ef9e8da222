# mypy: allow-untyped-decorators
"""Split-KV attention over paged KV: single decode tokens, and short chunks behind a long cached prefix.

The formula is that of `prefill.py`. A row with few packed rows (new tokens x group heads) offers too little work per
KV head to fill a GPU, so its keys are cut into splits that run at once and are merged by `merge.py`:

* one new token: splits of a fixed number of keys (`tile_config.split_tokens`), never a function of the batch;
* 2 tokens up to `SHORT_ROWS` packed rows: at most `MAX_WIDE_SPLITS` splits, whose length is a function of the row's
  own length. This is the shop's usual step: a few tokens of task behind a customer's cached history.

So a row's result does not depend on its neighbours, bit for bit. A row with a single split is written directly.

Source: Flash-Decoding (Dao et al. 2023); fixed split length after "batch invariant" kernels (He et al. 2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from shoplm.kernels._online_softmax import attend_range, load_packed_queries, normalise, split_plan
from shoplm.kernels.aot import AotCell, AttentionShape, attention_shapes
from shoplm.kernels.tile_config import (
    MAX_WIDE_SPLITS,
    SHORT_ROWS,
    TileConfig,
    padded_head_dim,
    split_tokens,
    tile_config,
    wide_split_tokens,
)

if TYPE_CHECKING:
    from shoplm.kernels.inputs import PagedKv, RaggedRows
    from shoplm.kernels.workspace import Partials


@triton.jit(
    do_not_specialize=["query_start_ptr", "kv_len_ptr", "page_table_ptr", "lse_ptr", "count_ptr", "max_pages",
                       "splits", "window", "score_scale", "q_stride", "out_stride"]
)  # fmt: skip
def _split_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    count_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    max_pages: tl.tensor,
    splits: tl.tensor,
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
    PACKED: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    """PACKED == GROUP: rows of one new token. Otherwise: rows of 2 and more tokens and at most PACKED packed rows.

    With more than BLOCK_M packed rows, the second grid axis walks over blocks of them as well.
    """
    split = tl.program_id(0)
    BLOCKS: tl.constexpr = (PACKED + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(1) // BLOCKS
    first_packed = (tl.program_id(1) % BLOCKS) * BLOCK_M
    row = tl.program_id(2)
    first_token = tl.load(query_start_ptr + row)
    new_tokens = tl.load(query_start_ptr + row + 1) - first_token
    kv_len = tl.load(kv_len_ptr + row)
    packed_rows = new_tokens * GROUP
    mine = new_tokens == 1 if PACKED == GROUP else (new_tokens > 1) & (packed_rows <= PACKED)
    offset = kv_len - new_tokens
    start, split_tokens, count = split_plan(offset, kv_len, window, SPLIT_TOKENS, MAX_SPLITS, BLOCK_N, HAS_WINDOW)
    if (split == 0) & (tl.program_id(1) == 0):
        tl.store(count_ptr + row, tl.where(mine, count, 0))
    if (not mine) or split >= count or first_packed >= packed_rows:
        return

    packed = first_packed + tl.arange(0, BLOCK_M)
    in_tile = packed < packed_rows
    q = load_packed_queries(q_ptr, first_token, packed, in_tile, kv_head, q_stride, GROUP, HEAD_DIM, HEAD_DIM_PADDED)
    first_key = start + split * split_tokens
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
        page_table_ptr + row.to(tl.int64) * max_pages, kv_head, first_key, tl.minimum(first_key + split_tokens, kv_len),
        offset, offset + packed // GROUP, window, score_scale, KV_HEADS, PAGE_SIZE, HEAD_DIM,
        HEAD_DIM_PADDED, BLOCK_N, HAS_WINDOW, QUANTISED,
    )  # fmt: skip

    out, lse = normalise(acc, row_max, row_sum)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    mask = in_tile[:, None] & (dims[None, :] < HEAD_DIM)
    if count == 1:
        token = (first_token + packed // GROUP).to(tl.int64)
        head = kv_head * GROUP + packed % GROUP
        pointers = out_ptr + (token * (out_stride * 16) + head * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + token * (KV_HEADS * GROUP) + head, lse, mask=in_tile)
    else:
        partial = ((row.to(tl.int64) * splits + split) * KV_HEADS + kv_head) * PACKED + packed
        tl.store(partial_ptr + partial[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)
        tl.store(partial_lse_ptr + partial, lse, mask=in_tile)


def split_attention(
    q: torch.Tensor,
    kv: PagedKv,
    rows: RaggedRows,
    out: torch.Tensor,
    partials: Partials,
    *,
    tile: TileConfig,
    keys_per_split: int,
    max_splits: int,
    splits: int,
    score_scale: float,
    window: int | None,
    lse: torch.Tensor | None,
) -> None:
    """Launch over the rows of one class; merge `partials` afterwards if `splits > 1`.

    Shapes as in `attention.paged_attention`, which validates them. `partials` of group heads per row selects the rows
    with one new token, larger ones the short chunks. `max_splits` 0 keeps splits at `keys_per_split` keys, otherwise
    they grow to stay within it. `splits` bounds the splits of any row.
    """
    packed = partials.out.shape[3]
    q_blocks = -(-packed // tile.block_m)
    _split_kernel[(splits, kv.kv_heads * q_blocks, rows.rows)](
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, out, lse, partials.out, partials.lse, partials.count,
        rows.query_start, rows.kv_len, rows.page_table, rows.page_table.shape[1], partials.splits,
        0 if window is None else window, score_scale,
        q.stride(0) // 16, out.stride(0) // 16,
        GROUP=q.shape[1] // kv.kv_heads, KV_HEADS=kv.kv_heads,
        PAGE_SIZE=kv.page_size, HEAD_DIM=kv.head_dim, HEAD_DIM_PADDED=padded_head_dim(kv.head_dim),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, PACKED=packed, SPLIT_TOKENS=keys_per_split, MAX_SPLITS=max_splits,
        HAS_WINDOW=window is not None, QUANTISED=kv.quantised,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def split_cell(shape: AttentionShape, arch: int, *, short: bool) -> AotCell:
    """The cell that `split_attention` launches for `shape` on `arch`: decode rows, or short chunks."""
    rows = SHORT_ROWS if short else shape.group
    tile = tile_config(arch, shape.head_dim, shape.dtype, rows, shape.quantised)
    constexprs = {
        "lse_ptr": None, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PACKED": rows,
        "SPLIT_TOKENS": wide_split_tokens(arch) if short else split_tokens(arch),
        "MAX_SPLITS": MAX_WIDE_SPLITS if short else 0,
    }  # fmt: skip
    return shape.cell(
        "decode", _split_kernel, constexprs, arch=arch, num_warps=tile.num_warps, num_stages=tile.num_stages,
        expect_wgmma=arch == 90 and tile.block_m >= 64, label="short" if short else "token",
    )  # fmt: skip


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table: decode at representative shapes and short chunks at half of them, or everything."""
    shapes = attention_shapes(arch, full=full)
    tokens = [split_cell(shape, arch, short=False) for shape in shapes]
    return tokens + [split_cell(shape, arch, short=True) for shape in (shapes if full else shapes[::2])]
