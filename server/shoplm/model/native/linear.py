"""Weights in the order in which the C++ decoder reads them: bf16, or integers of 8 or 4 bits."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from shoplm.model.adapter import LowRankPath
from shoplm.model.native.library import LinearRef, NativeLibrary, PackingRef, pointer
from torch import Tensor
from torch.nn import functional

PANEL = 32  # output columns that are multiplied together
MULTIPLE = 64  # of a product's inputs: whole tiles and groups of int8


class WeightFormat(IntEnum):
    """`shoplm::Format`."""

    BF16 = 0
    INT8 = 1
    INT4 = 2

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return 16 >> self


# Inputs that share a scale. 32, as in GGUF files of 4 bits, whose values are then kept as they are; 64: with 192 or a
# whole row, inputs with outliers cost two to six times as much perplexity, and 64 is no slower where weights are read
# from memory.
GROUP = {WeightFormat.INT8: 64, WeightFormat.INT4: 32}


class PackedLinear:
    """y = x W^T + b.

    INT8 is symmetric, INT4 has a lowest value beside its scale; both have one scale for each output column and group of
    inputs. Rows of x are rounded to int8 in every product, with a scale for each group.

    With an adapter beside it, W and the adapter's second matrix are one weight, for x and what the first one gives
    behind it; all in the same format, whose groups never hold inputs of both.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        format: WeightFormat = WeightFormat.BF16,
        path: LowRankPath | None = None,
        measured: bool = False,
    ) -> None:
        """`weight` [out, in] in bf16 or fp32, `bias` [out]; the caller may drop them. `in` is a multiple of 64.
        `measured`: `errors` is wanted, of INT8. Raises ValueError for a weight of another dtype."""
        self._library = library
        self.outputs, self.inputs = weight.shape
        rank = 0
        self._low_rank: PackedLinear | None = None
        if path is not None:
            padded = functional.pad(path.up, (0, -path.up.shape[1] % MULTIPLE))
            rank = padded.shape[1]
            weight = torch.cat((weight, padded), dim=1)
            # It reads the same rows as W: of what it gives itself it must not see anything.
            down = functional.pad(path.down, (0, rank, 0, rank - len(path.down)))
            self._low_rank = PackedLinear(library, down, format=format)
        padding = -self.outputs % PANEL
        if padding:
            weight = functional.pad(weight, (0, 0, 0, padding))
        columns, depth = self.outputs + padding, self.inputs + rank
        group = GROUP.get(format, depth)
        tables = columns * depth // group * format.value  # scales and, of 4 bits, lows
        self._packed = library.memory.take(columns * depth * format.bits // 8)
        self._scales = torch.empty(tables, dtype=torch.float16) if tables else None
        self.errors = torch.empty(columns) if measured else None  # norms of what 8 bits have changed of W's rows
        weight = weight.contiguous()
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"weight is {weight.dtype}, not bfloat16 or float32")
        packing = PackingRef(
            *map(pointer, (weight, self._packed, self._scales, self.errors)),
            *(columns, depth, group, format, weight.dtype == torch.float32),
        )
        library.functions.shoplm_pack(ctypes.byref(packing), torch.get_num_threads())
        self._bias = None if bias is None else functional.pad(bias.float(), (0, padding)).contiguous()
        self.ref: LinearRef = LinearRef(
            pointer(self._packed),
            pointer(self._scales),
            pointer(self._bias),
            None if self._low_rank is None else ctypes.addressof(self._low_rank.ref),
            columns,
            depth,
            group,
            rank,
            format,
        )

    def __call__(self, states: Tensor) -> Tensor:
        """`states` bf16 [rows, in] to bf16 [rows, out]. Raises as `rows_of`."""
        states = self.rows_of(states)
        result = torch.empty(len(states), self.outputs, dtype=torch.bfloat16)
        self._library.functions.shoplm_linear(
            ctypes.byref(self.ref),
            pointer(states),
            len(states),
            self.outputs,
            pointer(result),
            torch.get_num_threads(),
        )
        return result

    def rows_of(self, states: Tensor) -> Tensor:
        """`states` as the C++ code reads them. Raises ValueError unless they are bf16 [rows, in]."""
        if states.dtype != torch.bfloat16 or states.dim() != 2 or states.shape[1] != self.inputs:
            raise ValueError(
                f"states are {states.dtype} {list(states.shape)}, not torch.bfloat16 [rows, {self.inputs}]"
            )
        return states.contiguous()
