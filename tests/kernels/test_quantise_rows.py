"""quantise_rows under the interpreter: bit for bit its specification."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shoplm.kernels import reference
from shoplm.kernels.quantise_rows import MAX_COLUMNS, quantise_rows

FP8 = torch.float8_e4m3fn


def rows(tokens: int, columns: int, dtype: torch.dtype, seed: int, padding: int = 0) -> torch.Tensor:
    """[tokens, columns] rows, the magnitudes of each spread over ten powers of two, with NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((tokens, columns + padding), math.nan, dtype=dtype)
    exponent = torch.randint(-8, 3, (tokens, columns), generator=generator)
    storage[:, :columns] = torch.randn(tokens, columns, generator=generator) * 2.0**exponent
    return storage[:, :columns]


@settings(max_examples=30, derandomize=True)
@given(
    tokens=st.integers(1, 5),
    columns=st.sampled_from([1, 31, 64, 127, 576, 1000, 2049]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    padding=st.sampled_from([0, 3]),
    seed=st.integers(0, 999),
)
def test_equals_its_specification(tokens: int, columns: int, dtype: torch.dtype, padding: int, seed: int) -> None:
    x = rows(tokens, columns, dtype, seed, padding)
    values, scale = torch.full((tokens, columns), math.nan).to(FP8), torch.full((tokens, 1), math.nan)
    assert quantise_rows(x, values=values, scale=scale) == (values, scale)
    want, want_scale = reference.quantise_rows(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(values.float(), want.float())


def test_every_e4m3_number_and_every_tie_between_two() -> None:
    """The largest of a row is 448, so its scale is 1."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    x = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2))[None]
    values, scale = quantise_rows(torch.cat((x, -x)))
    assert scale.tolist() == [[1.0], [1.0]]
    assert torch.equal(values[0].float(), x[0].to(FP8).float())
    assert torch.equal(values[1].float(), -values[0].float())


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # infinity by infinity
def test_what_no_scale_suits() -> None:
    """Zeros and numbers below the smallest scale store zeros; a NaN or an infinity takes all its row along, and nothing
    of its neighbours."""
    x = torch.ones(6, 40)
    x[0], x[1] = 0.0, 1e-30
    x[2, 7], x[3, 7], x[4, 7] = math.nan, -math.inf, -math.nan
    values, scale = quantise_rows(x)
    want, want_scale = reference.quantise_rows(x)
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    assert not scale[2:5].isfinite().any()
    for stored in (values.float(), want.float()):
        assert (stored[:2] == 0).all() and (stored[5] == 448).all()
        assert not (stored @ torch.ones(40, 1) * scale)[2:5].isfinite().any()


def test_no_rows() -> None:
    values, scale = quantise_rows(torch.empty(0, 64))
    assert values.shape == (0, 64) and scale.shape == (0, 1)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=f"x has {MAX_COLUMNS + 1} columns, expected 1 to {MAX_COLUMNS}"):
        quantise_rows(torch.zeros(1, MAX_COLUMNS + 1))
    with pytest.raises(ValueError, match="x has last stride 2"):
        quantise_rows(torch.zeros(2, 16)[:, ::2])
    with pytest.raises(TypeError, match=r"values is torch\.float32"):
        quantise_rows(x, values=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"scale has shape \[2\]"):
        quantise_rows(x, scale=torch.zeros(2))
