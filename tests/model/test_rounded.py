"""Weights rounded like a format of the GPU backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoplm.errors import ConfigurationError
from shoplm.model.rounded import rounded
from shoplm.model.weights import DecoderWeights, LayerWeights


def weights(size: int = 64) -> DecoderWeights:
    generator = torch.Generator().manual_seed(2)

    def matrix() -> torch.Tensor:
        return torch.randn(size, size, generator=generator)

    norm, embedding = torch.ones(size), matrix()
    fields: dict[str, Any] = {name: matrix() for name in ("qkv", "output", "gate_up", "down")}
    fields |= dict.fromkeys(("qkv_bias", "query_norm", "key_norm", "output_bias"))
    return DecoderWeights(embedding, (LayerWeights(input_norm=norm, mlp_norm=norm, **fields),), norm, embedding)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_products_are_rounded_and_nothing_else(weight_format: str) -> None:
    """That these are the GPU backend's numbers: tests/kernels/test_gpu_linear.py."""
    before = weights()
    after = rounded(before, weight_format)
    for name in ("qkv", "output", "gate_up", "down"):
        old, new = (getattr(each.layers[0], name) for each in (before, after))
        assert 0 < float((new - old).abs().max()) < (0.02 if weight_format == "int8" else 0.3)
    assert after.embedding is before.embedding and after.lm_head is before.lm_head


def test_fp8_keeps_three_bits_behind_the_point() -> None:
    before = weights()
    error = (rounded(before, "fp8").layers[0].down - before.layers[0].down).abs()
    assert 0 < float((error / before.layers[0].down.abs()).median()) < 2.0**-4


def test_what_does_not_suit_is_refused() -> None:
    assert rounded(weights(), "model").layers[0].down.dtype == torch.float32
    with pytest.raises(ConfigurationError, match="'int3' is not one of: model, int8, int4, fp8"):
        rounded(weights(), "int3")
    with pytest.raises(ConfigurationError, match="int4 does not suit this base: the weight has 40 inputs"):
        rounded(weights(40), "int4")
