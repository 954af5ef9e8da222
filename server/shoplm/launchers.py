"""What Triton needs to launch a kernel: a C compiler and Python's headers, for a small library that it builds for each
new signature, and a folder to keep what it compiles. Of the standard library alone, so that it runs before an install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

COMPILERS = ("gcc", "clang")  # in Triton's order, unless CC names one
_SOURCE = "#include <Python.h>\n#include <stdint.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n"
_NEEDS_COMPILER = "Triton needs a C compiler to launch kernels, but"


def missing_for_launches() -> str | None:
    """What is missing and what to do about it, in one line; None where kernels can be launched."""
    return _missing_compiler() or _missing_cache()


def _missing_compiler() -> str | None:
    named = os.environ.get("CC")
    found = next(filter(None, map(shutil.which, COMPILERS if named is None else (named,))), None)
    if found is None:
        where = f"neither {' nor '.join(COMPILERS)} is on the PATH" if named is None else f"CC={named!r} is no program"
        return f"{_NEEDS_COMPILER} {where}: install gcc and libc6-dev, or set CC"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if not (headers / "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return f"Triton needs Python.h to launch kernels, but it is not in {headers}: install {package}"
    return _refusal(found, headers)


def _refusal(compiler: str, headers: Path) -> str | None:
    """Builds a library as Triton does: what a compiler says that lacks its C library or has another flaw."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "launcher.c"
            source.write_text(_SOURCE)
            command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{folder}/launcher.so", f"-I{headers}"]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{_NEEDS_COMPILER} {compiler} cannot be run ({error}): install gcc and libc6-dev, or set CC"
    if ended.returncode == 0:
        return None
    lines = ended.stderr.splitlines()
    reason = next((line for line in lines if "error" in line), f"exit code {ended.returncode}")
    return f"{_NEEDS_COMPILER} {compiler} fails ({reason}): install gcc and libc6-dev, or set CC"


def _missing_cache() -> str | None:
    named = os.environ.get("TRITON_CACHE_DIR")
    try:
        folder = Path(named) if named else Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    except RuntimeError:
        return "Triton keeps what it compiles in this user's home, and there is none: set TRITON_CACHE_DIR to a folder"
    folder = folder.absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    return (
        f"Triton keeps what it compiles in {folder}, but {existing} cannot be written to: set TRITON_CACHE_DIR to a "
        f"folder that can"
    )


if __name__ == "__main__":
    sys.exit(missing_for_launches())
