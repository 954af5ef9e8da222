"""Reading a bundle's tensors, and what is said where one does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shoplm.bundle import BaseReference, PromptSchema, ScoreWeights, ShopManifest
from shoplm.errors import BundleError
from shoplm.model.shop_weights import load_shop_weights, mean_embeddings, random_trie
from shoplm.vocabulary import SPECIAL_TEXTS, ShopVocabulary

HIDDEN, TEXT = 6, 50
EMBEDDING = torch.randn(TEXT, HIDDEN, generator=torch.Generator().manual_seed(0))


def manifest_of(sizes: tuple[int, ...]) -> ShopManifest:
    return ShopManifest(
        format=1,
        name="test",
        version="1",
        title="Test",
        currency="EUR",
        notice="",
        trained_until="2018-01-01T00:00:00Z",
        base=BaseReference("base", "0", HIDDEN, TEXT),
        score=ScoreWeights(repeat_weight=1.25, popularity_weight=0.5, decay_days=120.0),
        prompt=PromptSchema(preamble=""),
        depth=len(sizes),
        level_sizes=sizes,
        type_count=2,
        feature_version=1,
        hashes={},
    )


def tensors_of(sizes: tuple[int, ...], items: int) -> dict[str, torch.Tensor]:
    tensors = {"popularity": torch.linspace(-9, -2, items)}
    for level, size in enumerate(sizes):
        tensors[f"output_rows.{level}"] = torch.randn(size, HIDDEN).to(torch.float16)
        tensors[f"output_bias.{level}"] = torch.randn(size)
    tensors["head.input_mean"], tensors["head.input_scale"] = torch.zeros(3), torch.ones(3)
    tensors["head.weight"], tensors["head.bias"] = torch.randn(2, HIDDEN + 3), torch.zeros(2)
    return tensors


def texts_of(vocabulary: ShopVocabulary) -> list[list[int]]:
    return [[token % TEXT, (token * 7) % TEXT, 3][: 1 + token % 3] for token in range(vocabulary.shop_size)]


def load(folder: Path, tensors: dict[str, torch.Tensor], sizes: tuple[int, ...], *, texts: bool = True):  # type: ignore[no-untyped-def]
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    vocabulary = ShopVocabulary(TEXT, sizes, 2)
    return load_shop_weights(
        path, manifest_of(sizes), vocabulary, EMBEDDING, token_texts=texts_of(vocabulary) if texts else None
    )


def test_codes_of_one_token_need_no_codes(tmp_path: Path) -> None:
    shop = load(tmp_path, tensors_of((8,), 8), (8,))
    assert shop.table.trie.codes[:, 0].tolist() == list(range(8))
    assert shop.table.token_starts == (TEXT + len(SPECIAL_TEXTS),)
    assert (shop.table.habits.repeat_weight, shop.table.popularity_weight) == (1.25, 0.5)
    assert shop.table.output_rows[0].dtype == torch.float32
    assert shop.heads is not None and (shop.heads.features, shop.heads.outputs) == (3, 2)
    texts = texts_of(ShopVocabulary(TEXT, (8,), 2))
    expected = torch.stack([EMBEDDING[text].mean(0) for text in texts])
    torch.testing.assert_close(shop.input_rows, expected)


def test_longer_codes_and_stored_input_rows(tmp_path: Path) -> None:
    tensors = tensors_of((3, 4), 5)
    tensors["codes"] = torch.tensor([[0, 0], [0, 3], [1, 1], [2, 0], [2, 2]], dtype=torch.int32)
    rows = ShopVocabulary(TEXT, (3, 4), 2).shop_size
    tensors["input_rows"] = torch.randn(rows, HIDDEN).to(torch.bfloat16)
    for key in [key for key in tensors if key.startswith("head.")]:
        del tensors[key]
    shop = load(tmp_path, tensors, (3, 4), texts=False)
    assert shop.heads is None
    assert shop.table.trie.depth == 2
    torch.testing.assert_close(shop.input_rows, tensors["input_rows"].float())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("popularity", None, "popularity is missing"),
        ("output_rows.0", torch.zeros(8, 5), r"output_rows.0 has shape \[8, 5\], expected \[8, 6\]"),
        ("output_bias.0", torch.zeros(7), r"output_bias.0 has shape \[7\], expected \[8\]"),
        ("popularity", torch.zeros(9), "popularity has 9 entries, but level_sizes names 8 items"),
        ("head.bias", None, "head.bias is missing"),
        ("head.weight", torch.zeros(2, 4), r"head.weight has shape \[2, 4\], expected \[2, 9\]"),
        ("head.input_scale", torch.zeros(3), "input_scale has an entry that is not positive"),
        ("input_rows", torch.zeros(1, 6), r"input_rows has shape \[1, 6\]"),
        ("output_rows.0", torch.full((8, 6), torch.nan), r"output_rows.0 has values that are not finite"),
        ("popularity", torch.full((8,), -torch.inf), "popularity has values that are not finite"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, key: str, value: torch.Tensor | None, message: str) -> None:
    tensors = tensors_of((8,), 8)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    with pytest.raises(BundleError, match=message):
        load(tmp_path, tensors, (8,))


def test_files_texts_and_codes_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no input_rows, and no token texts"):
        load(tmp_path, tensors_of((8,), 8), (8,), texts=False)
    tensors = tensors_of((3, 4), 2)
    tensors["codes"] = torch.tensor([[1, 0], [0, 3]], dtype=torch.int32)
    with pytest.raises(BundleError, match=r"codes: item row 1.*sort the items"):
        load(tmp_path, tensors, (3, 4))
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        load_shop_weights(tmp_path / "weights.safetensors", manifest_of((8,)), ShopVocabulary(TEXT, (8,), 2), EMBEDDING)
    with pytest.raises(BundleError, match="shop token 1 has no tokens"):
        mean_embeddings(EMBEDDING, [[1], [], [2]])


def test_a_random_trie_is_the_same_again() -> None:
    one, two = (random_trie("x", items=90, level_sizes=(5, 6, 7), hidden_size=HIDDEN, seed=2) for _ in range(2))
    assert np.array_equal(one.trie.codes, two.trie.codes) and torch.equal(one.input_rows, two.input_rows)
    assert one.table(first_token=100).token_starts == (100, 105, 111)
    with pytest.raises(ValueError, match=r"items is 211.*210 codes"):
        random_trie("x", items=211, level_sizes=(5, 6, 7), hidden_size=HIDDEN, seed=2)
