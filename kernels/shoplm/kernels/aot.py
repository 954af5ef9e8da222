"""Ahead-of-time compile cells: what the budget table compiles for each kernel, without a GPU.

Every op file has `aot_cells(arch)`, which returns representative `AotCell`s: the kernel with the exact signature,
constants and alignment facts that its launcher would pass on that architecture. A cell that drifts from the launcher
would measure a kernel that never runs, so both are built from the same `tile_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRITON_TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


def pointer(dtype: torch.dtype) -> str:
    """Triton's signature string of a pointer to `dtype`, e.g. `*bf16`."""
    return "*" + TRITON_TYPE_NAMES[dtype]


@dataclass(frozen=True)
class AotCell:
    """One kernel specialisation to compile ahead of time. Built by an op's `aot_cells(arch)`."""

    op: str  # the op's (and its file's) name
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # every argument in order -> Triton type; "constexpr" for constants
    constexprs: Mapping[str, Any]  # value of each "constexpr" argument (None for an absent tensor)
    attrs: tuple[str, ...]  # arguments known to be divisible by 16 (pointers: 16-byte aligned)
    num_warps: int
    num_stages: int
    arch: int  # compute capability, e.g. 90
    head_dim: int  # 0 where the op has none
    dtype: torch.dtype  # of the activations
    expect_wgmma: bool  # the PTX must contain asynchronous warp-group products
    variant: str = ""  # what tells apart cells of one op, e.g. "int8 kv, window"

    def __post_init__(self) -> None:
        names = list(self.kernel.arg_names)
        if list(self.signature) != names:
            raise ValueError(f"{self.op}: signature names {list(self.signature)} differ from the kernel's {names}")
        constants = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constants != set(self.constexprs):
            raise ValueError(f"{self.op}: constexprs {sorted(self.constexprs)} differ from {sorted(constants)}")
        unknown = set(self.attrs) - set(names)
        if unknown:
            raise ValueError(f"{self.op}: attrs name unknown arguments {sorted(unknown)}")

    @property
    def name(self) -> str:
        """Stable row name in the budget table, e.g. `prefill/_prefill_kernel/sm90/bf16/d128/int8-kv`."""
        parts = [self.op, str(self.kernel.__name__), f"sm{self.arch}", TRITON_TYPE_NAMES[self.dtype]]
        if self.head_dim:
            parts.append(f"d{self.head_dim}")
        if self.variant:
            parts.append(self.variant)
        return "/".join(parts)

    def divisibility(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """`attrs` in the form that `triton.compiler.ASTSource(attrs=...)` takes."""
        names = list(self.signature)
        return {(names.index(name),): [["tt.divisibility", 16]] for name in self.attrs}


def make_cell(
    op: str,
    kernel: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    aligned: tuple[str, ...],
    num_warps: int,
    num_stages: int,
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    expect_wgmma: bool,
    variant: str = "",
) -> AotCell:
    """Build a cell from the types of the non-constant arguments and the constants, in any order."""
    signature = {name: "constexpr" if name in constexprs else types[name] for name in kernel.arg_names}
    return AotCell(
        op, kernel, signature, constexprs, aligned, num_warps, num_stages, arch, head_dim, dtype, expect_wgmma, variant
    )
