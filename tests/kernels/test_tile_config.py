"""tile_config: a pure table whose promises other code relies on."""

from __future__ import annotations

import itertools

import pytest
import torch
from shoplm.kernels.tile_config import (
    MAX_WIDE_SPLITS,
    SHORT_ROWS,
    SUPPORTED_DTYPES,
    SUPPORTED_HEAD_DIMS,
    SUPPORTED_PAGE_SIZES,
    TileConfig,
    arch_of,
    padded_head_dim,
    split_tokens,
    tile_config,
    wide_split_tokens,
)

ARCHS = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use, CUDA C++ guide, table 30


def all_tiles() -> list[tuple[int, int, torch.dtype, int, bool, TileConfig]]:
    rows = (1, 7, 16, 17, SHORT_ROWS, SHORT_ROWS + 1, 1024)
    keys = itertools.product(ARCHS, SUPPORTED_HEAD_DIMS, SUPPORTED_DTYPES, rows, (False, True))
    return [(*key, tile_config(*key)) for key in keys]


def test_every_combination_has_a_tile() -> None:
    """Power-of-two sides that the tensor cores take, warps and stages in range."""
    for *_, tile in all_tiles():
        assert tile.block_m in (16, 32, 64, 128) and tile.block_n in (32, 64, 128)
        assert tile.num_warps in (4, 8) and tile.num_stages in (2, 3, 4)


def test_decode_rows_fit_one_tile() -> None:
    """Up to 16 heads per KV head are one tile; the smallest that the tensor cores take."""
    assert all(tile.block_m == 16 for *_, rows, _, tile in all_tiles() if rows <= 16)


def test_hopper_tiles_suit_warp_group_products() -> None:
    """wgmma needs 64 rows, and 128 rows need two warp groups."""
    for arch, _, dtype, rows, _, tile in all_tiles():
        if arch == 90 and dtype != torch.float32 and rows > 16:
            assert tile.block_m >= 64
            assert tile.num_warps * 32 >= tile.block_m * 2


def test_tiles_leave_room_in_shared_memory() -> None:
    """Q and `num_stages - 1` tiles of K and V in flight, the least any schedule keeps, fit the architecture."""
    for arch, head_dim, dtype, _, quantised, tile in all_tiles():
        kv_bytes = 1 if quantised else dtype.itemsize
        stages = 2 * (tile.num_stages - 1) * tile.block_n * padded_head_dim(head_dim) * kv_bytes
        assert stages + tile.block_m * padded_head_dim(head_dim) * dtype.itemsize <= SHARED_BYTES[arch] * 1024


def test_splits_are_whole_tiles_and_pages() -> None:
    """A split starts at a tile, and a tile never straddles pages unevenly."""
    for *_, tile in all_tiles():
        for arch in ARCHS:
            assert split_tokens(arch) % tile.block_n == 0 and wide_split_tokens(arch) % tile.block_n == 0
        for page_size in SUPPORTED_PAGE_SIZES:
            assert page_size % tile.block_n == 0 or tile.block_n % page_size == 0
    assert MAX_WIDE_SPLITS >= 2


def test_rows_beyond_the_wide_tile_change_nothing() -> None:
    """The number of rows in a batch must not move a row to another tile once it is wide."""
    for arch, head_dim, dtype in itertools.product(ARCHS, SUPPORTED_HEAD_DIMS, SUPPORTED_DTYPES):
        assert len({tile_config(arch, head_dim, dtype, rows) for rows in (65, 128, 129, 4096)}) == 1


def test_padded_head_dim() -> None:
    """Only 96 is padded."""
    assert [padded_head_dim(head_dim) for head_dim in SUPPORTED_HEAD_DIMS] == [64, 128, 128, 256]


def test_the_interpreter_runs_hopper_tiles() -> None:
    """A CPU stands for sm_90."""
    assert arch_of(torch.device("cpu")) == 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((75, 64, torch.float16, 1), "^arch must be 80"),
        ((90, 80, torch.float16, 1), "^head_dim must be one of .* got 80"),
        ((90, 64, torch.float64, 1), "^dtype must be one of .* got torch.float64"),
        ((90, 64, torch.float16, 0), "^rows must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[int, int, torch.dtype, int], message: str) -> None:
    """Each refusal says which argument and value."""
    with pytest.raises(ValueError, match=message):
        tile_config(*arguments)


def test_a_single_stage_is_refused() -> None:
    """One stage cannot overlap a load with a product."""
    with pytest.raises(ValueError, match=r"^num_stages must be at least 2"):
        TileConfig(64, 64, 4, 1)
