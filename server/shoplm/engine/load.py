"""From a spec to a backend: reads the base model and the bundle. Imports torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import torch
from shoplm.bundle import manifest_hash, read_manifest
from shoplm.engine.cpu import cpu_backend
from shoplm.engine.gpu_warmup import warm_up
from shoplm.engine.shop_texts import ShopTexts, read_shop_texts
from shoplm.engine.spec import EngineSpec
from shoplm.errors import BundleChangedError, BundleError, ConfigurationError
from shoplm.model.adapter import Adapter, keeps_apart, read_adapter
from shoplm.model.backend import Backend
from shoplm.model.config import ModelConfig
from shoplm.model.gpu import check_device, kv_page_bytes
from shoplm.model.kv_pool import KV_FORMATS
from shoplm.model.native.backend import native_refusal
from shoplm.model.shop_weights import ShopWeights, load_shop_weights, random_trie
from shoplm.model.weights import DecoderWeights, load_weights
from shoplm.vocabulary import ShopVocabulary

BACKENDS = ("torch", "triton")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

log = logging.getLogger("shoplm.engine")


def load_backend(
    spec: EngineSpec,
    change: Callable[[DecoderWeights], DecoderWeights] | None = None,
    shop_texts: Callable[[], ShopTexts | None] | None = None,
) -> Backend:
    """The backend of a spec, weights loaded, and changed where that is asked for; `shop_texts` as in `load_tensors`.
    Raises ConfigurationError saying what cannot be used."""
    if spec.backend not in BACKENDS:
        raise ConfigurationError(f"backend {spec.backend!r} is not one of: {', '.join(BACKENDS)}")
    on_gpu = spec.backend == "triton"
    if on_gpu:
        check_device(torch.device("cuda"))
    if spec.dtype not in _DTYPES:
        raise ConfigurationError(f"dtype {spec.dtype!r} is not one of: {', '.join(_DTYPES)}")
    if spec.threads:
        torch.set_num_threads(spec.threads)
    check_bundle(spec)
    config = ModelConfig.from_folder(Path(spec.base_folder))
    spec = msgspec.structs.replace(spec, weight_format=served_weight_format(spec, config))
    pages = 0 if on_gpu and not spec.kv_cache_bytes else _pages(spec, config, _DTYPES[spec.dtype])
    weights, shop = load_tensors(spec, config, shop_texts)
    weights = weights if change is None else change(weights)
    tries = [
        random_trie(
            each.name, items=each.items, level_sizes=each.level_sizes, hidden_size=config.hidden_size, seed=each.seed
        )
        for each in spec.synthetic_tries
    ]
    context = spec.max_context_tokens or None
    if on_gpu:
        from shoplm.model.triton_backend import TritonBackend  # Triton exists on Linux only

        backend = TritonBackend(
            config,
            weights,
            shop,
            tries,
            pages=pages or None,
            page_size=spec.page_size,
            state_slots=spec.max_running_requests,
            max_context_tokens=context,
            max_step_tokens=spec.max_step_tokens,
            max_mixed_prompt_tokens=spec.max_mixed_prompt_tokens,
            weight_format=spec.weight_format,
            kv_format=spec.kv_format,
            graph_seconds=spec.graph_seconds,
        )
        warm_up(backend, spec.max_step_tokens)
        return backend
    return cpu_backend(spec, config, weights, shop, tries, pages)


def served_weight_format(spec: EngineSpec, config: ModelConfig) -> str:
    """The spec's, or what `auto` stands for on this machine, with this bundle."""
    if spec.weight_format != "auto":
        return spec.weight_format
    if spec.backend != "torch" or spec.bundle_folder is None:
        return "model"
    if "int8" not in read_manifest(Path(spec.bundle_folder), verify=False).cpu_formats:
        return "model"
    if native_refusal(config, _DTYPES[spec.dtype], spec.page_size) is not None:
        return "model"
    log.info("weights in int8, with which the bundle has passed the quality gate; weight_format model: as they are")
    return "int8"


def load_tensors(
    spec: EngineSpec, config: ModelConfig, shop_texts: Callable[[], ShopTexts | None] | None = None
) -> tuple[DecoderWeights, ShopWeights | None]:
    """The base's weights, with the adapter, and the bundle's. `shop_texts` waits for what somebody else reads of the
    bundle; it is read here without one, and where it gives None."""
    apart = keeps_apart(spec.weight_format) if spec.adapter_mode == "auto" else spec.adapter_mode == "apart"
    folder = Path(spec.base_folder)
    weights = load_weights(folder, config, _DTYPES[spec.dtype], adapter=_adapter(spec), apart=apart)
    if spec.bundle_folder is None:
        return weights, None
    bundle = Path(spec.bundle_folder)
    texts = shop_texts() if shop_texts is not None else None
    return weights, _shop(bundle, texts or read_shop_texts(bundle, folder), weights.embedding)


def check_bundle(spec: EngineSpec) -> None:
    """Raises BundleChangedError where the spec's bundle is another one than when the spec was made."""
    if spec.bundle_folder is None or spec.bundle_hash is None:
        return
    if manifest_hash(Path(spec.bundle_folder)) != spec.bundle_hash:
        raise BundleChangedError(f"{spec.bundle_folder} is another bundle than when the server started")


def _pages(spec: EngineSpec, config: ModelConfig, dtype: torch.dtype) -> int:
    pool_dtype = KV_FORMATS.get(spec.kv_format) or dtype
    page_bytes = kv_page_bytes(config, spec.page_size, pool_dtype)
    pages = spec.kv_cache_bytes // page_bytes
    if pages < 2:
        raise ConfigurationError(
            f"a KV cache of {spec.kv_cache_bytes} bytes holds {pages} pages of {page_bytes} bytes: raise kv_cache_mib"
        )
    # It is touched as it fills: without this, the system would find out in the midst of serving.
    if spec.backend == "torch" and spec.kv_cache_bytes > (memory := psutil.virtual_memory().total):
        raise ConfigurationError(
            f"kv_cache_mib is {spec.kv_cache_bytes >> 20:,}, and this machine has {memory >> 20:,} MiB of memory in all"
        )
    return pages


def _adapter(spec: EngineSpec) -> Adapter | None:
    """The adapter that was asked for, or the one that the bundle was trained with."""
    own = spec.bundle_folder is not None and read_manifest(Path(spec.bundle_folder), verify=False).has_adapter
    if own and spec.adapter_folder is not None:
        raise BundleError(f"{spec.bundle_folder} was trained with an adapter of its own: leave --adapter out")
    folder = spec.bundle_folder if own else spec.adapter_folder
    return None if folder is None else read_adapter(Path(folder))


def _shop(bundle: Path, texts: ShopTexts, embedding: torch.Tensor) -> ShopWeights:
    manifest = read_manifest(bundle, verify=False)
    if manifest.base.vocab_size != len(embedding) or manifest.base.hidden_size != embedding.shape[1]:
        raise BundleError(
            f"{bundle} was made for {manifest.base.name}: a vocabulary of {manifest.base.vocab_size} and width "
            f"{manifest.base.hidden_size}; this base has {len(embedding)} and {embedding.shape[1]}"
        )
    vocabulary = ShopVocabulary(manifest.base.vocab_size, manifest.level_sizes, manifest.type_count)
    return load_shop_weights(
        bundle / "weights.safetensors",
        manifest,
        vocabulary,
        embedding,
        columns=texts.columns,
        token_texts=texts.tokens,
    )
