"""A tiny shop's files, and the tiny base that training runs on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported one by one (importlib mode); what they share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from shoplm.model.base import Base, resolve_base
from shoplm.training import heads
from shoplm.training.log import ShopLog, read_log
from tiny_log import NOW, write_log


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """events, items, customers and campaigns of 60 customers over 200 days."""
    folder = tmp_path_factory.mktemp("tiny-log")
    write_log(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shop_log(tiny_files: Path) -> ShopLog:
    return read_log(
        tiny_files / "events.parquet",
        tiny_files / "items.parquet",
        tiny_files / "customers.parquet",
        tiny_files / "campaigns.parquet",
        now=NOW,
    )


@pytest.fixture(scope="session")
def tiny_base(tiny_model: object) -> Base:
    """Two random layers, heads tied: enough for every path of training."""
    folder: Path = tiny_model("smollm2")  # type: ignore[operator]
    return resolve_base(str(folder))


@pytest.fixture(scope="module")
def quick_heads() -> Iterator[None]:
    """Two strengths of a head instead of a grid, and two folds: for tests of what a whole run does, not of how heads
    are chosen and calibrated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoplm.training.heads.PENALTIES", heads.PENALTIES[1:2])
        patch.setattr("shoplm.training.heads.HIDDEN_SCALES", heads.HIDDEN_SCALES[:2])
        patch.setattr("shoplm.training.predictions.FOLDS", 2)
        patch.setattr("shoplm.training.campaigns.MOST_FOLDS", 2)
        yield
