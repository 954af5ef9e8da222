"""weight_only under the interpreter: the product with the dequantised weight, every remainder of rows and outputs."""

from __future__ import annotations

import pytest
import torch
from shoplm.kernels.weight_only import GROUP, MULTIPLE, QuantisedWeight, dequantise, quantise, unpack, weight_only


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 1, MULTIPLE), (16, 32, 2 * MULTIPLE), (17, 33, 3 * MULTIPLE), (65, 70, MULTIPLE), (0, 5, MULTIPLE)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_product_with_the_dequantised_weight(
    bits: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    weight = quantise(torch.randn(outputs, inputs) * inputs**-0.5, bits)
    x = torch.full((rows, inputs + 16), torch.nan, dtype=dtype)[:, :inputs]
    x.copy_(torch.randn(rows, inputs))
    bias = torch.randn(outputs).to(dtype) if rows % 2 else None
    out = torch.full((rows, outputs), torch.nan, dtype=dtype)
    assert weight_only(x, weight, bias, out=out) is out
    want = x.float() @ dequantise(weight, torch.float32).t() + (0 if bias is None else bias.float())
    torch.testing.assert_close(out.float(), want, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, MULTIPLE), (64, 2 * MULTIPLE), (67, 3 * MULTIPLE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unpacks_what_torch_dequantises(bits: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = quantise(torch.randn(outputs, inputs), bits)
    room = torch.full((outputs + 1, inputs), torch.nan, dtype=dtype)
    out = room[:outputs]
    assert unpack(weight, dtype, out=out) is out
    torch.testing.assert_close(out, dequantise(weight, dtype), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    assert room[outputs:].isnan().all()
    assert torch.equal(unpack(weight, dtype), out)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest_step(bits: int) -> None:
    weight = torch.randn(9, 2 * MULTIPLE)
    weight[4] = 0  # a row without a scale
    found = dequantise(quantise(weight, bits), torch.float32)
    if bits == 8:
        step = weight.abs().amax(-1, keepdim=True) / 127
    else:
        grouped = weight.view(9, -1, GROUP)
        step = ((grouped.amax(-1) - grouped.amin(-1)) / 15).repeat_interleave(GROUP, 1)
    # INT4's scales and lows are fp16: 15 steps may end a thousandth beside the largest value.
    assert ((found - weight).abs() <= step / 2 + (1e-6 if bits == 8 else 4e-3)).all()
    assert (found[4] == 0).all()


def test_values_on_a_grid_of_16_steps_are_kept() -> None:
    """As those of a model that was made of GGUF's Q4_1, each group with a grid of its own."""
    steps = torch.arange(2 * MULTIPLE).mul(7).remainder(16).view(-1, GROUP)
    lows, scales = torch.tensor([-1.0, 0.5, -0.25, 0.0]), torch.tensor([0.125, 0.0625, 1.0, 0.5])
    weight = (steps * scales[:, None] + lows[:, None]).view(1, -1)
    assert torch.equal(dequantise(quantise(weight, 4), torch.float32), weight)


def test_what_does_not_fit_is_named() -> None:
    weight = quantise(torch.randn(4, MULTIPLE), 4)
    with pytest.raises(ValueError, match="65 inputs, expected a multiple of 64"):
        quantise(torch.randn(4, 65), 8)
    with pytest.raises(ValueError, match="bits is 3"):
        quantise(torch.randn(4, 64), 3)
    with pytest.raises(ValueError, match="x has shape"):
        weight_only(torch.randn(2, 32), weight)
    with pytest.raises(ValueError, match="row stride 65"):
        weight_only(torch.randn(2, 65)[:, :64], weight)
    with pytest.raises(TypeError, match=r"out is torch\.int8, expected one of"):
        unpack(weight, torch.int8)
    with pytest.raises(TypeError, match=r"out is torch\.float32, expected one of: torch\.float16"):
        unpack(weight, torch.float16, out=torch.zeros(4, MULTIPLE))
    with pytest.raises(ValueError, match="out has shape"):
        unpack(weight, torch.float16, out=torch.zeros(5, MULTIPLE, dtype=torch.float16))
    with pytest.raises(ValueError, match="scale has shape"):
        QuantisedWeight(weight.values, weight.scale[:, :0])
