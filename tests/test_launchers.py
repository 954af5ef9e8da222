"""What is said where Triton could not launch a kernel; each thing that it needs is taken away in turn."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from shoplm import doctor
from shoplm.launchers import missing_for_launches


@pytest.fixture(autouse=True)
def _tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes everything, headers and a cache folder, whatever this machine has."""
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 0"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def missing() -> str:
    found = missing_for_launches()
    assert found is not None and "\n" not in found
    assert any(found in line for line in doctor.report()[0])
    return found


def test_nothing_is_missing_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert missing_for_launches() is None
    assert not (tmp_path / "new").exists()
    assert any("ok   launching Triton kernels" in line for line in doctor.report()[0])


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC='no-such-compiler' is no program: install gcc" in missing()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "neither gcc nor clang is on the PATH: install gcc" in missing()


def test_no_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "include"))
    assert f"Python.h to launch kernels, but it is not in {tmp_path}/include: install python3." in missing()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    """As one without the C library's headers does."""
    compiler(tmp_path, "echo 'launcher.c:2: fatal error: stdint.h: No such file' >&2; exit 1")
    assert "fails (launcher.c:2: fatal error: stdint.h: No such file): install gcc and libc6-dev" in missing()


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert f"but {tmp_path}/file cannot be written to: set TRITON_CACHE_DIR" in missing()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobodys() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobodys)
    for name in ("SHOPLM_CACHE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "set TRITON_CACHE_DIR" in missing()
    lines, fine = doctor.report()
    assert not fine and any(line.startswith("FAIL") and "SHOPLM_CACHE" in line for line in lines)
