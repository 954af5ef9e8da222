"""grpc.health.v1: one status per service name, and "" for the process."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio  # type: ignore[attr-defined]
from shoplm.api.methods import CHAT, ENGINE, MODEL, PREDICTION, RECOMMENDATION

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What probes and balancers see. NOT_SERVING until `set_serving(True)`."""

    def __init__(self, *, has_bundle: bool, predicts: bool, chats: bool, engine_api: bool) -> None:
        offered = {CHAT.full_name: chats, MODEL.full_name: True}
        offered |= {RECOMMENDATION.full_name: has_bundle, PREDICTION.full_name: predicts}
        if engine_api:
            offered[ENGINE.full_name] = True
        self._offered = {"": True, **offered}
        self.servicer = aio.HealthServicer()
        self.serving = False

    async def set_serving(self, serving: bool) -> None:
        """Set all names; what bundle and base cannot do stays NOT_SERVING."""
        self.serving = serving
        for name, offered in self._offered.items():
            await self.servicer.set(name, _SERVING if serving and offered else _NOT_SERVING)
