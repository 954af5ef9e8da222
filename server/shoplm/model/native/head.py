"""The head of text on the C++ decoder: all logits, or the most likely tokens alone."""

from __future__ import annotations

import ctypes

import torch
from shoplm.model.native.library import GreedyRef, NativeLibrary, pointer
from shoplm.model.native.linear import PackedLinear, WeightFormat, rounding_error
from torch import Tensor


class NativeHead:
    """`TextHead` of this machine's products."""

    def __init__(self, library: NativeLibrary, weight: Tensor, *, format: WeightFormat) -> None:
        """`weight` [tokens, H], of which a copy in bf16 is kept where `format` is bf16; else the head's is int8."""
        self._library = library
        self._logits = PackedLinear(library, weight, format=min(format, WeightFormat.INT8))
        self._exact: Tensor | None = None
        self._screen, error, norm = self._logits, 0.0, 0.0
        if format is WeightFormat.BF16:
            self._exact = weight.to(torch.bfloat16).contiguous()
            self._screen = PackedLinear(library, self._exact, format=WeightFormat.INT8)
            error = rounding_error(self._exact, WeightFormat.INT8)
            norm = max(part.float().norm(dim=1).max().item() for part in torch.split(self._exact, 4096))
        self._ref = GreedyRef(self._screen.ref, pointer(self._exact), len(weight), error, norm)

    def __call__(self, states: Tensor) -> Tensor:
        """`states` bf16 [rows, H] to logits bf16 [rows, tokens]."""
        return self._logits(states)

    def greedy(self, states: Tensor) -> list[int]:
        """The token of the largest logit of each row, before that is rounded to bf16; the first of equal ones."""
        states = states.contiguous()
        tokens = torch.empty(len(states), dtype=torch.long)
        self._library.functions.shoplm_greedy(
            ctypes.byref(self._ref), pointer(states), len(states), pointer(tokens), torch.get_num_threads()
        )
        found: list[int] = tokens.tolist()
        return found
