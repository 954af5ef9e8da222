"""The base's hidden states at every sample, computed once and kept in shards, so that a stopped run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shoplm.bundle import PromptSchema
from shoplm.catalog.items import Catalog
from shoplm.model.adapter import read_adapter
from shoplm.model.base import Base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.shop_weights import mean_embeddings
from shoplm.model.tokenizer import Tokenizer
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import load_weights
from shoplm.prompt import PromptBuilder
from shoplm.training.catalogue import token_texts
from shoplm.training.histories import Histories
from shoplm.training.packing import Pack, pack_batch, pack_samples
from shoplm.training.samples import HiddenTable, samples_of
from shoplm.training.timeline import Timeline
from shoplm.vocabulary import ShopVocabulary

SHARD_CUSTOMERS = 32
MAX_SUFFIXES = 400  # rows of one step beside the prefix

Progress = Callable[[int, int, int], None]  # customers done, customers, tokens computed


@dataclass(frozen=True)
class Reader:
    """Reads hidden states of prompts, with the code that serves them."""

    builder: PromptBuilder
    backend: TorchBackend
    hidden_size: int
    input_rows: torch.Tensor  # [shop tokens, H]

    def read(self, pack: Pack) -> torch.Tensor:
        """[samples, H] in the backend's dtype, fp32 or bf16."""
        parts = []
        for start in range(0, len(pack.samples), MAX_SUFFIXES):
            end = start + MAX_SUFFIXES
            part = Pack(pack.prefix, pack.samples[start:end], pack.lengths[start:end], pack.suffixes[start:end])
            outputs = self.backend.submit(pack_batch(part)).result().outputs
            parts.append(torch.tensor(outputs[1:] if pack.prefix else outputs, dtype=torch.float32))
        return torch.cat(parts)


def make_reader(
    base: Base,
    catalog: Catalog,
    vocabulary: ShopVocabulary,
    schema: PromptSchema,
    dtype: torch.dtype,
    adapter: Path | None = None,
    input_rows: torch.Tensor | None = None,
) -> Reader:
    """Loads the base, merged with the adapter in that folder. `input_rows` [shop tokens, H], if they are not the
    mean embeddings of the tokens' texts."""
    tokenizer = Tokenizer.from_folder(base.folder)
    weights = load_weights(base.folder, base.config, dtype, adapter=None if adapter is None else read_adapter(adapter))
    if input_rows is None:
        rows = mean_embeddings(weights.embedding, [tokenizer.encode(text) for text in token_texts(catalog)])
    else:
        rows = input_rows.to(weights.embedding.dtype)
    if len(rows) != vocabulary.shop_size:
        raise ValueError(f"{len(rows)} token texts for {vocabulary.shop_size} shop tokens")
    weights = dataclasses.replace(weights, embedding=torch.cat((weights.embedding, rows)))
    builder = PromptBuilder(tokenizer, ChatTemplate.from_folder(base.folder), schema, vocabulary)
    longest = len(builder.prefix(None).tokens) + schema.history_budget_tokens + 1024
    backend = TorchBackend(
        base.config,
        weights,
        pages=longest + 4 * MAX_SUFFIXES,
        page_size=1,
        state_slots=MAX_SUFFIXES + 1,
        max_context_tokens=longest,
    )
    return Reader(builder, backend, base.config.hidden_size, rows)


class HiddenStates:
    """Hidden states of a shop's customers, in a seeded random order, so that any number of them is a fair sample."""

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        histories: Histories,
        timeline: Timeline,
        identity: dict[str, object],
        seed: int,
    ) -> None:
        """`folder` keeps the shards; those of another `identity` (data, base, prompt, seed) are not used."""
        self._reader = reader
        self._histories = histories
        self._timeline = timeline
        self._order = np.random.default_rng(seed).permutation(len(histories))
        text = json.dumps({**identity, "seed": seed, "timeline": msgspec.to_builtins(timeline)}, sort_keys=True)
        self.folder = folder / f"hidden-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokens_computed = 0
        self.seconds = 0.0

    def compute(self, customers: int, deadline: float | None, progress: Progress) -> tuple[HiddenTable, int]:
        """The states of the first `customers` of the order, from shards where they exist. After `deadline`
        (time.monotonic) no new shard is begun, beyond the first. Also returns how many customers were read."""
        shards: list[dict[str, torch.Tensor]] = []
        customers, read = min(customers, len(self._order)), 0
        for start in range(0, customers, SHARD_CUSTOMERS):
            chosen = self._order[start : min(start + SHARD_CUSTOMERS, customers)]
            path = self.folder / f"{start:07d}-{len(chosen)}.safetensors"
            if not path.exists():
                if deadline is not None and time.monotonic() > deadline and shards:
                    break
                self._write(path, chosen.tolist())
            shards.append(load_file(path))
            read = start + len(chosen)
            progress(read, customers, self.tokens_computed)
        columns = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        table = HiddenTable(
            customer=columns["customer"].numpy(),
            moment=columns["moment"].numpy(),
            task=columns["task"].numpy(),
            use=columns["use"].numpy(),
            hidden=columns["hidden"].float().numpy(),
        )
        return table, read

    def estimate_tokens(self, sampled: int = 24) -> float:
        """Tokens per customer, from the first of the order."""
        chosen = self._order[:sampled].tolist()
        return float(np.mean([sum(pack.tokens for pack in self._packs(customer)) for customer in chosen]))

    def measure_speed(self, customers: int) -> float:
        """Tokens per second on this machine: `customers` passes, after one to warm up."""
        packs = [pack for customer in self._order[: customers + 1].tolist() for pack in self._packs(customer)]
        if not packs:
            return 1.0
        self._reader.read(packs[0])
        begun = time.perf_counter()
        for pack in packs[:customers]:
            self._reader.read(pack)
        return sum(pack.tokens for pack in packs[:customers]) / (time.perf_counter() - begun)

    def _packs(self, customer: int) -> list[Pack]:
        history = self._histories[customer]
        return pack_samples(self._reader.builder, history, samples_of(history, self._timeline))

    def _write(self, path: Path, customers: Sequence[int]) -> None:
        begun = time.perf_counter()
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("customer", "moment", "task", "use", "hidden")}
        parts["hidden"].append(torch.zeros(0, self._reader.hidden_size))
        for customer in customers:
            for pack in self._packs(customer):
                parts["hidden"].append(self._reader.read(pack))
                self.tokens_computed += pack.tokens
                count = len(pack.samples)
                parts["customer"].append(torch.full((count,), customer, dtype=torch.int32))
                parts["moment"].append(torch.tensor([s.moment for s in pack.samples], dtype=torch.float64))
                parts["task"].append(torch.tensor([int(s.task) for s in pack.samples], dtype=torch.int8))
                parts["use"].append(torch.tensor([int(s.use) for s in pack.samples], dtype=torch.int16))
        empty = {"customer": torch.int32, "moment": torch.float64, "task": torch.int8, "use": torch.int16}
        columns = {name: torch.cat([torch.zeros(0, dtype=dtype), *parts[name]]) for name, dtype in empty.items()}
        # bf16 loses nothing of what a bf16 model gives, and 0.4 % of what an fp32 one does.
        columns["hidden"] = torch.cat(parts["hidden"]).to(torch.bfloat16)
        temporary = path.with_suffix(".partial")
        save_file(columns, temporary)
        temporary.replace(path)
        self.seconds += time.perf_counter() - begun
