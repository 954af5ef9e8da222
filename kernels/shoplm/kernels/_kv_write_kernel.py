# mypy: allow-untyped-decorators
"""The kernel of `kv_write`; see there for the formula."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_halves(
    row_ptr: tl.tensor, dims: tl.tensor, inside: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of each head of a tile, fp32: ([heads, half], [heads, half])."""
    first = tl.load(row_ptr + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row_ptr + HALF + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _normalise(
    first: tl.tensor,
    second: tl.tensor,
    weight_ptr: tl.tensor,
    dims: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMSNorm of each head."""
    mean_square = tl.div_rn(tl.sum(first * first + second * second, axis=1), 2.0 * HALF)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    inside = dims < HALF
    first_weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + dims, mask=inside, other=0.0).to(tl.float32)
    return first * inverse * first_weight[None, :], second * inverse * second_weight[None, :]


@triton.jit
def _rotation(
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    inv_freq_ptr: tl.tensor,
    position: tl.tensor,
    dims: tl.tensor,
    HALF: tl.constexpr,
    HAS_TABLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of the position's angles, fp32 [1, half]."""
    inside = dims < HALF
    if HAS_TABLE:
        row = position.to(tl.int64) * HALF + dims
        cos = tl.load(cos_ptr + row, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row, mask=inside, other=0.0).to(tl.float32)
    else:
        angle = position.to(tl.float32) * tl.load(inv_freq_ptr + dims, mask=inside, other=0.0)
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    return cos[None, :], sin[None, :]


@triton.jit
def round_to_e4m3(x: tl.tensor) -> tl.tensor:
    """Nearest e4m3 value (ties to even) of |x| <= 448, still fp32: the conversion that follows is then exact.

    Converters differ in how they round; the bits in the pool must not depend on which one runs.
    """
    bits = x.to(tl.int32, bitcast=True)
    # Keep three mantissa bits: add half of the last kept bit's weight (less one where that bit is even), then cut.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 the step is 2^-9: adding 1.5 * 2^14 leaves fp32 exactly that step, rounded to even by the addition.
    subnormal = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def _store_halves(
    cache_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    cache_row: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    dims: tl.tensor,
    head_inside: tl.tensor,
    HALF: tl.constexpr,
    QUANT_MAX: tl.constexpr,
) -> None:
    """Write each head of the tile to its row of the pool (viewed as [rows, head_dim]), quantised where asked."""
    inside = head_inside[:, None] & (dims < HALF)[None, :]
    if QUANT_MAX is not None:
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        # The stored scale is the one that readers multiply by: round it first, then divide by the rounded value.
        scale = (largest / QUANT_MAX).to(scale_ptr.dtype.element_ty)
        tl.store(scale_ptr + cache_row, scale, mask=head_inside)
        wide = scale.to(tl.float32)
        inverse = (1.0 / tl.where(wide > 0.0, wide, 1.0))[:, None]  # a head of zeros has scale 0 and codes 0
        first = tl.minimum(tl.maximum(first * inverse, -QUANT_MAX), QUANT_MAX)
        second = tl.minimum(tl.maximum(second * inverse, -QUANT_MAX), QUANT_MAX)
        if cache_ptr.dtype.element_ty == tl.int8:
            first = tl.floor(first + 0.5)
            second = tl.floor(second + 0.5)
        else:
            first = round_to_e4m3(first)
            second = round_to_e4m3(second)
    target = cache_ptr + (cache_row * (2 * HALF))[:, None] + dims[None, :]
    tl.store(target, first.to(cache_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(cache_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["position_ptr", "slot_ptr", "eps"])
def kv_write_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    inv_freq_ptr: tl.tensor,
    position_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    q_out_stride: tl.tensor,
    eps: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    QUANT_MAX: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    dims = tl.arange(0, HALF_BLOCK)
    position = tl.load(position_ptr + token)
    cos, sin = _rotation(cos_ptr, sin_ptr, inv_freq_ptr, position, dims, HALF, HAS_TABLE)
    if block < q_blocks:
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (heads < Q_HEADS)[:, None] & (dims < HALF)[None, :]
        offsets = (heads * (2 * HALF))[:, None]
        first, second = _load_halves(q_ptr + token * q_stride + offsets, dims, inside, HALF)
        if HAS_NORM:
            first, second = _normalise(first, second, q_weight_ptr, dims, eps, HALF)
        target = q_out_ptr + token * q_out_stride + offsets + dims[None, :]
        element = q_out_ptr.dtype.element_ty
        tl.store(target, (first * cos - second * sin).to(element), mask=inside)
        tl.store(target + HALF, (second * cos + first * sin).to(element), mask=inside)
    else:
        heads = (block - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (heads < KV_HEADS)[:, None] & (dims < HALF)[None, :]
        offsets = (heads * (2 * HALF))[:, None]
        slot = tl.load(slot_ptr + token)
        # A padding token of a captured step has a negative slot: it has nowhere to go.
        writes = (heads < KV_HEADS) & (slot >= 0)
        cache_row = (slot // PAGE_SIZE * KV_HEADS + heads) * PAGE_SIZE + slot % PAGE_SIZE
        first, second = _load_halves(k_ptr + token * k_stride + offsets, dims, inside, HALF)
        if HAS_NORM:
            first, second = _normalise(first, second, k_weight_ptr, dims, eps, HALF)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        _store_halves(k_cache_ptr, k_scale_ptr, cache_row, rotated, second, dims, writes, HALF, QUANT_MAX)
        first, second = _load_halves(v_ptr + token * v_stride + offsets, dims, inside, HALF)
        _store_halves(v_cache_ptr, v_scale_ptr, cache_row, first, second, dims, writes, HALF, QUANT_MAX)
