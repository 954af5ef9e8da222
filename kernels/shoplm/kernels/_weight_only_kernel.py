# mypy: allow-untyped-decorators
"""The kernel of `weight_only`; see there for the formula and the packing."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Grid (output blocks, row blocks). `x_stride` is in units of 16 elements."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_outputs = output < N
    in_rows = row < rows
    x_rows = x_ptr + (row.to(tl.int64) * (x_stride * 16))[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BITS == 8:
        inputs = tl.arange(0, GROUP)
        w_rows = w_ptr + output.to(tl.int64)[None, :] * K
        for start in range(0, K, GROUP):
            x = tl.load(x_rows + start + inputs[None, :], mask=in_rows[:, None], other=0.0)
            w = tl.load(w_rows + start + inputs[:, None], mask=in_outputs[None, :], other=0)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        acc = acc * tl.load(scale_ptr + output, mask=in_outputs, other=0.0)[None, :]
    else:
        half: tl.constexpr = GROUP // 2
        inputs = tl.arange(0, half)
        w_rows = w_ptr + output.to(tl.int64)[None, :] * (K // 2)
        for group in range(K // GROUP):
            packed = tl.load(w_rows + group * half + inputs[:, None], mask=in_outputs[None, :], other=0)
            # As signed bytes: a shift to the right repeats the sign.
            signed = packed.to(tl.int8, bitcast=True)
            low = (signed << 4) >> 4
            high = signed >> 4
            columns = x_rows + group * GROUP + inputs[None, :]
            x_low = tl.load(columns, mask=in_rows[:, None], other=0.0)
            x_high = tl.load(columns + half, mask=in_rows[:, None], other=0.0)
            part = tl.dot(x_low, low.to(x_low.dtype), input_precision="ieee")
            part = tl.dot(x_high, high.to(x_high.dtype), part, input_precision="ieee")
            scale = tl.load(scale_ptr + output.to(tl.int64) * (K // GROUP) + group, mask=in_outputs, other=0.0)
            acc += part * scale[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * N + output[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_outputs[None, :])
