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


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What an attention kernel is specialised on, besides its tile."""

    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    group: int  # query heads per KV head
    window: bool
    kv_heads: int = 8

    @property
    def quantised(self) -> bool:
        """Whether keys and values carry scales."""
        return self.kv_dtype in (torch.int8, torch.float8_e4m3fn)

    @property
    def variant(self) -> str:
        """The part of the cell's name that dtype and head_dim do not say."""
        parts = [f"g{self.group}", f"p{self.page_size}"]
        if self.quantised:
            parts.append(f"kv-{TRITON_TYPE_NAMES[self.kv_dtype]}")
        if self.window:
            parts.append("window")
        return "-".join(parts)

    def types(self, kernel: Any) -> dict[str, str]:
        """Signature types of the attention kernels' run-time arguments, by their common names."""
        special = {
            "q_ptr": pointer(self.dtype),
            "out_ptr": pointer(self.dtype),
            "k_ptr": pointer(self.kv_dtype),
            "v_ptr": pointer(self.kv_dtype),
            "own_slots_ptr": "*i64",
            "score_scale": "fp32",
        }
        fp32 = ("k_scale_ptr", "v_scale_ptr", "partial_ptr", "partial_lse_ptr", "lse_ptr", "mass_ptr")
        types = dict.fromkeys(fp32, "*fp32") | special
        for name in kernel.arg_names:
            if name.islower():
                types.setdefault(name, "*i32" if name.endswith("_ptr") else "i32")
        return types

    def constexprs(self, kernel: Any) -> dict[str, Any]:
        """The constants that follow from the shape alone."""
        values: dict[str, Any] = {
            "GROUP": self.group,
            "GROUP_PADDED": 1 << (self.group - 1).bit_length(),
            "KV_HEADS": self.kv_heads,
            "PAGE_SIZE": self.page_size,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_PADDED": 1 << (self.head_dim - 1).bit_length(),
            "HAS_WINDOW": self.window,
            "QUANTISED": self.quantised,
        }
        if not self.quantised:
            values |= {"k_scale_ptr": None, "v_scale_ptr": None}
        return {name: value for name, value in values.items() if name in kernel.arg_names}

    def cell(
        self,
        op: str,
        kernel: Any,
        constexprs: Mapping[str, Any],
        *,
        arch: int,
        num_warps: int,
        num_stages: int,
        expect_wgmma: bool,
        label: str = "",
    ) -> AotCell:
        """The cell of one kernel at this shape. Every pointer that the launcher specialises is 16-byte aligned."""
        constants = self.constexprs(kernel) | dict(constexprs)
        bulk = ("q_ptr", "k_ptr", "v_ptr", "k_scale_ptr", "v_scale_ptr", "out_ptr", "partial_ptr", "partial_lse_ptr")
        return make_cell(
            op,
            kernel,
            self.types(kernel),
            constants,
            aligned=tuple(name for name in bulk if name in kernel.arg_names and name not in constants),
            num_warps=num_warps,
            num_stages=num_stages,
            arch=arch,
            head_dim=self.head_dim,
            dtype=self.dtype,
            expect_wgmma=expect_wgmma,
            variant=f"{label}-{self.variant}" if label else self.variant,
        )


def attention_shapes(arch: int, *, full: bool) -> list[AttentionShape]:
    """Shapes to compile on `arch`: a few that between them touch every feature, or the whole matrix."""
    half = torch.bfloat16
    fp8 = [torch.float8_e4m3fn] if arch >= 89 else []
    if full:
        return [
            AttentionShape(head_dim, half, kv_dtype, page_size, 7, window)
            for head_dim in (64, 96, 128, 256)
            for kv_dtype in (half, torch.int8, *fp8)
            for page_size in (16, 64)
            for window in (False, True)
        ]
    return [
        AttentionShape(128, half, half, 64, 4, False),
        AttentionShape(64, torch.float16, torch.float16, 16, 3, False),
        AttentionShape(128, half, fp8[0] if fp8 else torch.int8, 16, 8, False),
        AttentionShape(256, half, half, 32, 7, True),
    ]
