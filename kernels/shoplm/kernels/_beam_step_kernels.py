# mypy: allow-untyped-decorators
"""The five kernels of `beam_step`; see there for the formula and how they follow one another."""

from __future__ import annotations

import triton
import triton.language as tl
from shoplm.kernels._selection import choose_top, key_score, ordered_key


@triton.jit(
    do_not_specialize=[
        "logits_ptr",
        "first_row_ptr",
        "node_ptr",
        "node_stride",
        "width_ptr",
        "max_live",
    ]
)
def lse_kernel(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    first_row_ptr: tl.tensor,
    node_ptr: tl.tensor,
    node_stride: tl.tensor,
    width_ptr: tl.tensor,
    child_start_ptr: tl.tensor,
    child_code_ptr: tl.tensor,
    partial_max_ptr: tl.tensor,
    partial_sum_ptr: tl.tensor,
    max_live: tl.tensor,
    PIECE: tl.constexpr,
) -> None:
    """Grid (pieces, max_live, groups): max and sum of exponentials of one piece of one beam's children."""
    piece = tl.program_id(0)
    beam = tl.program_id(1)
    group = tl.program_id(2)
    if beam >= tl.load(width_ptr + group):
        return
    node = tl.load(node_ptr + group.to(tl.int64) * node_stride + beam)
    start = tl.load(child_start_ptr + node)
    count = tl.load(child_start_ptr + node + 1) - start
    if piece * PIECE >= count:
        return
    child = piece * PIECE + tl.arange(0, PIECE)
    inside = child < count
    code = tl.load(child_code_ptr + start + child, mask=inside, other=0)
    row = (tl.load(first_row_ptr + group) + beam).to(tl.int64)
    logit = tl.load(logits_ptr + row * logits_stride + code, mask=inside, other=float("-inf")).to(tl.float32)
    largest = tl.max(logit, axis=0)
    # A piece of only -inf has no mass: exp(-inf - 0) = 0, where exp(-inf + inf) would be NaN.
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    target = (group.to(tl.int64) * max_live + beam) * tl.num_programs(0) + piece
    tl.store(partial_max_ptr + target, largest)
    tl.store(partial_sum_ptr + target, tl.sum(tl.exp(logit - reference), axis=0))


@triton.jit(
    do_not_specialize=[
        "node_ptr",
        "node_stride",
        "width_ptr",
        "max_live",
        "pieces",
    ]
)
def plan_kernel(
    node_ptr: tl.tensor,
    node_stride: tl.tensor,
    width_ptr: tl.tensor,
    child_start_ptr: tl.tensor,
    partial_max_ptr: tl.tensor,
    partial_sum_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    max_live: tl.tensor,
    pieces: tl.tensor,
    PIECE: tl.constexpr,
    BEAMS: tl.constexpr,
    PIECES_AT_ONCE: tl.constexpr,
) -> None:
    """Grid (groups): candidate offsets and log-sum-exp of every beam of a group."""
    group = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, BEAMS)
    live = beam < tl.load(width_ptr + group)
    node = tl.load(node_ptr + group * node_stride + beam, mask=live, other=0)
    start = tl.load(child_start_ptr + node, mask=live, other=0)
    count = tl.load(child_start_ptr + node + 1, mask=live, other=0) - start
    end = tl.cumsum(count, axis=0)
    first = group * (max_live + 1)
    tl.store(offset_ptr + first + beam, end - count, mask=beam < max_live)
    tl.store(offset_ptr + first + max_live, tl.sum(count, axis=0))
    tl.store(shift_ptr + group * max_live + beam, start - (end - count), mask=live)

    used = (count + PIECE - 1) // PIECE
    most = tl.max(used, axis=0)
    largest = tl.full([BEAMS], float("-inf"), tl.float32)
    total = tl.zeros([BEAMS], tl.float32)
    for first_piece in range(0, most, PIECES_AT_ONCE):
        piece = first_piece + tl.arange(0, PIECES_AT_ONCE)
        exists = piece[None, :] < used[:, None]
        source = ((group * max_live + beam) * pieces)[:, None] + piece[None, :]
        part_max = tl.load(partial_max_ptr + source, mask=exists, other=float("-inf"))
        part_sum = tl.load(partial_sum_ptr + source, mask=exists, other=0.0)
        new_max = tl.maximum(largest, tl.max(part_max, axis=1))
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        parts = tl.sum(part_sum * tl.exp(part_max - reference[:, None]), axis=1)
        total = total * tl.exp(largest - reference) + parts
        largest = new_max
    tl.store(lse_ptr + group * max_live + beam, largest + tl.log(total), mask=live)


@triton.jit
def _beam_of(candidate: tl.tensor, offsets_ptr: tl.tensor, max_live: tl.tensor, BEAMS: tl.constexpr) -> tl.tensor:
    """The beam that owns each candidate: the last one whose first candidate is not after it, by bisection."""
    beam = candidate * 0
    if BEAMS > 1:
        half = BEAMS // 2
        while half > 0:
            trial = beam + half
            begins = tl.load(offsets_ptr + trial, mask=trial < max_live, other=0x7FFFFFFF)
            beam = tl.where(begins <= candidate, trial, beam)
            half = half // 2
    return beam


@triton.jit
def _keep_top(
    keys: tl.tensor,
    indices: tl.tensor,
    k: tl.tensor,
    key_ptr: tl.tensor,
    index_ptr: tl.tensor,
    max_select: tl.tensor,
    SELECT: tl.constexpr,
) -> tl.tensor:
    """Write a tile's top `k` to `max_select` consecutive places, in candidate order, key 0 behind them."""
    chosen, position, count = choose_top(keys, k)
    tl.store(key_ptr + position, keys.to(tl.int32, bitcast=True), mask=chosen)
    tl.store(index_ptr + position, indices, mask=chosen)
    place = tl.arange(0, SELECT)
    tl.store(key_ptr + place, tl.zeros([SELECT], tl.int32), mask=(place >= count) & (place < max_select))
    return count


@triton.jit(
    do_not_specialize=[
        "logits_ptr",
        "first_row_ptr",
        "score_ptr",
        "score_stride",
        "select_ptr",
        "allowed_stride",
        "filter_ptr",
        "bonus_stride",
        "bonus_row_ptr",
        "max_live",
        "max_select",
    ]
)
def tile_kernel(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    first_row_ptr: tl.tensor,
    score_ptr: tl.tensor,
    score_stride: tl.tensor,
    select_ptr: tl.tensor,
    child_code_ptr: tl.tensor,
    item_lo_ptr: tl.tensor,
    item_hi_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    allowed_stride: tl.tensor,
    filter_ptr: tl.tensor,
    bonus_ptr: tl.tensor,
    bonus_stride: tl.tensor,
    bonus_row_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    key_ptr: tl.tensor,
    index_ptr: tl.tensor,
    max_live: tl.tensor,
    max_select: tl.tensor,
    TILE: tl.constexpr,
    BEAMS: tl.constexpr,
    SELECT: tl.constexpr,
    HAS_FILTER: tl.constexpr,
    HAS_BONUS: tl.constexpr,
) -> None:
    """Grid (tiles, groups): score one tile of candidates and keep its top `select`."""
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    offsets_ptr = offset_ptr + group * (max_live + 1)
    total = tl.load(offsets_ptr + max_live)
    if tile * TILE >= total:
        return
    candidate = tile * TILE + tl.arange(0, TILE)
    inside = candidate < total
    beam = _beam_of(candidate, offsets_ptr, max_live, BEAMS)
    row_of_beam = group * max_live + beam
    child = candidate + tl.load(shift_ptr + row_of_beam, mask=inside, other=0)
    code = tl.load(child_code_ptr + child, mask=inside, other=0)
    row = (tl.load(first_row_ptr + group) + beam).to(tl.int64)
    logit = tl.load(logits_ptr + row * logits_stride + code, mask=inside, other=0.0).to(tl.float32)
    log_p = logit - tl.load(lse_ptr + row_of_beam, mask=inside, other=0.0)
    # Where every child is -inf so is the log-sum-exp: the difference would be NaN.
    log_p = tl.where(logit == float("-inf"), float("-inf"), log_p)
    score = tl.load(score_ptr + group * score_stride + beam, mask=inside, other=0.0) + log_p
    if HAS_BONUS:
        bonus_row = bonus_ptr + tl.load(bonus_row_ptr + group).to(tl.int64) * bonus_stride
        item = tl.load(item_lo_ptr + child, mask=inside, other=0)
        score += tl.load(bonus_row + item, mask=inside, other=0.0)
    if HAS_FILTER:
        allowed_row = allowed_ptr + tl.load(filter_ptr + group).to(tl.int64) * allowed_stride
        lo = tl.load(item_lo_ptr + child, mask=inside, other=0)
        hi = tl.load(item_hi_ptr + child, mask=inside, other=0)
        before = tl.load(allowed_row + lo, mask=inside, other=0)
        inside &= tl.load(allowed_row + hi, mask=inside, other=0) > before
    keys = tl.where(inside, ordered_key(score), 0)
    select = tl.minimum(tl.load(select_ptr + group), max_select)
    target = (group * tl.num_programs(0) + tile) * max_select
    _keep_top(keys, candidate, select, key_ptr + target, index_ptr + target, max_select, SELECT)


@triton.jit
def _survivors(total: tl.tensor, max_select: tl.tensor, TILE: tl.constexpr, MERGED: tl.constexpr) -> tl.tensor:
    """Places that the tiles of `total` candidates fill with survivors after `MERGED` merge rounds."""
    tiles = (total + TILE - 1) // TILE
    for _ in tl.static_range(MERGED):
        tiles = (tiles * max_select + TILE - 1) // TILE
    return tiles * max_select


@triton.jit(
    do_not_specialize=[
        "select_ptr",
        "group_stride_in",
        "max_live",
        "max_select",
    ]
)
def merge_kernel(
    select_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    key_in_ptr: tl.tensor,
    index_in_ptr: tl.tensor,
    key_out_ptr: tl.tensor,
    index_out_ptr: tl.tensor,
    group_stride_in: tl.tensor,
    max_live: tl.tensor,
    max_select: tl.tensor,
    TILE: tl.constexpr,
    SELECT: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    """Grid (tiles, groups): keep the top `select` of one tile of survivors. `MERGED`: merge rounds before this one."""
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    total = tl.load(offset_ptr + group * (max_live + 1) + max_live)
    places = _survivors(total, max_select, TILE, MERGED)
    if tile * TILE >= places:
        return
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < places
    source = group * group_stride_in + place
    keys = tl.load(key_in_ptr + source, mask=inside, other=0).to(tl.uint32, bitcast=True)
    indices = tl.load(index_in_ptr + source, mask=inside, other=0)
    target = (group * tl.num_programs(0) + tile) * max_select
    select = tl.minimum(tl.load(select_ptr + group), max_select)
    _keep_top(keys, indices, select, key_out_ptr + target, index_out_ptr + target, max_select, SELECT)


@triton.jit(
    do_not_specialize=[
        "select_ptr",
        "out_stride",
        "group_stride_in",
        "max_live",
        "max_select",
    ]
)
def final_kernel(
    select_ptr: tl.tensor,
    child_code_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    key_in_ptr: tl.tensor,
    index_in_ptr: tl.tensor,
    key_scratch_ptr: tl.tensor,
    index_scratch_ptr: tl.tensor,
    out_score_ptr: tl.tensor,
    out_parent_ptr: tl.tensor,
    out_node_ptr: tl.tensor,
    out_code_ptr: tl.tensor,
    out_width_ptr: tl.tensor,
    out_stride: tl.tensor,
    group_stride_in: tl.tensor,
    max_live: tl.tensor,
    max_select: tl.tensor,
    TILE: tl.constexpr,
    LAST: tl.constexpr,
    BEAMS: tl.constexpr,
    SELECT: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    """Grid (groups): the top `select` of the last survivors, sorted best first, decoded and written out."""
    group = tl.program_id(0).to(tl.int64)
    offsets_ptr = offset_ptr + group * (max_live + 1)
    places = _survivors(tl.load(offsets_ptr + max_live), max_select, TILE, MERGED)
    place = tl.arange(0, LAST)
    source = group * group_stride_in + place
    keys = tl.load(key_in_ptr + source, mask=place < places, other=0).to(tl.uint32, bitcast=True)
    indices = tl.load(index_in_ptr + source, mask=place < places, other=0)
    select = tl.minimum(tl.load(select_ptr + group), max_select)
    key_row = key_scratch_ptr + group * max_select
    index_row = index_scratch_ptr + group * max_select
    count = _keep_top(keys, indices, select, key_row, index_row, max_select, SELECT)
    tl.debug_barrier()  # the compacted survivors were written by other threads of this program

    rank = tl.arange(0, SELECT)
    compact = tl.load(key_row + rank, mask=rank < count, other=0).to(tl.uint32, bitcast=True)
    # Survivors are in candidate order, so the place breaks ties; 32 key bits and 16 place bits fit an int64.
    packed = tl.sort((compact.to(tl.int64) << 16) | (0xFFFF - rank), descending=True)
    live = rank < count
    candidate = tl.load(index_row + (0xFFFF - (packed & 0xFFFF)), mask=live, other=0)
    score = key_score((packed >> 16).to(tl.uint32))
    beam = _beam_of(candidate, offsets_ptr, max_live, BEAMS)
    child = candidate + tl.load(shift_ptr + group * max_live + beam, mask=live, other=0)
    code = tl.load(child_code_ptr + child, mask=live, other=0)
    target = group * out_stride + rank
    inside = rank < max_select
    tl.store(out_score_ptr + target, tl.where(live, score, float("-inf")), mask=inside)
    tl.store(out_parent_ptr + target, tl.where(live, beam, 0), mask=inside)
    tl.store(out_node_ptr + target, tl.where(live, child, 0), mask=inside)
    tl.store(out_code_ptr + target, code, mask=inside)
    tl.store(out_width_ptr + group, count)
