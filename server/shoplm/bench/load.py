"""Sends a plan, open loop: each request at its time, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from shoplm.bench.calls import Caller, Outcome, bearer, open_channel
from shoplm.bench.plan import Arrival, LoadSettings
from shoplm.request import Service

# How often the client checks that it is itself on time.
_PULSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What came back, and how well the client kept its own times."""

    outcomes: tuple[Outcome, ...]
    measured_seconds: float
    dropped: int  # arrivals of the measured window that the client could not hold: more than max_in_flight
    pulse_lags: tuple[float, ...]  # seconds by which the client's event loop was late, sampled while measuring
    client_cpu_seconds: float  # while measuring

    @classmethod
    def joined(cls, runs: Sequence[LoadRun]) -> LoadRun:
        """Several windows as one."""
        return cls(
            outcomes=tuple(outcome for run in runs for outcome in run.outcomes),
            measured_seconds=sum(run.measured_seconds for run in runs),
            dropped=sum(run.dropped for run in runs),
            pulse_lags=tuple(lag for run in runs for lag in run.pulse_lags),
            client_cpu_seconds=sum(run.client_cpu_seconds for run in runs),
        )


async def run_load(
    address: str,
    settings: LoadSettings,
    arrivals: Sequence[Arrival],
    requests: Callable[[Arrival], Any],
    *,
    token: str | None = None,
    window_starts: Callable[[], Awaitable[None]] | None = None,
    window_ends: Callable[[], Awaitable[None]] | None = None,
) -> LoadRun:
    """Send `arrivals` to `address`; `requests` gives each one's message.

    The two callbacks run when the measured window starts and ends, beside the load. Returns when every call has ended:
    at the latest its deadline after the last was sent.
    """
    messages = {(arrival.service, arrival.customer): requests(arrival) for arrival in arrivals}
    metadata = bearer(token)
    async with open_channel(address) as channel:
        await channel.channel_ready()
        sender = _Sender(Caller(channel, metadata), settings, arrivals, messages)
        return await sender.run(window_starts, window_ends)


class _Sender:
    def __init__(
        self,
        caller: Caller,
        settings: LoadSettings,
        arrivals: Sequence[Arrival],
        messages: dict[tuple[Service, int], Any],
    ) -> None:
        self._caller = caller
        self._settings = settings
        self._arrivals = arrivals
        self._messages = messages
        self._outcomes: list[Outcome] = []
        self._running: set[asyncio.Task[None]] = set()
        self._dropped = 0
        self._lags: list[float] = []

    async def run(
        self,
        window_starts: Callable[[], Awaitable[None]] | None,
        window_ends: Callable[[], Awaitable[None]] | None,
    ) -> LoadRun:
        process = psutil.Process()
        start = time.perf_counter()
        window = (start + self._settings.warmup_seconds, start + self._settings.warmup_seconds + self._settings.seconds)
        sending = asyncio.create_task(self._send_all(start))
        await _until(window[0])
        cpu = _cpu_seconds(process)
        if window_starts is not None:
            await window_starts()
        pulse = asyncio.create_task(self._pulse())
        await _until(window[1])
        cpu = _cpu_seconds(process) - cpu
        pulse.cancel()
        if window_ends is not None:
            await window_ends()
        await sending
        if self._running:
            await asyncio.wait(self._running)
        return LoadRun(tuple(self._outcomes), self._settings.seconds, self._dropped, tuple(self._lags), cpu)

    async def _send_all(self, start: float) -> None:
        for arrival in self._arrivals:
            intended = start + arrival.seconds
            await _until(intended)
            if len(self._running) >= self._settings.max_in_flight:
                self._dropped += arrival.measured
                continue
            outcome = Outcome(arrival.service, arrival.measured, intended)
            self._outcomes.append(outcome)
            message = self._messages[arrival.service, arrival.customer]
            deadline = self._settings.call_deadline_seconds(arrival.service)
            task = asyncio.create_task(self._caller.perform(message, outcome, deadline))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _pulse(self) -> None:
        while True:
            due = time.perf_counter() + _PULSE_SECONDS
            await asyncio.sleep(_PULSE_SECONDS)
            self._lags.append(time.perf_counter() - due)


async def _until(moment: float) -> None:
    """Return at `moment` (perf_counter seconds); at once when it is past, so that a late client catches up."""
    delay = moment - time.perf_counter()
    if delay > 0:
        await asyncio.sleep(delay)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
