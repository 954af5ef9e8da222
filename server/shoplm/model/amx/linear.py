"""Weights in the order in which AMX tiles read them, bf16 or int8."""

from __future__ import annotations

import ctypes

import torch
from shoplm.model.amx.library import LinearRef, amx_library, pointer
from torch import Tensor
from torch.nn import functional

PANEL = 32  # output columns that are multiplied together
_DEPTH = {torch.bfloat16: 32, torch.int8: 64}  # inputs of one tile


class PackedLinear:
    """y = x W^T + b. int8: symmetric, one scale per output column here, one per row of x in every product."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, int8: bool) -> None:
        """`weight` [out, in], `bias` [out]; the caller may drop them. `in` is a multiple of a tile's depth."""
        self.outputs, self.inputs = weight.shape
        padding = -self.outputs % PANEL
        self._scales: Tensor | None = None
        if int8:
            wide = weight.float()
            scales = wide.abs().amax(dim=1).clamp_(min=1e-12) / 127
            weight = (wide / scales[:, None]).round_().to(torch.int8)
            self._scales = functional.pad(scales, (0, padding)).contiguous()
        else:
            weight = weight.to(torch.bfloat16)
        self._packed = _pack(functional.pad(weight, (0, 0, 0, padding)) if padding else weight)
        self._bias = None if bias is None else functional.pad(bias.float(), (0, padding)).contiguous()
        self.ref = LinearRef(
            pointer(self._packed), pointer(self._scales), pointer(self._bias), self.outputs + padding, self.inputs
        )

    def __call__(self, states: Tensor) -> Tensor:
        """`states` bf16 [rows, in] to bf16 [rows, out]."""
        states = states.contiguous()
        result = torch.empty(len(states), self.outputs, dtype=torch.bfloat16)
        amx_library().shoplm_linear(
            ctypes.byref(self.ref),
            pointer(states),
            len(states),
            self.outputs,
            pointer(result),
            torch.get_num_threads(),
        )
        return result


def _pack(weight: Tensor) -> Tensor:
    """[out, in] to [out / 32][in / depth][2][16 groups of inputs][16 outputs][depth / 16 inputs]."""
    outputs, inputs = weight.shape
    depth = _DEPTH[weight.dtype]
    tiles = weight.view(outputs // PANEL, 2, 16, inputs // depth, 16, depth // 16)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
