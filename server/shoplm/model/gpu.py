"""Whether the GPU backend can run on a device, and how much of its memory the KV pool may take. No Triton."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from shoplm.errors import ConfigurationError
from shoplm.launchers import missing_for_launches
from shoplm.model.config import ModelConfig
from shoplm.model.kv_pool import KV_FORMATS

OLDEST_CAPABILITY = (8, 0)
LEAST_MARGIN_BYTES = 1 << 30
FP8_CAPABILITY = (8, 9)
MARGIN_SHARE = 0.05  # of the whole memory: a step's activations, cuBLAS, the compiled kernels
# Operations a second of one multiprocessor's tensor cores, dense and in 16 bits, by the data sheets of the A100, A10,
# L4, H100, B200 and RTX PRO 6000; and the share of it that products of a few hundred rows come to, a rule of thumb.
_PEAK_RATES = {(8, 0): 2.9e12, (8, 6): 1.7e12, (8, 9): 2.1e12, (9, 0): 7.5e12, (10, 0): 15e12, (12, 0): 2.7e12}
_PRODUCT_SHARE = 0.4
_SPENT = ("out of memory", "ALLOC_FAILED")  # as torch's allocator, CUDA and Triton say it, and as cuBLAS does


def check_device(device: torch.device) -> None:
    """Raise ConfigurationError unless the kernels run on `device`: the current GPU, beside what Triton needs to launch
    them, or a CPU where TRITON_INTERPRET=1."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigurationError(
            f"--backend triton needs an NVIDIA GPU of compute capability 8.0 or later and a CUDA build of torch, but "
            f"torch {torch.__version__} finds no GPU: use --backend torch on this machine"
        )
    if device.index is not None and device.index != (current := torch.cuda.current_device()):
        raise ConfigurationError(
            f"device {device} is not the current one, cuda:{current}, to which kernels, streams and events go: "
            f"choose a GPU by CUDA_VISIBLE_DEVICES"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise ConfigurationError(
            f"--backend triton needs an NVIDIA GPU of compute capability 8.0 or later, but "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: use --backend torch"
        )
    if missing := missing_for_launches():
        raise ConfigurationError(f"--backend triton cannot start: {missing}")


def kv_dtype(kv_format: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of keys and values in the pool, for activations of `dtype`. Raises ConfigurationError."""
    if kv_format not in KV_FORMATS:
        raise ConfigurationError(f"kv_format {kv_format!r} is not one of: {', '.join(KV_FORMATS)}")
    check_fp8("kv_format", kv_format, device)
    return KV_FORMATS[kv_format] or dtype


def check_fp8(flag: str, value: str, device: torch.device) -> None:
    """Raise ConfigurationError where `value` is "fp8" and the card has no such numbers."""
    if value != "fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigurationError(
            f"{flag} fp8 needs compute capability 8.9 or later, but {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}: use int8"
        )


def product_rate(device: torch.device) -> float:
    """Operations a second, roughly, of a layer's products in 16 bits on the card; on a CPU those of an H100."""
    capability, multiprocessors = (9, 0), 132
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    newest = max(known for known in _PEAK_RATES if known <= capability)
    return _PRODUCT_SHARE * _PEAK_RATES[newest] * multiprocessors


def kv_page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in all layers; one-byte keys and values have an fp32 scale per (token, head)."""
    values = config.kv_page_bytes(page_size, dtype.itemsize)
    scales = 2 * config.num_layers * config.num_kv_heads * page_size * 4
    return values + (scales if dtype.itemsize == 1 else 0)


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all on the GPU. What torch keeps without using it is given back, or counts as free."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, total


def unclaimed_bytes(device: torch.device) -> int:
    """What the driver has free: of what torch keeps without using it, a graph gets nothing. On a CPU no bound."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error says so, or one in whose handling it was raised: a capture that ends early has its own."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _SPENT):
            return True
        error = error.__context__
    return False


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Turns the GPU's "out of memory" into a ConfigurationError that says for what, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"the GPU's memory does not suffice for {what}: {remedy} ({reason})") from error


def pages_that_fit(free_bytes: int, total_bytes: int, page_bytes: int) -> int:
    """Pages for which there is room, a safety margin left. Raises ConfigurationError for fewer than two."""
    margin = max(LEAST_MARGIN_BYTES, int(MARGIN_SHARE * total_bytes))
    pages = max(0, free_bytes - margin) // page_bytes
    if pages < 2:
        raise ConfigurationError(
            f"beside the weights the GPU has {free_bytes >> 20} MiB free, of which {margin >> 20} MiB stay unused: no "
            f"room for a KV cache in pages of {page_bytes} bytes. Take a smaller base model, a lower "
            f"max_running_requests or max_context_tokens, or end what else uses the GPU"
        )
    return pages
