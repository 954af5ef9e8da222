"""Compiles the C++ decoder with the machine's own compiler, keeps it in a folder, and loads it from there."""

from __future__ import annotations

import ctypes
import grp
import hashlib
import logging
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

_SOURCES = (
    *("vectors.h", "tiles.h", "crew.h", "linear.h", "linear_tiles.h", "linear_vectors.h", "packing.h"),
    *("products.h", "products_avx2.h", "products_avx512.h"),
    *("attention.h", "attention_bytes.h", "attention_tiles.h", "attention_vectors.h"),
    *("attention_avx2.h", "attention_avx512.h", "greedy.h", "decoder.cpp"),
)
_FLAGS = ("-std=c++17", "-O2", "-fopenmp", "-shared", "-fPIC")
_HASH_BYTES = 32
_COMPILERS = ("g++", "c++", "clang++")
_COMPILE_SECONDS = 120
_refused: dict[tuple[str, ...], NativeUnavailableError] = {}  # by compiler and flags: each is asked once in a process

log = logging.getLogger("shoplm.engine")


class NativeUnavailableError(Exception):
    """Says why this machine cannot use the C++ decoder."""


class NativeBuildError(NativeUnavailableError):
    """The compiler is there, and refuses the decoder."""


class NativeTimeoutError(NativeUnavailableError):
    """The compiler does not end in time, nor would it for another form."""


def load_or_build(form: str, compiler_flags: tuple[str, ...], folder: Path | None) -> ctypes.CDLL:
    """The folder's library for these sources and flags; built where there is none, or none that this process may trust,
    and kept there unless it cannot be. None: no folder.

    Raises NativeUnavailableError. Torch has loaded OpenMP's runtime already: both share its threads.
    """
    sources = Path(__file__).parent
    flags = (*_FLAGS, *compiler_flags)
    digest = hashlib.sha256(" ".join(flags).encode())
    for name in _SOURCES:
        digest.update((sources / name).read_bytes())
    name = f"decoder-{form}-{digest.hexdigest()[:16]}.so"
    kept = None if folder is None else _load(folder / name)
    return _build(flags, sources / _SOURCES[-1], name, folder) if kept is None else kept


def find_compiler() -> tuple[str, ...]:
    """Path of the C++ compiler, and the arguments that CXX has behind it. Raises NativeUnavailableError."""
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise NativeUnavailableError(f"CXX is {named!r}: {error}") from error
    for program, *arguments in [words] if words else [[name] for name in _COMPILERS]:
        if found := shutil.which(program):
            return found, *arguments
    raise NativeUnavailableError(
        f"there is no C++ compiler {words[0]}: CXX is {named!r}"
        if words
        else "there is no C++ compiler (g++ or clang++)"
    )


def _load(path: Path) -> ctypes.CDLL | None:
    """None: there is none, or none that this process can read and may trust."""
    try:
        if not (_is_safe(path.parent) and _is_safe(path)):
            return None
        if not _is_whole(path):  # loading a part of a library may end the process
            raise OSError(f"{path} is damaged")
        return ctypes.CDLL(str(path))
    except FileNotFoundError:
        return None
    except OSError as error:  # out of reach, damaged, or made on another system
        log.info("the C++ decoder is built again: %s", error)
        return None


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the hash of what is before it, as `_build` leaves it."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-_HASH_BYTES]).digest() == content[-_HASH_BYTES:]


def _is_safe(path: Path) -> bool:
    """Nobody but root and this user could have put code there."""
    found = path.stat()
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid)):
        return False
    return found.st_uid in (0, os.geteuid())


def _is_own_group(group_id: int) -> bool:
    """Whether only root and this user are in the group: it is named as one of them, as Debian, Fedora and others make a
    group for each user, whose files then are its group's to write; and it lists no other members."""
    names = {"root"}
    with suppress(KeyError):  # a user id without an entry
        names.add(pwd.getpwuid(os.geteuid()).pw_name)
    try:
        group = grp.getgrgid(group_id)
    except KeyError:
        return False
    return group.gr_name in names and names.issuperset(group.gr_mem)


def _build(flags: tuple[str, ...], source: Path, name: str, folder: Path | None) -> ctypes.CDLL:
    """Compiles and loads it; keeps it in the folder if that can be written and is safe."""
    compiler = find_compiler()
    if known := _refused.get((*compiler, *flags)):
        raise known.with_traceback(None)
    if folder is not None and not _can_keep(folder):
        log.info("%s cannot be written, or others can write it: the C++ decoder is not kept", folder)
        folder = None
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / name
            _compile(compiler, *flags, str(source), "-o", str(made))
            made.write_bytes((content := made.read_bytes()) + hashlib.sha256(content).digest())
            made.chmod(0o755)  # who serves from an image is seldom who made it; nobody else may write it
            library = ctypes.CDLL(str(made))
            if folder is not None:
                made.replace(folder / name)  # whole or not at all: two engines may build at once
            return library
    except NativeUnavailableError as error:
        _refused[*compiler, *flags] = error
        raise
    except OSError as error:
        raise NativeUnavailableError(f"the decoder cannot be built: {error}") from error


def _compile(compiler: tuple[str, ...], *arguments: str) -> None:
    """Raises NativeBuildError and NativeTimeoutError; what the compiler has started ends with it then."""
    with subprocess.Popen(
        (*compiler, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=_COMPILE_SECONDS)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise NativeTimeoutError(
                    f"{shlex.join(compiler)} has not compiled the decoder within {_COMPILE_SECONDS} s"
                ) from None
            raise
    if process.returncode:
        raise NativeBuildError(f"{shlex.join(compiler)} failed: {said.decode(errors='replace').strip()[:300]}")


def _can_keep(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and _is_safe(folder)
    except OSError:
        return False
