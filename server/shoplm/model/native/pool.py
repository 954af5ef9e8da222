"""Keys and values in pages, in the order in which the C++ decoder reads them."""

from __future__ import annotations

import torch
from shoplm.errors import ConfigurationError
from shoplm.model.config import ModelConfig
from shoplm.model.kv_pool import KV_FORMATS, copy_pages
from shoplm.model.native.library import InstructionSet
from torch import Tensor

BLOCK = 16  # tokens whose numbers of one dimension lie together


class NativePool:
    """Keys and values, in bf16 or in int8 with a scale per token and head [layers, pages, kv_heads, page_size].

    Of keys and values, one lies by token [layers, pages, kv_heads, page_size, head_dim], the other in blocks [layers,
    pages, kv_heads, page_size / 16, head_dim, 16]: tiles want the values so, vectors the keys. Dot products of pairs
    want the keys in blocks of pairs of dimensions [.., head_dim / 2, 16, 2], the values in pairs of tokens [..,
    page_size / 2, head_dim, 2]. What unused slots hold never matters."""

    def __init__(
        self,
        instructions: InstructionSet,
        config: ModelConfig,
        *,
        pages: int,
        page_size: int,
        kv_format: str = "model",
    ) -> None:
        """`kv_format`: model (bf16) or int8."""
        if pages < 1:
            raise ValueError(f"pages is {pages}, expected at least 1")
        if page_size % BLOCK:
            raise ConfigurationError(f"page_size {page_size} is not a multiple of {BLOCK}")
        self.page_size = page_size
        # Not zeroed: memory that no page has used yet is not occupied either.
        head_dim = config.head_dim
        by_token: tuple[int, ...] = (page_size, head_dim)
        in_blocks: tuple[int, ...] = (page_size // BLOCK, head_dim, BLOCK)
        match instructions:
            case InstructionSet.AMX:
                shapes = by_token, in_blocks
            case InstructionSet.AVX512:
                shapes = (page_size // BLOCK, head_dim // 2, BLOCK, 2), (page_size // 2, head_dim, 2)
            case InstructionSet.AVX2:
                shapes = in_blocks, by_token
        dtype = KV_FORMATS[kv_format] or torch.bfloat16
        heads = (config.num_layers, pages, config.num_kv_heads)
        self.keys, self.values = (torch.empty(*heads, *shape, dtype=dtype) for shape in shapes)
        self.key_scales, self.value_scales = (
            torch.empty(*heads, page_size) if dtype is torch.int8 else None for _ in shapes
        )

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages, `sources` [C] to `targets` [C]; none is both."""
        for part in (self.keys, self.values, self.key_scales, self.value_scales):
            if part is not None:
                copy_pages(part, sources, targets)
