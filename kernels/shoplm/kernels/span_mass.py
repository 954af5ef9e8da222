# mypy: allow-untyped-decorators
"""Attention mass that a row's last token puts on spans of its prompt, per KV head, in one layer.

    mass[i, h, c] = mean over the group's heads a of  sum_{j in span c} softmax_j(scale * q[a] . k[j, h])

The row's log-sum-exp comes from the attention itself (`paged_attention(..., lse=)`), so a span needs only its own keys
once: no values, no second pass, and never a matrix of probabilities. One program per (row, KV head, span).

Cost: kv_heads * span_tokens * head_dim elements read per explained row, half of a decode step's bytes for that row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from shoplm.kernels._checks import check_tensor
from shoplm.kernels._online_softmax import key_rows, load_packed_queries, load_rows
from shoplm.kernels.aot import AotCell, attention_shapes
from shoplm.kernels.attention import check_queries, check_window, score_scale_of
from shoplm.kernels.inputs import COUNTER, PagedKv, RaggedRows
from shoplm.kernels.tile_config import arch_of, padded_head_dim, tile_config


@triton.jit(
    do_not_specialize=["lse_ptr", "query_start_ptr", "kv_len_ptr", "page_table_ptr", "row_ids_ptr", "span_start_ptr",
                       "span_end_ptr", "max_pages", "max_spans", "window", "score_scale", "q_stride", "mass_ptr"]
)  # fmt: skip
def _span_mass_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    row_ids_ptr: tl.tensor,
    span_start_ptr: tl.tensor,
    span_end_ptr: tl.tensor,
    max_pages: tl.tensor,
    max_spans: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    q_stride: tl.tensor,
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
    span = tl.program_id(0)
    kv_head = tl.program_id(1)
    explained = tl.program_id(2)
    row = tl.load(row_ids_ptr + explained)
    token_end = tl.load(query_start_ptr + row + 1)
    kv_len = tl.load(kv_len_ptr + row)
    first = tl.maximum(tl.load(span_start_ptr + explained * max_spans + span), 0)
    last = tl.minimum(tl.load(span_end_ptr + explained * max_spans + span), kv_len)
    if HAS_WINDOW:
        first = tl.maximum(first, kv_len - window)
    # A row without new tokens has no last token in this step: its mass is zero, not an old query's.
    if token_end == tl.load(query_start_ptr + row):
        last = first

    packed = tl.arange(0, BLOCK_M)
    in_tile = packed < GROUP
    token = token_end - 1
    q = load_packed_queries(q_ptr, token, packed, in_tile & (last > first), kv_head, q_stride, GROUP, HEAD_DIM,
                            HEAD_DIM_PADDED)  # fmt: skip
    lse_row = lse_ptr + token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP
    lse = tl.load(lse_row + packed, mask=in_tile & (last > first), other=float("inf"))
    pages_ptr = page_table_ptr + row.to(tl.int64) * max_pages
    mass = tl.zeros([BLOCK_M], tl.float32)
    for first_key in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        first_key = tl.multiple_of(first_key, BLOCK_N)
        keys = first_key + tl.arange(0, BLOCK_N)
        inside = (keys >= first) & (keys < last)
        rows = key_rows(pages_ptr, keys, inside, first_key, kv_head, KV_HEADS, PAGE_SIZE, BLOCK_N, True)
        k = load_rows(k_ptr, rows, inside, HEAD_DIM, HEAD_DIM_PADDED, True)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if QUANTISED:
            scores = scores * tl.load(k_scale_ptr + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
        weights = tl.where(inside[None, :], tl.exp2(scores * score_scale - lse[:, None]), 0.0)
        mass += tl.sum(weights, 1)
    mean = tl.sum(mass, 0) / GROUP
    tl.store(mass_ptr + (explained.to(tl.int64) * KV_HEADS + kv_head) * max_spans + span, mean)


def span_mass(
    q: torch.Tensor,
    kv: PagedKv,
    rows: RaggedRows,
    lse: torch.Tensor,
    row_ids: torch.Tensor,
    span_start: torch.Tensor,
    span_end: torch.Tensor,
    *,
    out: torch.Tensor,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention mass on spans of the keys for the last new token of some rows; returns `out`.

    Args:
        q: [tokens, q_heads, head_dim], as passed to `paged_attention` for the same layer and step.
        kv: the layer's pool.
        rows: the step's rows.
        lse: fp32 [tokens, q_heads], as `paged_attention` wrote it.
        row_ids: int32 [explained], the rows to explain.
        span_start: int32 [explained, max_spans], first key position of each span.
        span_end: int32 [explained, max_spans], one past its last; an empty span (start >= end) has mass 0.
        out: fp32 [explained, kv_heads, max_spans]: fractions in [0, 1]. A row without new tokens gets zeros.
        softmax_scale: as passed to `paged_attention`.
        window: as passed to `paged_attention`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value.
    """
    device = kv.k.device
    check_queries(q, None, kv)
    check_window(window)
    explained, max_spans = span_start.shape if span_start.dim() == 2 else (None, None)
    check_tensor("lse", lse, q.shape[:2], (torch.float32,), device, contiguous=True)
    check_tensor("row_ids", row_ids, (explained,), COUNTER, device)
    check_tensor("span_start", span_start, (None, None), COUNTER, device, contiguous=True)
    check_tensor("span_end", span_end, span_start.shape, COUNTER, device, contiguous=True)
    check_tensor("out", out, (explained, kv.kv_heads, max_spans), (torch.float32,), device, contiguous=True)
    if not explained or not max_spans or q.shape[0] == 0:
        out.zero_()
        return out
    group = q.shape[1] // kv.kv_heads
    tile = tile_config(arch_of(device), kv.head_dim, q.dtype, group, kv.quantised)
    _span_mass_kernel[(max_spans, kv.kv_heads, explained)](
        q, kv.k, kv.k_scale, lse, out, rows.query_start, rows.kv_len, rows.page_table, row_ids, span_start, span_end,
        rows.page_table.shape[1], max_spans, 0 if window is None else window,
        score_scale_of(softmax_scale, kv.head_dim), q.stride(0) // 16,
        GROUP=group, KV_HEADS=kv.kv_heads, PAGE_SIZE=kv.page_size, HEAD_DIM=kv.head_dim,
        HEAD_DIM_PADDED=padded_head_dim(kv.head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HAS_WINDOW=window is not None, QUANTISED=kv.quantised, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table: representative shapes, or the whole matrix."""
    shapes = attention_shapes(arch, full=full)
    cells = []
    for shape in shapes if full else shapes[:2]:
        tile = tile_config(arch, shape.head_dim, shape.dtype, shape.group, shape.quantised)
        constexprs: dict[str, object] = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        cells.append(
            shape.cell(
                "span_mass", _span_mass_kernel, constexprs, arch=arch, num_warps=tile.num_warps,
                num_stages=tile.num_stages, expect_wgmma=False,
            )
        )  # fmt: skip
    return cells
