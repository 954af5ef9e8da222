"""The C++ decoder's library for the best instructions of a machine, built once and kept in the cache; its structures.

A wheel stays pure Python: a machine without a compiler, or with an older CPU, runs the torch operations instead.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import torch
from shoplm.errors import ConfigurationError
from shoplm.model.base_cache import cache_folder
from shoplm.model.native.build import NativeTimeoutError, NativeUnavailableError, load_or_build
from shoplm.model.native.memory import WeightMemory

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
        """Compiler flags beside the common ones. They name extensions and no CPU, which would bring more than is looked
        for."""
        match self:
            case InstructionSet.AMX:
                return (*self.extensions.values(), "-mtune=sapphirerapids", "-DSHOPLM_AVX512")
            case InstructionSet.AVX512:
                return (*self.extensions.values(), "-mtune=cascadelake", "-DSHOPLM_AVX512")
            case InstructionSet.AVX2:
                return tuple(self.extensions.values())


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
            if isinstance(error, NativeTimeoutError):
                break
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
    """The cache's library of that form, whether or not this CPU has the instructions; built and not kept where there is
    no cache. Raises NativeUnavailableError."""
    folder: Path | None = None
    try:
        folder = cache_folder() / "native"
    except ConfigurationError as error:
        log.info("the C++ decoder is not kept: %s", error)
    return load_or_build(instructions, instructions.compiler_flags, folder)


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
