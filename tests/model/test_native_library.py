"""How the C++ decoder's library is built, kept and trusted."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from shoplm.engine.cpu import cpu_backend
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model.linear import packing_supported
from shoplm.model.native import library as native
from shoplm.model.native.library import InstructionSet, load_or_build
from shoplm.model.torch_backend import TorchBackend
from toy_decoder import CONFIG, random_weights


@pytest.mark.parametrize("instructions", InstructionSet)
def test_the_compiler_may_use_what_is_looked_for_and_nothing_else(instructions: InstructionSet) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")

    def features(*flags: str) -> set[str]:
        """Names of the macros that say what the compiler may use."""
        command = [compiler, *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^#define __([A-Z][A-Z0-9_]+)__ 1$", said, re.MULTILINE)
        return {name.lower().replace("_", "") for name in found}

    # No CPU has AVX2 without the older ones; the last two are names of later compilers for widths of AVX-512.
    older = {"avx", "sse3", "ssse3", "sse41", "sse42", "popcnt", "crc32", "xsave", "mwait", "evex256", "evex512"}
    looked_for = {name.replace("_", "").replace("bmi1", "bmi") for name in instructions.extensions}
    assert features(*instructions.compiler_flags) - features() - older == looked_for


def test_a_machine_without_a_compiler_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native.InstructionSet, "extensions", {})
    native.native_library.cache_clear()
    weights = random_weights()
    weights = dataclasses.replace(weights, embedding=weights.embedding.bfloat16())
    spec = EngineSpec("", max_running_requests=4)
    try:
        with caplog.at_level("INFO"):
            backend = cpu_backend(spec, CONFIG, weights, None, (), 8)
        assert isinstance(backend, TorchBackend)
        assert "no C++ compiler" in caplog.text
        assert backend.pool.keys.dtype == (torch.bfloat16 if packing_supported() else torch.float32)
        assert backend.info.pages == (8 if packing_supported() else 4)
        with pytest.raises(
            ConfigurationError, match="int8 needs the C\\+\\+ decoder: amx: there is no C\\+\\+ compiler"
        ):
            cpu_backend(EngineSpec("", weight_format="int8"), CONFIG, weights, None, (), 8)
        with pytest.raises(ConfigurationError, match="kv_format int8 needs the C\\+\\+ decoder: amx: there is no"):
            cpu_backend(EngineSpec("", kv_format="int8"), CONFIG, weights, None, (), 8)
        with pytest.raises(ConfigurationError, match="kv_format fp8 needs backend triton; a CPU takes model, int8"):
            cpu_backend(EngineSpec("", kv_format="fp8"), CONFIG, weights, None, (), 8)
    finally:
        native.native_library.cache_clear()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a library of AVX2 would be kept, in an empty folder; a compiler that makes an empty one in its place."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "int a;" | cc -shared -x c - -o "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    build(tmp_path / "elsewhere")
    (made,) = (tmp_path / "elsewhere").iterdir()
    return tmp_path / "cache" / "native" / made.name


def build(folder: Path) -> ctypes.CDLL:
    return load_or_build(InstructionSet.AVX2, InstructionSet.AVX2.compiler_flags, folder)


def test_a_library_is_built_once_and_again_where_it_is_damaged(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(kept.parent)
    built = kept.read_bytes()
    for damaged in (b"damaged", built[: len(built) // 2], built[:1000] + b"\0" + built[1001:]):
        kept.write_bytes(damaged)  # to load the second would end the process
        build(kept.parent)
        assert kept.read_bytes() == built
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    monkeypatch.setenv("CXX", "no-such-compiler")
    build(kept.parent)


@pytest.mark.parametrize("open_to_all", ["library", "folder"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(kept: Path, open_to_all: str) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"somebody else's")
    (kept if open_to_all == "library" else kept.parent).chmod(0o777)
    loaded = build(kept.parent)
    assert loaded._name != str(kept)
    replaced = kept.read_bytes() != b"somebody else's"
    assert replaced == (open_to_all == "library")  # what lies in a folder that others can write is never loaded later


def test_a_cache_that_cannot_be_written_costs_a_compilation_and_not_the_decoder(kept: Path) -> None:
    kept.parent.parent.mkdir()
    kept.parent.write_text("a file, so that nothing can be put below it")
    assert build(kept.parent).a is not None


def test_all_forms_are_built_into_the_cache_for_machines_without_a_compiler(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOPLM_CACHE", str(kept.parents[1]))
    runpy.run_module("shoplm.model.native", run_name="__main__")
    assert {path.name.split("-")[1] for path in kept.parent.iterdir()} == set(InstructionSet)
    capsys.readouterr()
    monkeypatch.setenv("CXX", "no-such-compiler")
    runpy.run_module("shoplm.model.native", run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == len(InstructionSet)
