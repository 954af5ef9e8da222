"""What is read of each customer: moments, tasks and what each hidden state is for. The labels come elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np
import polars as pl
from numpy.typing import NDArray
from shoplm.history import History
from shoplm.training.timeline import Timeline

BASKETS_PER_CUSTOMER = 24  # recommendation examples of training at visits, the newest


class Task(IntEnum):
    RECOMMEND = 0
    PREDICT = 1


class Use(IntFlag):
    """A hidden state may serve several."""

    ITEM_TRAIN = 1  # label: the basket at the moment, or the next one
    ITEM_TUNE = 2
    ITEM_TEST_TIME = 4  # at test_at; label: the next basket
    ITEM_TEST_LAST = 8  # at the customer's last visit; label: that basket
    HEAD_TRAIN = 16
    HEAD_TUNE = 32
    HEAD_TEST = 64
    CAMPAIGN = 128  # at the start of a campaign that reached the customer; no hidden state is read there


@dataclass(frozen=True, slots=True)
class Sample:
    """One hidden state to read. `required` ones are worth a pass of their own; the others ride along."""

    moment: float  # Unix seconds; the history is what lies strictly before
    task: Task
    use: Use
    required: bool


def samples_of(history: History, timeline: Timeline, campaign_starts: Sequence[float] = ()) -> list[Sample]:
    """All samples of one customer, in order of time; none where there is no history before the moment."""
    if not len(history):
        return []
    visits = np.unique(history.time)
    wanted: dict[tuple[float, Task], tuple[Use, bool]] = {}

    def add(moment: float, task: Task, use: Use, required: bool) -> None:
        if visits[0] < moment:
            old, old_required = wanted.get((moment, task), (Use(0), False))
            wanted[moment, task] = (old | use, old_required or required)

    for moment in timeline.train_at:
        newest = moment == timeline.train_at[-1]
        add(moment, Task.RECOMMEND, Use.ITEM_TRAIN, newest)
        add(moment, Task.PREDICT, Use.HEAD_TRAIN, newest)
    add(timeline.tuned_at, Task.RECOMMEND, Use.ITEM_TUNE, True)
    add(timeline.tuned_at, Task.PREDICT, Use.HEAD_TUNE, True)
    add(timeline.test_at, Task.RECOMMEND, Use.ITEM_TEST_TIME, True)
    add(timeline.test_at, Task.PREDICT, Use.HEAD_TEST, True)
    for moment in campaign_starts:
        add(moment, Task.PREDICT, Use.CAMPAIGN, False)
    for moment in visits[visits < timeline.tuned_at][-BASKETS_PER_CUSTOMER:].tolist():
        add(moment, Task.RECOMMEND, Use.ITEM_TRAIN, False)
    between = visits[(visits >= timeline.tuned_at) & (visits < timeline.test_at)]
    if len(between):
        add(float(between[-1]), Task.RECOMMEND, Use.ITEM_TUNE, False)
    if visits[-1] >= timeline.test_at:
        add(float(visits[-1]), Task.RECOMMEND, Use.ITEM_TEST_LAST, True)
    return [Sample(moment, task, *wanted[moment, task]) for moment, task in sorted(wanted)]


def campaign_starts(campaigns: pl.DataFrame, customers: int) -> list[list[float]]:
    """The starts of the campaigns that reached each customer, in order."""
    starts: list[set[float]] = [set() for _ in range(customers)]
    for customer, start in campaigns.select("customer", "start").iter_rows():
        starts[customer].add(start)
    return [sorted(times) for times in starts]


@dataclass(frozen=True)
class HiddenTable:
    """Samples that were computed, with their hidden states: arrays of one length [S]."""

    customer: NDArray[np.int32]
    moment: NDArray[np.float64]
    task: NDArray[np.int8]
    use: NDArray[np.int16]
    hidden: NDArray[np.float32]  # [S, H] after the final norm

    def __post_init__(self) -> None:
        lengths = {len(self.customer), len(self.moment), len(self.task), len(self.use), len(self.hidden)}
        if len(lengths) != 1:
            raise ValueError(f"HiddenTable columns differ in length: {sorted(lengths)}")

    @classmethod
    def bare(cls, samples: Sequence[tuple[int, Sample]]) -> HiddenTable:
        """Samples (customer, sample) with hidden states of width 0: for baselines, or labels alone."""
        return cls(
            np.array([customer for customer, _ in samples], np.int32),
            np.array([sample.moment for _, sample in samples], np.float64),
            np.array([int(sample.task) for _, sample in samples], np.int8),
            np.array([int(sample.use) for _, sample in samples], np.int16),
            np.zeros((len(samples), 0), np.float32),
        )

    def __len__(self) -> int:
        return len(self.customer)

    def where(self, task: Task, use: Use) -> NDArray[np.intp]:
        """Indices of the samples of a task that serve `use`."""
        return np.flatnonzero((self.task == int(task)) & ((self.use & int(use)) != 0))
