"""Which of the two CPU backends serves: the C++ decoder where the machine can run it, else torch operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model.config import ModelConfig
from shoplm.model.eager_backend import EagerBackend
from shoplm.model.linear import packing_supported
from shoplm.model.native.backend import NativeBackend, native_refusal
from shoplm.model.native.linear import WeightFormat
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import DecoderWeights

FORMATS = {"model": WeightFormat.BF16, "int8": WeightFormat.INT8, "int4": WeightFormat.INT4}  # by name in the spec
_KV_FORMATS = ("model", "int8")

log = logging.getLogger("shoplm.engine")


def cpu_backend(
    spec: EngineSpec,
    config: ModelConfig,
    weights: DecoderWeights,
    shop: ShopWeights | None,
    tries: Sequence[NamedTrie],
    pages: int,
) -> EagerBackend:
    """The CPU backend of a spec. Raises ConfigurationError for formats that this machine cannot compute."""
    if spec.weight_format not in FORMATS:
        raise ConfigurationError(
            f"weight_format {spec.weight_format} needs backend triton; a CPU takes {', '.join(FORMATS)}"
        )
    if spec.kv_format not in _KV_FORMATS:
        raise ConfigurationError(
            f"kv_format {spec.kv_format} needs backend triton; a CPU takes {', '.join(_KV_FORMATS)}"
        )
    refusal = native_refusal(config, weights.embedding.dtype, spec.page_size)
    make: Callable[..., EagerBackend]
    if refusal is None:
        make = partial(NativeBackend, format=FORMATS[spec.weight_format], kv_format=spec.kv_format)
    elif needing := [name for name in ("weight_format", "kv_format") if getattr(spec, name) != "model"]:
        asked = ", ".join(f"{name} {getattr(spec, name)}" for name in needing)
        raise ConfigurationError(f"{asked} needs the C++ decoder: {refusal}")
    else:
        log.info("torch operations instead of the C++ decoder: %s", refusal)
        make = TorchBackend
        if weights.embedding.dtype == torch.bfloat16 and not packing_supported():
            log.info("float32 instead of bfloat16: torch has no fast products of bfloat16 on this CPU")
            weights, pages = weights.float(), max(2, pages // 2)  # the cache keeps its size in bytes
    return make(
        config,
        weights,
        shop,
        tries,
        pages=pages,
        page_size=spec.page_size,
        state_slots=spec.max_running_requests,
        max_context_tokens=spec.max_context_tokens or None,
    )
