"""Which base model to serve: a folder, a GGUF file, a model of the Hugging Face hub, or the default.

Whatever it is, the result is a Hugging Face folder on this machine, with a name and a fingerprint by which a bundle
knows its base. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from shoplm.bundle import BASE_FOLDER
from shoplm.errors import BaseModelError, TransientError
from shoplm.model.base_cache import (
    DEFAULT_MODEL,
    ensure_converted,
    ensure_packaged,
    file_fingerprint,
    recorded_identity,
)
from shoplm.model.config import ModelConfig
from shoplm.model.origin import Origin, read_origin
from shoplm.model.weight_files import weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on this machine."""

    folder: Path  # Hugging Face layout: config.json, tokenizer.json, safetensors
    name: str
    fingerprint: str  # equal for equal weights, config and tokenizer; a bundle fits one fingerprint
    config: ModelConfig
    origin: Origin = Origin.TEXT


def resolve_base(reference: str | None = None, console: Console | None = None) -> Base:
    """Finds the base model, and fetches and converts it where needed.

    `reference` is a folder of safetensors, a GGUF file or a folder with exactly one, a hub id such as
    `Qwen/Qwen2.5-0.5B-Instruct`, or None for the default. Progress goes to `console` (standard error if None).
    Raises BaseModelError, and TransientError where it cannot be fetched.
    """
    console = console or Console(stderr=True)
    if reference is None:
        return _base(ensure_packaged(DEFAULT_MODEL, console), DEFAULT_MODEL.name)
    path = Path(reference).expanduser()
    if path.is_file():
        return _from_gguf(path, console)
    if path.is_dir():
        return _from_folder(path, console)
    if _HUB_ID.fullmatch(reference):
        return _base(_from_hub(reference), reference)
    raise BaseModelError(
        f"base model {reference!r} is neither a folder nor a GGUF file on this machine, nor a hub id (owner/name)"
    )


def bundle_base(bundle: Path | None, reference: str | None, console: Console | None = None) -> Base:
    """The base that serves `bundle`: the one that is asked for, else the one that lies in the bundle, else the default.
    Raises as `resolve_base`."""
    own = None if bundle is None else bundle / BASE_FOLDER
    if reference is None and own is not None and own.is_dir():
        found = _from_folder(own, console or Console(stderr=True))
        return replace(found, name=found.origin.value)  # its folder's name says nothing
    return resolve_base(reference, console)


def _from_folder(path: Path, console: Console) -> Base:
    if (path / "config.json").exists():
        return _base(path, path.resolve().name)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _from_gguf(files[0], console)
    if files:
        names = ", ".join(file.name for file in files)
        raise BaseModelError(f"{path} holds {len(files)} GGUF files ({names}); name one of them with --base")
    raise BaseModelError(f"{path} holds neither a config.json nor a GGUF file, so it is not a base model")


def _from_gguf(path: Path, console: Console) -> Base:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseModelError(f"{path} is not a GGUF file; --base takes a GGUF file, a folder or a hub id")
    return _base(ensure_converted(path, path.stem, console), path.stem)


def _from_hub(identifier: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise BaseModelError(
            f"{identifier!r} is a hub id, which needs the package huggingface_hub; install it, or give a folder"
        ) from error
    try:
        return Path(snapshot_download(identifier, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["no message"])[0]
        # Of an id that is wrong, the hub says so, or its client before it asks.
        wrong = isinstance(error, RepositoryNotFoundError) or not isinstance(error, OSError)
        raise (BaseModelError if wrong else TransientError)(
            f"{identifier!r} is no folder on this machine, and could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _base(folder: Path, name: str) -> Base:
    config = ModelConfig.from_folder(folder)
    recorded = recorded_identity(folder)
    if recorded is not None:
        return Base(folder, *recorded, config)
    return Base(folder, name, _fingerprint(folder, config), config, read_origin(folder))


def _fingerprint(folder: Path, config: ModelConfig) -> str:
    """Over what decides the hidden states of a prompt, and not over where or under which file names it lies."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise BaseModelError(f"{tokenizer} does not exist; a base model needs its tokenizer in this form")
    for path in (tokenizer, *weight_files(folder)):
        digest.update(bytes.fromhex(file_fingerprint(path)))
    return digest.hexdigest()
