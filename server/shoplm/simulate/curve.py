"""What steps cost on a machine, as a file or a text says it."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from shoplm.scheduler.cost import Coefficients, StepLoad


class CurveError(ValueError):
    """A cost curve cannot be read; the message says what is wrong with it."""


class CostCurve(msgspec.Struct, frozen=True):
    """Seconds of a step: a constant, and parts per token, per key that attention reads, and per request.

    `benchmarks/cost_curve.py` measures one; other fields of its file are ignored.
    """

    step_seconds: float
    token_seconds: float
    kv_token_seconds: float = 0.0
    row_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: it must be 0 or more")
        if not self.step_seconds + self.token_seconds:
            raise ValueError("step_seconds and token_seconds are both 0: steps would take no time")

    def seconds(self, load: StepLoad) -> float:
        """Seconds of a step."""
        return Coefficients(self.step_seconds, self.token_seconds, self.kv_token_seconds, self.row_seconds).seconds(
            load
        )

    def slower(self, factor: float) -> CostCurve:
        """The curve of a machine, or of a part of this one, that takes `factor` times as long."""
        return CostCurve(*(factor * getattr(self, name) for name in self.__struct_fields__))


def read_curve(text: str) -> CostCurve:
    """A curve from a JSON file's path, or from `step=0.014,token=0.0009,kv=4e-7,row=0.0015`. Raises CurveError."""
    try:
        if "=" not in text:
            return msgspec.json.decode(Path(text).read_bytes(), type=CostCurve)
        parts = dict(part.strip().split("=", 1) for part in text.split(","))
        names = {"step": "step_seconds", "token": "token_seconds", "kv": "kv_token_seconds", "row": "row_seconds"}
        unknown = sorted(set(parts) - set(names))
        if unknown:
            raise CurveError(f"{unknown[0]!r} is not one of {', '.join(names)}")
        return CostCurve(**{names[name]: float(value) for name, value in parts.items()})
    except CurveError:
        raise
    except (OSError, ValueError, TypeError, msgspec.MsgspecError) as error:
        raise CurveError(f"cost {text!r}: {error}") from error
