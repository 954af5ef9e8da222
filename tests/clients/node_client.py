"""Installs the Node client's dependencies and runs its tests."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "clients" / "node"
INSTALL_SECONDS, TEST_SECONDS = 300, 120

needs_node = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="Node.js is not installed: node and npm are needed"
)


def install() -> None:
    """The exact dependencies of the lock file; does nothing when they are there. Tests beside this one wait."""
    lock, stamp = FOLDER / "package-lock.json", FOLDER / "node_modules" / ".installed-lock.json"
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_bytes() == lock.read_bytes():
            return
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        assert done.returncode == 0, f"npm ci failed:\n{done.stderr}"
        shutil.copyfile(lock, stamp)


def run_node_tests(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run every test of the Node client; the caller looks at the outcome."""
    install()
    return subprocess.run(
        ["node", "--test", "--test-reporter=tap", "test/"],
        cwd=FOLDER,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TEST_SECONDS,
    )
