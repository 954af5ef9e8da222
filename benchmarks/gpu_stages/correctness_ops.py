"""The other ops on the card: element-wise ones and products against fp64, sampling and search against their
specification."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from shoplm.kernels import reference, reference_ops
from shoplm.kernels.beam_step import beam_step
from shoplm.kernels.beam_step_types import TrieTables, allowed_prefix
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.kv_write import kv_write
from shoplm.kernels.norm import add_rms_norm, rms_norm
from shoplm.kernels.quantise_rows import quantise_rows
from shoplm.kernels.sample import sample
from shoplm.kernels.swiglu import swiglu
from shoplm.kernels.weight_only import dequantise, quantise, unpack, weight_only
from torch.nn import functional

from gpu_stages.common import Stage

BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
EPS = 1e-5


def ops(stage: Stage) -> None:
    """Each in every dtype of activations, and every pool."""
    torch.set_default_device(stage.device)
    torch.manual_seed(1)
    for dtype in (torch.float32,) if stage.smoke else (BF16, FP16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        stage.check(f"norm {name}", partial(_norm, dtype))
        stage.check(f"swiglu {name}", partial(_swiglu, dtype))
        for bits in (8, 4):
            stage.check(f"weight_only {name} int{bits}", partial(_weight_only, dtype, bits))
        stage.check(f"quantise_rows {name}", partial(_quantise_rows, dtype), fp8=True)
        stage.check(f"sample {name}", partial(_sample, stage, dtype))
        stage.check(f"beam_step {name}", partial(_beam_step, stage, dtype))
        for pool in (dtype, INT8, *(() if stage.smoke else (FP8,))):
            pool_name = str(pool).removeprefix("torch.")
            stage.check(f"kv_write {name} to {pool_name}", partial(_kv_write, dtype, pool), fp8=pool == FP8)


def _judge(found: torch.Tensor, exact: torch.Tensor, in_dtype: torch.Tensor) -> None:
    """Largest error against fp64 at most three times torch's in the same dtype, or one unit in the last place of the
    largest value, since torch may round every number of a small case as it is best."""
    if found.isnan().any():
        raise AssertionError("an output was not written")
    error, torchs = (float((side.double() - exact).abs().max()) for side in (found, in_dtype))
    allowed = max(3 * torchs, torch.finfo(found.dtype).eps * float(exact.abs().max()))
    if error > allowed:
        raise AssertionError(f"error {error:.3g} against fp64, allowed {allowed:.3g}")


def _norm(dtype: torch.dtype) -> None:
    for tokens, hidden in ((1, 576), (17, 2048), (5, 3584)):
        x, residual = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
        weight = (1 + 0.1 * torch.randn(hidden)).to(dtype)
        total = (x.float() + residual.float()).to(dtype)
        for values, found in (
            (x, rms_norm(x, weight, EPS)),
            (total, add_rms_norm(x, residual, weight, EPS)),
        ):
            exact = functional.rms_norm(values.double(), (hidden,), weight.double(), EPS)
            _judge(found, exact, functional.rms_norm(values, (hidden,), weight, EPS))
        if not torch.equal(residual, total):
            raise AssertionError("the residual is not the rounded sum")


def _swiglu(dtype: torch.dtype) -> None:
    for tokens, features in ((1, 1536), (33, 4864)):
        gate_up = (3 * torch.randn(tokens, 2 * features)).to(dtype)
        (gate, up), (gate64, up64) = gate_up.chunk(2, -1), gate_up.double().chunk(2, -1)
        _judge(swiglu(gate_up), functional.silu(gate64) * up64, functional.silu(gate) * up)


def _weight_only(dtype: torch.dtype, bits: int) -> None:
    """A row, a tile and more, each against the product with the weight that the format stands for; and that weight."""
    for rows, outputs, inputs in ((1, 960, 576), (16, 576, 1536), (50, 130, 2048)):
        weight = quantise(torch.randn(outputs, inputs) * inputs**-0.5, bits)
        x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
        exact = x.double() @ dequantise(weight, torch.float32).double().t() + bias.double()
        in_dtype = functional.linear(x, dequantise(weight, dtype), bias)
        _judge(weight_only(x, weight, bias), exact, in_dtype)
        _judge(unpack(weight, dtype), dequantise(weight, torch.float32).double(), dequantise(weight, dtype))


def _quantise_rows(dtype: torch.dtype) -> None:
    """A few chats' rows and a prompt's, of a small model and of the widest layer: the specification's numbers."""
    for rows, columns in ((1, 576), (17, 2048), (300, 6144), (5, 18_944)):
        x = (torch.randn(rows, columns) * torch.rand(rows, 1) * 9).to(dtype)
        values, scale = quantise_rows(x)
        want, want_scale = reference.quantise_rows(x.cpu())
        if not torch.equal(scale.cpu(), want_scale):
            raise AssertionError("a scale differs from the specification's")
        different = int((values.cpu().float() != want.float()).sum())
        if different:
            raise AssertionError(f"{different} of {values.numel()} stored numbers differ from the specification's")


def _rotated(x: torch.Tensor, angle: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """QK-norm and RoPE of [tokens, heads, head_dim], every step in `dtype`."""
    wide = x.to(dtype)
    if weight is not None:
        wide = functional.rms_norm(wide, wide.shape[-1:], weight.to(dtype), EPS)
    return reference_ops.rotate(wide, angle.cos().to(dtype), angle.sin().to(dtype))


def _kv_write(dtype: torch.dtype, pool: torch.dtype) -> None:
    """Queries and, where the pool is not quantised, keys against fp64; else keys within a step of their own grid."""
    for head_dim, kv_heads, group, norm in ((64, 3, 3, False), (128, 4, 2, True), (96, 2, 4, True), (256, 1, 4, False)):
        tokens, pages, page = 19, 3, 16
        fused = torch.randn(tokens, kv_heads * (group + 2), head_dim).to(dtype)
        q, k, v = fused[:, : kv_heads * group], fused[:, kv_heads * group : -kv_heads], fused[:, -kv_heads:]
        table = torch.rand(64, head_dim // 2)
        weights = [(1 + 0.1 * torch.randn(head_dim)).to(dtype) if norm else None for _ in range(2)]
        slots, positions = torch.randperm(pages * page)[:tokens], torch.randint(0, 64, (tokens,), dtype=torch.int32)
        kv = _empty_pool(pages, kv_heads, page, head_dim, pool)
        keywords: dict[str, Any] = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "norm_eps": EPS}
        kept = slots.clone()
        kept[3] = -1
        turned = kv_write(
            q, k, v, positions, kept, kv, cos=table.cos(), sin=table.sin(), q_out=torch.empty_like(q), **keywords
        )
        angle = table[positions.long()]
        _judge(turned, _rotated(q, angle.double(), weights[0], torch.float64), _rotated(q, angle, weights[0], dtype))
        written = torch.arange(tokens) != 3
        stored_k, stored_v = (part[written] for part in reference.gather_slots(kv, slots))
        exact_k = _rotated(k, angle.double(), weights[1], torch.float64)[written]
        if pool == dtype:
            _judge(stored_k.to(dtype), exact_k, _rotated(k, angle, weights[1], dtype)[written])
            if not torch.equal(stored_v.to(dtype), v[written]):
                raise AssertionError("the values were changed on their way into the pool")
        else:
            for found, exact in ((stored_k, exact_k), (stored_v, v[written].double())):
                _judge_grid(found, exact, pool)
        missing = reference.gather_slots(kv, slots[3:4])
        if any(float(part.abs().max()) for part in missing):
            raise AssertionError("a token without a slot was written")


def _judge_grid(found: torch.Tensor, exact: torch.Tensor, pool: torch.dtype) -> None:
    """Within half a step of the grid that the largest number of a (token, head) spans, and a hundredth for the scale's
    own rounding: INT8 has 127 steps; the largest numbers of FP8, up to 448, are 32 apart."""
    step = exact.abs().amax(-1, keepdim=True) * {INT8: 1 / 127, FP8: 32 / 448}[pool]
    worst = float(((found.double() - exact).abs() / step).max())
    if worst > 0.51:
        raise AssertionError(f"a stored number is off by {worst:.3f} steps of its grid, rounding by at most .5")


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
