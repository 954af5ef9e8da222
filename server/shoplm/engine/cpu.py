"""Which of the two CPU backends serves: C++ on AMX tiles where the machine has them, else torch operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model.amx.backend import AmxBackend, amx_refusal
from shoplm.model.config import ModelConfig
from shoplm.model.eager_backend import EagerBackend
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import DecoderWeights

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
    if spec.weight_format not in ("model", "int8"):
        raise ConfigurationError(f"weight_format {spec.weight_format} needs backend triton; a CPU takes model or int8")
    refusal = amx_refusal(config, weights.embedding.dtype, spec.page_size)
    int8 = spec.weight_format == "int8"
    make: Callable[..., EagerBackend]
    if refusal is None:
        make = partial(AmxBackend, int8=int8)
    elif int8:
        raise ConfigurationError(f"weight_format int8 needs AMX: {refusal}")
    else:
        log.info("torch operations instead of the C++ decoder: %s", refusal)
        make = TorchBackend
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
