"""What the GPU backend says where the card's memory does not suffice, part by part, and the pool that it takes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from shoplm.engine.gpu_warmup import warm_up
from shoplm.errors import ConfigurationError
from shoplm.model import triton_backend
from shoplm.model.gpu import kv_page_bytes
from shoplm.model.triton_backend import TritonBackend
from torch.utils._python_dispatch import TorchDispatchMode
from toy_backend import toy_config, toy_shop, toy_trie, toy_weights

GIB = 1 << 30


class Card(TorchDispatchMode):
    """Refuses like CUDA's allocator what does not fit beside all that was allocated before, before it is allocated."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        self._capacity = capacity
        self.allocated = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.zeros):
            wanted = math.prod(args[0]) * (keywords.get("dtype") or torch.get_default_dtype()).itemsize
        elif func.overloadpacket is torch.ops.aten.cat:
            wanted = sum(part.nbytes for part in args[0])
        else:
            return func(*args, **keywords)
        if self.allocated + wanted > self._capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {wanted} bytes.\nSee documentation")
        self.allocated += wanted
        return func(*args, **keywords)


def backend(**options: Any) -> TritonBackend:
    config = toy_config(traits=False, layers=1)
    sizes = {"pages": 12, "state_slots": 3, "max_step_tokens": 32, "device": "cpu"}
    return TritonBackend(config, toy_weights(config), toy_shop(), [toy_trie()], **sizes | options)


def scratch_bytes() -> int:
    """What is allocated before the weights."""
    with pytest.MonkeyPatch.context() as patch, Card(math.inf) as card:
        patch.setattr(triton_backend, "TritonDecoder", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend()
    return card.allocated


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"state_slots": 10**6}, "scratch memory: lower max_running_requests, max_context_tokens or max_step_tokens"),
        ({"max_step_tokens": 10**8}, "scratch memory: lower max_running_requests, max_context_tokens or max_step_to"),
        ({"pages": 10**7}, "10000000 pages of 16 tokens: lower kv_cache_mib, or take kv_format int8"),
    ],
)
def test_what_is_too_large_is_named_with_what_to_lower(options: dict[str, int], said: str) -> None:
    message = rf"does not suffice for {re.escape(said)}.*\(CUDA out of memory\. Tried to allocate \d+ bytes\.\)$"
    with Card(GIB), pytest.raises(ConfigurationError, match=message):
        backend(**options)


def test_weights_that_do_not_fit_ask_for_a_smaller_base() -> None:
    with Card(scratch_bytes() + 1), pytest.raises(ConfigurationError, match=r"for the weights: take a smaller base"):
        backend()


def test_graphs_may_be_left_out_and_the_first_step_not(caplog: pytest.LogCaptureFixture) -> None:
    """A card on which the backend itself just fits."""
    with Card(math.inf) as card:
        backend()
    with Card(card.allocated):
        loaded = backend()
        with pytest.raises(ConfigurationError, match="for a step of 32 tokens: lower kv_cache_mib or max_step_tokens"):
            warm_up(loaded, 32)
    with Card(card.allocated), caplog.at_level(logging.INFO, "shoplm.graphs"):
        assert backend(graph_seconds=600.0).graphs.buckets == ()
    [record] = caplog.records
    assert record.levelname == "WARNING" and "captured 0 of" in record.message
    assert "the GPU has no memory for more (lower kv_cache_mib): the others run launch by launch" in record.message


def test_the_pool_takes_what_is_free_but_for_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    page = kv_page_bytes(toy_config(traits=False, layers=1), 16, torch.float32)
    monkeypatch.setattr(triton_backend, "free_memory", lambda _: (GIB + 7 * page, 8 * GIB))
    assert backend(pages=None).info.pages == 7
    monkeypatch.setattr(triton_backend, "free_memory", lambda _: (GIB, 8 * GIB))
    with pytest.raises(ConfigurationError, match=r"no room for a KV cache.*lower max_running_requests or max_context"):
        backend(pages=None)
