"""Linear layers for the CPU, packed once for oneDNN where that is faster."""

from __future__ import annotations

import torch
from shoplm.model.adapter import LowRankPath
from torch import Tensor
from torch.nn import functional

_ROWS_HINT = 32  # oneDNN picks a blocking of the weight for about so many rows; it serves all others nearly as well


def packing_supported() -> bool:
    """Whether this CPU and build of torch multiply packed bf16 weights natively."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear:
    """y = x W^T + b. A bf16 weight is reordered once into oneDNN's blocked layout: up to twice as fast as an unpacked
    one for a few rows, whose weight oneDNN reorders in every call. With an adapter beside it, W and the adapter's
    second matrix are one weight, for x and what the first one gives behind it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, path: LowRankPath | None = None) -> None:
        """`weight` [out, in]; the caller may drop it afterwards."""
        self._bias = bias
        self._down = None if path is None else Linear(path.down)
        if path is not None:
            weight = torch.cat((weight, path.up), dim=1)
        self._packed = weight.dtype == torch.bfloat16 and packing_supported()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if self._packed else weight

    def __call__(self, states: Tensor) -> Tensor:
        """`states` [rows, in] to [rows, out]."""
        states = self._inputs(states)
        if not self._packed:
            return functional.linear(states, self._weight, self._bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(states, self._weight, self._bias, "none", [], "")
        return result

    def silu(self, states: Tensor) -> Tensor:
        """SiLU(linear(states))."""
        states = self._inputs(states)
        if not self._packed:
            return functional.silu(functional.linear(states, self._weight, self._bias), inplace=True)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(states, self._weight, self._bias, "swish", [], "")
        return result

    def multiply(self, states: Tensor, factor: Tensor) -> Tensor:
        """linear(states) * `factor`."""
        states = self._inputs(states)
        if not self._packed:
            return functional.linear(states, self._weight, self._bias).mul_(factor)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, factor, self._weight, self._bias, "mul")
        return result

    def add(self, states: Tensor, residual: Tensor) -> Tensor:
        """`residual` + linear(states), the addition before the sum is rounded to bf16."""
        states = self._inputs(states)
        if not self._packed:
            return functional.linear(states, self._weight, self._bias).add_(residual)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, residual, self._weight, self._bias, "add")
        return result

    def _inputs(self, states: Tensor) -> Tensor:
        return states if self._down is None else torch.cat((states, self._down(states)), dim=-1)
