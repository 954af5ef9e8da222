"""The forms of the C++ decoder: this machine's, and with `emulation` those whose instructions it lacks."""

from __future__ import annotations

import fcntl
from functools import lru_cache
from pathlib import Path

import pytest
from shoplm.model.native.build import NativeBuildError, NativeUnavailableError, find_compiler, load_or_build
from shoplm.model.native.library import InstructionSet, NativeLibrary, declared, native_library

_EMULATION = Path(__file__).parent / "emulation"


@lru_cache
def real_library(instructions: InstructionSet) -> NativeLibrary | str:
    """The library, or why this machine has none. A decoder that cannot be compiled is no such reason."""
    try:
        return native_library(instructions)
    except NativeBuildError:
        raise
    except NativeUnavailableError as error:
        return str(error)


def emulated_library(instructions: InstructionSet, folder: Path) -> NativeLibrary:
    """The form of AVX-512 or AMX, compiled for AVX2 and kept in `folder`. Skips where there is no AVX2 or compiler."""
    avx2 = real_library(InstructionSet.AVX2)
    if isinstance(avx2, str):
        pytest.skip(avx2)
    try:
        find_compiler()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    flags = (
        *InstructionSet.AVX2.compiler_flags,
        *("-DSHOPLM_AVX512", f"-I{_EMULATION}", "-Wno-psabi", "-ffp-contract=off"),
        *(("-D__AMX_TILE__",) if instructions is InstructionSet.AMX else ()),
    )
    with (folder / "lock").open("w") as lock:  # the first of several test processes builds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        return declared(instructions, load_or_build(instructions, flags, folder))
