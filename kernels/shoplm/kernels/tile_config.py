"""Tile sizes of the attention kernels: a pure function of architecture, head size, element type and rows per tile.

There is no run-time autotuning: a tile picked by timing would differ from machine to machine and could change a
result's last bits between two runs. The choices are those that compile without register spills and within shared
memory on each architecture (the budget test keeps it so).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SUPPORTED_HEAD_DIMS = (64, 96, 128, 256)
SUPPORTED_PAGE_SIZES = (16, 32, 64)
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SHORT_ROWS = 64
"""Packed rows (new tokens x group heads) up to which a row's keys are split over programs; more rows fill the GPU."""

MAX_WIDE_SPLITS = 4
"""Most splits of a short chunk or of a beam group: bounds their workspace whatever the context."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One kernel's tile: `block_m` packed query rows x `block_n` keys, and how it is scheduled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.num_stages < 2:
            raise ValueError(f"num_stages must be at least 2 (a single stage cannot overlap loads), got {self}")


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head is padded to inside a kernel (96 becomes 128)."""
    return 1 << (head_dim - 1).bit_length()


# Per architecture, rows and (padded head_dim, quantised KV): the largest tile, then the most stages, that compile
# without a spilled register in every combination of page size, window and kernel (`make budget` lists them all). A head
# of 96 has an entry of its own where its padding costs the registers that 128 has left.
_TOKEN, _NARROW, _WIDE = 16, SHORT_ROWS, 2 * SHORT_ROWS
_TILES: dict[int, dict[int, dict[tuple[int, bool], TileConfig]]] = {
    80: {
        _TOKEN: {
            (64, False): TileConfig(16, 64, 4, 3),
            (64, True): TileConfig(16, 64, 4, 3),
            (128, False): TileConfig(16, 32, 4, 3),
            (96, True): TileConfig(16, 32, 4, 2),
            (128, True): TileConfig(16, 64, 4, 3),
            (256, False): TileConfig(16, 32, 8, 3),
            (256, True): TileConfig(16, 32, 4, 3),
        },
        _NARROW: {
            (64, False): TileConfig(64, 64, 4, 2),
            (64, True): TileConfig(64, 64, 4, 3),
            (128, False): TileConfig(64, 32, 4, 3),
            (128, True): TileConfig(64, 32, 4, 2),
            (256, False): TileConfig(64, 32, 8, 3),
            (256, True): TileConfig(64, 64, 8, 3),
        },
        _WIDE: {
            (64, False): TileConfig(128, 64, 8, 3),
            (64, True): TileConfig(128, 64, 8, 3),
            (96, False): TileConfig(64, 64, 8, 2),
            (128, False): TileConfig(128, 32, 8, 3),
            (96, True): TileConfig(64, 32, 8, 3),
            (128, True): TileConfig(64, 64, 8, 2),
            (256, False): TileConfig(64, 32, 8, 3),
            (256, True): TileConfig(32, 64, 8, 3),
        },
    },
    89: {
        _TOKEN: {
            (64, False): TileConfig(16, 64, 4, 3),
            (64, True): TileConfig(16, 32, 4, 3),
            (128, False): TileConfig(16, 64, 4, 3),
            (96, True): TileConfig(16, 32, 8, 3),
            (128, True): TileConfig(16, 32, 4, 3),
            (256, False): TileConfig(16, 32, 4, 3),
            (256, True): TileConfig(16, 32, 4, 3),
        },
        _NARROW: {
            (64, False): TileConfig(64, 64, 4, 2),
            (64, True): TileConfig(64, 64, 4, 3),
            (128, False): TileConfig(64, 32, 4, 3),
            (128, True): TileConfig(64, 32, 4, 3),
            (256, False): TileConfig(64, 32, 8, 3),
            (256, True): TileConfig(64, 32, 8, 3),
        },
        _WIDE: {
            (64, False): TileConfig(128, 64, 8, 3),
            (64, True): TileConfig(128, 32, 8, 3),
            (96, False): TileConfig(64, 64, 8, 2),
            (128, False): TileConfig(128, 32, 8, 3),
            (128, True): TileConfig(64, 64, 8, 2),
            (256, False): TileConfig(64, 32, 8, 3),
            (256, True): TileConfig(64, 32, 8, 3),
        },
    },
    90: {
        _TOKEN: {
            (64, False): TileConfig(16, 64, 4, 3),
            (64, True): TileConfig(16, 32, 4, 3),
            (128, False): TileConfig(16, 64, 4, 3),
            (128, True): TileConfig(16, 64, 4, 3),
            (256, False): TileConfig(16, 32, 4, 3),
            (256, True): TileConfig(16, 32, 4, 3),
        },
        _NARROW: {
            (64, False): TileConfig(64, 64, 4, 3),
            (64, True): TileConfig(64, 64, 4, 3),
            (128, False): TileConfig(64, 64, 4, 3),
            (128, True): TileConfig(64, 32, 4, 3),
            (256, False): TileConfig(64, 32, 4, 2),
            (256, True): TileConfig(64, 32, 8, 2),
        },
        _WIDE: {
            (64, False): TileConfig(128, 128, 8, 3),
            (64, True): TileConfig(128, 128, 8, 3),
            (128, False): TileConfig(128, 128, 8, 3),
            (128, True): TileConfig(128, 64, 8, 3),
            (256, False): TileConfig(64, 64, 8, 2),
            (256, True): TileConfig(64, 32, 8, 2),
        },
    },
    100: {
        _TOKEN: {
            (64, False): TileConfig(16, 64, 4, 3),
            (64, True): TileConfig(16, 32, 4, 2),
            (128, False): TileConfig(16, 64, 4, 3),
            (128, True): TileConfig(16, 64, 4, 2),
            (256, False): TileConfig(16, 32, 4, 3),
            (256, True): TileConfig(16, 32, 4, 3),
        },
        _NARROW: {
            (64, False): TileConfig(64, 64, 4, 3),
            (64, True): TileConfig(64, 32, 4, 3),
            (128, False): TileConfig(64, 64, 4, 3),
            (96, True): TileConfig(64, 64, 4, 2),
            (128, True): TileConfig(64, 64, 4, 3),
            (256, False): TileConfig(64, 64, 8, 3),
            (256, True): TileConfig(64, 64, 8, 3),
        },
        _WIDE: {
            (64, False): TileConfig(128, 64, 8, 2),
            (64, True): TileConfig(128, 32, 8, 2),
            (128, False): TileConfig(128, 64, 8, 3),
            (128, True): TileConfig(128, 32, 8, 3),
            (256, False): TileConfig(64, 64, 8, 2),
            (256, True): TileConfig(64, 64, 8, 2),
        },
    },
}


def _family(arch: int) -> int:
    """The tuned architecture whose tiles suit `arch`: by shared memory and kind of tensor core."""
    if arch >= 120 or arch in (86, 89):
        return 89  # 99 KiB of shared memory
    if arch >= 100:
        return 100
    return 90 if arch >= 90 else 80


@functools.cache
def tile_config(arch: int, head_dim: int, dtype: torch.dtype, rows: int, quantised_kv: bool = False) -> TileConfig:
    """Tile for `rows` packed query rows per program on compute capability `arch` (e.g. 90).

    At most 16 rows: decode, bound by memory. At most 64: short chunks and narrow beams. More: prefill and wide beams.
    wgmma (sm_90) needs 64 rows a warp group; 128 rows with one warp group would spill at head_dim 128.

    Raises:
        ValueError: an argument has no kernel; the message names it.
    """
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {SUPPORTED_HEAD_DIMS}, got {head_dim}")
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be one of {SUPPORTED_DTYPES}, got {dtype}")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if arch < 80:
        raise ValueError(f"arch must be 80 (sm_80) or later, got {arch}")
    if dtype == torch.float32:
        # Full-precision products do without tensor cores: for the interpreter and for checks on a card, not to serve.
        # Tiles are unrolled into multiply-adds: at head_dim 64, larger ones spill, and compile more than twice as long.
        return TileConfig(16 if rows <= _TOKEN or head_dim > 128 else 32, 32, 8, 2)
    size = _TOKEN if rows <= _TOKEN else _NARROW if rows <= _NARROW else _WIDE
    tiles = _TILES[_family(arch)][size]
    return tiles.get((head_dim, quantised_kv), tiles[padded_head_dim(head_dim), quantised_kv])


def split_tokens(arch: int) -> int:
    """Keys per split of a decode row: one constant per architecture, so that a row's result never depends on others.

    Every split costs `group` fp32 rows written and read again, a fraction of about `2 * group / split_tokens` of the
    16-bit KV bytes it read: 512 keeps that at 3 % for a group of 8 and still gives a lone 4k-token row with 8 KV heads
    64 programs. Cards with about half the multiprocessors (sm_86, sm_89: L4 has 58) need half as many programs.
    """
    return 1024 if arch in (86, 89) else 512


def wide_split_tokens(arch: int) -> int:
    """Least keys per split of a short chunk or beam group, whose tiles do up to 64 times the work per key."""
    return 2 * split_tokens(arch)


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability of a device, e.g. 90; sm_90's for the interpreter on a CPU, so that it runs those tiles."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor
    return 90
