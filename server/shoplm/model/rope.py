"""Frequencies of the rotary position embedding.

RoPE turns the pair (x_i, x_{i + d/2}) of a head by the angle position * inv_freq_i, with
inv_freq_i = theta^(-2i / d) (Su et al., RoFormer, arXiv:2104.09864). Scaling stretches the context:

- linear: every frequency is divided by the factor (Chen et al., arXiv:2306.15595);
- llama3: wavelengths above original / low_freq_factor are divided by the factor, those below
  original / high_freq_factor are kept, those between are blended (Llama 3.1's reference code);
- yarn: a ramp over the dimensions between both, and a temperature on the attention (Peng et al., arXiv:2309.00071).
"""

from __future__ import annotations

import math

import torch
from shoplm.model.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, fp32 [head_dim / 2] in radians per position, and the factor for both cosine and sine.

    Computed in fp32 like the models' reference code: at position p an error of the frequency grows p-fold.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq, head_dim), _yarn_attention_factor(rope)
    return inv_freq, 1.0


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions 0 .. positions - 1: fp32 [positions, head_dim / 2], factor included."""
    inv_freq, factor = rope_frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq[None, :]
    return angles.cos() * factor, angles.sin() * factor


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    turns = rope.original_max_positions * inv_freq / (2 * math.pi)  # over the pretraining's context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1.0 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(rope: RopeConfig, inv_freq: torch.Tensor, head_dim: int) -> torch.Tensor:
    low = _yarn_dimension(rope, rope.beta_fast, head_dim)
    high = _yarn_dimension(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    interpolate = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return interpolate * inv_freq / rope.factor + (1.0 - interpolate) * inv_freq


def _yarn_dimension(rope: RopeConfig, turns: float, head_dim: int) -> float:
    """The (fractional) pair of dimensions that turns so many times over the pretraining's context."""
    return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_temperature(rope.factor, rope.mscale) / _yarn_temperature(rope.factor, rope.mscale_all_dim)
    return _yarn_temperature(rope.factor, 1.0)


def _yarn_temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
