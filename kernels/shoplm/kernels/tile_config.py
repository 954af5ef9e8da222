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
    padded = padded_head_dim(head_dim)
    large_shared = arch in (80, 87, 90, 100, 103)
    if dtype == torch.float32:
        # Twice the bytes and no fast tensor-core path: correctness only.
        return TileConfig(16 if rows <= 16 else 32, 32, 4, 2)
    if rows <= 16:
        if padded == 256:
            return TileConfig(16, 32, 4, 3 if large_shared else 2)
        return TileConfig(16, 64, 4, 3 if large_shared or padded == 64 else 2)
    if rows <= 64:
        if padded == 256:
            return TileConfig(64, 32, 8 if arch < 90 else 4, 2)
        return TileConfig(64, 64, 4, 3 if large_shared else 2)
    if padded == 256:
        return TileConfig(128, 64, 8, 2) if large_shared else TileConfig(64, 32, 4, 2)
    return TileConfig(128, 64, 8, 3 if large_shared else 2)


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
