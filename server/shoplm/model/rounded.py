"""Weights rounded as a weight format of the GPU backend rounds them, in the dtype that they had.

So what a format costs in quality can be measured on any machine, before a GPU serves it. int8 and int4 are exactly the
numbers that the GPU backend multiplies with. fp8 rounds activations too, which is left out: it costs at least this.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from shoplm.errors import ConfigurationError
from shoplm.kernels.reference_ops import quantise_rows
from shoplm.kernels.weight_only import dequantise, quantise
from shoplm.model.gpu_linear import WEIGHT_FORMATS
from shoplm.model.weights import DecoderWeights


def rounded(weights: DecoderWeights, weight_format: str) -> DecoderWeights:
    """`weights` with every projection rounded, but no norms, embeddings or head, and no adapter that is kept apart;
    "model": as they are.

    Raises ConfigurationError for an unknown format, or one that does not suit a projection's size.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise ConfigurationError(f"weight_format {weight_format!r} is not one of: {', '.join(WEIGHT_FORMATS)}")
    if weight_format == "model":
        return weights
    change = partial(_rounded, weight_format=weight_format)
    return replace(weights, layers=tuple(layer.with_products(change) for layer in weights.layers))


def _rounded(weight: torch.Tensor, weight_format: str) -> torch.Tensor:
    if weight_format == "fp8":
        values, scale = quantise_rows(weight)
        return (values.float() * scale).to(weight.dtype)
    try:
        return dequantise(quantise(weight, {"int8": 8, "int4": 4}[weight_format]), weight.dtype)
    except ValueError as error:
        raise ConfigurationError(f"weight_format {weight_format} does not suit this base: {error}") from error
