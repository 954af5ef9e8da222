"""Behind each token of a draft a backend draws what a step of that token's own would have drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shoplm.batch import Batch, Row, RowOutput, SampleReadout
from shoplm.model.backend import Backend
from shoplm.model.config import ModelConfig
from shoplm.model.native.library import NativeLibrary
from shoplm.model.native.linear import WeightFormat
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import load_weights
from shoplm.request import Sampling
from toy_decoder import make, prompts

SAMPLINGS = (Sampling(), Sampling(temperature=1.5, seed=7), Sampling(temperature=1.2, top_k=20, top_p=0.9, seed=5))
ANSWER = 7
FIRST = 3  # tokens of the answer that were drawn before
PAGES = np.array([5, 2, 7, 0, 3, 6, 1, 4], np.int32)


class Chat:
    """One sequence on a backend that nobody else uses."""

    def __init__(self, backend: Backend, prompt: list[int], sampling: Sampling) -> None:
        self._backend = backend
        self._sampling = sampling
        self._computed = 0
        self.compute(prompt[:-1])

    def compute(self, tokens: list[int], readout: SampleReadout | None = None) -> RowOutput:
        """Compute the next tokens and read behind the last, and behind those before a draft."""
        size, start = self._backend.info.page_size, self._computed
        at = np.arange(start, start + len(tokens))
        slots = PAGES[at // size].astype(np.int64) * size + at % size
        row = Row(2, 0, len(tokens), PAGES, start + len(tokens), readout=readout)
        batch = Batch(np.array(tokens, np.int32), at.astype(np.int32), slots, (row,))
        self._computed += len(tokens)
        return self._backend.submit(batch).result().outputs[0]

    def one_by_one(self, token: int) -> list[int]:
        """So many tokens behind this one, each in a step of its own."""
        answer: list[int] = []
        for index in range(ANSWER):
            drawn = self.compute([token], SampleReadout(self._sampling, FIRST + index))
            assert isinstance(drawn, int)
            answer.append(token := drawn)
        self._computed -= ANSWER
        return answer

    def at_once(self, token: int, draft: list[int]) -> list[int]:
        """What is drawn behind this token and each of the draft's. The next call computes it all again."""
        drawn = self.compute([token, *draft], SampleReadout(self._sampling, FIRST, len(draft)))
        assert isinstance(drawn, list) and len(drawn) == 1 + len(draft)
        self._computed -= 1 + len(draft)
        return drawn


def check(backend: Backend, prompt: list[int], sampling: Sampling) -> None:
    """Right guesses, and wrong ones, whose keys and values are written over afterwards."""
    chat, last = Chat(backend, prompt, sampling), prompt[-1]
    answer = chat.one_by_one(last)
    assert chat.at_once(last, answer[:-1]) == answer
    wrong = [*answer[:2], answer[2] ^ 1, *answer[3:5]]
    assert chat.at_once(last, wrong)[:3] == answer[:3]
    assert chat.at_once(last, answer[:-1]) == answer
    assert chat.one_by_one(last) == answer


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_of_torch(tiny_model: Callable[[str], Path], family: str, sampling: Sampling) -> None:
    folder = tiny_model(family)
    config = ModelConfig.from_folder(folder)
    backend = TorchBackend(config, load_weights(folder, config), pages=len(PAGES), state_slots=4)
    check(backend, np.random.default_rng(7).integers(3, 448, 29).tolist(), sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("format", WeightFormat)
def test_of_the_decoder_in_cpp(library: NativeLibrary, format: WeightFormat, sampling: Sampling) -> None:
    check(make(library, format=format), max(prompts(), key=len)[:61], sampling)
