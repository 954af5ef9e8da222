"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer`.

A GGUF file holds the vocabulary and the merges, but of the splitting into words only a name (`tokenizer.ggml.pre`). A
name that is not known here is refused: with the wrong splitting a model still answers, only worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import tokenizers
from shoplm.errors import BaseModelError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"


class _TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as the GGUF specification numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Words as Llama 3 and Qwen 2 split them; they differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES])


_LLAMA3 = _split(_WORDS % "{1,3}")
_PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _split(_WORDS % ""),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
}


def gguf_tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer from the file's metadata. Raises BaseModelError where it is not supported."""
    kind = fields.get(_PREFIX + "model")
    tokens, types = _required(fields, "tokens"), _required(fields, "token_type")
    if len(tokens) != len(types):
        raise BaseModelError(f"the GGUF file has {len(tokens)} tokens but {len(types)} token types")
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens)
    else:
        raise BaseModelError(f"tokenizer {kind!r} of the GGUF file is not supported; supported are gpt2 and llama")
    special = (_TokenType.CONTROL, _TokenType.UNKNOWN)
    added = [
        AddedToken(token, special=token_type in special, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (*special, _TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = fields.get(_PREFIX + "pre")
    if name not in _PRE_TOKENIZERS:
        raise BaseModelError(
            f"pre-tokenizer {name!r} of the GGUF file is not supported; supported are {', '.join(_PRE_TOKENIZERS)}. "
            "Use the model's safetensors folder instead"
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _required(fields, "merges"))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    whole_words = _PRE_TOKENIZERS[name] is _LLAMA3  # a word that is a token is taken without merging
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(vocabulary, _required(fields, "scores"))
    unknown = fields.get(_PREFIX + "unknown_token_id", 0)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=tokens[unknown], byte_fallback=True, fuse_unk=True)
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    end: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get(_PREFIX + "add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        end.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(end)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose joint piece scores best; as a list of merges, best first."""
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], index, cut, (left, right)))
    return [merge for _, _, _, merge in sorted(ranked)]


def _required(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(_PREFIX + name)
    if value is None:
        raise BaseModelError(f"the GGUF file has no {_PREFIX}{name}")
    return value
