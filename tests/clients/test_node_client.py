"""The Node client, run by Node against a server over loopback."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from canned_server import CannedServer
from node_client import FOLDER, INSTALL_SECONDS, TEST_SECONDS, install, needs_node, run_node_tests
from shoplm.v1 import shop_pb2


@needs_node
def test_node_client_against_the_canned_server(server: CannedServer) -> None:
    done = run_node_tests({"SHOPLM_ADDRESS": server.address, "SHOPLM_CANNED_ADDRESS": server.address})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout
    assert "# skipped 0" in done.stdout
    metadata = server.record.metadata
    assert metadata["of-blue"]["x-tenant-id"] == "blue"
    assert "x-priority" not in metadata["of-blue"]
    sent = {name: metadata[f"node-{name}"]["x-priority"] for name in ("recommend", "rank", "predict", "chat")}
    assert sent == {"recommend": "-100", "rank": "0", "predict": "7", "chat": "100"}
    filtered = server.record.requests["node-filter"]
    assert filtered.customer.events[0].price == 16_777_217.0  # which fp32 does not have
    assert filtered.customer.events[0].type == shop_pb2.EVENT_TYPE_PURCHASE
    assert (filtered.filter.max_price, filtered.filter.in_stock_only) == (3.49, True)


@needs_node
def test_the_package_carries_the_contract_and_leaves_none_behind(tmp_path: Path) -> None:
    """A copy that stays in the repository would be read instead of the protos from then on."""
    install()
    pack = ["npm", "pack", "--pack-destination", str(tmp_path)]
    subprocess.run(pack, cwd=FOLDER, capture_output=True, check=True, timeout=INSTALL_SECONDS)
    assert not (FOLDER / "protos").exists()
    (packed,) = tmp_path.glob("*.tgz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "package" / "node_modules").symlink_to(FOLDER / "node_modules")
    code = "const { Client } = await import('./src/index.js'); new Client().close();"
    use = ["node", "--input-type=module", "--eval", code]
    subprocess.run(use, cwd=tmp_path / "package", check=True, timeout=TEST_SECONDS)


def test_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (FOLDER / "package-lock.json").read_text(encoding="utf-8")
