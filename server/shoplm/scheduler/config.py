"""Bounds and targets of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoplm.request import Request, Service

DEFAULT_TARGETS = {Service.RECOMMENDATION: 0.1, Service.PREDICTION: 0.05, Service.CHAT: 0.5}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Everything is a bound except `target_seconds`, which only orders work."""

    max_step_tokens: int = 512  # of a step
    max_mixed_prompt_tokens: int = 128  # prompt tokens of a step in which answers go on: keeps their tokens coming
    max_queued_requests: int = 2048
    max_queued_tokens: int = 1_000_000
    target_seconds: dict[Service, float] = field(default_factory=lambda: dict(DEFAULT_TARGETS))

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "max_mixed_prompt_tokens", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def due_seconds(self, request: Request) -> float:
        """When the request should have its (first) result: the caller's deadline, or the service's target."""
        target = request.arrival_seconds + self.target_seconds[request.service]
        return target if request.deadline_seconds is None else min(target, request.deadline_seconds)
