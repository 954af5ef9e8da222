"""The API process's side of the process boundary.

`supervisor.ProcessEngineClient` runs the engine as a process; `ThreadEngineClient` runs the same loop over the same
sockets in a thread, for tests and benchmarks.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from shoplm.engine.calls import Call
from shoplm.engine.channel import Frames, decode_outputs, encode, frame, socket_pair
from shoplm.engine.process import run
from shoplm.engine.silence import Silence
from shoplm.engine.spec import EngineSpec
from shoplm.errors import (
    BundleChangedError,
    ConfigurationError,
    EngineUnavailableError,
    InvalidRequestError,
    TransientError,
)
from shoplm.model.backend import Backend
from shoplm.request import (
    Cancel,
    Drain,
    EngineOutput,
    FailedOutput,
    FailureKind,
    FinishedOutput,
    ReadyOutput,
    Request,
    StatsOutput,
    StepStats,
    StepTokensOutput,
    Submit,
    TokensOutput,
)

_MANY_CALLS, _PAUSE_SECONDS = 16, 1e-3
STOP_SECONDS = 10.0  # for an engine that was told to drain


class _Link(asyncio.Protocol):
    """The API process's end of the channel. `lost` is done when the engine's end is closed."""

    def __init__(self, take: Callable[[EngineOutput], None]) -> None:
        self._take = take
        self._frames = Frames()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            for output in decode_outputs(message):
                self._take(output)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


class EngineClient(ABC):
    """Submits requests and hands out what comes back. One event loop; subclasses say where the engine runs."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.ready: ReadyOutput | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._link: _Link | None = None
        self._unsent: list[bytes] = []
        self._sent_at = 0.0  # when the last of it went out, by the loop's clock
        self._calls: dict[str, Call] = {}
        self._stats_callbacks: list[Callable[[StepStats], None]] = []
        self._state_callbacks: list[Callable[[bool], None]] = []
        self._end_callbacks: list[Callable[[TransientError], None]] = []
        self._loaded: asyncio.Future[None] | None = None
        self._silence = Silence()
        self._serving = False

    # ---- calls -------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[TokensOutput | FinishedOutput]:
        """Submit a request; yields its tokens and last its end. Raises the ShopLMError of a request that fails.

        Tokens that came while nobody waited for them are one output: a caller who is slow gets them in fewer pieces.
        Closing the generator, or cancelling the task that awaits it, cancels the request in the engine.
        """
        call = self._submit(request)
        try:
            while isinstance(output := await call.take(), TokensOutput):
                yield output
            yield output
        finally:
            self._leave(request.request_id, call)

    def answered(self, request_id: str) -> None:
        """The caller has all it wanted of an answer: no more is computed, and the request counts as finished."""
        call = self._calls.pop(request_id, None)
        if call is not None and not call.has_ended:
            self._send(Cancel(request_id, answered=True))

    async def run(self, request: Request) -> FinishedOutput:
        """Submit a request and wait for its end."""
        call = self._submit(request)
        try:
            while isinstance(output := await call.take(), TokensOutput):
                pass
            return output
        finally:
            self._leave(request.request_id, call)

    def _submit(self, request: Request) -> Call:
        if not self._serving:
            raise EngineUnavailableError("the engine is not running")
        if request.request_id in self._calls:
            raise InvalidRequestError(("request", f"request id {request.request_id!r} is in use"))
        call = self._calls[request.request_id] = Call(request.request_id, asyncio.get_running_loop())
        self._send(Submit(request))
        return call

    def _leave(self, request_id: str, call: Call) -> None:
        if self._calls.pop(request_id, None) is not None and not call.has_ended:
            self._send(Cancel(request_id))

    @property
    def process_id(self) -> int | None:
        """The engine's process id. None: it has no process of its own."""
        return None

    @property
    def in_flight(self) -> int:
        """Calls that wait for something."""
        return len(self._calls)

    def on_stats(self, callback: Callable[[StepStats], None]) -> None:
        """Call back with each report of the engine."""
        self._stats_callbacks.append(callback)

    def on_state(self, callback: Callable[[bool], None]) -> None:
        """Call back with False when the engine is lost and with True when it serves again."""
        self._state_callbacks.append(callback)

    def on_end(self, callback: Callable[[TransientError], None]) -> None:
        """Call back when the engine is lost and none can take its place."""
        self._end_callbacks.append(callback)

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine and wait until it is loaded. Raises ConfigurationError if it cannot load, TransientError
        if it ended without a word."""
        await self._launch()

    async def close(self) -> None:
        """Stop the engine; calls in flight fail."""
        self._serving = False
        if self._transport is not None:
            for request_id, call in self._calls.items():
                if not call.has_ended:
                    self._send(Cancel(request_id))
        self._fail_calls("the server is stopping")
        if self._transport is not None:
            self._send(Drain())
        await self._stop_engine()
        self._disconnect()

    async def _launch(self) -> None:
        """A new channel, a new engine."""
        self._disconnect()
        loop = asyncio.get_running_loop()
        self._loaded = loop.create_future()
        mine = self._open_channel()
        mine.setblocking(False)
        transport, self._link = await loop.create_unix_connection(lambda: _Link(self._take), sock=mine)
        self._transport = transport
        await self._start_engine()
        await self._loaded
        self._serving = True

    def _disconnect(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    @abstractmethod
    def _open_channel(self) -> socket.socket:
        """A new channel: this process's end of it."""

    @abstractmethod
    async def _start_engine(self) -> None:
        """Start an engine at the other end."""

    @abstractmethod
    async def _stop_engine(self) -> None:
        """Wait for the end of the engine, which has been told to drain."""

    def _send(self, message: Submit | Cancel | Drain) -> None:
        self._silence.sent()
        # What one turn of the event loop has to say goes out at its end, at the cost of one system call. While there is
        # much to say, which the engine hears between its steps only, that is done once in a while.
        if not self._unsent:
            pause = _PAUSE_SECONDS if len(self._calls) >= _MANY_CALLS else 0.0
            asyncio.get_running_loop().call_at(self._sent_at + pause, self._flush)
        self._unsent.append(frame(encode(message)))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        self._sent_at = asyncio.get_running_loop().time()
        # Never waits, and the transport's buffer has no bound: what may be in flight is bounded by the engine's own
        # queue. Once the engine has gone nothing is sent; whoever notices that it has fails its calls.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(unsent))

    def _take(self, output: EngineOutput) -> None:
        self._silence.received()
        if isinstance(output, StepTokensOutput):
            for request_id, token in zip(output.request_ids, output.tokens, strict=True):
                if (call := self._calls.get(request_id)) is not None:
                    call.put_token(token)
        elif isinstance(output, StatsOutput):
            for callback in self._stats_callbacks:
                callback(output.stats)
        elif isinstance(output, ReadyOutput):
            self.ready = output
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_result(None)
        elif (call := self._calls.get(output.request_id)) is not None:
            call.put(output)
        elif isinstance(output, FailedOutput) and not output.request_id:
            self._load_failed(output)

    def _load_failed(self, output: FailedOutput) -> None:
        if self._loaded is not None and not self._loaded.done():
            kind = BundleChangedError if output.reason == BundleChangedError.reason else ConfigurationError
            self._loaded.set_exception(kind(output.message))

    def _fail_calls(self, message: str) -> None:
        for request_id, call in self._calls.items():
            call.put(FailedOutput(request_id, FailureKind.UNAVAILABLE, message, "ENGINE_UNAVAILABLE", 1.0))
        self._calls.clear()  # this was their end: what the engine still says of them is not for them

    def _changed(self, serving: bool) -> None:
        self._serving = serving
        for callback in self._state_callbacks:
            callback(serving)


class ThreadEngineClient(EngineClient):
    """The engine in a thread of this process."""

    def __init__(self, spec: EngineSpec, load: Callable[[EngineSpec], Backend] | None = None) -> None:
        """`load` makes the backend; None: the one that the spec names."""
        super().__init__(spec)
        self._load = load
        self._thread: threading.Thread | None = None
        self._its: socket.socket | None = None

    def _open_channel(self) -> socket.socket:
        mine, self._its = socket_pair()
        return mine

    async def _start_engine(self) -> None:
        load = self._load
        if load is None:
            from shoplm.engine.load import load_backend

            load = load_backend
        arguments = (self._its, self.spec, load)
        self._thread = threading.Thread(target=run, args=arguments, name="shoplm-engine", daemon=True)
        self._thread.start()

    async def _stop_engine(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)
