"""Steps as CUDA graphs: the launches of a small step cost more than its work, and a replayed graph is one launch.

A graph has fixed sizes, so a step is padded to the smallest *bucket* that covers it. Steps larger than every bucket run
launch by launch. Which buckets there are and which one a step takes is decided here without CUDA.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from shoplm.batch import Batch
from shoplm.kernels.tile_config import SHORT_ROWS
from shoplm.model.device_io import packed_bytes, refill
from shoplm.model.device_state import DeviceState
from shoplm.model.gpu import is_out_of_memory, unclaimed_bytes
from shoplm.model.triton_program import StepOutputs
from shoplm.model.triton_step import KernelStep, StepArrays, StepBounds, host_arrays, lane_room, plan_step

log = logging.getLogger("shoplm.graphs")

DECODE_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
SHORT_TOKENS = (16, 64, 128)  # steps whose prompts lack a few tokens each: most prompts behind a cached history
MIXED_ROWS = (16, 64, 256)  # chats beside the chunks of prompts
LEAST_PROMPT_TOKENS = 128  # the smallest step of long chunks, alone and beside searches
PROMPTS = (8, 64)  # chunks of a step of prompts alone; beside chats, the fewer
LEAST_LANE_TOKENS = 64  # the smallest step of searches alone
MIXED_LANE_TOKENS = (128, 256, 512)  # of searches beside prompts
SEARCHES = 8
SHORT_CONTEXT = 4096  # tokens: a grid for the longest context has many programs that only find out they are not needed
REPORT_SECONDS = 5.0
LEAST_FREE_BYTES = 512 << 20  # what a capture leaves to the steps that run launch by launch
LAUNCH_SECONDS = 3e-4  # of the host for one layer's kernels and products


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What the buckets depend on."""

    rows: int  # most requests that run at once
    kv_len: int  # tokens, the longest context
    page_size: int
    query_group: int  # query heads per KV head
    steps: int  # most codes of an item, but the last; 0: no beams
    max_step_tokens: int  # of prompts, and most lanes; at most `paying_tokens`
    max_mixed_prompt_tokens: int = 0  # of prompts beside chats; 0: no such steps are captured


def paying_tokens(layer_parameters: int, operations_per_second: float) -> int:
    """Tokens up to which a padded step costs nothing: its products take the GPU no longer than its launches the host.

        2 * layer_parameters * tokens / operations_per_second = LAUNCH_SECONDS

    for each layer, so their number does not matter. Up to here the GPU would wait for the host, whatever the padding
    adds; from here on launches run ahead of the GPU, and padding would cost. At least `LEAST_PROMPT_TOKENS`: about as
    many are multiplied while a layer's weights are read.
    """
    return max(LEAST_PROMPT_TOKENS, int(LAUNCH_SECONDS * operations_per_second / (2 * layer_parameters)))


def graph_buckets(limits: GraphLimits) -> tuple[StepBounds, ...]:
    """The buckets in the order of capture: what chats need first, the rarest last."""
    contexts = sorted({min(SHORT_CONTEXT, limits.kv_len), limits.kv_len})
    buckets = [_bounds(limits, kv_len, rows, rows, 1) for kv_len in contexts for rows in _up_to(DECODE_ROWS, limits)]
    buckets += [bounds for kv_len in contexts for bounds in _with_chunks(limits, kv_len)]
    query_len = max(1, SHORT_ROWS // limits.query_group)  # longer chunks take the prefill kernel
    lane_sizes = sorted({min(size, limits.max_step_tokens) for size in MIXED_LANE_TOKENS}) if limits.steps else []
    for kv_len in contexts:
        if limits.steps:
            for tokens in _doubled(LEAST_LANE_TOKENS, limits.max_step_tokens):
                buckets.append(_with_searches(_bounds(limits, kv_len, 0, 0, 0), limits, tokens))
        for tokens in SHORT_TOKENS:
            short = _bounds(limits, kv_len, tokens, min(tokens, limits.rows), query_len)
            buckets.append(short)
            buckets += [_with_searches(short, limits, lanes) for lanes in lane_sizes]
    for kv_len in contexts:
        for chunks in _beside_searches(limits, kv_len):
            buckets += [_with_searches(chunks, limits, lanes) for lanes in lane_sizes]
    return tuple(dict.fromkeys(buckets))


def smallest_cover(buckets: Sequence[StepBounds], need: StepBounds) -> StepBounds | None:
    """The bucket with the least padding that has room for a step, if there is one."""
    return _first_cover(sorted(buckets, key=_padding), need)


def _first_cover(buckets: Sequence[StepBounds], need: StepBounds) -> StepBounds | None:
    return next((bucket for bucket in buckets if bucket.cover(need)), None)


def _padding(bounds: StepBounds) -> tuple[int, int, int]:
    """Orders buckets by what they cost a step that has room in all of them."""
    return bounds.row_tokens + bounds.lane_tokens, bounds.kv_len, bounds.rows + bounds.groups


def _with_chunks(limits: GraphLimits, kv_len: int) -> list[StepBounds]:
    """Chunks of prompts of any length: beside chats, and alone."""
    most, mixed = limits.max_step_tokens, min(limits.max_mixed_prompt_tokens, limits.max_step_tokens)
    buckets = []
    if mixed:
        for chats in _up_to(MIXED_ROWS, limits):
            tokens, rows = min(chats + mixed, most), min(chats + PROMPTS[0], limits.rows)
            buckets.append(_bounds(limits, kv_len, tokens, min(rows, tokens), mixed))
    for tokens in _doubled(LEAST_PROMPT_TOKENS, most):
        buckets += [_bounds(limits, kv_len, tokens, min(rows, tokens), tokens) for rows in _up_to(PROMPTS, limits)]
    return buckets


def _beside_searches(limits: GraphLimits, kv_len: int) -> list[StepBounds]:
    """Chunks of prompts of any length, and chats: what is read and answered while searches go on."""
    rows = min(MIXED_ROWS[1] + PROMPTS[0], limits.rows)
    sizes = _doubled(LEAST_PROMPT_TOKENS, limits.max_step_tokens)
    return [_bounds(limits, kv_len, tokens, min(rows, tokens), tokens) for tokens in sizes]


def _doubled(least: int, most: int) -> list[int]:
    """`least`, twice as much and so on below `most`, then `most`: no step is padded to more than twice its size."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def _up_to(sizes: Sequence[int], limits: GraphLimits) -> list[int]:
    return sorted({min(size, limits.rows) for size in sizes})


def _bounds(limits: GraphLimits, kv_len: int, tokens: int, rows: int, query_len: int) -> StepBounds:
    pages = -(-kv_len // limits.page_size)
    return StepBounds(tokens, rows, query_len, kv_len, pages, samples=rows, outputs=rows)


def _with_searches(bounds: StepBounds, limits: GraphLimits, lane_tokens: int) -> StepBounds:
    return replace(
        bounds,
        groups=min(SEARCHES, lane_tokens),
        lane_tokens=lane_tokens,
        lanes=lane_room(lane_tokens),
        steps=limits.steps,
        outputs=bounds.rows + lane_tokens,
    )


class Captured(Protocol):
    """A step of fixed sizes whose inputs lie at fixed places."""

    def replay(self) -> StepOutputs:
        """Queue it on the inputs that are there now. The results are good until the next replay of any."""
        ...


class RunAgain:
    """Where there is no CUDA: the launches once more. For tests of everything but the capture."""

    def __init__(self, run: Callable[[], StepOutputs]) -> None:
        self._run = run

    def replay(self) -> StepOutputs:
        return self._run()


class CudaGraph:
    """A captured CUDA graph; all of a backend's share one pool of memory, since they run one after another."""

    def __init__(self, run: Callable[[], StepOutputs], pool: Any, stream: torch.cuda.Stream) -> None:
        """`stream` is the same for all: cuBLAS has a workspace for each stream, and keeps it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles kernels and lets cuBLAS take its workspace, neither of which may happen in a capture
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._outputs = run()

    def replay(self) -> StepOutputs:
        self._graph.replay()
        return self._outputs


class StepGraphs:
    """The captured buckets of one backend."""

    def __init__(self, program: Callable[[KernelStep], StepOutputs], state: DeviceState) -> None:
        self._program = program
        self.state = state
        self._device = state.tokens.device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._captured: dict[StepBounds, Captured] = {}
        self._smallest_first: list[StepBounds] = []

    @property
    def buckets(self) -> tuple[StepBounds, ...]:
        """What has been captured."""
        return tuple(self._captured)

    def capture(self, buckets: Sequence[StepBounds], budget_seconds: float) -> None:
        """Capture buckets in order until the time or the GPU's memory is spent; what is left out runs launch by launch.
        Logs progress. Once: the captured steps read one buffer, as large as these need. A step of each kind is run
        before, so that the time of Triton's compiler, minutes on a first start, does not count."""
        if self._captured:
            raise RuntimeError("step sizes have been captured already")
        arrays = {bounds: plan_step(_EMPTY, bounds, self.state) for bounds in buckets}
        start, spent = time.perf_counter(), ""
        try:
            self._compile(arrays)
            start = time.perf_counter()
            spent = self._capture(arrays, start, budget_seconds)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            spent = _NO_MEMORY
        self._smallest_first = sorted(self._captured, key=_padding)
        log.log(
            logging.WARNING if spent else logging.INFO,
            "captured %d of %d step sizes in %.1f s (graph_seconds %.0f)%s",
            len(self._captured),
            len(buckets),
            time.perf_counter() - start,
            budget_seconds,
            f"; {spent}: the others run launch by launch" if spent else "",
        )

    def _compile(self, arrays: Mapping[StepBounds, StepArrays]) -> None:
        """Allocate the buffer of all inputs, and run a step of each kind."""
        sizes = [packed_bytes(host_arrays(each)) for each in arrays.values()]
        self._buffer = torch.zeros(max(sizes, default=0), dtype=torch.uint8, device=self._device)
        for bounds in _one_of_each_kind(tuple(arrays)):
            self._program(KernelStep.upload(arrays[bounds], bounds, self._device, self._buffer))

    def _capture(self, arrays: Mapping[StepBounds, StepArrays], start: float, budget_seconds: float) -> str:
        """Says why it ended before the last bucket; "": it did not."""
        on_gpu = self._device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        stream = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
        reported = start
        for bounds, inputs in arrays.items():
            now = time.perf_counter()
            if now - start > budget_seconds:
                return "the time is spent"
            if unclaimed_bytes(self._device) < LEAST_FREE_BYTES:
                return _NO_MEMORY
            if now - reported > REPORT_SECONDS:
                log.info("captured %d of %d step sizes in %.0f s", len(self._captured), len(arrays), now - start)
                reported = now
            step = KernelStep.upload(inputs, bounds, self._device, self._buffer)

            def run(step: KernelStep = step) -> StepOutputs:
                return self._program(step)

            self._captured[bounds] = RunAgain(run) if stream is None else CudaGraph(run, pool, stream)
        return ""

    def replay(self, bounds: StepBounds) -> StepOutputs:
        """Queue a captured bucket on the inputs that are there now: for measurements."""
        return self._captured[bounds].replay()

    def run(self, batch: Batch, need: StepBounds) -> StepOutputs | None:
        """Queue the step by the smallest captured bucket; None where none has room for it."""
        bounds = _first_cover(self._smallest_first, need)
        if bounds is None:
            return None
        refill(host_arrays(plan_step(batch, bounds, self.state)), self._device, self._buffer)
        return self._captured[bounds].replay()


def _one_of_each_kind(buckets: Sequence[StepBounds]) -> list[StepBounds]:
    """Buckets that between them launch every kernel that any of these launches."""
    kinds = {(bucket.rows > 0, bucket.query_len, bucket.groups > 0): bucket for bucket in reversed(buckets)}
    return list(kinds.values())


_NO_MEMORY = "the GPU has no memory for more (lower kv_cache_mib)"
_EMPTY = Batch(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), ())
