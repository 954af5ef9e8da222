# mypy: allow-untyped-decorators
"""RMSNorm, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight            (Zhang and Sennrich 2019, equation 4)

The fused form first does `residual += x`, rounds the sum to the residual's dtype and normalises the rounded value, so
that it equals the two steps run apart, bit for bit. Everything else is computed in fp32 and rounded once; the root
and quotients of a row are IEEE's, since fast ones add up to more than fp32's own rounding.

Cost: bound by memory. `rms_norm` moves 2 * T * hidden elements, `add_rms_norm` 4 * T * hidden, against 5 * T * hidden
for the unfused pair. One program owns one row, which stays in registers between the reduction and the scaling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor, leading_stride
from shoplm.kernels._row_launch import row_launch
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import check_aligned

MAX_HIDDEN = 16384  # a row lives in the registers of one program
_THREAD_ELEMENTS = 8


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row * residual_stride + columns
        x += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), HIDDEN * 1.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps)) * weight
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Root-mean-square normalisation of every row.

    Args:
        x: [T, hidden], fp32, fp16 or bf16, rows at any stride.
        weight: [hidden], same dtype as `x` or fp32.
        eps: added to the mean square, > 0.
        out: [T, hidden] of `x`'s dtype; may be `x` itself. Allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype that the kernel cannot take.
    """
    _check(x, weight, eps)
    out = torch.empty_like(x) if out is None else out
    check_tensor("out", out, x.shape, (x.dtype,), x.device)
    _launch(x, None, weight, out, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual += x` in place, then the normalisation of the new residual.

    Args:
        x: [T, hidden], what the last block produced.
        residual: [T, hidden] of `x`'s dtype, updated in place.
        weight: [hidden], same dtype as `x` or fp32.
        eps: added to the mean square, > 0.
        out: [T, hidden] of `x`'s dtype; may be `x` itself, not `residual`. Allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype that the kernel cannot take.
    """
    _check(x, weight, eps)
    check_tensor("residual", residual, x.shape, (x.dtype,), x.device)
    out = torch.empty_like(x) if out is None else out
    check_tensor("out", out, x.shape, (x.dtype,), x.device)
    if out.data_ptr() == residual.data_ptr() and x.numel():
        raise ValueError("out is residual: the residual stream would be lost; pass another output")
    _launch(x, residual, weight, out, eps)
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    check_tensor("x", x, (None, None), ACTIVATION_DTYPES, x.device)
    hidden = x.shape[1]
    if not 0 < hidden <= MAX_HIDDEN:
        raise ValueError(f"x has {hidden} columns, expected 1 to {MAX_HIDDEN}")
    check_tensor("weight", weight, (hidden,), (x.dtype, torch.float32), x.device)
    check_aligned("x", x)
    if not eps > 0:
        raise ValueError(f"eps is {eps}, expected a positive number")


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    rows, hidden = x.shape
    if rows == 0:
        return
    block, num_warps = row_launch(hidden, _THREAD_ELEMENTS)
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        leading_stride(x),
        leading_stride(x if residual is None else residual),
        leading_stride(out),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=num_warps,
    )


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Hidden sizes of a 135M, a 1.7B and a 7B model; in full those in between and the largest, without residual too."""
    cells = []
    cases = [(576, True), (2048, True), (3584, True), (2048, False)]
    if full:
        cases = [
            (hidden, residual) for hidden in (576, 896, 2048, 3584, 5120, MAX_HIDDEN) for residual in (True, False)
        ]
    for hidden, with_residual in cases:
        block, num_warps = row_launch(hidden, _THREAD_ELEMENTS)
        element = pointer(torch.bfloat16)
        constants: dict[str, object] = {"HIDDEN": hidden, "BLOCK": block, "HAS_RESIDUAL": with_residual}
        if not with_residual:
            constants["residual_ptr"] = None
        types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr"), element)
        types |= dict.fromkeys(("x_stride", "residual_stride", "out_stride"), "i32") | {"eps": "fp32"}
        cells.append(
            make_cell(
                "norm",
                _rms_norm_kernel,
                types,
                constants,
                aligned=tuple(name for name in types if name not in constants and name != "eps"),
                num_warps=num_warps,
                num_stages=3,
                arch=arch,
                head_dim=0,
                dtype=torch.bfloat16,
                expect_wgmma=False,
                variant=f"hidden{hidden}{'' if with_residual else '-plain'}",
            )
        )
    return cells
