"""Everything that an engine needs to start, as plain data, so that it can cross to another process."""

from __future__ import annotations

import msgspec
from shoplm.scheduler.config import SchedulingPolicy


class SyntheticTrie(msgspec.Struct, frozen=True):
    """A catalogue of random codes and rows: for benchmarks and debugging of the search."""

    name: str
    items: int
    level_sizes: tuple[int, ...]
    seed: int = 0


class EngineSpec(msgspec.Struct, frozen=True):
    """One engine: a base model, perhaps a bundle, and bounds."""

    base_folder: str
    bundle_folder: str | None = None
    adapter_folder: str | None = None  # of the base; None: the bundle's, if it has one
    adapter_mode: str = "auto"  # merged, apart, or auto: apart where weights are int4
    backend: str = "torch"  # or triton
    dtype: str = "bfloat16"  # or float32
    threads: int = 0  # 0: one per core
    weight_format: str = "model"  # of the layers' products: auto, model, int8, int4 or fp8
    kv_format: str = "model"  # of keys and values: model, int8 or fp8
    graph_seconds: float = 30.0  # triton only: time for capturing steps as CUDA graphs; 0: none
    kv_cache_bytes: int = 1 << 30  # 0, triton only: what the GPU has free
    page_size: int = 16  # tokens
    max_context_tokens: int = 0  # 0: the base model's
    max_step_tokens: int = 512
    max_mixed_prompt_tokens: int = 128
    max_draft_tokens: int = 7  # not triton; 0: none
    max_running_requests: int = 256
    max_queued_requests: int = 2048
    max_queued_tokens: int = 1_000_000
    policy: SchedulingPolicy = msgspec.field(default_factory=SchedulingPolicy)
    synthetic_tries: tuple[SyntheticTrie, ...] = ()
    log_format: str = "text"  # or json
    log_level: str = "info"
    bundle_hash: str | None = None  # SHA-256 of the bundle's shop.toml, which holds those of its other files; None: any
