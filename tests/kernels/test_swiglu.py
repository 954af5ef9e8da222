"""SwiGLU under the interpreter against its specification."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shoplm.kernels import reference_ops
from shoplm.kernels.swiglu import swiglu


def projection(tokens: int, features: int, dtype: torch.dtype, seed: int, padding: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((tokens, 2 * features + padding), float("nan"), dtype=dtype)
    storage[:, : 2 * features] = torch.randn(tokens, 2 * features, generator=generator) * 4
    return storage[:, : 2 * features]


@settings(max_examples=30, derandomize=True)
@given(
    tokens=st.integers(1, 5),
    features=st.sampled_from([1, 33, 1023, 1024, 1025, 2500]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    padding=st.sampled_from([0, 3]),
    seed=st.integers(0, 999),
)
def test_error_is_that_of_torch_in_the_same_dtype(
    tokens: int, features: int, dtype: torch.dtype, padding: int, seed: int
) -> None:
    gate_up = projection(tokens, features, dtype, seed, padding)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = gate.double() * torch.sigmoid(gate.double()) * up.double()
    in_dtype = torch.nn.functional.silu(gate) * up
    out = torch.full((tokens, features), float("nan"), dtype=dtype)
    swiglu(gate_up, out=out)
    allowed = 2 * (in_dtype.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed
    assert (reference_ops.swiglu(gate_up).double() - exact).abs().max() <= allowed


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # that is the case under test
def test_large_gates_saturate() -> None:
    gate_up = torch.tensor([[200.0, -200.0, 0.0, 3.0, 3.0, 3.0]])
    assert swiglu(gate_up).tolist() == [[600.0, 0.0, 0.0]]


def test_no_tokens() -> None:
    assert swiglu(torch.empty(0, 8)).shape == (0, 4)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="gate_up has 7 columns, expected an even number"):
        swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="out has shape"):
        swiglu(torch.zeros(2, 8), out=torch.zeros(2, 8))
    with pytest.raises(TypeError, match=r"out is torch\.float16"):
        swiglu(torch.zeros(2, 8), out=torch.zeros(2, 4, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"gate_up is torch\.int32"):
        swiglu(torch.zeros(2, 8, dtype=torch.int32))
