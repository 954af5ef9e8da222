"""Which of the two CPU backends serves: C++ on AMX tiles where the machine has them, else torch operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model.amx.backend import AmxBackend, amx_refusal
from shoplm.model.amx.linear import WeightFormat
from shoplm.model.config import ModelConfig
from shoplm.model.eager_backend import EagerBackend
from shoplm.model.shop_weights import NamedTrie, ShopWeights
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import DecoderWeights

FORMATS = {"model": WeightFormat.BF16, "int8": WeightFormat.INT8, "int4": WeightFormat.INT4}  # by name in the spec

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
    refusal = amx_refusal(config, weights.embedding.dtype, spec.page_size)
    make: Callable[..., EagerBackend]
    if refusal is None:
        make = partial(AmxBackend, format=FORMATS[spec.weight_format])
    elif spec.weight_format != "model":
        raise ConfigurationError(f"weight_format {spec.weight_format} needs AMX: {refusal}")
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
