"""A whole server on an event loop of its own, so that tests can call it as any client does."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shoplm.config import ServerConfig
from shoplm.server import EngineFactory, Server
from shoplm.v1.chat_pb2_grpc import ChatServiceStub
from shoplm.v1.engine_pb2_grpc import EngineServiceStub
from shoplm.v1.model_pb2_grpc import ModelServiceStub
from shoplm.v1.prediction_pb2_grpc import PredictionServiceStub
from shoplm.v1.recommendation_pb2_grpc import RecommendationServiceStub

T = TypeVar("T")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
TIMEOUT_SECONDS = 30.0  # of what takes milliseconds: a test fails instead of hanging
START_SECONDS = 120.0  # of a server, which may load a base and an engine, on a machine that may be busy


class ServerThread:
    """`with ServerThread(config, make_engine) as server:` has stubs of all services over a real channel."""

    def __init__(self, config: ServerConfig, make_engine: EngineFactory) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.server = Server(config, make_engine)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(START_SECONDS)
        self.address = f"127.0.0.1:{self.server.port}"
        self.channel = grpc.insecure_channel(self.address)
        self.recommendation = RecommendationServiceStub(self.channel)
        self.chat = ChatServiceStub(self.channel)
        self.prediction = PredictionServiceStub(self.channel)
        self.model = ModelServiceStub(self.channel)
        self.engine_api = EngineServiceStub(self.channel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        self.run(self.server.close(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_SECONDS)
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_SECONDS)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds on the server's loop, looking at it every turn. Fails after the timeout."""

        async def turns() -> None:
            while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
                await asyncio.sleep(0)

        self.run(turns())

    def health(self, service: str = "") -> int:
        """The health status of one service, or of the server."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
        return status

    def raw(self, path: str, data: bytes, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
        """A unary call of bytes, as a client without our protos could send."""
        call = self.channel.unary_unary(path, request_serializer=None, response_deserializer=None)
        answer: bytes = call(data, timeout=TIMEOUT_SECONDS, metadata=metadata)
        return answer

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """(status, content type, body) of an HTTP GET."""
        url = f"http://127.0.0.1:{self.server.metrics_port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def details(error: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status of a failed call."""
    metadata: Any = error.trailing_metadata()
    found = dict(metadata)["grpc-status-details-bin"]
    assert isinstance(found, bytes)
    return status_pb2.Status.FromString(found)


def detail(error: grpc.RpcError, kind: type[T]) -> T:
    """One detail of a failed call."""
    for packed in details(error).details:
        message: Message = kind()  # type: ignore[assignment]
        if packed.Unpack(message):
            return message  # type: ignore[return-value]
    raise AssertionError(f"no {kind.__name__} in {details(error)}")


def bad_fields(error: grpc.RpcError) -> dict[str, str]:
    """field -> description of an INVALID_ARGUMENT."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (error.code(), error.details())
    violations = detail(error, error_details_pb2.BadRequest).field_violations
    assert violations
    return {violation.field: violation.description for violation in violations}
