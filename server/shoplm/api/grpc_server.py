"""Assembles the gRPC server: services, health, reflection, limits, TLS."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from shoplm.address import address
from shoplm.api.calls import Calls
from shoplm.api.chat import ChatService
from shoplm.api.core import Core
from shoplm.api.engine_service import EngineService
from shoplm.api.health import Health
from shoplm.api.methods import CHAT, ENGINE, MODEL, PREDICTION, RECOMMENDATION
from shoplm.api.model import ModelService
from shoplm.api.prediction import PredictionService
from shoplm.api.recommendation import RecommendationService
from shoplm.api.tls import server_credentials
from shoplm.config import ServerConfig
from shoplm.errors import TransientError
from shoplm.metrics import Metrics
from shoplm.v1 import (
    chat_pb2_grpc,
    engine_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
    recommendation_pb2_grpc,
)

# gRPC's own bound is a second line: a message up to this many times our limit is read and refused with a reason.
_TRANSPORT_FACTOR = 4
_AGE_GRACE_SECONDS = 60  # calls on a connection that is renewed may take this long

log = logging.getLogger("shoplm.api")


class GrpcServer:
    """A bound port first, so that one that is taken is known before minutes of loading; services later."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        """Binds the port. Raises TransientError if it cannot be had, ConfigurationError if TLS or token files cannot be
        read."""
        self._config = config
        self.calls = Calls(
            metrics,
            tokens=(tokens := config.tokens()),
            max_calls=config.max_concurrent_calls,
            max_message_bytes=config.max_message_bytes,
            tenant_key=config.tenant_metadata_key,
        )
        if config.is_public and not tokens:
            log.warning("gRPC listens on %s without authentication; set auth_tokens", config.host)
        self._server = grpc.aio.server(handlers=[self.calls], options=_options(config))
        self.port = self._bind()

    def _bind(self) -> int:
        config = self._config
        _check_free(config.host, config.port)
        where = address(config.host, config.port)
        credentials = server_credentials(config)
        try:
            if credentials is None:
                return self._server.add_insecure_port(where)
            return self._server.add_secure_port(where, credentials)
        except RuntimeError as error:
            raise _taken(where) from error

    def add_services(self, core: Core, health: Health) -> None:
        """Call once, before `start`."""
        server: Any = self.calls
        names = [CHAT, MODEL, RECOMMENDATION, PREDICTION]
        chat_pb2_grpc.add_ChatServiceServicer_to_server(ChatService(core), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(core), server)
        recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server(RecommendationService(core), server)
        prediction_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(core), server)
        if self._config.engine_api:
            engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineService(core), server)
            names.append(ENGINE)
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflected = [*(service.full_name for service in names), health_name, reflection.SERVICE_NAME]
        servicer = reflection.aio.ReflectionServicer(reflected)  # type: ignore[attr-defined]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_seconds: float) -> None:
        """Close the port and send clients elsewhere (GOAWAY); calls that still run after the grace period are
        cancelled. May be called again while it waits: the earlier end counts."""
        await self._server.stop(grace_seconds)


def _taken(where: str) -> TransientError:
    return TransientError(
        f"gRPC cannot listen on {where}: is another server running there? Choose another --port or --host"
    )


def _check_free(host: str, port: int) -> None:
    """Raises TransientError where another process listens on one of the addresses of a name: gRPC listens on the
    others then, and callers may meet either."""
    with contextlib.suppress(socket.gaierror):  # gRPC says what it cannot resolve
        for family, kind, protocol, _, found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if port else ():
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(found)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise _taken(address(str(found[0]), port)) from error


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake that must show
        ("grpc.max_receive_message_length", config.max_message_bytes * _TRANSPORT_FACTOR),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if config.keepalive_seconds:
        options.append(("grpc.keepalive_time_ms", round(config.keepalive_seconds * 1000)))
    if config.max_connection_age_seconds:
        # gRPC adds ten per cent of jitter, so that connections of one moment are not renewed in one moment.
        options.append(("grpc.max_connection_age_ms", round(config.max_connection_age_seconds * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", _AGE_GRACE_SECONDS * 1000))
    return options
