"""The GPU backend's linear layers in every weight format, as far as a CPU computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoplm.errors import ConfigurationError
from shoplm.kernels.weight_only import MAX_ROWS
from shoplm.model.gpu_linear import WEIGHT_FORMATS, make_linear
from shoplm.model.rounded import rounded
from shoplm.model.triton_decoder import TritonDecoder
from shoplm.model.weights import DecoderWeights, LayerWeights
from toy_backend import toy_config, toy_weights

CPU = torch.device("cpu")
# Largest error of a product, as a share of the root mean square: a few of the format's own rounding steps.
LIMITS = {"model": 1e-6, "int8": 0.05, "int4": 0.7, "fp8": 0.2}


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_product_is_off_by_the_formats_rounding(weight_format: str, rows: int) -> None:
    """Few rows, and more than the kernel of quantised weights takes."""
    weight, bias, states = torch.randn(96, 128), torch.randn(96), torch.randn(rows, 128)
    want = torch.nn.functional.linear(states, weight, bias)
    found = make_linear(weight, bias, weight_format, CPU)(states)
    error = float((found - want).abs().max() / want.square().mean().sqrt())
    assert error <= LIMITS[weight_format]
    assert weight_format == "model" or error > LIMITS[weight_format] / 50


def test_formats_that_a_layer_does_not_suit_are_refused() -> None:
    for weight_format, message in (
        ("int4", "a multiple of 64 inputs, but one has 40"),
        ("fp8", "multiples of 16, but a layer is 8 x 40"),
        ("int3", "'int3' is not one of: model, int8, int4, fp8"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_linear(torch.randn(8, 40), None, weight_format, CPU)
    with pytest.raises(ConfigurationError, match="at most 32768 inputs, but a layer has 32784"):
        make_linear(torch.zeros(16, 32_784), None, "fp8", CPU)


def test_the_decoder_quantises_every_projection() -> None:
    """The toy's hidden size suits no INT8 kernel: the refusal shows that the flag reaches the layers."""
    config = toy_config(traits=False)
    with pytest.raises(ConfigurationError, match="a multiple of 64 inputs, but one has 48"):
        TritonDecoder(
            config, toy_weights(config), None, max_positions=8, workspace=None, device=CPU,  # type: ignore[arg-type]
            weight_format="int8",
        )  # fmt: skip


def test_fp8_weights_are_those_that_a_gate_measures() -> None:
    """One input at a time, which e4m3 has exactly, shows the weight that is multiplied."""
    weight = torch.randn(64, 64)
    fields: dict[str, Any] = dict.fromkeys(("qkv", "output", "gate_up", "down"), weight)
    fields |= dict.fromkeys(("qkv_bias", "query_norm", "key_norm", "output_bias"))
    norm = torch.ones(64)
    before = DecoderWeights(weight, (LayerWeights(input_norm=norm, mlp_norm=norm, **fields),), norm, weight)
    stands_for = rounded(before, "fp8").layers[0].down
    found = make_linear(weight, None, "fp8", CPU)(torch.eye(64)).t()
    torch.testing.assert_close(found, stands_for, atol=0, rtol=1e-6)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("rows", [3, MAX_ROWS + 1])
def test_rounded_weights_are_what_is_multiplied(weight_format: str, rows: int) -> None:
    """What quality gates measure without a GPU, for few rows and more."""
    weight, states = torch.randn(64, 64), torch.randn(rows, 64)
    norm = torch.ones(64)
    fields: dict[str, Any] = dict.fromkeys(("qkv", "output", "gate_up", "down"), weight)
    fields |= dict.fromkeys(("qkv_bias", "query_norm", "key_norm", "output_bias"))
    before = DecoderWeights(weight, (LayerWeights(input_norm=norm, mlp_norm=norm, **fields),), norm, weight)
    stands_for = rounded(before, weight_format).layers[0].down
    found = make_linear(weight, None, weight_format, CPU)(states)
    torch.testing.assert_close(found, torch.nn.functional.linear(states, stands_for), atol=1e-5, rtol=1e-5)
