"""`shoplm serve`: settings in, a server until a signal, exit code out."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shoplm.address import address
from shoplm.config import ServerConfig
from shoplm.config_sources import load_config
from shoplm.engine.launch import EngineProcess
from shoplm.errors import ConfigurationError, TransientError
from shoplm.logs import configure_logs
from shoplm.model.origin import Origin
from shoplm.open_files import raise_limit
from shoplm.served import server_version
from shoplm.server import FLUSH_SECONDS, EngineFactory, Server, engine_process

EXIT_CALLS_CUT, EXIT_CONFIGURATION, EXIT_INTERRUPTED = 1, 2, 130
EXIT_TRANSIENT = 75  # EX_TEMPFAIL of sysexits.h: start me again
_DEFAULT_ADDRESS = ("127.0.0.1", 50051)  # the command-line client's own

log = logging.getLogger("shoplm.server")
T = TypeVar("T")


async def serve(config: ServerConfig, make_engine: EngineFactory = engine_process) -> int:
    """Serve until a signal. Returns the exit code: 0, or 1 if calls were cut after `drain_seconds`; 75 if the engine
    cannot come back, but a new server may; a second signal stops at once (130). Raises as `Server.start`."""
    started = time.monotonic()
    first, second = asyncio.Event(), asyncio.Event()
    lame_duck_seconds = config.lame_duck_seconds

    def take(number: signal.Signals) -> None:
        nonlocal lame_duck_seconds
        if number is not signal.SIGTERM:  # of a terminal, where somebody waits and no balancer
            lame_duck_seconds = 0.0
        # A terminal that goes may send its signal twice.
        (second if first.is_set() and number is not signal.SIGHUP else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, take, number)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` leaves it
        loop.add_signal_handler(signal.SIGHUP, take, signal.SIGHUP)
    server = Server(config, make_engine)
    grace_seconds = 0.0
    try:
        await _unless(first, server.start())
        if first.is_set():
            return 0
        _say(ready_text(server, time.monotonic() - started))
        await _unless(first, server.engine_ended.wait())
        if server.engine_ended.is_set():
            lame_duck_seconds = 0.0  # no call could be answered
        drained = await _unless(second, server.drain(config.drain_seconds, lame_duck_seconds))
        if second.is_set():
            return EXIT_INTERRUPTED
        grace_seconds = FLUSH_SECONDS
        if server.engine_ended.is_set():
            return EXIT_TRANSIENT
        return 0 if drained else EXIT_CALLS_CUT
    finally:
        await server.close(grace_seconds)


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the event comes first: the work is cancelled then."""
    task = asyncio.create_task(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


def _say(text: str) -> None:
    """Write to standard output. The server goes on where that fails: a full disk, or a reader that has gone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        log.warning("what is said once ready cannot be written: %s", error.strerror)
        with Path(os.devnull).open("wb") as nowhere:  # where what is buffered goes at the end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def ready_text(server: Server, seconds: float) -> str:
    """The ready line, and a call to copy for each service that answers."""
    config, served = server.config, server.served
    assert served is not None
    shop = served.shop
    what = served.base.name
    if shop is not None:
        what = f"{shop.manifest.title} ({shop.manifest.name} {shop.manifest.version}) on {what}"
    grpc = address(config.host, server.port)
    lines = [
        f"ShopLM {server_version()} is ready after {seconds:.1f} s: {what}",
        f"  gRPC {grpc}   metrics http://{address(config.metrics_host, server.metrics_port)}/metrics",
        "Try, in another terminal:",
    ]
    where = "" if (config.host, server.port) == _DEFAULT_ADDRESS else f" --address {grpc}"
    customer = f" --customer {shlex.quote(next(iter(shop.demo)))}" if shop is not None and shop.demo else ""
    if shop is not None:
        lines.append(f"  shoplm recommend{customer}{where}")
        if shop.manifest.targets:
            lines.append(f"  shoplm predict{customer}{where}")
    if served.base.origin is not Origin.SCRATCH:
        question = "How can I return something?" if shop is not None and len(shop.knowledge) else "What can you do?"
        lines.append(f"  shoplm chat{customer}{where} {shlex.quote(question)}")
    return "\n".join(lines) + "\n"


def serve_command(arguments: Sequence[str], engine: EngineProcess | None = None) -> int:
    """`shoplm serve`: flags in, exit code out. `--print-config` shows the settings and where to put them. `engine` is
    the process that will load, if it was started already."""
    flags = [argument for argument in arguments if argument != "--print-config"]
    try:
        config = load_config(flags)
        if len(flags) < len(arguments):
            sys.stdout.write(config.to_toml())
            return 0
        configure_logs(config.log_level, config.log_format)
        raise_limit()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve(config, partial(engine_process, started=engine)))
    except ConfigurationError as error:
        sys.stderr.write(f"shoplm serve: {error}\n")
        return EXIT_TRANSIENT if isinstance(error, TransientError) else EXIT_CONFIGURATION


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed: everywhere but on Windows."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
