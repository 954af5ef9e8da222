"""How many files and connections this process may have open."""

from __future__ import annotations

import contextlib
import resource


def raise_limit() -> None:
    """To what the system allows: a connection takes a descriptor, and where none is left the probes fail, too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS names no limit and takes none
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
