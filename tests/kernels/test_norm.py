"""RMSNorm, plain and fused with the residual, under the interpreter against its specification."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shoplm.kernels import reference_ops
from shoplm.kernels.norm import MAX_HIDDEN, add_rms_norm, rms_norm

EPS = 1e-6


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a model in `x`'s dtype would compute: the yardstick of the error allowed."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).abs().max())


def rows(tokens: int, hidden: int, dtype: torch.dtype, seed: int, padding: int = 0) -> torch.Tensor:
    """[tokens, hidden] rows with `padding` poisoned columns between them."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((tokens, hidden + padding), float("nan"), dtype=dtype)
    storage[:, :hidden] = torch.randn(tokens, hidden, generator=generator) * 2
    return storage[:, :hidden]


@settings(max_examples=30, derandomize=True)
@given(
    tokens=st.integers(1, 5),
    hidden=st.sampled_from([1, 31, 64, 127, 576, 896, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    padding=st.sampled_from([0, 3]),
    with_residual=st.booleans(),
    seed=st.integers(0, 999),
)
def test_error_is_that_of_torch_in_the_same_dtype(
    tokens: int, hidden: int, dtype: torch.dtype, padding: int, with_residual: bool, seed: int
) -> None:
    x = rows(tokens, hidden, dtype, seed, padding)
    weight = 1 + rows(1, hidden, dtype, seed + 1)[0] / 4
    residual = rows(tokens, hidden, dtype, seed + 2, padding)
    total = (x.float() + residual.float()).to(dtype) if with_residual else x
    exact = exact_rms_norm(total, weight)
    out = torch.full((tokens, hidden), float("nan"), dtype=dtype)
    if with_residual:
        add_rms_norm(x, residual, weight, EPS, out=out)
        assert torch.equal(residual, total)
    else:
        rms_norm(x, weight, EPS, out=out)
    allowed = 2 * error(torch_rms_norm(total, weight), exact) + torch.finfo(dtype).eps * float(exact.abs().max())
    assert error(out, exact) <= allowed
    assert error(reference_ops.rms_norm(total, weight, EPS), exact) <= allowed


def test_fused_equals_the_two_steps_apart_bit_for_bit() -> None:
    x, residual = rows(3, 576, torch.float16, 0), rows(3, 576, torch.float16, 1)
    weight = rows(1, 576, torch.float16, 2)[0]
    total = x + residual
    fused = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(fused, rms_norm(total, weight, EPS))


def test_works_in_place() -> None:
    x = rows(4, 96, torch.float32, 0, padding=5)
    want = rms_norm(x, torch.ones(96), EPS)
    assert rms_norm(x, torch.ones(96), EPS, out=x) is x
    assert torch.equal(x, want)


def test_zero_rows_and_zero_row_values() -> None:
    assert rms_norm(torch.empty(0, 64), torch.ones(64), EPS).shape == (0, 64)
    assert torch.equal(rms_norm(torch.zeros(2, 64), torch.ones(64), EPS), torch.zeros(2, 64))


def test_bad_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="x has shape"):
        rms_norm(torch.zeros(8), weight, EPS)
    with pytest.raises(ValueError, match=f"expected 1 to {MAX_HIDDEN}"):
        rms_norm(torch.zeros(1, MAX_HIDDEN + 1), torch.ones(MAX_HIDDEN + 1), EPS)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        rms_norm(x, weight.double(), EPS)
    with pytest.raises(ValueError, match="eps is 0"):
        rms_norm(x, weight, 0.0)
    with pytest.raises(ValueError, match="x has last stride 2"):
        rms_norm(torch.zeros(2, 16)[:, ::2], weight, EPS)
    with pytest.raises(ValueError, match="the residual stream would be lost"):
        add_rms_norm(torch.ones(2, 8), x, weight, EPS, out=x)
