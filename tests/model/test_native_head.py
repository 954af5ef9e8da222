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


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("format", WeightFormat)
def test_greedy_looks_past_tokens_whose_logits_are_no_numbers(
    library: NativeLibrary, format: WeightFormat, rows: int
) -> None:
    generator = torch.Generator().manual_seed(9)
    weight, state = torch.randn(3_001, 128, generator=generator), torch.randn(1, 128, generator=generator).bfloat16()
    weight[500] += 2 * state[0]
    weight[[484, 516, 532, 2_990]] = torch.nan  # in the same lane of other vectors, and in another block
    head = NativeHead(library, weight, format=format)
    assert head.greedy(state.repeat(rows, 1)) == [500] * rows


def test_greedy_of_a_head_in_fp32_is_that_of_its_products_in_bf16(library: NativeLibrary) -> None:
    """Where 8 bits hold the weights exactly, and rounding them to bf16 decides."""
    weight = torch.zeros(64, 64)
    weight[[0, 32], 0] = 127
    weight[0, 1:63] = 87
    weight[32, 1:32], weight[32, 32:63] = 58, 116  # of 87, bf16 has more; of these, less
    weight[32, 63] = 2
    weight *= torch.tensor(0.0137).half().float()
    states = torch.ones(1, 64).bfloat16()
    assert weight.sum(dim=1).argmax() == 32
    assert weight.bfloat16().float().sum(dim=1).argmax() == 0
    assert NativeHead(library, weight, format=WeightFormat.BF16).greedy(states) == [0]
    with pytest.raises(ValueError, match=r"states are torch\.float32 \[1, 64\], not torch\.bfloat16 \[rows, 64\]"):
        NativeHead(library, weight, format=WeightFormat.BF16).greedy(states.float())
