"""The backend for NVIDIA GPUs: attention, norms, RoPE and SwiGLU by the Triton kernels, products by cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from shoplm.batch import Batch
from shoplm.errors import ConfigurationError
from shoplm.kernels.attention import MAX_GROUP
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.tile_config import SUPPORTED_DTYPES, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES
from shoplm.kernels.workspace import Workspace
from shoplm.model.backend import Handle
from shoplm.model.config import ModelConfig
from shoplm.model.device_readouts import DeviceReadouts
from shoplm.model.eager_backend import LocalBackend
from shoplm.model.gpu import (
    check_device,
    check_fp8,
    free_memory,
    kv_dtype,
    kv_page_bytes,
    memory_for,
    pages_that_fit,
    product_rate,
)
from shoplm.model.queued import Queued, StepClock
from shoplm.model.readouts import Readouts
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.step_graphs import GraphLimits, StepGraphs, graph_buckets, paying_tokens
from shoplm.model.triton_decoder import TritonDecoder
from shoplm.model.triton_program import StepProgram
from shoplm.model.triton_step import KernelStep, StepBounds, fork_rows, plan_step, query_lens
from shoplm.model.weights import DecoderWeights


class TritonBackend(LocalBackend):
    """Queues each step within `submit` and returns; `result` waits. Two steps may be in flight: the second reads the
    tokens and beams of the first where its kernels leave them, so the host plans while the GPU computes."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        shop: ShopWeights | None = None,
        tries: Sequence[NamedTrie] = (),
        *,
        pages: int | None,
        page_size: int = 16,
        state_slots: int = 256,
        max_context_tokens: int | None = None,
        max_step_tokens: int = 2048,
        max_mixed_prompt_tokens: int = 0,
        weight_format: str = "model",
        kv_format: str = "model",
        graph_seconds: float = 0.0,
        device: torch.device | str = "cuda",
    ) -> None:
        """The dtype is that of the weights: bf16, fp16 or fp32. `tries` are more catalogues: their tokens follow the
        shop's. `pages` None: as many as the GPU has room for. `max_step_tokens` bounds the lanes of one step, all
        selections together. It and `max_mixed_prompt_tokens`, of prompts beside answers, are the scheduler's bounds: up
        to them, and as far as `paying_tokens`, graphs with long chunks of prompts are captured (0: none beside
        answers). `weight_format` of the layers' products: see `gpu_linear`. `kv_format`: what the pool keeps, "model"
        (the weights' dtype), "int8" or "fp8". `graph_seconds` is the time for capturing steps as CUDA graphs; 0: none.

        Allocates weights, pool and scratch on `device`: a GPU, or "cpu" where Triton interprets (TRITON_INTERPRET=1).
        Raises ConfigurationError, also where the memory does not suffice.
        """
        self._device = torch.device(device)
        check_device(self._device)
        dtype = weights.embedding.dtype
        _check_supported(config, dtype, page_size)
        check_fp8("weight_format", weight_format, self._device)
        pool_dtype = kv_dtype(kv_format, dtype, self._device)
        positions = config.context_tokens(max_context_tokens)
        self._max_step_tokens = max_step_tokens
        readouts = Readouts(
            shop, tries, text_tokens=len(weights.embedding), hidden_size=config.hidden_size, state_slots=state_slots
        )
        with memory_for("scratch memory", "lower max_running_requests, max_context_tokens or max_step_tokens"):
            workspace = Workspace.allocate(
                device=self._device,
                max_rows=state_slots,
                max_kv_len=positions,
                max_beam_tokens=max_step_tokens,
                q_heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
        with memory_for("the weights", "take a smaller base model, or a weight_format of fewer bits"):
            decoder = TritonDecoder(
                config,
                weights,
                readouts.take_input_rows(dtype),
                max_positions=positions + readouts.beam_steps,
                workspace=workspace,
                device=self._device,
                weight_format=weight_format,
            )
        with memory_for("the searches' state", "lower max_running_requests or max_step_tokens"):
            self._device_readouts = DeviceReadouts(
                readouts, state_slots=state_slots, max_lanes=max_step_tokens, dtype=dtype, device=self._device
            )
        if pages is None:
            page_bytes = kv_page_bytes(config, page_size, pool_dtype)
            pages = pages_that_fit(*free_memory(self._device), page_bytes)
        with memory_for(f"{pages} pages of {page_size} tokens", "lower kv_cache_mib, or take kv_format int8"):
            self._pool = _allocate_pool(config, pages, page_size, pool_dtype, self._device)
        super().__init__(
            "triton",
            readouts,
            pages=pages,
            page_size=page_size,
            state_slots=state_slots,
            max_context_tokens=positions,
            vocab_size=decoder.vocab_size,
            pipeline_depth=2,
        )
        state = self._device_readouts.state
        with memory_for("the logits of a step", "lower kv_cache_mib or max_running_requests"):
            self._program = StepProgram(decoder, self._pool, state, most_samples=state_slots)
        self._graphs = StepGraphs(self._program, state)
        if graph_seconds > 0:
            paying = paying_tokens(config.layer_parameters, product_rate(self._device))
            limits = GraphLimits(
                rows=state_slots,
                kv_len=positions,
                page_size=page_size,
                query_group=config.query_group,
                steps=state.parents.shape[1],
                max_step_tokens=min(max_step_tokens, paying),
                max_mixed_prompt_tokens=max_mixed_prompt_tokens,
            )
            with torch.inference_mode():
                self._graphs.capture(graph_buckets(limits), graph_seconds)

    @property
    def pool(self) -> tuple[PagedKv, ...]:
        """Keys and values by layer; tests fill unused pages to see that they are never read."""
        return self._pool

    @property
    def graphs(self) -> StepGraphs:
        """The captured steps."""
        return self._graphs

    def _start(self, batch: Batch) -> Handle:
        clock = StepClock(self._device)
        need = StepBounds.of(batch)
        if need.lane_tokens > self._max_step_tokens:
            raise ValueError(f"the step has {need.lane_tokens} lanes, but max_step_tokens is {self._max_step_tokens}")
        forks = fork_rows(batch, self._device)
        outputs = None if forks is not None else self._graphs.run(batch, need)
        if outputs is None:
            state = self._device_readouts.state
            step = KernelStep.upload(plan_step(batch, need, state), need, self._device)
            outputs = self._program(replace(step, query_lens=query_lens(batch), forks=forks))
        answers = self._device_readouts.read(batch, outputs.hidden, outputs.tokens)
        clock.stop()
        return Queued(answers, clock)


def _check_supported(config: ModelConfig, dtype: torch.dtype, page_size: int) -> None:
    """Name what the kernels do not take, before anything is allocated."""
    if dtype not in SUPPORTED_DTYPES:
        raise ConfigurationError(f"dtype {dtype} is not supported by the triton backend: use bfloat16")
    if page_size not in SUPPORTED_PAGE_SIZES:
        raise ConfigurationError(f"page_size {page_size} is not one of {SUPPORTED_PAGE_SIZES}, which the kernels take")
    if config.head_dim not in SUPPORTED_HEAD_DIMS:
        raise ConfigurationError(
            f"the base's head_dim {config.head_dim} is not one of {SUPPORTED_HEAD_DIMS}, which the kernels take"
        )
    if config.query_group > MAX_GROUP:
        raise ConfigurationError(f"the base has {config.query_group} query heads per KV head, at most {MAX_GROUP} work")


def _allocate_pool(
    config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[PagedKv, ...]:
    """One pool [pages, kv_heads, page_size, head_dim] per layer."""
    if pages < 1:
        raise ConfigurationError(f"pages is {pages}, expected at least 1")
    shape = (config.num_layers, pages, config.num_kv_heads, page_size, config.head_dim)
    keys = torch.zeros(shape, dtype=dtype, device=device)
    values = torch.zeros(shape, dtype=dtype, device=device)
    if dtype.itemsize > 1:
        return tuple(PagedKv(k, v) for k, v in zip(keys, values, strict=True))
    scales = torch.zeros(2, *shape[:-1], dtype=torch.float32, device=device)
    return tuple(PagedKv(*layer) for layer in zip(keys, values, *scales, strict=True))
