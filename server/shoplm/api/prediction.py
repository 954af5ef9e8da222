"""PredictionService: calibrated heads on the state that the customer's history leaves."""

from __future__ import annotations

from collections.abc import Sequence

from shoplm.api.core import Context, Core
from shoplm.api.explanations import Asked, Explainer
from shoplm.api.validation import Violations, quote
from shoplm.api.warnings import Warnings
from shoplm.bundle import HeadSpec
from shoplm.errors import NotServingError
from shoplm.readout.answers import Answer, population_seconds, reader, usual
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


class _Target:
    """A target of the bundle with what its answers always say."""

    def __init__(self, spec: HeadSpec) -> None:
        self.spec = spec
        self.read = reader(spec)
        self.usual = usual(spec)
        self._population_seconds = population_seconds(spec)
        self.constant = pb.Prediction(target=target_message(spec), population_mean=spec.base_rate)

    def fill(self, message: pb.Prediction, answer: Answer, since_purchase: float) -> None:
        """Add the answer for a customer who last bought this many seconds ago."""
        probability, amount, low, high = answer
        if probability is not None:
            message.probability = probability
        elif amount is not None:
            message.amount = amount
        if low is not None and high is not None:
            message.interval_low, message.interval_high = low, high
        message.applicable = since_purchase <= self._population_seconds


class PredictionService(PredictionServiceServicer):
    """See protos/shoplm/v1/prediction.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._explainer = Explainer(core)
        shop = core.served.shop
        self._targets = () if shop is None else tuple(map(_Target, shop.targets))
        self._all = self._template(self._targets)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        core = self._core
        core.shop()
        if not self._targets:
            raise NotServingError("this bundle predicts nothing: its log was too short or too small, as its card says")
        violations, warnings = Violations(), Warnings()
        history = core.customers.read(request.customer, violations, warnings)
        targets = self._asked(request.targets, violations) if request.targets else self._targets
        violations.raise_if_any()
        response = pb.PredictResponse.FromString(self._all if targets is self._targets else self._template(targets))
        since_purchase = history.as_of - core.last_purchase(history)
        if not core.shop().knows(history):  # nothing for the model to read: the engine is not asked
            for target, message in zip(targets, response.predictions, strict=True):
                target.fill(message, target.usual, since_purchase)
            warnings.add("EMPTY_HISTORY")
            warnings.add("NOT_EXPLAINED", int(request.explain))
            response.usage.SetInParent()
            response.warnings.extend(core.warned(_SERVICE, warnings))
            return response
        prefix = core.prefix(history)
        warnings.add("HISTORY_TRUNCATED", prefix.truncated_baskets)
        suffix = core.served.prompts.predict_suffix(history)
        core.check_prompt("customer", len(prefix.tokens) + len(suffix))
        work = core.request(_SERVICE, suffix, Predict(core.features(history)), context, prefix=prefix)
        finished = await core.engine.run(work)
        for target, message in zip(targets, response.predictions, strict=True):
            target.fill(message, target.read(finished.values), since_purchase)
        core.fill_usage(response.usage, work, finished.cached_tokens, finished.completion_tokens)
        if request.explain and targets and self._explainer.can_explain(history, prefix, warnings, items=False):
            asked = Asked(_SERVICE, history, prefix, context, request.allow_degraded)
            why = await self._explainer.targets(asked, [target.spec for target in targets])
            for message, influences in zip(response.predictions, why.influences, strict=True):
                message.influences.extend(influences)
            response.usage.explanation_tokens = why.tokens
            response.degradations.extend(core.degraded(why.degraded))
        if warnings:
            response.warnings.extend(core.warned(_SERVICE, warnings))
        return response

    def _template(self, targets: Sequence[_Target]) -> bytes:
        """What every answer for these targets says. It is parsed sooner than it is put together field by field."""
        predictions = [target.constant for target in targets]
        return pb.PredictResponse(predictions=predictions, model=self._core.model_version).SerializeToString()

    def _asked(self, targets: Sequence[pb.Target], violations: Violations) -> tuple[_Target, ...]:
        if not violations.length("targets", targets, self._core.config.max_targets, "max_targets"):
            return ()
        found = (_find(f"targets[{index}]", asked, self._targets, violations) for index, asked in enumerate(targets))
        return tuple(target for target in found if target is not None)


def target_message(spec: HeadSpec) -> pb.Target:
    """The target as callers name it."""
    return pb.Target(kind=_KINDS[spec.kind], horizon_days=spec.horizon_days, campaign_type=spec.campaign_type)


def _find(path: str, asked: pb.Target, targets: Sequence[_Target], violations: Violations) -> _Target | None:
    """The target that is asked for; None after adding a violation that names the field and lists what there is."""
    kind = _NAMES.get(asked.kind)
    if kind is None:
        violations.add(f"{path}.kind", f"is {_kind_name(asked.kind)}, expected one of {', '.join(_KINDS)}")
        return None
    same = [target for target in targets if target.spec.kind == kind]
    if not same:
        offered = ", ".join(sorted({target.spec.kind for target in targets})) or "none"
        violations.add(f"{path}.kind", f"is {kind}, which this bundle does not predict; it has: {offered}")
        return None
    of_type = [target for target in same if target.spec.campaign_type == asked.campaign_type]
    if not of_type:
        offered = ", ".join(quote(target.spec.campaign_type) for target in same if target.spec.campaign_type)
        known = f"expected one of {offered}" if offered else f"but {kind} has no campaign type"
        violations.add(f"{path}.campaign_type", f"is {quote(asked.campaign_type)}, {known}")
    horizons = [target.spec.horizon_days for target in of_type or same]
    horizon = asked.horizon_days or (DEFAULT_HORIZON_DAYS if any(horizons) else 0)
    if horizon not in horizons:
        offered = ", ".join(str(days) for days in horizons if days)
        known = f"{kind} is predicted for {offered} days" if offered else f"but {kind} has no horizon"
        violations.add(f"{path}.horizon_days", f"is {horizon}, {known}")
    return next((target for target in of_type if target.spec.horizon_days == horizon), None)


def _kind_name(kind: int) -> str:
    return pb.TargetKind.Name(pb.TargetKind.ValueType(kind)) if kind in pb.TargetKind.values() else str(kind)
