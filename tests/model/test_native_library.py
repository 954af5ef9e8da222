"""How the C++ decoder's library is built, kept and trusted."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import grp
import os
import pwd
import re
import runpy
import shutil
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shoplm.engine.cpu import cpu_backend
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model.base_cache import cache_folder
from shoplm.model.linear import packing_supported
from shoplm.model.native import build as building
from shoplm.model.native import library as native
from shoplm.model.native.build import NativeUnavailableError, load_or_build
from shoplm.model.native.library import InstructionSet
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


def group_of(monkeypatch: pytest.MonkeyPatch, name: str, *members: str) -> None:
    """The group of every file."""
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))


@pytest.mark.parametrize("mode", [0o777, 0o775])
@pytest.mark.parametrize("open_to", ["library", "folder"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(
    kept: Path, monkeypatch: pytest.MonkeyPatch, open_to: str, mode: int
) -> None:
    group_of(monkeypatch, "staff")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"somebody else's")
    (kept if open_to == "library" else kept.parent).chmod(mode)
    loaded = build(kept.parent)
    assert loaded._name != str(kept)
    replaced = kept.read_bytes() != b"somebody else's"
    assert replaced == (open_to == "library")  # what lies in a folder that others can write is never loaded later


def test_a_group_of_this_user_alone_may_write_the_library(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(kept.parent)
    kept.chmod(0o775)
    kept.parent.chmod(0o775)
    user = pwd.getpwuid(os.geteuid()).pw_name
    group_of(monkeypatch, user, "root", user)
    assert build(kept.parent)._name == str(kept)
    group_of(monkeypatch, user, user, "somebody")
    assert build(kept.parent)._name != str(kept)


def test_whatever_the_umask_is_others_read_what_is_kept_and_do_not_write_it(kept: Path) -> None:
    before = os.umask(0)
    try:
        build(kept.parent)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (kept, kept.parent)] == [0o755, 0o755]


def test_a_cache_that_cannot_be_read_costs_a_compilation_and_not_the_decoder(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(kept.parent)
    found = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if kept.parent in (path, *path.parents):
            raise PermissionError(errno.EACCES, "Permission denied")
        return found(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)  # what a user sees to whom the folder is closed; root sees all
    with caplog.at_level("INFO"):
        assert not build(kept.parent)._name.startswith(str(kept.parent))
    assert "is built again: [Errno 13] Permission denied" in caplog.text


def test_a_user_without_a_home_has_the_decoder_and_no_cache(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(user_id: int) -> pwd.struct_passwd:
        raise KeyError(f"uid not found: {user_id}")

    for name in ("HOME", "SHOPLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", refuse)
    with pytest.raises(ConfigurationError, match=r"~/\.cache: this user has no home; set SHOPLM_CACHE"):
        cache_folder()
    assert native.built(InstructionSet.AVX2).a is not None


def test_the_compiler_may_have_arguments(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = os.environ["CXX"]
    monkeypatch.setenv("CXX", f"env A='b c' {compiler}")
    assert building.find_compiler() == (shutil.which("env"), "A=b c", compiler)
    assert build(kept.parent).a is not None
    for named, message in (
        ("no-such-compiler -m64", "no C\\+\\+ compiler no-such-compiler: CXX is 'no-such-compiler -m64'"),
        ("g++ 'a", 'CXX is "g\\+\\+ \'a": No closing quotation'),
    ):
        monkeypatch.setenv("CXX", named)
        with pytest.raises(NativeUnavailableError, match=message):
            build(kept.parent.parent / "other")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """What the compiler is asked, on a machine that has the instructions of every form and an empty cache."""
    calls: list[tuple[str, ...]] = []
    compile = building._compile

    def ask(compiler: tuple[str, ...], *arguments: str) -> None:
        calls.append(arguments)
        compile(compiler, *arguments)

    monkeypatch.setattr(building, "_compile", ask)
    monkeypatch.setattr(native, "_check_cpu", lambda _: None)
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path / "cache"))
    native.native_library.cache_clear()
    return calls


def test_a_compiler_that_fails_is_asked_once_for_each_form(
    asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match=r"amx: .*/failing failed: no such flag; avx512: .*; avx2: "):
            native.best_library()
    assert len(asked) == len(InstructionSet)


def test_a_compiler_that_hangs_is_asked_once_and_ends_with_all_that_it_started(
    asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, pipe = tmp_path / "hanging", tmp_path / "pipe"
    os.mkfifo(pipe)
    compiler.write_text(f"#!/bin/sh\nexec 3>{pipe}\n(sleep 60; echo alive >&3) &\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(building, "_COMPILE_SECONDS", 2)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match=r"amx: .*/hanging has not compiled the decoder within 2 s$"):
            native.best_library()
    assert len(asked) == 1
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # once nobody has the pipe open
    os.close(reader)


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
