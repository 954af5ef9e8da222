# mypy: allow-untyped-decorators
"""Rows as e4m3 with an fp32 scale each: the operands of FP8 products.

    scale = max(max |x| / 448, 1e-12)        stored = round(x / scale)        x ~ stored * scale

Both divisions and the rounding are to nearest, ties to even, so that a GPU stores the numbers that the specification
does. The scale of a row with a NaN is NaN, that of one with an infinity is infinity; such a row stores nothing of use,
and no product of it is finite.

Cost: bound by memory, an element read and a byte written; a row stays in registers between its maximum and its scaling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor, leading_stride
from shoplm.kernels._kv_write_kernel import round_to_e4m3
from shoplm.kernels._row_launch import row_launch
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import check_aligned
from shoplm.kernels.reference_ops import E4M3_MAX, SMALLEST_SCALE

MAX_COLUMNS = 32768  # a row lives in the registers of one program
_THREAD_ELEMENTS = 16


@triton.jit
def _quantise_rows_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # Without their signs, the bits of numbers have the numbers' order, and those of NaN are above all.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, QUANT_MAX)
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    tl.store(scale_ptr + row, scale)
    stored = round_to_e4m3(tl.div_rn(x, scale)).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * COLUMNS + columns, stored, mask=inside)


def quantise_rows(
    x: torch.Tensor, *, values: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row as e4m3 with a scale of its own.

    Args:
        x: [T, n], fp32, fp16 or bf16, rows at any stride.
        values: float8_e4m3fn [T, n], contiguous. Allocated when absent.
        scale: fp32 [T, 1], contiguous. Allocated when absent.

    Returns:
        (`values`, `scale`): x ~ values * scale.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype that the kernel cannot take.
    """
    check_tensor("x", x, (None, None), ACTIVATION_DTYPES, x.device)
    check_aligned("x", x)
    rows, columns = x.shape
    if not 0 < columns <= MAX_COLUMNS:
        raise ValueError(f"x has {columns} columns, expected 1 to {MAX_COLUMNS}")
    values = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn) if values is None else values
    scale = x.new_empty(rows, 1, dtype=torch.float32) if scale is None else scale
    check_tensor("values", values, x.shape, (torch.float8_e4m3fn,), x.device, contiguous=True)
    check_tensor("scale", scale, (rows, 1), (torch.float32,), x.device, contiguous=True)
    if rows:
        block, num_warps = row_launch(columns, _THREAD_ELEMENTS)
        _quantise_rows_kernel[(rows,)](
            x, values, scale, leading_stride(x),
            COLUMNS=columns, BLOCK=block, QUANT_MAX=E4M3_MAX, SMALLEST=SMALLEST_SCALE, num_warps=num_warps,
        )  # fmt: skip
    return values, scale


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Inputs of a 1.7B model's layers and the widest of a 7B model's; in full those of a 135M and the widest row. None
    on cards without e4m3."""
    if arch < 89:
        return []
    cells = []
    for columns in (2048, 6144, 18_944, *(576, 1536, 3584, MAX_COLUMNS) * full):
        block, num_warps = row_launch(columns, _THREAD_ELEMENTS)
        cells.append(
            make_cell(
                "quantise_rows",
                _quantise_rows_kernel,
                {
                    "x_ptr": pointer(torch.bfloat16), "values_ptr": pointer(torch.float8_e4m3fn), "scale_ptr": "*fp32",
                    "x_stride": "i32",
                },
                {"COLUMNS": columns, "BLOCK": block, "QUANT_MAX": E4M3_MAX, "SMALLEST": SMALLEST_SCALE},
                aligned=("x_ptr", "values_ptr", "scale_ptr", "x_stride"),
                num_warps=num_warps,
                num_stages=3,
                arch=arch,
                head_dim=0,
                dtype=torch.bfloat16,
                expect_wgmma=False,
                variant=f"columns{columns}",
            )
        )  # fmt: skip
    return cells
