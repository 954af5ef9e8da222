"""The tensors of a bundle: input rows of the shop's own tokens, output rows of its items, heads.

weights.safetensors holds (n items, H hidden size, K codes of a level, F dense features, P raw head values):

- `input_rows` [shop tokens, H], optional: absent, each row is the mean of the base's embeddings of a token's text;
- `output_rows.{level}` [K, H] and `output_bias.{level}` [K], for every level of the code;
- `popularity` [n]: natural logs;
- `loyalty` [n], optional, and `neighbours.starts` [n + 1], `neighbours.items` [E], `neighbours.strengths` [E], all or
  none of them: see `shoplm.readout.habits`;
- `rebuy.*`, optional: read where requests are made and not by a backend, see `shoplm.readout.rebuy`;
- `adopt.*`, optional: see `shoplm.readout.adopt`;
- `head.input_mean` [F], `head.input_scale` [F], `head.weight` [P, H + F + M], `head.bias` [P], all or none of them,
  `head.input_range` [2, F], optional, and where the heads have hidden units on the features, `head.unit_weight` [M, F]
  and `head.unit_bias` [M];
- `codes` [n, depth], only for codes of more than one token: sorted, item row = position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from shoplm.bundle import ShopManifest
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.catalog.trie import Trie
from shoplm.errors import BundleError
from shoplm.readout.habits import HabitTable, habit_table
from shoplm.readout.heads import Heads
from shoplm.readout.table import SelectTable
from shoplm.request import OWN_LANES
from shoplm.vocabulary import ShopVocabulary
from torch import Tensor
from torch.nn import functional

_HEAD_KEYS = ("head.input_mean", "head.input_scale", "head.weight", "head.bias")
_UNIT_KEYS = ("head.unit_weight", "head.unit_bias")
_RANGE_KEY = "head.input_range"


@dataclass(frozen=True)
class ShopWeights:
    """What a backend needs of a bundle."""

    input_rows: Tensor  # [shop tokens, H]: embeddings of the token ids behind the text vocabulary
    table: SelectTable
    heads: Heads | None


@dataclass(frozen=True)
class NamedTrie:
    """A further catalogue that requests reach by name: for benchmarks and tests of the search."""

    name: str
    trie: Trie
    input_rows: Tensor  # [sum of level sizes, H], level by level
    output_rows: tuple[Tensor, ...]  # per level, [codes, H]

    def table(self, first_token: int) -> SelectTable:
        """Scores are the model's alone; token ids start at `first_token`."""
        sizes = self.trie.level_sizes
        return SelectTable(
            trie=self.trie,
            output_rows=tuple(rows.float() for rows in self.output_rows),
            output_bias=tuple(torch.zeros(size) for size in sizes),
            token_starts=tuple(int(first_token + sum(sizes[:level])) for level in range(len(sizes))),
            popularity=np.zeros(self.trie.items, np.float32),
            habits=HabitTable(1.0),
            popularity_weight=0.0,
            filters=ItemFilters(self.trie.items),
        )


def random_trie(name: str, *, items: int, level_sizes: tuple[int, ...], hidden_size: int, seed: int) -> NamedTrie:
    """A synthetic catalogue: `items` distinct random codes, random rows. The same for the same arguments."""
    space = int(np.prod(np.asarray(level_sizes, dtype=object)))
    if not 0 < items <= space:
        raise ValueError(f"items is {items}, but level sizes {level_sizes} make {space} codes")
    generator = np.random.default_rng(seed)
    numbers = np.sort(generator.choice(space, items, replace=False))
    codes = np.stack(np.unravel_index(numbers, level_sizes), axis=1).astype(np.int32)
    rows = torch.Generator().manual_seed(seed)
    return NamedTrie(
        name=name,
        trie=Trie.from_codes(codes, level_sizes),
        input_rows=0.05 * torch.randn(sum(level_sizes), hidden_size, generator=rows),
        output_rows=tuple(0.2 * torch.randn(size, hidden_size, generator=rows) for size in level_sizes),
    )


def load_shop_weights(
    path: Path,
    manifest: ShopManifest,
    vocabulary: ShopVocabulary,
    embedding: Tensor,
    *,
    columns: ItemColumns | None = None,
    token_texts: Sequence[Sequence[int]] | None = None,
    own_lanes: int = OWN_LANES,
) -> ShopWeights:
    """Read weights.safetensors.

    `embedding` [V, H] is the base's; `token_texts` are the texts of all shop tokens as text token ids, needed where the
    file has no input rows. Raises BundleError naming the key that is missing, does not fit, or is not finite.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {error}") from error
    reader = _Reader(path, tensors)
    hidden = embedding.shape[1]
    sizes = vocabulary.level_sizes
    if "input_rows" in tensors:
        input_rows = reader.take("input_rows", (vocabulary.shop_size, hidden)).to(embedding.dtype)
    elif token_texts is not None:
        input_rows = mean_embeddings(embedding, token_texts)
        if len(input_rows) != vocabulary.shop_size:
            raise BundleError(f"{path}: {len(input_rows)} token texts for {vocabulary.shop_size} shop tokens")
    else:
        raise BundleError(f"{path}: no input_rows, and no token texts to make them from")
    popularity = reader.take("popularity", (None,)).float().numpy()
    trie = _trie(reader, sizes, len(popularity))
    table = SelectTable(
        trie=trie,
        output_rows=tuple(reader.take(f"output_rows.{n}", (size, hidden)).float() for n, size in enumerate(sizes)),
        output_bias=tuple(reader.take(f"output_bias.{n}", (size,)).float() for n, size in enumerate(sizes)),
        token_starts=vocabulary.level_starts,
        popularity=popularity,
        habits=_habits(reader, manifest, len(popularity)),
        popularity_weight=manifest.score.popularity_weight,
        filters=ItemFilters(trie.items, columns),
        own_lanes=own_lanes,
    )
    return ShopWeights(input_rows, table, _heads(reader, hidden))


def _habits(reader: _Reader, manifest: ShopManifest, items: int) -> HabitTable:
    def read(key: str) -> NDArray[Any] | None:
        tensor = reader.tensors.get(key)
        return None if tensor is None else tensor.numpy()

    try:
        table = habit_table(manifest.score, read)
        table.check(items)
    except ValueError as error:
        raise BundleError(f"{reader.path}: {error}") from error
    return table


def mean_embeddings(embedding: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """[texts, H] in the embedding's dtype: the mean of each text's rows, taken in fp32. Raises BundleError for an
    empty text."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.long)
    if not bool((lengths > 0).all()):
        raise BundleError(f"the text of shop token {int((lengths == 0).long().argmax())} has no tokens")
    flat = torch.tensor([token for text in texts for token in text], dtype=torch.long)
    rows, local = torch.unique(flat, return_inverse=True)
    means = functional.embedding_bag(local, embedding[rows].float(), lengths.cumsum(0) - lengths, mode="mean")
    return means.to(embedding.dtype)


def _trie(reader: _Reader, sizes: tuple[int, ...], items: int) -> Trie:
    if len(sizes) == 1:
        if sizes[0] != items:
            raise BundleError(f"{reader.path}: popularity has {items} entries, but level_sizes names {sizes[0]} items")
        return Trie.from_codes(np.arange(items, dtype=np.int32)[:, None], sizes)
    codes = reader.take("codes", (items, len(sizes)))
    try:
        return Trie.from_codes(codes.to(torch.int32).numpy(), sizes)
    except ValueError as error:
        raise BundleError(f"{reader.path}: codes: {error}") from error


def _heads(reader: _Reader, hidden: int) -> Heads | None:
    present = [key for key in _HEAD_KEYS if key in reader.tensors]
    if not present:
        return None
    mean = reader.take("head.input_mean", (None,)).float()
    bias = reader.take("head.bias", (None,)).float()
    unit_weight, unit_bias, limits = (
        None if (found := reader.tensors.get(key)) is None else found.float() for key in (*_UNIT_KEYS, _RANGE_KEY)
    )
    width = hidden + len(mean) + (0 if unit_weight is None else len(unit_weight))
    weight = reader.take("head.weight", (len(bias), width)).float()
    scale = reader.take("head.input_scale", (len(mean),)).float()
    try:
        return Heads(mean, scale, weight, bias, unit_weight, unit_bias, limits)
    except ValueError as error:
        raise BundleError(f"{reader.path}: {error}") from error


@dataclass(frozen=True)
class _Reader:
    path: Path
    tensors: Mapping[str, Tensor]

    def take(self, key: str, shape: tuple[int | None, ...]) -> Tensor:
        tensor = self.tensors.get(key)
        if tensor is None:
            raise BundleError(f"{self.path}: {key} is missing")
        fits = len(tensor.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise BundleError(f"{self.path}: {key} has shape {list(tensor.shape)}, expected [{expected}]")
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{self.path}: {key} has values that are not finite")
        return tensor
