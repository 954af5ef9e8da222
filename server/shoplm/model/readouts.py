"""What a backend does with a step's hidden states, whatever computed them: draw tokens, search, predict.

Also the state that a running request keeps in a backend between two steps: the token drawn last, the beams.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import (
    Batch,
    EmbedReadout,
    ForkReadout,
    PredictReadout,
    Row,
    RowOutput,
    SampleReadout,
    SelectReadout,
)
from shoplm.errors import BundleError, ConfigurationError
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.readout.heads import Heads
from shoplm.readout.sampling import draw
from shoplm.readout.select import SelectJob, Selector
from shoplm.readout.table import SelectTable
from shoplm.request import ItemScores, Select
from torch import Tensor

_Place = tuple[int, SampleReadout, int]  # a row that draws, its readout, and how many of its draws come before this one


class TextHead(Protocol):
    """Reads text from hidden states."""

    def __call__(self, states: Tensor, /) -> Tensor:
        """`states` [rows, H] to logits [rows, tokens]."""
        ...

    def greedy(self, states: Tensor, /) -> list[int]:
        """The token of the largest logit of each row, the first of equal ones."""
        ...


class Readouts:
    """All readouts of one backend, and its state slots, on the host. The GPU backend takes tables and heads from here
    and reads out on its device (`device_readouts`)."""

    def __init__(
        self,
        shop: ShopWeights | None,
        tries: Sequence[NamedTrie],
        *,
        text_tokens: int,
        hidden_size: int,
        state_slots: int,
    ) -> None:
        """`tries` are more catalogues: their tokens follow the shop's, which follow `text_tokens` ids of text.

        Raises ConfigurationError for names that are the same, BundleError for rows that are not `hidden_size` wide.
        """
        if len({"", *(trie.name for trie in tries)}) != len(tries) + 1:
            raise ConfigurationError(f"tries need names that differ: {[trie.name for trie in tries]}")
        self._shop_rows = [] if shop is None else [shop.input_rows]
        self._selectors = {} if shop is None else {"": Selector(shop.table)}
        token = text_tokens + sum(map(len, self._shop_rows))
        for trie in tries:
            self._selectors[trie.name] = Selector(trie.table(token))
            self._shop_rows.append(trie.input_rows)
            token += len(trie.input_rows)
        if any(rows.shape[1] != hidden_size for rows in self._shop_rows):
            raise BundleError(f"the shop's rows are not {hidden_size} wide: the bundle is for another base model")
        self._heads = shop.heads if shop is not None else None
        self._last_token = np.zeros(state_slots, np.int64)

    @property
    def tables(self) -> dict[str, SelectTable]:
        """What items are scored with, by name of the catalogue."""
        return {name: selector.table for name, selector in self._selectors.items()}

    @property
    def heads(self) -> Heads | None:
        """The prediction heads, where the bundle has any."""
        return self._heads

    @property
    def trie_depths(self) -> dict[str, int]:
        """Codes per item, by name of the catalogue."""
        return {name: selector.table.trie.depth for name, selector in self._selectors.items()}

    @property
    def beam_steps(self) -> int:
        """How many tokens beams go behind their prompt, at most: an item's codes but for the last."""
        return max(self.trie_depths.values(), default=1) - 1

    @property
    def trie_items(self) -> dict[str, int]:
        """Items, by name of the catalogue."""
        return {name: selector.table.trie.items for name, selector in self._selectors.items()}

    @property
    def feature_count(self) -> int:
        """Dense features of a prediction."""
        return self._heads.features if self._heads is not None else 0

    def take_input_rows(self, dtype: torch.dtype) -> Tensor | None:
        """Input rows [shop tokens, H] of the bundle and all tries. Gives them away: they are needed once."""
        rows, self._shop_rows = self._shop_rows, []
        return torch.cat([part.to(dtype) for part in rows]) if rows else None

    def lanes(self, select: Select) -> int:
        """Lanes of this selection's beam rows."""
        return self._selector(select.trie).lanes(select)

    def lineages(self, batch: Batch) -> dict[int, NDArray[np.int64]]:
        """The lineage of each beam row, by its state slot. [step, lanes]: the lane at each step that a lane descends
        from."""
        return {
            row.state_slot: self._selector(row.readout.select.trie).lineage(row.state_slot)
            for row in batch.rows
            if row.beam is not None and isinstance(row.readout, SelectReadout)
        }

    def tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Token ids [T], those filled in that an earlier step chose."""
        tokens = batch.tokens.astype(np.int64)
        single = [row for row in batch.rows if row.token_from_state]
        if single:
            tokens[[row.query_start for row in single]] = self._last_token[[row.state_slot for row in single]]
        for row in batch.rows:
            if row.beam is not None and isinstance(row.readout, SelectReadout):
                tokens[row.query_start : row.query_end] = self._selector(row.readout.select.trie).tokens(row.state_slot)
        return tokens

    def read(
        self, rows: Sequence[Row], first: Mapping[int, int], hidden: Tensor, head: TextHead
    ) -> tuple[RowOutput, ...]:
        """All readouts of a step, each kind at once.

        `first`: row index -> its first row of `hidden` [R, H] (see `output_tokens`).
        """
        outputs: list[RowOutput] = [None] * len(rows)
        greedy: list[int] = []
        drawn: list[int] = []
        predictions: list[int] = []
        selections: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for index in first:
            match rows[index].readout:
                case SampleReadout(sampling):
                    (greedy if sampling.is_greedy else drawn).append(index)
                case SelectReadout(select, level):
                    selections[select.trie, level].append(index)
                case PredictReadout():
                    predictions.append(index)
                case EmbedReadout():
                    outputs[index] = tuple(hidden[first[index]].float().tolist())
                case ForkReadout() as readout:
                    start = first[index]
                    outputs[index] = self._forks(readout, hidden[start : start + len(readout.ends)])
        if greedy:
            places = _places(rows, greedy)
            tokens = head.greedy(hidden[[first[index] + behind for index, _, behind in places]])
            self._choose(rows, places, tokens, outputs)
        if drawn:
            places = _places(rows, drawn)
            logits = head(hidden[[first[index] + behind for index, _, behind in places]])
            samplings, indices = zip(*((each.sampling, each.index + behind) for _, each, behind in places), strict=True)
            self._choose(rows, places, draw(logits, samplings, indices), outputs)
        if predictions:
            self._predict(rows, predictions, hidden[[first[index] for index in predictions]], outputs)
        for (trie, _), chosen in selections.items():
            jobs = [_select_job(rows[index], first[index]) for index in chosen]
            found = self._selector(trie).step(hidden, jobs)
            for index, output in zip(chosen, found, strict=True):
                outputs[index] = output
        return tuple(outputs)

    def _choose(
        self, rows: Sequence[Row], places: Sequence[_Place], tokens: list[int], outputs: list[RowOutput]
    ) -> None:
        # Behind a draft the last token that counts is not known here; whoever drafts names tokens instead of slots.
        self._last_token[[rows[index].state_slot for index, _, _ in places]] = tokens
        for (index, readout, behind), token in zip(places, tokens, strict=True):
            if not readout.drafted:
                outputs[index] = token
            elif not behind:
                outputs[index] = [token]
            else:
                cast("list[int]", outputs[index]).append(token)

    def _predict(self, rows: Sequence[Row], chosen: list[int], hidden: Tensor, outputs: list[RowOutput]) -> None:
        if self._heads is None:
            raise BundleError("a prediction was asked for, but the bundle has no heads")
        readouts = [rows[index].readout for index in chosen]
        features = [readout.features for readout in readouts if isinstance(readout, PredictReadout)]
        values = self._heads.evaluate(hidden, features)
        for index, row_values in zip(chosen, values, strict=True):
            outputs[index] = row_values

    def _forks(self, readout: ForkReadout, hidden: Tensor) -> tuple[float, ...]:
        """What each of the forks [F, H] reads, one after another."""
        reads = readout.reads
        if isinstance(reads, ItemScores):
            return tuple(self._selector(reads.trie).log_p(hidden, reads.items).flatten().tolist())
        if self._heads is None:
            raise BundleError("a prediction was to be explained, but the bundle has no heads")
        values = self._heads.evaluate(hidden, reads.features)
        return tuple(value for row in values for value in row)

    def _selector(self, trie: str) -> Selector:
        selector = self._selectors.get(trie)
        if selector is None:
            raise ValueError(f"trie {trie!r} does not exist; there are {sorted(self._selectors)}")
        return selector


def output_tokens(batch: Batch) -> tuple[dict[int, int], NDArray[np.int64]]:
    """Row index -> first of its outputs, for rows with a readout; and the tokens whose hidden states are read."""
    first: dict[int, int] = {}
    tokens: list[int] = []
    for index, row in enumerate(batch.rows):
        if row.readout is None:
            continue
        first[index] = len(tokens)
        if row.query_len == 1 and not isinstance(row.readout, ForkReadout):  # an answer that goes on: most rows
            tokens.append(row.query_start)
        else:
            tokens += row.output_tokens
    return first, np.array(tokens, np.int64)


def _places(rows: Sequence[Row], chosen: Sequence[int]) -> list[_Place]:
    """The places at which these rows draw a token."""
    places = []
    for index in chosen:
        readout = rows[index].readout
        assert isinstance(readout, SampleReadout)
        places += [(index, readout, behind) for behind in range(1 + readout.drafted)]
    return places


def _select_job(row: Row, first: int) -> SelectJob:
    if not isinstance(row.readout, SelectReadout):
        raise ValueError(f"row of state slot {row.state_slot} is not a selection")
    return SelectJob(row.state_slot, row.readout.select, row.readout.level, first, row.output_count)
