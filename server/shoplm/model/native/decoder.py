"""The decoder's weights as the C++ code takes them, and one step's arguments."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import Batch, Row
from shoplm.model.attention_plan import own_slots
from shoplm.model.config import ModelConfig
from shoplm.model.native.library import LayerRef, ModelRef, NativeLibrary, StepRef, pointer
from shoplm.model.native.linear import MULTIPLE, PackedLinear, WeightFormat
from shoplm.model.native.pool import NativePool
from shoplm.model.rope import rope_tables
from shoplm.model.weights import DecoderWeights, LayerWeights
from torch import Tensor

_HEAD_DIMS = range(32, 257, 32)


def unsupported(config: ModelConfig, page_size: int) -> str | None:
    """Why this model's sizes do not fit the C++ decoder; None: they do."""
    for name, size in (
        ("hidden size", config.hidden_size),
        ("intermediate size", config.intermediate_size),
        ("attention width", config.num_heads * config.head_dim),
    ):
        if size % MULTIPLE:
            return f"{name} {size} is not a multiple of {MULTIPLE}"
    if config.head_dim not in _HEAD_DIMS:
        return f"head_dim {config.head_dim} is not a multiple of 32 up to 256"
    if page_size < 1 or page_size % 16:
        return f"page_size {page_size} is not a multiple of 16"
    return None


class _Layer:
    """Keeps the memory alive that `ref` points to."""

    def __init__(
        self,
        library: NativeLibrary,
        weights: LayerWeights,
        window: int | None,
        uses_rope: bool,
        format: WeightFormat,
    ) -> None:
        paths = dict(weights.paths)
        if "gate_up" in paths:
            paths["gate_up"] = replace(paths["gate_up"], up=_interleaved(paths["gate_up"].up))
        products = {
            "qkv": (weights.qkv, weights.qkv_bias),
            "output": (weights.output, weights.output_bias),
            "gate_up": (_interleaved(weights.gate_up), None),
            "down": (weights.down, None),
        }
        self.linears = tuple(
            PackedLinear(library, weight, bias, format=format, path=paths.get(name))
            for name, (weight, bias) in products.items()
        )
        norms = (weights.input_norm, weights.mlp_norm, weights.query_norm, weights.key_norm)
        self._norms = tuple(None if norm is None else norm.float().contiguous() for norm in norms)
        self.ref = LayerRef(
            *(linear.ref for linear in self.linears), *map(pointer, self._norms), window or 0, int(uses_rope)
        )


def _interleaved(rows: Tensor) -> Tensor:
    """Interleave the rows of gate and up [2 I, in]: 16 of gate, then 16 of up, so that one panel holds both factors."""
    parts = rows.view(2, -1, 16, rows.shape[1])
    return parts.transpose(0, 1).reshape(rows.shape)


class NativeDecoder:
    """Weights and position tables of one model, and its keys and values."""

    def __init__(
        self,
        library: NativeLibrary,
        config: ModelConfig,
        weights: DecoderWeights,
        shop_rows: Tensor | None,
        max_positions: int,
        pool: NativePool,
        *,
        format: WeightFormat = WeightFormat.BF16,
    ) -> None:
        """`shop_rows` [shop tokens, H] are the input embeddings behind the text vocabulary."""
        self.config = config
        self.pool = pool
        self._library = library
        table = weights.embedding.to(torch.bfloat16)
        self._embedding = table if shop_rows is None else torch.cat((table, shop_rows.to(torch.bfloat16)))
        self._final_norm = weights.final_norm.float()
        per_layer = zip(weights.layers, config.sliding_windows, config.uses_rope, strict=True)
        self._layers = [_Layer(library, layer, window, rope, format) for layer, window, rope in per_layer]
        self._refs = (LayerRef * len(self._layers))(*(layer.ref for layer in self._layers))
        cosine, sine = rope_tables(config.rope, config.head_dim, max_positions)
        self._cosine, self._sine = cosine.contiguous(), sine.contiguous()
        products = [linear.ref for layer in self._layers for linear in layer.linears]
        self._model = ModelRef(
            ctypes.cast(self._refs, ctypes.c_void_p),
            pointer(self._embedding),
            pointer(self._final_norm),
            pointer(self._cosine),
            pointer(self._sine),
            pointer(pool.keys),
            pointer(pool.values),
            pointer(pool.key_scales),
            pointer(pool.value_scales),
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            pool.page_size,
            pool.keys[0].numel(),
            max(product.k for product in products),
            max(product.rank for product in products),
            config.rms_norm_eps,
            1.0 / math.sqrt(config.head_dim),
        )

    @property
    def vocab_size(self) -> int:
        """Text rows and the shop's."""
        return len(self._embedding)

    def forward(
        self,
        batch: Batch,
        tokens: NDArray[np.int64],
        outputs: NDArray[np.int64],
        lineages: Mapping[int, NDArray[np.int64]],
    ) -> Tensor:
        """Run the step: writes the tokens' keys and values, returns hidden states bf16 [R, H] after the final norm.

        `tokens` [T]; `outputs` [R], ascending, are the tokens whose hidden states are read; `lineages` as in
        `plan_attention`.
        """
        rows, pages, own, masks = _row_table(batch.rows, lineages, self.config.query_group)
        positions, slots = batch.positions.astype(np.int64), batch.slots.astype(np.int64)
        result = torch.empty(len(outputs), self.config.hidden_size, dtype=torch.bfloat16)
        step = StepRef(
            *(array.ctypes.data for array in (tokens, positions, slots, rows, pages, own, masks, outputs)),
            pointer(result),
            len(tokens),
            len(rows),
            len(outputs),
            torch.get_num_threads(),
        )
        self._library.functions.shoplm_step(ctypes.byref(self._model), ctypes.byref(step))
        return result


def _row_table(
    rows: Sequence[Row], lineages: Mapping[int, NDArray[np.int64]], group: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint16]]:
    """`shoplm::Row` for each row [rows, 10], and the lists of all pages, of the lanes' own slots and of the masks.

    `group` is query heads per key-value head."""
    table = np.zeros((len(rows), 10), np.int64)
    pages: list[NDArray[np.int32]] = []
    own: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    masks: list[NDArray[np.uint16]] = [np.zeros(0, np.uint16)]
    page_count = own_count = mask_count = 0
    for entry, row in zip(table, rows, strict=True):
        steps, past = 0, row.kv_len - row.query_len
        if row.beam is not None:
            slots = own_slots(row, lineages[row.state_slot])
            steps, past = row.beam.step, row.kv_len + row.beam.step - 1
            own.append(slots.reshape(-1))
        entry[:8] = (
            row.query_start, row.query_len, row.kv_len, past, row.beam is not None, page_count, own_count, steps
        )  # fmt: skip
        pages.append(row.pages)
        page_count += len(row.pages)
        own_count += len(own[-1]) if row.beam is not None else 0
        if row.hidden is not None:
            entry[8:] = True, mask_count
            masks.append(_bits(row.hidden, group))
            mask_count += len(masks[-1])
    return table, np.concatenate(pages).astype(np.int64), np.concatenate(own), np.concatenate(masks)


def _bits(hidden: NDArray[np.bool_], group: int) -> NDArray[np.uint16]:
    """Pack a mask [tokens, keys] into [blocks of 16 queries, keys], flat; bit i is a block's query i, tokens times
    group."""
    queries = np.repeat(hidden, group, axis=0)
    blocks = np.zeros((-(-len(queries) // 16) * 16, hidden.shape[1]), np.bool_)
    blocks[: len(queries)] = queries
    octets = np.packbits(blocks.reshape(-1, 16, hidden.shape[1]), axis=1, bitorder="little").astype(np.uint16)
    return (octets[:, 0] + np.uint16(256) * octets[:, 1]).ravel()
