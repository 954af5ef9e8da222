"""Reads the base's hidden states of packs of prompts, with the backend that serves them on this machine's CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from shoplm.bundle import PromptSchema
from shoplm.catalog.items import Catalog
from shoplm.engine.cpu import cpu_backend
from shoplm.engine.shop_texts import token_texts
from shoplm.engine.spec import EngineSpec
from shoplm.model.adapter import keeps_apart, read_adapter
from shoplm.model.base import Base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.eager_backend import EagerBackend
from shoplm.model.linear import packing_supported
from shoplm.model.shop_weights import mean_embeddings
from shoplm.model.tokenizer import Tokenizer
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import DecoderWeights, load_weights
from shoplm.prompt import PromptBuilder
from shoplm.training.formats import UNROUNDED, Formats
from shoplm.training.packing import Pack
from shoplm.training.passes import groups, lay_out
from shoplm.vocabulary import ShopVocabulary

SUFFIX_PAGES = 256  # beside the longest prefix: several packs share a step, whose weights are read once


@dataclass(frozen=True)
class Reader:
    """Reads hidden states of prompts, with the code that serves them."""

    builder: PromptBuilder
    backend: EagerBackend
    hidden_size: int
    input_rows: torch.Tensor  # [shop tokens, H]

    def read(self, packs: Sequence[Pack]) -> torch.Tensor:
        """fp32 [samples, H], pack after pack. Raises ValueError for a pack of more than `SUFFIX_PAGES` samples."""
        info = self.backend.info
        states = [torch.zeros(0, self.hidden_size)]
        for group in groups(packs, info.page_size, info.pages):
            passes = lay_out(group, info.page_size)
            if passes.prefixes is not None:
                self.backend.submit(passes.prefixes).result()
            self.backend.copy_pages(*torch.from_numpy(passes.copied).unbind(1))
            states.append(torch.tensor(self.backend.submit(passes.suffixes).result().outputs))
        return torch.cat(states)


def base_weights(base: Base, dtype: torch.dtype, adapter: Path | None, formats: Formats) -> DecoderWeights:
    """The base with the adapter in that folder, as it is served in these formats; a GPU's weights are rounded here."""
    read = None if adapter is None else read_adapter(adapter)
    weights = load_weights(base.folder, base.config, dtype, adapter=read, apart=keeps_apart(formats.weights))
    if formats.weights == "model" or formats.of_cpu:
        return weights
    from shoplm.model.rounded import rounded  # needs Triton

    return rounded(weights, formats.weights)


def make_reader(
    base: Base,
    catalog: Catalog,
    vocabulary: ShopVocabulary,
    schema: PromptSchema,
    dtype: torch.dtype,
    adapter: Path | None = None,
    input_rows: torch.Tensor | None = None,
    formats: Formats = UNROUNDED,
) -> Reader:
    """Loads the base with the adapter in that folder, as it is served in these formats. `input_rows` [shop tokens, H],
    if they are not the mean embeddings of the tokens' texts."""
    tokenizer = Tokenizer.from_folder(base.folder)
    weights = base_weights(base, dtype, adapter, formats)
    if input_rows is None:
        rows = mean_embeddings(weights.embedding, [tokenizer.encode(text) for text in token_texts(catalog)])
    else:
        rows = input_rows.to(weights.embedding.dtype)
    if len(rows) != vocabulary.shop_size:
        raise ValueError(f"{len(rows)} token texts for {vocabulary.shop_size} shop tokens")
    weights = dataclasses.replace(weights, embedding=torch.cat((weights.embedding, rows)))
    builder = PromptBuilder(tokenizer, ChatTemplate.from_folder(base.folder), schema, vocabulary)
    longest = len(builder.prefix(None).tokens) + schema.history_budget_tokens + 1024
    spec = EngineSpec(
        str(base.folder),
        max_context_tokens=longest,
        max_running_requests=SUFFIX_PAGES,
        weight_format=formats.weights if formats.of_cpu else "model",
        kv_format=(formats.kv or "model") if formats.of_cpu else "model",
    )
    pages = -(-longest // spec.page_size) + SUFFIX_PAGES
    backend: EagerBackend
    if formats.kv is None or formats.of_cpu:
        backend = cpu_backend(spec, base.config, weights, None, (), pages)
    else:
        backend = TorchBackend(
            base.config,
            weights if packing_supported() else weights.float(),
            pages=pages,
            page_size=spec.page_size,
            state_slots=spec.max_running_requests,
            max_context_tokens=longest,
            kv_format=formats.kv,
        )
    return Reader(builder, backend, base.config.hidden_size, rows)
