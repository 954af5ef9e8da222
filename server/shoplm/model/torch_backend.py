"""The backend for CPUs: torch operations, bf16 or fp32, no compiler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import Batch
from shoplm.errors import ConfigurationError
from shoplm.model.attention_plan import plan_attention
from shoplm.model.config import ModelConfig
from shoplm.model.decoder import Decoder, StepInputs
from shoplm.model.eager_backend import EagerBackend
from shoplm.model.kv_pool import KVPool
from shoplm.model.linear import Linear
from shoplm.model.readouts import Readouts
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.weights import DecoderWeights
from shoplm.readout.sampling import argmax
from torch import Tensor


class TorchBackend(EagerBackend):
    """Runs each step at once, in the thread that submits it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        shop: ShopWeights | None = None,
        tries: Sequence[NamedTrie] = (),
        *,
        pages: int,
        page_size: int = 16,
        state_slots: int = 256,
        max_context_tokens: int | None = None,
        kv_format: str = "model",
    ) -> None:
        """The dtype is that of the weights, bf16 or fp32. `tries` are more catalogues: their tokens follow the shop's.
        `kv_format`: keys and values rounded as the GPU backend rounds them, which here saves nothing.

        Packs the weights for this CPU; the caller may drop `weights` afterwards. Raises ConfigurationError.
        """
        dtype = weights.embedding.dtype
        if dtype not in (torch.bfloat16, torch.float32):
            raise ConfigurationError(f"dtype {dtype} is not supported on a CPU: use bfloat16 or float32")
        readouts = Readouts(
            shop, tries, text_tokens=len(weights.embedding), hidden_size=config.hidden_size, state_slots=state_slots
        )
        positions = config.context_tokens(max_context_tokens)
        with torch.no_grad():
            shop_rows = readouts.take_input_rows(dtype)
            self._decoder = Decoder(config, weights, shop_rows, positions + readouts.beam_steps)
            self._head = _Head(weights.lm_head)
        self._pool = KVPool(
            layers=config.num_layers,
            pages=pages,
            kv_heads=config.num_kv_heads,
            page_size=page_size,
            head_dim=config.head_dim,
            dtype=dtype,
            kv_format=kv_format,
        )
        super().__init__(
            "torch",
            readouts,
            pages=pages,
            page_size=page_size,
            state_slots=state_slots,
            max_context_tokens=positions,
            vocab_size=self._decoder.vocab_size,
        )

    @property
    def pool(self) -> KVPool:
        """The keys and values; tests fill unused pages to see that they are never read."""
        return self._pool

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        self._pool.copy_pages(sources, targets)

    def _forward(
        self, batch: Batch, tokens: NDArray[np.int64], read: NDArray[np.int64], lineages: dict[int, NDArray[np.int64]]
    ) -> Tensor:
        config = self._decoder.config
        plans = {
            window: plan_attention(
                batch, lineages, self._pool, window=window, group=config.query_group, dtype=self._pool.keys.dtype
            )
            for window in set(config.sliding_windows)
        }
        inputs = StepInputs(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(batch.positions.astype(np.int64)),
            write_rows=self._pool.token_major(torch.from_numpy(batch.slots.astype(np.int64))),
            plans=plans,
            outputs=torch.from_numpy(read),
        )
        return self._decoder.forward(inputs, self._pool)


class _Head(Linear):
    """`TextHead` of torch's products."""

    def greedy(self, states: Tensor) -> list[int]:
        tokens: list[int] = argmax(self(states)).tolist()
        return tokens
