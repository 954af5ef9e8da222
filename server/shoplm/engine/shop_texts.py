"""What a bundle says of its shop's items, with every word of it as tokens.

The API process, which reads it anyway, sends it to the engine while that imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from shoplm.bundle import ShopManifest, read_manifest
from shoplm.catalog.filters import ItemColumns
from shoplm.model.tokenizer import Tokenizer
from shoplm.vocabulary import SPECIAL_TEXTS

if TYPE_CHECKING:
    from shoplm.catalog.items import Catalog


class ShopTexts(msgspec.Struct, frozen=True):
    """The texts and columns of one bundle, as plain data."""

    categories: list[str]  # of each item row
    prices: list[float]  # NaN where unknown
    in_stock: list[bool]
    tokens: list[list[int]] | None  # the words behind each shop token; None for codes of several tokens

    @classmethod
    def of(cls, manifest: ShopManifest, catalog: Catalog, tokenizer: Tokenizer) -> ShopTexts:
        """Bundles whose items have codes of several tokens store the rows of these."""
        tokens = None if manifest.depth > 1 else _tokens(token_texts(catalog), tokenizer)
        return cls(catalog.categories, catalog.prices.tolist(), catalog.in_stock.tolist(), tokens)

    @property
    def columns(self) -> ItemColumns:
        return ItemColumns(self.categories, np.array(self.prices, np.float64), np.array(self.in_stock, np.bool_))


def read_shop_texts(bundle: Path, base_folder: Path) -> ShopTexts:
    """Raises BundleError and BaseModelError."""
    from shoplm.catalog.items import read_catalog  # polars: an engine that is told does without

    tokenizer = Tokenizer.from_folder(base_folder)
    return ShopTexts.of(read_manifest(bundle, verify=False), read_catalog(bundle), tokenizer)


def token_texts(catalog: Catalog) -> list[str]:
    """The words that each of the shop's input embeddings is made from, in the order of the shop's token ids."""
    return [*SPECIAL_TEXTS.values(), *(catalog.text(row) for row in range(len(catalog))), *catalog.type_texts]


def _tokens(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    # Many items share their words: each text is encoded once.
    distinct = list(dict.fromkeys(texts))
    encoded = dict(zip(distinct, tokenizer.encode_all(distinct), strict=True))
    return [encoded[text] for text in texts]
