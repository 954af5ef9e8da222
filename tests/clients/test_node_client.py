"""The Node client, run by Node against a server over loopback."""

from __future__ import annotations

from canned_server import CannedServer
from node_client import FOLDER, needs_node, run_node_tests


@needs_node
def test_node_client_against_the_canned_server(server: CannedServer) -> None:
    done = run_node_tests({"SHOPLM_ADDRESS": server.address, "SHOPLM_CANNED_ADDRESS": server.address})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout
    assert "# skipped 0" in done.stdout
    assert server.record.metadata["of-blue"]["x-tenant-id"] == "blue"


def test_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (FOLDER / "package-lock.json").read_text(encoding="utf-8")
