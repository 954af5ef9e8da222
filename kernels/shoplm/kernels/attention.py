"""Attention over paged KV: validation, and which kernels a step launches.

    o_i = sum_j p_ij v_j      p_ij = softmax_j(softmax_scale * q_i . k_j)      position(i) - window < j <= position(i)

`paged_attention` takes rows of any lengths in one call; a row's own number of new tokens decides which kernel computes
it (on the device: of a captured graph the host knows upper bounds only), so its result is bit-identical whatever shares
the step. Kernels that no row can need are not launched:

    new tokens n, group heads G       kernel                      keys
    n = 0                             none
    n = 1                             decode.py  then merge.py    splits of a fixed length
    n > 1 and n * G <= SHORT_ROWS     decode.py  then merge.py    at most MAX_WIDE_SPLITS splits
    n * G > SHORT_ROWS                prefill.py                  one pass

`beam_attention` takes groups of beams that share a prompt. Neither allocates, waits for the device, or compiles again
when lengths change; both may be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor
from shoplm.kernels.beam import beam_rows
from shoplm.kernels.decode import split_attention
from shoplm.kernels.inputs import BeamGroups, PagedKv, RaggedRows, check_aligned
from shoplm.kernels.merge import merge_splits
from shoplm.kernels.prefill import prefill_attention
from shoplm.kernels.tile_config import (
    MAX_WIDE_SPLITS,
    SHORT_ROWS,
    arch_of,
    split_tokens,
    tile_config,
    wide_split_tokens,
)
from shoplm.kernels.workspace import Partials, Workspace, decode_splits

__all__ = ["BeamGroups", "PagedKv", "RaggedRows", "Workspace", "beam_attention", "paged_attention"]

MAX_GROUP = SHORT_ROWS  # query heads per KV head


def score_scale_of(softmax_scale: float | None, head_dim: int) -> float:
    """Softmax scale (1 / sqrt(head_dim) if None) times log2(e), for exponentials in base 2."""
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    if not (scale > 0.0 and math.isfinite(scale)):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    return scale * math.log2(math.e)


def check_queries(q: torch.Tensor, out: torch.Tensor | None, kv: PagedKv) -> None:
    """Validate queries (and outputs) [tokens, q_heads, head_dim] against the pool; a token's heads must be packed."""
    device = kv.k.device
    check_tensor("q", q, (None, None, kv.head_dim), ACTIVATION_DTYPES, device)
    group, remainder = divmod(q.shape[1], kv.kv_heads)
    if remainder or not 1 <= group <= MAX_GROUP:
        raise ValueError(f"q has {q.shape[1]} heads, expected 1 to {MAX_GROUP} times the {kv.kv_heads} KV heads")
    if not kv.quantised and kv.k.dtype != q.dtype:
        raise TypeError(f"q is {q.dtype} but the KV pool is {kv.k.dtype}; both must agree unless the pool is quantised")
    if kv.k.dtype == torch.float8_e4m3fn and device.type == "cuda" and arch_of(device) < 89:
        raise TypeError(f"a float8_e4m3fn KV pool needs compute capability 8.9 or later, got {arch_of(device)}")
    if out is not None:
        check_tensor("out", out, q.shape, (q.dtype,), device)
    for name, tensor in (("q", q), ("out", out)):
        if tensor is None:
            continue
        if tensor.stride(1) != kv.head_dim:
            raise ValueError(f"{name} has head stride {tensor.stride(1)}, expected head_dim {kv.head_dim}")
        check_aligned(name, tensor)
        if tensor.stride(0) % 16:
            raise ValueError(f"{name} has token stride {tensor.stride(0)}, expected a multiple of 16 elements")


def check_window(window: int | None) -> None:
    """Validate a sliding window: the number of visible keys, the token itself included."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the token itself) or None, got {window}")


def _check_partials(name: str, partials: Partials, slots: int, splits: int, kv: PagedKv, packed: int) -> None:
    """The workspace must be on the device, shaped for these heads, and large enough for this step's bounds."""
    if partials.out.device != kv.k.device:
        raise ValueError(f"workspace is on {partials.out.device}, expected {kv.k.device}")
    heads = (kv.kv_heads, packed, kv.head_dim)
    if tuple(partials.out.shape[2:]) != heads:
        raise ValueError(f"workspace.{name} is for (kv_heads, rows, head_dim) {tuple(partials.out.shape[2:])}, "
                         f"expected {heads}")  # fmt: skip
    if partials.slots < slots or partials.splits < splits:
        raise ValueError(f"workspace.{name} has room for {partials.slots} rows of {partials.splits} splits, expected "
                         f"at least {slots} of {splits}; allocate it with larger bounds")  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    kv: PagedKv,
    rows: RaggedRows,
    *,
    out: torch.Tensor,
    workspace: Workspace,
    softmax_scale: float | None = None,
    window: int | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every row's new tokens over its pages; returns `out`.

    The new tokens' keys and values must already be in the pool. Outputs of tokens outside every row are not written.

    Args:
        q: [tokens, q_heads, head_dim] fp16, bf16 or fp32; heads packed, tokens at any fixed stride (a view of a fused
            projection will do). Query head h reads KV head `h // (q_heads // kv_heads)`.
        kv: the layer's pool, in q's dtype or quantised.
        rows: lengths and page table; see `RaggedRows`.
        out: as q. Written, never read.
        workspace: scratch from `Workspace.allocate` with bounds that cover this step.
        softmax_scale: 1 / sqrt(head_dim) if None.
        window: number of visible keys counting the token itself; None for all.
        lse: fp32 [tokens, q_heads], receives the base-2 log-sum-exp of the scaled scores; 0 visible keys give -inf.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value.
    """
    check_queries(q, out, kv)
    check_window(window)
    if rows.page_table.device != kv.k.device:
        raise ValueError(f"rows are on {rows.page_table.device}, expected {kv.k.device}")
    if lse is not None:
        check_tensor("lse", lse, q.shape[:2], (torch.float32,), kv.k.device, contiguous=True)
    score_scale = score_scale_of(softmax_scale, kv.head_dim)
    group = q.shape[1] // kv.kv_heads
    arch = arch_of(kv.k.device)
    kv_bound = min(rows.max_kv_len, rows.page_table.shape[1] * kv.page_size)
    splits = decode_splits(arch, kv_bound)
    _check_partials("decode", workspace.decode, rows.rows, splits, kv, group)
    _check_partials("short", workspace.short, rows.rows, 1, kv, SHORT_ROWS)
    if rows.rows == 0 or q.shape[0] == 0 or rows.max_query_len == 0:
        return out

    if rows.may_have(1, 1):
        tile = tile_config(arch, kv.head_dim, q.dtype, group, kv.quantised)
        split_attention(
            q, kv, rows, out, workspace.decode, tile=tile, keys_per_split=split_tokens(arch), max_splits=0,
            splits=splits, score_scale=score_scale, window=window, lse=lse,
        )  # fmt: skip
        if splits > 1:
            merge_splits(workspace.decode, rows.query_start, out, lse)
    longest_short = SHORT_ROWS // group
    if rows.may_have(2, longest_short):
        tile = tile_config(arch, kv.head_dim, q.dtype, SHORT_ROWS, kv.quantised)
        wide_tokens = wide_split_tokens(arch)
        wide_splits = min(MAX_WIDE_SPLITS, max(1, -(-kv_bound // wide_tokens)))
        split_attention(
            q, kv, rows, out, workspace.short, tile=tile, keys_per_split=wide_tokens, max_splits=MAX_WIDE_SPLITS,
            splits=wide_splits, score_scale=score_scale, window=window, lse=lse,
        )  # fmt: skip
        if wide_splits > 1:
            merge_splits(workspace.short, rows.query_start, out, lse)
    if rows.may_have(longest_short + 1, rows.max_query_len):
        tile = tile_config(arch, kv.head_dim, q.dtype, 2 * SHORT_ROWS, kv.quantised)
        prefill_attention(q, kv, rows, out, tile=tile, score_scale=score_scale, window=window, lse=lse)
    return out


def beam_attention(
    q: torch.Tensor,
    kv: PagedKv,
    beams: BeamGroups,
    *,
    out: torch.Tensor,
    workspace: Workspace,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of every beam over its group's prompt and its own path of tokens; returns `out`.

    This step's own keys and values must already be in the pool. Tokens that belong to no beam are not written.

    Args:
        q: [tokens, q_heads, head_dim] as in `paged_attention`; the tokens may hold other rows too, outside
            `beams.query_start`'s ranges, but the workspace needs room for all of them: pass a slice.
        kv: the layer's pool.
        beams: widths, steps, slots and parents; see `BeamGroups`.
        out: as q.
        workspace: scratch with `max_beam_tokens >= tokens`.
        softmax_scale: 1 / sqrt(head_dim) if None.
        window: number of visible keys counting the token itself; None for all.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value.
    """
    check_queries(q, out, kv)
    check_window(window)
    if beams.page_table.device != kv.k.device:
        raise ValueError(f"beams are on {beams.page_table.device}, expected {kv.k.device}")
    score_scale = score_scale_of(softmax_scale, kv.head_dim)
    group = q.shape[1] // kv.kv_heads
    _check_partials("beam", workspace.beam, q.shape[0], MAX_WIDE_SPLITS, kv, group)
    if beams.groups == 0 or q.shape[0] == 0 or beams.max_width == 0:
        return out
    arch = arch_of(kv.k.device)
    # By the widest group there may ever be, not by this step's: the tile is part of a result's identity.
    tile = tile_config(arch, kv.head_dim, q.dtype, max(SHORT_ROWS, beams.max_width * group), kv.quantised)
    beam_rows(
        q, kv, beams, out, workspace.beam, tile=tile, keys_per_split=wide_split_tokens(arch), score_scale=score_scale,
        window=window,
    )  # fmt: skip
    return out
