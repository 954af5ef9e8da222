"""A whole server of the tiny shop, its engine in a process of its own, and what must hold after every ordeal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported one by one (importlib mode); the tiny shop lies beside the tests of the services.
sys.path.insert(0, str(Path(__file__).parents[1] / "api"))
sys.path.insert(0, str(Path(__file__).parent))

from ordeal import Ordeal
from served_shop import ShopFolders
from tiny_shop import write_base, write_bundle

# Few run and few wait at once, so that a flood overfills the queue however fast the machine is.
BOUNDS = ("--max-running-requests", "16", "--max-queued-requests", "64")
FLAGS = ("--dtype", "float32", "--threads", "1", "--kv-cache-mib", "16", *BOUNDS)


@pytest.fixture(scope="session")
def soaks() -> bool:
    """Whether to run at full length (`make soak`), or so short that every test run can afford it."""
    return os.environ.get("SOAK") == "1"


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ordeal]:
    root = tmp_path_factory.mktemp("tiny-shop")
    base = write_base(root / "base")
    write_bundle(root / "bundle", base)
    with Ordeal(ShopFolders(base.folder, root / "bundle").config(*FLAGS)) as found:
        yield found
