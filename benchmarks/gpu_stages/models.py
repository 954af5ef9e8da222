"""Random weights of real shapes, made on the device."""

from __future__ import annotations

import torch
from shoplm.model.config import ModelConfig, RopeConfig
from shoplm.model.weights import DecoderWeights, LayerWeights


def _config(
    hidden: int, middle: int, layers: int, heads: int, kv_heads: int, vocab: int, *, qkv_bias: bool, qk_norm: bool,
    tied: bool, head_dim: int = 128, positions: int = 16_384,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=vocab, hidden_size=hidden, intermediate_size=middle,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-6,
        rope=RopeConfig(1e6), uses_rope=(True,) * layers, sliding_windows=(None,) * layers, max_positions=positions,
        tied_head=tied, qkv_bias=qkv_bias, output_bias=False, qk_norm=qk_norm, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip


# The config.json of SmolLM2-135M, Qwen2.5-0.5B, Qwen3-1.7B and Qwen2.5-7B.
CONFIGS = {
    "135M": _config(576, 1536, 30, 9, 3, 49_152, qkv_bias=False, qk_norm=False, tied=True, head_dim=64),
    "0.5B": _config(896, 4864, 24, 14, 2, 151_936, qkv_bias=True, qk_norm=False, tied=True, head_dim=64),
    "1.7B": _config(2048, 6144, 28, 16, 8, 151_936, qkv_bias=False, qk_norm=True, tied=True),
    "7B": _config(3584, 18_944, 28, 28, 4, 152_064, qkv_bias=True, qk_norm=False, tied=False),
}
TINY = _config(64, 128, 2, 2, 1, 200, qkv_bias=True, qk_norm=True, tied=False, head_dim=64, positions=256)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Weights of a typical scale."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight: torch.Tensor = torch.randn(rows, columns, device=device, dtype=dtype) * float(columns) ** -0.5
        return weight

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, device=device, dtype=dtype)

    hidden, middle = config.hidden_size, config.intermediate_size
    layers = tuple(
        LayerWeights(
            input_norm=ones(hidden),
            qkv=matrix(config.qkv_size, hidden),
            qkv_bias=0.1 * torch.randn(config.qkv_size, device=device).to(dtype) if config.qkv_bias else None,
            query_norm=ones(config.head_dim) if config.qk_norm else None,
            key_norm=ones(config.head_dim) if config.qk_norm else None,
            output=matrix(hidden, config.num_heads * config.head_dim),
            output_bias=None,
            mlp_norm=ones(hidden),
            gate_up=matrix(2 * middle, hidden),
            down=matrix(hidden, middle),
        )
        for _ in range(config.num_layers)
    )
    embedding = matrix(config.vocab_size, hidden)
    head = embedding if config.tied_head else matrix(config.vocab_size, hidden)
    return DecoderWeights(embedding, layers, ones(hidden), head)
