"""Text to tokens and back, on the `tokenizers` library alone.

Two encoders over one vocabulary: in a template control tokens count, in a user's text they are text. Decoding works on
the bytes that each token stands for, so that it can go token by token: byte-level vocabularies (GPT-2, Llama 3, Qwen,
SmolLM) and sentencepiece-style ones with byte fallback (Llama 2, Mistral) are both supported.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from shoplm.errors import BaseModelError
from shoplm.model.config import read_json
from tokenizers import AddedToken, pre_tokenizers

_SPACE = "\u2581"  # how sentencepiece writes a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOOKS_LIKE_CONTROL = re.compile(r"<.+>|\[[A-Z_/]+\]", re.DOTALL)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextPiece(Protocol):
    """A part of a prompt: `message` is None for a template's own text, in which control tokens count."""

    @property
    def text(self) -> str: ...

    @property
    def message(self) -> int | None: ...


class Tokenizer:
    """A base model's vocabulary. Safe to share between threads."""

    def __init__(
        self, serialized: str, special_tokens: Mapping[str, str] | None = None, end_token_ids: Iterable[int] = ()
    ) -> None:
        """`serialized` is the content of tokenizer.json; `special_tokens` maps names such as bos_token to tokens.
        Raises BaseModelError if it cannot be read or decodes in a way that is not supported."""
        try:
            self._control = tokenizers.Tokenizer.from_str(serialized)
            self._plain = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises Exception itself
            raise BaseModelError(f"tokenizer.json cannot be read: {error}") from error
        self._added: dict[int, AddedToken] = self._control.get_added_tokens_decoder()
        _forget_control_tokens(self._plain, self._added)
        self._continuation = _continuation(self._plain, serialized)
        self._added_ids = {token.content: index for index, token in self._added.items()}
        contents = sorted(self._added_ids, key=len, reverse=True)  # the longest wins where several begin
        self._control_pattern = re.compile("|".join(map(re.escape, contents)) if contents else "(?!)")
        self._special_ids = frozenset(index for index, token in self._added.items() if token.special)
        self._bytes = _TokenBytes(self._control)
        self.special_tokens = dict(special_tokens or {})
        eos = self.special_tokens.get("eos_token")
        self.eos_token_id = None if eos is None else self._control.token_to_id(eos)
        ends = dict.fromkeys(end_token_ids)
        if self.eos_token_id is not None:
            ends.setdefault(self.eos_token_id)
        self.end_token_ids = tuple(ends)  # any of them ends an answer

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and what is named in the configs beside it. Raises BaseModelError."""
        path = folder / "tokenizer.json"
        try:
            serialized = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseModelError(
                f"{path} cannot be read ({error}); a base model needs the tokenizer in this form, "
                "tokenizer.model alone is not enough"
            ) from error
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
            if value is not None:
                ends = [value] if isinstance(value, int) else list(value)
                break
        try:
            return cls(serialized, read_special_tokens(folder), ends)
        except BaseModelError as error:
            raise BaseModelError(f"{folder}: {error}") from error

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id. The model may have more rows than this: padding."""
        return max(self._control.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of text in which nothing is a control token. Nothing is added before or after."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [list(each.ids) for each in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_pieces(self, pieces: Sequence[TextPiece]) -> list[int]:
        """Token ids of template text and contents together.

        The same ids as for the joined text, since a word may start in one piece and end in the next; but control
        tokens count only where they lie within template text.
        """
        ids: list[int] = []
        for index, part in enumerate(self._parts(pieces)):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                encoder = self._plain if index == 0 else self._continuation
                ids += encoder.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these tokens, as a `StreamDecoder` gives it."""
        return StreamDecoder(self).push(tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; none for control tokens and for ids outside the vocabulary."""
        return b"" if token in self._special_ids else self._bytes[token]

    @property
    def strips_first_space(self) -> bool:
        """Whether a text's first space is an artefact of the encoding (sentencepiece-style vocabularies)."""
        return self._bytes.strips_first_space

    def _parts(self, pieces: Sequence[TextPiece]) -> Iterator[str | int]:
        """Alternating plain text (possibly empty) and control token ids, beginning with text."""
        text = ""
        strip_next = False
        for piece in pieces:
            start = 0
            if piece.message is None:
                for match in self._control_pattern.finditer(piece.text):
                    token_id = self._added_ids[match.group()]
                    token = self._added[token_id]
                    text += piece.text[start : match.start()]
                    text = text.lstrip() if strip_next else text
                    yield text.rstrip() if token.lstrip else text
                    yield token_id
                    text, start, strip_next = "", match.end(), token.rstrip
            text += piece.text[start:]
        yield text.lstrip() if strip_next else text


class StreamDecoder:
    """Tokens to text, a few at a time. What it returns, joined, is the text of all tokens.

    Bytes that could still become a character are kept back, so a text that ends inside a character ends before it.
    Bytes that can never become one are U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        text = self._characters.decode(b"".join(map(self._tokenizer.token_bytes, tokens)))
        if self._strip_space and text:
            self._strip_space = False
            text = text.removeprefix(" ")
        return text


class StopStrings:
    """Ends a text before the first stop string, however the text is cut into parts.

    The first is the one that is complete first; of those that are complete at the same character, the longest. What
    could still become a stop string is kept back until it can no longer, or until `finish`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """The text that may be shown now. Nothing after a stop string is ever returned."""
        if not self._stops:
            return text
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        kept = self._kept(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was kept back: the text is over, so it cannot become a stop string any more."""
        text, self._held = self._held, ""
        return text

    def _kept(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class _TokenBytes(dict[int, bytes]):
    """token id -> bytes, filled as tokens occur. Works out from the decoder's parts how tokens write bytes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        parts = _flatten(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder is not None else []
        kinds = {part["type"] for part in parts}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise BaseModelError(
                f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported; "
                "supported are byte-level and sentencepiece-style ones"
            )
        self.strips_first_space = not self._byte_level and any(
            (part["type"] == "Strip" and part["start"] > 0)
            or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            for part in parts
        )

    def __missing__(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            value = b""
        elif self._byte_level:
            value = _byte_level_bytes(piece)
        elif match := _BYTE_TOKEN.fullmatch(piece):
            value = bytes([int(match.group(1), 16)])
        else:
            value = piece.replace(_SPACE, " ").encode()
        self[token] = value
        return value


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write a byte as the character with its number if that is printable and not a space in
    Latin-1, and the others as the characters from U+0100 on, in order (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    if all(character in _ALPHABET for character in piece):
        return bytes(map(_ALPHABET.__getitem__, piece))
    return piece.encode()  # an added token is written as it is


def _flatten(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [inner for each in part["decoders"] for inner in _flatten(each)] if "decoders" in part else [part]


def _forget_control_tokens(tokenizer: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> None:
    """Makes control tokens plain text. Also those that the tokenizer's author did not mark as special, `<think>` or
    `<tool_call>`: a user must not be able to write them either. Added words and runs of spaces stay tokens."""
    control = [
        AddedToken(token.content, special=True, normalized=False)
        for token in added.values()
        if not token.special and _LOOKS_LIKE_CONTROL.fullmatch(token.content)
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.encode_special_tokens = True


def _continuation(plain: tokenizers.Tokenizer, serialized: str) -> tokenizers.Tokenizer:
    """An encoder for text behind a control token: without the space that some vocabularies put before a text."""
    metaspace = plain.pre_tokenizer
    if not isinstance(metaspace, pre_tokenizers.Metaspace) or metaspace.prepend_scheme != "first":
        return plain
    tokenizer = tokenizers.Tokenizer.from_str(serialized)
    _forget_control_tokens(tokenizer, tokenizer.get_added_tokens_decoder())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=metaspace.replacement, prepend_scheme="never", split=metaspace.split
    )
    return tokenizer


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Named tokens (bos_token, eos_token, ...) of tokenizer_config.json and special_tokens_map.json."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
        raw = read_json(folder / file) if (folder / file).exists() else {}
        for name in _SPECIAL_NAMES:
            value = raw.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                named[name] = content
    return named
