# mypy: allow-untyped-decorators
"""The kernels of `weight_only` and `unpack`; see there for the formula and the packing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale_and_low(scale_ptr: tl.tensor, group: tl.tensor, output: tl.tensor, mask: tl.tensor, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 of one INT4 group of each output: two fp16 numbers in a word, as 4 bytes are the least that is loaded
    ahead."""
    both = tl.load(scale_ptr + group * N + output, mask=mask, other=0)
    scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, low


@triton.jit(do_not_specialize=["rows", "x_stride"])
def weight_only_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (output blocks, row blocks). `x_stride` is in units of 16 elements. A turn takes two groups of inputs."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_outputs = output < N
    in_rows = row < rows
    x_rows = x_ptr + (row.to(tl.int64) * (x_stride * 16))[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BITS == 8:
        inputs = tl.arange(0, 2 * GROUP)
        w_rows = w_ptr + output.to(tl.int64)[None, :] * K
        for start in range(0, K, 2 * GROUP):
            x = tl.load(x_rows + start + inputs[None, :], mask=in_rows[:, None], other=0.0)
            w = tl.load(w_rows + start + inputs[:, None], mask=in_outputs[None, :], other=0)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        acc = acc * tl.load(scale_ptr + output, mask=in_outputs, other=0.0)[None, :]
    else:
        inputs = tl.arange(0, GROUP)
        w_rows = w_ptr + output.to(tl.int64)[None, :] * (K // 2)
        for pair in range(K // (2 * GROUP)):
            packed = tl.load(w_rows + pair * GROUP + inputs[:, None], mask=in_outputs[None, :], other=0)
            columns = x_rows + pair * (2 * GROUP) + inputs[None, :]
            for part in tl.static_range(2):
                x = tl.load(columns + part * GROUP, mask=in_rows[:, None], other=0.0)
                scale, low = _scale_and_low(scale_ptr, 2 * pair + part, output, in_outputs, N)
                w = ((packed >> (4 * part)) & 15).to(tl.float32) * scale[None, :] + low[None, :]
                acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * N + output[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_outputs[None, :])


@triton.jit
def unpack_kernel(
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (output blocks, pairs of groups of inputs)."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.program_id(1)
    in_outputs = output < N
    mask = in_outputs[:, None]
    target = out_ptr + output.to(tl.int64)[:, None] * K + pair * (2 * GROUP)
    if BITS == 8:
        inputs = tl.arange(0, 2 * GROUP)
        w_rows = w_ptr + output.to(tl.int64)[:, None] * K + pair * (2 * GROUP)
        w = tl.load(w_rows + inputs[None, :], mask=mask, other=0).to(tl.float32)
        w = w * tl.load(scale_ptr + output, mask=in_outputs, other=0.0)[:, None]
        tl.store(target + inputs[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        inputs = tl.arange(0, GROUP)
        w_rows = w_ptr + output.to(tl.int64)[:, None] * (K // 2) + pair * GROUP
        packed = tl.load(w_rows + inputs[None, :], mask=mask, other=0)
        for part in tl.static_range(2):
            scale, low = _scale_and_low(scale_ptr, 2 * pair + part, output, in_outputs, N)
            w = ((packed >> (4 * part)) & 15).to(tl.float32) * scale[:, None] + low[:, None]
            tl.store(target + part * GROUP + inputs[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)
