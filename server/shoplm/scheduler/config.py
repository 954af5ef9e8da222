"""Bounds, targets and weights of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shoplm.request import Service

DEFAULT_TARGETS = {Service.RECOMMENDATION: 0.1, Service.PREDICTION: 0.05, Service.CHAT: 0.5}
DEFAULT_TOKEN_TARGET = 0.06


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """Whom to serve first, and whom to refuse. Times in seconds.

    A target orders work; only a deadline that the caller set refuses it, or a target of a service in `enforced`.
    """

    order: Literal["slack", "fcfs"] = "slack"  # fcfs: by arrival, nothing is predicted, refused early or shared
    target_seconds: dict[Service, float] = field(default_factory=lambda: dict(DEFAULT_TARGETS))  # of the first result
    token_target_seconds: float = DEFAULT_TOKEN_TARGET  # between two tokens of a chat answer
    enforced: tuple[Service, ...] = ()  # their target refuses and sheds as a deadline of the first result would
    service_weights: dict[Service, float] = field(
        default_factory=dict
    )  # shares of a busy engine; 1 where unnamed; none: by demand
    tenant_weights: dict[str, float] = field(default_factory=dict)  # shares within a service; 1 where unnamed

    def __post_init__(self) -> None:
        if self.order not in ("slack", "fcfs"):
            raise ValueError(f"order is {self.order!r}: it must be slack or fcfs")
        positive = {
            "token_target_seconds": self.token_target_seconds,
            **{f"target_seconds of {service}": value for service, value in self.target_seconds.items()},
            **{f"the weight of service {service}": value for service, value in self.service_weights.items()},
            **{f"the weight of tenant {tenant!r}": value for tenant, value in self.tenant_weights.items()},
        }
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}: it must be a positive number")
        missing = [service.value for service in Service if service not in self.target_seconds]
        if missing:
            raise ValueError(f"target_seconds names no target of {', '.join(missing)}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of steps and of the queue, and the policy."""

    max_step_tokens: int = 512  # of a step
    max_mixed_prompt_tokens: int = 128  # prompt tokens of a step in which answers go on: keeps their tokens coming
    max_queued_requests: int = 2048
    max_queued_tokens: int = 1_000_000
    max_draft_tokens: int = 0  # guessed tokens of an answer in a step; 0: none
    policy: SchedulingPolicy = field(default_factory=SchedulingPolicy)

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "max_mixed_prompt_tokens", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_draft_tokens < 0:
            raise ValueError(f"max_draft_tokens is {self.max_draft_tokens}: it must be at least 0")
