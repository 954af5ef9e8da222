"""A toy configuration that has every trait, random weights for it, and its backends."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import torch
from shoplm.model.config import ModelConfig, RopeConfig
from shoplm.model.native.backend import NativeBackend
from shoplm.model.native.library import NativeLibrary
from shoplm.model.native.linear import WeightFormat
from shoplm.model.native.pool import NativePool
from shoplm.model.shop_weights import NamedTrie, random_trie
from shoplm.model.weights import DecoderWeights, LayerWeights

# Grouped heads, norms of heads, biases, a window, a layer without positions: each trait in some layer.
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=460,
    hidden_size=128,
    intermediate_size=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    uses_rope=(True, True, False, True),
    sliding_windows=(None, 24, None, None),
    max_positions=256,
    tied_head=False,
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 150)


@lru_cache
def random_weights(head_dim: int = 64) -> DecoderWeights:
    """Values that bf16 holds exactly, so that both sides start from the same numbers."""
    generator = torch.Generator().manual_seed(5)

    def matrix(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(*shape, generator=generator) * float(shape[-1]) ** -0.5
        return values.bfloat16().float()

    def vector(size: int, mean: float) -> torch.Tensor:
        return (mean + 0.2 * torch.randn(size, generator=generator)).bfloat16().float()

    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    hidden, attended = config.hidden_size, config.num_heads * head_dim
    layers = tuple(
        LayerWeights(
            input_norm=vector(hidden, 1),
            qkv=matrix(config.qkv_size, hidden),
            qkv_bias=vector(config.qkv_size, 0),
            query_norm=vector(head_dim, 1),
            key_norm=vector(head_dim, 1),
            output=matrix(hidden, attended),
            output_bias=vector(hidden, 0),
            mlp_norm=vector(hidden, 1),
            gate_up=matrix(2 * config.intermediate_size, hidden),
            down=matrix(hidden, config.intermediate_size),
        )
        for _ in range(config.num_layers)
    )
    return DecoderWeights(
        matrix(config.vocab_size, hidden), layers, vector(hidden, 1), matrix(config.vocab_size, hidden)
    )


def tries() -> list[NamedTrie]:
    return [random_trie("shop", items=300, level_sizes=(9, 11, 7), hidden_size=CONFIG.hidden_size, seed=3)]


def make(
    library: NativeLibrary,
    *,
    page_size: int = 16,
    format: WeightFormat = WeightFormat.BF16,
    head_dim: int = 64,
    kv_format: str = "model",
) -> NativeBackend:
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    backend = NativeBackend(
        config,
        random_weights(head_dim),
        tries=tries(),
        pages=2048 // page_size,
        page_size=page_size,
        format=format,
        kv_format=kv_format,
        library=library,
    )
    poison(backend.pool)
    return backend


def poison(pool: NativePool) -> None:
    """Whatever is read without having been written shows."""
    for part in (pool.keys, pool.values, pool.key_scales, pool.value_scales):
        if part is not None:
            part.fill_(torch.nan if part.is_floating_point() else 101)


@lru_cache
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, 448, length).tolist() for length in LENGTHS]
