"""The API process's side of the process boundary, and the engine's supervisor.

`ProcessEngineClient` starts the engine as a process, restarts it when it dies and fails the calls it took with it.
`ThreadEngineClient` runs the same loop over the same sockets in a thread, for tests and benchmarks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

import msgspec
from shoplm.engine.channel import Frames, decode_outputs, encode, frame, socket_pair
from shoplm.engine.process import run
from shoplm.engine.spec import EngineSpec
from shoplm.errors import (
    CancelledByCallerError,
    ConfigurationError,
    EngineFailureError,
    EngineUnavailableError,
    ExpiredError,
    InvalidRequestError,
    OverloadedError,
    ShopLMError,
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
    Submit,
    TokensOutput,
)

_STOP_SECONDS = 10.0  # for an engine that was told to drain
_FIRST_BACKOFF_SECONDS, _LAST_BACKOFF_SECONDS = 0.1, 10.0

log = logging.getLogger("shoplm.engine")

CallOutput: TypeAlias = TokensOutput | FinishedOutput | FailedOutput


class _Call:
    """What came for one request and nobody has taken yet."""

    __slots__ = ("_loop", "_outputs", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outputs: list[CallOutput] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, output: CallOutput) -> None:
        self._outputs.append(output)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[CallOutput]:
        """All that is there, waiting for the first."""
        if not self._outputs:
            self._waiting = self._loop.create_future()
            await self._waiting
        outputs, self._outputs = self._outputs, []
        return outputs


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
        self._unsent: list[bytes] = []  # of this turn of the event loop
        self._calls: dict[str, _Call] = {}
        self._stats_callbacks: list[Callable[[StepStats], None]] = []
        self._state_callbacks: list[Callable[[bool], None]] = []
        self._loaded: asyncio.Future[None] | None = None
        self._serving = False

    # ---- calls -------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[TokensOutput | FinishedOutput]:
        """Submit a request; yields its tokens and last its end. Raises the ShopLMError of a request that fails.

        Tokens that came while nobody waited for them are one output: a caller who is slow gets them in fewer pieces.
        Closing the generator, or cancelling the task that awaits it, cancels the request in the engine.
        """
        call = self._submit(request)
        ended = False
        try:
            while not ended:
                for output in _merged(await call.take()):
                    ended = not isinstance(output, TokensOutput)
                    if isinstance(output, FailedOutput):
                        raise failure(output)
                    yield output
        finally:
            self._leave(request.request_id, ended)

    async def run(self, request: Request) -> FinishedOutput:
        """Submit a request and wait for its end."""
        call = self._submit(request)
        ended = False
        try:
            while True:
                for output in await call.take():
                    ended = not isinstance(output, TokensOutput)
                    if isinstance(output, FailedOutput):
                        raise failure(output)
                    if isinstance(output, FinishedOutput):
                        return output
        finally:
            self._leave(request.request_id, ended)

    def _submit(self, request: Request) -> _Call:
        if not self._serving:
            raise EngineUnavailableError("the engine is not running")
        if request.request_id in self._calls:
            raise InvalidRequestError(("request", f"request id {request.request_id!r} is in use"))
        call = self._calls[request.request_id] = _Call(asyncio.get_running_loop())
        self._send(Submit(request))
        return call

    def _leave(self, request_id: str, ended: bool) -> None:
        if self._calls.pop(request_id, None) is None:
            return
        if not ended:
            self._send(Cancel(request_id))

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

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine and wait until it is loaded. Raises ConfigurationError if it cannot load."""
        await self._launch()

    async def close(self) -> None:
        """Stop the engine; calls in flight fail."""
        self._serving = False
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
        mine, its = socket_pair()
        mine.setblocking(False)
        transport, self._link = await loop.create_unix_connection(lambda: _Link(self._take), sock=mine)
        self._transport = transport
        await self._start_engine(its)
        await self._loaded
        self._serving = True

    def _disconnect(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    @abstractmethod
    async def _start_engine(self, connection: socket.socket) -> None:
        """Start an engine at this end of the channel, which becomes its own."""

    @abstractmethod
    async def _stop_engine(self) -> None:
        """Wait for the end of the engine, which has been told to drain."""

    def _send(self, message: Submit | Cancel | Drain) -> None:
        # What one turn of the event loop has to say goes out at its end, at the cost of one system call.
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame(encode(message)))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        # Never waits, and the transport's buffer has no bound: what may be in flight is bounded by the engine's own
        # queue. Once the engine has gone nothing is sent; whoever notices that it has fails its calls.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(unsent))

    def _take(self, output: EngineOutput) -> None:
        if isinstance(output, StatsOutput):
            for callback in self._stats_callbacks:
                callback(output.stats)
        elif isinstance(output, ReadyOutput):
            self.ready = output
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_result(None)
        elif (call := self._calls.get(output.request_id)) is not None:
            call.put(output)
        elif isinstance(output, FailedOutput) and not output.request_id:
            self._load_failed(output.message)

    def _load_failed(self, message: str) -> None:
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(ConfigurationError(message))

    def _fail_calls(self, message: str) -> None:
        for request_id, call in self._calls.items():
            call.put(FailedOutput(request_id, FailureKind.UNAVAILABLE, message, "ENGINE_UNAVAILABLE", 1.0))
        self._calls.clear()  # this was their end: what the engine still says of them is not for them

    def _changed(self, serving: bool) -> None:
        self._serving = serving
        for callback in self._state_callbacks:
            callback(serving)


class ProcessEngineClient(EngineClient):
    """The engine in a process of its own, started again with a growing pause when it dies."""

    program = (sys.executable, "-m", "shoplm.engine.process")  # called with descriptor and spec

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def process_id(self) -> int | None:
        """The engine's process id."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        await self._launch()
        self._watcher = asyncio.create_task(self._watch())

    async def _start_engine(self, connection: socket.socket) -> None:
        with connection:
            self._process = await asyncio.create_subprocess_exec(
                *self.program,
                str(connection.fileno()),
                msgspec.json.encode(self.spec).decode(),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(connection.fileno(),),
                # Threads that spin while they wait take the cores from whoever shares them, the API process first.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
        process, link, loaded = self._process, self._link, self._loaded
        assert link is not None and loaded is not None

        async def died() -> None:
            code = await process.wait()
            await link.lost  # what the engine said before it ended comes before that
            if not loaded.done():
                loaded.set_exception(ConfigurationError(f"the engine ended with code {code} while it was loading"))

        self._early_death = asyncio.create_task(died())

    async def _watch(self) -> None:
        pause = _FIRST_BACKOFF_SECONDS
        while True:
            assert self._process is not None
            code = await self._process.wait()
            if self._closing:
                return
            log.error("the engine process ended with code %s", code)
            self._fail_calls("the engine was lost")
            self._changed(False)
            while True:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_BACKOFF_SECONDS)
                try:
                    await self._launch()
                except (ShopLMError, OSError) as error:
                    log.error("the engine does not start: %s", error)
                    continue
                break
            pause = _FIRST_BACKOFF_SECONDS
            self._changed(True)

    async def _stop_engine(self) -> None:
        self._closing = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))
        if self._process is None:
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            log.warning("the engine did not stop in %s s and is killed", _STOP_SECONDS)
            self._process.kill()
            await self._process.wait()
        await self._early_death


class ThreadEngineClient(EngineClient):
    """The engine in a thread of this process."""

    def __init__(self, spec: EngineSpec, load: Callable[[EngineSpec], Backend] | None = None) -> None:
        """`load` makes the backend; None: the one that the spec names."""
        super().__init__(spec)
        self._load = load
        self._thread: threading.Thread | None = None

    async def _start_engine(self, connection: socket.socket) -> None:
        load = self._load
        if load is None:
            from shoplm.engine.load import load_backend

            load = load_backend
        arguments = (connection, self.spec, load)
        self._thread = threading.Thread(target=run, args=arguments, name="shoplm-engine", daemon=True)
        self._thread.start()

    async def _stop_engine(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _STOP_SECONDS)


def failure(output: FailedOutput) -> ShopLMError:
    """The exception for a request that the engine did not serve."""
    match output.kind:
        case FailureKind.OVERLOADED:
            return OverloadedError(output.message, reason=output.reason, retry_seconds=output.retry_seconds)
        case FailureKind.EXPIRED:
            return ExpiredError(output.message)
        case FailureKind.CANCELLED:
            return CancelledByCallerError(output.message)
        case FailureKind.INVALID:
            return InvalidRequestError(("request", output.message))
        case FailureKind.UNAVAILABLE:
            return EngineUnavailableError(output.message, retry_seconds=output.retry_seconds)
        case FailureKind.INTERNAL:
            return EngineFailureError(output.message)


def _merged(outputs: list[CallOutput]) -> list[CallOutput]:
    """The same with the tokens in one output. They come before the end."""
    if len(outputs) < 2:
        return outputs
    pieces = [output for output in outputs if isinstance(output, TokensOutput)]
    if len(pieces) < 2:
        return outputs
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return [TokensOutput(pieces[-1].request_id, tokens, pieces[-1].cached_tokens), *outputs[len(pieces) :]]
