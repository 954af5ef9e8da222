# mypy: allow-untyped-decorators
"""Split-KV attention over paged KV: single decode tokens, and short chunks behind a long cached prefix.

The formula is that of `prefill.py`. A row with few packed rows (new tokens x group heads) offers too little work per
KV head to fill a GPU, so its keys are cut into splits that run at once and are merged by `merge.py`:

* one new token: splits of a fixed number of keys (`tile_config.split_tokens`), never a function of the batch;
* 2 tokens up to `SHORT_ROWS` packed rows: at most `MAX_WIDE_SPLITS` splits, whose length is a function of the row's
  own length. This is the shop's usual step: a few tokens of task behind a customer's cached history.

So a row's result does not depend on its neighbours, bit for bit. A row with a single split is written directly.

The grid is made for the longest row of a step, and has a program for each of its splits in all other rows too. Where
the longest row of a server may have more than MOST_SPLIT_PROGRAMS of them, fewer programs walk over the splits of a row
of one token (WALKS). The loop costs registers, so it is another specialisation, chosen by the workspace and not by a
step, and only where there are registers to spare.

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
    arch_of,
    padded_head_dim,
    split_tokens,
    tile_config,
    wide_split_tokens,
)

if TYPE_CHECKING:
    from shoplm.kernels.inputs import PagedKv, RaggedRows
    from shoplm.kernels.workspace import Partials

MOST_SPLIT_PROGRAMS = 16  # of a row and KV head, each with one split; more splits are walked over, ...
WALKING_PROGRAMS = 8192  # ... by that many programs of a row, or by more where all rows have less than this


@triton.jit
def _attend_split(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    max_pages: tl.tensor,
    splits: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    out_stride: tl.tensor,
    split: tl.tensor,
    start: tl.tensor,
    split_tokens: tl.tensor,
    count: tl.tensor,
    row: tl.tensor,
    kv_head: tl.tensor,
    first_token: tl.tensor,
    packed: tl.tensor,
    in_tile: tl.tensor,
    offset: tl.tensor,
    kv_len: tl.tensor,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    """One split of a row's keys: into the output where the row has no other, else into the partials."""
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
    WALKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    """PACKED == GROUP: rows of one new token. Otherwise: rows of 2 and more tokens and at most PACKED packed rows.

    With more than BLOCK_M packed rows, the second grid axis walks over blocks of them as well.
    """
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
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(count_ptr + row, tl.where(mine, count, 0))
    if (not mine) or tl.program_id(0) >= count or first_packed >= packed_rows:
        return

    packed = first_packed + tl.arange(0, BLOCK_M)
    in_tile = packed < packed_rows
    q = load_packed_queries(q_ptr, first_token, packed, in_tile, kv_head, q_stride, GROUP, HEAD_DIM, HEAD_DIM_PADDED)
    if WALKS:
        for split in range(tl.program_id(0), count, tl.num_programs(0)):
            _attend_split(
                q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                page_table_ptr, max_pages, splits, window, score_scale, out_stride, split, start, split_tokens, count,
                row, kv_head, first_token, packed, in_tile, offset, kv_len, GROUP, KV_HEADS, PAGE_SIZE, HEAD_DIM,
                HEAD_DIM_PADDED, BLOCK_M, BLOCK_N, PACKED, HAS_WINDOW, QUANTISED,
            )  # fmt: skip
    else:
        _attend_split(
            q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
            page_table_ptr, max_pages, splits, window, score_scale, out_stride, tl.program_id(0), start, split_tokens,
            count, row, kv_head, first_token, packed, in_tile, offset, kv_len, GROUP, KV_HEADS, PAGE_SIZE, HEAD_DIM,
            HEAD_DIM_PADDED, BLOCK_M, BLOCK_N, PACKED, HAS_WINDOW, QUANTISED,
        )  # fmt: skip


def may_walk(arch: int, head_dim: int, quantised: bool) -> bool:
    """Whether the loop over splits compiles without a spilled register on this architecture."""
    return 90 <= arch < 100 if quantised else head_dim <= 128


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
    many = max_splits == 0 and partials.splits > MOST_SPLIT_PROGRAMS
    walks = many and may_walk(arch_of(kv.k.device), kv.head_dim, kv.quantised)
    programs = splits
    if walks:
        programs = min(splits, max(MOST_SPLIT_PROGRAMS, WALKING_PROGRAMS // (kv.kv_heads * q_blocks * rows.rows)))
    _split_kernel[(programs, kv.kv_heads * q_blocks, rows.rows)](
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, out, lse, partials.out, partials.lse, partials.count,
        rows.query_start, rows.kv_len, rows.page_table, rows.page_table.shape[1], partials.splits,
        0 if window is None else window, score_scale,
        q.stride(0) // 16, out.stride(0) // 16,
        GROUP=q.shape[1] // kv.kv_heads, KV_HEADS=kv.kv_heads,
        PAGE_SIZE=kv.page_size, HEAD_DIM=kv.head_dim, HEAD_DIM_PADDED=padded_head_dim(kv.head_dim),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, PACKED=packed, SPLIT_TOKENS=keys_per_split, MAX_SPLITS=max_splits,
        WALKS=walks, HAS_WINDOW=window is not None, QUANTISED=kv.quantised,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def split_cell(shape: AttentionShape, arch: int, *, short: bool, walks: bool = False) -> AotCell:
    """The cell that `split_attention` launches for `shape` on `arch`: decode rows, of many splits where it `walks`, or
    short chunks."""
    rows = SHORT_ROWS if short else shape.group
    tile = tile_config(arch, shape.head_dim, shape.dtype, rows, shape.quantised)
    constexprs = {
        "lse_ptr": None, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PACKED": rows,
        "SPLIT_TOKENS": wide_split_tokens(arch) if short else split_tokens(arch),
        "MAX_SPLITS": MAX_WIDE_SPLITS if short else 0, "WALKS": walks,
    }  # fmt: skip
    return shape.cell(
        "decode", _split_kernel, constexprs, arch=arch, num_warps=tile.num_warps, num_stages=tile.num_stages,
        expect_wgmma=arch == 90 and tile.block_m >= 64, label="short" if short else "token-walks" if walks else "token",
    )  # fmt: skip


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table: decode at representative shapes, many splits where they are walked over, short chunks
    at half of the shapes; or everything."""
    shapes = attention_shapes(arch, full=full)
    tokens = [split_cell(shape, arch, short=False) for shape in shapes]
    tokens += [
        split_cell(shape, arch, short=False, walks=True)
        for shape in shapes
        if may_walk(arch, shape.head_dim, shape.quantised)
    ]
    return tokens + [split_cell(shape, arch, short=True) for shape in (shapes if full else shapes[::2])]
