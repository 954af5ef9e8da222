"""A product with INT8 or INT4 weights and activations as they are, for few rows, where reading the weight is the time.

    y[m, n] = sum_g scale[n, g] * sum_{k in g} x[m, k] * w[n, k]  (+ bias[n])

INT8 has one scale per output row (one group), INT4 one per row and `GROUP` = 64 inputs: symmetric, rounded to nearest,
without a correction by calibration. Two INT4 values share a byte: byte j of a group holds input j in its low half and
input j + 32 in its high half, so that unpacking is two shifts and no shuffle.

Cost: bound by memory up to a few dozen rows: `n * k` bytes for INT8, `n * k / 2 + n * k / 16` for INT4, read once per
64 rows. For more rows the caller does better to multiply with the dequantised weight (`dequantise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor, leading_stride
from shoplm.kernels._weight_only_kernel import weight_only_kernel
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import check_aligned

GROUP = 64  # inputs that share an INT4 scale, and inputs per turn of the kernel's loop
MAX_ROWS = 64  # most rows for which the kernel is the better way
BLOCK_N = 32
NUM_WARPS, NUM_STAGES = 4, 4


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [n, k] in INT8 or INT4.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """

    values: torch.Tensor  # int8 [n, k], or uint8 [n, k / 2] with two INT4 values a byte
    scale: torch.Tensor  # fp32 [n, groups]: 1 group for INT8, k / 64 for INT4

    def __post_init__(self) -> None:
        device = self.values.device
        check_tensor("values", self.values, (None, None), (torch.int8, torch.uint8), device, contiguous=True)
        check_aligned("values", self.values)
        if self.inputs % GROUP:
            raise ValueError(f"the weight has {self.inputs} inputs, expected a multiple of {GROUP}")
        groups = 1 if self.bits == 8 else self.inputs // GROUP
        check_tensor("scale", self.scale, (self.outputs, groups), (torch.float32,), device, contiguous=True)

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def outputs(self) -> int:
        """n."""
        return self.values.shape[0]

    @property
    def inputs(self) -> int:
        """k."""
        return self.values.shape[1] * 8 // self.bits


def quantise(weight: torch.Tensor, bits: int) -> QuantisedWeight:
    """`weight` [n, k], any float dtype, with 8 or 4 bits. Raises ValueError for other bits, or k no multiple of 64."""
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}, expected 8 or 4")
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"the weight has {inputs} inputs, expected a multiple of {GROUP}")
    limit = 2 ** (bits - 1) - 1
    grouped = weight.float().view(outputs, 1 if bits == 8 else inputs // GROUP, -1)
    scale = grouped.abs().amax(-1) / limit
    rounded = torch.round(grouped / torch.where(scale > 0, scale, 1.0)[..., None]).to(torch.int8)
    if bits == 8:
        return QuantisedWeight(rounded.view(outputs, inputs), scale)
    low, high = rounded.view(torch.uint8).chunk(2, -1)
    return QuantisedWeight(((low & 15) | (high << 4)).view(outputs, -1), scale)


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[n, k] of `dtype`."""
    if weight.bits == 8:
        return (weight.values.float() * weight.scale).to(dtype)
    packed = weight.values.view(weight.outputs, -1, GROUP // 2).view(torch.int8)
    low, high = (packed << 4) >> 4, packed >> 4
    values = torch.cat((low, high), -1).float() * weight.scale[..., None]
    return values.view(weight.outputs, weight.inputs).to(dtype)


def weight_only(
    x: torch.Tensor, weight: QuantisedWeight, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` times the weight transposed.

    Args:
        x: [m, k], fp32, fp16 or bf16, rows at any stride that is a multiple of 16.
        weight: the quantised weight.
        bias: [n] of `x`'s dtype; None: none.
        out: [m, n] of `x`'s dtype, contiguous. Allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype that the kernel cannot take.
    """
    check_tensor("x", x, (None, weight.inputs), ACTIVATION_DTYPES, weight.values.device)
    check_aligned("x", x)
    stride = leading_stride(x)
    if stride % 16:
        raise ValueError(f"x has row stride {stride}, expected a multiple of 16 elements")
    rows = x.shape[0]
    out = torch.empty(rows, weight.outputs, dtype=x.dtype, device=x.device) if out is None else out
    check_tensor("out", out, (rows, weight.outputs), (x.dtype,), x.device, contiguous=True)
    if bias is not None:
        check_tensor("bias", bias, (weight.outputs,), (x.dtype,), x.device)
    if rows == 0:
        return out
    block_m = 16 if rows <= 16 else 64
    weight_only_kernel[(triton.cdiv(weight.outputs, BLOCK_N), triton.cdiv(rows, block_m))](
        x,
        weight.values,
        weight.scale,
        bias,
        out,
        rows,
        stride // 16,
        N=weight.outputs,
        K=weight.inputs,
        BITS=weight.bits,
        GROUP=GROUP,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """A product of a 1.7B model with both kinds of weight, for few rows and more; in full also of a 135M model."""
    shapes = [(4096, 2048), *([(576, 1536), (18_944, 3584)] if full else [])]
    return [
        _cell(arch, outputs, inputs, bits, block_m)
        for outputs, inputs in shapes
        for bits in (8, 4)
        for block_m in (16, 64)
    ]


def _cell(arch: int, outputs: int, inputs: int, bits: int, block_m: int) -> AotCell:
    element = pointer(torch.bfloat16)
    types = {"x_ptr": element, "bias_ptr": element, "out_ptr": element, "scale_ptr": "*fp32"}
    types |= {"w_ptr": "*i8" if bits == 8 else "*u8", "rows": "i32", "x_stride": "i32"}
    constants: dict[str, object] = {"N": outputs, "K": inputs, "BITS": bits, "GROUP": GROUP, "BLOCK_M": block_m}
    return make_cell(
        "weight_only",
        weight_only_kernel,
        types,
        constants | {"BLOCK_N": BLOCK_N, "bias_ptr": None},
        aligned=("x_ptr", "out_ptr", "scale_ptr", "w_ptr"),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        arch=arch,
        head_dim=0,
        dtype=torch.bfloat16,
        expect_wgmma=False,
        variant=f"{outputs}x{inputs}-int{bits}-m{block_m}",
    )
