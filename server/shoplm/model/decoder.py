"""The decoder's forward pass over a flat, ragged batch: tokens of all rows in one axis, attention row by row.

Llama's architecture with the variations that `ModelConfig` names. Formulas: RMSNorm (Zhang and Sennrich,
arXiv:1910.07467), SwiGLU (Shazeer, arXiv:2002.05202), rotary positions (`shoplm.model.rope`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from shoplm.model.adapter import LowRankPath
from shoplm.model.attention_plan import AttentionPlan
from shoplm.model.config import ModelConfig
from shoplm.model.kv_pool import KVPool
from shoplm.model.linear import Linear
from shoplm.model.rope import rope_tables
from shoplm.model.torch_attention import attend
from shoplm.model.weights import DecoderWeights, LayerWeights
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's index tensors, the same for every layer. T tokens."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    write_rows: Tensor  # int64 [T * kv_heads]: rows of the KV pool
    plans: Mapping[int | None, AttentionPlan]  # by sliding window
    outputs: Tensor  # int64 [R]: tokens whose hidden state is read


class _Layer:
    """One layer's weights, in the layout that the CPU multiplies fastest."""

    def __init__(self, weights: LayerWeights, config: ModelConfig, query_scale: float) -> None:
        qkv, qkv_bias, query_norm = weights.qkv, weights.qkv_bias, weights.query_norm
        paths = dict(weights.paths)
        if query_norm is not None:
            query_norm = query_norm * query_scale
        elif query_scale != 1.0:
            queries = config.num_heads * config.head_dim

            def scaled(rows: Tensor) -> Tensor:
                return torch.cat((rows[:queries] * query_scale, rows[queries:]))

            qkv, qkv_bias = scaled(qkv), None if qkv_bias is None else scaled(qkv_bias)
            if "qkv" in paths:
                paths["qkv"] = replace(paths["qkv"], up=scaled(paths["qkv"].up))
        self.input_norm = weights.input_norm
        self.mlp_norm = weights.mlp_norm
        self.query_norm = query_norm
        self.key_norm = weights.key_norm
        self.qkv = Linear(qkv, qkv_bias, paths.get("qkv"))
        self.output = Linear(weights.output, weights.output_bias, paths.get("output"))
        self.gate, self.up = _halves(weights.gate_up, paths.get("gate_up"))
        self.down = Linear(weights.down, None, paths.get("down"))


def _halves(weight: Tensor, path: LowRankPath | None) -> list[Linear]:
    """Gate and up; of an adapter's second matrix, each half has zeros for what the other one reads."""
    paths = [None] * 2 if path is None else [replace(path, up=up) for up in path.up.chunk(2)]
    return [Linear(part, None, each) for part, each in zip(weight.chunk(2), paths, strict=True)]


class Decoder:
    """Weights and position tables of one model. Stateless between steps: keys and values are in the pool."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, shop_rows: Tensor | None, max_positions: int
    ) -> None:
        """`shop_rows` [shop tokens, H] are the input embeddings behind the text vocabulary."""
        self.config = config
        table = weights.embedding
        self._embedding = table if shop_rows is None else torch.cat((table, shop_rows.to(table.dtype)))
        self._final_norm = weights.final_norm
        # The scores' 1 / sqrt(head_dim) is applied to the queries, which are fewer: in their weights where it is a
        # power of two, which changes no mantissa.
        scale = 1.0 / math.sqrt(config.head_dim)
        exact = math.frexp(scale)[0] == 0.5
        self._query_scale = None if exact else scale
        self._layers = [_Layer(layer, config, scale if exact else 1.0) for layer in weights.layers]
        cosine, sine = rope_tables(config.rope, config.head_dim, max_positions)
        dtype = table.dtype
        # Halves repeated and the sign put into the sine: turning is x * cosine + (x with halves swapped) * sine.
        self._cosine = torch.cat((cosine, cosine), dim=1).to(dtype)
        self._sine = torch.cat((-sine, sine), dim=1).to(dtype)

    @property
    def vocab_size(self) -> int:
        """Text rows and the shop's."""
        return len(self._embedding)

    @property
    def max_positions(self) -> int:
        return len(self._cosine)

    def forward(self, inputs: StepInputs, pool: KVPool) -> Tensor:
        """Run the step: writes the tokens' keys and values, returns hidden states [R, H] after the final norm."""
        hidden = functional.embedding(inputs.tokens, self._embedding)
        turn = (
            functional.embedding(inputs.positions, self._cosine)[:, None, :],
            functional.embedding(inputs.positions, self._sine)[:, None, :],
        )
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, hidden, turn, inputs, pool)
            if index == last:  # nothing behind it is needed of the other tokens
                hidden, attended = hidden[inputs.outputs], attended[inputs.outputs]
            hidden = layer.output.add(attended, hidden)
            normed = self._norm(hidden, layer.mlp_norm)
            # Two products whose epilogues do the elementwise part: faster than one and two passes over its result.
            hidden = layer.down.add(layer.up.multiply(normed, layer.gate.silu(normed)), hidden)
        return self._norm(hidden, self._final_norm)

    def _attention(
        self,
        index: int,
        layer: _Layer,
        hidden: Tensor,
        turn: tuple[Tensor, Tensor],
        inputs: StepInputs,
        pool: KVPool,
    ) -> Tensor:
        """Self-attention before the output projection: [T, num_heads * head_dim]."""
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        projected = layer.qkv(self._norm(hidden, layer.input_norm)).view(-1, heads + 2 * kv_heads, config.head_dim)
        turned, values = projected[:, : heads + kv_heads], projected[:, heads + kv_heads :].contiguous()
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = turned[:, :heads], turned[:, heads:]
            turned = torch.cat((self._norm(queries, layer.query_norm), self._norm(keys, layer.key_norm)), dim=1)
        if config.uses_rope[index]:
            cosine, sine = turn
            swapped = turned.roll(config.head_dim // 2, -1)
            turned = torch.addcmul(turned * cosine, swapped, sine)
        queries, keys = turned[:, :heads], turned[:, heads:].contiguous()
        if self._query_scale is not None:
            queries = queries * self._query_scale
        self._saw(index, queries, keys)
        keys, values = pool.rounded(keys), pool.rounded(values)
        pool.write(index, inputs.write_rows, keys.view(-1, config.head_dim), values.view(-1, config.head_dim))
        return attend(inputs.plans[config.sliding_windows[index]], pool, index, queries, keys, values)

    def _saw(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """A place to look in, for `attention_mass`: a layer's queries, scaled, and the step's keys."""

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in fp32 up to the weight; a few plain passes beat torch's own on a CPU."""
        wide = states.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(states.shape[-1])
        scale.add_(self.config.rms_norm_eps).rsqrt_()
        normed: Tensor = (wide * scale).to(states.dtype)
        return normed.mul_(weight)
