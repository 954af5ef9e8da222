"""What this machine has of what ShopLM can use, and what each part is for. Runs on any Python, before an install."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from shoplm.launchers import missing_for_launches

DISK_GB = 8
PORTS = {50051: "gRPC", 9464: "metrics and probes"}
PROGRAMS = {
    "g++": "compiles the fast CPU decoder at the first start (clang++ or $CXX will do); else torch serves, slower",
    "node": "runs the Node client and its tests",
    "npm": "installs the Node client's packages",
    "promtool": "checks the metrics' format in a test (Debian: prometheus)",
    "nvidia-smi": "an NVIDIA GPU's driver; none is needed",
}


def report() -> tuple[list[str], bool]:
    """Lines to print, and whether `make serve` can work here."""
    lines: list[str] = []
    fine = True

    def say(good: bool, needed: bool, text: str) -> None:
        nonlocal fine
        fine = fine and (good or not needed)
        lines.append(f"{'ok  ' if good else ('FAIL' if needed else '-   ')} {text}")

    version = ".".join(map(str, sys.version_info[:3]))
    say(sys.version_info >= (3, 11), True, f"Python {version}: 3.11 or newer is needed")
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    say(
        free_gb > DISK_GB,
        True,
        f"disk: {free_gb:.0f} GB free here; an install with CUDA torch takes up to {DISK_GB} GB",
    )
    say(*_cache())
    for port, purpose in PORTS.items():
        with socket.socket() as probe:
            free = probe.connect_ex(("127.0.0.1", port)) != 0
        say(
            free,
            False,
            f"port {port} ({purpose}): {'free' if free else 'in use; choose others with --port, --metrics-port'}",
        )
    for program, purpose in PROGRAMS.items():
        say(shutil.which(program) is not None, False, f"{program}: {purpose}")
    missing = missing_for_launches()
    found = "a C compiler, Python.h and a folder for what is compiled"
    say(missing is None, False, f"launching Triton kernels, on a GPU only: {missing or found}")
    return lines, fine


def _cache() -> tuple[bool, bool, str]:
    """Whether base models can be kept, that they must be, and where."""
    try:
        cache = Path(os.environ.get("SHOPLM_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # this user has no home
        return False, True, "cache for base models: there is no home directory; name a folder in SHOPLM_CACHE"
    return os.access(cache if cache.exists() else cache.parent, os.W_OK), True, f"cache for base models: {cache}"


def main() -> int:
    """Print the report; 0 if the server can run here."""
    lines, fine = report()
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
