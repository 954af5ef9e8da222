# mypy: allow-untyped-decorators
"""SwiGLU's element-wise half: `silu(gate) * up` of one fused projection.

    y = gate / (1 + exp(-gate)) * up                  (Shazeer 2020, section 2)

`gate` and `up` are the two halves of each row of the [T, 2 * features] product that one GEMM wrote. Computed in fp32,
rounded once. Cost: bound by memory, 3 * T * features elements moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor, leading_stride
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import check_aligned

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _swiglu_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < FEATURES
    gate_row = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + FEATURES, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up`, elementwise.

    Args:
        gate_up: [T, 2 * features], fp32, fp16 or bf16; gate in the first half of each row. Rows at any stride.
        out: [T, features] of the same dtype. Allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype that the kernel cannot take.
    """
    check_tensor("gate_up", gate_up, (None, None), ACTIVATION_DTYPES, gate_up.device)
    check_aligned("gate_up", gate_up)
    rows, columns = gate_up.shape
    if columns == 0 or columns % 2:
        raise ValueError(f"gate_up has {columns} columns, expected an even number: gate, then up")
    features = columns // 2
    out = gate_up.new_empty(rows, features) if out is None else out
    check_tensor("out", out, (rows, features), (gate_up.dtype,), gate_up.device)
    if rows:
        _swiglu_kernel[(rows, triton.cdiv(features, BLOCK))](
            gate_up,
            out,
            leading_stride(gate_up),
            leading_stride(out),
            FEATURES=features,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Feed-forward widths of a 135M and a 7B model; in full one that no vector divides too."""
    element = pointer(torch.bfloat16)
    return [
        make_cell(
            "swiglu",
            _swiglu_kernel,
            {"gate_up_ptr": element, "out_ptr": element, "gate_up_stride": "i32", "out_stride": "i32"},
            {"FEATURES": features, "BLOCK": BLOCK},
            aligned=("gate_up_ptr", "out_ptr", "gate_up_stride", "out_stride"),
            num_warps=NUM_WARPS,
            num_stages=3,
            arch=arch,
            head_dim=0,
            dtype=torch.bfloat16,
            expect_wgmma=False,
            variant=f"features{features}",
        )
        for features in (1536, 18944, *[1501] * full)
    ]
