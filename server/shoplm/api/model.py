"""ModelService: what is served, and its limits."""

from __future__ import annotations

from shoplm.api.core import Context, Core
from shoplm.api.prediction import target_message
from shoplm.served import server_version
from shoplm.v1 import model_pb2 as pb
from shoplm.v1.model_pb2_grpc import ModelServiceServicer


class ModelService(ModelServiceServicer):
    """See protos/shoplm/v1/model.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        core = self._core
        config, shop = core.config, core.served.shop
        response = pb.GetModelResponse(
            model=core.model_version,
            limits=pb.Limits(
                max_context_tokens=core.ready().max_context_tokens,
                max_history_tokens=shop.manifest.prompt.history_budget_tokens if shop is not None else 0,
                max_events=config.max_events,
                max_count=config.max_count,
                max_beam_width=core.max_beam_width(shop.manifest.depth if shop is not None else 1),
                max_completion_tokens=config.max_completion_tokens,
                max_message_bytes=config.max_message_bytes,
                max_candidates=core.max_candidates,
                max_targets=config.max_targets,
                max_messages=config.max_messages,
                max_text_bytes=config.max_text_bytes,
                max_stop_strings=config.max_stop_strings,
                max_filter_values=config.max_filter_values,
            ),
            server_version=server_version(),
        )
        if shop is not None:
            response.targets.extend(target_message(spec) for spec in shop.targets)
            response.item_count = len(shop.catalog)
            response.categories.extend(shop.catalog.category_names)
            response.attributes.extend(shop.manifest.prompt.attributes)
            response.attribute_values.extend(
                pb.AttributeValues(attribute=name, values=values)
                for name, values in shop.manifest.prompt.attribute_values.items()
            )
            response.demo_customer_ids.extend(shop.demo)
            response.notice = shop.manifest.notice
        return response
