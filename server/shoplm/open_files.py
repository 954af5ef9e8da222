"""How many files and connections this process may have open."""

from __future__ import annotations

import contextlib
import resource

from shoplm.errors import ConfigurationError

LEAST = 64  # a server that nobody calls has thirty open


def raise_limit() -> None:
    """Raise the limit of open files to what the system allows. Each connection takes a descriptor, and where none is
    left the probes fail, too. Raises ConfigurationError where there are too few to start with."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS names no limit and takes none
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < LEAST:
        raise ConfigurationError(f"{hard} open files are allowed (ulimit -n), and a server needs {LEAST} at least")
