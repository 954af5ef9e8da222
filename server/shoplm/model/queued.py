"""A step that the GPU works on while the host goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from shoplm.batch import StepResult
from shoplm.model.device_readouts import StepAnswers


class StepClock:
    """Seconds that the device spends on what is queued between construction and `stop`; on a CPU, that passed."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (_timed_event(), _timed_event())
            self._events[0].record()
        self._start = self._stop = time.perf_counter()

    def stop(self) -> None:
        """The last of the step's work is queued."""
        self._stop = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Waits for the step."""
        if self._events is None:
            return self._stop - self._start
        first, last = self._events
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


def _timed_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


@dataclass(frozen=True, slots=True)
class Queued:
    """The handle of a step in flight. An error of the device shows where the result is asked for."""

    answers: StepAnswers
    clock: StepClock

    def result(self) -> StepResult:
        outputs = self.answers.wait()
        return StepResult(outputs, self.clock.seconds())
