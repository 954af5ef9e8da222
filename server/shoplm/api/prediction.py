"""PredictionService: calibrated heads on the state that the customer's history leaves."""

from __future__ import annotations

from collections.abc import Sequence

from shoplm.api.core import Context, Core
from shoplm.api.explanations import Asked, Explainer, Explanation
from shoplm.api.shop import Shop
from shoplm.api.validation import Violations, quote
from shoplm.api.warnings import Warnings
from shoplm.bundle import HeadSpec
from shoplm.history import History
from shoplm.readout.targets import answer, applicable
from shoplm.request import Predict, Service
from shoplm.v1 import prediction_pb2 as pb
from shoplm.v1.prediction_pb2_grpc import PredictionServiceServicer

DEFAULT_HORIZON_DAYS = 30
_SERVICE = Service.PREDICTION
_NAMES: dict[int, str] = {
    pb.TARGET_KIND_PURCHASE: "purchase",
    pb.TARGET_KIND_PURCHASE_COUNT: "purchase_count",
    pb.TARGET_KIND_SPEND: "spend",
    pb.TARGET_KIND_CHURN: "churn",
    pb.TARGET_KIND_COUPON_REDEMPTION: "coupon_redemption",
}
_KINDS = {name: pb.TargetKind.ValueType(kind) for kind, name in _NAMES.items()}


class PredictionService(PredictionServiceServicer):
    """See protos/shoplm/v1/prediction.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._explainer = Explainer(core)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        core, shop = self._core, self._core.shop()
        violations, warnings = Violations(), Warnings()
        history = core.customers.read(request.customer, violations, warnings)
        specs = self._targets(request.targets, shop, violations)
        violations.raise_if_any()
        prefix = core.prefix(history)
        warnings.add("HISTORY_TRUNCATED", prefix.dropped_baskets)
        warnings.add("EMPTY_HISTORY", int(len(history) == 0))
        tokens = core.served.prompts.predict(prefix, history)
        core.check_prompt("customer", len(tokens))
        work = core.request(
            _SERVICE, tokens, Predict(core.features(history)), context, history_tokens=len(prefix.tokens)
        )
        finished = await core.engine.run(work)
        why = Explanation([()] * len(specs))
        if request.explain and specs and self._explainer.can_explain(history, warnings, items=False):
            asked = Asked(_SERVICE, history, prefix, tokens, context, request.allow_degraded)
            why = await self._explainer.targets(asked, specs)
        predictions = [prediction(spec, finished.values, history) for spec in specs]
        for message, influences in zip(predictions, why.influences, strict=True):
            message.influences.extend(influences)
        return pb.PredictResponse(
            predictions=predictions,
            model=core.served.model_version,
            usage=core.usage(work, finished.cached_tokens, finished.completion_tokens, why.tokens),
            warnings=core.warned(_SERVICE, warnings),
            degradations=core.degraded(why.degraded),
        )

    def _targets(self, targets: Sequence[pb.Target], shop: Shop, violations: Violations) -> tuple[HeadSpec, ...]:
        if not targets:
            return shop.targets
        if not violations.length("targets", targets, self._core.config.max_targets, "max_targets"):
            return ()
        found = (_find(f"targets[{index}]", target, shop, violations) for index, target in enumerate(targets))
        return tuple(spec for spec in found if spec is not None)


def target_message(spec: HeadSpec) -> pb.Target:
    """The target as callers name it."""
    return pb.Target(kind=_KINDS[spec.kind], horizon_days=spec.horizon_days, campaign_type=spec.campaign_type)


def prediction(spec: HeadSpec, values: Sequence[float], history: History) -> pb.Prediction:
    """The answer of one target from the heads' raw values [P]."""
    found = answer(spec, values)
    message = pb.Prediction(target=target_message(spec), base_rate=spec.base_rate, applicable=applicable(spec, history))
    if found.probability is not None:
        message.probability = found.probability
    elif found.amount is not None:
        message.amount = found.amount
    if found.interval_low is not None and found.interval_high is not None:
        message.interval_low, message.interval_high = found.interval_low, found.interval_high
    return message


def _find(path: str, target: pb.Target, shop: Shop, violations: Violations) -> HeadSpec | None:
    """The bundle's head for a target; None after adding a violation that names the field and lists what there is."""
    kind = _NAMES.get(target.kind)
    if kind is None:
        violations.add(f"{path}.kind", f"is {_kind_name(target.kind)}, expected one of {', '.join(_KINDS)}")
        return None
    same = [spec for spec in shop.targets if spec.kind == kind]
    if not same:
        offered = ", ".join(sorted({spec.kind for spec in shop.targets})) or "none"
        violations.add(f"{path}.kind", f"is {kind}, which this bundle does not predict; it has: {offered}")
        return None
    if any(spec.campaign_type for spec in same):
        for spec in same:
            if spec.campaign_type == target.campaign_type:
                return spec
        offered = ", ".join(quote(spec.campaign_type) for spec in same)
        violations.add(f"{path}.campaign_type", f"is {quote(target.campaign_type)}, expected one of {offered}")
        return None
    if target.campaign_type:
        violations.add(f"{path}.campaign_type", f"is {quote(target.campaign_type)}, but {kind} has no campaign type")
        return None
    horizon = target.horizon_days or DEFAULT_HORIZON_DAYS
    for spec in same:
        if spec.horizon_days in (0, horizon):
            return spec
    offered = ", ".join(str(spec.horizon_days) for spec in same)
    violations.add(f"{path}.horizon_days", f"is {horizon}, {kind} is predicted for {offered} days")
    return None


def _kind_name(kind: int) -> str:
    return pb.TargetKind.Name(pb.TargetKind.ValueType(kind)) if kind in pb.TargetKind.values() else str(kind)
