"""The whole backend on the card: equal to the torch backend, the time of a step, and the beam searches of the anchors.

Needs msgspec and safetensors beside torch, triton and numpy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from shoplm.batch import Batch, Row, SampleReadout
from shoplm.engine.direct import DirectRunner
from shoplm.model.backend import Handle
from shoplm.model.config import ModelConfig
from shoplm.model.gpu import product_rate
from shoplm.model.gpu_linear import WEIGHT_FORMATS
from shoplm.model.kv_pool import KV_FORMATS
from shoplm.model.rounded import rounded
from shoplm.model.shop_weights import random_trie
from shoplm.model.step_graphs import GraphLimits, graph_buckets, paying_tokens, smallest_cover
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.triton_backend import TritonBackend
from shoplm.model.triton_step import StepBounds
from shoplm.request import Embed, Sampling, Select
from toy_backend import Recorder, assert_same, backends, chats, explanations, run, work

from gpu_stages.common import Stage, median_us
from gpu_stages.models import CONFIGS, TINY, random_weights


def equality(stage: Stage) -> None:
    """Mixed steps of all services, launch by launch and as captured graphs; an adapter apart; drawn tokens."""
    for name, seconds in (("launches", 0.0), ("graphs", 20.0)):
        if stage.smoke and seconds:
            continue  # without CUDA a bucket is the same launches: tests/kernels/test_step_graphs.py
        for traits in (False, True):
            stage.check(
                f"fp32 {name} {'every trait' if traits else 'llama'} equal the torch backend",
                partial(_services, stage, traits, seconds),
            )
    stage.check("fp32 with an adapter apart equals one merged", partial(_services, stage, True, 0.0, adapted=True))
    stage.check("a seed gives the same tokens in every run", lambda: _seeds(stage))


def formats(stage: Stage) -> None:
    """bf16 hidden states, and those of every format of weights and of keys and values."""
    kinds = [(weights, "model") for weights in WEIGHT_FORMATS]
    for weights, kv in (*kinds, *(("model", kv) for kv in KV_FORMATS if kv != "model")):
        name = f"hidden states of the 135M shape, weights {weights}, kv {kv}"
        stage.check(name, partial(_hidden, stage, weights, kv), fp8="fp8" in (weights, kv))


def _services(stage: Stage, traits: bool, graph_seconds: float, *, adapted: bool = False) -> None:
    options: dict[str, Any] = {"device": str(stage.device), "graph_seconds": graph_seconds}
    reference, backend = backends(traits=traits, adapted=adapted, **options)
    jobs = [*(work()[:3] if stage.smoke else work()), *explanations()]
    expected, _ = run(reference, 15, jobs)
    found, _ = run(backend, 15, jobs)
    for (_, want), (_, have) in zip(expected.steps, found.steps, strict=True):
        for one, other in zip(want, have, strict=True):
            # The card multiplies in another order than the CPU: more than the tests' tolerance, less than a step.
            assert_same(one, other, tolerance=1e-3)


def _seeds(stage: Stage) -> None:
    settings = [Sampling(temperature=1.5, seed=3), Sampling(temperature=1.5, top_k=30, top_p=0.9, seed=7)]
    _, backend = backends(traits=False, device=str(stage.device))
    together = run(backend, 2048, chats(*settings))[1]
    apart = [run(backend, 2048, chats(each))[1][0] for each in settings]
    if together != apart:
        raise AssertionError(f"{together} together, {apart} apart")


def _hidden(stage: Stage, weight_format: str, kv_format: str) -> None:
    """A prompt in two chunks: the distance to an fp32 model with the same rounded weights, keys and values is at most
    three times that of the torch backend in bf16. FP8 rounds activations too, which neither of those does: of these
    weights that moves the state by .13, computed in fp32."""
    config = TINY if stage.smoke else CONFIGS["135M"]
    weights = random_weights(config, stage.dtype, torch.device("cpu"))
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, stage.size(300, 9)).tolist()
    sizes: dict[str, Any] = {"pages": 40, "state_slots": 4, "max_context_tokens": 512, "kv_format": kv_format}
    card: dict[str, Any] = {"max_step_tokens": 32, "device": stage.device, "weight_format": weight_format}
    exact, in_dtype, found = (
        torch.tensor(DirectRunner(backend, chunk_tokens=stage.size(200, 5)).run([(prompt, Embed())])[0]).double()
        for backend in (
            TorchBackend(config, rounded(weights.float(), weight_format), **sizes),
            TorchBackend(config, rounded(weights, weight_format), **sizes),
            TritonBackend(config, weights, **sizes, **card),
        )
    )
    torchs, ours = ((side - exact).norm() / exact.norm() for side in (in_dtype, found))
    allowed = max(3 * float(torchs), 0.25 if weight_format == "fp8" else 1e-5)
    if not float(ours) <= allowed:
        raise AssertionError(f"the hidden state is off by {float(ours):.2e} of its length, allowed {allowed:.2e}")


# ---- the time of a step --------------------------------------------------------------------------------------------


def steps(stage: Stage) -> None:
    """CUDA-graph decode steps: forward pass, head, sampling. Random weights of real shapes, 64 rows and one."""
    for rows, kv_len in ((2, 20),) if stage.smoke else ((64, 512), (1, 512), (64, 4096)):
        for name in ("135M",) if stage.smoke else CONFIGS:
            label = f"decode step {name} {rows} rows, context {kv_len}"
            promised = 800.0 if (name, rows, kv_len) == ("135M", 64, 512) else None
            stage.measure(label, "us", partial(_step_us, stage, name, rows, kv_len), target=promised)
            if not stage.smoke:
                torch.cuda.empty_cache()


def _step_us(stage: Stage, name: str, rows: int, kv_len: int) -> float:
    config = TINY if stage.smoke else CONFIGS[name]
    weights = random_weights(config, stage.dtype, stage.device)
    pages = -(-kv_len // 16)
    backend = TritonBackend(
        config, weights, pages=rows * pages, state_slots=rows, max_context_tokens=pages * 16, max_step_tokens=32,
        device=stage.device,
    )  # fmt: skip
    limits = GraphLimits(rows, pages * 16, 16, config.query_group, 0, 32)
    batch = _decode_batch(rows, kv_len, pages)
    need = StepBounds.of(batch)
    bucket = smallest_cover(graph_buckets(limits), need)
    if bucket is None:
        raise AssertionError("no bucket has room for the step")
    with torch.inference_mode():
        backend.graphs.capture([bucket], 60.0)
        backend.graphs.run(batch, need)
        return median_us([lambda: backend.graphs.replay(bucket)], smoke=stage.smoke, graphed=False)


def _decode_batch(rows: int, kv_len: int, pages: int) -> Batch:
    """One token per row, behind `kv_len` - 1 cached ones in random pages."""
    order = np.random.default_rng(0).permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    last = kv_len - 1
    slots = order[:, last // 16].astype(np.int64) * 16 + last % 16
    readout = SampleReadout(Sampling(), 0)
    parts = tuple(Row(at, at, 1, order[at], kv_len, token_from_state=True, readout=readout) for at in range(rows))
    return Batch(np.zeros(rows, np.int32), np.full(rows, last, np.int32), slots, parts)


# ---- the searches of the anchors -----------------------------------------------------------------------------------


@dataclass
class Timed(Recorder):
    """A backend that also keeps each step's seconds: by the wall, from `submit` to its result."""

    seconds: list[tuple[bool, float]] = field(default_factory=list)  # whether the step has beams

    def submit(self, batch: Batch) -> Handle:
        start = time.perf_counter()
        handle = super().submit(batch)
        self.seconds.append((any(row.beam is not None for row in batch.rows), time.perf_counter() - start))
        return handle


# NVIDIA's sid-gr-inference on an H100, without a trie: ms of the prompt and three tokens of 256 beams.
ANCHORS = {(1000, 1): 17.6, (1000, 8): 93.2, (5000, 1): 42.3, (5000, 8): 307.9}


def searches(stage: Stage) -> None:
    """Qwen3-1.7B's shape, 256 beams, three codes, a trie of a million items; cold cache; and lengths that differ."""
    config = TINY if stage.smoke else CONFIGS["1.7B"]
    weights = random_weights(config, stage.dtype, stage.device)
    items, width = stage.size(1_000_000, 300), stage.size(256, 8)
    trie = random_trie(
        "items", items=items, level_sizes=(stage.size(256, 16),) * 3, hidden_size=config.hidden_size, seed=0
    )
    groups = 2 if stage.smoke else 8
    backend = TritonBackend(
        config, weights, tries=[trie], pages=stage.size(3200, 60), state_slots=groups,
        max_context_tokens=min(config.max_positions, 8192), max_step_tokens=groups * width, device=stage.device,
    )  # fmt: skip
    # What is not captured runs launch by launch, and is measured so.
    stage.check("capture of the searches' steps", partial(_capture_searches, backend, config, groups, width))
    shapes = [(33, 1)] if stage.smoke else list(ANCHORS)
    for length, count in shapes:
        _search_rows(stage, backend, f"{length} x {count}", [length] * count, width, ANCHORS.get((length, count)))
    mixed = [17, 40] if stage.smoke else [300, 900, 1500, 2200, 3100, 4000, 4700, 5000]
    _search_rows(stage, backend, f"lengths {min(mixed)} to {max(mixed)} x {len(mixed)}", mixed, width, None)


def _capture_searches(backend: TritonBackend, config: ModelConfig, groups: int, width: int) -> None:
    """The buckets that a server would have captured for one search and for `groups` at once, and no others."""
    steps, context = backend.graphs.state.parents.shape[1], backend.info.max_context_tokens
    paying = paying_tokens(config.layer_parameters, product_rate(backend.graphs.state.tokens.device))
    most = min(groups * width, paying)
    limits = GraphLimits(groups, context, backend.info.page_size, config.query_group, steps, most)
    lanes = (width, groups * width)
    wanted = [each for each in graph_buckets(limits) if each.row_tokens == 0 and each.lane_tokens in lanes]
    with torch.inference_mode():
        backend.graphs.capture(wanted, 30.0)


def _search_rows(
    stage: Stage, backend: TritonBackend, label: str, lengths: list[int], width: int, anchor: float | None
) -> None:
    """Median milliseconds of the whole and of its part behind the prompt."""
    select = Select(count=width, beam_width=width, trie="items")
    generator = np.random.default_rng(1)
    jobs = [(generator.integers(0, 200, length).tolist(), select) for length in lengths]
    runs: list[tuple[float, float]] = []

    def once() -> list[object]:
        timed = Timed(backend)
        outputs = DirectRunner(timed, chunk_tokens=8192, step_tokens=65_536).run(jobs)
        whole = sum(seconds for _, seconds in timed.seconds)
        runs.append((whole, sum(seconds for beams, seconds in timed.seconds if beams)))
        return list(outputs)

    def median() -> float:
        for _ in range(1 if stage.smoke else 8):
            once()
        del runs[: 0 if stage.smoke else 2]
        return 1e3 * sorted(whole for whole, _ in runs)[len(runs) // 2]

    stage.measure(f"search {label}", "ms", median, target=anchor)
    if runs:
        stage.row(f"search {label}, behind the prompt", 1e3 * sorted(part for _, part in runs)[len(runs) // 2], "ms")
