"""Gradients of shared items add up to the same bits every time."""

from __future__ import annotations

import torch
from shoplm.training.determinism import deterministic


def scattered(generator_seed: int) -> torch.Tensor:
    """Many fp32 additions into few places, as the count term's gradient has them."""
    generator = torch.Generator().manual_seed(generator_seed)
    at = torch.randint(0, 50, (400_000,), generator=generator)
    return torch.zeros(50).index_put((at,), torch.randn(400_000, generator=generator), accumulate=True)


def test_repeated_sums_have_the_same_bits_on_many_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            first = scattered(0)
            assert all(torch.equal(scattered(0), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


def test_the_setting_is_put_back() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic():
        pass
    assert torch.are_deterministic_algorithms_enabled() == before
