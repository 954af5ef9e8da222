"""The API process's side of the process boundary, and the engine's supervisor.

`ProcessEngineClient` starts the engine as a process, restarts it when it dies and fails the calls it took with it.
`ThreadEngineClient` runs the same loop over the same socket in a thread, for tests and benchmarks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
from shoplm.engine.process import decode_outputs, encode, run
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


class EngineClient(ABC):
    """Submits requests and hands out what comes back. One event loop; subclasses say where the engine runs."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.ready: ReadyOutput | None = None
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="shoplm-")
        self._calls: dict[str, asyncio.Queue[EngineOutput]] = {}
        self._stats_callbacks: list[Callable[[StepStats], None]] = []
        self._state_callbacks: list[Callable[[bool], None]] = []
        self._receiver: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._serving = False
        self._lives = 0

    # ---- calls -------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[TokensOutput | FinishedOutput]:
        """Submit a request; yields its tokens and last its end. Raises the ShopLMError of a request that fails.

        Closing the generator, or cancelling the task that awaits it, cancels the request in the engine.
        """
        if not self._serving or self._socket is None:
            raise EngineUnavailableError("the engine is not running")
        if request.request_id in self._calls:
            raise InvalidRequestError(("request", f"request id {request.request_id!r} is in use"))
        queue: asyncio.Queue[EngineOutput] = asyncio.Queue()
        self._calls[request.request_id] = queue
        ended = False
        try:
            self._send(Submit(request))
            while not ended:
                output = await queue.get()
                ended = not isinstance(output, TokensOutput)
                if isinstance(output, FailedOutput):
                    raise failure(output)
                if isinstance(output, TokensOutput | FinishedOutput):
                    yield output
        finally:
            self._calls.pop(request.request_id, None)
            if not ended and self._serving:
                self._send(Cancel(request.request_id))

    async def run(self, request: Request) -> FinishedOutput:
        """Submit a request and wait for its end."""
        async with contextlib.aclosing(self.generate(request)) as outputs:
            async for output in outputs:
                if isinstance(output, FinishedOutput):
                    return output
        raise EngineFailureError(f"request {request.request_id} ended without a result")

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
        if self._socket is not None:
            self._send(Drain())
        await self._stop_engine()
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait((self._receiver,))
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        self._context.term()
        self._folder.cleanup()

    async def _launch(self) -> None:
        """A new socket, a new engine."""
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait((self._receiver,))
        if self._socket is not None:
            self._socket.close(linger=0)
        self._lives += 1
        address = f"ipc://{Path(self._folder.name) / f'engine-{self._lives}'}"
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(address)
        self._loaded = asyncio.get_running_loop().create_future()
        self._receiver = asyncio.create_task(self._receive(socket))
        await self._start_engine(address)
        await self._loaded
        self._serving = True

    @abstractmethod
    async def _start_engine(self, address: str) -> None:
        """Start an engine that connects to `address`."""

    @abstractmethod
    async def _stop_engine(self) -> None:
        """Wait for the end of the engine, which has been told to drain."""

    def _send(self, message: Submit | Cancel | Drain) -> None:
        assert self._socket is not None
        # Done when this returns: the queue has no bound; what may be in flight is bounded by the engine's own queue.
        # It has to be the asyncio socket's own send: ZeroMQ tells of new messages once, and a plain send would take
        # that signal away from the receiver, which would then wait for the next one.
        sent = self._socket.send(encode(message), zmq.NOBLOCK)
        if isinstance(sent, asyncio.Future) and sent.done():
            sent.exception()  # there is no engine any more: its calls are failed by whoever notices that it has gone

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            for output in decode_outputs(await socket.recv()):
                self._take(output)

    def _take(self, output: EngineOutput) -> None:
        match output:
            case StatsOutput(stats=stats):
                for callback in self._stats_callbacks:
                    callback(stats)
            case ReadyOutput():
                self.ready = output
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_result(None)
            case FailedOutput(request_id="", message=message):
                self._load_failed(message)
            case TokensOutput() | FinishedOutput() | FailedOutput():
                queue = self._calls.get(output.request_id)
                if queue is not None:
                    queue.put_nowait(output)

    def _load_failed(self, message: str) -> None:
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(ConfigurationError(message))

    def _fail_calls(self, message: str) -> None:
        for request_id, queue in self._calls.items():
            queue.put_nowait(FailedOutput(request_id, FailureKind.UNAVAILABLE, message, "ENGINE_UNAVAILABLE", 1.0))

    def _changed(self, serving: bool) -> None:
        self._serving = serving
        for callback in self._state_callbacks:
            callback(serving)


class ProcessEngineClient(EngineClient):
    """The engine in a process of its own, started again with a growing pause when it dies."""

    program = (sys.executable, "-m", "shoplm.engine.process")  # called with address, spec and this process's id

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

    async def _start_engine(self, address: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self.program,
            address,
            msgspec.json.encode(self.spec).decode(),
            str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            # Threads that spin while they wait take the cores from whoever shares them, the API process first.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        process, loaded = self._process, self._loaded

        async def died() -> None:
            code = await process.wait()
            # What the engine said before it ended may still be on its way.
            await asyncio.sleep(0.2)
            if loaded is not None and not loaded.done():
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

    async def _start_engine(self, address: str) -> None:
        load = self._load
        if load is None:
            from shoplm.engine.load import load_backend

            load = load_backend
        self._thread = threading.Thread(target=run, args=(address, self.spec, load), name="shoplm-engine", daemon=True)
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
