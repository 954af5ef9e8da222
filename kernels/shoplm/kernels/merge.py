# mypy: allow-untyped-decorators
"""Merge the partial results of split-KV attention.

A split s holds a normalised output o_s and its base-2 log-sum-exp L_s. With w_s = 2^(L_s - max L),

    out = sum_s w_s o_s / sum_s w_s        L = max L + log2(sum_s w_s)

Splits are read eight at a time in a fixed order, so the sum never depends on timing or on other rows.
Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from shoplm.kernels.aot import AotCell, attention_shapes
from shoplm.kernels.tile_config import SHORT_ROWS, padded_head_dim

if TYPE_CHECKING:
    from shoplm.kernels.workspace import Partials


BLOCK_S = 8  # splits read at once
MOST_WALKERS = 8  # programs that share the packed rows of one (row, KV head)


@triton.jit(do_not_specialize=["splits", "out_stride", "count_ptr", "query_start_ptr", "lse_ptr"])
def _merge_kernel(
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    count_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    splits: tl.tensor,
    out_stride: tl.tensor,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Walks over every `num_programs(0)`-th packed row of a row and KV head, from `program_id(0)` on."""
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    count = tl.load(count_ptr + row)
    if count < 2:
        return
    first_token = tl.load(query_start_ptr + row)
    packed_rows = (tl.load(query_start_ptr + row + 1) - first_token) * GROUP
    for packed in range(tl.program_id(0), packed_rows, tl.num_programs(0)):
        _merge_packed_row(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, packed, kv_head, row, first_token, count, splits,
            out_stride, GROUP, KV_HEADS, PACKED, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_S,
        )  # fmt: skip


@triton.jit
def _merge_packed_row(
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    packed: tl.tensor,
    kv_head: tl.tensor,
    row: tl.tensor,
    first_token: tl.tensor,
    count: tl.tensor,
    splits: tl.tensor,
    out_stride: tl.tensor,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    dims = tl.arange(0, HEAD_DIM_PADDED)
    acc = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    first = (row.to(tl.int64) * splits * KV_HEADS + kv_head) * PACKED + packed  # of the splits; one row's fit an int32
    for first_split in range(0, count, BLOCK_S):
        split = first_split + tl.arange(0, BLOCK_S)
        exists = split < count
        index = split * (KV_HEADS * PACKED)
        lse = tl.load(partial_lse_ptr + first + index, mask=exists, other=float("-inf"))
        mask = exists[:, None] & (dims[None, :] < HEAD_DIM)
        parts = partial_ptr + first * HEAD_DIM + (index * HEAD_DIM)[:, None] + dims[None, :]
        part = tl.load(parts, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        # Early tokens of a chunk see nothing of the last splits; all -inf so far must not become NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - shift)
        decay = tl.exp2(top - shift)
        acc = acc * decay + tl.sum(weight[:, None] * part, 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top
    safe_total = tl.where(total == 0.0, 1.0, total)
    token = (first_token + packed // GROUP).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    out = (acc / safe_total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * (out_stride * 16) + head * HEAD_DIM + dims, out, mask=dims < HEAD_DIM)
    if lse_ptr is not None:
        merged = tl.where(total == 0.0, float("-inf"), top + tl.log2(safe_total))
        tl.store(lse_ptr + token * (KV_HEADS * GROUP) + head + tl.arange(0, 1), merged)


def _merge_warps(head_dim: int) -> int:
    """One warp holds 8 splits of 64 elements in 16 registers a thread."""
    return padded_head_dim(head_dim) // 64


def merge_splits(
    partials: Partials, query_start: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """Merge every row whose `partials.count` is 2 or more into `out` (and `lse`); leave all others untouched.

    Args:
        partials: fp32 [slots >= rows, splits, kv_heads, packed, head_dim]; packed row p of a row is group head
            `p % group` of its new token `p // group`.
        query_start: int32 [rows + 1], prefix sums of new tokens.
        out: [tokens, q_heads, head_dim], fp32, fp16 or bf16.
        lse: fp32 [tokens, q_heads], base 2.
    """
    _, _, kv_heads, packed, head_dim = partials.out.shape
    _merge_kernel[(min(packed, MOST_WALKERS), kv_heads, query_start.shape[0] - 1)](
        partials.out, partials.lse, partials.count, query_start, out, lse, partials.splits, out.stride(0) // 16,
        GROUP=out.shape[1] // kv_heads, KV_HEADS=kv_heads, PACKED=packed,
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=padded_head_dim(head_dim), BLOCK_S=BLOCK_S,
        num_warps=_merge_warps(head_dim), num_stages=2,
    )  # fmt: skip


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table. Windows and the KV's type make no difference here."""
    shapes = attention_shapes(arch, full=full)
    plain = [shape for shape in shapes if full is False or not (shape.window or shape.quantised)]
    rows = [(shape, packed) for shape in (plain if full else plain[:1]) for packed in (shape.group, SHORT_ROWS)]
    return [
        shape.cell(
            "merge", _merge_kernel, {"lse_ptr": None, "PACKED": packed, "BLOCK_S": BLOCK_S}, arch=arch,
            num_warps=_merge_warps(shape.head_dim), num_stages=2, expect_wgmma=False,
            label="short" if packed == SHORT_ROWS else "token",
        )
        for shape, packed in rows
    ]  # fmt: skip
