"""The most likely token by the C++ head."""

from __future__ import annotations

import pytest
import torch
from shoplm.model.native.head import NativeHead
from shoplm.model.native.library import NativeLibrary
from shoplm.model.native.linear import WeightFormat


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_greedy_is_the_most_likely_token(library: NativeLibrary, format: WeightFormat, spread: float) -> None:
    """Also among 3,000 tokens whose logits lie closer together than 8 bits can tell, and of rows with a large value."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(1, 192, generator=generator)
    weight = (common + spread * torch.randn(3_001, 192, generator=generator)).bfloat16()
    weight[2_990] = weight[17]  # equal ones: the first counts
    states = torch.cat((weight[[17, 3_000, 0]], torch.randn(40, 192, generator=generator).bfloat16()))
    states[5:20, 3] *= 100
    head = NativeHead(library, weight, format=format)
    found = head.greedy(states)
    if format is WeightFormat.BF16:
        logits = states.double() @ weight.double().T
        best = logits.max(dim=1).values
        torch.testing.assert_close(logits[torch.arange(43), found], best, rtol=1e-6, atol=1e-6)
    else:
        logits = head(states).double()
        assert (logits[torch.arange(43), found] == logits.max(dim=1).values).all()
    assert spread < 1 or found[0] == 17
    assert [head.greedy(states[row : row + 1])[0] for row in range(43)] == found


def test_greedy_finds_a_token_where_the_states_are_no_numbers(library: NativeLibrary) -> None:
    head = NativeHead(library, torch.randn(100, 64), format=WeightFormat.BF16)
    assert head.greedy(torch.full((2, 64), torch.nan, dtype=torch.bfloat16)) == [0, 0]
