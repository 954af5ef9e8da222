"""The contract between the engine and whatever computes: torch on a CPU, Triton on a GPU, a cost curve in a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shoplm.batch import Batch, StepResult
from shoplm.request import Select


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What the scheduler must know of a backend. Fixed after start."""

    name: str
    pages: int
    page_size: int  # tokens
    state_slots: int  # most requests that run at once
    max_context_tokens: int
    vocab_size: int  # token ids below this are valid: text and the shop's
    trie_depths: dict[str, int]  # trie name -> codes per item
    trie_items: dict[str, int]  # trie name -> items
    pipeline_depth: int = 1  # steps that may be submitted before the first one's result is asked for
    feature_count: int = 0  # dense features that Predict carries
    checks_drafts: bool = False  # it draws behind each token of an answer's row, not only behind the last


class Handle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Waits for the step and returns what it produced. Raises what the step raised."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """The handle of a step that ran within `submit`."""

    outcome: StepResult | Exception

    def result(self) -> StepResult:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Backend(Protocol):
    """Owns the weights, the KV pool and the state slots; runs one batch after another, in the order submitted."""

    @property
    def info(self) -> BackendInfo: ...

    def lanes(self, select: Select) -> int:
        """Lanes of this selection's beam rows: beams, and own items or candidates that are scored beside them."""
        ...

    def submit(self, batch: Batch) -> Handle:
        """Starts a step. Inputs may come from state slots that an earlier, unfinished step fills."""
        ...

    def close(self) -> None:
        """Frees the device."""
        ...
