"""Builds the C++ decoder once with the machine's own compiler, keeps it in the cache, and loads it.

A wheel stays pure Python: a machine without a compiler, or with an older CPU, runs the torch operations instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import torch
from shoplm.model.base_cache import cache_folder
from shoplm.model.native.memory import WeightMemory

_SOURCES = (
    *("vectors.h", "tiles.h", "crew.h", "linear.h", "linear_tiles.h", "linear_vectors.h", "packing.h"),
    *("products.h", "products_avx2.h", "products_avx512.h"),
    *("attention.h", "attention_bytes.h", "attention_tiles.h", "attention_vectors.h"),
    *("attention_avx2.h", "attention_avx512.h", "greedy.h", "decoder.cpp"),
)
_FLAGS = ("-std=c++17", "-O2", "-fopenmp", "-shared", "-fPIC")
_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
_AVX512 = {
    **_AVX2,
    "bmi1": "-mbmi",
    "bmi2": "-mbmi2",
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512cd": "-mavx512cd",
    "avx512_bf16": "-mavx512bf16",
    "avx512_vnni": "-mavx512vnni",
}
_AMX = {**_AVX512, "amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"}
_HASH_BYTES = 32
_COMPILERS = ("g++", "c++", "clang++")
_COMPILE_SECONDS = 600  # it takes three of a core's, which a busy machine may not have to give

log = logging.getLogger("shoplm.engine")


class InstructionSet(StrEnum):
    """What the decoder is compiled for; the best first."""

    AMX = "amx"
    AVX512 = "avx512"  # with products of bf16 and of bytes
    AVX2 = "avx2"

    @property
    def extensions(self) -> dict[str, str]:
        """All that the compiler may use beside plain x86-64: what /proc/cpuinfo must list, and the compiler's flag."""
        match self:
            case InstructionSet.AMX:
                return _AMX
            case InstructionSet.AVX512:
                return _AVX512
            case InstructionSet.AVX2:
                return _AVX2

    @property
    def compiler_flags(self) -> tuple[str, ...]:
        """Beside those of all. They name extensions and no CPU, which would bring more than is looked for."""
        match self:
            case InstructionSet.AMX:
                return (*self.extensions.values(), "-mtune=sapphirerapids", "-DSHOPLM_AVX512")
            case InstructionSet.AVX512:
                return (*self.extensions.values(), "-mtune=cascadelake", "-DSHOPLM_AVX512")
            case InstructionSet.AVX2:
                return tuple(self.extensions.values())


class NativeUnavailableError(Exception):
    """Says why this machine cannot use the C++ decoder."""


class NativeBuildError(NativeUnavailableError):
    """The compiler is there, and refuses the decoder."""


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded decoder."""

    instructions: InstructionSet
    functions: ctypes.CDLL
    memory: WeightMemory = field(default_factory=WeightMemory)


class LinearRef(ctypes.Structure):
    """`shoplm::Linear`."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("low_rank", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


class PackingRef(ctypes.Structure):
    """`shoplm::Packing`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "scales", "errors")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "format", "wide")),
    )


class GreedyRef(ctypes.Structure):
    """`shoplm::Greedy`."""

    _fields_ = (
        ("w", LinearRef),
        ("screen", LinearRef),
        ("errors", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("norm", ctypes.c_float),
    )


class LayerRef(ctypes.Structure):
    """`shoplm::Layer`."""

    _fields_ = (
        ("qkv", LinearRef),
        ("output", LinearRef),
        ("gate_up", LinearRef),
        ("down", LinearRef),
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("uses_rope", ctypes.c_int64),
    )


class ModelRef(ctypes.Structure):
    """`shoplm::Model`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "embedding", "final_norm", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "middle", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("page_size", "layer_elements", "widest", "rank")),
        *((name, ctypes.c_float) for name in ("epsilon", "query_scale")),
    )


class StepRef(ctypes.Structure):
    """`shoplm::Step`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "slots", "rows", "pages", "own_slots")),
        *((name, ctypes.c_void_p) for name in ("masks", "outputs", "result")),
        *((name, ctypes.c_int64) for name in ("token_count", "row_count", "output_count", "threads")),
    )


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's numbers, which must stay alive as long as the address is used."""
    return None if tensor is None else tensor.data_ptr()


def best_library() -> NativeLibrary:
    """The decoder for the best instructions that this machine has. Raises NativeUnavailableError."""
    refusals = []
    for instructions in InstructionSet:
        try:
            return native_library(instructions)
        except NativeUnavailableError as error:
            refusals.append(f"{instructions}: {error}")
    raise NativeUnavailableError("; ".join(refusals))


@lru_cache
def native_library(instructions: InstructionSet) -> NativeLibrary:
    """The loaded library; built if the cache has none for these sources and instructions.

    Raises NativeUnavailableError.
    """
    _check_cpu(instructions)
    functions = built(instructions)
    if functions.shoplm_allow():
        raise NativeUnavailableError("the system does not let this process use them")
    return declared(instructions, functions)


def built(instructions: InstructionSet) -> ctypes.CDLL:
    """The cache's library of that form, whether or not this CPU has the instructions. Raises NativeUnavailableError."""
    return load_or_build(instructions, instructions.compiler_flags, cache_folder() / "native")


def declared(instructions: InstructionSet, library: ctypes.CDLL) -> NativeLibrary:
    """A library that was built in the form of `instructions`, with its functions' types."""
    library.shoplm_step.argtypes = (ctypes.POINTER(ModelRef), ctypes.POINTER(StepRef))
    library.shoplm_step.restype = None
    library.shoplm_linear.argtypes = (
        ctypes.POINTER(LinearRef),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    library.shoplm_linear.restype = None
    library.shoplm_greedy.argtypes = (
        ctypes.POINTER(GreedyRef),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    library.shoplm_greedy.restype = None
    library.shoplm_pack.argtypes = (ctypes.POINTER(PackingRef), ctypes.c_int64)
    library.shoplm_pack.restype = None
    return NativeLibrary(instructions, library)


def _check_cpu(instructions: InstructionSet) -> None:
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not info.exists():
        raise NativeUnavailableError("the C++ decoder is for Linux only")
    flags = next((line.split() for line in info.read_text().splitlines() if line.startswith("flags")), [])
    missing = instructions.extensions.keys() - set(flags)
    if missing:
        raise NativeUnavailableError(f"this CPU lacks {', '.join(sorted(missing))}")


def load_or_build(instructions: InstructionSet, compiler_flags: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    """The folder's library for these sources and flags; built where there is none, or none that this process may trust.

    Raises NativeUnavailableError. Torch has loaded OpenMP's runtime already: both share its threads.
    """
    sources = Path(__file__).parent
    flags = (*_FLAGS, *compiler_flags)
    digest = hashlib.sha256(" ".join(flags).encode())
    for name in _SOURCES:
        digest.update((sources / name).read_bytes())
    path = folder / f"decoder-{instructions}-{digest.hexdigest()[:16]}.so"
    if path.exists() and _is_safe(folder) and _is_safe(path):
        try:
            if not _is_whole(path):  # loading a part of a library may end the process
                raise OSError(f"{path} is damaged")
            return ctypes.CDLL(str(path))
        except OSError as error:  # damaged, or made on another system
            log.info("the C++ decoder is built again: %s", error)
    return _build(flags, sources / _SOURCES[-1], path)


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the hash of what is before it, as `_build` leaves it."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-_HASH_BYTES]).digest() == content[-_HASH_BYTES:]


def _is_safe(path: Path) -> bool:
    """Nobody but root and this user could have put code there."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & stat.S_IWOTH


def _build(flags: tuple[str, ...], source: Path, target: Path) -> ctypes.CDLL:
    """Compiles and loads it; keeps it as `target` if that folder can be written and is safe."""
    compiler = find_compiler()
    keeps = _can_keep(target.parent)
    if not keeps:
        log.info("%s cannot be written, or others can write it: the C++ decoder is not kept", target.parent)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent if keeps else None) as folder:
            made = Path(folder) / target.name
            command = [compiler, *flags, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
            if done.returncode:
                raise NativeBuildError(f"{compiler} failed: {done.stderr.strip()[:300]}")
            made.write_bytes((content := made.read_bytes()) + hashlib.sha256(content).digest())
            library = ctypes.CDLL(str(made))
            if keeps:
                made.replace(target)  # whole or not at all: two engines may build at once
            return library
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"the decoder cannot be built: {error}") from error


def find_compiler() -> str:
    """Path of the C++ compiler. Raises NativeUnavailableError."""
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, (named,) if named else _COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (g++ or clang++)")
    return compiler


def _can_keep(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK) and _is_safe(folder)
