"""A product with INT8 or INT4 weights and activations as they are, for few rows, where reading the weight is the time.

    y[m, n] = sum_k x[m, k] * w[n, k]  (+ bias[n]),  w[n, k] = scale[n, k / group] * values[n, k]  (+ low[n, k / group])

INT8 has one scale per output and no low. INT4 has a scale and a lowest value for each `GROUP` = 32 inputs of an output,
values from 0 to 15, rounded to nearest without a calibration: the grid of GGUF's Q4_1, whose models it takes as they
are. Two INT4 values share a byte: of each 64 inputs, byte j holds input j in its low half and input j + 32 in its high
half, so that unpacking is a shift and no shuffle.

Cost: bound by memory up to a few dozen rows: `n * k` bytes for INT8, `n * k * 5 / 8` for INT4, read once per 64 rows.
For more rows the caller does better to multiply with the unpacked weight (`unpack`), which costs that and writing and
reading `2 * n * k` bytes once more, whatever the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor, leading_stride
from shoplm.kernels._weight_only_kernel import unpack_kernel, weight_only_kernel
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import check_aligned

GROUP = 32  # inputs that share an INT4 scale
MULTIPLE = 2 * GROUP  # of inputs: two groups share their bytes, and a turn of the kernel's loop
MAX_ROWS = 64  # most rows for which the kernel is the better way
BLOCK_N = 32
UNPACK_BLOCK_N = 64
NUM_WARPS, NUM_STAGES = 4, 4
_LEAST_SCALE = 2.0**-14  # the smallest that fp16 holds with all its digits


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [n, k] in INT8 or INT4.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """

    values: torch.Tensor  # int8 [n, k], or uint8 [n, k / 2] with two INT4 values a byte
    scale: torch.Tensor  # fp32 [n] for INT8; int32 [k / 32, n] for INT4: words of two fp16, scale and low of a group

    def __post_init__(self) -> None:
        device = self.values.device
        check_tensor("values", self.values, (None, None), (torch.int8, torch.uint8), device, contiguous=True)
        check_aligned("values", self.values)
        if self.inputs % MULTIPLE:
            raise ValueError(f"the weight has {self.inputs} inputs, expected a multiple of {MULTIPLE}")
        groups, dtype = ((), torch.float32) if self.bits == 8 else ((self.inputs // GROUP,), torch.int32)
        check_tensor("scale", self.scale, (*groups, self.outputs), (dtype,), device, contiguous=True)

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
    if inputs % MULTIPLE:
        raise ValueError(f"the weight has {inputs} inputs, expected a multiple of {MULTIPLE}")
    wide = weight.float()
    if bits == 8:
        scale = wide.abs().amax(-1, keepdim=True) / 127
        rounded = torch.round(wide / torch.where(scale > 0, scale, 1.0)).to(torch.int8)
        return QuantisedWeight(rounded, scale[:, 0])
    grouped = wide.view(outputs, -1, GROUP)
    low = grouped.amin(-1, keepdim=True).half()
    scale = ((grouped.amax(-1, keepdim=True) - low.float()) / 15).clamp(min=_LEAST_SCALE).half()
    rounded = torch.round((grouped - low.float()) / scale.float()).clamp(0, 15).to(torch.uint8)
    first, second = rounded.view(outputs, -1, 2, GROUP).unbind(2)
    words = torch.cat((scale, low), -1).transpose(0, 1).contiguous().view(torch.int32)
    return QuantisedWeight((first | (second << 4)).view(outputs, -1), words[..., 0])


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[n, k] of `dtype`, by torch: on any device, with several copies in fp32 beside it."""
    if weight.bits == 8:
        return (weight.values.float() * weight.scale[:, None]).to(dtype)
    packed = weight.values.view(weight.outputs, -1, GROUP)
    grouped = torch.stack((packed & 15, packed >> 4), 2).view(weight.outputs, -1, GROUP).float()
    scale, low = weight.scale.t()[..., None].view(torch.float16).float().chunk(2, -1)
    return (grouped * scale + low).view(weight.outputs, weight.inputs).to(dtype)


def unpack(weight: QuantisedWeight, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight itself: value times scale, plus low, in fp32 and rounded once.

    Args:
        weight: the quantised weight.
        dtype: of the result: fp32, fp16 or bf16.
        out: [n, k] of `dtype`, contiguous. Allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: `out` has another shape, device or dtype, or `dtype` is none that the kernel writes.
    """
    device = weight.values.device
    out = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device=device) if out is None else out
    check_tensor("out", out, (weight.outputs, weight.inputs), ACTIVATION_DTYPES, device, contiguous=True)
    check_tensor("out", out, (weight.outputs, weight.inputs), (dtype,), device)
    check_aligned("out", out)
    if weight.outputs:
        unpack_kernel[(triton.cdiv(weight.outputs, UNPACK_BLOCK_N), weight.inputs // MULTIPLE)](
            weight.values,
            weight.scale,
            out,
            N=weight.outputs,
            K=weight.inputs,
            BITS=weight.bits,
            GROUP=GROUP,
            BLOCK_N=UNPACK_BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return out


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
    """A product of a 1.7B model with both kinds of weight, for few rows and more, and its weight unpacked; in full also
    of a 135M and a 7B model."""
    shapes = [(4096, 2048), *([(576, 1536), (18_944, 3584)] if full else [])]
    kinds = [(outputs, inputs, bits) for outputs, inputs in shapes for bits in (8, 4)]
    products = [_cell(arch, *kind, block_m) for kind in kinds for block_m in (16, 64)]
    return products + [_unpack_cell(arch, *kind) for kind in kinds]


def _cell(arch: int, outputs: int, inputs: int, bits: int, block_m: int) -> AotCell:
    element = pointer(torch.bfloat16)
    types = {"x_ptr": element, "bias_ptr": element, "out_ptr": element, "rows": "i32", "x_stride": "i32"}
    types |= _weight_types(bits)
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


def _unpack_cell(arch: int, outputs: int, inputs: int, bits: int) -> AotCell:
    return make_cell(
        "weight_only",
        unpack_kernel,
        {**_weight_types(bits), "out_ptr": pointer(torch.bfloat16)},
        {"N": outputs, "K": inputs, "BITS": bits, "GROUP": GROUP, "BLOCK_N": UNPACK_BLOCK_N},
        aligned=("w_ptr", "scale_ptr", "out_ptr"),
        num_warps=NUM_WARPS,
        num_stages=3,
        arch=arch,
        head_dim=0,
        dtype=torch.bfloat16,
        expect_wgmma=False,
        variant=f"{outputs}x{inputs}-int{bits}",
    )


def _weight_types(bits: int) -> dict[str, str]:
    return {"w_ptr": "*i8", "scale_ptr": "*fp32"} if bits == 8 else {"w_ptr": "*u8", "scale_ptr": "*i32"}
