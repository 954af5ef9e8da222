"""Where a prompt's last token looks: the attention mass on parts of the prompt, by layer and head. In torch, on a CPU.

For people who want to see inside. It is attention, not cause: what a part is worth for an answer, forks tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.model.config import ModelConfig
from shoplm.model.decoder import Decoder
from shoplm.model.shop_weights import ShopWeights
from shoplm.model.weights import DecoderWeights
from shoplm.model.whole_prompt import whole_prompt
from torch import Tensor


def attention_mass(
    config: ModelConfig,
    weights: DecoderWeights,
    shop: ShopWeights | None,
    tokens: Sequence[int],
    spans: Sequence[tuple[int, int]],
) -> NDArray[np.float32]:
    """[layers, heads, spans]: the share of the last token's attention on each span [start, end) of the prompt.

    Spans that do not overlap and cover the prompt add up to 1 in every head.
    """
    rows = None if shop is None else shop.input_rows.to(weights.embedding.dtype)
    with torch.inference_mode():
        watched = _Watched(config, weights, rows, len(tokens))
        watched.forward(*whole_prompt(config, tokens, [len(tokens) - 1], weights.embedding.dtype))
    shares = torch.stack(watched.shares).float()  # [layers, heads, tokens]
    return np.stack([shares[:, :, start:end].sum(dim=-1).numpy() for start, end in spans], axis=-1)


class _Watched(Decoder):
    """Keeps the last token's attention, layer by layer."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, shop_rows: Tensor | None, tokens: int) -> None:
        super().__init__(config, weights, shop_rows, tokens)
        self.shares: list[Tensor] = []

    def _saw(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """`queries` [T, heads, head_dim], scaled; `keys` [T, kv_heads, head_dim] of the whole prompt."""
        config = self.config
        last = queries[-1].view(config.num_kv_heads, -1, config.head_dim).float()
        scores = last @ keys.permute(1, 2, 0).float()
        window = config.sliding_windows[layer]
        if window is not None:
            scores[:, :, : max(len(keys) - window, 0)] = -torch.inf
        self.shares.append(torch.softmax(scores, dim=-1).flatten(0, 1))
