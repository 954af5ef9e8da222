"""How likely the C++ decoder of this machine finds a text, in each of its formats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from shoplm.batch import Batch, Row
from shoplm.model.config import ModelConfig
from shoplm.model.native.decoder import NativeDecoder
from shoplm.model.native.library import best_library
from shoplm.model.native.linear import PackedLinear, WeightFormat
from shoplm.model.native.pool import NativePool
from shoplm.model.weights import DecoderWeights
from torch.nn import functional

_PAGE_SIZE = 16


class NativeScorer:
    """Negative log-likelihoods under one format."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        format: WeightFormat,
        most_tokens: int,
        kv_format: str = "model",
    ) -> None:
        """Raises NativeUnavailableError where the machine has no C++ decoder."""
        library, pages = best_library(), -(-most_tokens // _PAGE_SIZE)
        pool = NativePool(library.instructions, config, pages=pages, page_size=_PAGE_SIZE, kv_format=kv_format)
        self._pages = np.arange(pages, dtype=np.int32)
        self._decoder = NativeDecoder(library, config, weights, None, pages * _PAGE_SIZE, pool, format=format)
        self._head = PackedLinear(library, weights.lm_head, format=min(format, WeightFormat.INT8))

    def nats(self, tokens: Sequence[int], first: int = 1) -> float:
        """Negative log-likelihood of `tokens` from the `first` on, each behind those before it; at most
        `most_tokens`."""
        text, at = np.array(tokens, np.int64), np.arange(len(tokens))
        row = Row(0, 0, len(text), self._pages, kv_len=len(text))
        batch = Batch(text.astype(np.int32), at.astype(np.int32), at, (row,))
        logits = self._head(self._decoder.forward(batch, text, at, {}))[first - 1 : -1].float()
        return float(functional.cross_entropy(logits, torch.from_numpy(text[first:]), reduction="sum"))
