"""What all backends share: the contract around one step, and, for those that run it within `submit`, the rest."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import Batch, StepResult
from shoplm.model.backend import BackendInfo, Finished, Handle
from shoplm.model.readouts import Readouts, TextHead, output_tokens
from shoplm.request import Select
from torch import Tensor


class LocalBackend(ABC):
    """Implements `Backend`, but for the step itself."""

    checks_drafts = False

    def __init__(
        self,
        name: str,
        readouts: Readouts,
        *,
        pages: int,
        page_size: int,
        state_slots: int,
        max_context_tokens: int,
        vocab_size: int,
        pipeline_depth: int = 1,
    ) -> None:
        self._readouts = readouts
        self._info = BackendInfo(
            name=name,
            pages=pages,
            page_size=page_size,
            state_slots=state_slots,
            max_context_tokens=max_context_tokens,
            vocab_size=vocab_size,
            trie_depths=readouts.trie_depths,
            trie_items=readouts.trie_items,
            pipeline_depth=pipeline_depth,
            feature_count=readouts.feature_count,
            checks_drafts=self.checks_drafts,
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def lanes(self, select: Select) -> int:
        return self._readouts.lanes(select)

    def submit(self, batch: Batch) -> Handle:
        try:
            with torch.inference_mode():
                return self._start(batch)
        except Exception as error:  # the engine sees it where it asks for the result
            return Finished(error)

    def close(self) -> None:  # noqa: B027 - no abstract hook: there is nothing that a subclass would have to do
        """Nothing to do: memory goes with the object."""

    @abstractmethod
    def _start(self, batch: Batch) -> Handle:
        """Start the step. May raise."""


class EagerBackend(LocalBackend):
    """A backend that runs each step within `submit`, and reads it out on the host."""

    checks_drafts = True
    _head: TextHead

    @abstractmethod
    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the keys and values of pages `sources` [C], in every layer, to the pages `targets` [C]. No page is both.
        So a prompt can go on behind the middle of a page that another one shares."""

    def _start(self, batch: Batch) -> Handle:
        start = time.perf_counter()
        readouts = self._readouts
        lineages = readouts.lineages(batch)
        first, read = output_tokens(batch)
        hidden = self._forward(batch, readouts.tokens(batch), read, lineages)
        outputs = readouts.read(batch.rows, first, hidden, self._head)
        return Finished(StepResult(outputs, time.perf_counter() - start))

    @abstractmethod
    def _forward(
        self, batch: Batch, tokens: NDArray[np.int64], read: NDArray[np.int64], lineages: dict[int, NDArray[np.int64]]
    ) -> Tensor:
        """Hidden states [R, H] of the tokens `read` [R]. `tokens` [T] are the batch's, all known; `lineages` as
        `Readouts.lineages` gives them."""
