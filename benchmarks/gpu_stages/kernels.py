"""Times of attention: prompts beside torch's in the same run, decode beside a copy, beams beside their floor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import roofline
import torch
from roofline import MODELS, ModelShape, Work
from shoplm.kernels.attention import (
    BeamGroups,
    RaggedRows,
    Workspace,
    beam_attention,
    paged_attention,
    score_scale_of,
)
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.prefill import prefill_attention
from shoplm.kernels.tile_config import SHORT_ROWS, arch_of, tile_config
from torch.nn import functional

from gpu_stages.common import L2_BYTES, Call, Stage, copies, median_us

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
    card = None if stage.smoke else roofline.card_of(torch.cuda.get_device_name())
    return {} if card is None else {"floor_share": work.floor_microseconds(card) / microseconds}


def timed(stage: Stage, name: str, make: Callable[[], Call], work: Work, **rest: Any) -> float | None:
    """A row in microseconds, with the share of the floor. `make`: a call with inputs of its own, `copies` of which are
    made."""
    number = copies(work.bytes, stage.smoke)
    if number * work.bytes < L2_BYTES and not stage.smoke:
        rest["note"] = "inputs may stay in L2"
    details: dict[str, Any] = {}

    def once() -> float:
        microseconds = median_us([make() for _ in range(number)], smoke=stage.smoke)
        details.update(floor_share(stage, work, microseconds))
        return microseconds

    return stage.measure(name, "us", once, details=details, **rest)


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
    """Rows of one length over random pages. Their new tokens are known, as where a server launches without a graph: no
    kernel that they do not need is compiled or measured."""
    pages = -(-kv_len // page)
    return RaggedRows(
        page_table=torch.randperm(rows * pages, device=device).int().view(rows, pages),
        kv_len=torch.full((rows,), kv_len, dtype=torch.int32, device=device),
        query_start=torch.arange(0, rows * new + 1, new, dtype=torch.int32, device=device),
        max_query_len=new,
        max_kv_len=kv_len,
        query_lens=frozenset({new}),
    )


def workspace(model: ModelShape, rows: int, kv_len: int, beams: int, device: torch.device) -> Workspace:
    """Scratch for one measurement."""
    return Workspace.allocate(
        device=device, max_rows=rows, max_kv_len=kv_len, max_beam_tokens=beams, q_heads=model.q_heads,
        kv_heads=model.kv_heads, head_dim=model.head_dim,
    )  # fmt: skip


def queries(tokens: int, model: ModelShape, stage: Stage) -> torch.Tensor:
    """Random queries."""
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
    """Causal prompts of one row: TFLOP/s over random pages, then of what each is compared with: torch's attention, and
    the contiguous twin, which compiles for each length anew."""
    prompts = []
    for head_dim, aim in ((128, 400.0), (64, 330.0)):
        heads, kv_heads = stage.size(32, 4), stage.size(8, 2)
        model = ModelShape(f"d{head_dim}", heads * head_dim, heads, kv_heads, head_dim, 1, 1)
        prompts += [_Prompt(stage, model, tokens, aim) for tokens in ((48,) if stage.smoke else (8192, 16384))]
    for backend, least in (("math", None),) if stage.smoke else (("cuDNN", 0.75), ("flash", None)):
        for prompt in prompts:
            prompt.beside(f"SDPA {backend}", partial(prompt.sdpa_rate, backend), least)
    for prompt in prompts:
        prompt.beside("contiguous twin", prompt.twin_rate, 0.90)


class _Prompt:
    """One shape's inputs, made when a measurement first asks for them, and its rate, which is measured at once."""

    def __init__(self, stage: Stage, model: ModelShape, tokens: int, aim: float) -> None:
        self._stage, self._name = stage, f"prefill {model.name} {tokens}"
        self._work, self._model, self._tokens = roofline.prefill(model, tokens), model, tokens
        self._found = stage.measure(self._name, "TFLOP/s", self._paged_rate, target=aim)

    @functools.cached_property
    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, PagedKv, RaggedRows]:
        """Queries, outputs, keys and values, and the row."""
        stage, tokens = self._stage, self._tokens
        q, kv = queries(tokens, self._model, stage), pool(tokens // PAGE, self._model, stage.dtype, stage.device)
        return q, torch.empty_like(q), kv, ragged(1, tokens, tokens, stage.device)

    def _rate(self, call: Call) -> float:
        """TFLOP/s of a call that does this prompt's work."""
        return self._work.tensor_flops / median_us([call], smoke=self._stage.smoke, rounds=10, graphed=False) / 1e6

    def twin_rate(self) -> float:
        """Of the contiguous twin: the prompt's kernel alone, since its page size compiles each kernel anew."""
        q, out, kv, rows = self._inputs
        rows = replace(rows, page_table=torch.zeros(1, 1, dtype=torch.int32, device=q.device))
        twin, arch = twin_of(kv, self._tokens), arch_of(q.device)
        tile = tile_config(arch, kv.head_dim, q.dtype, 2 * SHORT_ROWS, kv.quantised)
        scale = score_scale_of(None, kv.head_dim)
        return self._rate(
            lambda: prefill_attention(q, twin, rows, out, tile=tile, score_scale=scale, window=None, lse=None)
        )

    def sdpa_rate(self, backend: str) -> float:
        """Of torch's attention on contiguous keys; each KV head repeated for its group, which every backend takes."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
        heads = self._inputs[0].transpose(0, 1)[None].contiguous()
        k, v = (torch.randn_like(heads) for _ in range(2))

        def call() -> object:
            with sdpa_kernel(kinds[backend]):
                return functional.scaled_dot_product_attention(heads, k, v, is_causal=True)

        return self._rate(call)

    def beside(self, other: str, measurement: Callable[[], float], least: float | None) -> None:
        """A row of what the prompt is compared with, and one of its share of that where `least` is promised."""
        value = self._stage.measure(f"{self._name} {other}", "TFLOP/s", measurement)
        if self._found and value and least is not None:
            share = self._found / value
            passed = None if self._stage.smoke else share >= least
            self._stage.row(f"{self._name} / {other}", share, "share", target=least, passed=passed)

    def _paged_rate(self) -> float:
        q, out, kv, rows = self._inputs
        scratch = workspace(self._model, 1, self._tokens, 0, q.device)
        return self._rate(lambda: paged_attention(q, kv, rows, out=out, workspace=scratch))


# ---- decode, beams -------------------------------------------------------------------------------------------------


def decode(stage: Stage) -> None:
    """One new token per row: bytes per second beside those of a copy; and the same over quantised pools."""
    bandwidth = copy_bandwidth(stage)
    rows, kv_len = stage.size(64, 2), stage.size(4096, 40)
    for dtype in (stage.dtype, INT8) if stage.smoke else (stage.dtype, INT8, FP8):
        for name in ("qwen3-1.7b", "smollm2-135m"):
            model = MODELS[name]
            quantised = dtype in (INT8, FP8)
            work = roofline.decode(model, rows, kv_len, cache_bytes=1 if quantised else dtype.itemsize)
            make = partial(_decode_call, stage, model, dtype, rows, kv_len)
            label = f"decode {name} {rows} x {kv_len} {str(dtype).removeprefix('torch.')}"
            microseconds = timed(stage, label, make, work, fp8=dtype == FP8)
            if microseconds:
                rate = work.bytes / microseconds / 1e3
                share = rate / bandwidth if bandwidth else 0.0
                promised = 0.85 if name == "qwen3-1.7b" and not quantised else None
                passed = None if promised is None or stage.smoke else share >= promised
                details = {"GB/s": rate}
                stage.row(f"{label} / copy", share, "share", target=promised, passed=passed, details=details)


def _decode_call(stage: Stage, model: ModelShape, dtype: torch.dtype, rows: int, kv_len: int) -> Call:
    device = stage.device
    q, step = queries(rows, model, stage), ragged(rows, 1, kv_len, device)
    kv, scratch = pool(step.page_table.numel(), model, dtype, device), workspace(model, rows, kv_len, 0, device)
    return partial(paged_attention, q, kv, step, out=torch.empty_like(q), workspace=scratch)


def beams(stage: Stage) -> None:
    """One layer's beam attention at the anchors' shapes, the last of three tokens."""
    model, width = MODELS["qwen3-1.7b"], stage.size(256, 4)
    for prompt, groups in ((33, 1),) if stage.smoke else ((1000, 1), (1000, 8), (5000, 1), (5000, 8)):
        work = roofline.beam(model, groups, width, prompt, 2)
        make = partial(_beam_call, stage, model, groups, width, prompt)
        timed(stage, f"beam attention {prompt} x {groups}, width {width}", make, work)


def _beam_call(stage: Stage, model: ModelShape, groups: int, width: int, prompt: int) -> Call:
    device, steps = stage.device, 3
    pages, own = -(-prompt // PAGE), groups * steps * width
    q = queries(groups * width, model, stage)
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
