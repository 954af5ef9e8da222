"""The engine's side of the process boundary: ZeroMQ and msgspec in, ZeroMQ and msgspec out.

`python -m shoplm.engine.process ADDRESS SPEC PARENT` is how the API process starts it.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

import msgspec
import zmq
from shoplm.engine.engine import Engine, scheduler_config
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ShopLMError
from shoplm.model.backend import Backend
from shoplm.request import (
    Cancel,
    Drain,
    EngineInput,
    EngineOutput,
    FailedOutput,
    FailureKind,
    ReadyOutput,
    StatsOutput,
    Submit,
)

REPORT_SECONDS = 0.2  # between two reports of statistics, while there is something to tell
_REPORT_MILLISECONDS = round(REPORT_SECONDS * 1000)
_IDLE_POLL_MILLISECONDS = 1000  # how often an idle engine looks whether its parent is alive

log = logging.getLogger("shoplm.engine")
encode = msgspec.msgpack.Encoder().encode
decode_input = msgspec.msgpack.Decoder(EngineInput).decode
decode_outputs = msgspec.msgpack.Decoder(list[EngineOutput]).decode


def run(address: str, spec: EngineSpec, load: Callable[[EngineSpec], Backend], parent: int | None = None) -> int:
    """Serve one API process until it drains this engine or dies. Returns the exit code.

    `parent` is the process whose end is this engine's, too; None: whoever is the parent now.
    """
    parent = os.getppid() if parent is None else parent
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    # Undelivered answers of an engine that ends are worth a moment, not a hang.
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address)
    try:
        started = time.monotonic()
        try:
            backend = load(spec)
        except (ShopLMError, OSError, ValueError, MemoryError) as error:
            socket.send(encode([FailedOutput("", FailureKind.UNAVAILABLE, str(error), "CONFIGURATION")]))
            return 2
        info = backend.info
        ready = ReadyOutput(
            info.pages,
            info.page_size,
            info.max_context_tokens,
            info.name,
            time.monotonic() - started,
            info.trie_items,
            can_explain=info.can_explain,
        )
        socket.send(encode([ready]))
        gc.collect()
        gc.freeze()
        _Loop(Engine(backend, scheduler_config(spec)), socket, parent).run()
        backend.close()
        return 0
    finally:
        socket.close()
        context.term()


class _Loop:
    """Alternates between messages and steps."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], parent: int) -> None:
        self._engine = engine
        self._socket = socket
        self._parent = parent
        self._draining = False
        self._reported = 0.0
        self._has_news = False  # of what no report has told yet

    def run(self) -> None:
        """Until drained and idle, or the parent is gone."""
        engine = self._engine
        while not (self._draining and engine.is_idle):
            if not self._receive(wait=engine.is_idle):
                return
            outputs: list[EngineOutput] = engine.step()
            self._has_news = True
            if time.monotonic() - self._reported >= REPORT_SECONDS:
                if os.getppid() != self._parent:
                    return
                outputs.append(self._report())
            if outputs:
                self._socket.send(encode(outputs))
        self._socket.send(encode([self._report()]))

    def _report(self) -> StatsOutput:
        self._reported, self._has_news = time.monotonic(), False
        return StatsOutput(self._engine.report())

    def _receive(self, wait: bool) -> bool:
        """Take all messages that are there; an idle engine waits for the first. False: the parent has died."""
        while wait and not self._socket.poll(_REPORT_MILLISECONDS if self._has_news else _IDLE_POLL_MILLISECONDS):
            if os.getppid() != self._parent:
                return False
            if self._has_news:
                self._socket.send(encode([self._report()]))
        while True:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            match decode_input(message):
                case Submit(request=request):
                    self._engine.submit(request)
                case Cancel(request_id=request_id):
                    self._engine.cancel(request_id)
                case Drain():
                    self._draining = True


def main() -> int:
    """Entry of the process. A terminal's Ctrl-C and a group's SIGTERM are for the parent, which drains this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    address, spec = sys.argv[1], msgspec.json.decode(sys.argv[2], type=EngineSpec)
    from shoplm.engine.load import load_backend

    # The parent names itself: it may have died while this process was starting.
    return run(address, spec, load_backend, int(sys.argv[3]))


if __name__ == "__main__":
    sys.exit(main())
