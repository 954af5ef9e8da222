"""The head of text on the C++ decoder: all logits, or the most likely tokens alone."""

from __future__ import annotations

import ctypes

import torch
from shoplm.model.native.library import GreedyRef, LinearRef, NativeLibrary, pointer
from shoplm.model.native.linear import PANEL, PackedLinear, WeightFormat
from torch import Tensor


class NativeHead:
    """`TextHead` of this machine's products."""

    def __init__(self, library: NativeLibrary, weight: Tensor, *, format: WeightFormat) -> None:
        """`weight` [tokens, H]; the caller may drop it. The head's integers have 8 bits, whatever the format's have."""
        self._library = library
        self._logits = PackedLinear(library, weight, format=min(format, WeightFormat.INT8))
        self._ref = GreedyRef(self._logits.ref, LinearRef(), None, len(weight), 0.0)
        if format is WeightFormat.BF16:
            weight = weight.bfloat16()  # the screen's errors are those against the products of bf16
            self._screen = PackedLinear(library, weight, format=WeightFormat.INT8, measured=True)
            errors = self._screen.errors
            assert errors is not None
            self._errors = errors.view(-1, PANEL).amax(dim=1)
            self._ref.screen, self._ref.errors = self._screen.ref, pointer(self._errors)
            self._ref.norm = _largest_norm(weight) + errors.max().item()

    def __call__(self, states: Tensor) -> Tensor:
        """`states` bf16 [rows, H] to logits bf16 [rows, tokens]."""
        return self._logits(states)

    def greedy(self, states: Tensor) -> list[int]:
        """The token of the largest logit of each row of `states` bf16 [rows, H], before logits are rounded to bf16; the
        first of equal ones. Raises ValueError for states of another dtype or size."""
        states = self._logits.rows_of(states)
        tokens = torch.empty(len(states), dtype=torch.long)
        self._library.functions.shoplm_greedy(
            ctypes.byref(self._ref), pointer(states), len(states), pointer(tokens), torch.get_num_threads()
        )
        found: list[int] = tokens.tolist()
        return found


def _largest_norm(weight: Tensor) -> float:
    """The largest norm of a row."""
    return float(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).max())
