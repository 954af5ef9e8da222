"""Every op on the card against its specification: bf16 and fp16 activations, every pool, real sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from attention_cases import Row as Lengths
from attention_cases import Shape, assert_close, check_attention, make_beam_case, make_case
from shoplm.kernels import reference, reference_ops
from shoplm.kernels.attention import beam_attention, paged_attention
from shoplm.kernels.beam_step import beam_step
from shoplm.kernels.beam_step_types import TrieTables, allowed_prefix
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.kv_write import kv_write
from shoplm.kernels.norm import add_rms_norm, rms_norm
from shoplm.kernels.sample import sample
from shoplm.kernels.span_mass import span_mass
from shoplm.kernels.swiglu import swiglu

from gpu_stages.common import Stage

BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn

# Every head size, group, page size, dtype and pool at least once; each combination compiles its own kernels.
SHAPES = (
    Shape(64, 3, 3, 16, BF16),
    Shape(64, 7, 2, 64, BF16),
    Shape(64, 1, 4, 32, FP16),
    Shape(96, 4, 2, 32, BF16),
    Shape(128, 2, 8, 16, BF16),
    Shape(128, 8, 2, 64, FP16),
    Shape(128, 16, 1, 32, BF16),
    Shape(256, 4, 2, 32, BF16),
    Shape(64, 3, 3, 16, BF16, INT8),
    Shape(128, 2, 8, 16, BF16, FP8),
    Shape(128, 7, 4, 64, BF16, INT8),
    Shape(256, 1, 2, 16, FP16, FP8),
)


def attention(stage: Stage, part: int = 0, parts: int = 1) -> None:
    """Rows of every kind in one launch, and beams. `part` of `parts`: the shapes' share of one process."""
    torch.set_default_device(stage.device)
    torch.manual_seed(part)
    shapes = (Shape(64, 4, 2, 16),) if stage.smoke else SHAPES[part::parts]
    for at, shape in enumerate(shapes):
        window = 77 if at % 3 == 2 else None
        stage.check(f"attention {_name(shape)}", partial(_rows, stage, shape, window))
        stage.check(f"beam {_name(shape)}", partial(_beams, stage, shape, window))


def _name(shape: Shape) -> str:
    pool = shape.dtype if shape.kv_dtype is None else shape.kv_dtype
    kinds = f"{shape.dtype} {pool}".replace("torch.", "")
    return f"d{shape.head_dim} g{shape.group} p{shape.page_size} {kinds}"


def _rows(stage: Stage, shape: Shape, window: int | None) -> None:
    """Single tokens over several splits, short chunks, prompts with and without a prefix, empty rows; then spans."""
    page = shape.page_size
    rows: list[Lengths] = [(1, 1), (1, page), (1, page + 1), (3, 40), (0, 9), (80, 80), (65, 130)]
    if not stage.smoke:
        rows += [(1, 2000), (2, 1500), (300, 1300), (1, 513), (1, 512), (700, 700)]
    case = make_case(shape, rows)
    paged_attention(case.q, case.kv, case.rows, out=case.out, workspace=case.workspace, window=window, lse=case.lse)
    check_attention(case, window=window)
    ids, start, end = (torch.tensor(values, dtype=torch.int32) for values in ([5, 6], [[0, 9]] * 2, [[9, 80]] * 2))
    mass = torch.full((2, shape.kv_heads, 2), torch.nan)
    span_mass(case.q, case.kv, case.rows, case.lse, ids, start, end, out=mass, window=window)
    want = reference.span_mass(case.q, case.kv, case.rows, ids, start, end, window=window)
    torch.testing.assert_close(mass, want, rtol=0, atol=5e-3)


def _beams(stage: Stage, shape: Shape, window: int | None) -> None:
    page = shape.page_size
    groups = [(page - 1, 3, 0), (page, 5, 1), (page + 1, 1, 2)]
    if not stage.smoke:
        groups += [(700, 64, 1), (1100, 100, 2), (64, 17, 1)]
    case = make_beam_case(shape, groups)
    beam_attention(case.q, case.kv, case.beams, out=case.out, workspace=case.workspace, window=window)
    want = reference.beam_attention(case.q, case.kv, case.beams, window=window)
    owned = case.owned
    assert_close(case.out[owned], want[owned], want[owned].to(case.q.dtype))
    if not bool(case.out[~owned].isnan().all()):
        raise AssertionError("a token of no beam was written")


def ops(stage: Stage) -> None:
    """The element-wise, sampling and search ops."""
    torch.set_default_device(stage.device)
    torch.manual_seed(1)
    for dtype in (torch.float32,) if stage.smoke else (BF16, FP16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        stage.check(f"norm {name}", partial(_norm, dtype))
        stage.check(f"swiglu {name}", partial(_swiglu, dtype))
        stage.check(f"sample {name}", partial(_sample, stage, dtype))
        stage.check(f"beam_step {name}", partial(_beam_step, stage, dtype))
        for pool in (dtype, INT8, *(() if stage.smoke else (FP8,))):
            pool_name = str(pool).removeprefix("torch.")
            stage.check(f"kv_write {name} to {pool_name}", partial(_kv_write, dtype, pool))


def _close(found: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Up to two units in the last place of the stored result: both sides sum in fp32, in another order."""
    unit = {torch.float32: 1e-6, FP16: 2.0**-10, BF16: 2.0**-7}[dtype]
    torch.testing.assert_close(found.float(), want.float(), rtol=2 * unit, atol=2 * unit)


def _norm(dtype: torch.dtype) -> None:
    for tokens, hidden in ((1, 576), (17, 2048), (5, 3584)):
        x, residual = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
        weight = (1 + 0.1 * torch.randn(hidden)).to(dtype)
        _close(rms_norm(x, weight, 1e-5), reference_ops.rms_norm(x, weight, 1e-5), dtype)
        copy = residual.clone()
        _close(add_rms_norm(x, residual, weight, 1e-5), reference_ops.add_rms_norm(x, copy, weight, 1e-5), dtype)
        _close(residual, copy, dtype)


def _swiglu(dtype: torch.dtype) -> None:
    for tokens, features in ((1, 1536), (33, 4864)):
        gate_up = (3 * torch.randn(tokens, 2 * features)).to(dtype)
        _close(swiglu(gate_up), reference_ops.swiglu(gate_up), dtype)


def _kv_write(dtype: torch.dtype, pool: torch.dtype) -> None:
    for head_dim, kv_heads, group, norm in ((64, 3, 3, False), (128, 4, 2, True), (96, 2, 4, True), (256, 1, 4, False)):
        tokens, pages, page = 19, 3, 16
        fused = torch.randn(tokens, kv_heads * (group + 2), head_dim).to(dtype)
        q, k, v = fused[:, : kv_heads * group], fused[:, kv_heads * group : -kv_heads], fused[:, -kv_heads:]
        angles = torch.rand(64, head_dim // 2)
        weights = [(1 + 0.1 * torch.randn(head_dim)).to(dtype) if norm else None for _ in range(2)]
        slots = torch.randperm(pages * page)[:tokens]
        slots[3] = -1
        positions = torch.randint(0, 64, (tokens,), dtype=torch.int32)
        keywords: dict[str, Any] = {
            "cos": angles.cos(),
            "sin": angles.sin(),
            "q_norm_weight": weights[0],
            "k_norm_weight": weights[1],
        }
        found, want = (_empty_pool(pages, kv_heads, page, head_dim, pool) for _ in range(2))
        want_q = reference_ops.kv_write(q, k, v, positions, slots, want, **keywords)
        _close(kv_write(q, k, v, positions, slots, found, **keywords, q_out=torch.empty_like(q)), want_q, dtype)
        for name in ("k", "v"):
            scales = [getattr(side, f"{name}_scale") for side in (found, want)]
            stored = [
                reference.dequantise(getattr(side, name), scale)
                for side, scale in zip((found, want), scales, strict=True)
            ]
            # A value that is rounded the other way is off by one step of the pool's grid.
            step = {INT8: 6.0 / 127, FP8: 6.0 / 16}.get(pool, 0.0)
            limit = max(step, 2 * {torch.float32: 1e-6, FP16: 2.0**-10, BF16: 2.0**-7}[dtype] * 6)
            torch.testing.assert_close(stored[0], stored[1], rtol=0, atol=limit)


def _empty_pool(pages: int, kv_heads: int, page: int, head_dim: int, dtype: torch.dtype) -> PagedKv:
    shape = (pages, kv_heads, page, head_dim)
    quantised = dtype in (INT8, FP8)
    scales = [torch.zeros(shape[:3]) if quantised else None for _ in range(2)]
    return PagedKv(torch.zeros(shape).to(dtype), torch.zeros(shape).to(dtype), *scales)


def _sample(stage: Stage, dtype: torch.dtype) -> None:
    """Greedy and every filter; logits on a coarse grid, where ties are common. Rows whose winner the noise's last bits
    decide differ between log implementations; none of these does."""
    rows, vocab = 24, stage.size(151_936, 5000)
    logits = (torch.randn(rows, vocab) * 4).round(decimals=1).to(dtype)
    index = torch.arange(rows)
    arguments = (
        logits,
        torch.where(index % 4 == 0, 0.0, 0.5 + 0.1 * (index % 7)).float(),
        torch.where(index % 3 == 0, 0, 40).int(),
        torch.where(index % 2 == 0, 1.0, 0.9).float(),
        index * 7919,
        index * 3,
    )
    found, want = sample(*arguments), reference_ops.sample(*arguments)
    different = int((found != want).sum())
    if different > 1:
        raise AssertionError(f"{different} of {rows} tokens differ from the specification's")


def _beam_step(stage: Stage, dtype: torch.dtype) -> None:
    """A flat catalogue with other terms and filters, and a deep level; the logits are distinct in every dtype."""
    items = stage.size(100_000, 6000)
    one = torch.arange(items, dtype=torch.int32)
    flat = TrieTables.build(torch.tensor([0, items], dtype=torch.int32), one, one, one + 1)
    logits = torch.randn(2, items).to(dtype)
    counts = [torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [1, 1], [100, 7])]
    keywords = {
        "max_select": 128,
        "allowed_cumsum": allowed_prefix(torch.rand(2, items) < 0.5),
        "filter_row": torch.tensor([1, 0], dtype=torch.int32),
        "bonus": torch.randn(2, items) * 2,
        "bonus_row": torch.tensor([0, 1], dtype=torch.int32),
    }
    root = (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1))
    arguments = (logits, counts[0], flat, *root, counts[1], counts[2])
    found, want = beam_step(*arguments, **keywords), reference_ops.beam_step(*arguments, **keywords)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-4)
    children, nodes = 200, 64
    child = torch.arange(children * nodes, dtype=torch.int32)
    start = torch.arange(0, children * nodes + 1, children, dtype=torch.int32)
    deep = TrieTables.build(start, child % children, child, child + 1)
    beams = torch.randperm(nodes).int()[None]
    deep_arguments = (
        torch.randn(nodes, children).to(dtype), torch.zeros(1, dtype=torch.int32), deep, beams, -torch.rand(1, nodes),
        torch.tensor([nodes], dtype=torch.int32), torch.tensor([50], dtype=torch.int32),
    )  # fmt: skip
    found, want = beam_step(*deep_arguments, max_select=64), reference_ops.beam_step(*deep_arguments, max_select=64)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-4)
