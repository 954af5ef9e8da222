"""One step on the GPU from its inputs to its hidden states and drawn tokens: what a captured graph replays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.sample import SampleWorkspace, sample
from shoplm.model.device_state import DeviceState
from shoplm.model.triton_decoder import TritonDecoder
from shoplm.model.triton_step import KernelStep
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step leaves on the device, in the batch's order of rows, padding behind."""

    hidden: Tensor  # [R, H], after the final norm
    tokens: Tensor | None  # int64 [S]; None: no row draws


class StepProgram:
    """Queues a step without waiting: forward pass, text logits, sampling, and the drawn tokens' way into the state."""

    def __init__(
        self, decoder: TritonDecoder, pool: tuple[PagedKv, ...], state: DeviceState, *, most_samples: int
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._state = state
        self._workspace = SampleWorkspace.allocate(most_samples, decoder.text_vocab_size, state.tokens.device)

    def __call__(self, step: KernelStep) -> StepOutputs:
        state = self._state
        hidden = self._decoder.forward(step, step.known_tokens(state), step.beams(state), self._pool)
        if not step.bounds.samples:
            return StepOutputs(hidden, None)
        logits = self._decoder.logits(hidden[step.sample_outputs])
        tokens = torch.empty(step.bounds.samples, dtype=torch.int64, device=logits.device)
        sample(
            logits,
            step.temperature,
            step.top_k,
            step.top_p,
            step.seed,
            step.sample_index,
            workspace=self._workspace,
            out=tokens,
        )
        state.tokens.view(-1)[step.sample_target] = tokens
        return StepOutputs(hidden, tokens)
