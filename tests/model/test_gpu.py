"""What the GPU backend says where it cannot run, and how much memory it takes where it can."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shoplm.config_sources import load_config
from shoplm.engine.load import load_backend
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model import gpu
from shoplm.model.gpu import check_device, free_memory, memory_for, pages_that_fit, product_rate

GIB = 1 << 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_error_comes_before_any_file_is_read() -> None:
    with pytest.raises(ConfigurationError, match="--backend triton needs an NVIDIA GPU"):
        load_backend(EngineSpec(base_folder="does-not-exist", backend="triton"))


def test_a_cpu_is_refused_where_triton_does_not_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigurationError, match="use --backend torch"):
        check_device(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_device(torch.device("cpu"))


def test_a_gpu_without_what_launches_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first launch fails, and with what to install."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigurationError, match=r"^--backend triton cannot start: .*no-such-compiler.*install gcc"):
        check_device(torch.device("cuda"))


def test_a_gpu_that_is_not_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "missing_for_launches", lambda: None)
    with pytest.raises(ConfigurationError, match=r"device cuda:1 is not the current one, cuda:0, .*CUDA_VISIBLE_DEV"):
        check_device(torch.device("cuda:1"))
    for current in ("cuda", "cuda:0"):
        check_device(torch.device(current))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2 GiB.",
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_whoever_is_out_of_memory_what_to_lower_is_said(words: str) -> None:
    with (
        pytest.raises(ConfigurationError, match="does not suffice for this: lower that"),
        memory_for("this", "lower that"),
    ):
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), memory_for("this", "lower that"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_torch_keeps_is_given_back_before_free_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = [5 * GIB]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserved.append(3 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved[-1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (16 * GIB - reserved[-1], 16 * GIB))
    assert free_memory(torch.device("cuda")) == (14 * GIB, 16 * GIB)
    assert reserved == [5 * GIB, 3 * GIB]


def test_a_card_multiplies_at_the_rate_of_the_newest_architecture_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=100))
    for capability in ((8, 0), (8, 7), (8, 9), (10, 3), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        rates[capability] = product_rate(torch.device("cuda"))
    expected = {(8, 0): 116e12, (8, 7): 68e12, (8, 9): 84e12, (10, 3): 600e12, (12, 1): 108e12}
    assert rates == pytest.approx(expected)


def test_unknown_backends_are_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'tpu' is not one of: torch, triton"):
        load_backend(EngineSpec(base_folder="base", backend="tpu"))


def test_the_pool_leaves_a_margin() -> None:
    assert pages_that_fit(10 * GIB, 16 * GIB, GIB // 2) == 18  # 1 GiB stays
    assert pages_that_fit(60 * GIB, 80 * GIB, GIB) == 56  # 5 % of 80 GiB stay
    with pytest.raises(ConfigurationError, match=r"1500 MiB free.*lower max_running_requests"):
        pages_that_fit(1500 << 20, 16 * GIB, GIB)


def test_only_the_gpu_backend_takes_what_is_free_and_only_unasked() -> None:
    def cache_bytes(*flags: str) -> int:
        return load_config(flags, {}).engine_spec(Path("base")).kv_cache_bytes

    assert cache_bytes() == cache_bytes("--backend", "torch") == GIB // 2
    assert cache_bytes("--backend", "triton") == 0
    assert cache_bytes("--backend", "triton", "--kv-cache-mib", "1024") == GIB
