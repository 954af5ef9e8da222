"""Forks under the interpreter: the kernel against the reference, and the whole backend against the torch backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from attention_cases import SHAPES, Shape, check_attention, check_forks, int32, make_case, make_forks, poisoned
from shoplm.kernels.forks import fork_attention
from shoplm.kernels.inputs import ForkRows, PagedKv, packed_bits
from toy_backend import assert_same, backends, explanations, run, work


@pytest.mark.parametrize("traits", [False, True], ids=["llama", "every-trait"])
def test_forks_equal_the_torch_backend(traits: bool) -> None:
    expecting, backend = backends(traits=traits)
    jobs = [work()[0], *explanations()]
    _, expected = run(expecting, 9, jobs)
    _, found = run(backend, 9, jobs)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    values = np.array(expected[1]).reshape(3, 3)  # three forks read three items
    assert np.abs(values[1:] - values[0]).max() > 0.01


def test_a_token_reads_what_it_may_and_the_window_counts_positions() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(2, 1, 16, 64, generator=generator) for _ in range(2))
    q, out = torch.randn(3, 2, 64, generator=generator), torch.full((3, 2, 64), torch.nan)
    readable = packed_bits(np.array([[True, False, True, True, False]] * 2), 1)
    forks = ForkRows(int32([1, 0])[None], *map(int32, ([5], [1], [2], [[4, 3]])), torch.from_numpy(readable)[None])
    fork_attention(q, PagedKv(keys, values), forks, out=out, window=2)
    for token, seen in ((1, [3]), (2, [2, 3])):  # of positions 4 and 3; the window is two keys
        weights = torch.softmax(q[token] @ keys[1, 0, seen].T / 8.0, dim=-1)
        torch.testing.assert_close(out[token], weights @ values[1, 0, seen])
    assert out[0].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape: Shape) -> None:
    """Several prompts in one launch: one token, a page and one token, more than a tile, and a row without any."""
    page = shape.page_size
    case = make_case(shape, [(1, 1), (17, 2 * page + 1), (0, 9), (5, page - 1), (70, 3 * page + 71)])
    forks, read = make_forks(case, 0.3)
    fork_attention(case.q, case.kv, forks, out=case.out)
    check_forks(case, forks, read)


@pytest.mark.parametrize("window", [1, 5, 33, 200])
def test_a_window_goes_by_positions(window: int) -> None:
    case = make_case(Shape(64, 3, 1, 16), [(50, 190), (23, 23), (90, 100)])
    forks, read = make_forks(case, 0.3)
    fork_attention(case.q, case.kv, forks, out=case.out, window=window)
    check_forks(case, forks, read, window)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_lengths_around_pages_words_and_tiles(offset: int) -> None:
    case = make_case(Shape(64, 4, 1, 32), [(32 + offset, 32 + offset), (16 + offset, 64 + offset), (3, 128 + offset)])
    forks, read = make_forks(case, 0.5)
    fork_attention(case.q, case.kv, forks, out=case.out)
    check_forks(case, forks, read)


def test_what_reads_nothing_is_zero() -> None:
    case = make_case(Shape(), [(5, 40)])
    forks, read = make_forks(case, 1.0)
    fork_attention(case.q, case.kv, forks, out=case.out)
    check_forks(case, forks, read)
    assert not case.out[:5].any()


def test_what_reads_all_is_ordinary_attention() -> None:
    case = make_case(Shape(), [(30, 75), (4, 50)])
    forks, _ = make_forks(case, 0.0)
    fork_attention(case.q, case.kv, forks, out=case.out)
    check_attention(case, check_lse=False)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = make_case(Shape(dtype=torch.float16), [(21, 90), (40, 41), (7, 130)])
    forks, _ = make_forks(case, 0.3)
    fork_attention(case.q, case.kv, forks, out=case.out)
    for row in range(3):
        alone = ForkRows(*(getattr(forks, field.name)[row : row + 1] for field in fields(ForkRows)))
        out = poisoned(case.q)
        fork_attention(case.q, case.kv, alone, out=out)
        first = int(forks.first_token[row])
        part = slice(first, first + int(forks.new_tokens[row]))
        assert torch.equal(out[part], case.out[part])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("readable", lambda tensor: tensor[:, :-1], "readable"),
        ("readable", lambda tensor: tensor.long(), "readable"),
        ("position", lambda tensor: tensor[:1], "position"),
        ("kv_len", lambda tensor: tensor[:1], "kv_len"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    forks, _ = make_forks(make_case(Shape(), [(3, 9), (4, 20)]), 0.3)
    with pytest.raises((ValueError, TypeError), match=message):
        replace(forks, **{name: change(getattr(forks, name))})


def test_windows_below_one_are_refused() -> None:
    case = make_case(Shape(), [(3, 9)])
    forks, _ = make_forks(case, 0.3)
    with pytest.raises(ValueError, match="window must be at least 1"):
        fork_attention(case.q, case.kv, forks, out=case.out, window=0)
