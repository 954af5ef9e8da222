"""Weights in the order in which the C++ decoder reads them: bf16, or integers of 8 or 4 bits."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import NamedTuple

import torch
from shoplm.model.adapter import LowRankPath
from shoplm.model.native.library import InstructionSet, LinearRef, NativeLibrary, pointer
from torch import Tensor
from torch.nn import functional

PANEL = 32  # output columns that are multiplied together
MULTIPLE = 64  # of a product's inputs: whole tiles and groups of int8
_ROWS_AT_ONCE = 4096
_LEAST_SCALE = 2.0**-14  # the smallest that fp16 holds with all its digits


class WeightFormat(IntEnum):
    """`shoplm::Format`."""

    BF16 = 0
    INT8 = 1
    INT4 = 2


# Inputs that share a scale. 32, as in GGUF files of 4 bits, whose values are then kept as they are; 64: with 192 or a
# whole row, inputs with outliers cost two to six times as much perplexity, and 64 is no slower where weights are read
# from memory.
GROUP = {WeightFormat.INT8: 64, WeightFormat.INT4: 32}


class Integers(NamedTuple):
    """A weight in integers: value = scale * integer (+ low) in each group of a row."""

    values: Tensor  # int8 [out, in]
    tables: tuple[Tensor, ...]  # fp16 [out, groups]: scales and, of 4 bits, lows

    def errors(self, weight: Tensor) -> Tensor:
        """Norms [out] of what 8 bits have changed of `weight`'s rows."""
        (scales,) = self.tables
        groups = scales.shape[1]
        parts = zip(*(torch.split(each, _ROWS_AT_ONCE) for each in (weight, self.values, scales)), strict=True)
        return torch.cat(
            [
                torch.addcmul(
                    part.float().view(len(part), groups, -1),
                    integers.float().view(len(part), groups, -1),
                    scale.float()[..., None],
                    value=-1.0,
                ).norm(dim=(1, 2))
                for part, integers, scale in parts
            ]
        )


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
        integers: Integers | None = None,
        path: LowRankPath | None = None,
    ) -> None:
        """`weight` [out, in], `bias` [out]; the caller may drop them. `in` is a multiple of 64. `integers`: the
        weight in `format`, where that is at hand."""
        self._library = library
        self.outputs, inputs = weight.shape
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
        self._scales: Tensor | None = None
        if format is WeightFormat.BF16:
            group, packed = inputs + rank, _pack(weight.to(torch.bfloat16), format, library.instructions)
        else:
            group = GROUP[format]
            integers = integers or quantise(weight, format)
            self._scales = _by_panel(integers.tables)
            packed = _pack(integers.values, format, library.instructions)
        self._packed = library.memory.keep(packed)
        self._bias = None if bias is None else functional.pad(bias.float(), (0, padding)).contiguous()
        self.ref: LinearRef = LinearRef(
            pointer(self._packed),
            pointer(self._scales),
            pointer(self._bias),
            None if self._low_rank is None else ctypes.addressof(self._low_rank.ref),
            self.outputs + padding,
            inputs + rank,
            group,
            rank,
            format,
        )

    def __call__(self, states: Tensor) -> Tensor:
        """`states` bf16 [rows, in] to bf16 [rows, out]."""
        states = states.contiguous()
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


def quantise(weight: Tensor, format: WeightFormat) -> Integers:
    """`weight` [out, in] in 8 or 4 bits. By some rows at a time: all of a head's in fp32 would be larger than all else
    that is loaded."""
    by_group = _quantise_int8 if format is WeightFormat.INT8 else _quantise_int4
    groups = (part.float().view(len(part), -1, GROUP[format]) for part in torch.split(weight, _ROWS_AT_ONCE))
    values, tables = zip(*map(by_group, groups), strict=True)
    return Integers(torch.cat(values).view(weight.shape), tuple(map(torch.cat, zip(*tables, strict=True))))


def _quantise_int8(weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`weight` [out, groups, group] to integers of the same shape and scales [out, groups]."""
    scales = (weight.abs().amax(dim=2) / 127).clamp_(min=_LEAST_SCALE).half()
    values = (weight / scales.float()[..., None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), (scales,)


def _quantise_int4(weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `_quantise_int8`, with lows [out, groups]: value = scale * integer + low, the integer from 0 to 15."""
    lows = weight.amin(dim=2).half()
    scales = ((weight.amax(dim=2) - lows.float()) / 15).clamp_(min=_LEAST_SCALE).half()
    values = ((weight - lows.float()[..., None]) / scales.float()[..., None]).round_().clamp_(0, 15)
    return values.to(torch.int8), (scales, lows)


def _by_panel(tables: tuple[Tensor, ...]) -> Tensor:
    """Tables [out, groups] to [out / 32][groups][tables][32]."""
    table = torch.stack(tables, dim=2)
    outputs, groups, count = table.shape
    return table.view(outputs // PANEL, PANEL, groups, count).permute(0, 2, 3, 1).contiguous()


def _pack(weight: Tensor, format: WeightFormat, instructions: InstructionSet) -> Tensor:
    """In the order of `linear_tiles.h`, `products_avx512.h` or `products_avx2.h`."""
    if instructions is InstructionSet.AMX:
        return _pack_tiles(weight, format)
    together = 2 if format is WeightFormat.BF16 else 4
    if instructions is InstructionSet.AVX512:
        weight = (weight.short() + 128).to(torch.uint8) if format is WeightFormat.INT8 else weight
        return _pack_vectors(weight, format, columns=PANEL, together=together)
    return _pack_vectors(weight, format, columns=16, together=together)


def _pack_tiles(weight: Tensor, format: WeightFormat) -> Tensor:
    """[out, in] to [out / 32][in / depth][2][16 groups of inputs][16 outputs][depth / 16 inputs]; of 4 bits, the first
    of each two tiles in the low halves of the bytes, the second in the high ones."""
    outputs, inputs = weight.shape
    depth = 32 if format is WeightFormat.BF16 else 64
    tiles = weight.view(outputs // PANEL, 2, 16, inputs // depth, 16, depth // 16).permute(0, 3, 1, 4, 2, 5)
    return _halve(tiles, dim=2) if format is WeightFormat.INT4 else tiles.contiguous()


def _pack_vectors(weight: Tensor, format: WeightFormat, *, columns: int, together: int) -> Tensor:
    """[out, in] to [out / columns][in / together][columns outputs][together]; of 4 bits each two steps share their
    bytes, the first in the low halves."""
    outputs, inputs = weight.shape
    steps = weight.view(outputs // columns, columns, inputs // together, together).transpose(1, 2).contiguous()
    if format is not WeightFormat.INT4:
        return steps
    return _halve(steps.view(outputs // columns, -1, 2, columns, together), dim=2)


def _halve(values: Tensor, dim: int) -> Tensor:
    """Integers 0 to 15, two to a byte: the first along `dim` in the low half."""
    first, second = values.contiguous().view(torch.uint8).unbind(dim)
    return (first | second << 4).contiguous()
