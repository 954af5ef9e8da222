"""The methods that this server offers, read from the protobuf descriptors."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from shoplm.metrics import ENGINE_SERVICE, MODEL_SERVICE
from shoplm.request import Service
from shoplm.v1 import chat_pb2, engine_pb2, model_pb2, prediction_pb2, recommendation_pb2

RECOMMENDATION = recommendation_pb2.DESCRIPTOR.services_by_name["RecommendationService"]
CHAT = chat_pb2.DESCRIPTOR.services_by_name["ChatService"]
PREDICTION = prediction_pb2.DESCRIPTOR.services_by_name["PredictionService"]
MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
ENGINE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"]

# The `service` label of metrics and logs.
LABELS: dict[ServiceDescriptor, str] = {
    RECOMMENDATION: Service.RECOMMENDATION.value,
    CHAT: Service.CHAT.value,
    PREDICTION: Service.PREDICTION.value,
    MODEL: MODEL_SERVICE,
    ENGINE: ENGINE_SERVICE,
}


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its names for metrics, and what it takes."""

    label: str
    grpc_service: str  # shoplm.v1.ChatService
    name: str  # Chat
    request: type[Message]
    streams: bool

    @property
    def grpc_type(self) -> str:
        """The kind of call, as gRPC's own metrics name it."""
        return "server_stream" if self.streams else "unary"


METHODS: dict[str, Method] = {
    f"/{service.full_name}/{method.name}": Method(
        label, service.full_name, method.name, GetMessageClass(method.input_type), method.server_streaming
    )
    for service, label in LABELS.items()
    for method in service.methods
}
