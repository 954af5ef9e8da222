"""A canned gRPC server for each test of the clients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported one by one (importlib mode); what they share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from canned_server import CannedServer


@pytest.fixture
def server() -> Iterator[CannedServer]:
    """A fresh server on a free port of loopback."""
    with CannedServer() as running:
        yield running
