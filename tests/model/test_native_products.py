"""Products of the C++ decoder in each format, and the memory that their weights lie in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from native_forms import real_library
from shoplm.model.adapter import LowRankPath
from shoplm.model.native.library import InstructionSet, NativeLibrary
from shoplm.model.native.linear import GROUP, PackedLinear, WeightFormat
from shoplm.model.native.memory import WeightMemory


@pytest.mark.parametrize(
    ("format", "error"), [(WeightFormat.BF16, 0.004), (WeightFormat.INT8, 0.015), (WeightFormat.INT4, 0.12)]
)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 32, 64), (17, 70, 128), (300, 33, 192), (40, 64, 1152)])
def test_a_product_equals_torch(
    library: NativeLibrary, rows: int, outputs: int, inputs: int, format: WeightFormat, error: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    states = torch.randn(rows, inputs, generator=generator).bfloat16()
    expected = states.float() @ weight.bfloat16().float().T + bias
    result = PackedLinear(library, weight, bias, format=format)(states).float()
    assert ((result - expected).norm() / expected.norm()).item() < error


@pytest.mark.parametrize("format", [WeightFormat.INT8, WeightFormat.INT4])
def test_weights_and_states_on_the_grid_are_exact(library: NativeLibrary, format: WeightFormat) -> None:
    """Groups whose scales differ, integers that reach both ends of their range: only the bf16 of the result rounds."""
    generator = torch.Generator().manual_seed(2)
    low, high = (-127, 127) if format is WeightFormat.INT8 else (0, 15)
    group = GROUP[format]

    def grid(rows: int, low: int, high: int) -> torch.Tensor:
        values = torch.randint(low, high + 1, (rows, 384 // group, group), generator=generator).float()
        values[..., 0], values[..., 1] = low, high
        return values

    scales = 2.0 ** -(8 + torch.arange(384 // group) % 4)[:, None]
    weight = grid(64, low, high) * scales + (0.0 if format is WeightFormat.INT8 else 0.25)
    states = grid(20, -127, 127) / 64
    expected = states.flatten(1).double() @ weight.flatten(1).double().T
    result = PackedLinear(library, weight.flatten(1), format=format)(states.flatten(1).bfloat16()).double()
    torch.testing.assert_close(result, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", WeightFormat)
def test_a_product_of_what_is_no_number_is_none(library: NativeLibrary, format: WeightFormat, value: float) -> None:
    """Of a row of x all, of a row of W its column, whatever is multiplied behind it."""
    generator = torch.Generator().manual_seed(7)
    weight, states = torch.randn(70, 192, generator=generator), torch.randn(20, 192, generator=generator).bfloat16()
    sound = PackedLinear(library, weight, format=format)(states)
    broken = states.clone()
    broken[3, 5] = value
    result = PackedLinear(library, weight, format=format)(broken)
    assert not torch.isfinite(result[3]).any()
    rest = torch.arange(20) != 3
    assert torch.equal(result[rest], sound[rest])
    weight[7, 9] = value
    result = PackedLinear(library, weight, format=format)(states)
    assert not torch.isfinite(result[:, 7]).any()
    rest = torch.arange(70) != 7
    assert torch.equal(result[:, rest], sound[:, rest])


def test_threads_may_multiply_at_once(library: NativeLibrary) -> None:
    generator = torch.Generator().manual_seed(8)
    linear = PackedLinear(library, torch.randn(512, 512, generator=generator))
    work = [torch.randn(64, 512, generator=generator).bfloat16() for _ in range(2)]
    expected = [linear(states) for states in work]
    start = Barrier(len(work))

    def multiply(index: int) -> bool:
        start.wait()
        return all(torch.equal(linear(work[index]), expected[index]) for _ in range(60))

    with ThreadPoolExecutor(len(work)) as threads:
        assert all(threads.map(multiply, range(len(work))))


def test_other_dtypes_and_sizes_are_refused(library: NativeLibrary) -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        PackedLinear(library, torch.randn(64, 128).half())
    linear = PackedLinear(library, torch.randn(64, 128))
    for states in (torch.randn(2, 128), torch.randn(2, 64).bfloat16(), torch.randn(128).bfloat16()):
        with pytest.raises(ValueError, match=r"states are torch\.\w+ \[.*\], not torch\.bfloat16 \[rows, 128\]"):
            linear(states)


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("instructions", [InstructionSet.AMX, InstructionSet.AVX512])
def test_the_emulation_multiplies_as_the_hardware_does(
    emulate: Callable[[InstructionSet], NativeLibrary], instructions: InstructionSet, format: WeightFormat
) -> None:
    """Integers to the last bit; of bf16, the order of additions is the hardware's own."""
    real = real_library(instructions)
    if isinstance(real, str):
        pytest.skip(real)
    generator = torch.Generator().manual_seed(6)
    weight, states = torch.randn(70, 384, generator=generator), torch.randn(45, 384, generator=generator).bfloat16()
    expected, result = (
        PackedLinear(library, weight, format=format)(states) for library in (real, emulate(instructions))
    )
    if format is WeightFormat.BF16:
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-4)
    else:
        assert torch.equal(result, expected)


def test_weights_lie_behind_each_other_in_memory_of_their_own() -> None:
    memory = WeightMemory()
    sizes = [140, 200, 36_000_000, 6]
    pieces = [memory.take(size) for size in sizes]
    del memory
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert [(len(piece), piece.unique().tolist()) for piece in pieces] == [(s, [n]) for n, s in enumerate(sizes)]
    assert pieces[0].data_ptr() % (2 << 20) == 0
    assert pieces[1].data_ptr() == pieces[0].data_ptr() + 256


@pytest.mark.parametrize(
    ("format", "error"), [(WeightFormat.BF16, 0.005), (WeightFormat.INT8, 0.015), (WeightFormat.INT4, 0.12)]
)
@pytest.mark.parametrize(("rows", "rank"), [(1, 4), (17, 48), (100, 70)])
def test_an_adapter_beside_a_weight_equals_their_sum(
    library: NativeLibrary, rows: int, rank: int, format: WeightFormat, error: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    outputs, inputs = 70, 192
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    path = LowRankPath(
        torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator) * rank**-0.5
    )
    linear = PackedLinear(library, weight, bias, format=format, path=path)
    for _ in range(2):  # the second time in memory that the first one has left behind
        states = torch.randn(rows, inputs, generator=generator).bfloat16()
        expected = states.float() @ (weight + path.up @ path.down).T + bias
        assert ((linear(states).float() - expected).norm() / expected.norm()).item() < error
