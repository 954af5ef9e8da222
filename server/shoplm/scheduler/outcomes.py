"""What the callers are told, and what is counted of it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from shoplm.request import (
    EngineOutput,
    FailedOutput,
    FinishedOutput,
    FinishReason,
    Request,
    SelectOutput,
    StepTokensOutput,
    Timings,
    TokensOutput,
)
from shoplm.scheduler.admission import Refusal
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.stats import SchedulerStats

if TYPE_CHECKING:
    from shoplm.batch import RowOutput  # numpy; the scheduler itself needs none


class Outcomes:
    """Outputs in the order in which things happened. Each request gets exactly one end."""

    def __init__(self, stats: SchedulerStats, forecast: Forecast) -> None:
        self._stats = stats
        self._forecast = forecast
        self._outputs: list[EngineOutput] = []

    def drain(self) -> list[EngineOutput]:
        """What happened since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def failed(self, request: Request, refusal: Refusal) -> None:
        """A request was not served."""
        kind, reason, message, retry = refusal
        self._outputs.append(FailedOutput(request.request_id, kind, message, reason, retry))
        self._stats.failure(request.service, kind, reason)

    def tokens(self, sequence: Sequence, tokens: tuple[int, ...], now: float) -> None:
        """A chat answer goes on."""
        request = sequence.request
        if sequence.first_seconds is None:
            sequence.first_seconds = now
            self._stats.first(request.service, now - request.arrival_seconds)
        elif sequence.last_token_seconds is not None:
            # Tokens that come together share the time; but how long it is until something comes is all of it.
            gap = now - sequence.last_token_seconds
            self._stats.inter_token(gap / len(tokens), len(tokens))
            self._forecast.saw_gaps(gap, 1)
        sequence.last_token_seconds = now
        self._outputs.append(TokensOutput(request.request_id, tokens, sequence.cached_tokens or 0))

    def answered(self, sequences: Seq[Sequence], tokens: list[int], now: float) -> None:
        """Answers that have their first token go on, each by one."""
        if not tokens:
            return
        # Most of them had their last token in the same step.
        last, count = sequences[0].last_token_seconds, 0
        for sequence in sequences:
            if sequence.last_token_seconds != last:
                self._saw_gaps(now - _moment(last), count)
                last, count = sequence.last_token_seconds, 0
            count += 1
            sequence.last_token_seconds = now
        self._saw_gaps(now - _moment(last), count)
        self._outputs.append(StepTokensOutput([sequence.request.request_id for sequence in sequences], tokens))

    def _saw_gaps(self, seconds: float, count: int) -> None:
        self._stats.inter_token(seconds, count)
        self._forecast.saw_gaps(seconds, count)

    def finished(
        self, sequence: Sequence, now: float, *, reason: FinishReason = FinishReason.STOP, output: RowOutput = None
    ) -> None:
        """A request was served."""
        request = sequence.request
        arrival = request.arrival_seconds
        started = sequence.started_seconds
        assert started is not None, "what was not computed is not finished"
        if sequence.first_seconds is None:
            sequence.first_seconds = now
            self._stats.first(request.service, now - arrival)
        self._stats.finished(request.service, now - arrival)
        for degradation in sequence.degraded:
            self._stats.degraded[f"{request.service}:{degradation}"] += 1
        self._forecast.saw_answer(sequence)
        self._outputs.append(
            FinishedOutput(
                request_id=request.request_id,
                timings=Timings(started - arrival, sequence.first_seconds - arrival, now - arrival),
                prompt_tokens=sequence.prompt_length,
                cached_tokens=sequence.cached_tokens or 0,
                completion_tokens=sequence.completion_tokens,
                finish_reason=reason,
                selected=output if isinstance(output, SelectOutput) else None,
                values=output if isinstance(output, tuple) else (),
                degraded=sequence.degraded,
            )
        )


def _moment(last_token_seconds: float | None) -> float:
    assert last_token_seconds is not None, "an answer that goes on has its first token"
    return last_token_seconds
