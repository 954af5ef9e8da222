"""Where a base model comes from, which decides what it can do: a key of ours in its config.json."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path

from shoplm.errors import BaseModelError
from shoplm.model.config import read_json

_KEY = "shoplm_origin"


class Origin(StrEnum):
    """What a base was trained on."""

    TEXT = "text"  # as somebody published it: it chats, and has never seen an item token
    ADAPTED = "adapted"  # all its layers were tuned on a shop: it chats behind item tokens
    SCRATCH = "scratch"  # on a shop's log alone: it has no words to chat with


def read_origin(folder: Path) -> Origin:
    """Read the origin of the base in a folder. Raises BaseModelError."""
    value = read_json(folder / "config.json").get(_KEY, Origin.TEXT.value)
    try:
        return Origin(value)
    except ValueError as error:
        known = ", ".join(Origin)
        raise BaseModelError(f"{folder / 'config.json'}: {_KEY} is {value!r}, expected one of {known}") from error


def write_origin(folder: Path, origin: Origin) -> None:
    """Mark the base in that folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**read_json(path), _KEY: origin.value}, indent=2) + "\n", "utf-8")
