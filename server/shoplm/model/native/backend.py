"""The backend for CPUs with AMX, AVX-512 or AVX2: the step in C++, readouts in torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import Batch
from shoplm.model.config import ModelConfig
from shoplm.model.eager_backend import EagerBackend
from shoplm.model.native.build import NativeUnavailableError
from shoplm.model.native.decoder import NativeDecoder, unsupported
from shoplm.model.native.head import NativeHead
from shoplm.model.native.library import NativeLibrary, best_library
from shoplm.model.native.linear import WeightFormat
from shoplm.model.native.pool import NativePool
from shoplm.model.readouts import Readouts
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.weights import DecoderWeights
from torch import Tensor


def native_refusal(config: ModelConfig, dtype: torch.dtype, page_size: int) -> str | None:
    """Why this backend cannot serve; None: it can. Builds the library the first time."""
    if dtype != torch.bfloat16:
        return f"dtype is {dtype}, not bfloat16"
    try:
        best_library()
    except NativeUnavailableError as error:
        return str(error)
    return unsupported(config, page_size)


class NativeBackend(EagerBackend):
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
        format: WeightFormat = WeightFormat.BF16,
        kv_format: str = "model",
        library: NativeLibrary | None = None,
    ) -> None:
        """As `TorchBackend`; `format` is of all products' weights; the head's are int8 where they are int4.
        `kv_format`: what keys and values are kept in, model (bf16) or int8. `library`: the best of this machine. Needs
        `native_refusal` to be None."""
        library = library or best_library()
        readouts = Readouts(
            shop, tries, text_tokens=len(weights.embedding), hidden_size=config.hidden_size, state_slots=state_slots
        )
        positions = config.context_tokens(max_context_tokens)
        pool = NativePool(library.instructions, config, pages=pages, page_size=page_size, kv_format=kv_format)
        with torch.no_grad():
            shop_rows = readouts.take_input_rows(torch.bfloat16)
            longest = positions + readouts.beam_steps
            self._decoder = NativeDecoder(library, config, weights, shop_rows, longest, pool, format=format)
            self._head = NativeHead(library, weights.lm_head, format=format)
        super().__init__(
            str(library.instructions)
            + ("" if format is WeightFormat.BF16 else f"-{format.name.lower()}")
            + ("" if kv_format == "model" else f"-kv-{kv_format}"),
            readouts,
            pages=pages,
            page_size=page_size,
            state_slots=state_slots,
            max_context_tokens=positions,
            vocab_size=self._decoder.vocab_size,
        )

    @property
    def pool(self) -> NativePool:
        """The keys and values; tests fill unused pages to see that they are never read."""
        return self._decoder.pool

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        self._decoder.pool.copy_pages(sources, targets)

    def _forward(
        self, batch: Batch, tokens: NDArray[np.int64], read: NDArray[np.int64], lineages: dict[int, NDArray[np.int64]]
    ) -> Tensor:
        return self._decoder.forward(batch, tokens, read, lineages)
