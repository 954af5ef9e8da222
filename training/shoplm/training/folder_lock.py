"""Keeps two runs from writing into one folder."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoplm.errors import ConfigurationError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Raises ConfigurationError while another process has the folder. The lock goes with the process, however it ends.
    Windows has none of this kind, nor have some network file systems: there, nothing is checked."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another run is at work in {folder}: wait, or name another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        yield
