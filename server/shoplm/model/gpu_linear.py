"""Linear layers of the GPU backend, by weight format: as the model has them, FP8, INT8 or INT4.

- model: cuBLAS.
- fp8: e4m3 with a scale per output row, activations with a scale per token by `kernels.quantise_rows`,
  `torch._scaled_mm`: half the bytes and twice the peak of bf16, on compute capability 8.9 and later.
- int8, int4: the weight alone; few rows by `kernels.weight_only`, more by cuBLAS with the weight unpacked in
  passing.

An adapter that is kept apart is two more products of cuBLAS, in the model's dtype whatever the weight's format is.

Embeddings, norms, biases and the LM head keep the model's dtype.
"""

from __future__ import annotations

from typing import Protocol

import torch
from shoplm.errors import ConfigurationError
from shoplm.kernels.quantise_rows import MAX_COLUMNS, quantise_rows
from shoplm.kernels.weight_only import MAX_ROWS, MULTIPLE, quantise, unpack, weight_only
from shoplm.model.adapter import LowRankPath
from torch import Tensor
from torch.nn import functional

WEIGHT_FORMATS = ("model", "int8", "int4", "fp8")
FP8_MULTIPLE = 16  # of both sizes of an FP8 weight


class GpuLinear(Protocol):
    """y = x W^T + b."""

    def __call__(self, states: Tensor) -> Tensor:
        """`states` [rows, in] to [rows, out], of the same dtype."""
        ...


class DenseLinear:
    """The weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, states: Tensor) -> Tensor:
        return functional.linear(states, self._weight, self._bias)


class Fp8Linear:
    """Both operands in e4m3, scales per row of either, the sum in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self._values, self._scale = quantise_rows(weight)

    def __call__(self, states: Tensor) -> Tensor:
        values, scale = quantise_rows(states)
        if states.device.type != "cuda":  # the same numbers, multiplied in fp32
            product = (values.float() * scale) @ (self._values.float() * self._scale).t()
            result = product.to(states.dtype)
        else:
            # bf16 is the one result with row scales that torch has on every card. Fast sums would keep 14 bits on an
            # H100, where the quality gate has measured those of fp32.
            result = torch._scaled_mm(
                values,
                self._values.t(),
                scale_a=scale,
                scale_b=self._scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=False,
            ).to(states.dtype)
        return result if self._bias is None else result + self._bias


class WeightOnlyLinear:
    """The weight in 8 or 4 bits, activations as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        self._bias = bias
        self._weight = quantise(weight, bits)

    def __call__(self, states: Tensor) -> Tensor:
        if len(states) <= MAX_ROWS:
            return weight_only(states, self._weight, self._bias)
        return functional.linear(states, unpack(self._weight, states.dtype), self._bias)


class AdaptedLinear:
    """A layer with an adapter beside it."""

    def __init__(self, linear: GpuLinear, path: LowRankPath) -> None:
        self._linear, self._down, self._up = linear, path.down, path.up.t()

    def __call__(self, states: Tensor) -> Tensor:
        return self._linear(states).addmm_(functional.linear(states, self._down), self._up)


def make_linear(
    weight: Tensor, bias: Tensor | None, weight_format: str, device: torch.device, path: LowRankPath | None = None
) -> GpuLinear:
    """A layer of `weight` [out, in] on `device`, with what an adapter does beside it. Raises ConfigurationError where
    the format does not suit the weight."""
    linear = _linear(weight, bias, weight_format, device)
    return linear if path is None else AdaptedLinear(linear, path.to(weight.dtype, device))


def _linear(weight: Tensor, bias: Tensor | None, weight_format: str, device: torch.device) -> GpuLinear:
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    outputs, inputs = weight.shape
    if weight_format == "model":
        return DenseLinear(weight, bias)
    if weight_format == "fp8":
        if outputs % FP8_MULTIPLE or inputs % FP8_MULTIPLE:
            raise ConfigurationError(
                f"weight_format fp8 needs multiples of {FP8_MULTIPLE}, but a layer is {outputs} x {inputs}"
            )
        if inputs > MAX_COLUMNS:
            raise ConfigurationError(f"weight_format fp8 takes at most {MAX_COLUMNS} inputs, but a layer has {inputs}")
        return Fp8Linear(weight, bias)
    bits = {"int8": 8, "int4": 4}.get(weight_format)
    if bits is None:
        raise ConfigurationError(f"weight_format {weight_format!r} is not one of: {', '.join(WEIGHT_FORMATS)}")
    if inputs % MULTIPLE:
        raise ConfigurationError(
            f"weight_format {weight_format} needs layers with a multiple of {MULTIPLE} inputs, but one has {inputs}"
        )
    return WeightOnlyLinear(weight, bias, bits)
