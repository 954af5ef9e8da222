"""Which files of a Hugging Face folder hold its weights. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoplm.errors import BaseModelError
from shoplm.model.config import read_json

INDEX_NAME = "model.safetensors.index.json"
CONVERTED = "shoplm-base.json"  # marks a folder that a GGUF file was converted into, each tensor checked


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, in a fixed order. Raises BaseModelError if one is missing."""
    if (folder / INDEX_NAME).exists():
        paths = tuple(folder / name for name in _shard_names(folder))
    else:
        paths = (folder / "model.safetensors",)
    for path in paths:
        if not path.is_file():
            raise BaseModelError(f"{path} does not exist; a base model needs model.safetensors or {INDEX_NAME}")
    return paths


def _shard_names(folder: Path) -> Iterator[str]:
    names = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BaseModelError(f"{folder / INDEX_NAME} has no weight_map")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise BaseModelError(f"{folder / INDEX_NAME} names {name!r}, which is not a file of this folder")
        yield name
