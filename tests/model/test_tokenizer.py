"""Encoding agrees with transformers, user text cannot spell control tokens, and streamed text is whole characters."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoplm.errors import BaseModelError
from shoplm.model.tokenizer import StopStrings, StreamDecoder, Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

TEXTS = (
    "",
    "hello",
    " The shop sells milk,  bread\nand 12 apples. ",
    "naïve café — 日本語 👩‍👩‍👧 ﷺ",
    "a\u2581b \u00a0 \t\r\n\n",
)


@dataclass(frozen=True)
class Piece:
    text: str
    message: int | None = None


def _reference(folder: Path) -> Any:
    return importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session", params=["qwen2", "mistral"])
def kind(request: pytest.FixtureRequest) -> str:
    """A family with a byte-level and one with a sentencepiece-style vocabulary."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tokenizer(kind: str, tiny_model: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.from_folder(tiny_model(kind))


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_like_transformers(tiny_model: Callable[[str], Path], family: str, text: str) -> None:
    folder = tiny_model(family)
    ours, theirs = Tokenizer.from_folder(folder), _reference(folder)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ours.encode_pieces([Piece(text)]) == ids
    assert ours.encode_all(["before it", text]) == [ours.encode("before it"), ids]
    # A literal U+2581 is a space to a sentencepiece-style vocabulary, there as here.
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert family == "mistral" or ours.decode(ids) == text


def test_named_tokens(tiny_model: Callable[[str], Path], family: str) -> None:
    ours, theirs = Tokenizer.from_folder(tiny_model(family)), _reference(tiny_model(family))
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.end_token_ids == (theirs.eos_token_id,)


def test_control_tokens_in_user_text_are_text(tokenizer: Tokenizer, kind: str) -> None:
    control = "<|im_end|>" if kind == "qwen2" else "</s>"
    text = f"bye{control} <rec> {control}"
    assert tokenizer.encode_pieces([Piece(control)]) == [2]
    ids = tokenizer.encode(text)
    assert 2 not in ids and tokenizer.decode(ids) == text
    pieces = [Piece(control), Piece(text, 0), Piece(control)]
    assert tokenizer.encode_pieces(pieces).count(2) == 2


def test_unmarked_control_tokens_in_user_text_are_text(tiny_model: Callable[[str], Path]) -> None:
    """`<think>` is an added token without the special flag in published models; a double space is no control."""
    raw = RawTokenizer.from_file(str(tiny_model("qwen2") / "tokenizer.json"))
    raw.add_tokens([AddedToken("<think>", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer = Tokenizer(raw.to_str())
    think, spaces = raw.token_to_id("<think>"), raw.token_to_id("  ")
    assert think is not None and spaces is not None
    assert tokenizer.encode_pieces([Piece("a<think>  ")]) == [*tokenizer.encode("a"), think, spaces]
    assert think not in tokenizer.encode("a<think>  ") and spaces in tokenizer.encode("a<think>  ")
    assert tokenizer.decode([think, spaces]) == "<think>  "


def test_a_control_token_cannot_be_put_together_at_a_seam(tokenizer: Tokenizer, kind: str) -> None:
    head, tail = ("<|im_", "end|>") if kind == "qwen2" else ("</", "s>")
    for pieces in ([Piece(head), Piece(tail, 0)], [Piece(head, 0), Piece(tail)], [Piece(head, 0), Piece(tail, 1)]):
        assert 2 not in tokenizer.encode_pieces(pieces)


CONTROL = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>"])
ORDINARY = st.text(max_size=12) | st.sampled_from([" ", "milk", " bread", "\n"])


@given(parts=st.lists(st.tuples(ORDINARY, st.booleans()) | st.tuples(CONTROL, st.just(False)), max_size=8))
@settings(max_examples=150)
def test_pieces_are_encoded_as_one_text(tokenizer: Tokenizer, parts: list[tuple[str, bool]]) -> None:
    pieces = [Piece(text, index if content else None) for index, (text, content) in enumerate(parts)]
    joined = tokenizer._control.encode("".join(text for text, _ in parts), add_special_tokens=False)
    assert tokenizer.encode_pieces(pieces) == joined.ids


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_vocabularies(tiny_model: Callable[[str], Path], scheme: str) -> None:
    """Newer sentencepiece-style files put the leading space in the pre-tokenizer, before the first part only."""
    raw = RawTokenizer.from_file(str(tiny_model("mistral") / "tokenizer.json"))
    raw.normalizer = None
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=False)])
    tokenizer = Tokenizer(raw.to_str())
    text = "<s>milk</s> bread"
    pieces = [Piece("<s>"), Piece("milk", 0), Piece("</s>"), Piece(" bread", 1)]
    assert tokenizer.encode_pieces(pieces) == raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_pieces([Piece("milk", 0)]) == raw.encode("milk", add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("milk bread")) == "milk bread"


def test_control_tokens_that_swallow_spaces(tiny_model: Callable[[str], Path]) -> None:
    raw = RawTokenizer.from_file(str(tiny_model("qwen2") / "tokenizer.json"))
    raw.add_special_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer = Tokenizer(raw.to_str())
    expected = raw.encode("a <|x|>  b", add_special_tokens=False).ids
    assert tokenizer.encode_pieces([Piece("a <|x|> "), Piece(" b", 0)]) == expected


@given(text=st.text(max_size=60), data=st.data())
@settings(max_examples=150)
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    decoder, parts = StreamDecoder(tokenizer), []
    while ids:
        count = data.draw(st.integers(1, 4))
        parts.append(decoder.push(ids[:count]))
        ids = ids[count:]
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))
    assert "".join(parts) == (text.replace("\u2581", " ") if tokenizer.strips_first_space else text)


@given(ids=st.lists(st.integers(0, 460), max_size=40))
@settings(max_examples=150)
def test_any_tokens_stream_to_their_decoding(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also tokens that no text encodes to: broken characters, control tokens, ids beyond the vocabulary."""
    decoder = StreamDecoder(tokenizer)
    streamed = "".join(decoder.push([token]) for token in ids)
    assert streamed == tokenizer.decode(ids)
    whole = b"".join(tokenizer.token_bytes(token) for token in ids)
    expected = whole.decode("utf-8", "replace")
    if tokenizer.strips_first_space:
        expected = expected.removeprefix(" ")
    assert expected.startswith(streamed) and set(expected[len(streamed) :]) <= {"\ufffd"}


def test_a_character_is_held_until_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("日")
    assert len(ids) >= 3
    assert [decoder.push([token]) for token in ids][-3:] == ["", "", "日"]
    decoder.push(ids[:-1])
    assert decoder.push([]) == "", "the end of a text inside a character shows nothing of it"


def _cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab<|", max_size=30),
    stops=st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=12),
)
@settings(max_examples=400)
def test_stop_strings(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher, shown = StopStrings(stops), ""
    expected, stop = _cut(text, stops)
    for start, end in itertools.pairwise(edges):
        shown += matcher.push(text[start:end])
        assert expected.startswith(shown), "a part of a stop string, or of what follows it, leaked"
        kept = len(text[:end]) - len(shown)
        if matcher.stopped is None and kept:
            assert any(each.startswith(text[end - kept : end]) for each in stops), "kept back without need"
    shown += matcher.finish()
    assert (shown, matcher.stopped) == (expected, stop)


@given(text=st.text(max_size=30), stop=st.text(min_size=1, max_size=3))
@settings(max_examples=100)
def test_streamed_answer_ends_before_the_stop_string(tokenizer: Tokenizer, text: str, stop: str) -> None:
    ids = tokenizer.encode(text + stop + text)
    decoder, matcher = StreamDecoder(tokenizer), StopStrings([stop])
    shown = "".join(matcher.push(decoder.push([token])) for token in ids) + matcher.finish()
    full = tokenizer.decode(ids)
    assert shown == (full[: full.index(stop)] if stop in full else full)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_unsupported_decoder_and_broken_files_are_refused(tmp_path: Path) -> None:
    wordpiece = RawTokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(BaseModelError, match="WordPiece"):
        Tokenizer(wordpiece.to_str())
    with pytest.raises(BaseModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path)


def test_import_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, shoplm.model.tokenizer, shoplm.model.chat_template, shoplm.model.base; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tokenizers" in modules and not {"torch", "transformers", "numpy"} & set(modules)


@pytest.mark.real_base
def test_default_base(default_base: Path) -> None:
    tokenizer = Tokenizer.from_folder(default_base)
    reference = _reference(default_base)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_pieces([Piece("<|im_start|>user")]) == [1, *tokenizer.encode("user")]
    assert tokenizer.end_token_ids == (2,)
    # SmolLM splits numbers into digits before anything else.
    assert len(tokenizer.encode("a  2018")) == len(["a", "  ", *"2018"])
