"""What the API process tells an engine's process to load."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from served_shop import ShopFolders
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.engine.launch import EngineProcess
from shoplm.engine.shop_texts import ShopTexts, read_shop_texts, token_texts
from shoplm.engine.spec import EngineSpec
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.errors import ConfigurationError
from shoplm.model.tokenizer import Tokenizer

START_SECONDS = 120.0


def test_texts_cross_as_they_are(shop_folders: ShopFolders) -> None:
    catalog, tokenizer = read_catalog(shop_folders.bundle), Tokenizer.from_folder(shop_folders.base)
    read = read_shop_texts(shop_folders.bundle, shop_folders.base)
    crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(read), type=ShopTexts)
    assert crossed.tokens == [tokenizer.encode(text) for text in token_texts(catalog)]
    assert list(crossed.columns.categories) == catalog.categories
    np.testing.assert_array_equal(crossed.columns.prices, catalog.prices)  # NaN equals NaN
    np.testing.assert_array_equal(crossed.columns.in_stock, catalog.in_stock)


def test_codes_of_several_tokens_have_no_texts(shop_folders: ShopFolders) -> None:
    manifest = read_manifest(shop_folders.bundle, verify=False)
    manifest = msgspec.structs.replace(manifest, depth=2, level_sizes=(5, 5))
    tokenizer = Tokenizer.from_folder(shop_folders.base)
    assert ShopTexts.of(manifest, read_catalog(shop_folders.bundle), tokenizer).tokens is None


async def test_an_engine_that_is_sent_texts_reads_no_catalogue(shop_folders: ShopFolders, tmp_path: Path) -> None:
    """One that is sent none reads it, and one whose API process could not read it."""
    bundle = Path(shutil.copytree(shop_folders.bundle, tmp_path / "bundle"))
    texts = msgspec.msgpack.encode(read_shop_texts(bundle, shop_folders.base))
    (bundle / "items.parquet").write_bytes(b"rubbish")
    spec = EngineSpec(str(shop_folders.base), str(bundle), dtype="float32", threads=1, kv_cache_bytes=4 << 20)
    sent, failed = (asyncio.get_running_loop().create_future() for _ in range(2))
    asyncio.get_running_loop().call_later(0.5, sent.set_result, texts)
    failed.set_exception(OSError("cannot be read"))
    await _start(ProcessEngineClient(spec, shop_texts=sent))
    for nothing in (None, failed):
        with pytest.raises(ConfigurationError, match=r"items\.parquet"):
            await _start(ProcessEngineClient(spec, shop_texts=nothing))


async def _start(client: ProcessEngineClient) -> None:
    try:
        async with asyncio.timeout(START_SECONDS):
            await client.start()
    finally:
        await client.close()


def test_an_engine_ends_where_its_orders_break_off() -> None:
    started = EngineProcess()
    started.send_shop_texts(b'{"base_folder"')
    assert asyncio.run(asyncio.wait_for(started.wait(), START_SECONDS)) == 1
    started.discard()
