"""What the GPU backend does with a step's hidden states: the readouts of `model.readouts`, queued without waiting.

Results are copied to the host together (`Readback`); what they mean is decided when they are there (`StepAnswers`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.batch import (
    Batch,
    EmbedReadout,
    ForkReadout,
    PredictReadout,
    Row,
    RowOutput,
    SampleReadout,
    SelectReadout,
)
from shoplm.errors import BundleError
from shoplm.model.device_io import Readback, upload
from shoplm.model.device_select import DeviceSelector
from shoplm.model.device_state import DeviceState
from shoplm.model.readouts import Readouts
from shoplm.model.triton_step import lane_room
from shoplm.readout.select import SelectJob
from shoplm.request import ItemScores
from torch import Tensor

Answer = Callable[[NDArray[np.int32]], RowOutput]


@dataclass(frozen=True, slots=True)
class StepAnswers:
    """The results of a queued step, on their way to the host."""

    readback: Readback
    answers: tuple[Answer, ...]  # one per row

    def wait(self) -> tuple[RowOutput, ...]:
        """One output per row. Waits for the step."""
        results = self.readback.wait()
        return tuple(answer(results) for answer in self.answers)


class DeviceReadouts:
    """All readouts of the GPU backend, and its state slots."""

    def __init__(
        self, readouts: Readouts, *, state_slots: int, max_lanes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`readouts` names the catalogues and heads; `max_lanes` bounds the lanes of one search."""
        tables = readouts.tables
        steps = readouts.beam_steps
        lanes = lane_room(max_lanes) if steps else 0
        self._device = device
        self._heads = None if readouts.heads is None else readouts.heads.to(device)
        self.state = DeviceState.allocate(state_slots, lanes, steps, device)
        self.selectors = {name: DeviceSelector(table, self.state, dtype, device) for name, table in tables.items()}

    def read(self, batch: Batch, hidden: Tensor, tokens: Tensor | None) -> StepAnswers:
        """Queue all readouts of a step, each kind at once, and the copy of their results.

        `hidden` [R, H] in the batch's order of rows; `tokens` [S] are those drawn, also in that order.
        """
        readback = Readback(self._device)
        answers: list[Answer] = [_nothing] * len(batch.rows)
        predictions: list[tuple[int, int]] = []
        selections: defaultdict[tuple[str, int], list[tuple[int, SelectJob]]] = defaultdict(list)
        drawn = slice(0, 0) if tokens is None else readback.add(tokens.int())
        samples = first = 0
        for index, row in enumerate(batch.rows):
            match row.readout:
                case None:
                    continue
                case SampleReadout():
                    answers[index] = _token_at(drawn.start + samples)
                    samples += 1
                case SelectReadout(select, level):
                    job = SelectJob(row.state_slot, select, level, first, row.output_count)
                    selections[select.trie, level].append((index, job))
                case PredictReadout():
                    predictions.append((index, first))
                case EmbedReadout():
                    answers[index] = _numbers(readback.add(hidden[first].float()))
                case ForkReadout() as readout:
                    values = self._forks(readout, hidden[first : first + row.output_count])
                    answers[index] = _numbers(readback.add(values))
            first += row.output_count
        if predictions:
            self._predict(batch.rows, predictions, hidden, readback, answers)
        for (trie, _), chosen in selections.items():
            found = self._selector(trie).launch(hidden, [job for _, job in chosen], readback)
            for (index, _), finish in zip(chosen, found, strict=True):
                answers[index] = finish
        readback.start()
        return StepAnswers(readback, tuple(answers))

    def _predict(
        self,
        rows: Sequence[Row],
        chosen: Sequence[tuple[int, int]],
        hidden: Tensor,
        readback: Readback,
        answers: list[Answer],
    ) -> None:
        heads = self._heads
        if heads is None:
            raise BundleError("a prediction was asked for, but the bundle has no heads")
        readouts = [rows[index].readout for index, _ in chosen]
        features = [readout.features for readout in readouts if isinstance(readout, PredictReadout)]
        heads.check(features)
        dense, index = upload(
            [
                np.array(features, np.float32).reshape(len(features), heads.features),
                np.array([first for _, first in chosen], np.int64),
            ],
            self._device,
        )
        start = readback.add(heads.values(hidden[index], dense)).start
        for at, (row_index, _) in enumerate(chosen):
            answers[row_index] = _numbers(slice(start + at * heads.outputs, start + (at + 1) * heads.outputs))

    def _forks(self, readout: ForkReadout, hidden: Tensor) -> Tensor:
        """What each of the forks [F, H] reads: fp32 [F, columns]."""
        reads = readout.reads
        if isinstance(reads, ItemScores):
            return self._selector(reads.trie).log_p(hidden, reads.items)
        if self._heads is None:
            raise BundleError("a prediction was to be explained, but the bundle has no heads")
        self._heads.check(reads.features)
        [dense] = upload([np.array(reads.features, np.float32)], self._device)
        return self._heads.values(hidden, dense)

    def _selector(self, trie: str) -> DeviceSelector:
        selector = self.selectors.get(trie)
        if selector is None:
            raise ValueError(f"trie {trie!r} does not exist; there are {sorted(self.selectors)}")
        return selector


def _nothing(_: NDArray[np.int32]) -> RowOutput:
    return None


def _token_at(place: int) -> Answer:
    return lambda results: int(results[place])


def _numbers(place: slice) -> Answer:
    return lambda results: tuple(results[place].view(np.float32).tolist())
