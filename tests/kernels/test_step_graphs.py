"""Padded steps and steps in flight, under the interpreter: what a captured graph replays gives what the launches give.

The capture itself needs CUDA. Everything around it runs here: which bucket a step takes, its padding, the inputs' fixed
places, and that a step is queued before the host has seen the one before it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from shoplm.batch import Batch
from shoplm.engine.direct import Output
from shoplm.engine.engine import Engine
from shoplm.kernels.attention import PagedKv, RaggedRows, paged_attention
from shoplm.model import step_graphs, triton_backend, triton_decoder
from shoplm.model.backend import Backend, BackendInfo, Handle
from shoplm.model.gpu import product_rate
from shoplm.model.step_graphs import GraphLimits, StepGraphs, graph_buckets, paying_tokens, smallest_cover
from shoplm.model.triton_step import KernelStep, StepBounds
from shoplm.request import (
    Embed,
    FailedOutput,
    FinishedOutput,
    Generate,
    Predict,
    Request,
    Sampling,
    Select,
    Service,
    Task,
    TokensOutput,
    by_request,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from torch.utils._python_dispatch import TorchDispatchMode
from toy_backend import assert_same, backends, chats, run, work

LIMITS = GraphLimits(
    rows=256, kv_len=8192, page_size=16, query_group=3, steps=2, max_step_tokens=512, max_mixed_prompt_tokens=128,
)  # fmt: skip


def need(**sizes: int) -> StepBounds:
    """The sizes of a step of single tokens with a context of 100."""
    rows = sizes.pop("rows", 0)
    base = {"row_tokens": rows, "rows": rows, "query_len": min(rows, 1), "kv_len": 100, "pages": 7}
    return StepBounds(**base | {"samples": rows, "outputs": rows} | sizes)


def test_the_smallest_bucket_that_has_room_is_taken() -> None:
    buckets = graph_buckets(LIMITS)
    chat = smallest_cover(buckets, need(rows=33))
    assert chat is not None and (chat.rows, chat.query_len, chat.kv_len, chat.groups) == (48, 1, 4096, 0)
    long = smallest_cover(buckets, need(rows=33, kv_len=4097, pages=257))
    assert long is not None and (long.rows, long.kv_len) == (48, 8192)
    suffix = smallest_cover(buckets, need(row_tokens=20, rows=4, query_len=17, outputs=2))
    assert suffix is not None and (suffix.row_tokens, suffix.query_len) == (64, 21)
    search = need(groups=2, lane_tokens=100, lanes=128, steps=1, outputs=100)
    beams = smallest_cover(buckets, search)
    assert beams is not None and (beams.rows, beams.lane_tokens, beams.steps) == (0, 128, 2)


def test_as_many_lanes_as_a_step_may_have_are_captured() -> None:
    limits = GraphLimits(rows=8, kv_len=8192, page_size=16, query_group=2, steps=2, max_step_tokens=2048)
    widest = need(groups=8, lane_tokens=2048, lanes=256, steps=2, outputs=2048)
    assert smallest_cover(graph_buckets(limits), widest) is not None


@pytest.mark.parametrize("group", [2, 3, 7])
def test_chats_go_on_in_a_graph_whatever_is_read_beside_them(group: int) -> None:
    buckets = graph_buckets(replace(LIMITS, query_group=group))
    for answers, chunks in itertools.product((1, 16, 32, 64, 248), ((8,), (16,), (32,), (64,), (128,), (16,) * 8)):
        rows, tokens = answers + len(chunks), answers + sum(chunks)
        for kv_len, pages, room in ((1000, 63, 4096), (8000, 500, 8192)):
            step = need(row_tokens=tokens, rows=rows, query_len=max(chunks), outputs=rows, kv_len=kv_len, pages=pages)
            taken = smallest_cover(buckets, step)
            assert taken is not None, step
            assert taken.row_tokens <= 384 and taken.kv_len == room


@pytest.mark.parametrize("chunks", [(512,), (200, 100), (8,) * 64])
def test_steps_of_prompts_alone_are_captured_up_to_where_their_work_is_what_costs(chunks: tuple[int, ...]) -> None:
    step = need(row_tokens=sum(chunks), rows=len(chunks), query_len=max(chunks), outputs=len(chunks))
    for most, taken in ((512, 512), (4096, 512), (400, None if sum(chunks) > 400 else 400)):
        found = smallest_cover(graph_buckets(replace(LIMITS, max_step_tokens=most)), step)
        assert (found and found.row_tokens) == taken


def test_no_step_of_long_chunks_or_searches_is_padded_to_more_than_twice_its_size() -> None:
    most = 2000
    buckets = graph_buckets(replace(LIMITS, max_step_tokens=most))
    for tokens in range(128, most + 1, 13):
        prompts = smallest_cover(buckets, need(row_tokens=tokens, rows=2, query_len=tokens - 1, outputs=2))
        lanes = need(groups=8, lane_tokens=tokens, lanes=128, steps=2, outputs=tokens)
        searches = smallest_cover(buckets, lanes)
        assert prompts is not None and prompts.row_tokens < 2 * tokens
        assert searches is not None and searches.lane_tokens < 2 * tokens


def test_the_larger_a_layer_the_fewer_tokens_pay() -> None:
    """Qwen3-1.7B, its layers of 50 million, on an H100: 1,180 tokens are .3 ms a layer. SmolLM2-135M's are 3.5."""
    h100 = product_rate(torch.device("cpu"))
    qwen = paying_tokens(50_331_648, h100)
    assert qwen == 1180 and 2 * 50_331_648 * qwen / h100 == pytest.approx(3e-4, rel=1e-3)
    assert paying_tokens(3_538_944, h100) // qwen == 50_331_648 // 3_538_944
    assert paying_tokens(10**9, h100) == 128  # weights that are read for so long that these cost nothing


def test_a_backend_captures_no_more_tokens_than_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "paying_tokens", lambda *_: 130)
    _, backend = backends(traits=False, layers=1, graph_seconds=600.0, max_step_tokens=200)
    assert max(bucket.row_tokens for bucket in backend.graphs.buckets) == 130
    assert max(bucket.lane_tokens for bucket in backend.graphs.buckets) == 130


def test_searches_go_on_in_a_graph_whatever_is_read_beside_them() -> None:
    buckets = graph_buckets(replace(LIMITS, max_step_tokens=1024))
    for answers, chunks, lanes in itertools.product((0, 1, 40), ((100,), (300,), (40,) * 8), (10, 128, 500)):
        rows, tokens = answers + len(chunks), answers + sum(chunks)
        step = need(
            row_tokens=tokens, rows=rows, query_len=max(chunks), groups=4, lane_tokens=lanes, lanes=128, steps=1,
            outputs=rows + lanes,
        )  # fmt: skip
        taken = smallest_cover(buckets, step)
        assert taken is not None, step
        assert taken.row_tokens + taken.lane_tokens <= 1024


def test_a_long_prompt_chunk_and_too_many_rows_are_not_captured() -> None:
    buckets = graph_buckets(LIMITS)
    assert smallest_cover(buckets, need(row_tokens=514, rows=2, query_len=513)) is None
    assert smallest_cover(graph_buckets(replace(LIMITS, max_step_tokens=4096)), need(row_tokens=4097, rows=1)) is None
    assert smallest_cover(buckets, need(row_tokens=300, rows=300, outputs=300)) is None
    assert smallest_cover(buckets, need(rows=1, kv_len=8193, pages=513)) is None
    assert smallest_cover(buckets, need(groups=9, lane_tokens=90, lanes=128, steps=1, outputs=90)) is None


def test_buckets_stay_within_the_limits_and_start_with_chats() -> None:
    small = GraphLimits(rows=9, kv_len=128, page_size=16, query_group=2, steps=0, max_step_tokens=32)
    buckets = graph_buckets(small)
    assert all(bucket.rows <= 9 and bucket.kv_len == 128 and not bucket.groups for bucket in buckets)
    assert len(set(buckets)) == len(buckets)
    assert [bucket.rows for bucket in buckets[:6]] == [1, 2, 4, 8, 9, 8]
    assert [bucket.query_len for bucket in buckets[:6]] == [1, 1, 1, 1, 1, 32]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[StepBounds | None]:
    """The sizes of the steps that are run; None for those that no bucket has room for."""
    steps: list[StepBounds | None] = []
    replayed = StepGraphs.run

    def recorded(self: StepGraphs, batch: Batch, bounds: StepBounds) -> object:
        outputs = replayed(self, batch, bounds)
        steps.append(None if outputs is None else bounds)
        return outputs

    monkeypatch.setattr(StepGraphs, "run", recorded)
    return steps


def test_padded_steps_equal_the_torch_backend(taken: list[StepBounds | None]) -> None:
    reference, backend = backends(traits=True, layers=1, graph_seconds=600.0)
    expected, outputs = run(reference, 15, work())
    found, answers = run(backend, 15, work())
    assert taken.count(None) <= 2
    for (batch, want), (_, have) in zip(expected.steps, found.steps, strict=True):
        assert len(have) == len(batch.rows)
        for one, other in zip(want, have, strict=True):
            assert_same(one, other)
    for output, answer in zip(outputs, answers, strict=True):
        assert_same(output, answer)


def test_padded_steps_with_long_chunks_equal_the_torch_backend(taken: list[StepBounds | None]) -> None:
    """Prompts alone, then a chunk for the kernel of long ones beside an answer that goes on."""
    bounds = {"max_mixed_prompt_tokens": 40, "max_step_tokens": 80}
    reference, backend = backends(traits=False, layers=1, graph_seconds=600.0, **bounds)
    jobs: list[tuple[list[int], Task]] = [(list(range(5)), Generate(3)), (list(range(75)), Embed())]
    expected, found = (run(each, 40, jobs)[1] for each in (reference, backend))
    assert [step and step.query_len for step in taken] == [40, 35, 1]
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_padded_steps_of_long_chunks_and_searches_equal_the_torch_backend(taken: list[StepBounds | None]) -> None:
    bounds = {"max_mixed_prompt_tokens": 40, "max_step_tokens": 80}
    reference, backend = backends(traits=False, layers=1, graph_seconds=600.0, **bounds)
    jobs: list[tuple[list[int], Task]] = [
        (list(range(5)), Generate(3)), (list(range(21)), Select(6, 4, trie="deep")), (list(range(75)), Embed())
    ]  # fmt: skip
    expected, found = (run(each, 40, jobs)[1] for each in (reference, backend))
    assert [step and (step.query_len, step.groups) for step in taken] == [(40, 0), (35, 1), (1, 1)]
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("graph_seconds", "known"), [(0.0, [{5, 40}, {1, 35}, {1}]), (600.0, [None] * 3)], ids=["launches", "padded"]
)
def test_only_where_nothing_is_padded_kernels_are_left_out(
    graph_seconds: float, known: list[set[int] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {"max_mixed_prompt_tokens": 40, "max_step_tokens": 80}
    _, backend = backends(traits=False, layers=1, graph_seconds=graph_seconds, **bounds)
    passed: list[frozenset[int] | None] = []

    def recorded(q: torch.Tensor, kv: PagedKv, rows: RaggedRows, **options: Any) -> torch.Tensor:
        passed.append(rows.query_lens)
        return paged_attention(q, kv, rows, **options)

    monkeypatch.setattr(triton_decoder, "paged_attention", recorded)
    run(backend, 40, [(list(range(5)), Generate(3)), (list(range(75)), Embed())])
    assert passed == known


def test_drawn_tokens_do_not_depend_on_padding() -> None:
    jobs = chats(Sampling(temperature=1.5, seed=1), Sampling(temperature=1.5, top_k=30, top_p=0.9, seed=7), Sampling())
    _, eager = backends(traits=False, layers=1)
    _, padded = backends(traits=False, layers=1, graph_seconds=600.0)
    assert run(padded, 2048, jobs)[1] == run(eager, 2048, jobs)[1]


def test_an_empty_bucket_computes_nothing_that_is_kept() -> None:
    """What a capture runs: all rows empty. It writes no page and no request's state."""
    _, backend = backends(traits=False, layers=1, graph_seconds=600.0)
    state = backend.graphs.state
    before = state.tokens[: state.spare_slot].clone()
    bounds = next(bucket for bucket in backend.graphs.buckets if bucket.groups and bucket.rows)
    empty = Batch(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), ())
    with torch.inference_mode():
        assert backend.graphs.run(empty, bounds) is not None
    assert torch.equal(state.tokens[: state.spare_slot], before)
    assert all(bool(kv.k.isnan().all()) and bool(kv.v.isnan().all()) for kv in backend.pool)


def test_the_time_budget_ends_the_capture_and_the_rest_runs_by_launches() -> None:
    _, backend = backends(traits=False, layers=1, graph_seconds=1e-9)
    assert not backend.graphs.buckets
    _, whole = backends(traits=False, layers=1)
    assert run(backend, 15, chats(Sampling()))[1] == run(whole, 15, chats(Sampling()))[1]


def test_compiling_is_not_counted_as_capturing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first run of each kind of step takes a hundred seconds of a budget of five."""
    _, backend = backends(traits=False, layers=1)
    now, seen = 0.0, set[tuple[bool, bool, bool]]()

    def program(step: KernelStep) -> Any:
        nonlocal now
        kind = step.bounds.rows > 0, step.bounds.query_len > 1, step.bounds.groups > 0
        now += 0.0 if kind in seen else 100.0
        seen.add(kind)

    monkeypatch.setattr(step_graphs.time, "perf_counter", lambda: now)
    graphs = StepGraphs(program, backend.graphs.state)
    buckets = graph_buckets(GraphLimits(rows=9, kv_len=128, page_size=16, query_group=2, steps=2, max_step_tokens=32))
    with caplog.at_level(logging.INFO, "shoplm.graphs"):
        graphs.capture(buckets, 5.0)
    assert len(graphs.buckets) == len(buckets) and len(seen) == 4
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"captured {len(buckets)} of {len(buckets)}" in caplog.text


@pytest.mark.parametrize("how", ["none is left", "one does not fit", "one does not fit into a capture"])
def test_a_capture_ends_where_the_memory_does(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what there is by then; the server starts."""
    _, backend = backends(traits=False, layers=1)
    left = iter([2 << 30] * 3 + [500 << 20])
    made: list[object] = []

    def captured(run: object) -> object:
        if len(made) == 3:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            except torch.OutOfMemoryError:
                if how == "one does not fit":
                    raise
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        made.append(run)
        return run

    if how == "none is left":
        monkeypatch.setattr(step_graphs, "unclaimed_bytes", lambda _: next(left))
    else:
        monkeypatch.setattr(step_graphs, "RunAgain", captured)
    graphs = StepGraphs(lambda _: None, backend.graphs.state)  # type: ignore[arg-type, return-value]
    buckets = graph_buckets(LIMITS)
    with caplog.at_level(logging.INFO, "shoplm.graphs"):
        graphs.capture(buckets, 600.0)
    assert graphs.buckets == buckets[:3]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"captured 3 of {len(buckets)}" in record.message and "lower kv_cache_mib" in record.message


def test_what_else_fails_in_a_capture_ends_the_start() -> None:
    _, backend = backends(traits=False, layers=1)

    def failing(_: KernelStep) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        StepGraphs(failing, backend.graphs.state).capture(graph_buckets(LIMITS), 600.0)


class InFlight:
    """A backend that shows how many steps wait for their results."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.most = self._now = 0

    @property
    def info(self) -> BackendInfo:
        return self._backend.info

    def lanes(self, select: Select) -> int:
        return self._backend.lanes(select)

    def submit(self, batch: Batch) -> Handle:
        self._now += 1
        self.most = max(self.most, self._now)
        handle = self._backend.submit(batch)

        class Taken:
            def result(inner) -> object:
                self._now -= 1
                return handle.result()

        return Taken()  # type: ignore[return-value]

    def close(self) -> None:
        self._backend.close()


def served(backend: Backend) -> dict[str, Output]:
    """All work through the engine, which keeps as many steps in flight as the backend says."""
    ticks = itertools.count()
    config = SchedulerConfig(max_step_tokens=64, max_mixed_prompt_tokens=20)
    engine = Engine(backend, config, lambda: float(next(ticks)) * 1e-6)
    services = {Generate: Service.CHAT, Select: Service.RECOMMENDATION, Predict: Service.PREDICTION}
    for index, (tokens, task) in enumerate(work()):
        service = services.get(type(task), Service.PREDICTION)
        engine.submit(Request(str(index), service, token_ids(tokens), task, 0.0, history_tokens=len(tokens)))
    tokens_of: dict[str, list[int]] = {}
    answers: dict[str, Output] = {}
    while not engine.is_idle:
        for output in by_request(engine.step()):
            assert not isinstance(output, FailedOutput), output
            if isinstance(output, TokensOutput):
                tokens_of.setdefault(output.request_id, []).extend(output.tokens)
            elif isinstance(output, FinishedOutput):
                drawn = tuple(tokens_of.get(output.request_id, ()))
                answers[output.request_id] = output.selected or output.values or drawn
    engine.scheduler.check()
    return answers


def test_two_steps_in_flight_give_the_answers_of_one() -> None:
    """Tokens, beams and their ancestors come from device memory: the host has not seen them when it plans on."""
    reference, backend = backends(traits=False, layers=1)
    watched = InFlight(backend)
    found = served(watched)
    assert watched.most == backend.info.pipeline_depth == 2
    expected = served(reference)
    assert len(expected) == len(work())
    for key, answer in expected.items():
        assert_same(answer, found[key])


class NeverWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for the device: reading a number, or a result whose size is data."""

    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert name not in self.WAITS and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph_seconds", [0.0, 600.0], ids=["launches", "padded"])
def test_no_step_waits_before_its_result_is_asked_for(graph_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of all services, first meetings of a filter among them. `tolist` reads memory without an operator, and a
    number that is put at places of the device waits within one."""
    _, backend = backends(traits=False, layers=1, graph_seconds=graph_seconds)
    submit = backend.submit

    def watched(batch: Batch) -> Handle:
        with NeverWaiting(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", _no_list, raising=False)
            patch.setattr(torch.Tensor, "__setitem__", _no_number)
            return submit(batch)

    monkeypatch.setattr(backend, "submit", watched)
    recorder, _ = run(backend, 15, work())
    assert len(recorder.steps) >= 7
    with torch.inference_mode(), NeverWaiting():
        for waits in (lambda: bool(torch.ones(1)), lambda: torch.ones(2)[torch.ones(2) > 0]):
            with pytest.raises(AssertionError, match="waits for the device"):
                waits()


def _no_list(tensor: torch.Tensor) -> None:
    raise AssertionError("a list of a tensor's numbers waits for the device")


_set_item = torch.Tensor.__setitem__


def _no_number(tensor: torch.Tensor, index: Any, value: Any) -> None:
    places = index if isinstance(index, tuple) else (index,)
    if not isinstance(value, torch.Tensor) and any(isinstance(place, torch.Tensor) for place in places):
        raise AssertionError("a number put at places of the device is copied there from memory that is not pinned")
    _set_item(tensor, index, value)
