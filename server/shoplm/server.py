"""The API process: starts everything, and stops without failing a call.

gRPC, metrics and probes are on one event loop. The engine is a process of its own behind its client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from shoplm.api.calls import Calls
from shoplm.api.core import Core, Engine
from shoplm.api.customers import CustomerReader
from shoplm.api.grpc_server import GrpcServer
from shoplm.api.health import Health
from shoplm.api.probes import ProbeServer
from shoplm.bundle import manifest_hash, read_manifest
from shoplm.collector import keep_loaded
from shoplm.config import ServerConfig
from shoplm.engine.launch import EngineProcess
from shoplm.engine.shop_texts import ShopTexts
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.errors import ConfigurationError, TransientError
from shoplm.metrics import Metrics, ModelInfo
from shoplm.model.base import Base, bundle_base
from shoplm.model.origin import Origin
from shoplm.prompt import SUFFIX_TOKENS
from shoplm.request import StepStats
from shoplm.served import Served, load_served, server_version

FLUSH_SECONDS = 1.0  # for the last bytes of calls that have just ended
_QUIET_SECONDS, _LONGEST_QUIET_SECONDS = 0.005, 2.0  # without a new call, before the port closes

log = logging.getLogger("shoplm.server")
T = TypeVar("T")


class ManagedEngine(Engine, Protocol):
    """`shoplm.engine.client.EngineClient`, as far as the server needs it."""

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises ConfigurationError if it cannot load."""
        ...

    def on_stats(self, callback: Callable[[StepStats], None]) -> None: ...

    def on_state(self, callback: Callable[[bool], None]) -> None: ...

    @property
    def process_id(self) -> int | None:
        """None: it has no process of its own, or none yet."""
        ...

    def on_end(self, callback: Callable[[TransientError], None]) -> None: ...

    async def close(self) -> None: ...


# From the settings, the base, and what is told of the bundle to engines that would have to read it otherwise.
EngineFactory = Callable[[ServerConfig, Base, asyncio.Future[bytes]], ManagedEngine]


def engine_process(
    config: ServerConfig, base: Base, shop_texts: asyncio.Future[bytes], started: EngineProcess | None = None
) -> ManagedEngine:
    """The engine in a process of its own, the one that was started already where there is one."""
    spec = config.engine_spec(base.folder)
    if config.bundle is not None:  # an engine that is started again must find what this process has read
        spec = msgspec.structs.replace(spec, bundle_hash=manifest_hash(config.bundle))
    return ProcessEngineClient(spec, config.engine_hang_seconds, started, shop_texts)


class Server:
    """One server. `start`, then `drain` or `close`; a server is started once."""

    def __init__(self, config: ServerConfig, make_engine: EngineFactory = engine_process) -> None:
        self.config = config
        self._created = time.monotonic()
        self.metrics = Metrics()
        self.served: Served | None = None
        self.port = 0
        self.metrics_port = 0
        self._make_engine = make_engine
        self._probes = ProbeServer(self.metrics.registry, self._is_ready)
        self._grpc: GrpcServer | None = None
        self._engine: ManagedEngine | None = None
        self._health: Health | None = None
        self.draining = False
        self.engine_ended = asyncio.Event()  # it was lost, and none can take its place
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Returns once calls are served. Raises ConfigurationError, TransientError where another start may succeed;
        call `close` then, too."""
        config = self.config
        self.metrics_port = await self._probes.start(config.metrics_host, config.metrics_port)
        self._grpc = GrpcServer(config, self.metrics)
        self.port = self._grpc.port
        if config.bundle is not None:
            read_manifest(config.bundle, verify=False)  # what is none must not wait for a base
        base = await run_in_daemon_thread(partial(bundle_base, config.bundle, config.base))
        # The engine loads weights while this process reads metadata; bad metadata need not wait for the weights.
        reading = asyncio.create_task(asyncio.to_thread(load_served, base, config.bundle, verify=config.verify_bundle))
        texts = asyncio.create_task(self._shop_texts(reading))
        engine = self._engine = self._make_engine(config, base, texts)
        engine.on_stats(self.metrics.observe_step_stats)
        self.metrics.watch_engine(lambda: engine.process_id)
        engine.on_end(self._engine_end)
        loading = asyncio.create_task(engine.start())
        try:
            self.served = await reading
            await loading
        finally:
            loading.cancel()
        self._check_sizes(engine)
        shop = self.served.shop
        self._health = Health(
            has_bundle=shop is not None,
            predicts=shop is not None and bool(shop.targets),
            chats=base.origin is not Origin.SCRATCH,
            engine_api=config.engine_api,
        )
        customers = CustomerReader(self.served.shop, config.max_events)
        self._grpc.add_services(Core(self.served, engine, config, self.metrics, customers), self._health)
        await self._grpc.start()
        self._describe(engine)
        engine.on_state(self._engine_state)
        self.metrics.engine_state(True)
        await self._health.set_serving(True)
        self.metrics.start_seconds.set(time.monotonic() - self._created)
        keep_loaded()

    @staticmethod
    async def _shop_texts(reading: asyncio.Task[Served]) -> bytes:
        """What the engine is told of the bundle; nothing where there is none, or none that can be read."""
        await asyncio.wait((reading,))
        shop = None if reading.cancelled() or reading.exception() is not None else reading.result().shop
        if shop is None:
            return b""
        tokenizer = reading.result().tokenizer
        texts = await asyncio.to_thread(ShopTexts.of, shop.manifest, shop.catalog, tokenizer)
        return msgspec.msgpack.encode(texts)

    def _check_sizes(self, engine: ManagedEngine) -> None:
        """Raises ConfigurationError where long histories of the bundle would be refused, each with its caller."""
        assert self.served is not None
        if self.served.shop is None or engine.ready is None:
            return
        budget = self.served.shop.manifest.prompt.history_budget_tokens
        needed = len(self.served.prompts.prefix(None).tokens) + budget + SUFFIX_TOKENS
        if (most := engine.ready.max_context_tokens) < needed:
            raise ConfigurationError(
                f"the engine takes prompts of at most {most} tokens, and the bundle's are of up to {needed}: raise "
                f"max_context_tokens ({self.config.max_context_tokens}) or kv_cache_mib ({self.config.kv_cache_mib})"
            )

    async def drain(self, seconds: float, lame_duck_seconds: float = 0.0) -> bool:
        """Send callers elsewhere and let running calls finish. Returns whether all did within `seconds`; the others are
        ended. New calls are taken for `lame_duck_seconds` more, half of `seconds` at most."""
        self.draining = True
        if self._health is not None:
            await self._health.set_serving(False)
        if self._grpc is None:
            return True
        calls = self._grpc.calls
        log.info("draining", extra={"calls": calls.in_flight})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.sleep(min(lame_duck_seconds, seconds / 2))
                await self._last_calls(calls)
                self._run(self._grpc.stop(seconds + FLUSH_SECONDS))
                await calls.idle()
        if calls.in_flight:
            log.warning("drain_seconds are over", extra={"calls": calls.in_flight})
            calls.cut(seconds)
            return False
        return True

    @staticmethod
    async def _last_calls(calls: Calls) -> None:
        """gRPC breaks off calls that it has received and not yet handed over when the port closes, and their callers
        would not know that they may try again: wait for a moment without any."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_QUIET_SECONDS):
                await calls.quiet(_QUIET_SECONDS)

    async def close(self, grace_seconds: float = FLUSH_SECONDS) -> None:
        """Stop everything that was started, cancelling what runs after the grace period."""
        self.draining = True
        if self._grpc is not None:
            await self._grpc.stop(grace_seconds)
        if self._engine is not None:
            await self._engine.close()
        await self._probes.close()
        for task in self._tasks:
            task.cancel()

    def _is_ready(self) -> bool:
        return self._health is not None and self._health.serving

    def _engine_state(self, serving: bool) -> None:
        self.metrics.engine_state(serving)
        if serving:
            log.info("the engine serves again")
        else:
            log.error("the engine was lost; it is started again")
        if self._health is not None and not self.draining:
            self._run(self._health.set_serving(serving))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _engine_end(self, why: TransientError) -> None:
        log.error("the engine is not started again: %s; the server ends", why)
        self.engine_ended.set()

    def _describe(self, engine: ManagedEngine) -> None:
        assert self.served is not None
        backend = engine.ready.backend if engine.ready is not None else ""
        self.metrics.describe(ModelInfo(*self.served.model_version, backend, server_version()))


async def run_in_daemon_thread(work: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but the process may end before `work` does: a base is downloaded and converted for
    minutes, and what is made of it is kept whole or not at all."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(outcome)
