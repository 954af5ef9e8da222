"""A model's chat template, rendered so that what people wrote can be told from what the template wrote.

The template (jinja, sandboxed) sees a placeholder instead of each message's content. The rendered text is then split at
the placeholders: contents are never interpreted by jinja, and they can be encoded without control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from shoplm.errors import BaseModelError, InvalidRequestError
from shoplm.model.config import read_json
from shoplm.model.tokenizer import read_special_tokens

_SYSTEM, _USER = "system", "user"
_JOINT = "\n\n"  # between a system message and the user message it is put into
# A placeholder is a number between two private-use characters. Around it stand an em space and many newlines, so that
# the rendered text shows what the template strips from a content: newlines only, or all white space. More newlines
# than a template writes in a row; twice as many behind it as before it, so that neighbours can be told apart.
_OPEN, _CLOSE, _EM_SPACE = "\ue0f1", "\ue0f2", "\u2003"
_BEFORE, _BEHIND = 16, 32
_PLACEHOLDER = re.compile(rf"({_EM_SPACE}?){_OPEN}(\d+){_CLOSE}({_EM_SPACE}?)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation."""

    text: str
    message: int | None  # index of the message whose content this is; None: text of the template


class ChatTemplate:
    """Renders conversations for one base model. Safe to share between threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`source` is jinja; it may use the special tokens by name. Raises BaseModelError if it cannot be parsed."""
        self._special_tokens = dict(special_tokens or {})
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BaseModelError(f"the chat template cannot be parsed: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """Reads chat_template.jinja, else `chat_template` of tokenizer_config.json. Raises BaseModelError."""
        try:
            return cls(_source(folder), read_special_tokens(folder))
        except BaseModelError as error:
            raise BaseModelError(f"{folder}: {error}") from error

    def pieces(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[Piece]:
        """The conversation of (role, content) messages as alternating template text and contents.

        The joined texts are what the template gives for these messages. If the template refuses or leaves out a leading
        system message, its content comes before that of the first user message. Raises InvalidRequestError where
        the template refuses the conversation.
        """
        if not messages:
            raise InvalidRequestError(("messages", "is empty"))
        pieces: list[Piece] | None = None
        refusal: jinja2.TemplateError | None = None
        try:
            pieces = self._render(messages, add_generation_prompt, merge_system=False)
        except jinja2.TemplateError as error:
            refusal = error
        leading_system = messages[0][0] == _SYSTEM
        if leading_system and (pieces is None or not any(piece.message == 0 for piece in pieces)):
            if len(messages) < 2 or messages[1][0] != _USER:
                raise InvalidRequestError(
                    ("messages", "this model takes a system message only before a user message, and none follows")
                )
            try:
                pieces = self._render(messages, add_generation_prompt, merge_system=True)
            except jinja2.TemplateError as error:
                refusal = error
        if pieces is None:
            raise InvalidRequestError(("messages", f"the model's chat template refuses them: {refusal}")) from refusal
        shown = {piece.message for piece in pieces}
        for index, (role, _) in enumerate(messages):
            if index not in shown:
                raise InvalidRequestError(
                    (f"messages[{index}].role", f"the model's chat template leaves out messages of role {role!r}")
                )
        return pieces

    def _render(
        self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool, merge_system: bool
    ) -> list[Piece]:
        stand_ins = [{"role": role, "content": _placeholder(index)} for index, (role, _) in enumerate(messages)]
        if merge_system:
            system = stand_ins.pop(0)
            stand_ins[0]["content"] = system["content"] + _JOINT + stand_ins[0]["content"]
        try:
            text = self._template.render(
                messages=stand_ins,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is a program: any error of its own means that it cannot be used so
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        return _merge(_split(text, [content for _, content in messages]))


def _placeholder(index: int) -> str:
    newlines_before, newlines_behind = "\n" * _BEFORE, "\n" * _BEHIND
    return f"{newlines_before}{_EM_SPACE}{_OPEN}{index}{_CLOSE}{_EM_SPACE}{newlines_behind}"


def _split(text: str, contents: Sequence[str]) -> Iterator[Piece]:
    """Puts each content where its placeholder is, stripped as the template stripped the placeholder."""
    matches = list(_PLACEHOLDER.finditer(text))
    starts = [0, *(match.end() for match in matches)]
    ends = [*(match.start() for match in matches), len(text)]
    spaces_behind = [False, *(bool(match.group(3)) for match in matches)]
    spaces_before = [*(bool(match.group(1)) for match in matches), False]
    gaps = [
        _without_padding(text[start:end], behind, before)
        for start, end, behind, before in zip(starts, ends, spaces_behind, spaces_before, strict=True)
    ]
    yield Piece(gaps[0][0], None)
    for match, left, right in zip(matches, gaps, gaps[1:], strict=False):
        left_space, number, right_space = match.groups()
        content = contents[int(number)]
        if not left[2]:
            content = content.lstrip("\n" if left_space else None)
        if not right[1]:
            content = content.rstrip("\n" if right_space else None)
        yield Piece(content, int(number))
        yield Piece(right[0], None)


def _without_padding(gap: str, behind: bool, before: bool) -> tuple[str, bool, bool]:
    """The template's own text between two placeholders, and whether the newlines behind the one and before the other
    are still there. `behind` and `before`: whether they can be, since the spaces within them are."""
    has_behind = behind and gap.startswith("\n" * _BEHIND)
    gap = gap[_BEHIND:] if has_behind else gap
    has_before = before and gap.endswith("\n" * _BEFORE)
    return gap[: len(gap) - _BEFORE] if has_before else gap, has_behind, has_before


def _merge(pieces: Iterator[Piece]) -> list[Piece]:
    """Joins neighbouring template text and leaves out empty template text; empty contents stay."""
    merged: list[Piece] = []
    for piece in pieces:
        if piece.message is None and merged and merged[-1].message is None:
            merged[-1] = Piece(merged[-1].text + piece.text, None)
        elif piece.text or piece.message is not None:
            merged.append(piece)
    return merged


def _source(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseModelError(f"chat_template.jinja cannot be read: {error}") from error
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):  # several by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise BaseModelError(
            "there is no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "use the instruct or chat version of the model"
        )
    return template


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks an assistant's text for training. Here it only prints it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """What published chat templates expect: transformers' settings, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, this does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
