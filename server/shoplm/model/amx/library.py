"""Builds the C++ decoder once with the machine's own compiler, keeps it in the cache, and loads it.

A wheel stays pure Python: a machine without a compiler, or without AMX, runs the torch operations instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from shoplm.model.base_cache import cache_folder

_SOURCES = ("tiles.h", "linear.h", "attention.h", "decoder.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=sapphirerapids", "-fopenmp", "-shared", "-fPIC")
_CPU_FLAGS = {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512vl", "avx512bw"}
_COMPILERS = ("g++", "c++", "clang++")


class AmxUnavailableError(Exception):
    """Says why this machine cannot use the C++ decoder."""


class LinearRef(ctypes.Structure):
    """`shoplm::Linear`."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("format", ctypes.c_int64),
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
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "middle", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("page_size", "layer_elements")),
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


@lru_cache(maxsize=1)
def amx_library() -> ctypes.CDLL:
    """The loaded library; built if the cache has none for these sources and this compiler.

    Raises AmxUnavailableError.
    """
    _check_cpu()
    path = _built()
    try:
        library = ctypes.CDLL(str(path))  # torch has loaded OpenMP's runtime already: both share its threads
    except OSError as error:
        raise AmxUnavailableError(f"{path} cannot be loaded: {error}") from error
    if library.shoplm_allow_tiles():
        raise AmxUnavailableError("the system does not let this process use AMX tiles")
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
    return library


def _check_cpu() -> None:
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not info.exists():
        raise AmxUnavailableError("AMX is used on Linux only")
    flags = next((line.split() for line in info.read_text().splitlines() if line.startswith("flags")), [])
    missing = _CPU_FLAGS.difference(flags)
    if missing:
        raise AmxUnavailableError(f"this CPU lacks {', '.join(sorted(missing))}")


def _built() -> Path:
    folder = Path(__file__).parent
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in _SOURCES:
        digest.update((folder / name).read_bytes())
    built = cache_folder() / "native" / f"decoder-{digest.hexdigest()[:16]}.so"
    if not built.exists():
        _compile(folder / _SOURCES[-1], built)
    return built


def _compile(source: Path, target: Path) -> None:
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, (named,) if named else _COMPILERS)), None)
    if compiler is None:
        raise AmxUnavailableError("there is no C++ compiler (g++ or clang++)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *_FLAGS, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise AmxUnavailableError(f"{compiler} failed: {done.stderr.strip()[:300]}")
            made.replace(target)  # whole or not at all: two engines may build at once
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AmxUnavailableError(f"the decoder cannot be built: {error}") from error
