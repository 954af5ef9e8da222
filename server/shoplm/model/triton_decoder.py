"""The decoder's forward pass on a GPU: products by `gpu_linear`, everything between them by the kernels.

Per layer six launches beside the four products: norm with the residual addition, QK-norm with RoPE and the write to the
pool, attention of rows, attention of beams, norm with the residual addition, SwiGLU. Formulas: see each kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shoplm.kernels.attention import beam_attention, paged_attention
from shoplm.kernels.forks import fork_attention
from shoplm.kernels.inputs import BeamGroups, PagedKv, RaggedRows
from shoplm.kernels.kv_write import kv_write
from shoplm.kernels.norm import add_rms_norm, rms_norm
from shoplm.kernels.swiglu import swiglu
from shoplm.kernels.workspace import Workspace
from shoplm.model.config import ModelConfig
from shoplm.model.gpu_linear import make_linear
from shoplm.model.rope import rope_tables
from shoplm.model.triton_step import KernelStep
from shoplm.model.weights import DecoderWeights, LayerWeights
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class _Rotation:
    """What `kv_write` takes a layer's rotation from."""

    cos: Tensor | None  # fp32 [positions, head_dim / 2]
    sin: Tensor | None
    inv_freq: Tensor | None  # fp32 [head_dim / 2]


class _Layer:
    """One layer on the device, its projections in the weight format."""

    def __init__(self, weights: LayerWeights, weight_format: str, device: torch.device) -> None:
        self.input_norm = weights.input_norm.to(device)
        self.mlp_norm = weights.mlp_norm.to(device)
        self.query_norm = None if weights.query_norm is None else weights.query_norm.to(device)
        self.key_norm = None if weights.key_norm is None else weights.key_norm.to(device)
        common, paths = (weight_format, device), weights.paths
        self.qkv = make_linear(weights.qkv, weights.qkv_bias, *common, paths.get("qkv"))
        self.output = make_linear(weights.output, weights.output_bias, *common, paths.get("output"))
        self.gate_up = make_linear(weights.gate_up, None, *common, paths.get("gate_up"))
        self.down = make_linear(weights.down, None, *common, paths.get("down"))


class TritonDecoder:
    """Weights, position tables and scratch of one model on one device. Keys and values belong to the caller."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        shop_rows: Tensor | None,
        *,
        max_positions: int,
        workspace: Workspace,
        device: torch.device,
        weight_format: str = "model",
    ) -> None:
        """`shop_rows` [shop tokens, H] are the input embeddings behind the text vocabulary. Copies what is elsewhere
        than on `device` to it."""
        self.config = config
        self._workspace = workspace
        text = weights.embedding.to(device)
        self._embedding = text if shop_rows is None else torch.cat((text, shop_rows.to(device, text.dtype)))
        tied = weights.lm_head is weights.embedding
        self._head = self._embedding[: len(text)] if tied else weights.lm_head.to(device)
        self._final_norm = weights.final_norm.to(device)
        self._layers = [_Layer(layer, weight_format, device) for layer in weights.layers]
        cos, sin = (table.to(device) for table in rope_tables(config.rope, config.head_dim, max_positions))
        turned = _Rotation(cos, sin, None)
        # A layer without positions turns by frequencies of 0, that is not at all.
        still = _Rotation(None, None, torch.zeros(config.head_dim // 2, device=device))
        self._rotations = [turned if uses_rope else still for uses_rope in config.uses_rope]

    @property
    def vocab_size(self) -> int:
        """Text rows and the shop's."""
        return len(self._embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Text logits [R, vocab_size] of hidden states [R, H]."""
        return functional.linear(hidden, self._head)

    @property
    def text_vocab_size(self) -> int:
        """Rows of the LM head."""
        return len(self._head)

    def forward(self, step: KernelStep, tokens: Tensor, beams: BeamGroups | None, pool: tuple[PagedKv, ...]) -> Tensor:
        """Run the step: writes the tokens' keys and values, returns hidden states [R, H] after the final norm.

        `tokens` int64 [T] and `beams` are the step's, as the state resolves them.
        """
        eps = self.config.rms_norm_eps
        rows = step.rows()
        residual = functional.embedding(tokens, self._embedding)
        normed = rms_norm(residual, self._layers[0].input_norm, eps)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, normed, step, (rows, beams), pool[index])
            if index == last:  # nothing behind it is needed of the other tokens
                residual, attended = residual[step.outputs], attended[step.outputs]
            projected = layer.output(attended)
            normed = add_rms_norm(projected, residual, layer.mlp_norm, eps)
            expanded = swiglu(layer.gate_up(normed))
            contracted = layer.down(expanded)
            following = self._final_norm if index == last else self._layers[index + 1].input_norm
            normed = add_rms_norm(contracted, residual, following, eps)
        return normed

    def _attention(
        self,
        index: int,
        layer: _Layer,
        normed: Tensor,
        step: KernelStep,
        parts: tuple[RaggedRows | None, BeamGroups | None],
        kv: PagedKv,
    ) -> Tensor:
        """Self-attention before the output projection: [T, num_heads * head_dim]."""
        config = self.config
        rows, beams = parts
        heads, kv_heads = config.num_heads, config.num_kv_heads
        projected = layer.qkv(normed)
        projected = projected.view(-1, heads + 2 * kv_heads, config.head_dim)
        q, k, v = projected[:, :heads], projected[:, heads:-kv_heads], projected[:, -kv_heads:]
        rotation = self._rotations[index]
        kv_write(
            q,
            k,
            v,
            step.positions,
            step.slots,
            kv,
            cos=rotation.cos,
            sin=rotation.sin,
            inv_freq=rotation.inv_freq,
            q_norm_weight=layer.query_norm,
            k_norm_weight=layer.key_norm,
            norm_eps=config.rms_norm_eps,
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        window = config.sliding_windows[index]
        if rows is not None:
            paged_attention(q, kv, rows, out=out, workspace=self._workspace, window=window)
        if beams is not None:
            part = slice(step.bounds.row_tokens, None)
            beam_attention(q[part], kv, beams, out=out[part], workspace=self._workspace, window=window)
        if step.forks is not None:
            fork_attention(q, kv, step.forks, out=out, window=window)
        return out.flatten(1)
