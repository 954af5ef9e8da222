"""Times of the kernels: attention beside torch's in the same run, the others beside their floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import roofline
import torch
from roofline import MODELS, ModelShape, Work
from shoplm.kernels.attention import BeamGroups, RaggedRows, Workspace, beam_attention, paged_attention
from shoplm.kernels.beam_step import beam_step
from shoplm.kernels.beam_step_types import BeamBounds, BeamSelection, BeamWorkspace, TrieTables
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.kv_write import kv_write
from shoplm.kernels.norm import add_rms_norm
from shoplm.kernels.sample import SampleWorkspace, sample
from shoplm.kernels.swiglu import swiglu
from torch.nn import functional

from gpu_stages.common import Call, Stage, copies, median_us

INT8, FP8 = torch.int8, torch.float8_e4m3fn
PAGE = 16


def copy_bandwidth(stage: Stage) -> float:
    """Bytes read and written per second by a device copy: what decode is judged by. Kept as a row."""
    size = stage.size(2 << 30, 1 << 16)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=stage.device) for _ in range(2))

    def rate() -> float:
        return 2 * size / median_us([lambda: target.copy_(source)], smoke=stage.smoke, graphed=False) / 1e3

    return stage.measure("device copy", "GB/s", rate) or 0.0


def floor_share(stage: Stage, work: Work, microseconds: float) -> dict[str, Any]:
    """The fraction of the card's floor, where the card is one of the table's."""
    name = "" if stage.smoke else torch.cuda.get_device_name()
    card = next((card for key, card in roofline.CARDS.items() if key in name), None)
    return {} if card is None else {"floor_share": work.floor_microseconds(card) / microseconds}


def timed(stage: Stage, name: str, calls: list[Call], work: Work, **rest: Any) -> float | None:
    """A row in microseconds, with the share of the floor."""
    found: list[float] = []

    def once() -> float:
        found.append(median_us(calls, smoke=stage.smoke))
        rest["details"] = floor_share(stage, work, found[0])
        return found[0]

    try:
        microseconds = once()
    except Exception as error:
        stage.row(name, None, "us", passed=False, note=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return None
    target = rest.get("target")
    if target is not None and not stage.smoke:
        rest["passed"] = microseconds <= target
    stage.row(name, microseconds, "us", **rest)
    return microseconds


def pool(pages: int, model: ModelShape, dtype: torch.dtype, device: torch.device, page: int = PAGE) -> PagedKv:
    """Random keys and values."""
    shape = (pages, model.kv_heads, page, model.head_dim)
    if dtype not in (INT8, FP8):
        return PagedKv(torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype))
    values = [torch.randint(-100, 100, shape, device=device, dtype=torch.int8) for _ in range(2)]
    if dtype == FP8:
        values = [value.float().to(FP8) for value in values]
    scales = [torch.full(shape[:3], 0.02, device=device) for _ in range(2)]
    return PagedKv(*values, *scales)


def ragged(rows: int, new: int, kv_len: int, device: torch.device, page: int = PAGE) -> RaggedRows:
    """Rows of one length over random pages."""
    pages = -(-kv_len // page)
    return RaggedRows(
        page_table=torch.randperm(rows * pages, device=device).int().view(rows, pages),
        kv_len=torch.full((rows,), kv_len, dtype=torch.int32, device=device),
        query_start=torch.arange(0, rows * new + 1, new, dtype=torch.int32, device=device),
        max_query_len=new,
        max_kv_len=kv_len,
    )


def workspace(model: ModelShape, rows: int, kv_len: int, beams: int, device: torch.device) -> Workspace:
    """Scratch for one measurement."""
    return Workspace.allocate(
        device=device, max_rows=rows, max_kv_len=kv_len, max_beam_tokens=beams, q_heads=model.q_heads,
        kv_heads=model.kv_heads, head_dim=model.head_dim,
    )  # fmt: skip


def _queries(tokens: int, model: ModelShape, stage: Stage) -> torch.Tensor:
    return torch.randn(tokens, model.q_heads, model.head_dim, device=stage.device).to(stage.dtype)


# ---- prefill -------------------------------------------------------------------------------------------------------


def twin_of(kv: PagedKv, tokens: int) -> PagedKv:
    """The same pool read as one page that holds the whole row: the kernel's contiguous twin. Such a page is larger than
    any that a server has, so the check of page sizes is passed by."""
    twin = object.__new__(PagedKv)
    shape = (1, kv.kv_heads, tokens, kv.head_dim)
    for name, value in (("k", kv.k.view(shape)), ("v", kv.v.view(shape)), ("k_scale", None), ("v_scale", None)):
        object.__setattr__(twin, name, value)
    return twin


def prefill(stage: Stage) -> None:
    """Causal prompts of one row: TFLOP/s over random pages, of the contiguous twin, and of torch's attention."""
    for head_dim, aim in ((128, 400.0), (64, 330.0)):
        heads, kv_heads = stage.size(32, 4), stage.size(8, 2)
        model = ModelShape(f"d{head_dim}", heads * head_dim, heads, kv_heads, head_dim, 1, 1)
        for tokens in (48,) if stage.smoke else (8192, 16384):
            _prefill_rows(stage, model, tokens, aim)


def _prefill_rows(stage: Stage, model: ModelShape, tokens: int, aim: float) -> None:
    device = stage.device
    work = roofline.prefill(model, tokens)
    q, kv = _queries(tokens, model, stage), pool(tokens // PAGE, model, stage.dtype, device)
    out, scratch = torch.empty_like(q), workspace(model, 1, tokens, 0, device)
    rows = ragged(1, tokens, tokens, device)
    whole = replace(rows, page_table=torch.zeros(1, 1, dtype=torch.int32, device=device))

    def rate(call: Call) -> float:
        return work.tensor_flops / median_us([call], smoke=stage.smoke, rounds=10, graphed=False) / 1e6

    def paged(kv: PagedKv, rows: RaggedRows) -> float:
        return rate(lambda: paged_attention(q, kv, rows, out=out, workspace=scratch))

    name = f"prefill {model.name} {tokens}"
    found = stage.measure(name, "TFLOP/s", partial(paged, kv, rows), target=aim)
    others = {"twin": stage.measure(f"{name} contiguous twin", "TFLOP/s", lambda: paged(twin_of(kv, tokens), whole))}
    for backend in sdpa_backends(stage):
        others[backend] = stage.measure(f"{name} SDPA {backend}", "TFLOP/s", partial(_sdpa_rate, backend, q, rate))
    for other, least in (("twin", 0.90), ("cuDNN", 0.75)):
        value = others.get(other)
        if found and value:
            share = found / value
            stage.row(f"{name} / {other}", share, "share", target=least, passed=None if stage.smoke else share >= least)


def sdpa_backends(stage: Stage) -> tuple[str, ...]:
    """torch's attention backends to compare with."""
    return ("math",) if stage.smoke else ("flash", "cuDNN")


def _sdpa_rate(backend: str, q: torch.Tensor, rate: Callable[[Call], float]) -> float:
    """torch's attention on contiguous keys; each KV head repeated for its group, which every backend takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    heads = q.transpose(0, 1)[None].contiguous()
    k, v = (torch.randn_like(heads) for _ in range(2))

    def call() -> object:
        with sdpa_kernel(kinds[backend]):
            return functional.scaled_dot_product_attention(heads, k, v, is_causal=True)

    return rate(call)


# ---- decode, beams -------------------------------------------------------------------------------------------------


def decode(stage: Stage) -> None:
    """One new token per row: bytes per second beside those of a copy; and the same over quantised pools."""
    bandwidth = copy_bandwidth(stage)
    rows, kv_len = stage.size(64, 2), stage.size(4096, 40)
    for name in ("qwen3-1.7b", "smollm2-135m"):
        model = MODELS[name]
        for dtype in (stage.dtype, INT8) if stage.smoke else (stage.dtype, INT8, FP8):
            quantised = dtype in (INT8, FP8)
            work = roofline.decode(model, rows, kv_len, cache_bytes=1 if quantised else dtype.itemsize)
            calls = _decode_calls(stage, model, dtype, rows, kv_len, work.bytes)
            label = f"decode {name} {rows} x {kv_len} {str(dtype).removeprefix('torch.')}"
            microseconds = timed(stage, label, calls, work)
            if microseconds:
                rate = work.bytes / microseconds / 1e3
                share = rate / bandwidth if bandwidth else 0.0
                promised = 0.85 if name == "qwen3-1.7b" and not quantised else None
                passed = None if promised is None or stage.smoke else share >= promised
                details = {"GB/s": rate}
                stage.row(f"{label} / copy", share, "share", target=promised, passed=passed, details=details)


def _decode_calls(stage: Stage, model: ModelShape, dtype: torch.dtype, rows: int, kv_len: int, size: int) -> list[Call]:
    device = stage.device
    scratch = workspace(model, rows, kv_len, 0, device)
    calls: list[Call] = []
    for _ in range(copies(size, stage.smoke)):
        q, step = _queries(rows, model, stage), ragged(rows, 1, kv_len, device)
        kv = pool(step.page_table.numel(), model, dtype, device)
        out = torch.empty_like(q)
        calls.append(partial(paged_attention, q, kv, step, out=out, workspace=scratch))
    return calls


def beams(stage: Stage) -> None:
    """One layer's beam attention at the anchors' shapes, the last of three tokens."""
    model, width = MODELS["qwen3-1.7b"], stage.size(256, 4)
    for prompt, groups in ((33, 1),) if stage.smoke else ((1000, 1), (1000, 8), (5000, 1), (5000, 8)):
        work = roofline.beam(model, groups, width, prompt, 2)
        calls = [_beam_call(stage, model, groups, width, prompt) for _ in range(copies(work.bytes, stage.smoke))]
        timed(stage, f"beam attention {prompt} x {groups}, width {width}", calls, work)


def _beam_call(stage: Stage, model: ModelShape, groups: int, width: int, prompt: int) -> Call:
    device, steps = stage.device, 3
    pages, own = -(-prompt // PAGE), groups * steps * width
    q = _queries(groups * width, model, stage)
    out = torch.empty_like(q)
    kv = pool(groups * pages + -(-own // PAGE), model, stage.dtype, device)
    slots = groups * pages * PAGE + torch.randperm(own, device=device)

    def filled(value: int) -> torch.Tensor:
        return torch.full((groups,), value, dtype=torch.int32, device=device)

    step = BeamGroups(
        page_table=torch.randperm(groups * pages, device=device).int().view(groups, pages),
        prompt_len=filled(prompt),
        query_start=torch.arange(0, groups * width + 1, width, dtype=torch.int32, device=device),
        width=filled(width),
        step=filled(steps - 1),
        own_slots=slots.view(groups, steps, width).contiguous(),
        parents=torch.randint(0, width, (groups, steps, width), dtype=torch.int32, device=device),
        max_prompt_len=prompt,
    )
    scratch = workspace(model, 0, prompt, groups * width, device)
    return lambda: beam_attention(q, kv, step, out=out, workspace=scratch)


# ---- the other ops -------------------------------------------------------------------------------------------------


def ops(stage: Stage) -> None:
    """beam_step at a million items, sampling, and the element-wise ops."""
    _beam_steps(stage)
    for name in ("smollm2-135m", "qwen3-1.7b"):
        model = MODELS[name]
        if stage.smoke:
            model = replace(model, vocab=5000, hidden=128, features=256)
        for tokens in (3,) if stage.smoke else (64, 8192):
            _elementwise(stage, model, tokens)
        _sampling(stage, model, stage.size(64, 3))


def _beam_steps(stage: Stage) -> None:
    items, width = stage.size(1_000_000, 5000), stage.size(256, 16)
    one = torch.arange(items, dtype=torch.int32, device=stage.device)
    flat = TrieTables.build(torch.tensor([0, items], dtype=torch.int32, device=stage.device), one, one, one + 1)
    children = stage.size(256, 8)
    start = torch.arange(0, width * children + 1, children, dtype=torch.int32, device=stage.device)
    child = torch.arange(width * children, dtype=torch.int32, device=stage.device)
    deep = TrieTables.build(start, child % children, child, child + 1)
    for label, trie, live, target in (("flat", flat, 1, 50.0), ("deep", deep, width, 50.0)):
        for groups in (1, 8):
            work = roofline.beam_step(groups, live, trie.max_children, width)
            name = f"beam_step {label} {groups} x {live * trie.max_children} children, top {width}"
            calls = [_beam_step_call(stage, trie, groups, live, width) for _ in range(copies(work.bytes, stage.smoke))]
            timed(stage, name, calls, work, target=target if groups == 1 else None)


def _beam_step_call(stage: Stage, trie: TrieTables, groups: int, live: int, width: int) -> Call:
    device = stage.device
    logits = torch.randn(groups * live, trie.columns, device=device).to(stage.dtype)

    def filled(value: int) -> torch.Tensor:
        return torch.full((groups,), value, dtype=torch.int32, device=device)

    first = torch.arange(0, groups * live, live, dtype=torch.int32, device=device)
    nodes = torch.arange(live, dtype=torch.int32, device=device).repeat(groups, 1)
    scores, out = torch.zeros(groups, live, device=device), BeamSelection.allocate(groups, width, device)
    scratch = BeamWorkspace.allocate(BeamBounds.of(trie, groups, live, width), device)
    allowed = torch.arange(trie.items + 1, dtype=torch.int32, device=device)[None]
    counts = (filled(live), filled(width), filled(0))
    return lambda: beam_step(
        logits, first, trie, nodes, scores, counts[0], counts[1], max_select=width, allowed_cumsum=allowed,
        filter_row=counts[2], workspace=scratch, out=out,
    )  # fmt: skip


def _sampling(stage: Stage, model: ModelShape, rows: int) -> None:
    device, work = stage.device, roofline.sample(model, rows)
    scratch = SampleWorkspace.allocate(rows, model.vocab, device)
    for label, top_k, top_p, temperature in (
        ("greedy", 0, 1.0, 0.0),
        ("free", 0, 1.0, 0.8),
        ("top-k and top-p", 50, 0.9, 0.8),
    ):
        calls: list[Call] = []
        for at in range(copies(work.bytes, stage.smoke)):
            logits = (3 * torch.randn(rows, model.vocab, device=device)).to(stage.dtype)
            row = torch.arange(rows, device=device)
            settings = (
                torch.full((rows,), temperature, device=device),
                torch.full((rows,), top_k, dtype=torch.int32, device=device),
                torch.full((rows,), top_p, device=device),
                row + at,
                row.int(),
            )
            out = torch.empty(rows, dtype=torch.int64, device=device)
            calls.append(partial(sample, logits, *settings, workspace=scratch, out=out))
        timed(stage, f"sample {model.name} {rows} rows {label}", calls, work)


def _elementwise(stage: Stage, model: ModelShape, tokens: int) -> None:
    device, dtype = stage.device, stage.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    makers: dict[str, tuple[Work, Callable[[], Call]]] = {}
    weight = torch.ones(model.hidden, device=device, dtype=dtype)

    def norm_call() -> Call:
        x, residual, out = random(tokens, model.hidden), random(tokens, model.hidden), random(tokens, model.hidden)
        return lambda: add_rms_norm(x, residual, weight, 1e-5, out=out)

    def swiglu_call() -> Call:
        gate_up, out = random(tokens, 2 * model.features), random(tokens, model.features)
        return lambda: swiglu(gate_up, out=out)

    def kv_write_call() -> Call:
        fused = random(tokens, model.q_heads + 2 * model.kv_heads, model.head_dim)
        kv = pool(-(-tokens // PAGE), model, dtype, device)
        angles = torch.rand(tokens, model.head_dim // 2, device=device)
        slots, at = torch.randperm(tokens, device=device), torch.arange(tokens, dtype=torch.int32, device=device)
        q, k, v = fused[:, : model.q_heads], fused[:, model.q_heads : -model.kv_heads], fused[:, -model.kv_heads :]
        return lambda: kv_write(q, k, v, at, slots, kv, cos=angles, sin=angles)

    makers["norm"] = (roofline.norm(model, tokens), norm_call)
    makers["swiglu"] = (roofline.swiglu(model, tokens), swiglu_call)
    makers["kv_write"] = (roofline.kv_write(model, tokens), kv_write_call)
    for name, (work, make) in makers.items():
        timed(
            stage,
            f"{name} {model.name} {tokens} tokens",
            [make() for _ in range(copies(work.bytes, stage.smoke))],
            work,
        )
