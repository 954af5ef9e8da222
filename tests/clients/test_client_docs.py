"""The Python and the JavaScript of docs/clients.md run as they are written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from canned_server import ANSWER, CannedServer
from node_client import FOLDER, TEST_SECONDS, install, needs_node
from shoplm.client.customer_file import read_customer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "clients.md"


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_examples_run_in_order(server: CannedServer, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = examples("python")
    assert len(blocks) >= 5
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block.replace("127.0.0.1:50051", server.address), str(DOCS), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "".join(ANSWER) in printed
    assert "('count', '1000000 is over the limit of 100')" in printed
    namespace["client"].close()  # type: ignore[attr-defined]


@needs_node
def test_the_example_for_node_runs(server: CannedServer) -> None:
    install()
    (code,) = examples("js")
    done = subprocess.run(
        ["node", "--input-type=module"],  # in the package, whose name stands for itself
        input=code.replace("127.0.0.1:50051", server.address),
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=TEST_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "".join(ANSWER) in done.stdout
    assert "1000000 is over the limit of 100" in done.stdout


def test_the_customer_of_the_shell_is_one(tmp_path: Path) -> None:
    (content,) = [block for block in examples("json") if "customer_id" in block]
    (tmp_path / "customer.json").write_text(content)
    customer = read_customer(tmp_path / "customer.json")
    assert (customer.id, customer.events[0].item_id, customer.attributes) == ("4711", "1082185", {"age": "35-44"})
