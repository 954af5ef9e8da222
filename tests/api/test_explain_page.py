"""`shoplm explain`: the page shows the history, what moved the answers, and where attention lay."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from served_shop import ShopFolders
from shoplm.engine.client import ThreadEngineClient
from shoplm.errors import ConfigurationError
from shoplm.explain.cli import explain as command
from shoplm.explain.collect import Explained, explain
from shoplm.explain.page import render
from shoplm.v1 import shop_pb2
from tiny_shop import DEMO_AS_OF, DEMO_CUSTOMER, LAYERS, item_id
from typer.testing import CliRunner

SMALL = ("--dtype", "float32", "--kv-cache-mib", "16", "--threads", "1")


def collected(folders: ShopFolders, customer: shop_pb2.Customer) -> Explained:
    config = folders.config(*SMALL)
    return asyncio.run(
        explain(config, customer, 3, lambda config, base, _: ThreadEngineClient(config.engine_spec(base.folder)))
    )


@pytest.fixture(scope="module")
def demo(shop_folders: ShopFolders) -> Explained:
    return collected(shop_folders, shop_pb2.Customer(customer_id=DEMO_CUSTOMER))


def test_everything_is_collected(demo: Explained) -> None:
    assert len(demo.recommended.items) == 3 and demo.recommended.items[0].influences
    assert [basket.day for basket in demo.baskets][-1] == "2017-12-27"
    assert demo.baskets[0].items == ((item_id(2), "Item 2"), (item_id(8), "Item 8"))
    assert all(basket.is_read for basket in demo.baskets)
    assert demo.attention.mass.shape == (LAYERS, 2, 2 + 8)
    np.testing.assert_allclose(demo.attention.mass.sum(-1), 1.0, atol=1e-4)


def test_the_page_shows_all_of_it_and_calls_attention_attention(demo: Explained) -> None:
    page = render(demo)
    for item in demo.recommended.items:
        assert item.title in page
        assert all(reason.text in page for reason in item.reasons)
        assert all(influence.text in page for influence in item.influences)
    assert "<mark>Item 2</mark>" in page
    assert "Attention, not cause." in page
    drawn = re.findall(r"layer (\d+), head (\d+), (\S+): ", page)
    assert {layer for layer, _, _ in drawn} == {"1", "2"} and {head for _, head, _ in drawn} == {"1", "2"}
    assert {day for _, _, day in drawn} <= {basket.day for basket in demo.baskets}
    assert "<script" not in page and "http" not in page


def test_what_comes_from_the_shop_is_text(demo: Explained) -> None:
    evil = "<img src=x onerror=alert(1)>"
    baskets = (dataclasses.replace(demo.baskets[0], items=((item_id(2), evil),)),)
    page = render(dataclasses.replace(demo, baskets=baskets, customer_id=evil))
    assert evil not in page and "&lt;img src=x" in page


def test_a_history_of_the_callers_own_and_one_that_is_not_there(shop_folders: ShopFolders) -> None:
    long = shop_pb2.Customer(
        customer_id="mine",
        as_of=Timestamp(seconds=int(DEMO_AS_OF.timestamp())),
        events=[
            shop_pb2.Event(item_id=item_id(row % 20), time=Timestamp(seconds=1_500_000_000 + row * 40_000))
            for row in range(300)
        ],
    )
    mine = collected(shop_folders, long)
    assert not mine.baskets[0].is_read and mine.baskets[-1].is_read
    assert 'class="unread"' in render(mine)
    with pytest.raises(ConfigurationError, match="no history that counts here; demo customers: 1001"):
        collected(shop_folders, shop_pb2.Customer(customer_id="nobody"))


def test_the_command_says_what_is_missing(shop_folders: ShopFolders, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["--bundle", str(shop_folders.bundle), "--out", str(out)])
    assert result.exit_code == 2 and "--customer" in result.output and not out.exists()
