"""The order in which the C++ decoder keeps weights, and how it rounds them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from shoplm.model.native.library import InstructionSet, NativeLibrary, PackingRef
from shoplm.model.native.linear import GROUP, PANEL, WeightFormat
from torch import Tensor

OUTPUTS, INPUTS = 96, 192
_LEAST_SCALE = 2.0**-14


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_rounded_and_put_where_products_read_them(
    library: NativeLibrary, format: WeightFormat, dtype: torch.dtype
) -> None:
    """Groups far from zero, groups of zeros, and one whose numbers differ by less than fp16 can tell."""
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5))
    weight[3] += 10.0
    weight[4] = -100.0 + weight[4] / 1000
    weight[5, :64] = 0.0
    weight[6] *= 1e-9
    weight = weight.to(dtype)
    packed, scales, errors = _packed(library, weight, format)
    values = _in_order(_wide(packed, format, library.instructions), format, library.instructions)
    if format is WeightFormat.BF16:
        assert torch.equal(values, weight.bfloat16())
        return
    expected, tables = _rounded(weight.float(), format)
    assert torch.equal(values, expected)
    assert torch.equal(scales, _by_panel(tables))
    if format is WeightFormat.INT8:
        back = expected.view(OUTPUTS, -1, 64).float() * tables[0].float()[..., None]
        torch.testing.assert_close(errors, (back.flatten(1) - weight.float()).norm(dim=1), rtol=1e-5, atol=1e-12)


def _packed(library: NativeLibrary, weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    group = GROUP.get(format, INPUTS)
    packed = torch.randint(256, (OUTPUTS * INPUTS * format.bits // 8,), dtype=torch.uint8)
    scales = torch.empty(OUTPUTS // PANEL, INPUTS // group, format.value, PANEL, dtype=torch.float16)
    errors = torch.empty(OUTPUTS)
    addresses = (each.data_ptr() for each in (weight, packed, scales, errors))
    packing = PackingRef(*addresses, OUTPUTS, INPUTS, group, format, weight.dtype == torch.float32)
    library.functions.shoplm_pack(ctypes.byref(packing), 2)
    return packed, scales, errors


def _rounded(weight: Tensor, format: WeightFormat) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Integers [out, in], and the scales and, of 4 bits, lows [out, groups], by torch."""
    groups = weight.view(OUTPUTS, -1, GROUP[format])
    if format is WeightFormat.INT8:
        low, high, tables = torch.zeros(OUTPUTS, 1), 127, ()
        most = groups.abs().amax(dim=2)
    else:
        low, high = groups.amin(dim=2).half().float(), 15
        tables, most = (low.half(),), groups.amax(dim=2)
    scales = ((most - low) / high).clamp(min=_LEAST_SCALE).half()
    values = ((groups - low[..., None]) / scales.float()[..., None]).round()
    least = -127 if format is WeightFormat.INT8 else 0
    return values.clamp(least, high).to(torch.int8).view(weight.shape), (scales, *tables)


def _by_panel(tables: tuple[Tensor, ...]) -> Tensor:
    """Tables [out, groups] to [out / 32, groups, tables, 32]."""
    table = torch.stack(tables, dim=2)
    return table.view(-1, PANEL, *table.shape[1:]).permute(0, 2, 3, 1)


def _wide(packed: Tensor, format: WeightFormat, instructions: InstructionSet) -> Tensor:
    """One number for each value, flat, those that shared a byte in the order of the layouts below."""
    if format is WeightFormat.BF16:
        return packed.view(torch.bfloat16)
    if format is WeightFormat.INT8:
        unsigned = instructions is InstructionSet.AVX512
        return (packed.short() - 128).to(torch.int8) if unsigned else packed.view(torch.int8)
    together = 16 * 16 * 4 if instructions is InstructionSet.AMX else _columns(instructions) * 4  # a tile, or a step
    halves = packed.view(-1, together)
    return torch.stack((halves & 15, halves >> 4), dim=1).to(torch.int8).flatten()


def _in_order(values: Tensor, format: WeightFormat, instructions: InstructionSet) -> Tensor:
    """[out, in] from [out / 32][in / depth][2][16][16][together] or [out / columns][steps][columns][together]."""
    together = 2 if format is WeightFormat.BF16 else 4
    if instructions is InstructionSet.AMX:
        tiles = values.view(OUTPUTS // PANEL, -1, 2, 16, 16, together)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(OUTPUTS, INPUTS)
    columns = _columns(instructions)
    steps = values.view(OUTPUTS // columns, INPUTS // together, columns, together)
    return steps.transpose(1, 2).reshape(OUTPUTS, INPUTS)


def _columns(instructions: InstructionSet) -> int:
    return 16 if instructions is InstructionSet.AVX2 else PANEL
