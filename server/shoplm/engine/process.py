"""The engine's side of the process boundary: messages in, steps, messages out.

`python -m shoplm.engine.process SOCKET` is how the API process starts it; SOCKET is an inherited descriptor. What to
load comes by standard input: a line of JSON, and behind it what the API process has read of the bundle, as MessagePack.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from io import FileIO
from threading import Thread
from typing import NamedTuple, TypeVar

import msgspec
from shoplm.collector import keep_loaded, pause_collector
from shoplm.engine.channel import EngineEnd
from shoplm.engine.engine import Engine, scheduler_config
from shoplm.engine.shop_texts import ShopTexts
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError, ShopLMError
from shoplm.logs import configure_logs
from shoplm.model.backend import Backend
from shoplm.request import Cancel, Drain, FailedOutput, FailureKind, ReadyOutput, StatsOutput, Submit

REPORT_SECONDS = 0.2  # between two reports of statistics, while there is something to tell

log = logging.getLogger("shoplm.engine")
T = TypeVar("T")


def run(connection: socket.socket, spec: EngineSpec, load: Callable[[EngineSpec], Backend]) -> int:
    """Serve the API process at the other end until it drains this engine or has gone. Returns the exit code."""
    with contextlib.closing(EngineEnd(connection)) as channel:
        try:
            backend = load(spec)
        except (ShopLMError, OSError, ValueError, MemoryError) as error:
            reason = error.reason if isinstance(error, ShopLMError) else ConfigurationError.reason
            with contextlib.suppress(OSError):
                channel.send([FailedOutput("", FailureKind.UNAVAILABLE, str(error), reason)])
            return 2
        info = backend.info
        ready = ReadyOutput(
            info.pages,
            info.page_size,
            min(info.max_context_tokens, info.pages * info.page_size),
            info.name,
            info.trie_items,
            info.trie_depths,
        )
        keep_loaded()
        _give_back_memory()
        # Whoever asked may have gone in the meantime, or may go in the midst of a message: there is nobody to tell.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.send([ready])
            _Loop(Engine(backend, scheduler_config(spec)), channel).run()
        backend.close()
        return 0


def _give_back_memory() -> None:
    """Return what loading freed to the system. glibc would keep hundreds of megabytes that nobody asks for again."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class _Loop:
    """Alternates between messages and steps."""

    def __init__(self, engine: Engine, channel: EngineEnd) -> None:
        self._engine = engine
        self._channel = channel
        self._draining = False
        self._reported = 0.0
        self._has_news = True  # what no report has said yet; before any work, the number of free pages

    def run(self) -> None:
        """Run until drained and idle, or the other side has gone."""
        engine = self._engine
        while not (self._draining and engine.is_idle):
            if engine.is_idle:
                self._wait()
            if not self._receive():
                return
            outputs = engine.step()
            self._has_news = True
            if time.monotonic() - self._reported >= REPORT_SECONDS:
                outputs.append(self._report())
            if outputs:
                self._channel.send(outputs)
        self._channel.send([self._report()])

    def _report(self) -> StatsOutput:
        self._reported, self._has_news = time.monotonic(), False
        return StatsOutput(self._engine.report())

    def _wait(self) -> None:
        """Block until there is a message. Before that, report what has not been reported yet."""
        if self._has_news and not self._channel.wait(REPORT_SECONDS):
            self._channel.send([self._report()])
        self._channel.wait(None)

    def _receive(self) -> bool:
        """Take all messages that are there. False: the other side has gone."""
        messages = self._channel.receive()
        if messages is None:
            return False
        for message in messages:
            match message:
                case Submit(request=request):
                    self._engine.submit(request)
                case Cancel(request_id=request_id, answered=answered):
                    self._engine.cancel(request_id, answered=answered)
                case Drain():
                    self._draining = True
        return True


def main() -> int:
    """Entry of the process. A terminal's signals and a group's SIGTERM are for the parent, which drains this one."""
    pause_collector()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    start = read_start_input()
    from shoplm.engine.load import load_backend  # seconds, in which the API process finds out what to load

    spec = start.spec.result()
    if spec is None:
        return 0
    configure_logs(spec.log_level, spec.log_format)
    try:
        return run(connection, spec, partial(load_backend, shop_texts=start.shop_texts.result))
    except Exception:
        log.exception("the engine failed")
        return 1


class StartInput(NamedTuple):
    """What the API process writes to the standard input."""

    spec: Future[EngineSpec | None]  # None: the API process has gone without a word
    shop_texts: Future[ShopTexts | None]  # None: it has none to give


def read_start_input() -> StartInput:
    """Read in a daemon thread: an engine that cannot load ends without waiting for the rest of the input."""
    start = StartInput(Future(), Future())

    def run() -> None:
        # Unbuffered: an interpreter that ends would wait for a buffer's lock.
        with FileIO(sys.stdin.fileno(), closefd=False) as source:
            _settle(start.spec, source.readline, partial(msgspec.json.decode, type=EngineSpec))
            _settle(start.shop_texts, source.readall, partial(msgspec.msgpack.decode, type=ShopTexts))

    Thread(target=run, daemon=True).start()
    return start


def _settle(future: Future[T | None], read: Callable[[], bytes | None], decode: Callable[[bytes], T]) -> None:
    try:
        future.set_result(decode(written) if (written := read()) else None)
    except (OSError, ValueError) as error:  # a part of a message: whoever wrote it has gone
        future.set_exception(error)


if __name__ == "__main__":
    sys.exit(main())
