"""The Node client, run by Node against a server over loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from canned_server import CannedServer

FOLDER = Path(__file__).resolve().parents[2] / "clients" / "node"
INSTALL_SECONDS, TEST_SECONDS = 300, 120

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="Node.js is not installed: node and npm are needed"
)


@pytest.fixture(scope="session")
def installed() -> Path:
    """The client's folder with the exact dependencies of its lock file."""
    lock, stamp = FOLDER / "package-lock.json", FOLDER / "node_modules" / ".installed-lock.json"
    if not (stamp.is_file() and stamp.read_bytes() == lock.read_bytes()):
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        assert done.returncode == 0, f"npm ci failed:\n{done.stderr}"
        shutil.copyfile(lock, stamp)
    return FOLDER


def run_node_tests(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run every test of the Node client; the caller looks at the outcome."""
    return subprocess.run(
        ["node", "--test", "--test-reporter=tap", "test/"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TEST_SECONDS,
    )


def test_node_client_against_the_canned_server(installed: Path, server: CannedServer) -> None:
    environment = {"SHOPLM_ADDRESS": server.address, "SHOPLM_CANNED_ADDRESS": server.address}
    done = run_node_tests(installed, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout
    assert "# skipped 0" in done.stdout


def test_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (FOLDER / "package-lock.json").read_text(encoding="utf-8")
