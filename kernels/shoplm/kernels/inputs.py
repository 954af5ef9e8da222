"""What the attention ops read: the paged pool of one layer, the rows of a batch, groups of beams, and forks.

Each type validates its tensors once, when it is made: `PagedKv` when the pool is allocated, the others once per step
for all layers. Nothing here reads a device value, so nothing waits for the device. No Triton is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.kernels._checks import check_tensor
from shoplm.kernels.tile_config import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES

QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32, *QUANTISED_DTYPES)

COUNTER = (torch.int32,)
WORD_BITS = 32


def check_aligned(name: str, tensor: torch.Tensor) -> None:
    """Raise `ValueError` unless the tensor starts at a multiple of 16 bytes, which the vector loads assume.

    A pointer that is aligned only sometimes would also compile the kernel a second time, in the middle of a step.
    """
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}, expected a multiple of 16 bytes")


@dataclass(frozen=True, slots=True)
class PagedKv:
    """One layer's KV pool. Slot `page * page_size + offset` of head h is element [page, h, offset].

    Raises:
        ValueError, TypeError: a shape, dtype, device or scale is wrong; the message names the field and its value.
    """

    k: torch.Tensor  # [num_pages, kv_heads, page_size, head_dim], fp16 | bf16 | fp32 | int8 | float8_e4m3fn
    v: torch.Tensor  # as k
    k_scale: torch.Tensor | None = None  # [num_pages, kv_heads, page_size] fp32 | fp16: value = stored * scale
    v_scale: torch.Tensor | None = None  # as k_scale; both with int8 and float8, neither otherwise

    def __post_init__(self) -> None:
        device = self.k.device
        check_tensor("k", self.k, (None, None, None, None), KV_DTYPES, device, contiguous=True)
        check_tensor("v", self.v, self.k.shape, (self.k.dtype,), device, contiguous=True)
        check_aligned("k", self.k)
        check_aligned("v", self.v)
        if self.page_size not in SUPPORTED_PAGE_SIZES:
            raise ValueError(f"page_size (k.shape[2]) must be one of {SUPPORTED_PAGE_SIZES}, got {self.page_size}")
        if self.head_dim not in SUPPORTED_HEAD_DIMS:
            raise ValueError(f"head_dim (k.shape[3]) must be one of {SUPPORTED_HEAD_DIMS}, got {self.head_dim}")
        pool_rows = self.k.numel() // self.head_dim
        if pool_rows >= 2**31:
            raise ValueError(f"k has {pool_rows} (token, head) rows; kernels index fewer than 2**31, split the pool")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if (scale is not None) != self.quantised:
                raise ValueError(f"{name} must be given for, and only for, {QUANTISED_DTYPES}; k is {self.k.dtype}")
            if scale is not None:
                check_tensor(name, scale, self.k.shape[:3], (torch.float32, torch.float16), device, contiguous=True)
                check_aligned(name, scale)

    @property
    def quantised(self) -> bool:
        """Whether the pool holds int8 or float8 values with scales."""
        return self.k.dtype in QUANTISED_DTYPES

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.k.shape[3]


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """The rows of one step: chunks of prompts and single decode tokens in any mix. One per step, for all layers.

    Row r's new tokens are `query_start[r] .. query_start[r + 1] - 1` of the flat batch and sit at the end of its
    `kv_len[r]` tokens. A row with no new tokens computes nothing. The `max_*` bounds pick grids only and must hold for
    every row: they are not checked against the device's values. Nor are `query_lens`, which leave out launches.

    Raises:
        ValueError, TypeError: a shape, dtype, device or bound is wrong; the message names the field and its value.
    """

    page_table: torch.Tensor  # int32 [rows, max_pages]; entries past a row's length are never read
    kv_len: torch.Tensor  # int32 [rows], tokens readable through pages, new ones included
    query_start: torch.Tensor  # int32 [rows + 1], prefix sums of new tokens, from 0 or any later token
    max_query_len: int  # upper bound of a row's new tokens
    max_kv_len: int  # upper bound of kv_len
    query_lens: frozenset[int] | None = None  # the rows' numbers of new tokens, in any order; None: up to max_query_len

    def __post_init__(self) -> None:
        device = self.page_table.device
        check_tensor("page_table", self.page_table, (None, None), COUNTER, device, contiguous=True)
        check_tensor("kv_len", self.kv_len, (self.rows,), COUNTER, device)
        check_tensor("query_start", self.query_start, (self.rows + 1,), COUNTER, device)
        for name, value in (("max_query_len", self.max_query_len), ("max_kv_len", self.max_kv_len)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.query_lens and max(self.query_lens) > self.max_query_len:
            raise ValueError(f"query_lens go up to {max(self.query_lens)}, but max_query_len is {self.max_query_len}")

    def may_have(self, least: int, most: int) -> bool:
        """Whether a row may have `least` to `most` new tokens."""
        if self.query_lens is None:
            return least <= min(most, self.max_query_len)
        return any(least <= length <= most for length in self.query_lens)

    @property
    def rows(self) -> int:
        """Number of rows, padding rows of a captured graph included."""
        return self.page_table.shape[0]


@dataclass(frozen=True, slots=True)
class BeamGroups:
    """Beams of several requests at one search step each. One per step, for all layers.

    Group g has `width[g]` beams, at tokens `query_start[g] + b` of the flat batch and all at position
    `prompt_len[g] + step[g]`. They share the prompt's pages. A beam's own tokens stay in the slots where they were
    written: beam b at step s came from beam `parents[g, s, b]` at step s - 1, so ancestors are found by walking up.

    Raises:
        ValueError, TypeError: a shape, dtype, device or bound is wrong; the message names the field and its value.
    """

    page_table: torch.Tensor  # int32 [groups, max_pages], the prompt's pages
    prompt_len: torch.Tensor  # int32 [groups]
    query_start: torch.Tensor  # int32 [groups + 1], non-decreasing; width[g] <= query_start[g + 1] - query_start[g]
    width: torch.Tensor  # int32 [groups]; 0 for a padding group
    step: torch.Tensor  # int32 [groups], own tokens before this step's; < max_steps
    own_slots: torch.Tensor  # int64 [groups, max_steps, max_width], pool slot of (step, beam)
    parents: torch.Tensor  # int32 [groups, max_steps, max_width]; the first step's entries are not read
    max_prompt_len: int  # upper bound of prompt_len

    def __post_init__(self) -> None:
        device = self.page_table.device
        check_tensor("page_table", self.page_table, (None, None), COUNTER, device, contiguous=True)
        for name, tensor in (("prompt_len", self.prompt_len), ("width", self.width), ("step", self.step)):
            check_tensor(name, tensor, (self.groups,), COUNTER, device)
        check_tensor("query_start", self.query_start, (self.groups + 1,), COUNTER, device)
        check_tensor("own_slots", self.own_slots, (self.groups, None, None), (torch.int64,), device, contiguous=True)
        check_tensor("parents", self.parents, self.own_slots.shape, COUNTER, device, contiguous=True)
        if self.max_prompt_len < 0:
            raise ValueError(f"max_prompt_len must not be negative, got {self.max_prompt_len}")

    @property
    def groups(self) -> int:
        """Number of groups, padding groups of a captured graph included."""
        return self.page_table.shape[0]

    @property
    def max_steps(self) -> int:
        """Most steps a beam may take."""
        return self.own_slots.shape[1]

    @property
    def max_width(self) -> int:
        """Most beams of a group."""
        return self.own_slots.shape[2]


@dataclass(frozen=True, slots=True)
class ForkRows:
    """The prompts of one step that have forks. One per step, for all layers.

    Row r's new tokens are `first_token[r] .. first_token[r] + new_tokens[r] - 1` of the flat batch. Bit `j % 32` of
    `readable[r, i, j // 32]` says whether its new token i reads the key at place j of its pages, which must not be
    behind the token's own.

    Raises:
        ValueError, TypeError: a shape, dtype, device or bound is wrong; the message names the field and its value.
    """

    page_table: torch.Tensor  # int32 [rows, max_pages]; entries past a row's length are never read
    kv_len: torch.Tensor  # int32 [rows], keys in the pages, those of the new tokens included
    first_token: torch.Tensor  # int32 [rows]
    new_tokens: torch.Tensor  # int32 [rows]
    position: torch.Tensor  # int32 [rows, max_new_tokens]: a window goes by it, not by where a token is kept
    readable: torch.Tensor  # int32 [rows, max_new_tokens, words]

    def __post_init__(self) -> None:
        device = self.page_table.device
        check_tensor("page_table", self.page_table, (None, None), COUNTER, device, contiguous=True)
        for name in ("kv_len", "first_token", "new_tokens"):
            check_tensor(name, getattr(self, name), (self.rows,), COUNTER, device)
        check_tensor("position", self.position, (self.rows, None), COUNTER, device, contiguous=True)
        check_tensor("readable", self.readable, (*self.position.shape, None), COUNTER, device, contiguous=True)

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return self.page_table.shape[0]

    @property
    def max_new_tokens(self) -> int:
        """Upper bound of a row's new tokens."""
        return self.position.shape[1]


def packed_bits(readable: NDArray[np.bool_], words: int) -> NDArray[np.int32]:
    """What tokens read, [tokens, keys], as `ForkRows` has it: [tokens, words], 0 behind the keys."""
    bits = np.packbits(readable, axis=1, bitorder="little")
    packed = np.zeros((len(readable), words), np.int32)
    packed.view(np.uint8)[:, : bits.shape[1]] = bits
    return packed
