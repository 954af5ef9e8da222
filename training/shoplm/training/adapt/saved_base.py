"""Writes a trained base whole or not at all, and only where nothing else would be lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoplm.errors import BaseModelError, ConfigurationError
from shoplm.model.origin import Origin, read_origin, write_origin


@contextmanager
def saved_base(folder: Path, origin: Origin) -> Iterator[Path]:
    """A folder to write a base to, which is marked with its origin and takes the place of `folder` at the end.

    Raises ConfigurationError as `check_place` does.
    """
    check_place(folder, origin)
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    yield partial
    write_origin(partial, origin)
    if folder.exists():
        folder.rename(old)  # a folder half deleted would not be known as ours
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_place(folder: Path, origin: Origin) -> None:
    """Raises ConfigurationError if something else is there than an empty folder or an older base of this origin."""
    if not _may_become(folder, origin):
        raise ConfigurationError(
            f"{folder} is there and is no base that was trained like this ({origin}), and its files would be lost: "
            "name another folder"
        )


def _may_become(folder: Path, origin: Origin) -> bool:
    if folder.is_symlink():
        return False
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return read_origin(folder) is origin
    except BaseModelError:
        return False
