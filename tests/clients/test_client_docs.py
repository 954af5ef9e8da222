"""The Python of docs/clients.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from canned_server import ANSWER, CannedServer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "clients.md"


def test_examples_run_in_order(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block.replace("127.0.0.1:50051", server.address), str(DOCS), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "".join(ANSWER) in printed
    assert "('count', '1000000 is over the limit of 100')" in printed
    namespace["client"].close()  # type: ignore[attr-defined]
