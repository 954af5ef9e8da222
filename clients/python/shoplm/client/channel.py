"""How the clients connect: deadlines, retries, keepalive, load balancing, encryption and call metadata."""

from __future__ import annotations

import json
import math
import re
import uuid
from dataclasses import dataclass, field, fields, replace

import grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
PRIORITY_KEY = "x-priority"
MOST_PRIORITY = 100
TENANT_KEY = "x-tenant-id"  # the server's default for its tenant_metadata_key
_NAME = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what servers take as a tenant or a request id
_LOCAL = r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?"
_LOOPBACK = re.compile(rf"(ipv[46]:|dns:(///)?)?{_LOCAL}(,{_LOCAL})*")
_SERVICES = ("RecommendationService", "ChatService", "PredictionService", "ModelService")

# A streaming call sends data all the time, so pings only find dead peers; more often than this and a server with
# gRPC's default settings (one ping in five minutes without data, two strikes) would close a slow call's connection.
_KEEPALIVE_MILLISECONDS = 60_000


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines in seconds from the start of a call, retries included; for chat, until the end of the answer.

    The server sees the deadline: it refuses at once what it cannot finish by then.
    """

    recommendation_seconds: float = 10.0
    chat_seconds: float = 120.0
    prediction_seconds: float = 10.0
    model_seconds: float = 5.0

    def __post_init__(self) -> None:
        for each in fields(self):
            check_timeout(f"Timeouts.{each.name}", getattr(self, each.name))

    @classmethod
    def of(cls, timeout: float | Timeouts | None) -> Timeouts:
        """The deadlines that a client's `timeout` argument stands for: a number of seconds goes for every service."""
        if timeout is None:
            return cls()
        if isinstance(timeout, Timeouts):
            return timeout
        check_timeout("timeout", timeout)
        return replace(cls(), **{each.name: float(timeout) for each in fields(cls)})


def check_timeout(name: str, seconds: float) -> None:
    """Raise ValueError unless `seconds` is a finite number above zero."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{name}={seconds} must be a finite number of seconds above 0")


def check_priority(priority: int) -> None:
    """Raise ValueError unless it is a whole number that servers take."""
    if not isinstance(priority, int) or abs(priority) > MOST_PRIORITY:
        raise ValueError(f"priority={priority!r} must be a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}")


def check_request_id(request_id: str) -> None:
    """Raise ValueError unless servers take it: they would make another, or gRPC send none."""
    if not (isinstance(request_id, str) and _NAME.fullmatch(request_id)):
        raise ValueError(f"request_id={request_id!r} must be 1 to 128 letters, digits or ._:/+=@-")


def service_config(*, retries: bool, round_robin: bool, health_checks: bool) -> str:
    """gRPC service config (JSON) of the clients.

    Retried, up to three times within the deadline and only before the first message has arrived: UNAVAILABLE,
    RESOURCE_EXHAUSTED, and CANCELLED, with which gRPC breaks off calls that are under way to a port that closes. gRPC
    waits as long as the server's `grpc-retry-pushback-ms` says, else with exponential back-off, and stops retrying
    altogether while more than half of the tokens of the throttle are spent, so that retries cannot pile onto a server
    that is down. (Source: gRFC A6.)
    """
    config: dict[str, object] = {}
    if round_robin:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        if health_checks:  # gRPC makes none under pick_first
            config["healthCheckConfig"] = {"serviceName": ""}
    if retries:
        config["methodConfig"] = [
            {
                "name": [{"service": f"shoplm.v1.{service}"} for service in _SERVICES],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
                },
            }
        ]
        config["retryThrottling"] = {"maxTokens": 20, "tokenRatio": 0.2}
    return json.dumps(config)


@dataclass(frozen=True, slots=True)
class Connection:
    """Where and how to connect, and as whom.

    `root_certificates` (PEM) implies TLS, and so do `certificate_chain` and `private_key` (PEM), for servers that ask
    their clients for a certificate. `round_robin` spreads calls over all addresses that the name resolves to (a
    Kubernetes headless service, for example) and leaves out servers that say they are NOT_SERVING, as draining ones
    do; `health_checks` off for a proxy between them that refuses such questions. `tenant` shares the server with other
    tenants fairly.
    """

    address: str = DEFAULT_ADDRESS
    token: str | None = field(default=None, repr=False)
    tenant: str | None = None
    tls: bool = False
    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    retries: bool = True
    round_robin: bool = False
    health_checks: bool = True

    def __post_init__(self) -> None:
        if not self.address:
            raise ValueError('address is empty; pass "host:port", for example "127.0.0.1:50051"')
        if re.match(r"(https?|grpcs?)://", self.address):
            raise ValueError(f"address={self.address!r} must be host:port without {self.address.split('//')[0]}//")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ValueError("token must be printable ASCII and not empty; leave it out for a server without tokens")
        if self.tenant is not None and not _NAME.fullmatch(self.tenant):
            raise ValueError(f"tenant={self.tenant!r} must be 1 to 128 letters, digits or ._:/+=@-")
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ValueError("certificate_chain and private_key come together: give both or none")

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """gRPC channel arguments."""
        config = service_config(retries=self.retries, round_robin=self.round_robin, health_checks=self.health_checks)
        options: list[tuple[str, str | int]] = [
            ("grpc.service_config", config),
            ("grpc.enable_retries", int(self.retries)),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MILLISECONDS),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.primary_user_agent", "shoplm-python"),
        ]
        if _LOOPBACK.fullmatch(self.address):
            options.append(("grpc.enable_http_proxy", 0))  # which would look for the server on its own machine
        return options

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials, None for an unencrypted connection."""
        if self.tls or self.root_certificates is not None or self.private_key is not None:
            return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)
        return None

    def open(self) -> grpc.Channel:
        """A channel for blocking calls."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address, self.options)
        return grpc.secure_channel(self.address, self.credentials, self.options)

    def open_aio(self) -> grpc.aio.Channel:
        """A channel for asyncio calls; belongs to the running event loop."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, self.options)
        return grpc.aio.secure_channel(self.address, self.credentials, self.options)

    def metadata(self, request_id: str, priority: int | None = None) -> tuple[tuple[str, str], ...]:
        """Metadata of one call: its id, the token, the tenant and the priority."""
        pairs = [("x-request-id", request_id)]
        if self.token is not None:
            pairs.append(("authorization", f"Bearer {self.token}"))
        if self.tenant is not None:
            pairs.append((TENANT_KEY, self.tenant))
        if priority is not None:
            pairs.append((PRIORITY_KEY, f"{priority:d}"))
        return tuple(pairs)


def new_request_id() -> str:
    """An id for one call, the same over its retries."""
    return uuid.uuid4().hex
