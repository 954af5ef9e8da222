"""Times of the ops beside attention, each beside its floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import roofline
import torch
from roofline import MODELS, ModelShape, Work
from shoplm.kernels.attention import paged_attention
from shoplm.kernels.beam_step import beam_step
from shoplm.kernels.beam_step_types import BeamBounds, BeamSelection, BeamWorkspace, TrieTables
from shoplm.kernels.forks import fork_attention
from shoplm.kernels.inputs import WORD_BITS, ForkRows, packed_bits
from shoplm.kernels.kv_write import kv_write
from shoplm.kernels.norm import add_rms_norm
from shoplm.kernels.quantise_rows import quantise_rows
from shoplm.kernels.sample import SampleWorkspace, sample
from shoplm.kernels.span_mass import span_mass
from shoplm.kernels.swiglu import swiglu
from shoplm.kernels.weight_only import quantise, unpack, weight_only

from gpu_stages.common import Call, Stage
from gpu_stages.kernels import PAGE, pool, queries, ragged, timed, workspace


def ops(stage: Stage) -> None:
    """beam_step at a million items, the element-wise ops, sampling, products with few-bit weights, forks and spans."""
    _beam_steps(stage)
    for name in ("smollm2-135m", "qwen3-1.7b"):
        model = MODELS[name]
        if stage.smoke:
            model = replace(model, vocab=5000, hidden=128, features=256)
        for tokens in (3,) if stage.smoke else (64, 8192):
            _elementwise(stage, model, tokens)
        _sampling(stage, model, stage.size(64, 3))
    for bits in (8, 4):
        _weight_only(stage, bits)
    for rows in (stage.size(64, 3), stage.size(8192, 3)):
        _quantise_rows(stage, rows)
    _forks(stage)
    _span_mass(stage)


def _beam_steps(stage: Stage) -> None:
    items, width = stage.size(1_000_000, 5000), stage.size(256, 16)
    for groups in (1, 8):
        for label, live, children in (("flat", 1, items), ("deep", width, stage.size(256, 8))):
            work = roofline.beam_step(groups, live, children, width)
            name = f"beam_step {label} {groups} x {live * children} children, top {width}"
            make = partial(_beam_step_call, stage, groups, live, children, width)
            timed(stage, name, make, work, target=50.0 if groups == 1 else None)


def _trie(stage: Stage, nodes: int, children: int) -> TrieTables:
    """One level: `nodes` of `children` each."""
    start = torch.arange(0, nodes * children + 1, children, dtype=torch.int32, device=stage.device)
    child = torch.arange(nodes * children, dtype=torch.int32, device=stage.device)
    return TrieTables.build(start, child % children, child, child + 1)


def _beam_step_call(stage: Stage, groups: int, live: int, children: int, width: int) -> Call:
    """On tables, logits and a filter of its own."""
    device, trie = stage.device, _trie(stage, live, children)
    logits = torch.randn(groups * live, trie.columns, device=device)  # fp32, as the backend's products give them

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

    def call(top_k: int, top_p: float, temperature: float) -> Call:
        logits = (3 * torch.randn(rows, model.vocab, device=device)).to(stage.dtype)
        row = torch.arange(rows, device=device)
        settings = (
            torch.full((rows,), temperature, device=device),
            torch.full((rows,), top_k, dtype=torch.int32, device=device),
            torch.full((rows,), top_p, device=device),
            row,
            row.int(),
        )
        out = torch.empty(rows, dtype=torch.int64, device=device)
        return partial(
            sample, logits, *settings, workspace=SampleWorkspace.allocate(rows, model.vocab, device), out=out
        )

    for label, top_k, top_p, temperature in (
        ("greedy", 0, 1.0, 0.0),
        ("free", 0, 1.0, 0.8),
        ("top-k and top-p", 50, 0.9, 0.8),
    ):
        make = partial(call, top_k, top_p, temperature)
        timed(stage, f"sample {model.name} {rows} rows {label}", make, work)


def _elementwise(stage: Stage, model: ModelShape, tokens: int) -> None:
    device, dtype = stage.device, stage.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    makers: dict[str, tuple[Work, Callable[[], Call]]] = {}

    def norm_call() -> Call:
        weight = torch.ones(model.hidden, device=device, dtype=dtype)
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
        timed(stage, f"{name} {model.name} {tokens} tokens", make, work)


def _weight_only(stage: Stage, bits: int) -> None:
    """The largest product of a 1.7B model's layer, for one row and for a batch of chats; and its weight unpacked, as
    for more rows."""
    outputs, inputs = stage.size(12_288, 96), stage.size(2048, 128)

    def product(rows: int) -> Call:
        weight = quantise(torch.randn(outputs, inputs, device=stage.device), bits)
        x = torch.randn(rows, inputs, device=stage.device).to(stage.dtype)
        out = torch.empty(rows, outputs, device=stage.device, dtype=stage.dtype)
        return partial(weight_only, x, weight, out=out)

    def unpacking() -> Call:
        weight = quantise(torch.randn(outputs, inputs, device=stage.device), bits)
        out = torch.empty(outputs, inputs, device=stage.device, dtype=stage.dtype)
        return partial(unpack, weight, stage.dtype, out=out)

    for rows in (1, stage.size(64, 3)):
        work = roofline.weight_only(outputs, inputs, rows, bits)
        timed(stage, f"weight_only int{bits} {outputs} x {inputs}, {rows} rows", partial(product, rows), work)
    timed(stage, f"unpack int{bits} {outputs} x {inputs}", unpacking, roofline.unpack(outputs, inputs, bits))


def _quantise_rows(stage: Stage, rows: int) -> None:
    """The input of the widest product of a 1.7B model's layer, in e4m3."""
    columns = stage.size(6144, 128)

    def call() -> Call:
        x = torch.randn(rows, columns, device=stage.device).to(stage.dtype)
        values = torch.empty(rows, columns, device=stage.device, dtype=torch.float8_e4m3fn)
        scale = torch.empty(rows, 1, device=stage.device)
        return partial(quantise_rows, x, values=values, scale=scale)

    work = roofline.quantise_rows(rows, columns)
    timed(stage, f"quantise_rows {rows} x {columns}", call, work, fp8=True)


def _forks(stage: Stage) -> None:
    """One explained prompt: 33 forks of four tokens, each without another part of the history."""
    model, device = MODELS["qwen3-1.7b"], stage.device
    forks, suffix, history = stage.size(33, 3), 4, stage.size(1024, 40)
    new = forks * suffix
    kv_len = history + new
    work = roofline.forks(model, 1, new, history)
    at = np.arange(new)
    own = np.arange(kv_len) - history
    readable = (own < 0) | ((own <= at[:, None]) & (own >= (at - at % suffix)[:, None]))
    readable[:, :history] &= np.arange(history) // 16 != (at // suffix)[:, None]
    words = torch.from_numpy(packed_bits(readable, -(-kv_len // WORD_BITS)))[None]
    position = torch.from_numpy((history + at % suffix).astype(np.int32))[None]

    def call() -> Call:
        q, step = queries(new, model, stage), ragged(1, new, kv_len, device)
        kv = pool(step.page_table.numel(), model, stage.dtype, device)
        first, count = step.query_start[:1], torch.full((1,), new, dtype=torch.int32, device=device)
        rows = ForkRows(step.page_table, step.kv_len, first, count, position.to(device), words.to(device))
        return partial(fork_attention, q, kv, rows, out=torch.empty_like(q))

    timed(stage, f"forks {forks} x {suffix} tokens behind {history}", call, work)


def _span_mass(stage: Stage) -> None:
    """Whole prompts in spans, as an explanation cuts them."""
    model, device = MODELS["qwen3-1.7b"], stage.device
    rows, kv_len, spans = stage.size(8, 1), stage.size(4096, 40), stage.size(64, 4)
    work = roofline.span_mass(model, rows, kv_len, spans)

    def call() -> Call:
        cuts = torch.linspace(0, kv_len, spans + 1, device=device).int().repeat(rows, 1)
        ids, start, end = torch.arange(rows, device=device).int(), cuts[:, :-1].contiguous(), cuts[:, 1:].contiguous()
        q, step = queries(rows, model, stage), ragged(rows, 1, kv_len, device)
        kv = pool(step.page_table.numel(), model, stage.dtype, device)
        lse, scratch = torch.empty(q.shape[:2], device=device), workspace(model, rows, kv_len, 0, device)
        paged_attention(q, kv, step, out=torch.empty_like(q), workspace=scratch, lse=lse)
        out = torch.empty(rows, model.kv_heads, spans, device=device)
        return partial(span_mass, q, kv, step, lse, ids, start, end, out=out)

    timed(stage, f"span_mass {rows} x {kv_len}, {spans} spans", call, work)
