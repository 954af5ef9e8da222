"""The backend for CPUs: torch operations, bf16 or fp32, no compiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.engine.batch import (
    Batch,
    EmbedReadout,
    PredictReadout,
    Row,
    RowOutput,
    SampleReadout,
    SelectReadout,
    StepResult,
)
from shoplm.errors import BundleError, ConfigurationError
from shoplm.model.attention_plan import plan_attention
from shoplm.model.backend import BackendInfo, Handle
from shoplm.model.config import ModelConfig
from shoplm.model.decoder import Decoder, StepInputs
from shoplm.model.kv_pool import KVPool
from shoplm.model.linear import Linear
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.weights import DecoderWeights
from shoplm.readout.sampling import sample
from shoplm.readout.select import SelectJob, Selector
from shoplm.request import Select
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Done:
    """A step that ran in `submit`."""

    outcome: StepResult | Exception

    def result(self) -> StepResult:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class TorchBackend:
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
    ) -> None:
        """The dtype is that of the weights, bf16 or fp32. `tries` are more catalogues: their tokens follow the shop's.

        Packs the weights for this CPU; the caller may drop `weights` afterwards. Raises ConfigurationError.
        """
        dtype = weights.embedding.dtype
        if dtype not in (torch.bfloat16, torch.float32):
            raise ConfigurationError(f"dtype {dtype} is not supported on a CPU: use bfloat16 or float32")
        if len({"", *(trie.name for trie in tries)}) != len(tries) + 1:
            raise ConfigurationError(f"tries need names that differ: {[trie.name for trie in tries]}")
        shop_rows = [] if shop is None else [shop.input_rows]
        self._selectors = {} if shop is None else {"": Selector(shop.table)}
        token = len(weights.embedding) + sum(map(len, shop_rows))
        for trie in tries:
            self._selectors[trie.name] = Selector(trie.table(token))
            shop_rows.append(trie.input_rows)
            token += len(trie.input_rows)
        if any(rows.shape[1] != config.hidden_size for rows in shop_rows):
            raise BundleError(
                f"the shop's rows are not {config.hidden_size} wide: the bundle is for another base model"
            )
        positions = min(max_context_tokens or config.max_positions, config.max_positions)
        joined = torch.cat([rows.to(dtype) for rows in shop_rows]) if shop_rows else None
        with torch.no_grad():
            self._decoder = Decoder(config, weights, joined, positions)
            self._head = Linear(weights.lm_head)
        self._pool = KVPool(
            layers=config.num_layers,
            pages=pages,
            kv_heads=config.num_kv_heads,
            page_size=page_size,
            head_dim=config.head_dim,
            dtype=dtype,
        )
        self._heads = shop.heads if shop is not None else None
        self._last_token = np.zeros(state_slots, np.int64)
        self._info = BackendInfo(
            name="torch",
            pages=pages,
            page_size=page_size,
            state_slots=state_slots,
            max_context_tokens=positions,
            vocab_size=self._decoder.vocab_size,
            trie_depths={name: selector.table.trie.depth for name, selector in self._selectors.items()},
            trie_items={name: selector.table.trie.items for name, selector in self._selectors.items()},
            feature_count=self._heads.features if self._heads is not None else 0,
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def pool(self) -> KVPool:
        """The keys and values; tests fill unused pages to see that they are never read."""
        return self._pool

    def lanes(self, select: Select) -> int:
        return self._selector(select).lanes(select)

    def submit(self, batch: Batch) -> Handle:
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                outputs = self._run(batch)
        except Exception as error:  # the engine sees it where it asks for the result
            return _Done(error)
        return _Done(StepResult(outputs, time.perf_counter() - start))

    def close(self) -> None:
        """Nothing to do: memory goes with the object."""

    def _run(self, batch: Batch) -> tuple[RowOutput, ...]:
        config = self._decoder.config
        lineages = {
            row.state_slot: self._selector(row.readout.select).lineage(row.state_slot)
            for row in batch.rows
            if row.beam is not None and isinstance(row.readout, SelectReadout)
        }
        readouts, outputs = _output_tokens(batch)
        plans = {
            window: plan_attention(
                batch, lineages, self._pool, window=window, group=config.query_group, dtype=self._pool.keys.dtype
            )
            for window in set(config.sliding_windows)
        }
        inputs = StepInputs(
            tokens=torch.from_numpy(self._tokens(batch)),
            positions=torch.from_numpy(batch.positions.astype(np.int64)),
            write_rows=self._pool.token_major(torch.from_numpy(batch.slots.astype(np.int64))),
            plans=plans,
            outputs=torch.from_numpy(outputs),
        )
        hidden = self._decoder.forward(inputs, self._pool)
        return self._read(batch.rows, readouts, hidden)

    def _tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Token ids, those filled in that an earlier step chose."""
        tokens = batch.tokens.astype(np.int64)
        single = [row for row in batch.rows if row.token_from_state]
        if single:
            tokens[[row.query_start for row in single]] = self._last_token[[row.state_slot for row in single]]
        for row in batch.rows:
            if row.beam is not None and isinstance(row.readout, SelectReadout):
                tokens[row.query_start : row.query_end] = self._selector(row.readout.select).tokens(row.state_slot)
        return tokens

    def _read(self, rows: Sequence[Row], first: Mapping[int, int], hidden: Tensor) -> tuple[RowOutput, ...]:
        """All readouts of a step, each kind at once. `first`: row index -> its first row of `hidden`."""
        outputs: list[RowOutput] = [None] * len(rows)
        samples: list[int] = []
        predictions: list[int] = []
        selections: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for index in first:
            match rows[index].readout:
                case SampleReadout():
                    samples.append(index)
                case SelectReadout(select, level):
                    selections[select.trie, level].append(index)
                case PredictReadout():
                    predictions.append(index)
                case EmbedReadout():
                    outputs[index] = tuple(hidden[first[index]].float().tolist())
        self._sample(rows, samples, first, hidden, outputs)
        self._predict(rows, predictions, first, hidden, outputs)
        for (trie, _), chosen in selections.items():
            jobs = [_select_job(rows[index], first[index]) for index in chosen]
            found = self._selectors[trie].step(hidden, jobs)
            for index, output in zip(chosen, found, strict=True):
                outputs[index] = output
        return tuple(outputs)

    def _sample(
        self, rows: Sequence[Row], chosen: list[int], first: Mapping[int, int], hidden: Tensor, outputs: list[RowOutput]
    ) -> None:
        readouts = [(index, rows[index].readout) for index in chosen]
        settings = [(index, readout) for index, readout in readouts if isinstance(readout, SampleReadout)]
        if not settings:
            return
        logits = self._head(hidden[[first[index] for index in chosen]])
        tokens = sample(logits, [r.sampling for _, r in settings], [r.index for _, r in settings])
        self._last_token[[rows[index].state_slot for index in chosen]] = tokens
        for index, token in zip(chosen, tokens, strict=True):
            outputs[index] = token

    def _predict(
        self, rows: Sequence[Row], chosen: list[int], first: Mapping[int, int], hidden: Tensor, outputs: list[RowOutput]
    ) -> None:
        if not chosen:
            return
        if self._heads is None:
            raise BundleError("a prediction was asked for, but the bundle has no heads")
        readouts = [rows[index].readout for index in chosen]
        features = [readout.features for readout in readouts if isinstance(readout, PredictReadout)]
        values = self._heads.evaluate(hidden[[first[index] for index in chosen]], features)
        for index, row_values in zip(chosen, values, strict=True):
            outputs[index] = row_values

    def _selector(self, select: Select) -> Selector:
        selector = self._selectors.get(select.trie)
        if selector is None:
            raise ValueError(f"trie {select.trie!r} does not exist; there are {sorted(self._selectors)}")
        return selector


def _output_tokens(batch: Batch) -> tuple[dict[int, int], NDArray[np.int64]]:
    """Row index -> first of its outputs, for rows with a readout; and the tokens whose hidden states are read."""
    first: dict[int, int] = {}
    tokens: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    count = 0
    for index, row in enumerate(batch.rows):
        if row.readout is None:
            continue
        start = row.query_start if row.beam is not None else row.query_end - 1
        first[index] = count
        tokens.append(np.arange(start, row.query_end))
        count += row.query_end - start
    return first, np.concatenate(tokens)


def _select_job(row: Row, first: int) -> SelectJob:
    if not isinstance(row.readout, SelectReadout):
        raise ValueError(f"row of state slot {row.state_slot} is not a selection")
    count = row.query_len if row.beam is not None else 1
    return SelectJob(row.state_slot, row.readout.select, row.readout.level, first, count)
