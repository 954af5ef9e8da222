"""QK-norm, RoPE and the paged write under the interpreter against their specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shoplm.kernels import reference_ops
from shoplm.kernels.inputs import QUANTISED_DTYPES, PagedKv
from shoplm.kernels.kv_write import kv_write

PAGES = 6
POISON = 0x7B  # a byte that is a finite number in every pool dtype
THETA = 10_000.0


@dataclass(frozen=True)
class Case:
    """New tokens as views of one fused projection, and where they go."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    inv_freq: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    page_size: int

    def table(self) -> dict[str, Any]:
        angle = torch.arange(64, dtype=torch.float32)[:, None] * self.inv_freq
        return {"cos": angle.cos(), "sin": angle.sin()}

    def norm(self) -> dict[str, Any]:
        return {"q_norm_weight": self.q_weight, "k_norm_weight": self.k_weight}

    def pool(self, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32) -> PagedKv:
        """A poisoned pool."""
        shape = (PAGES, self.k.shape[1], self.page_size, self.k.shape[2])
        caches = [torch.empty(shape, dtype=dtype) for _ in range(2)]
        for cache in caches:
            cache.view(torch.uint8).fill_(POISON)
        if dtype not in QUANTISED_DTYPES:
            return PagedKv(*caches)
        return PagedKv(*caches, *(torch.full(shape[:3], -7.0, dtype=scale_dtype) for _ in range(2)))

    def write(self, kv: PagedKv, operation: Callable[..., torch.Tensor] = kv_write, **keywords: Any) -> torch.Tensor:
        """Run `operation` without touching this case's tensors; returns the rotated queries."""
        return operation(self.q.clone(), self.k, self.v, self.positions, self.slots, kv, **keywords)


def make_case(
    tokens: int, kv_heads: int, group: int, head_dim: int, page_size: int, dtype: torch.dtype, seed: int
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    q_heads = kv_heads * group
    fused = (torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim, generator=generator) * 2).to(dtype)
    q, k, v = torch.split(fused, [q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    slots = torch.randperm(PAGES * page_size, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.2] = -1
    return Case(
        q.view(tokens, q_heads, head_dim),
        k.view(tokens, kv_heads, head_dim),
        v.view(tokens, kv_heads, head_dim),
        torch.randint(0, 64, (tokens,), generator=generator),
        slots,
        THETA ** (-torch.arange(0, head_dim, 2) / head_dim),
        (1 + torch.randn(head_dim, generator=generator) / 4).to(dtype),
        (1 + torch.randn(head_dim, generator=generator) / 4).to(dtype),
        page_size,
    )


def gathered(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    page_size = cache.shape[2]
    return cache[slots // page_size, :, slots % page_size]


def unwritten_is_untouched(cache: torch.Tensor, slots: torch.Tensor) -> bool:
    page_size = cache.shape[2]
    others = torch.ones(cache.shape[0] * page_size, dtype=torch.bool)
    others[slots[slots >= 0]] = False
    rows = torch.arange(len(others))[others]
    return bool((cache.view(torch.uint8)[rows // page_size, :, rows % page_size] == POISON).all())


@settings(max_examples=40, derandomize=True)
@given(
    tokens=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 3, 9]),
    group=st.sampled_from([1, 3, 4, 7, 8, 16]),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    page_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    normalised=st.booleans(),
    table=st.booleans(),
    seed=st.integers(0, 999),
)
def test_pool_and_queries_match(
    tokens: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    normalised: bool,
    table: bool,
    seed: int,
) -> None:
    case = make_case(tokens, kv_heads, group, head_dim, page_size, dtype, seed)
    rotation: dict[str, Any] = case.table() if table else {"inv_freq": case.inv_freq}
    keywords = rotation | (case.norm() if normalised else {})
    want, got = case.pool(dtype), case.pool(dtype)
    want_q = case.write(want, reference_ops.kv_write, **keywords)
    q_out = torch.full_like(case.q, float("nan"))
    case.write(got, q_out=q_out, **keywords)
    # Both round a value computed in fp32 once: one rounding step of the dtype apart at the very most.
    tolerance: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(q_out, want_q, **tolerance)
    written = case.slots[case.slots >= 0]
    torch.testing.assert_close(gathered(got.k, written), gathered(want.k, written), **tolerance)
    assert torch.equal(gathered(got.v, written), case.v[case.slots >= 0])
    assert unwritten_is_untouched(got.k, case.slots) and unwritten_is_untouched(got.v, case.slots)


@settings(max_examples=20, derandomize=True)
@given(
    kv_heads=st.sampled_from([1, 3, 9]),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    cache=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 999),
)
def test_quantised_pools(
    kv_heads: int, head_dim: int, dtype: torch.dtype, cache: torch.dtype, scale_dtype: torch.dtype, seed: int
) -> None:
    """What a reader gets back is within half a step of the number format from the exact value."""
    case = make_case(4, kv_heads, 2, head_dim, 16, dtype, seed)
    case.v[0] = 0  # an all-zero head has scale 0 and must read back as 0
    kv = case.pool(cache, scale_dtype)
    case.write(kv, inv_freq=case.inv_freq, **case.norm())
    full = dataclasses.replace(case, q=case.q.float(), k=case.k.float(), v=case.v.float())
    exact = full.pool(torch.float32)
    full.write(exact, reference_ops.kv_write, inv_freq=case.inv_freq, **case.norm())
    written = case.slots[case.slots >= 0]
    for stored, scale, values in ((kv.k, kv.k_scale, exact.k), (kv.v, kv.v_scale, exact.v)):
        assert scale is not None
        step = gathered(scale, written).float()[..., None]
        want = gathered(values, written)
        got = gathered(stored.float(), written) * step
        slack = want.abs() * 2.0**-10  # a scale rounded to fp16 may clip the largest value
        if cache == torch.int8:
            assert ((got - want).abs() <= 0.501 * step + slack).all()
        else:
            assert ((got - want).abs() <= torch.maximum(want.abs() * 2.0**-4, step * 2.0**-10) * 1.001 + slack).all()
        assert unwritten_is_untouched(stored, case.slots)
        assert int((scale == -7.0).sum()) == scale.numel() - written.numel() * kv_heads


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn])
def test_stored_codes_equal_the_specification(cache: torch.dtype) -> None:
    """V passes through unrotated, so its codes have one right answer each."""
    case = make_case(6, 3, 1, 128, 16, torch.float32, 11)
    case.slots[1] = next(slot for slot in range(PAGES * 16) if slot not in case.slots.tolist())
    case.v[1, 0, :64] = torch.arange(64) / 64 * 2.0**-6  # the lower end of e4m3, subnormals included
    case.v[1, 0, 64] = 448.0  # so e4m3's scale is 1, and the next ones lie halfway between two of its numbers
    case.v[1, 0, 65:73] = torch.tensor([17.0, 19.0, -17.0, -19.0, 25.0, 27.0, 1.0625, 2.0**-10])
    got, want = case.pool(cache), case.pool(cache)
    case.write(got, inv_freq=case.inv_freq)
    case.write(want, reference_ops.kv_write, inv_freq=case.inv_freq)
    assert torch.equal(got.v.view(torch.uint8), want.v.view(torch.uint8))
    assert torch.equal(got.v_scale, want.v_scale)  # type: ignore[arg-type]


def test_queries_are_rotated_in_place_by_default() -> None:
    case = make_case(3, 2, 4, 64, 16, torch.float32, 0)
    kv = case.pool(torch.float32)
    want = case.write(kv, **case.table(), q_out=torch.empty_like(case.q))
    same = kv_write(case.q, case.k, case.v, case.positions, case.slots, kv, **case.table())
    assert same is case.q and torch.equal(same, want)


def test_scores_depend_on_the_distance_only() -> None:
    """The property that makes RoPE relative: <R(m) q, R(n) k> is a function of m - n."""
    case = make_case(1, 1, 1, 128, 16, torch.float32, 3)
    dots = []
    for shift in (0, 7, 40):
        kv = case.pool(torch.float32)
        near = dataclasses.replace(case, positions=torch.tensor([2 + shift]), slots=torch.tensor([0]))
        far = dataclasses.replace(case, positions=torch.tensor([5 + shift]), slots=torch.tensor([1]))
        near.write(kv, **case.table())
        q = far.write(kv, **case.table())
        dots.append(float(q[0, 0] @ kv.k[0, 0, 0]))
    assert dots == pytest.approx([dots[0]] * 3, rel=1e-4)


def test_no_tokens() -> None:
    case = make_case(0, 1, 1, 64, 16, torch.float32, 0)
    assert case.write(case.pool(torch.float32), **case.table()).shape == (0, 1, 64)


def test_bad_arguments_are_named() -> None:
    case = make_case(2, 2, 2, 64, 16, torch.float32, 0)
    good: dict[str, Any] = {
        "q": case.q, "k": case.k, "v": case.v, "positions": case.positions, "slot_mapping": case.slots,
        "inv_freq": case.inv_freq, "kv": case.pool(torch.float32),
    }  # fmt: skip
    other = make_case(2, 4, 2, 64, 16, torch.float32, 0)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"q": torch.zeros(2, 4, 80)}, ValueError, "q has head_dim 80, expected one of"),
        ({"q": torch.zeros(2, 3, 64)}, ValueError, "q has 3 heads, expected a multiple of k's 2"),
        ({"q": torch.zeros(4, 2, 64).transpose(0, 1)}, ValueError, "q has head stride"),
        ({"v": case.v[:1]}, ValueError, "v has shape"),
        ({"slot_mapping": case.slots.int()}, TypeError, r"slot_mapping is torch\.int32"),
        ({"inv_freq": None}, ValueError, "the rotation is missing"),
        (case.table(), ValueError, "got both a cos/sin table and inv_freq"),
        ({"q_norm_weight": case.q_weight}, ValueError, "pass both or neither"),
        ({"kv": other.pool(torch.float32)}, ValueError, "kv has 4 heads of 64 on cpu, k has 2 of 64"),
        ({"kv": case.pool(torch.float16)}, TypeError, r"kv.k is torch\.float16, expected torch\.float32 like k"),
        ({"q": torch.zeros(2 * 4 * 64 + 1)[1:].view(2, 4, 64)}, ValueError, "q starts at address"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            kv_write(**(good | change))
