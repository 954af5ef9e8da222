# mypy: allow-untyped-decorators
"""Beam attention: all beams of a request over its shared prompt as one matrix product, own tokens in the reduce.

Beam b of group g at step s stands at position P + s, P = prompt_len[g]. It sees the prompt's P keys and the s + 1 own
tokens on its path: a(s) = b, a(t - 1) = parents[g, t, a(t)], key of step t in pool slot own_slots[g, t, a(t)].

    out[b, h] = sum_j softmax_j(scale * q[b, h] . k[j]) v[j]        j over prompt keys and own tokens

1. `_beam_prompt_kernel`: rows = beams x group heads, so a prompt page is read once per KV head for all beams (once per
   128 rows, which share it through L2). Keys are cut into at most MAX_WIDE_SPLITS splits by the prompt's own length.
2. `_beam_reduce_kernel`: one program per beam and KV head merges the splits and walks the parents over the own tokens.

KV is never copied or moved. Sources: shared-prefix decoding as in Hydragen (Juravsky et al. 2024); FlashAttention-2.
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
    split_plan,
)
from shoplm.kernels.aot import AotCell, AttentionShape, attention_shapes
from shoplm.kernels.tile_config import (
    MAX_WIDE_SPLITS,
    SHORT_ROWS,
    TileConfig,
    padded_head_dim,
    tile_config,
    wide_split_tokens,
)

if TYPE_CHECKING:
    from shoplm.kernels.inputs import BeamGroups, PagedKv
    from shoplm.kernels.workspace import Partials


@triton.jit(
    do_not_specialize=["page_table_ptr", "prompt_len_ptr", "query_start_ptr", "width_ptr", "step_ptr", "groups",
                       "max_pages", "window", "score_scale", "q_stride"]
)  # fmt: skip
def _beam_prompt_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    prompt_len_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    width_ptr: tl.tensor,
    step_ptr: tl.tensor,
    groups: tl.tensor,
    max_pages: tl.tensor,
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
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    slot = tl.program_id(0)  # fastest: the tiles of one split run together and share its pages through L2
    split = tl.program_id(1)
    kv_head = tl.program_id(2)
    group = owning_row(query_start_ptr, groups, slot, GROUP, BLOCK_M)
    if group < 0:
        return
    first_token = tl.load(query_start_ptr + group)
    packed_rows = tl.load(width_ptr + group) * GROUP
    first_packed = (slot - first_tile_slot(first_token, group, GROUP, BLOCK_M)) * BLOCK_M
    prompt_len = tl.load(prompt_len_ptr + group)
    position = prompt_len + tl.load(step_ptr + group)
    start, split_tokens, count = split_plan(
        position, prompt_len, window, SPLIT_TOKENS, MAX_SPLITS, BLOCK_N, HAS_WINDOW
    )  # fmt: skip
    if first_packed >= packed_rows or split >= count:
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
        page_table_ptr + group.to(tl.int64) * max_pages, kv_head, first_key,
        tl.minimum(first_key + split_tokens, prompt_len), position,
        tl.full([BLOCK_M], 0, tl.int32) + position, window, score_scale, KV_HEADS, PAGE_SIZE, HEAD_DIM,
        HEAD_DIM_PADDED, BLOCK_N, HAS_WINDOW, QUANTISED,
    )  # fmt: skip

    out, lse = normalise(acc, row_max, row_sum)
    token = (first_token + packed // GROUP).to(tl.int64)
    partial = ((token * MAX_SPLITS + split) * KV_HEADS + kv_head) * GROUP + packed % GROUP
    dims = tl.arange(0, HEAD_DIM_PADDED)
    mask = in_tile[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(partial_ptr + partial[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)
    tl.store(partial_lse_ptr + partial, lse, mask=in_tile)


@triton.jit
def _prompt_splits(
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    token: tl.tensor,
    kv_head: tl.tensor,
    count: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Merge a beam's prompt splits: unnormalised output, maximum, sum. Static: all loads are in flight at once."""
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    in_head = dims < HEAD_DIM
    in_group = heads < GROUP
    mask = in_group[:, None] & in_head[None, :]
    acc = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    for split in tl.static_range(MAX_SPLITS):
        exists = split < count
        index = ((token.to(tl.int64) * MAX_SPLITS + split) * KV_HEADS + kv_head) * GROUP + heads
        lse = tl.load(partial_lse_ptr + index, mask=in_group & exists, other=float("-inf"))
        part = tl.load(partial_ptr + index[:, None] * HEAD_DIM + dims[None, :], mask=mask & exists, other=0.0)
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - shift)
        decay = tl.exp2(top - shift)
        acc = acc * decay[:, None] + weight[:, None] * part
        total = total * decay + weight
        top = new_top
    return acc, top, total


@triton.jit(
    do_not_specialize=["prompt_len_ptr", "query_start_ptr", "width_ptr", "step_ptr", "own_slots_ptr", "parents_ptr",
                       "groups", "max_steps", "max_width", "window", "score_scale", "q_stride", "out_stride"]
)  # fmt: skip
def _beam_reduce_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    prompt_len_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    width_ptr: tl.tensor,
    step_ptr: tl.tensor,
    own_slots_ptr: tl.tensor,
    parents_ptr: tl.tensor,
    groups: tl.tensor,
    max_steps: tl.tensor,
    max_width: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    group = tl.full([], -1, tl.int32)
    for first_group in range(0, groups, 128):
        candidates = first_group + tl.arange(0, 128)
        exists = candidates < groups
        first = tl.load(query_start_ptr + candidates, mask=exists, other=0)
        group += tl.sum((exists & (first <= token)).to(tl.int32), 0)
    if group < 0:
        return
    beam = token - tl.load(query_start_ptr + group)
    if beam >= tl.load(width_ptr + group):
        return
    prompt_len = tl.load(prompt_len_ptr + group)
    step = tl.load(step_ptr + group)
    _, _, count = split_plan(
        prompt_len + step, prompt_len, window, SPLIT_TOKENS, MAX_SPLITS, BLOCK_N, HAS_WINDOW
    )  # fmt: skip

    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    in_head = dims < HEAD_DIM
    mask = (heads < GROUP)[:, None] & in_head[None, :]
    acc, top, total = _prompt_splits(
        partial_ptr, partial_lse_ptr, token, kv_head, count, GROUP, GROUP_PADDED, KV_HEADS, HEAD_DIM, HEAD_DIM_PADDED,
        MAX_SPLITS,
    )  # fmt: skip

    # Own tokens, newest first: each is one key, the next ancestor is its parent.
    query_row = q_ptr + token.to(tl.int64) * (q_stride * 16) + kv_head * (GROUP * HEAD_DIM)
    q = tl.load(query_row + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    ancestor = beam
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(step - window + 1, 0)
    for back in range(step - oldest + 1):
        entry = (group.to(tl.int64) * max_steps + step - back) * max_width + ancestor
        slot = tl.load(own_slots_ptr + entry)
        pool_row = (slot // PAGE_SIZE * KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE
        k = tl.load(k_ptr + pool_row * HEAD_DIM + dims, mask=in_head, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + pool_row * HEAD_DIM + dims, mask=in_head, other=0.0).to(tl.float32)
        if QUANTISED:
            k = k * tl.load(k_scale_ptr + pool_row).to(tl.float32)
            v = v * tl.load(v_scale_ptr + pool_row).to(tl.float32)
        score = tl.sum(q * k[None, :], 1) * score_scale
        new_top = tl.maximum(top, score)
        weight = tl.exp2(score - new_top)
        decay = tl.exp2(top - new_top)
        acc = acc * decay[:, None] + weight[:, None] * v[None, :]
        total = total * decay + weight
        top = new_top
        ancestor = tl.load(parents_ptr + entry, mask=back < step, other=0)

    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out_row = out_ptr + token.to(tl.int64) * (out_stride * 16) + kv_head * (GROUP * HEAD_DIM)
    tl.store(out_row + heads[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)


def _reduce_warps(head_dim: int, group: int) -> int:
    """About 16 fp32 elements of each [group, head_dim] operand a thread."""
    elements = padded_head_dim(head_dim) << (group - 1).bit_length()
    return max(1, min(4, elements // 512))


def beam_rows(
    q: torch.Tensor,
    kv: PagedKv,
    beams: BeamGroups,
    out: torch.Tensor,
    partials: Partials,
    *,
    tile: TileConfig,
    keys_per_split: int,
    score_scale: float,
    window: int | None,
) -> None:
    """Launch both kernels. Shapes as in `attention.beam_attention`, which validates them."""
    group = q.shape[1] // kv.kv_heads
    window_keys = 0 if window is None else window
    splits = min(MAX_WIDE_SPLITS, -(-beams.max_prompt_len // keys_per_split))
    shared = {
        "GROUP": group, "KV_HEADS": kv.kv_heads, "PAGE_SIZE": kv.page_size,
        "HEAD_DIM": kv.head_dim, "HEAD_DIM_PADDED": padded_head_dim(kv.head_dim), "BLOCK_N": tile.block_n,
        "SPLIT_TOKENS": keys_per_split, "MAX_SPLITS": MAX_WIDE_SPLITS, "HAS_WINDOW": window is not None,
        "QUANTISED": kv.quantised,
    }  # fmt: skip
    if splits:
        slots = q.shape[0] * group // tile.block_m + beams.groups
        _beam_prompt_kernel[(slots, splits, kv.kv_heads)](
            q, kv.k, kv.v, kv.k_scale, kv.v_scale, partials.out, partials.lse, beams.page_table, beams.prompt_len,
            beams.query_start, beams.width, beams.step, beams.groups, beams.page_table.shape[1], window_keys,
            score_scale, q.stride(0) // 16, BLOCK_M=tile.block_m, num_warps=tile.num_warps,
            num_stages=tile.num_stages, **shared,
        )  # fmt: skip
    _beam_reduce_kernel[(q.shape[0], kv.kv_heads)](
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, out, partials.out, partials.lse, beams.prompt_len, beams.query_start,
        beams.width, beams.step, beams.own_slots, beams.parents, beams.groups, beams.max_steps, beams.max_width,
        window_keys, score_scale, q.stride(0) // 16, out.stride(0) // 16, GROUP_PADDED=1 << (group - 1).bit_length(),
        num_warps=_reduce_warps(kv.head_dim, group), num_stages=2, **shared,
    )  # fmt: skip


def beam_cells(shape: AttentionShape, arch: int, *, max_width: int) -> list[AotCell]:
    """The cells of both kernels that `beam_rows` launches for groups of at most `max_width` beams."""
    tile = tile_config(arch, shape.head_dim, shape.dtype, max(SHORT_ROWS, max_width * shape.group), shape.quantised)
    splits = {"BLOCK_N": tile.block_n, "SPLIT_TOKENS": wide_split_tokens(arch), "MAX_SPLITS": MAX_WIDE_SPLITS}
    prompt = shape.cell(
        "beam", _beam_prompt_kernel, {"BLOCK_M": tile.block_m, **splits}, arch=arch, num_warps=tile.num_warps,
        num_stages=tile.num_stages, expect_wgmma=arch == 90 and tile.block_m >= 64, label=f"w{max_width}",
    )  # fmt: skip
    reduce = shape.cell(
        "beam", _beam_reduce_kernel, splits, arch=arch, num_warps=_reduce_warps(shape.head_dim, shape.group),
        num_stages=2, expect_wgmma=False, label=f"w{max_width}",
    )  # fmt: skip
    return [prompt, reduce]


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Cells of the budget table: wide groups at every shape, narrow groups at the first."""
    shapes = attention_shapes(arch, full=full)
    narrow = shapes if full else shapes[:1]
    wide = shapes if full else shapes[:3:2]
    cells = [cell for shape in wide for cell in beam_cells(shape, arch, max_width=256)]
    return cells + [beam_cells(shape, arch, max_width=64 // shape.group)[0] for shape in narrow]
