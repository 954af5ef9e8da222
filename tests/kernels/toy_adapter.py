"""A random adapter for any decoder's weights, beside them and merged."""

from __future__ import annotations

from dataclasses import replace

import torch
from shoplm.model.adapter import LowRankPath
from shoplm.model.weights import DecoderWeights

RANKS = {"qkv": 12, "output": 4, "gate_up": 8, "down": 4}


def with_adapter(weights: DecoderWeights) -> tuple[DecoderWeights, DecoderWeights]:
    """The same model twice, off by a third from `weights`: apart and merged. The first layer's qkv stays as it is."""
    generator = torch.Generator().manual_seed(11)
    apart, merged = [], []
    for index, layer in enumerate(weights.layers):
        paths, sums = {}, {}
        for name, rank in RANKS.items():
            weight = getattr(layer, name)
            if index == 0 and name == "qkv":
                continue
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator) * weight.std() / 3.0 * rank**-0.5
            paths[name] = LowRankPath(down.bfloat16().float(), up.bfloat16().float())
            sums[name] = weight + paths[name].up @ paths[name].down
        apart.append(replace(layer, paths=paths))
        merged.append(replace(layer, **sums))
    return replace(weights, layers=tuple(apart)), replace(weights, layers=tuple(merged))
