"""A server, and what must be as before once a load has gone: pages, tasks, file descriptors, memory, the books."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import psutil
from server_thread import ServerThread
from shoplm.bench.calls import open_channel
from shoplm.config import ServerConfig
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.request import Service
from shoplm.server import engine_process
from shoplm.v1 import chat_pb2, recommendation_pb2, shop_pb2
from shoplm.v1.chat_pb2_grpc import ChatServiceStub
from shoplm.v1.recommendation_pb2_grpc import RecommendationServiceStub
from tiny_shop import DEMO_CUSTOMER

SETTLE_SECONDS = 60.0
RECOMMEND = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER))
ASK = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")], max_tokens=200)


@dataclass(frozen=True)
class Holdings:
    """What the two processes hold while no call is there."""

    tasks: int
    files: int
    memory_bytes: int


class Client:
    """Async stubs on a connection of its own."""

    def __init__(self, address: str, **metadata: str) -> None:
        self.channel = open_channel(address)
        self._metadata = tuple(metadata.items())
        self._recommend: Any = RecommendationServiceStub(self.channel)  # type: ignore[arg-type]
        self._chat: Any = ChatServiceStub(self.channel)  # type: ignore[arg-type]

    def chat(self, timeout: float = 60.0) -> Any:
        return self._chat.Chat(ASK, timeout=timeout, metadata=self._metadata)

    async def recommend(self, timeout: float = 60.0) -> grpc.StatusCode:  # noqa: ASYNC109
        return await ending(self._recommend.Recommend(RECOMMEND, timeout=timeout, metadata=self._metadata))

    async def talk(self, timeout: float = 60.0) -> grpc.StatusCode:  # noqa: ASYNC109
        async def read() -> None:
            async for _ in self.chat(timeout):
                pass

        return await ending(read())


async def ending(call: Awaitable[object]) -> grpc.StatusCode:
    """How a call ended."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


class Ordeal:
    """`with Ordeal(config) as ordeal:` runs loads from this process's loop, and checks afterwards."""

    def __init__(self, config: ServerConfig) -> None:
        self.server = ServerThread(config, engine_process)
        self._process = psutil.Process()

    def __enter__(self) -> Self:
        self.server.__enter__()
        self.address = self.server.address
        self.run(self._warm_up())
        self.calm = self._settled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.__exit__(kind, error, trace)

    async def _warm_up(self) -> None:
        client = Client(self.address)
        await asyncio.gather(*(client.talk() for _ in range(8)), *(client.recommend() for _ in range(8)))
        await client.channel.close()

    @property
    def engine(self) -> ProcessEngineClient:
        engine = self.server.server._engine
        assert isinstance(engine, ProcessEngineClient)
        return engine

    def run(self, load: Coroutine[Any, Any, Any]) -> Any:
        """Run a load on a loop of its own, as other processes' clients would."""
        return asyncio.run(load)

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels."""
        return sum(
            sample.value
            for family in self.server.server.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def check(self, *, engine_was_lost: bool = False) -> None:
        """Nothing is left of the load, and every call is accounted for."""
        now = self._settled()
        assert now.tasks <= self.calm.tasks + 2, (now, self.calm)
        assert now.files <= self.calm.files + 4, (now, self.calm)
        if not engine_was_lost:  # a new engine has yet to touch its memory
            assert now.memory_bytes <= self.calm.memory_bytes * 1.05 + 32 * 2**20, (now, self.calm)
        started, handled = self.value("grpc_server_started_total"), self.value("grpc_server_handled_total")
        assert started == handled
        for service in map(str, Service):
            submitted = self.value("shoplm_engine_submitted_total", service=service)
            finished = self.value("shoplm_engine_time_seconds_count", service=service)
            failed = self.value("shoplm_engine_failures_total", service=service)
            assert submitted == finished + failed, service

    def _settled(self) -> Holdings:
        """What is held once nothing runs any more. Fails if that takes too long."""
        end = time.monotonic() + SETTLE_SECONDS
        while not self._is_calm():
            assert time.monotonic() < end, "the server does not come to rest: " + str(self._busy())
            time.sleep(0.05)
        time.sleep(0.6)  # the engine's last report, and gRPC's own clean-up of closed connections
        assert self._is_calm()
        processes = [self._process, *self._process.children()]
        return Holdings(
            tasks=self.server.run(_tasks()),
            files=sum(each.num_fds() for each in processes),
            memory_bytes=sum(each.memory_info().rss for each in processes),
        )

    def _busy(self) -> dict[str, float]:
        return {
            "calls": self.server.server._grpc.calls.in_flight if self.server.server._grpc else 0,
            "engine calls": self.engine.in_flight,
            "running": self.value("shoplm_requests_running"),
            "queued": self.value("shoplm_requests_queued"),
            "pages": self.value("shoplm_kv_pages", state="used"),
        }

    def _is_calm(self) -> bool:
        return not any(self._busy().values())


async def _tasks() -> int:
    return len(asyncio.all_tasks())


async def for_seconds(seconds: float, workers: int, call: Callable[[int], Awaitable[grpc.StatusCode]]) -> Counter[str]:
    """`call(number of the worker)` without a pause from each worker; how the calls ended."""
    codes: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def work(number: int) -> None:
        while time.monotonic() < end:
            codes[(await call(number)).name] += 1

    await asyncio.gather(*map(work, range(workers)))
    return codes
